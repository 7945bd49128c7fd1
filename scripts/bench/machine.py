"""What a timing depends on besides the code: processor, load, versions."""

from __future__ import annotations

import os
import platform
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import psutil

PACKAGES = ("nnsight", "transformer-lens", "pyvene", "torch", "transformers")


@dataclass
class Load:
    """How busy others keep the machine, from its making to `others()`."""

    _wall: float = field(default_factory=time.perf_counter)
    _busy: float = field(default_factory=lambda: _busy())
    _own: float = field(default_factory=lambda: _own())

    def others(self) -> float:
        """Cores that other processes used on average; 0 on a quiet machine."""
        wall = time.perf_counter() - self._wall
        return max(0.0, (_busy() - self._busy - (_own() - self._own)) / wall)


def facts() -> dict[str, str]:
    """Date, processor, cores and versions, for the report; nothing that names the machine."""
    versions = {name: _version(name) for name in PACKAGES}
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "processor": f"{_processor()}, {os.cpu_count()} cores",
        "versions": ", ".join(
            [f"Python {platform.python_version()}", *(f"{name} {found}" for name, found in versions.items() if found)]
        ),
    }


def load_average() -> float:
    """Of the last minute; this process counts in it."""
    return os.getloadavg()[0]


def _busy() -> float:
    times = psutil.cpu_times()
    return sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0)


def _own() -> float:
    times = psutil.Process().cpu_times()
    return times.user + times.system


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
