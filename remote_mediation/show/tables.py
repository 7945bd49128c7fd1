"""Tables of text, and numbers as they are read: three significant digits at most, a dash where there is none.

Shares, slopes and whatever stands with an interval have two: its ends say how much less is known. A table is made once
(`Table`) and printed twice, as Markdown and by rich. Where a number is missing a note below says why.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.table import Table as RichTable
from rich.text import Text

from remote_mediation.screen import harmless
from remote_mediation.stats import Interval

_MOST_PLAIN = 1e9  # from here on powers of ten are easier to read
_MOST_DECIMALS, _OF_PERCENT = 5, 2  # what is smaller is 0 to a reader
NONE = "-"
# How a text begins that a spreadsheet computes, but for numbers and dashes, and with apostrophes before it.
_FORMULA = re.compile(r"'*(?:[=@\t\r]|[+-](?!(?:[\d.]+(?:[eE][+-]?\d+)?)?$))")
_MARKED = re.compile(r"'" + _FORMULA.pattern)
STYLES = {
    **{"supported": "green", "not supported": "red", "undecided": "yellow", "not tested": "dim"},
    **{"holds": "green", "violated": "bold red", "not judged": "yellow", "not checked": "dim"},
}
"""Colours of verdicts in the terminal."""


class Note(NamedTuple):
    """Why cells of a column are missing, or what to know before reading them."""

    column: str
    """Its header; empty for the whole table."""
    text: str

    def __str__(self) -> str:
        return f"{self.column}: {self.text}" if self.column else self.text


class Table(NamedTuple):
    """A table of text with its notes."""

    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    notes: tuple[Note, ...] = ()

    def only(self, *names: str) -> Table:
        """Some of its columns, with the notes on these."""
        places = [self.header.index(name) for name in names]
        rows = [tuple(row[place] for place in places) for row in self.rows]
        return Table(names, rows, tuple(note for note in self.notes if note.column in ("", *names)))

    def markdown(self) -> str:
        """As Markdown, notes as a list below."""
        return paragraphs(markdown_table(self.header, self.rows), bullets(self.notes))

    def rich(self, title: str) -> RichTable:
        """For the terminal; cells are shown as they are, verdicts in colour."""
        notes = Text("\n".join(map(str, self.notes)))
        table = RichTable(title=Text(title, "bold"), caption=notes, box=SIMPLE_HEAD)
        for name in self.header:
            table.add_column(Text(name), overflow="fold")
        table.title_justify = table.caption_justify = "left"
        for row in self.rows:
            table.add_row(*(Text(cell, style=STYLES.get(cell, "")) for cell in row))
        return table


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table of cells that may hold Markdown; bars and line breaks stay inside their cells."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)


def csv_text(table: pd.DataFrame) -> str:
    """A table as CSV, in which no text begins as a formula of a spreadsheet does: an apostrophe stands before it."""
    return str(table.map(_no_formula).to_csv(index=False, lineterminator="\n"))


def csv_table(path: Path, names: Iterable[str] = ()) -> pd.DataFrame:
    """The table that `csv_text` wrote. names: columns whose values are text, also where they look like numbers.

    Only an empty cell is a missing value: a pair may be called NA. Raises: OSError, ValueError.
    """
    found = pd.read_csv(path, dtype=dict.fromkeys(names, "str"), keep_default_na=False, na_values=[""])
    return found.map(lambda cell: cell[1:] if isinstance(cell, str) and _MARKED.match(cell) else cell)


def _no_formula(cell: Any) -> Any:
    return f"'{cell}" if isinstance(cell, str) and _FORMULA.match(cell) else cell


def literal(text: str) -> str:
    """Text that Markdown shows as it is: no markup, links, images or HTML, and nothing that steers a terminal."""
    return re.sub(r"([\\`*_\[\]()#|~!<>:])", r"\\\1", html.escape(harmless(text), quote=False))


def paragraphs(*parts: str) -> str:
    """Parts with an empty line between them; empty parts are left out."""
    return "\n\n".join(part for part in parts if part)


def bullets(lines: Iterable[object]) -> str:
    """A list."""
    return "\n".join(f"- {line}" for line in lines)


def number(value: float, digits: int = 3) -> str:
    """So many significant digits, all of them where there are more before the point, and at most five decimals."""
    if np.isnan(value):
        return NONE
    if abs(value) >= 999.5:
        return f"{value:,.0f}" if abs(value) < _MOST_PLAIN else f"{value:.3g}"
    return _plain(value, _MOST_DECIMALS, digits)


def rounded(value: float) -> str:
    """A number of which two significant digits are enough."""
    return number(value, digits=2)


def percent(value: float) -> str:
    """A share as percentage, with two significant digits."""
    return NONE if np.isnan(value) else f"{_plain(100 * value, _OF_PERCENT, digits=2)}%"


def p_value(p: float, floor: float) -> str:
    """A p of sign flips; where none of them reach what was found, it is told by their count.

    floor: the smallest p that they can give (`stats.estimate_means`).
    """
    if np.isnan(p):
        return NONE
    if p <= floor * (1 + 1e-9):
        return f"0 of {1 / floor - 1:,.0f} sign flips"
    return q_value(p)


def q_value(q: float) -> str:
    """A false discovery rate; below a thousandth its size says nothing."""
    return "< 0.001" if q < 0.001 else number(q)


def _plain(value: float, most: int, digits: int) -> str:
    """So many significant digits and at most so many decimals, never as a power of ten."""
    if value == 0 or not math.isfinite(value):
        return f"{value:.0f}"
    decimals = min(most, max(0, digits - 1 - math.floor(math.log10(abs(value)))))
    text = f"{value:z.{decimals}f}"
    return text.rstrip("0").rstrip(".") if decimals else text


def interval(value: float, low: float, high: float, shown: Callable[[float], str] = rounded) -> str:
    """A value with its interval."""
    if np.isnan(value):
        return NONE
    ends = NONE if np.isnan(low) else f"{shown(low)}, {shown(high)}"
    return f"{shown(value)} [{ends}]"


def estimate(found: Interval, shown: Callable[[float], str] = rounded) -> str:
    """An estimate with its interval."""
    return interval(found.value, found.low, found.high, shown)


def count(many: int, noun: str) -> str:
    """A number of things."""
    return f"{many} {noun}" if many == 1 else f"{many} {noun}s"


def notes_on(column: str, texts: Iterable[str]) -> list[Note]:
    """A note for each text that is not empty, once."""
    return [Note(column, text) for text in dict.fromkeys(texts) if text]


def _cell(text: str) -> str:
    return re.sub(r"(?<!\\)\|", r"\\|", text).replace("\r", "").replace("\n", "<br>")
