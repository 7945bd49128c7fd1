"""Settings as the text of a study file: the inverse of `tomllib`, for what a study file can hold."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def toml_text(settings: Mapping[str, Any]) -> str:
    """Settings and sections of them as TOML. Values are texts, numbers, truth values, and lists and tables of these.

    Raises:
        TypeError: a value that TOML does not have, such as None.
    """
    sections = {name: value for name, value in settings.items() if isinstance(value, Mapping)}
    lines = [_line(name, value) for name, value in settings.items() if name not in sections]
    for name, section in sections.items():
        lines += ["", f"[{_text(name)}]", *(_line(key, value) for key, value in section.items())]
    return "\n".join(lines) + "\n"


def _line(name: str, value: Any) -> str:
    return f"{_text(name)} = {_value(value)}"


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(_line(key, inner) for key, inner in value.items())}}}"
    raise TypeError(f"{value!r} cannot stand in a study file")


def _text(name: str) -> str:
    """A key, in quotes where it is no bare word."""
    return name if name.isascii() and name.replace("_", "").replace("-", "").isalnum() else _value(name)
