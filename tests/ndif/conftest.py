"""Tests against a real NDIF server. On one machine:

    scripts/ndif/up $(scripts/ndif/test_models) && source .ndif/env.sh && .venv/bin/python -m pytest tests/ndif

The tests of faults stop and kill parts of that server, so they need the one of `scripts/ndif`.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fakes import records, write_pairs
from tiny import REPO_ID, ROOT

from remote_mediation.config import StudyConfig
from remote_mediation.engine.exchange import Server
from remote_mediation.engine.server import await_connected, server_from_environment
from remote_mediation.errors import PreflightError

START = "scripts/ndif/up $(scripts/ndif/test_models) && source .ndif/env.sh"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this folder carries the marker."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.ndif)


@pytest.fixture(scope="session", autouse=True)
def server() -> Server:
    """The server that the environment names. Named and not there is a failure, not named a reason to skip."""
    if not os.environ.get("NDIF_HOST"):
        pytest.skip(f"no NDIF server is named; run: {START}")
    if not os.environ.get("HF_ENDPOINT"):
        pytest.fail("HF_ENDPOINT is not set, the models' names would be asked of the real hub; run: " + START)
    found = server_from_environment()
    try:
        await_connected(found)
    except PreflightError as error:
        pytest.fail(f"{error}; run: {START}")
    return found


@pytest.fixture
def part() -> Callable[..., list[int]]:
    """`scripts/ndif/part ACTION PART`; returns the process ids that it prints."""

    def run(action: str, name: str) -> list[int]:
        done = subprocess.run(
            [ROOT / "scripts/ndif/part", action, name], capture_output=True, text=True, check=False, timeout=180
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return [int(line) for line in done.stdout.split() if line.isdigit()]

    return run


@pytest.fixture
def frozen(part: Callable[..., list[int]]) -> Any:
    """Stop and continue the processes that hold models, so that a fault falls into a job however short it is."""
    stopped: list[int] = []

    class Frozen:
        def freeze(self) -> None:
            stopped.extend(part("pid", "actor"))
            for pid in stopped:
                os.kill(pid, signal.SIGSTOP)

        def thaw(self) -> None:
            while stopped:
                try:
                    os.kill(stopped.pop(), signal.SIGCONT)
                except ProcessLookupError:
                    continue

    control = Frozen()
    yield control
    control.thaw()


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six pairs that the tiny model's tokenizer knows the words of."""
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", records())


@pytest.fixture(scope="session")
def tiny(pairs: Path) -> StudyConfig:
    """A study of the tiny model with one batch per job: many jobs of milliseconds."""
    return StudyConfig(
        model=REPO_ID,
        pairs=str(pairs),
        backend="ndif",
        analyses=["layers", "neurons"],
        neurons={"search": ["windows"], "max_windows": 2},
        outcome="response_logprob",
        response_logprob={"tokens": 3},
        statistics={"resamples": 100, "min_share": 0.0, "alpha": 0.49},
        job_seconds=1e-9,
    )
