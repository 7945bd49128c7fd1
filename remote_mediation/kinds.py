"""JSON data as what they were made of: whatever stands in a file is of a kind, or refused in a line."""

from __future__ import annotations

import json
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

_Kind = TypeVar("_Kind")


def of_kind(kind: TypeAdapter[_Kind], data: Any) -> _Kind:
    """What was kept as JSON, in which tuples are lists and dataclasses objects.

    Raises:
        ValueError: the data are of another kind.
    """
    try:
        return kind.validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        raise ValueError(first_of(error)) from error


def first_of(error: ValidationError) -> str:
    """The first thing that is wrong with data, in a line, and where."""
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}".removeprefix(": ")
