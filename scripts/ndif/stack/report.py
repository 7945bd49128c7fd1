"""What the commands print about the server."""

import subprocess
from pathlib import Path
from typing import Any

from . import control, processes
from .parts import PARTS, Part
from .settings import HOME, LOOPBACK, Settings


def part_lines(settings: Settings) -> list[str]:
    """One line for each part: its name, whether it works, its first process and its port."""
    return [_part_line(part, settings) for part in PARTS.values()]


def _part_line(part: Part, settings: Settings) -> str:
    state = "up" if control.is_up(part, settings) else "DOWN"
    pid = control.first_pid(part) or "-"
    return f"{part.name:6} {state:5} pid {pid:<8} {LOOPBACK}:{settings.port(part.name)}"


def model_lines(settings: Settings) -> list[str]:
    """Where blocks run, and a line for each model that is served."""
    mode = "each in a sandbox process" if settings.sandbox else "in the model's process"
    return [f"blocks run {mode}", *(f"serves {repo} from {folder}" for repo, folder in settings.models.items())]


def deployment_lines(status: dict[str, Any]) -> list[str]:
    """One line for each model that is loaded or loading, from the API's /status."""
    loaded = {name: entry for name, entry in status["deployments"].items() if entry.get("deployment_level") != "COLD"}
    if not loaded:
        return ["no model is loaded; the first job for a model loads it"]
    return [
        f"model {entry.get('repo_id', name)} task {entry.get('task')}: {entry['application_state']}"
        for name, entry in loaded.items()
    ]


def usage_lines() -> list[str]:
    """Memory of the server's processes and size of its folder."""
    pids = [pid for part in PARTS.values() for pid in control.pids(part)]
    memory = processes.memory_bytes(pids) / 1e9
    return [f"memory {memory:.1f} GB in {len(pids)} processes", f"disk   {_disk_bytes(HOME) / 1e9:.1f} GB in {HOME}"]


def _disk_bytes(folder: Path) -> int:
    command = ["du", "--summarize", "--block-size=1", str(folder)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[0])
