"""Start, watch and stop processes without trusting a bare number.

Each part of the server leads a session of its own. Everything it forks stays in that session, also after the leader
was killed: gunicorn's dispatcher, Ray's workers (which leave the process *group*). The session is the handle here.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from .errors import StackError

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_GRACE_S = 15.0
_POLL_S = 0.2


class Session(NamedTuple):
    """A session of processes, told from a later one that got the same number."""

    leader: int
    """Process id of the leader, which is the session's id too."""
    started: int
    """Start of the leader, in clock ticks after boot."""
    boot: str
    """The boot that counts those ticks."""


class _Stat(NamedTuple):
    state: str
    session: int
    started: int


def start(argv: list[str], *, environment: dict[str, str], folder: Path, log: Path) -> Session:
    """Run `argv` as the leader of a new session, its output appended to `log`."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            argv,
            env=environment,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    stat = _stat(process.pid)
    return Session(process.pid, stat.started if stat else 0, _BOOT_ID.read_text().strip())


def members(session: Session) -> list[int]:
    """Process ids of the session that still run; none if its numbers now belong to somebody else."""
    if session.boot != _BOOT_ID.read_text().strip():
        return []
    leader = _stat(session.leader)
    if leader and leader.started != session.started:
        return []
    return [pid for pid in _all_pids() if (stat := _stat(pid)) and stat.session == session.leader and stat.state != "Z"]


def stop(session: Session) -> None:
    """End every process of the session: a request first, and SIGKILL for those that do not follow it."""
    _send(session, signal.SIGTERM)
    if not wait_until(lambda: not members(session), _GRACE_S):
        kill(session)


def kill(session: Session) -> None:
    """SIGKILL every process of the session, also those that fork meanwhile."""
    if not wait_until(lambda: not _send(session, signal.SIGKILL), _GRACE_S):
        raise StackError(f"processes {members(session)} outlive SIGKILL; look at their state with ps")


def _send(session: Session, number: signal.Signals) -> list[int]:
    """Signal the session's processes; returns their ids."""
    pids = members(session)
    for pid in pids:
        with suppress(ProcessLookupError):  # it ended in between
            os.kill(pid, number)
    return pids


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether `condition` came true within `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)
    return True


def title(pid: int) -> str:
    """The command line that the process shows, empty if it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def memory_bytes(pids: list[int]) -> int:
    """Memory that ends with these processes: pages shared among n processes count one nth each (PSS)."""
    return sum(_pss_bytes(pid) for pid in pids)


def _pss_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def _all_pids() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def _stat(pid: int) -> _Stat | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The second field is the program's name in parentheses and may itself hold spaces and parentheses.
    fields = text.rpartition(")")[2].split()
    return _Stat(state=fields[0], session=int(fields[3]), started=int(fields[19]))
