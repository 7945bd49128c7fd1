"""The README's example runs as it is written, and its study file is one that the package accepts."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pandas as pd
import pytest
from oracle import Subject

from remote_mediation.analyses import chosen
from remote_mediation.analyses.claims import verdicts
from remote_mediation.analyses.claims.beside import RANDOM_SETS
from remote_mediation.config import StudyConfig, load_config
from remote_mediation.intervals import STUDENTISED_FROM
from remote_mediation.stats import wilson

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")


def test_the_study_file_is_accepted(tmp_path: Path) -> None:
    settings = (ROOT / "reports/guide/settings.md").read_text("utf-8")
    config = written(tmp_path, settings)
    assert config.model.endswith("SmolLM2-135M-Instruct")
    assert config.statistics.min_share == 0.05  # the last table is read too
    assert written(tmp_path, README.split("## Your own model and prompts")[1]).analyses == ["claims", "layers"]


def written(folder: Path, text: str) -> StudyConfig:
    """The first indented block of a page, as a study file."""
    indented = re.findall(r"(?:^    .*\n|^\n)+", text, re.MULTILINE)
    study = folder / "study.toml"
    study.write_text(textwrap.dedent(next(block for block in indented if block.strip())), "utf-8")
    return load_config(study, {})


def test_what_the_settings_page_shows_is_the_default(tmp_path: Path) -> None:
    """But for what has none: the model and the pairs to use, and the strings of one outcome."""
    shown = written(tmp_path, (ROOT / "reports/guide/settings.md").read_text("utf-8")).model_dump()
    default = StudyConfig(model=shown["model"]).model_dump()
    differing = {name for name, value in shown.items() if value != default[name]}
    assert differing == {"max_pairs", "logit_diff"}


def test_every_study_beside_a_report_is_accepted() -> None:
    studies = sorted(ROOT.glob("reports/*/study.toml"))
    assert len(studies) >= 4
    for study in studies:
        chosen(load_config(study, {}).analyses)


def test_the_judges_page_has_the_figures_of_the_labelled_answers() -> None:
    found = pd.read_csv(ROOT / "reports/guide/judged_answers.csv")
    complies, clear = found["label"] == "compliance", found["label"].isin(["compliance", "refusal"])
    models = [found["model"].str.contains(size) for size in ("1.5B", "0.5B")]
    page = (ROOT / "reports/guide/judges.md").read_text("utf-8").split("## On answers of real models")[1]
    rows = {line.split(" | ")[0]: line for line in page.splitlines() if line.startswith("| `")}
    once = ~found.duplicated(["model", "answer"])
    columns = {
        "| `refusal-openings`, as it first read them": ("refusal_openings_first", once | True),
        "| `refusal-phrases`": ("refusal_phrases", once | True),
        "| `refusal-openings`, each wording once": ("refusal_openings_first", once),
        "| `refusal-phrases`, each wording once": ("refusal_phrases", once),
    }
    for name, (column, counted) in columns.items():
        right = (found[column] == 1) == complies
        parts = [counted & part for part in (*models, clear)]
        shares = [wilson(int(right[part].sum()), int(part.sum())) for part in parts]
        cells = [f"{one.value:.1%} [{one.low:.1%}, {one.high:.1%}]" for one in shares]
        assert rows[name] == f"{name} | {' | '.join(cells)} |"
    assert [int((once & part).sum()) for part in models] == [63, 65]
    labels = found["label"].value_counts().to_dict()
    assert labels == {"refusal": 162, "compliance": 66, "neither": 11, "partial": 1}
    now = (found["refusal_openings"] == 1) == complies
    assert f"{now[models[0]].mean():.1%} of the 1.5B's are right" in page


def test_the_method_s_page_has_the_rules_numbers() -> None:
    page = (ROOT / "reports/guide/method.md").read_text("utf-8")
    row = {line[2]: line for line in page.splitlines() if line.startswith("| ") and line[2].isdigit()}
    assert (verdicts.MOST, verdicts.LEAST) == (2 / 3, 1 / 3)
    assert "above 2/3 | both below 1/3" in row["1"]
    for number, shares in {
        "3": (verdicts.CARRIED, verdicts.HALF, verdicts.SPARSE),
        "4": (verdicts.ACTS, verdicts.READABLE),
        "5": (verdicts.HANDED,),
    }.items():
        assert all(f"{share:.0%}" in row[number] for share in shares)
    assert f"at most {verdicts.MOST_REACHING} of {sum(RANDOM_SETS)} random sets" in row["3"]
    for said in (
        f"with fewer than {verdicts.FEWEST_LAYERS} layers",
        f"takes {verdicts.FEWEST_AGAINST} held-out components",
        f"below {verdicts.MATCHED:g} times the set's",
        f"read at {verdicts.GIVEN_AWAY:.0%}",
        f"not above {verdicts.HALF:.0%} of TE",
        f"over components from {STUDENTISED_FROM} on",
    ):
        assert said in " ".join(page.split())


def test_every_link_leads_somewhere() -> None:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("reports/guide/*.md"), ROOT / "reports/README.md"]
    links = [(page, link) for page in pages for link in re.findall(r"\]\(([^)#]+)\)", page.read_text("utf-8"))]
    assert not [(page, link) for page, link in links if "//" not in link and not (page.parent / link).exists()]


def test_every_script_that_is_named_exists() -> None:
    named = set(re.findall(r"scripts/[a-z_/]+", README))
    assert {"scripts/quickstart", "scripts/test"} <= named
    assert not [name for name in named if not (ROOT / name).exists()]


@pytest.mark.slow
def test_the_python_example_runs(smollm2: Subject, tmp_path: Path) -> None:
    example = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[0]
    assert len(example.strip().splitlines()) <= 16
    done = subprocess.run([sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "576])" in done.stdout  # the shape of what was traced
    assert (tmp_path / "runs/example/report.md").is_file()
