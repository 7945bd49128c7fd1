"""Lists of prompts, as published, and how harmful ones are matched with harmless ones into pairs.

AdvBench, HarmBench, JailbreakBench, StrongREJECT and lists of instructions hold prompts, not pairs. Their texts cannot
be aligned, so a pair of them is compared from the end of the prompt only, and should be alike in length. Prompts of the
same length are matched first, then the nearest, each prompt once. A placebo is a second harmless prompt,
matched with the same harmful one in the same way.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from remote_mediation.errors import PairsError
from remote_mediation.pairs import PromptPair, folded, named, refuse_packed, text_of
from remote_mediation.records import read_records

# Columns that hold the prompt in the layouts that are published, the most telling first: beside a goal, a `behavior` is
# the name of its kind (JailbreakBench); elsewhere it is the prompt (HarmBench).
_PROMPTS = (
    "forbidden_prompt",
    "goal",
    "behavior",
    "instruction",
    "prompt",
    "request",
    "question",
    "query",
    "text",
    "harmful",
    "harmless",
)
_CATEGORIES = ("category", "semanticcategory", "functionalcategory")
# Columns whose text belongs to the prompt: HarmBench puts it before, lists of instructions after.
_BEFORE, _AFTER = ("contextstring", "context_string", "context"), ("input",)
_INSTRUCTION = "instruction"
# What such a column holds where there is nothing.
_NOTHING = ("<noinput>", "noinput", "<no input>", "no input", "n/a")
# Words by which a column says of each prompt whether it is harmful, and columns that say it by a truth value.
_HARMFUL = frozenset({"harmful", "unsafe", "malicious", "toxic"})
_HARMLESS = frozenset({"harmless", "unharmful", "safe", "benign", "non-toxic"})
_TRUTHS = frozenset({"0", "1", "0.0", "1.0", "true", "false"})
_SAY_HARMFUL = ("harmful", "is_harmful", "unsafe", "is_unsafe", "toxic", "toxicity", "is_safe", "safe", "label")
_SIDES = ("harmful", "harmless")
_PIECES = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True)
class Listed:
    """A prompt of a list."""

    text: str
    category: str = ""
    notes: tuple[tuple[str, str], ...] = ()
    """Its other columns."""

    @property
    def length(self) -> int:
        """Words and signs, which stand in for tokens: the matching is the same for every model."""
        return len(_PIECES.findall(self.text))


@dataclass(frozen=True)
class PromptList:
    """A file of prompts."""

    source: str
    column: str
    """The column that was read as the prompt; empty where the file has no columns."""
    prompts: tuple[Listed, ...]


def read_list(source: str, column: str = "", side: str = "") -> PromptList:
    """The prompts of a file, each once, in its order.

    column: the one that holds them; found by its name by default. side: `harmful` or `harmless`, so that of a file of
    pairs the right one is read.

    Raises:
        PairsError: unreadable, without prompts, without a column that is known to hold them, or with harmful and
            harmless ones by its own account.
    """
    records = read_records(source)
    if records and all(isinstance(record, str) for record in records):
        found = [Listed(_prompt(record, "prompt", f"{source}, record {i}")) for i, record in enumerate(records, 1)]
        return PromptList(source, "", _once(found, source))
    fields = [_lowered(record, f"{source}, record {number}") for number, record in enumerate(records, 1)]
    _check_kind(fields, source)
    column = column.strip().lower() or _prompt_column(fields, source, side)
    prompts = [_listed(record, column, f"{source}, record {number}") for number, record in enumerate(fields, 1)]
    return PromptList(source, column, _once(prompts, source))


def matched(harmful: PromptList, harmless: PromptList) -> tuple[PromptPair, ...]:
    """Pairs of prompts of two lists, in the order of the harmful one, and their placebos where harmless ones are left.

    Raises:
        PairsError: fewer harmless prompts than harmful ones, or a prompt that stands in both lists.
    """
    other = {folded(one.text) for one in harmless.prompts}
    if both := [one.text for one in harmful.prompts if folded(one.text) in other]:
        raise PairsError(f"{harmful.source} and {harmless.source} both hold {both[0][:60]!r}; take it out of one")
    if len(harmless.prompts) < len(harmful.prompts):
        raise PairsError(
            f"{harmful.source} has {len(harmful.prompts)} prompts and {harmless.source} {len(harmless.prompts)}; give "
            "as many harmless ones, or twice as many for placebos"
        )
    partners = _nearest(harmful.prompts, harmless.prompts)
    taken = set(partners)
    left = [one for number, one in enumerate(harmless.prompts) if number not in taken]
    placebos = dict(enumerate(_nearest(harmful.prompts, left)))
    pairs = [
        PromptPair(
            "",
            one.text,
            harmless.prompts[partners[number]].text,
            one.category,
            "",
            placebo=left[placebos[number]].text if number in placebos else "",
            notes=one.notes,
            aligned=False,
        )
        for number, one in enumerate(harmful.prompts)
    ]
    return named(pairs)


def _nearest(wanted: Sequence[Listed], offered: Sequence[Listed]) -> list[int]:
    """For each of the first prompts the index of another of its length, or of the nearest, each used once.

    As far as they go: where fewer are offered, the last ones have none.
    """
    wanted = wanted[: len(offered)]
    free = sorted((one.length, number) for number, one in enumerate(offered))
    found: dict[int, int] = {}
    for same in (True, False):
        for number, one in enumerate(wanted):
            if number in found:
                continue
            place = _closest(free, one.length)
            if not same or free[place][0] == one.length:
                found[number] = free.pop(place)[1]
    return [found[number] for number in range(len(wanted))]


def _closest(free: Sequence[tuple[int, int]], length: int) -> int:
    """Place of the entry nearest in length; of two, the shorter, and the first of its file."""
    above = bisect.bisect_left(free, (length, -1))
    if above == 0 or (above < len(free) and free[above][0] == length):
        return above
    below = bisect.bisect_left(free, (free[above - 1][0], -1))
    if above == len(free) or length - free[below][0] <= free[above][0] - length:
        return below
    return above


def _lowered(record: Any, where: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise PairsError(f"{where} is {type(record).__name__}; a list of prompts has objects, rows or texts")
    return {str(key).strip().lower(): value for key, value in record.items()}


def _check_kind(records: Sequence[dict[str, Any]], source: str) -> None:
    """Refuse a list whose own column calls some of its prompts harmful and others not."""
    for name in _columns(records):
        said = {str(record[name]).strip().casefold() for record in records if record.get(name) not in (None, "")}
        by_word = said <= _HARMFUL | _HARMLESS and bool(said & _HARMFUL) and bool(said & _HARMLESS)
        if by_word or (name in _SAY_HARMFUL and said <= _TRUTHS and len(said) > 1):
            raise PairsError(
                f"{source} holds prompts of both kinds: its column {name!r} has {sorted(said)}; give a list of one kind"
            )


def _columns(records: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for record in records for key in record))


def _prompt_column(records: Sequence[dict[str, Any]], source: str, side: str) -> str:
    columns = _columns(records)
    found = next((name for name in _PROMPTS if name in columns and (name == side or name not in _SIDES)), None)
    if found is None:
        raise PairsError(
            f"{source} has the columns {columns}, and none is known to hold prompts; name it with --harmful-column or "
            "--harmless-column"
        )
    return found


def _listed(record: dict[str, Any], column: str, where: str) -> Listed:
    if column not in record:
        raise PairsError(f"{where} has {sorted(record)} and lacks {column!r}; name another column")
    befores, afters = (_BEFORE, _AFTER) if column != _INSTRUCTION else ((), (*_AFTER, *_BEFORE))
    text = _prompt(record[column], column, where)
    before, after = _first_of(record, befores, where), _first_of(record, afters, where)
    category = next((text_of(record[name], name, where) for name in _CATEGORIES if record.get(name)), "")
    parts = (f"{before}\n\n---" if before.strip() else "", text, after)
    others = {key: text_of(value, key, where, anything=True) for key, value in record.items() if key != column}
    return Listed("\n\n".join(part for part in parts if part.strip()), category, tuple(others.items()))


def _prompt(value: Any, column: str, where: str) -> str:
    text = text_of(value, column, where)
    refuse_packed(text, column, where)
    return text


def _first_of(record: dict[str, Any], columns: Sequence[str], where: str) -> str:
    """The text of the first of these columns that has one."""
    texts = (text_of(record.get(name), name, where) for name in columns)
    return next((text for text in texts if text.strip() and text.strip().casefold() not in _NOTHING), "")


def _once(prompts: Sequence[Listed], source: str) -> tuple[Listed, ...]:
    """The prompts that are not empty, each the first time it stands there."""
    found = {folded(one.text): one for one in reversed(prompts) if one.text.strip()}
    if not found:
        raise PairsError(f"{source} holds no prompts")
    return tuple(one for one in prompts if found.get(folded(one.text)) is one)
