"""`scripts/test` itself, with stand-ins for what it calls: what runs after tests have failed, and how it ends."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts/test"
PARALLEL = "-n auto --maxprocesses 4 --dist worksteal"
QUICK, REMOTE, SANDBOX = f"{PARALLEL} -m not ndif", "tests/ndif", "tests/ndif/test_sandbox.py"


def ran(folder: Path, codes: dict[str, int], *arguments: str) -> tuple[int, list[str]]:
    """Exit code, and what was called, when pytest ends with these codes, by its arguments."""
    ends = "".join(f'[ "$*" != "-m pytest {asked}" ] || exit {code}\n' for asked, code in codes.items())
    programs = {".venv/bin/python": ends, ".venv/bin/remote-mediation": ""}
    programs |= {f"scripts/{name}": "" for name in ("setup", "check", "ndif/up", "ndif/down", "ndif/test_models")}
    for name, end in programs.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'#!/bin/sh\necho "{Path(name).name} $*" >> "{folder}/calls"\n{end}', "utf-8")
        path.chmod(0o755)
    (folder / ".ndif").mkdir()
    (folder / ".ndif/env.sh").touch()
    shutil.copy(SCRIPT, folder / "scripts/test")
    found = subprocess.run([folder / "scripts/test", *arguments], check=False, timeout=60)
    return found.returncode, (folder / "calls").read_text("utf-8").splitlines()


def pytests(calls: list[str]) -> list[str]:
    return [call.removeprefix("python -m pytest ") for call in calls if call.startswith("python -m pytest")]


@pytest.mark.parametrize(
    ("codes", "code"), [({}, 0), ({QUICK: 1}, 1), ({REMOTE: 1}, 1), ({SANDBOX: 1}, 1), ({QUICK: 1, REMOTE: 1}, 1)]
)
def test_failed_tests_keep_no_others_from_running(tmp_path: Path, codes: dict[str, int], code: int) -> None:
    ended, calls = ran(tmp_path, codes)
    assert ended == code
    assert pytests(calls) == [QUICK, REMOTE, SANDBOX]
    assert calls[-1] == "down "


@pytest.mark.parametrize("code", [2, 3, 5])
def test_what_was_stopped_stays_stopped(tmp_path: Path, code: int) -> None:
    """2 is Ctrl-C, 3 an error of pytest's own, 5 no test at all."""
    ended, calls = ran(tmp_path, {QUICK: code})
    assert ended == code
    assert pytests(calls) == [QUICK]
    assert not [call for call in calls if call.startswith(("up", "down"))]


def test_quick(tmp_path: Path) -> None:
    ended, calls = ran(tmp_path, {f"{PARALLEL} -m not slow and not ndif -k words": 1}, "--quick", "-k", "words")
    assert (ended, pytests(calls)) == (1, [f"{PARALLEL} -m not slow and not ndif -k words"])
