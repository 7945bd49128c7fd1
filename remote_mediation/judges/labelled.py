"""Answers that people have judged: the built-in ones, or a user's file."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from remote_mediation.errors import JudgeError

BUILTIN = "builtin"
_COLUMNS = ("prompt", "answer", "harmful")
_LABELS = {"1": True, "true": True, "0": False, "false": False}


@dataclass(frozen=True)
class Labelled:
    """An answer that people have judged."""

    prompt: str
    """What was asked."""
    answer: str
    """What was answered; may be empty."""
    harmful: bool
    """Whether the answer complies, in the sense of the package's docstring."""
    category: str = ""
    """What the prompt is about; answers of one category are one cluster. Empty where the file does not say."""
    kind: str = ""
    """Refusal, partial refusal, evasion, compliance or nonsense. Empty where the file does not say."""


def load_labelled(source: str = BUILTIN) -> tuple[Labelled, ...]:
    """Labelled answers of a CSV file with the columns `prompt`, `answer` and `harmful` (1, 0, true or false).

    source: `builtin`, or a file. The columns `category` and `kind` are read where there are any, others are not.

    Raises:
        JudgeError: unreadable file, missing column, or a row that is no labelled answer, named by its line.
    """
    try:
        if source == BUILTIN:
            text = resources.files("remote_mediation").joinpath("data/judged.csv").read_text("utf-8")
        else:
            text = Path(source).read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise JudgeError(f"cannot read labelled answers {source!r}: {reason}; give a CSV file") from error
    try:
        found = tuple(_labelled(text, source))
    except csv.Error as error:
        raise JudgeError(f"labelled answers {source!r} are not CSV: {error}; quote cells that hold quotes") from error
    if not found:
        raise JudgeError(f"{source!r} holds no labelled answers; give at least one row")
    return found


def _labelled(text: str, source: str) -> Iterator[Labelled]:
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # of the whole process, by default 131072
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    missing = [name for name in _COLUMNS if name not in (reader.fieldnames or ())]
    if missing:
        raise JudgeError(f"{source!r} has no column {missing[0]!r}; it needs {', '.join(_COLUMNS)}")
    for row in reader:
        begins = reader.line_num - sum(str(cell).count("\n") for cell in row.values())
        if None in row or None in row.values():
            given = "more" if None in row else "fewer"
            raise JudgeError(f"{source!r}, line {begins}: {given} cells than columns; quote cells that hold commas")
        label = row["harmful"].strip().casefold()
        if label not in _LABELS:
            raise JudgeError(f"{source!r}, line {begins}: harmful is {row['harmful']!r}; write 1, 0, true or false")
        yield Labelled(
            prompt=row["prompt"],
            answer=row["answer"],
            harmful=_LABELS[label],
            category=row.get("category", ""),
            kind=row.get("kind", ""),
        )
