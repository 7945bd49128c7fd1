"""Faults on the way, each made in earnest: a study comes out as if nothing had happened, and runs nothing twice.

The model's processes are stopped (SIGSTOP) while a fault is made, so that it falls into a job that is under way.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pandas as pd
import pytest
from tiny import ROOT, VOCAB

from remote_mediation.config import StudyConfig
from remote_mediation.engine import program, remote
from remote_mediation.engine.exchange import Server
from remote_mediation.engine.jobs import Context, Job
from remote_mediation.engine.local import LocalBackend
from remote_mediation.engine.remote import NdifBackend
from remote_mediation.engine.server import preflight, refuse_bad
from remote_mediation.errors import JobError, LostJobError
from remote_mediation.store import Store
from remote_mediation.study import run_study
from remote_mediation.tokens import Prepared

KILLS = 20
Switch = Callable[..., list[int]]


class Watched(NdifBackend):
    """A backend that notes what it sends, and calls `fault` around the sending of one job."""

    def __init__(self, server: Server, model: str, *, when: int = -1, fault: Any = None) -> None:
        self.said: list[str] = []
        super().__init__(model, "", server, self.said.append, dtype="float32")
        self.jobs: list[Job] = []
        self._when, self._fault = when, fault

    def submit(self, job: Job) -> str:
        self.jobs.append(job)
        if len(self.jobs) - 1 != self._when:
            return super().submit(job)
        with self._fault(self) as after:
            ticket = super().submit(job)
            after(ticket)
        return ticket


class Fault:
    """Freezes the model, then makes a fault while the job waits in it."""

    def __init__(self, frozen: Any, make: Callable[[str], None]) -> None:
        self._frozen, self._make = frozen, make

    def __call__(self, backend: Watched) -> Fault:
        return self

    def __enter__(self) -> Callable[[str], None]:
        self._frozen.freeze()
        return self._after

    def _after(self, ticket: str) -> None:
        time.sleep(1)  # until the job is with the model
        self._make(ticket)

    def __exit__(self, *error: object) -> None:
        self._frozen.thaw()


def run(study: StudyConfig, backend: NdifBackend, folder: Path) -> pd.DataFrame:
    return run_study(study, backend, Store.create(folder, study.identity())).effects


def base_keys(job: Job) -> list[str]:
    """Keys of a job's base prompts, which belong to every job of their pairs."""
    pairs = [
        entry for context in job.contexts for entry in zip(context.keys, context.rows, strict=False)
    ]  # tasks have no rows
    return [key for key, row in pairs if not row.writes]


def row_keys(job: Job) -> list[str]:
    """The other keys of a job."""
    return [key for key in job.keys if key not in base_keys(job)]


def stored_rows(store: Store, base: set[str]) -> list[str]:
    """Keys of the rows in a run folder, as often as they are there."""
    found: list[str] = []
    for path in (store.folder / "readouts").glob("*.npz"):
        with np.load(path, allow_pickle=False) as data:
            found += [key for key in data["keys"].tolist() if key not in base]
    return found


@pytest.fixture(scope="module")
def undisturbed(server: Server, tiny: StudyConfig, tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    backend = Watched(server, tiny.model)
    effects = run(tiny, backend, tmp_path_factory.mktemp("undisturbed") / "run")
    assert len(backend.jobs) > 20
    assert {"layers", "neurons"} <= set(effects["analysis"])
    return effects


def disturbed(server: Server, study: StudyConfig, frozen: Any, folder: Path, make: Callable[[str], None]) -> Any:
    """Run the study with a fault in its fourth job."""
    backend = Watched(server, study.model, when=3, fault=Fault(frozen, make))
    return run(study, backend, folder), backend


def test_it_is_the_local_study(undisturbed: pd.DataFrame, tiny: StudyConfig, tmp_path: Path) -> None:
    folder = ROOT / ".ndif/models/tiny"
    local = LocalBackend.load(str(folder))
    local.info = replace(local.info, name=tiny.model)
    effects = run(tiny.model_copy(update={"backend": "local"}), local, tmp_path / "run")  # type: ignore[arg-type]
    pd.testing.assert_frame_equal(effects, undisturbed, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_a_client_that_is_killed_again_and_again(
    server: Server, tiny: StudyConfig, undisturbed: pd.DataFrame, tmp_path: Path
) -> None:
    folder, log = tmp_path / "run", tmp_path / "sent.jsonl"
    store = Store.create(folder, tiny.identity())
    base: set[str] = set()

    class Logged(Watched):
        def submit(self, job: Job) -> str:
            with log.open("a") as file:
                file.write(json.dumps([row_keys(job), base_keys(job)]) + "\n")
            return super().submit(job)

    def client() -> None:
        run(tiny, Logged(server, tiny.model), folder)

    rng, context, killed = np.random.default_rng(0), multiprocessing.get_context("fork"), 0
    sent_before = 0
    for _ in range(KILLS):
        finished = set(store.values()) if folder.exists() else set()
        process = context.Process(target=client)
        process.start()
        process.join(float(rng.uniform(0.2, 0.7)))
        if process.is_alive():
            os.kill(process.pid or 0, signal.SIGKILL)
            killed += 1
        process.join()
        lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        base |= {key for _, both in lines for key in both}
        for rows, _ in lines[sent_before:]:
            assert not set(rows) & (finished - base), "a finished job was sent again"
        sent_before = len(lines)
    assert killed >= KILLS // 2
    pd.testing.assert_frame_equal(run(tiny, Logged(server, tiny.model), folder), undisturbed)
    base |= {key for line in log.read_text().splitlines() for key in json.loads(line)[1]}
    rows = stored_rows(store, base)
    assert len(rows) == len(set(rows))
    assert store.submitted() == []
    sent = [tuple(json.loads(line)[0]) for line in log.read_text().splitlines()]
    twice = len(sent) - len(set(sent))
    assert twice <= killed  # at most the one between its sending and the writing of its ticket


def test_api_killed_during_a_job(
    server: Server, tiny: StudyConfig, undisturbed: pd.DataFrame, part: Switch, frozen: Any, tmp_path: Path
) -> None:
    starting: list[subprocess.Popen[bytes]] = []

    def make(ticket: str) -> None:
        part("kill", "api")
        starting.append(subprocess.Popen([ROOT / "scripts/ndif/part", "start", "api"]))

    effects, backend = disturbed(server, tiny, frozen, tmp_path / "run", make)
    assert starting[0].wait(timeout=120) == 0
    pd.testing.assert_frame_equal(effects, undisturbed)
    assert any("connection lost, trying again" in line for line in backend.said)
    assert len({job.id for job in backend.jobs}) == len(backend.jobs)  # the job's result was not lost


def test_model_killed_during_a_job(
    server: Server, tiny: StudyConfig, undisturbed: pd.DataFrame, part: Switch, frozen: Any, tmp_path: Path
) -> None:
    effects, backend = disturbed(server, tiny, frozen, tmp_path / "run", lambda ticket: part("kill", "actor") and None)
    pd.testing.assert_frame_equal(effects, undisturbed)
    assert any("the model's process ended" in line for line in backend.said)
    ids = [job.id for job in backend.jobs]
    assert len(ids) - len(set(ids)) == 1  # that job was sent once more, and no other
    assert Store.open(tmp_path / "run").failures() == {}


def test_redis_and_then_the_api_restarted(
    server: Server, tiny: StudyConfig, undisturbed: pd.DataFrame, part: Switch, frozen: Any, tmp_path: Path
) -> None:
    def make(ticket: str) -> None:
        part("stop", "redis")
        part("start", "redis")

    effects, _ = disturbed(server, tiny, frozen, tmp_path / "redis", make)
    pd.testing.assert_frame_equal(effects, undisturbed)
    # /status keeps silent from here on until the API is restarted; a study starts all the same.
    findings = preflight(server, tiny.model, "")
    refuse_bad(findings)
    assert any("jobs run meanwhile" in finding.detail for finding in findings if finding.name == "models")

    class BetweenJobs(Watched):
        def submit(self, job: Job) -> str:
            if len(self.jobs) == 5:
                part("stop", "api")
                subprocess.Popen([ROOT / "scripts/ndif/part", "start", "api"])
            return super().submit(job)

    backend = BetweenJobs(server, tiny.model)
    pd.testing.assert_frame_equal(run(tiny, backend, tmp_path / "api"), undisturbed)
    assert len({job.id for job in backend.jobs}) == len(backend.jobs)


def test_object_store_down_while_a_job_ends(
    server: Server,
    tiny: StudyConfig,
    undisturbed: pd.DataFrame,
    part: Switch,
    frozen: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Its states are kept in that store, too: a job whose last one is lost seems to wait for ever.
    monkeypatch.setattr(remote, "_DEADLINES", dict.fromkeys(remote._DEADLINES, 60.0))

    def make(ticket: str) -> None:
        part("stop", "s3")
        frozen.thaw()
        time.sleep(3)
        part("start", "s3")

    effects, _ = disturbed(server, tiny, frozen, tmp_path / "run", make)
    pd.testing.assert_frame_equal(effects, undisturbed)
    assert Store.open(tmp_path / "run").failures() == {}


def test_a_result_that_expired(
    server: Server, tiny: StudyConfig, undisturbed: pd.DataFrame, tmp_path: Path, frozen: Any
) -> None:
    class Expired(Watched):
        def submit(self, job: Job) -> str:
            ticket = super().submit(job)
            if len(self.jobs) == 4:
                _delete_result(server, ticket)
            return ticket

    backend = Expired(server, tiny.model)
    pd.testing.assert_frame_equal(run(tiny, backend, tmp_path / "run"), undisturbed)
    assert backend.jobs[4].id == backend.jobs[3].id
    assert len({job.id for job in backend.jobs}) == len(backend.jobs) - 1


def test_a_pair_whose_job_fails(server: Server, tiny: StudyConfig, undisturbed: pd.DataFrame, tmp_path: Path) -> None:
    study = tiny.model_copy(update={"analyses": ["layers"]})
    backend = Watched(server, study.model)
    whole = Store.create(tmp_path / "whole", study.identity())
    run_study(study, backend, whole)
    prepared = whole.prepared()
    assert prepared is not None
    bad = prepared.pairs[2]
    broken = replace(bad, x0=(*bad.x0[:-1], VOCAB + 1), x1=(*bad.x1[:-1], VOCAB + 1))
    store = Store.create(tmp_path / "run", study.identity())
    store.save_prepared(Prepared((*prepared.pairs[:2], broken, *prepared.pairs[3:]), prepared.refusals))
    study = study.model_copy(update={"job_seconds": 1e6})  # all pairs in one job at first
    effects = run_study(study, backend, store).effects
    failures = store.failures()
    assert set(failures) == {bad.id}
    assert "\n" not in failures[bad.id]
    assert "index out of range" in failures[bad.id]
    assert "/" not in failures[bad.id].replace("<path>", "")
    expected = undisturbed[(undisturbed["pair_id"] != bad.id) & undisturbed["analysis"].isin({"checks", "layers"})]
    pd.testing.assert_frame_equal(
        effects.reset_index(drop=True), expected.reset_index(drop=True), check_exact=False, atol=1e-5
    )


def test_a_job_that_ends_the_models_process_fails_in_the_end(
    server: Server, tiny: StudyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = Watched(server, tiny.model)
    monkeypatch.setattr(program, "measure", _fatal)
    job = Job({"blocks": "model.layers"}, (Context("measure", ("pair",), ("key",), {}, 0.0),))
    for _ in range(2):
        with pytest.raises(LostJobError):
            backend.collect(backend.submit(job))
    ticket = backend.submit(job)
    with pytest.raises(JobError, match=r"ended 3 times in it"):
        backend.collect(ticket)


def _fatal(model: Any, spec: dict[str, Any], context: dict[str, Any]) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def _delete_result(server: Server, ticket: str) -> None:
    """Wait for a job's result and take it out of the S3 store, as its retention does one day."""
    for _ in range(600):
        answer = httpx.get(f"{server.host}/response/{ticket}")
        if answer.status_code == 200 and answer.json()["status"] == "COMPLETED":
            break
        time.sleep(0.1)
    url = httpx.URL(answer.json()["data"])
    bucket, key = url.path.strip("/").split("/")
    store = f"http://{url.host}:{url.port}"
    code = (
        "import boto3; "
        f"boto3.client('s3', endpoint_url={store!r}, aws_access_key_id='ndif', aws_secret_access_key='in-memory', "
        f"region_name='us-east-1').delete_object(Bucket={bucket!r}, Key={key!r})"
    )
    subprocess.run([ROOT / ".ndif/venv/bin/python", "-c", code], check=True)
    assert httpx.get(url).status_code == 404


def test_nothing_falls_back_to_this_machine(
    server: Server, tiny: StudyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: object, **settings: object) -> None:
        raise AssertionError("a remote study loaded a local model")

    monkeypatch.setattr(LocalBackend, "load", never)
    study = tiny.model_copy(update={"analyses": ["layers"]})
    assert not run(study, Watched(server, study.model), tmp_path / "run").empty
