"""What the C library does with the memory that tensors free, where it is glibc; elsewhere all this does nothing.

It would hand back every tensor of some MB and have fresh pages zeroed for the next one, which takes half of the time of
rows of one token. What it keeps instead falls to pieces, as tensors of other sizes take their places: after some
hundred jobs several times what a job needs would be kept, and is given back between two jobs.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from pathlib import Path

# Parameters of mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _LARGEST = -1, -3, 2**30
# Linux says there, in pages, what of this process is in memory.
_STATM = Path("/proc/self/statm")
KEPT = 2e9
"""Bytes beyond what the process had at first that may be kept from job to job."""


def keep_freed() -> None:
    """Keep the pages that tensors free."""
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_THRESHOLD, _LARGEST)
        library.mallopt(_M_TRIM_THRESHOLD, _LARGEST)


def give_back_beyond(most: float) -> None:
    """Hand back the pages of free memory if more than so many bytes of this process are in memory."""
    if resident() > most:
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def resident() -> int:
    """Bytes of this process that are in memory; 0 where the system does not say."""
    if not _STATM.exists():
        return 0
    return int(_STATM.read_text("ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
