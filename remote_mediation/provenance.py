"""What made a run: versions, commit, machine and time, for `run.json`."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = ("remote-mediation", "nnsight", "torch", "transformers", "numpy", "scipy", "pandas")


def provenance() -> dict[str, Any]:
    """Package versions, git commit of the code (None outside a checkout), machine and the present time (UTC)."""
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "git": _git(),
        "host": {"system": platform.system(), "machine": platform.machine(), "cpus": os.cpu_count()},
        "started": now(),
    }


def continued(begun: Mapping[str, Any], made: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """By time the commits, other than the first, whose code went on with a run; nothing where there is none.

    begun: the record so far. made: `provenance` of what goes on.
    """
    git, known = made["git"], begun.get("continued", {})
    if not git or git in (begun.get("git", git), *known.values()):
        return {}
    return {"continued": {**known, made["started"]: git}}


def now() -> str:
    """The present time, UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def peak_memory() -> float | None:
    """The most memory that this process has had, in GB; None on systems that do not say."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if platform.system() == "Darwin" else 1024  # bytes there, kilobytes elsewhere
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 2)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git() -> dict[str, Any] | None:
    """Commit of the package's own checkout, and whether tracked files differ from it."""
    folder = Path(__file__).parent
    commit = _run(["git", "-C", str(folder), "rev-parse", "HEAD"])
    if commit is None:
        return None
    changed = _run(["git", "-C", str(folder), "status", "--porcelain", "--untracked-files=no"])
    return {"commit": commit, "dirty": bool(changed)}


def _run(command: list[str]) -> str | None:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
