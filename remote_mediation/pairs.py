"""Prompt pairs as text: where they are read from, and what a file of them must hold."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from remote_mediation.errors import PairsError

BUILTIN = "builtin"
_REQUIRED = ("id", "harmful", "harmless", "category", "template")
_OPTIONAL = ("placebo", "harmful_response", "harmless_response")
_XSTEST = ("id", "prompt", "type", "label", "focus", "note")
# XSTest blocks whose unsafe contrasts stand in the same order as their safe prompts.
_XSTEST_CONTRASTS = {
    "homonyms": "contrast_homonyms",
    "figurative_language": "contrast_figurative_language",
    "safe_targets": "contrast_safe_targets",
    "safe_contexts": "contrast_safe_contexts",
    "definitions": "contrast_definitions",
    "real_group_nons_discr": "contrast_discr",
    "privacy_fictional": "contrast_privacy",
}


@dataclass(frozen=True)
class PromptPair:
    """A harmful request and its harmless counterpart, as text."""

    id: str
    """Unique in its file."""
    harmful: str
    """The treatment prompt, x1."""
    harmless: str
    """The control prompt, x0."""
    category: str
    """Kind of harm; for tables only."""
    template: str
    """Sentence frame; pairs of one template are one cluster. Empty: the pair is its own cluster."""
    placebo: str = ""
    """Another harmless prompt, xp, that differs from `harmless` in the same words as `harmful` does; empty: none."""
    harmful_response: str = ""
    """Opening of an answer to the harmful prompt; empty: the model's own."""
    harmless_response: str = ""
    """Opening of an answer to the harmless prompt; empty: the model's own."""


def load_pairs(source: str) -> tuple[PromptPair, ...]:
    """Read pairs from JSONL or CSV, from a CSV in XSTest's layout, or the package's own (`builtin`).

    Raises:
        PairsError: missing, unreadable or empty file, wrong columns, duplicate ids, identical prompts, a placebo
            that is one of the two prompts.
    """
    if source == BUILTIN:
        text, name = resources.files("remote_mediation").joinpath("data/pairs.jsonl").read_text("utf-8"), BUILTIN
        records = _parse_jsonl(text, name)
    else:
        records = _read_records(Path(source))
    pairs = tuple(_pair(record, source, number) for number, record in enumerate(records, 1))
    if not pairs:
        raise PairsError(f"{source} holds no pairs; give at least one record with {', '.join(_REQUIRED)}")
    _check_pairs(pairs, source)
    return pairs


def _read_records(path: Path) -> list[dict[str, Any]]:
    try:
        text = path.read_text("utf-8-sig")  # spreadsheets put a byte order mark before the first column's name
        if path.suffix.lower() != ".csv":
            return _parse_jsonl(text, str(path))
        reader = csv.DictReader(io.StringIO(text, newline=""))
        records = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise PairsError(f"cannot read pairs file {str(path)!r}: {error}; give a JSONL or CSV file") from error
    return _xstest(records, str(path)) if tuple(reader.fieldnames or ()) == _XSTEST else records


def _parse_jsonl(text: str, name: str) -> list[dict[str, Any]]:
    records = []
    for number, line in enumerate(text.split("\n"), 1):  # `splitlines` would also cut inside a JSON string
        if not line.strip():
            continue
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise PairsError(f"{name}, line {number} is not JSON ({error.msg}); write one object per line") from error
    return records


def _xstest(records: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """Pair XSTest's safe prompts with their unsafe contrasts, block by block and in order."""
    by_type: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        by_type.setdefault(record["type"], []).append(record)
    for kind, contrast in _XSTEST_CONTRASTS.items():
        safe, unsafe = (len(by_type.get(block, ())) for block in (kind, contrast))
        if safe != unsafe:
            raise PairsError(
                f"{name} has {safe} prompts of type {kind!r} and {unsafe} of {contrast!r}; XSTest pairs them in order, "
                "so give the whole file"
            )
    return [
        {
            "id": f"{kind}-{safe['id']}",
            "harmful": unsafe["prompt"],
            "harmless": safe["prompt"],
            "category": kind,
            "template": "",
        }
        for kind, contrast in _XSTEST_CONTRASTS.items()
        for safe, unsafe in zip(by_type.get(kind, ()), by_type.get(contrast, ()), strict=True)
    ]


def _pair(record: Any, name: str, number: int) -> PromptPair:
    known = {*_REQUIRED, *_OPTIONAL}
    if not isinstance(record, dict) or not set(_REQUIRED) <= set(record) or not set(record) <= known:
        keys = sorted(str(key) for key in record) if isinstance(record, dict) else type(record).__name__
        raise PairsError(
            f"{name}, record {number} has {keys}; it needs {', '.join(_REQUIRED)} and may have {', '.join(_OPTIONAL)}"
        )
    values = {key: "" if value is None else value for key, value in record.items()}
    wrong = [key for key, value in values.items() if not isinstance(value, str)]
    missing = [key for key in ("id", "harmful", "harmless") if not str(values[key]).strip()]
    if wrong or missing:
        what = f"{wrong[0]!r} is not text" if wrong else f"{missing[0]!r} is empty"
        raise PairsError(f"{name}, record {number}: {what}; every field is a string")
    return PromptPair(**values)


def _check_pairs(pairs: Sequence[PromptPair], name: str) -> None:
    seen: set[str] = set()
    for pair in pairs:
        if pair.id in seen:
            raise PairsError(f"{name} has the id {pair.id!r} twice; ids must be unique")
        seen.add(pair.id)
        if pair.harmful == pair.harmless:
            raise PairsError(f"{name}, pair {pair.id!r} has two identical prompts; they must differ")
        if pair.placebo in (pair.harmful, pair.harmless):
            raise PairsError(
                f"{name}, pair {pair.id!r} repeats a prompt as its placebo; give another, or leave it empty"
            )
