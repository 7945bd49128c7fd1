"""Where the files that settings name are: a study file names them from where it lies, a flag from where it is typed.

One rule for all of them: `~` is the user's folder, a path beside the study file comes first, and what is there stays
as it was written otherwise (a hub id, the name of a template, a path from where the command is given).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

# Settings that name a file, and those that name one or something else, by section ("" is the study itself).
_FILES = {"": ("pairs", "harmful", "harmless"), "monitor": ("hard_negatives",), "verify": ("labelled",)}
_FILES |= {"directions": ("basis",), "ablation": ("labelled",)}
_PERHAPS = {"": ("model",), "prompt": ("template",), "attacks": ("checkpoints",), "alignment": ("base",)}
# Judges that are a folder, which stands behind their kind and before a label.
_JUDGES = ("classifier", "embedding", "openings+embedding")
# Settings of judges: a folder may stand in them.
_JUDGED = dict.fromkeys(("intervene", "verify", "ablation"), ("judge",))
_NO_FILES = ("builtin", "-")


def expanded(name: str) -> Path:
    """A path with the user's folder for `~`; as it is written where there is no such user, or the folder is unknown."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        return Path(name)


def resolved(settings: dict[str, Any], base: Path = Path()) -> dict[str, Any]:
    """Settings with every path as seen from here. base: the folder that relative ones are named from."""
    return renamed(settings, lambda value: _file(value, base), lambda value: _perhaps(value, base))


def renamed(settings: dict[str, Any], file: Callable[[str], str], perhaps: Callable[[str], str]) -> dict[str, Any]:
    """Settings with other names of files. file, perhaps: make those of what is a file, and of what is one or another.

    Of a judge only the folder in it is renamed.
    """
    found = _each(settings, _FILES, file)
    found = _each(found, _PERHAPS, perhaps)
    return _each(found, _JUDGED, lambda value: _judge(value, perhaps))


def _each(
    settings: dict[str, Any], names: Mapping[str, tuple[str, ...]], change: Callable[[str], str]
) -> dict[str, Any]:
    """Settings with some of them changed, where they are texts or lists of texts."""

    def changed(value: Any) -> Any:
        if isinstance(value, list):
            return [changed(item) for item in value]
        return change(value) if isinstance(value, str) and value else value

    found = dict(settings)
    for section, kept in names.items():
        part = found.get(section) if section else found
        if isinstance(part, dict):
            new = {name: changed(part[name]) for name in kept if name in part}
            found |= {section: {**part, **new}} if section else new
    return found


def _file(value: str, base: Path) -> str:
    path = expanded(value)
    if value in _NO_FILES or (path == Path(value) and base == Path()):
        return value
    here_only = path.exists() and not (base / path).exists()
    return str(path if here_only else base / path)


def _perhaps(value: str, base: Path) -> str:
    path = expanded(value)
    if path != Path(value):
        return str(path)
    if not (base / path).exists() or (path.exists() and path.samefile(base / path)):
        return value  # as it was written, which run folders hold
    return str(base / path)


def _judge(value: str, perhaps: Callable[[str], str]) -> str:
    kind, _, rest = value.partition(":")
    folder, colon, label = rest.partition(":")
    return f"{kind}:{perhaps(folder)}{colon}{label}" if kind in _JUDGES and folder else value
