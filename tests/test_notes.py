"""Notes that were written by hand: each has its checksum and holds something else than an analysis noted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import placebo_study
from oracle import Subject

from remote_mediation.config import StudyConfig
from remote_mediation.engine.local import LocalBackend
from remote_mediation.report import write_report
from remote_mediation.runfiles import note_text
from remote_mediation.store import Store
from remote_mediation.study import reread, run_study

KINDS = {"basis", "checkpoint", "claims", "judge", "judged", "opening", "openings", "special"}
"""Of all notes of the study, by how their names begin."""


def leafless(note: Any) -> Any:
    """The same with null for its first value."""
    if isinstance(note, list):
        return [leafless(note[0]), *note[1:]]
    if isinstance(note, dict):
        first = next(iter(note))
        return {**note, first: leafless(note[first])}
    return None


WRONG: dict[str, Callable[[Any], Any]] = {
    "null": lambda note: None,
    "object": lambda note: {"a": 1},
    "in a list": lambda note: [note],
    "one value": leafless,
}


@pytest.fixture(scope="module")
def model(subject: Callable[[str], Subject]) -> LocalBackend:
    return subject("llama_chat").backend


@pytest.fixture(scope="module")
def study(model: LocalBackend, tmp_path_factory: pytest.TempPathFactory) -> StudyConfig:
    """A study whose analyses note all that they can."""
    folder, name = tmp_path_factory.mktemp("study"), model.info.name
    np.save(folder / "basis.npy", np.random.default_rng(0).normal(size=(1, model.info.d_model)))
    known = placebo_study(folder, name, analyses=["claims", "directions", "neurons", "intervene", "attacks"])
    return StudyConfig(
        **{
            **known.model_dump(exclude={"logit_diff"}),
            "outcome": "refusal",
            "refusal": {"compliant": ["sure", "yes"], "refusing": ["sorry", "no"]},
            "directions": {"basis": str(folder / "basis.npy")},
            "neurons": {"exact": 4, "random_sets": 3, "max_windows": 2, "search": ["windows"]},
            "attacks": {"checkpoints": [name]},
            "intervene": {"tokens": 2},
        }
    )


def measured(study: StudyConfig, model: LocalBackend, folder: Path) -> dict[str, bytes]:
    """The tables of a run, measured as far as it is not."""
    run_study(study, model, Store.create(folder, study.identity()), variants={model.info.name: model})
    return reported(folder)


def reported(folder: Path) -> dict[str, bytes]:
    store = Store.open(folder)
    write_report(store, reread(store))
    return {path.name: path.read_bytes() for path in folder.glob("*.csv")}


@pytest.fixture(scope="module")
def whole(study: StudyConfig, model: LocalBackend, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run undisturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    measured(study, model, folder)
    notes = {path.name for path in (folder / "notes").iterdir()}
    assert {name.removesuffix(".json").split("-")[0] for name in notes} == KINDS
    return folder


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Attempting to set identical low and high ylims")  # no share decides here
@pytest.mark.parametrize("wrong", WRONG)
def test_notes_of_another_kind_are_made_anew(
    study: StudyConfig,
    model: LocalBackend,
    whole: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    wrong: str,
) -> None:
    folder = shutil.copytree(whole, tmp_path / "run")
    notes = {path: path.read_bytes() for path in (folder / "notes").iterdir()}
    for path, content in notes.items():
        path.write_text(note_text(WRONG[wrong](json.loads(content)["note"])))

    def told() -> set[Path]:
        lines = [line for line in caplog.messages if "is damaged (it holds something else (" in line]
        assert not any("\n" in line for line in lines)
        return {path for path in notes if any(line.startswith(f"{path} is damaged") for line in lines)}

    reported(folder)  # of what is left
    assert told()
    measured(study, model, folder)
    assert told() == set(notes)
    assert {path: path.read_bytes() for path in notes} == notes
    expected = {path.name: path.read_bytes() for path in whole.glob("*.csv")}
    assert reported(folder) == expected
