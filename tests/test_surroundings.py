"""What stands around a command: encodings, pipes, terminals, disks and homes that are not as they should be.

A command does what it should, or ends in one line; never in a traceback.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fakes import records, write_pairs
from oracle import Subject

from remote_mediation import cli
from remote_mediation.config import StudyConfig
from remote_mediation.fetch import cache_folder, located
from remote_mediation.progress import Lines
from remote_mediation.store import Store
from remote_mediation.study import run_study

ROOT = Path(__file__).parents[1]
COMMAND = f"{sys.executable} -m remote_mediation"


@pytest.fixture(scope="module")
def folder(subject: Callable[[str], Subject], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, in a folder whose name is no ASCII."""
    model, here = subject("llama_chat"), tmp_path_factory.mktemp("run")
    study = StudyConfig(
        model=model.info.name,
        pairs=str(write_pairs(here / "pairs.jsonl", records())),
        analyses=["layers"],
        positions={"layers": ["last"]},
        outcome="logit_diff",
        logit_diff={"plus": ["sure"], "minus": ["sorry"]},
        statistics={"resamples": 100},
    )
    run_study(study, model.backend, Store.create(here / "läufe", study.identity()))
    return here / "läufe"


def shell(command: str, folder: Path, **environment: str | None) -> subprocess.CompletedProcess[str]:
    """A command of bash in which `this` is this program and `$RUN` the run. environment: None takes a name out."""
    known = {**os.environ, "PYTHONPATH": str(ROOT), "RUN": str(folder), **environment}
    script = f'set -o pipefail; this() {{ {COMMAND} "$@"; }}; {command}'
    found = subprocess.run(
        ["bash", "-c", script],
        env={name: value for name, value in known.items() if value is not None},
        capture_output=True,
        check=False,
        timeout=120,
        cwd=folder,
        encoding="utf-8",
        errors="replace",
    )
    assert "Traceback" not in found.stdout + found.stderr, found
    assert "Exception ignored" not in found.stderr, found
    return found


ENCODINGS: dict[str, dict[str, str | None]] = {
    "ASCII": {"PYTHONIOENCODING": "ascii"},
    "strict ASCII": {"PYTHONIOENCODING": "ascii:strict"},
    "locale C": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "Latin-1": {"PYTHONIOENCODING": "latin-1"},
    "no locale": {"LC_ALL": "xx_XX.ISO-8859-1", "PYTHONUTF8": "0", "LANG": "C"},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ENCODINGS)
def test_encodings_that_lack_letters(folder: Path, name: str) -> None:
    for command in ("this show $RUN", "this report $RUN", "this models"):
        assert shell(command, folder, **ENCODINGS[name]).returncode == 0
    refused = shell("this show $RUN/nöwhere", folder, **ENCODINGS[name])
    assert refused.returncode == 2
    assert len([line for line in refused.stderr.splitlines() if "setlocale" not in line]) == 1


TERMINALS: tuple[dict[str, str | None], ...] = (
    *({"COLUMNS": width} for width in ("1", "10", "0", "x")),
    *({"TERM": "dumb"}, {"TERM": None}, {"NO_COLOR": "1"}, {"FORCE_COLOR": "1", "COLUMNS": "3"}),
    *({"TZ": "Mars/Olympus"}, {"LC_NUMERIC": "de_DE.UTF-8"}),
)


@pytest.mark.slow
@pytest.mark.parametrize("surroundings", TERMINALS, ids=str)
def test_terminals_of_any_kind(folder: Path, surroundings: dict[str, str | None]) -> None:
    assert shell("this show $RUN && this models | tail -1", folder, **surroundings).returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("command", ["show $RUN", "models"])
def test_readers_that_go_away(folder: Path, command: str) -> None:
    assert shell(f"this {command} | head -c 10", folder).returncode in (0, 1, 141)
    assert shell(f"this {command} >&-", folder).returncode == 0
    assert shell(f"this {command} 2>&-", folder).returncode == 0
    assert shell(f"this {command} <&-", folder).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no such device")
def test_a_full_disk_behind_an_output(folder: Path) -> None:
    full = shell("this show $RUN > /dev/full", folder)
    assert full.returncode == 2
    assert "error: No space left on device" in full.stderr
    assert len(full.stderr.splitlines()) == 1
    assert shell("this show $RUN 2> /dev/full", folder).returncode == 0


def test_standard_input_that_is_closed(folder: Path) -> None:
    found = shell("this pairs convert - out.jsonl <&-", folder)
    assert found.returncode == 2
    assert "cannot read pairs file '-': standard input is closed" in found.stderr


def test_users_and_homes_that_are_not_there(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for command in ("pairs convert '~no-such-user/p.csv' out.jsonl", "models check '~no-such-user/m'"):
        found = shell(f"this {command}", tmp_path)
        assert found.returncode == 2
        assert "~no-such-user" in found.stderr
    for name in ("HOME", "XDG_CACHE_HOME", "REMOTE_MEDIATION_CACHE"):
        monkeypatch.delenv(name, raising=False)

    def unknown(number: int) -> Any:
        raise KeyError(number)

    monkeypatch.setattr("pwd.getpwuid", unknown)
    assert located("org/model") == "org/model"
    assert cache_folder().parts[-2:] == ("remote_mediation", "models")


def test_what_the_system_refuses_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("REMOTE_MEDIATION_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(sys, "argv", ["remote-mediation", "fetch-model", "smollm2"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: Not a directory ({tmp_path}/file/")


def test_a_warning_does_not_steer_the_terminal(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run folder is somebody else's, and so are the names of its files."""
    shutil.copytree(folder, tmp_path / "run")
    (tmp_path / "run/readouts/a\x1b[2Jb.npz").write_bytes(b"x")
    monkeypatch.setattr(sys, "argv", ["remote-mediation", "show", str(tmp_path / "run")])
    monkeypatch.setattr(logging.getLogger("remote_mediation"), "handlers", [])
    with pytest.raises(SystemExit):
        cli.main()
    said = capsys.readouterr()
    assert "is damaged" in said.err
    assert "a\N{REPLACEMENT CHARACTER}[2Jb.npz" in said.err
    assert "\x1b[2J" not in said.out + said.err


def test_progress_that_cannot_be_written_ends_no_study(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def print(self, *said: object, **how: object) -> None:
            raise OSError("No space left on device")

    monkeypatch.setattr("remote_mediation.progress.SECONDS", 0.0)
    lines = Lines(Full())  # type: ignore[arg-type]
    lines.total(2)
    lines.advance(1, 1.0)
    lines.note("queued")


def test_a_reader_of_errors_that_goes_away_ends_no_study() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as gone:
        console = cli.Errors(file=gone)
        console.print("measured 1 of 2 rows")
        console.print("measured 2 of 2 rows")
        assert console.quiet
        os.dup2(os.open(os.devnull, os.O_WRONLY), writing)  # nothing is left to be flushed into the pipe
