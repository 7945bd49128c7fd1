"""`--json` of every command: one object, of the keys that are documented, and the page that documents them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
import typer
from fakes import records, write_pairs
from oracle import Subject
from typer.testing import CliRunner

from remote_mediation.cli import app
from remote_mediation.forms import FORMS, INTERVAL, formed, guide
from remote_mediation.stats import Interval

ROOT = Path(__file__).parents[1]
ANSWERS = {"harmful_response": "sure here is a way", "harmless_response": "sorry i cannot"}
VARIANTS = {"show SECTION", "pairs check --show", "fetch-model --list", "selfcheck --published"}
"""Second forms of a command."""

Ask = Callable[..., Any]


@pytest.fixture(scope="module")
def model(subject: Callable[[str], Subject]) -> str:
    """Folder of a tiny chat model."""
    return subject("llama_chat").info.name


@pytest.fixture
def ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ask:
    """A command's answer as data, with its exit code; asked in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def asked(*arguments: object, code: int = 0) -> Any:
        done = CliRunner().invoke(app, [*map(str, arguments), "--json"], catch_exceptions=False)
        assert done.exit_code == code, done.output
        return json.loads(done.stdout)

    return asked


@pytest.fixture
def study(tmp_path: Path, model: str) -> Path:
    """A study file beside its six pairs."""
    write_pairs(tmp_path / "pairs.jsonl", records(**ANSWERS))
    file = tmp_path / "tiny.toml"
    file.write_text(
        f'model = "{model}"\npairs = "pairs.jsonl"\nanalyses = ["layers"]\noutcome = "response_logprob"\n'
        "[statistics]\nresamples = 100\n",
        "utf-8",
    )
    return file


def commands(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Every command that does something, with the words it is called by."""
    inner = getattr(group, "commands", {})
    if path and (not inner or group.invoke_without_command):
        yield " ".join(path), group
    for name, command in inner.items():
        yield from commands(command, (*path, name))


def has_form(command: str, data: Any) -> bool:
    """Whether data have the keys of a command's form, records within them too."""
    return matches(FORMS[command], data)


def matches(form: Mapping[str, Any], data: Any) -> bool:
    if isinstance(data, list):
        return all(matches(form, one) for one in data)
    inner = {key: meaning for key, meaning in form.items() if isinstance(meaning, Mapping)}
    return list(data) == list(form) and all(matches(meaning, data[key]) for key, meaning in inner.items())


def test_every_command_prints_json_and_has_a_form() -> None:
    found = dict(commands(typer.main.get_command(app)))
    assert set(found) == set(FORMS) - VARIANTS
    without = [name for name, one in found.items() if "--json" not in {opt for p in one.params for opt in p.opts}]
    assert without == []


def test_what_is_not_in_the_form_is_not_printed_and_what_is_must_be_there() -> None:
    found = {"pairs": 3, "file": Path("a") / "b", "prompt": "secret"}
    assert formed("pairs convert", found) == {"pairs": 3, "file": str(Path("a/b"))}
    with pytest.raises(KeyError, match="file"):
        formed("pairs convert", {"pairs": 3})


def test_numbers_are_of_json_and_what_is_unknown_is_null() -> None:
    class Judged(NamedTuple):
        judge: str
        n: int
        harmful: Any
        accuracy: Interval
        recall: Interval
        specificity: Interval
        kappa: Interval

    unknown = Interval(0, 0, math.nan, -math.inf, math.inf, "no answers")
    known = Interval(4, 2, 0.1 + 0.2, 0.25, 0.5, "")
    data = {"file": "x", "judges": (Judged("a", 4, np.int64(2), known, unknown, unknown, unknown),)}
    (judged,) = json.loads(json.dumps(formed("judge check", data), allow_nan=False))["judges"]
    assert judged["accuracy"]["value"] == 0.1 + 0.2  # all digits
    assert judged["harmful"] == 2
    assert [judged["recall"][end] for end in ("value", "low", "high")] == [None] * 3
    assert list(judged["recall"]) == list(INTERVAL)
    table = pd.DataFrame({"run": ["a", "b"], "te": [1.5, math.nan]})
    shown = formed("compare", {"runs": table, "verdicts": table.iloc[:0], "report": None})
    assert shown == {"runs": [{"run": "a", "te": 1.5}, {"run": "b", "te": None}], "verdicts": [], "report": None}


def test_the_page_about_it_is_current() -> None:
    """Write it anew: python -c "from remote_mediation.forms import guide; print(guide(), end='')" > the page."""
    assert (ROOT / "reports/guide/json.md").read_text("utf-8") == guide()


@pytest.mark.slow
def test_a_run_and_what_is_asked_of_it(ask: Ask, study: Path, tmp_path: Path) -> None:
    ran = ask("run", study)
    assert has_form("run", ran)
    assert ran["total"]["n_pairs"] == 6
    assert ran["verdicts"] == []
    assert [part["name"] for part in ran["sections"]] == ["total", "layers"]
    assert Path(ran["report"]).is_file()
    assert ask("report", "runs/tiny") == ask("show", "runs/tiny") == ran
    section = ask("show", "runs/tiny", "layers")
    assert has_form("show SECTION", section)
    assert all(len(row) == len(table["header"]) for table in section["tables"] for row in table["rows"])
    more = ask("extend", "runs/tiny", "modules")
    assert [part["name"] for part in more["sections"]] == ["total", "layers", "modules"]
    states = ask("check-run", "runs/tiny")
    assert has_form("check-run", states)
    assert states["whole"] is True
    exported = ask("export", "runs/tiny", "shared")
    assert str(Path("shared/report.md")) in exported["files"]
    viewed = ask("view", "runs/tiny")
    assert viewed["address"] is None
    assert Path(viewed["page"]).is_file()
    beside = ask("compare", "runs/tiny", "shared")
    assert has_form("compare", beside)
    assert [run["pairs"] for run in beside["runs"]] == [6, 6]
    (tmp_path / "runs/tiny/pairs.jsonl").write_text("cut", "utf-8")
    assert ask("check-run", "runs/tiny", code=1)["whole"] is False


def test_plans_and_pairs(ask: Ask, study: Path) -> None:
    planned = ask("plan", study)
    assert has_form("plan", planned)
    assert (planned["pairs"], planned["refused"], planned["analyses"]) == (6, 0, ["layers"])
    assert planned["memory"] > planned["weights"] > 0
    checked = ask("pairs", "check", study)
    assert has_form("pairs check", checked)
    assert len(checked["usable"]) == 6
    assert checked["refused"] == []
    shown = ask("pairs", "check", study, "--show", "steal-car")
    assert shown["lines"][0] == "pair steal-car"
    assert ask("pairs", "convert", "pairs.jsonl", "new.jsonl") == {"pairs": 6, "file": "new.jsonl"}


def test_models_judges_and_servers(ask: Ask, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    families = ask("models")["families"]
    assert {"llama", "bloom"} <= {one["family"] for one in families}
    looked_at = ask("models", "check", model)
    assert has_form("models check", looked_at)
    assert (looked_at["covered"], looked_at["model_class"]) == (True, "LlamaForCausalLM")
    fetchable = ask("fetch-model", "--list")
    assert has_form("fetch-model --list", fetchable)
    assert "smollm2" in {one["name"] for one in fetchable["models"]}
    judged = ask("judge", "check")
    assert has_form("judge check", judged)
    assert 0 < judged["judges"][0]["kappa"]["low"] < judged["judges"][0]["kappa"]["high"] < 1
    monkeypatch.setenv("NDIF_HOST", "http://127.0.0.1:9")  # where nothing listens
    findings = ask("doctor", code=1)
    assert has_form("doctor", findings)
    assert findings["good"] is False
