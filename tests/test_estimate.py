"""What `plan` promises against what a study of a tiny model then measures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fakes import records, write_pairs
from oracle import Subject

from remote_mediation import estimate as module
from remote_mediation.config import StudyConfig
from remote_mediation.estimate import estimate
from remote_mediation.plan import Job, Readout
from remote_mediation.store import Store
from remote_mediation.study import run_study


class Counting:
    """A backend that counts the rows it measures."""

    def __init__(self, backend: Any) -> None:
        self.backend, self.rows = backend, 0
        self.info, self.tokenizer = backend.info, backend.tokenizer

    def submit(self, job: Job) -> str:
        self.rows += job.rows if job.task == "measure" else 0
        return str(self.backend.submit(job))

    def collect(self, ticket: str) -> Readout:
        readout: Readout = self.backend.collect(ticket)
        return readout


@pytest.fixture(autouse=True)
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """The speed of this machine is not asked for."""
    monkeypatch.setattr(module, "matmul_rate", lambda: 1e10)


def config(folder: Path, model: str, **settings: Any) -> StudyConfig:
    return StudyConfig(
        model=model,
        pairs=str(write_pairs(folder / "pairs.jsonl", records())),
        outcome="logit_diff",
        logit_diff={"plus": ["sure", "yes"], "minus": ["sorry", "no"]},
        statistics={"resamples": 100},
        **settings,
    )


@pytest.mark.parametrize("search", ["gradient", "windows", "all"])
def test_no_more_rows_are_measured_than_planned(subject: Callable[[str], Subject], tmp_path: Path, search: str) -> None:
    few = {"exact": 2, "max_windows": 1, "random_sets": 60, "layers": [1, 2] if search == "all" else None}
    study = config(
        tmp_path, subject("llama_chat").info.name, granularity=["neurons"], neurons={"search": [search], **few}
    )
    planned = estimate(study)
    backend = Counting(subject("llama_chat").backend)
    result = run_study(study, backend, Store.create(tmp_path / "run", study.identity()))
    assert len(result.tables["gates.csv"]) >= 62
    assert planned.rows < backend.rows <= planned.rows + planned.unit_rows
    assert planned.unit_rows < 3 * (backend.rows - planned.rows)  # a bound that says something


def test_the_bound_holds_for_whichever_way_is_gone(subject: Callable[[str], Subject], tmp_path: Path) -> None:
    def rows(*search: str) -> int:
        neurons = {"search": list(search), "exact": 2, "max_windows": 3}
        return estimate(
            config(tmp_path, subject("llama_chat").info.name, granularity=["neurons"], neurons=neurons)
        ).unit_rows

    assert rows("gradient") < rows("windows") < rows("all")
    assert rows("gradient", "windows") == rows("windows")


def test_a_study_without_neurons_has_no_rows_for_them(subject: Callable[[str], Subject], tmp_path: Path) -> None:
    name = subject("llama_chat").info.name
    assert estimate(config(tmp_path, name, granularity=["layers"])).unit_rows == 0
    more, fewer = (
        estimate(config(tmp_path, name, granularity=["neurons"], neurons={"random_sets": number}))
        for number in (50, 40)
    )
    assert more.unit_rows - fewer.unit_rows in {10 * 2 * heldout for heldout in (2, 4)}  # whole templates of two pairs
    assert more.flops > fewer.flops
    assert more.rows == fewer.rows
