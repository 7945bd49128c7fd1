"""How a run was made: the command that measures it again, its time, memory and commit, and the settings it changed."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from remote_mediation.config import StudyConfig
from remote_mediation.show.tables import number
from remote_mediation.toml import toml_text

UNKNOWN = "not recorded"
_FLAGS = {
    **{"model": "--model", "revision": "--revision", "pairs": "--pairs", "max_pairs": "--max-pairs"},
    **{"analyses": "--analyses", "outcome": "--outcome", "backend": "--backend", "dtype": "--dtype"},
    **{"device": "--device", "max_memory": "--max-memory", "seed": "--seed"},
}
"""Settings that `run` has a flag for; all others go through `--set`."""


def differing(config: StudyConfig) -> dict[str, Any]:
    """Settings that are not the defaults, by dotted name; the model is always among them, the run folder never."""
    default = StudyConfig(model="").model_dump(mode="json")
    given = config.model_dump(mode="json", exclude={"out"}, exclude_none=True)
    found: dict[str, Any] = {}
    for name, value in given.items():
        if isinstance(value, dict):
            found |= {f"{name}.{key}": inner for key, inner in value.items() if inner != default[name][key]}
        elif value != default[name]:
            found[name] = value
    return found


def command(config: StudyConfig) -> str:
    """The command that measures the same study, whatever file, flags or calls it was begun with."""
    changed = differing(config)
    words = ["remote-mediation", "run"]
    for name, flag in _FLAGS.items():
        if name in changed:
            value = changed.pop(name)
            words += [flag, ",".join(value) if isinstance(value, list) else str(value)]
    for name, value in changed.items():
        words += ["--set", f"{name}={_as_toml(value)}"]
    return shlex.join(words)


def made_in_words(record: Mapping[str, Any]) -> str:
    """Run time, memory and commit, of what `run.json` holds."""
    seconds, memory, git = record.get("seconds"), record.get("memory"), record.get("git")
    last = "" if "memory" in record else " in its last sitting"  # all that older versions noted
    time = f"{_time(seconds)} of run time{last}" if seconds else f"run time {UNKNOWN}"
    most = f"at most {number(memory)} GB of memory" if memory else f"memory {UNKNOWN}"
    later = "".join(f", continued by {_commit(one)}" for one in record.get("continued", {}).values())
    return f"{time}, {most}, {_commit(git) if git else f'commit {UNKNOWN}'}{later}."


def _commit(git: Mapping[str, Any]) -> str:
    return f"commit {git['commit'][:10]}" + (" with changes that were not committed" if git["dirty"] else "")


def _time(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    hours, rest = divmod(minutes, 60)
    return f"{hours} h {rest} min" if hours else f"{minutes} min"


def _as_toml(value: Any) -> str:
    return toml_text({"x": value}).removeprefix("x = ").rstrip("\n")
