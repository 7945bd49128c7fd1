"""One process at a time measures into a run folder; the system itself lets go of the lock of a process that ended."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import socket
import weakref
from pathlib import Path

from remote_mediation.errors import StoreError
from remote_mediation.provenance import now

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK_FILE = ".lock"
_log = logging.getLogger(__name__)


class Lock:
    """A folder held by this process, for as long as this object lives and the folder stays where it is."""

    def __init__(self, folder: Path) -> None:
        """Take the folder; `hold` also finds the lock that this process has already.

        Raises:
            StoreError: another process holds it.
            OSError: the lock file cannot be written.
        """
        # Without following a link, by which somebody else's file would be emptied.
        file = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o600)
        weakref.finalize(self, os.close, file)
        try:
            if fcntl is None:
                raise OSError("this system has no flock")
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StoreError(
                f"{folder} is being measured by {_holder(file)}; wait for it to end or choose another --out"
            ) from None
        except OSError as error:
            _log.warning("%s cannot be locked (%s): let no other process measure into it", folder, error)
        self._path = folder / LOCK_FILE
        who = {"pid": os.getpid(), "host": socket.gethostname(), "since": now(), "token": secrets.token_hex(8)}
        self._said = json.dumps(who).encode()
        os.ftruncate(file, 0)
        os.pwrite(file, self._said, 0)

    def holds(self) -> bool:
        """Whether the folder still is the one that was taken.

        It may have been moved or deleted since, or taken by another process where the system has no locks.
        """
        try:
            return self._path.read_bytes() == self._said
        except OSError:
            return False


_held: weakref.WeakValueDictionary[tuple[int, Path], Lock] = weakref.WeakValueDictionary()


def hold(folder: Path) -> Lock:
    """The lock of a folder, shared by all of this process who ask for it; let go of when the last of them drops it.

    Raises:
        StoreError, OSError: as `Lock`.
    """
    key = (os.getpid(), folder.resolve())
    lock = _held.get(key)
    if lock is None or not lock.holds():
        lock = _held[key] = Lock(folder)
    return lock


def _holder(file: int) -> str:
    """Who wrote the lock file, as far as it can be read."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        known = json.loads(os.pread(file, 4096, 0))
        return f"process {known['pid']} on {known['host']} since {known['since']}"
    return "another process"
