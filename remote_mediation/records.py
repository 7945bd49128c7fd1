"""Records of the files that people have: JSON lines, JSON lists and tables with any usual delimiter.

What is unambiguous is read, however a spreadsheet or pandas wrote it; anything else is refused in one line that
names the record. Line ends inside a text become line feeds in every format, so that one prompt gives the same
tokens from each.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from remote_mediation.errors import PairsError, innermost
from remote_mediation.paths import expanded

STANDARD_INPUT = "-"
_TABLES = (".csv", ".tsv", ".tab")
_DELIMITERS = ",;\t|"
MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # begins with the mark of UTF-16
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
"""How files begin that say in which encoding they are."""
_BLANKS = re.compile(r"\s*")
# Names of columns with nothing between them but a delimiter.
_HEADER = re.compile(r"\w+(?:[,;\t|]\w+)+")
# The first brace of an object that is written over several lines.
_ALONE = re.compile(r"\{\s*\n")
# How files begin that hold no text of ours, and what they are.
_OTHER_FILES = {
    b"\x1f\x8b": "it is compressed (gzip); unpack it",
    b"\x28\xb5\x2f\xfd": "it is compressed (Zstandard); unpack it",
    b"BZh": "it is compressed (bzip2); unpack it",
    b"\xfd7zXZ": "it is compressed (xz); unpack it",
    b"PK\x03\x04": "it is an Excel workbook or a zip archive; save it as CSV in UTF-8, or unpack it",
    b"\xd0\xcf\x11\xe0": "it is an Excel workbook; save it as CSV in UTF-8",
    b"SQLite format 3": "it is a database; export the table as CSV in UTF-8",
    b"%PDF": "it is a PDF; save its table as CSV in UTF-8",
    b"\x93NUMPY": "it is an array of numpy; save it as CSV in UTF-8",
    b"PAR1": "it is Parquet; let its name end in .parquet",
    b"version https://git-lfs": "it is a git-LFS pointer; run `git lfs pull` beside it",
    b"<!doctype html": "it is a web page; fetch the raw file",
    b"<html": "it is a web page; fetch the raw file",
}


def read_records(source: str) -> list[Any]:
    """The records of a file, or of standard input (`-`); tables give a dict of texts each, by lower-case column.

    A text file gives its lines.

    Raises:
        PairsError: unreadable, in no encoding that can be told, or not in the format its name says.
    """
    path = expanded(source)
    try:
        if path.suffix.lower() == ".parquet":
            return _parquet(path)
        raw = _standard_input() if source == STANDARD_INPUT else path.read_bytes()
    except OSError as error:
        raise PairsError(
            f"cannot read pairs file {source!r}: {error}; give a JSON, JSONL, CSV, TSV or Parquet file"
        ) from error
    text = _decoded(raw, source)
    if path.suffix.lower() in _TABLES or (source == STANDARD_INPUT and text.lstrip()[:1] not in ("{", "[", "")):
        return _table(text, source)
    if path.suffix.lower() == ".txt":
        return _lines(text, source)
    return parse_json(text, source)


def _lines(text: str, name: str) -> list[str]:
    """Texts, one a line.

    Raises:
        PairsError: the first is the header of a table.
    """
    lines = [line.strip() for line in _line_feeds(text).split("\n") if line.strip()]  # not at every Unicode line end
    if lines and _HEADER.fullmatch(lines[0]):
        raise PairsError(
            f"{name} begins with a table's header, {lines[0]!r}; name the file .csv, or take that line out"
        )
    return lines


@cache
def _standard_input() -> bytes:
    """What stands in standard input, which can be read once.

    Raises:
        OSError: it is closed.
    """
    if sys.stdin is None:
        raise OSError("standard input is closed")
    return sys.stdin.buffer.read()


def parse_json(text: str, name: str) -> list[Any]:
    """The items of a JSON list, one JSON value a line, or values of several lines each, one behind the other.

    Raises:
        PairsError: not JSON, a key that stands twice in an object, or an infinite number.
    """
    if text.lstrip().startswith("["):
        try:
            return list(_one_line_end(_json(text, name)))
        except json.JSONDecodeError as error:
            raise PairsError(
                f"{name}, line {error.lineno} is not JSON ({error.msg}); mend the list, or write one object per line"
            ) from error
    records, place = [], 0
    for number, line in enumerate(text.split("\n"), 1):  # `splitlines` would also cut inside a JSON string
        try:
            records += [_one_line_end(_json(line, f"{name}, line {number}"))] if line.strip() else []
        except json.JSONDecodeError as error:
            broken = json.JSONDecodeError(error.msg, text, place + error.pos)
            return [_one_line_end(value) for value in _values(text, name, broken)]
        place += len(line) + 1
    return records


def _values(text: str, name: str, broken: json.JSONDecodeError) -> Iterator[Any]:
    """The values of a text that are not one a line. broken: where that is seen, told if they are no values either.

    Of an object whose first brace stands alone in its line it is told where the object breaks off.
    """
    place = _behind_blanks(text, 0)
    while place < len(text):
        try:
            read = _read(text, place, name)
        except json.JSONDecodeError as error:
            told = error if _ALONE.match(text, place) else broken
            raise PairsError(
                f"{name}, line {told.lineno} is not JSON ({told.msg}); write one object per line, or one list"
            ) from error
        yield read.value
        place = _behind_blanks(text, read.end)


class _Read(NamedTuple):
    """A JSON value of a text."""

    value: Any
    end: int
    """Where it ends in the text."""


def _json(text: str, where: str) -> Any:
    """The value that a text is.

    Raises:
        json.JSONDecodeError: it is none, or more than one.
        PairsError: as `parse_json`.
    """
    read = _read(text, _behind_blanks(text, 0), where)
    if _behind_blanks(text, read.end) < len(text):
        raise json.JSONDecodeError("Extra data", text, read.end)
    return read.value


def _read(text: str, start: int, where: str) -> _Read:
    def once(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) < len(items):
            names = [key for key, _ in items]
            twice = next(key for key in names if names.count(key) > 1)
            raise PairsError(f"{where} has the key {twice!r} twice in one object; keep one")
        return found

    def constant(name: str) -> None:
        if name != "NaN":  # as pandas writes a missing value
            raise PairsError(f"{where} has the number {name}; write a text, or null")

    try:
        return _Read(*json.JSONDecoder(object_pairs_hook=once, parse_constant=constant).raw_decode(text, start))
    except json.JSONDecodeError:
        raise
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets without end
        raise PairsError(f"{where} cannot be read as JSON: {innermost(error)}; mend it") from error


def _behind_blanks(text: str, place: int) -> int:
    blanks = _BLANKS.match(text, place)
    return blanks.end() if blanks else place


def _decoded(raw: bytes, name: str) -> str:
    begins = raw[:64].lstrip()
    for beginning, what in _OTHER_FILES.items():
        if beginning in (begins[: len(beginning)], begins[: len(beginning)].lower()):
            raise PairsError(f"cannot read pairs file {name!r}: {what}")
    encoding = next((found for mark, found in MARKS.items() if raw.startswith(mark)), "utf-8")
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError as error:
        what = f"a broken {encoding.upper()} file"
        if encoding == "utf-8":
            what = "probably UTF-16" if b"\0" in raw[:100] else "probably Latin-1 or Windows-1252"
        raise PairsError(
            f"cannot read pairs file {name!r}: byte {raw[error.start]:#04x} at {error.start} is not UTF-8, "
            f"it is {what}; save it as UTF-8"
        ) from error
    if text.count("\0") > len(text) // 4:
        raise PairsError(f"cannot read pairs file {name!r}: it is probably UTF-16 without its mark; save it as UTF-8")
    return text


def _table(text: str, name: str) -> list[dict[str, str]]:
    text = _line_feeds(text)
    first, _, rest = text.partition("\n")
    if first.strip().strip('"').lower().startswith("sep=") and len(first.strip().strip('"')) <= len("sep=?"):
        delimiter, text = first.strip("\n").strip('"')[len("sep=") :] or "\t", rest
        first = rest.partition("\n")[0]
    else:
        delimiter = max(_DELIMITERS, key=first.count)
    # A quote behind a blank begins a quoted text only where the blank is skipped; else it is part of the text.
    spaced = f"{delimiter} " in first or f'{delimiter} "' in text
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # of the whole process, by default 131072
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True, skipinitialspace=spaced)
    filled, begins = [], 1
    try:
        for row in rows:
            filled += [row] if any(cell.strip() for cell in row) else []
            begins = rows.line_num + 1
    except csv.Error as error:
        last = rows.line_num
        lines = f"line {begins}" if begins == last else f"lines {begins} to {last}"
        raise PairsError(f"cannot read pairs file {name!r}: {lines}: {error}; mend its quotes") from error
    if not filled:
        return []
    header = _header(filled[0])
    named = [column for column in header if column]
    if twice := [column for column in named if named.count(column) > 1]:
        raise PairsError(f"{name} has two columns called {twice[0]!r}; rename one")
    if again := [number for number, row in enumerate(filled[1:], 1) if _header(row) == header]:
        raise PairsError(f"{name}, record {again[0]} is the header again, as where two tables are joined; take it out")
    records = [_row(header, row, name, number) for number, row in enumerate(filled[1:], 1)]
    for column in named:
        cells = [cell for record in records if (cell := record.get(column, "").strip())]
        if len(cells) > 1 and all(map(_in_quotes, cells)):
            kind = "single" if cells[0][0] == "'" else "double"
            raise PairsError(
                f"{name} has every {column!r} in {kind} quotes, as part of the text; put one double quote around each"
            )
    return records


def _in_quotes(cell: str) -> bool:
    """Whether quotes stand around a cell, rather than around words at its ends."""
    return len(cell) > 1 and cell[0] == cell[-1] and (cell[0] == "'" or (cell[0] == '"' and '"' not in cell[1:-1]))


def _header(row: list[str]) -> list[str]:
    """Names of columns; a byte order mark stands before those of a second table."""
    return [column.replace("\ufeff", "").strip().lower() for column in row]


def _row(header: list[str], row: list[str], name: str, number: int) -> dict[str, str]:
    if any(cell.strip() for cell in row[len(header) :]) or len(row) < len(header) - 1:
        raise PairsError(
            f"{name}, record {number} has {len(row)} cells under {len(header)} columns; put quotes around a text that "
            "holds the delimiter"
        )
    # Columns without a name are the index that pandas writes, or the end of a trailing delimiter.
    return {column: cell for column, cell in zip(header, row, strict=False) if column}


def _parquet(path: Path) -> list[dict[str, Any]]:
    import pandas as pd

    try:
        text = pd.read_parquet(path).to_json(orient="records", lines=True, date_format="iso")
    except ImportError as error:
        raise PairsError(
            f"cannot read {str(path)!r}: Parquet needs pyarrow; `pip install 'remote-mediation[parquet]'`"
        ) from error
    except Exception as error:  # whatever pandas and pyarrow make of columns that are no texts
        raise PairsError(f"cannot read {str(path)!r} as Parquet: {innermost(error)}; write it anew") from error
    return parse_json(text, str(path))


def _line_feeds(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _one_line_end(value: Any) -> Any:
    """The same with a line feed for every line end in the texts of a record."""
    if isinstance(value, str):
        return _line_feeds(value)
    if isinstance(value, dict):
        return {key: _one_line_end(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_one_line_end(item) for item in value]
    return value
