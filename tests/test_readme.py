"""The README's example runs as it is written, and its study file is one that the package accepts."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from oracle import Subject

from remote_mediation.config import load_config

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")


def test_the_study_file_is_accepted(tmp_path: Path) -> None:
    section = README.split("## The study file")[1]
    indented = re.findall(r"(?:^    .*\n|^\n)+", section, re.MULTILINE)[0]
    study = tmp_path / "study.toml"
    study.write_text(textwrap.dedent(indented), "utf-8")
    config = load_config(study, {})
    assert config.model.endswith("SmolLM2-135M-Instruct")
    assert config.statistics.min_share == 0.05  # the last table is read too


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
