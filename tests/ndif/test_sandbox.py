"""A server as untrusted users meet it: blocks run in a process apart from the model, and not for long.

    NDIF_DEFAULT_EXECUTION_TIMEOUT_SECONDS=20 scripts/ndif/up --sandbox $(scripts/ndif/test_models)

Skipped on the server that the other tests use.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import ROOT

from remote_mediation import program
from remote_mediation.backends import LocalBackend, NdifBackend
from remote_mediation.config import StudyConfig
from remote_mediation.errors import JobError
from remote_mediation.ndif import Server
from remote_mediation.plan import Job
from remote_mediation.store import Store
from remote_mediation.study import run_study

TOLERANCE = 1e-4
measured = program.measure


@pytest.fixture(scope="module", autouse=True)
def sandboxed(server: Server) -> None:
    """Starting a process for each job takes seconds, so jobs here are few and large."""
    settings = json.loads((ROOT / ".ndif/run/settings.json").read_text("utf-8"))
    limit = float(settings["tuning"]["NDIF_DEFAULT_EXECUTION_TIMEOUT_SECONDS"])
    if not settings["sandbox"] or limit > 60:
        pytest.skip("the server is not sandboxed with a short time limit; see the head of this file")


@pytest.fixture(scope="module")
def backend(server: Server, tiny: StudyConfig) -> Watched:
    return Watched(tiny.model, "", server, lambda line: None, dtype="float32")


class Watched(NdifBackend):
    """A backend that notes what it sends and how that failed."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        self.jobs: list[Job] = []
        self.errors: list[str] = []
        super().__init__(*args, **settings)

    def submit(self, job: Job) -> str:
        self.jobs.append(job)
        return super().submit(job)

    def collect(self, ticket: str) -> Any:
        try:
            return super().collect(ticket)
        except JobError as error:
            self.errors.append(str(error))
            raise


def here(study: StudyConfig, folder: Path) -> dict[str, np.ndarray]:
    """The study on this machine, under the server's name for the model."""
    local = LocalBackend.load(str(ROOT / ".ndif/models/tiny"))
    local.info = replace(local.info, name=study.model)
    return there(study.model_copy(update={"backend": "local"}), local, folder)


def there(study: StudyConfig, backend: Any, folder: Path) -> dict[str, np.ndarray]:
    store = Store.create(folder, study.identity())
    run_study(study, backend, store)
    assert store.failures() == {}
    return store.values()


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    assert one.keys() == other.keys()
    assert np.ptp(np.concatenate(list(one.values()))) > 1
    return max(float(np.abs(one[key] - other[key]).max()) for key in one) < TOLERANCE


@pytest.mark.parametrize("outcome", ["response_logprob", "logit_diff"])
def test_every_potential_outcome_is_the_local_one(
    outcome: str, backend: Watched, tiny: StudyConfig, tmp_path: Path
) -> None:
    study = StudyConfig(
        **{
            **tiny.model_dump(exclude={"logit_diff"}),
            "outcome": outcome,
            "logit_diff": {"plus": ["sure"], "minus": ["sorry"]},
            "granularity": ["layers", "modules", "tokens", "heads", "neurons"],
            "job_seconds": 1e6,
        }
    )
    first = len(backend.jobs)
    assert same(here(study, tmp_path / "here"), there(study, backend, tmp_path / "there"))
    assert len(backend.jobs) - first == 2  # one for all sites, one for the neurons of the strongest windows


def test_a_job_over_the_time_limit_fails_and_is_run_in_parts(
    backend: Watched, tiny: StudyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = tiny.model_copy(update={"granularity": ["layers"], "max_pairs": 2, "job_seconds": 1e6})
    expected = here(study, tmp_path / "here")
    monkeypatch.setattr(program, "measure", _endless_for_two)
    first = len(backend.jobs)
    assert same(expected, there(study, backend, tmp_path / "there"))
    assert [len(job.parts) for job in backend.jobs[first:]] == [2, 1, 1]
    assert len(backend.errors) == 1
    assert "exceeded the execution timeout" in backend.errors[0]


def _endless_for_two(model: Any, payload: dict[str, Any]) -> list[Any]:
    while len(payload["contexts"]) > 1:
        time.sleep(0.1)
    return measured(model, payload)
