"""What nobody sees in a text and a tokenizer reads: kinds of blanks, how characters are coded, signs of no width.

Two texts that look alike are one prompt to people, and other tokens to a model. So repeats are known by what can be
seen (`visible`), and what the two prompts of a pair have in common is to be spelled alike in both (`respelled`).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

# Shown as nothing, although Unicode counts them among letters and accents: joiners, fillers, variation selectors.
_IGNORABLE = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180d\u180f\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)
_BLANKS = re.compile(r"(\s+)")


class _Units(NamedTuple):
    """A text in parts."""

    begin: str
    """Blanks before its first word."""
    body: list[str]
    """Words and the blanks between them, by turns."""
    end: str
    """Blanks behind its last word."""


def visible(text: str) -> str:
    """A text without what nobody sees."""
    coded = unicodedata.normalize("NFKC", text)
    seen = (one for one in coded if one.isspace() or unicodedata.category(one) not in ("Cf", "Cc"))
    return " ".join(_IGNORABLE.sub("", "".join(seen)).split())


def respelled(text: str, other: str) -> str:
    """A text whose beginning and end, as far as they look like those of another text, are spelled as they are there.

    What lies between stays as it is. A line break can be seen, other blanks between two words cannot be told apart.
    """
    mine, there = _units(text), _units(other)
    start = _alike(mine.body, there.body)
    end = _alike(mine.body[start:][::-1], there.body[start:][::-1])
    middle = mine.body[start : len(mine.body) - end]
    parts = (there.begin, *there.body[:start], *middle, *there.body[len(there.body) - end :], there.end)
    return "".join(parts)


def first_otherwise(text: str, again: str) -> tuple[str, str]:
    """The first word, or the first blanks, that two texts of as many words have otherwise."""
    pairs = zip(*([one.begin, *one.body, one.end] for one in map(_units, (text, again))), strict=True)
    return next((one, other) for one, other in pairs if one != other)


def _units(text: str) -> _Units:
    """The parts of a text; signs of no width that stand by themselves are blanks."""
    parts = ["".join(part) for _, part in groupby(_BLANKS.split(text), key=_shown)]
    begin = "" if _shown(parts[0]) else parts.pop(0)
    end = parts.pop() if parts and not _shown(parts[-1]) else ""
    return _Units(begin, parts, end)


def _shown(part: str) -> bool:
    return any(one.isprintable() and not one.isspace() for one in part)


def _alike(parts: Sequence[str], others: Sequence[str]) -> int:
    """How many of the first parts look like the first ones of another text."""
    same = (one == other or _looks(one) == _looks(other) for one, other in zip(parts, others, strict=False))
    return next((number for number, alike in enumerate(same) if not alike), min(len(parts), len(others)))


def _looks(part: str) -> str:
    return visible(part) or ("\n" if "\n" in part else " ")
