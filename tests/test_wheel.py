"""The built wheel has all that the package needs: installed by itself, elsewhere, it passes its own check."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]


@pytest.mark.slow
def test_a_built_wheel_checks_itself(tmp_path: Path) -> None:
    built, installed = tmp_path / "built", tmp_path / "installed"
    subprocess.run([*PIP, "wheel", "--no-deps", "--wheel-dir", built, ROOT], check=True)
    (wheel,) = built.glob("remote_mediation-*.whl")
    subprocess.run([*PIP, "install", "--no-deps", "--target", installed, wheel], check=True)
    code = "import remote_mediation; from remote_mediation.cli import main; print(remote_mediation.__file__); main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "selfcheck"],
        env={**os.environ, "PYTHONPATH": str(installed)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(installed))
    names = {path.name for path in (installed / "remote_mediation/data").iterdir()}
    assert {"pairs.jsonl", "judged.csv"} <= names
    assert list(installed.glob("remote_mediation-*.dist-info/licenses/LICENSE"))
