"""Content of a model's files as hashes, of every byte; those of large files are remembered in the user's cache folder.

To hash a file takes a second or more a GB. What is remembered is known by the file's path, size, times, inode and
device: whatever writes into a file changes the time that the system keeps of it, which no program can set.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import time
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from remote_mediation.fetch import cache_folder

# Bytes from which on a file's hash is remembered.
_LARGE = 10**9
# Nanoseconds within which two changes of a file may have the same time, on disks of other machines too.
_TICK = 2 * 10**9
_DIGEST = re.compile(r"[0-9a-f]{32}")
# Of files of more bytes than the first number older versions hashed so many blocks of so many bytes.
_WHOLE, _SAMPLES, _BLOCK = 2 * 10**9, 256, 2**20


class _State(NamedTuple):
    """What a file is, as far as the system tells without reading it."""

    path: str
    size: int
    written: int
    changed: int
    inode: int
    device: int


def content(path: Path) -> str:
    """Hash of a file's size and of all its bytes.

    Raises:
        OSError: it cannot be read.
    """
    return _content(_state(path))


def sampled(path: Path) -> str:
    """What older versions took for it: of a file of more than 2 GB the hash of its size and of blocks all over it."""
    size = path.stat().st_size
    if size <= _WHOLE:
        return content(path)
    found = hashlib.blake2b(str(size).encode(), digest_size=16)
    with path.open("rb") as opened:
        for number in range(_SAMPLES):
            opened.seek((size - _BLOCK) * number // (_SAMPLES - 1))
            found.update(opened.read(_BLOCK))
    return found.hexdigest()


def _state(path: Path) -> _State:
    fact = path.stat()
    return _State(str(path.resolve()), fact.st_size, fact.st_mtime_ns, fact.st_ctime_ns, fact.st_ino, fact.st_dev)


@lru_cache(maxsize=1024)
def _content(state: _State) -> str:
    if state.size < _LARGE:
        return _hashed(state)
    note = cache_folder().parent / "digests" / hashlib.blake2b(repr(state).encode(), digest_size=16).hexdigest()
    with contextlib.suppress(OSError, ValueError):  # none yet, or a damaged one
        if _DIGEST.fullmatch(known := note.read_text("ascii")):
            return known
    began = time.time_ns()
    digest = _hashed(state)
    if state.changed < began - _TICK and _state(Path(state.path)) == state:
        with contextlib.suppress(OSError):  # a cache that cannot be written makes starts slower, and nothing else
            note.parent.mkdir(parents=True, exist_ok=True)
            note.write_text(digest, "ascii")
    return digest


def _hashed(state: _State) -> str:
    with Path(state.path).open("rb") as opened:
        found = hashlib.file_digest(opened, lambda: hashlib.blake2b(str(state.size).encode(), digest_size=16))
    return found.hexdigest()
