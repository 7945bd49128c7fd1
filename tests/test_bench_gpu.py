"""`scripts/bench/gpu` where there is no GPU: its dry run, and that no part costs another anything."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd
import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_dry_run_writes_what_it_measured(tmp_path: Path) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = ["scripts/bench/gpu", "--dry-run", "--output", str(tmp_path), "--only", "speed-tiny", "overhead"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    facts = json.loads((tmp_path / "gpu.json").read_text("utf-8"))
    assert [(part["part"], part["state"]) for part in facts["parts"]] == [("speed-tiny", "done"), ("overhead", "done")]
    table = pd.read_csv(tmp_path / "gpu.csv")
    assert table["value"].notna().all()
    assert {"rows/s", "tokens/s", "TFLOP/s", "ms a row", "largest batch as planned, GB"} <= set(table["quantity"])
    report = (tmp_path / "gpu.md").read_text("utf-8")
    assert "**A dry run on the CPU" in report
    assert "| one nnsight trace a site |" in report
    assert facts["card"] in report


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from bench import gpu

    return gpu


def fails(place: Any, emit: Callable[[Any], None]) -> None:
    emit(("model", "float32", "work", "done", 1.0, ""))
    raise ValueError("as planned")


def hangs(place: Any, emit: Callable[[Any], None]) -> None:
    emit(("model", "float32", "work", "done", 1.0, ""))
    subprocess.run(["sh", "-c", "echo begun; sleep 600"], check=False)


@pytest.mark.parametrize(
    ("work", "state", "said"), [(fails, "failed", "ValueError: as planned"), (hangs, "stopped at its limit", "begun")]
)
def test_a_part_that_does_not_end_well_leaves_its_figures(
    gpu: ModuleType, work: Callable[..., None], state: str, said: str
) -> None:
    begun = time.monotonic()
    status, records = gpu.run(gpu.Part("odd", 10, work), gpu.Place("cpu", True), 2.0)
    assert (status.state, len(records)) == (state, 1)
    assert said in status.said
    assert time.monotonic() - begun < 10
    assert records[0].quantity == "done"


def test_a_part_for_which_no_time_is_left_is_not_begun(gpu: ModuleType) -> None:
    status, records = gpu.run(gpu.Part("late", 10, fails), gpu.Place("cpu", True), -1.0)
    assert (status.state, records) == ("not begun", [])
