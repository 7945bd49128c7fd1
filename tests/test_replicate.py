"""What is exported for others to run again: it gives the same effects elsewhere, and holds no answer."""

from __future__ import annotations

import json
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fakes import records, write_pairs
from hypothesis import given
from hypothesis import strategies as st
from oracle import Subject
from typer.testing import CliRunner, Result

from remote_mediation.cli import app
from remote_mediation.config import StudyConfig, load_config
from remote_mediation.pairs import load_openings, load_pairs
from remote_mediation.store import Store
from remote_mediation.toml import toml_text

ANSWERS = {"harmful_response": "sure here is a way", "harmless_response": "sorry i cannot"}
TEMPLATE = "{% for message in messages %}<user> please {{ message['content'] }} <end> {% endfor %}<assistant>"
STUDY = """
pairs = "texts/pairs.jsonl"
max_pairs = 5
seed = 3
analyses = ["layers"]
[prompt]
template = "texts/mine.jinja"
[statistics]
resamples = 100
"""
LISTS = 'harmful = "bad.txt"\nharmless = "good.txt"\nanalyses = ["layers"]\n[statistics]\nresamples = 100\n'


@pytest.fixture(scope="module")
def model(subject: Callable[[str], Subject]) -> str:
    return subject("llama_chat").info.name


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a study, in which commands run."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "mine/texts"
    folder.mkdir(parents=True)
    write_pairs(folder / "pairs.jsonl", [{**record, **ANSWERS, "source": "a forum"} for record in records()])
    (folder / "mine.jinja").write_text(TEMPLATE, "utf-8")
    (tmp_path / "mine/study.toml").write_text(STUDY, "utf-8")
    return tmp_path


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(one) for one in arguments])


def done(*arguments: object) -> Result:
    found = call(*arguments)
    assert (found.exit_code, found.exception) == (0, None), found.output
    return found


def again(here: Path, model: str, study: str) -> Path:
    """A study that was run, exported and run again where nothing else of it is; the folder of what was exported."""
    done("run", study, "--model", model, "--out", "runs/first")
    told = done("export", "runs/first", "given", "--replicate").output
    assert told.endswith("files: given; replicate/ has the prompts, some of them harmful\n")
    shutil.move("given", "elsewhere")
    for path in (*here.glob("*.txt"), *here.glob("mine/texts/*")):
        path.unlink()
    done("run", "elsewhere/replicate/study.toml", "--model", model, "--out", "runs/again")
    return here / "elsewhere"


def test_what_is_exported_runs_again_with_equal_effects(here: Path, model: str) -> None:
    exported = again(here, model, "mine/study.toml")
    first, other = (json.loads((here / f"runs/{name}/run.json").read_bytes()) for name in ("first", "again"))
    assert (here / "runs/again/effects.csv").read_bytes() == (exported / "effects.csv").read_bytes()
    assert other["outcome"] == first["outcome"]
    assert other["prompts"]["rendered"] == first["prompts"]["rendered"]
    assert len(load_pairs(str(exported / "replicate/pairs.jsonl"))) == 5
    assert load_openings(str(exported / "replicate/pairs.jsonl"))  # those that the model chose
    pinned = (exported / "replicate/requirements.txt").read_text("utf-8")
    assert f"nnsight=={first['versions']['nnsight']}\n" in pinned
    assert "torch==2" in pinned
    assert "+" not in pinned


def test_lists_become_pairs_that_run_again(here: Path, model: str) -> None:
    sides = [[record[side] for record in records()] for side in ("harmful", "harmless")]
    (here / "bad.txt").write_text("\n".join(sides[0]), "utf-8")
    (here / "good.txt").write_text("\n".join([*sides[1], *(f"please {text}" for text in sides[1])]), "utf-8")
    (here / "lists.toml").write_text(LISTS, "utf-8")
    exported = again(here, model, "lists.toml")
    assert (here / "runs/again/effects.csv").read_bytes() == (exported / "effects.csv").read_bytes()
    assert all(pair.placebo and not pair.aligned for pair in load_pairs(str(exported / "replicate/pairs.jsonl")))


def test_it_holds_no_answer_and_no_path_of_this_machine(here: Path, model: str) -> None:
    done("run", "mine/study.toml", "--model", model, "--out", "run")
    done("export", "run", "given", "--replicate")
    files = {path.name: path.read_text("utf-8") for path in (here / "given/replicate").iterdir()}
    assert set(files) == {"study.toml", "pairs.jsonl", "template.jinja", "requirements.txt", "README.md"}
    for text in (*ANSWERS.values(), "a forum", str(here), str(Path(model).parent)):
        assert not [name for name, content in files.items() if text in content]
    settings = tomllib.loads(files["study.toml"])
    assert settings["model"] == f"./{Path(model).name}"
    assert f"`./{Path(model).name}`" in files["README.md"]
    assert (settings["pairs"], settings["prompt"]["template"]) == ("pairs.jsonl", "template.jinja")
    assert "steal a car" in files["pairs.jsonl"]
    done("export", "run", "other")
    assert not (here / "other/replicate").exists()


def test_files_of_other_analyses(here: Path, model: str) -> None:
    """Hard negatives go along; checkpoints, judges and labelled answers are named, two of one name apart."""
    done("run", "mine/study.toml", "--model", model, "--out", "run")
    write_pairs(here / "hard.jsonl", [{**record, **ANSWERS} for record in records()])
    for name in ("a/tuned", "b/tuned", "judge"):
        (here / name).mkdir(parents=True)
    (here / "labelled.csv").touch()
    store = Store.open(here / "run")
    record = store.record()
    record["config"]["analyses"] = ["layers", "monitor"]
    record["config"]["monitor"]["hard_negatives"] = "hard.jsonl"
    record["config"]["attacks"]["checkpoints"] = ["a/tuned", "b/tuned", "some/hub-model"]
    record["config"]["intervene"]["judge"] = "classifier:judge:unsafe"
    record["config"]["verify"]["labelled"] = str(here / "labelled.csv")
    store.save_record(record)
    done("export", "run", "given", "--replicate")
    (here / "labelled.csv").unlink()
    config = load_config(here / "given/replicate/study.toml", {})
    given = here / "given/replicate"
    assert config.monitor.hard_negatives == str(given / "hard_negatives.jsonl")
    assert ANSWERS["harmful_response"] not in (given / "hard_negatives.jsonl").read_text("utf-8")
    assert config.attacks.checkpoints == ["./tuned", "./tuned-2", "some/hub-model"]
    assert config.intervene.judge == "classifier:./judge:unsafe"
    assert config.verify.labelled == str(given / "labelled.csv")
    for name in ("./tuned", "./tuned-2", "./judge", "./labelled.csv"):
        assert f"`{name}`" in (given / "README.md").read_text("utf-8")


def test_what_cannot_be_run_again_is_not_exported(here: Path, model: str) -> None:
    done("run", "mine/study.toml", "--model", model, "--out", "answered", "--outcome", "response_logprob")
    done("run", "mine/study.toml", "--model", model, "--out", "run")
    assert "answers are not exported" in str(call("export", "answered", "given", "--replicate").exception)
    pairs = here / "mine/texts/pairs.jsonl"
    pairs.write_text(pairs.read_text("utf-8").replace("night", "day"), "utf-8")
    assert "has changed since the run was begun" in str(call("export", "run", "given", "--replicate").exception)
    pairs.unlink()
    assert "folder in which the run was begun" in str(call("export", "run", "given", "--replicate").exception)
    store = Store.open(here / "run")
    record = store.record()
    record["config"]["pairs"] = "-"
    store.save_record(record)
    assert "came from standard input" in str(call("export", "run", "given", "--replicate").exception)
    assert not (here / "given").exists()


# --- settings as text -------------------------------------------------------------------------------------------------

TEXTS = st.text(st.characters(exclude_categories=["Cs"]))
VALUES = st.recursive(
    st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(TEXTS, VALUES, max_size=4))
def test_settings_are_read_back_as_they_were_written(settings: dict[str, Any]) -> None:
    assert tomllib.loads(toml_text(settings)) == settings


def test_a_whole_study_is_read_back(tmp_path: Path) -> None:
    config = StudyConfig(
        model="org/name",
        prompt={"system": 'say "no"\n\\ é 🙂', "template_arguments": {"enable_thinking": False, "of": {"a b": [1]}}},
        neurons={"layers": [3, 4]},
        intervene={"factors": [0.0, 1e-7, 1e22]},
    )
    (tmp_path / "study.toml").write_text(toml_text(config.model_dump(mode="json", exclude_none=True)), "utf-8")
    assert load_config(tmp_path / "study.toml", {}) == config


def test_what_toml_does_not_have() -> None:
    with pytest.raises(TypeError, match="None cannot stand in a study file"):
        toml_text({"model": None})
