"""Does a model fit this machine, and with which settings? Told from its configuration, before any weights are here.

Ways are tried from the fastest to the slowest: on one GPU, over several, in fewer bits, on the CPU, and with
the rest of the weights fetched from the CPU or the disk while their layer runs.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from remote_mediation.engine.budget import DEFAULT_BATCH, LIBRARIES, weight_bytes
from remote_mediation.engine.server import Finding
from remote_mediation.errors import InputError
from remote_mediation.models import load_info
from remote_mediation.sites import ModelInfo

# Share of a GPU's free memory that weights and batches may take.
_USED = 0.9
# Where Linux says what memory is left, and in a container what it may take and has taken.
_MEMORY = Path("/proc/meminfo")
_LIMIT, _TAKEN = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")


class Room(NamedTuple):
    """Bytes that are free on this machine."""

    gpus: tuple[float, ...]
    """On each GPU."""
    memory: float
    """For processes."""
    disk: float
    """Where the model's files would be."""


class Way(NamedTuple):
    """Settings with which a model fits, or would."""

    settings: str
    """As in a study file."""
    needed: float
    """Bytes of weights and of a batch, and on the CPU of libraries."""
    free: float
    """Bytes that are there for them."""


def fits(name: str, revision: str = "") -> Finding:
    """Whether a model fits this machine, with the settings of the fastest way; one that does not is no failure."""
    try:
        info = load_info(name, revision)
    except InputError as error:
        return Finding("here", True, f"not known whether it fits this machine: {error}")
    return Finding("here", True, described(info, room_here()))


def described(info: ModelInfo, room: Room) -> str:
    """Whether a model fits so much room, in words."""
    sizes = [(dtype, weight_bytes(info, dtype)) for dtype in ("float32", "bfloat16")]
    sizes.append(("nf4", weight_bytes(info, "bfloat16", "nf4")))
    weights = "weights take " + ", ".join(f"{size / 1e9:.1f} GB in {held}" for held, size in sizes)
    fitting = next((way for way in ways(info, room) if way.needed <= way.free), None)
    if fitting is None:
        return f"it does not fit this machine: {weights}; study it on a server (--backend ndif)"
    taken = f"{fitting.needed / 1e9:.1f} of {fitting.free / 1e9:.1f} GB free"
    missing = (
        "; first pip install '.[quantised]'" if "nf4" in fitting.settings and not find_spec("bitsandbytes") else ""
    )
    return f"it fits this machine with {fitting.settings} ({taken}){missing}; {weights}"


def ways(info: ModelInfo, room: Room) -> Iterator[Way]:
    """Ways to load a model, the fastest first."""
    whole = weight_bytes(info, "bfloat16") + DEFAULT_BATCH
    packed = weight_bytes(info, "bfloat16", "nf4") + DEFAULT_BATCH
    largest, together = (_USED * size for size in (max(room.gpus, default=0.0), sum(room.gpus)))
    half = 'dtype = "bfloat16"'
    if room.gpus:
        yield Way(f'{half}, device = "cuda"', whole, largest)
        yield Way(f'{half}, [load] device_map = "auto"', whole, together)
        yield Way(f'{half}, device = "cuda", [load] quantization = "nf4"', packed, largest)
        yield Way(f'{half}, [load] device_map = "auto", quantization = "nf4"', packed, together)
    yield Way('dtype = "float32"', weight_bytes(info, "float32") + DEFAULT_BATCH + LIBRARIES, room.memory)
    yield Way(half, whole + LIBRARIES, room.memory)
    yield Way(f'{half}, [load] quantization = "nf4"', packed + LIBRARIES, room.memory)
    spread = f'{half}, [load] device_map = "auto"'
    yield Way(f"{spread}, some of it on the CPU and the disk and slow", whole + LIBRARIES, _spread(room))


def _spread(room: Room) -> float:
    """Bytes of all places together."""
    return _USED * sum(room.gpus) + room.memory + room.disk


def room_here() -> Room:
    """What is free on this machine."""
    import torch

    cards = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    gpus = tuple(float(torch.cuda.mem_get_info(card)[0]) for card in cards)
    return Room(gpus, _free_memory(), float(shutil.disk_usage(Path.cwd()).free))


def memory_here() -> float:
    """Bytes of memory of this machine; 0 where the system does not say."""
    try:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):
        return 0.0


def _free_memory() -> float:
    """Bytes that a process can have; all there are where the system does not say what is free."""
    if not _MEMORY.exists():
        return memory_here()
    lines = dict(line.split(":", 1) for line in _MEMORY.read_text("utf-8").splitlines())
    free = float(lines["MemAvailable"].split()[0]) * 1024
    if _LIMIT.exists() and (limit := _LIMIT.read_text("utf-8").strip()) != "max":
        free = min(free, float(limit) - float(_TAKEN.read_text("utf-8")))
    return free
