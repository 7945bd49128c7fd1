"""Prompt pairs as text: where they are read from, and what a file of them must hold."""

from __future__ import annotations

import ast
import contextlib
import difflib
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from typing import Any, NamedTuple

from remote_mediation.errors import PairsError
from remote_mediation.prompts import Turn
from remote_mediation.records import parse_json, read_records
from remote_mediation.unseen import visible

BUILTIN = "builtin"
_REQUIRED = ("harmful", "harmless")
_PROMPTS = (*_REQUIRED, "placebo")
HEADER = "openings"
_LABELS = ("id", "category", "template")
# What scripts write where a text is missing.
_MISSING = ("nan", "NaN", "NAN", "NaT", "None", "null", "NULL", "<NA>", "#N/A")
# What other programs leave in a text, and what it is.
_TRACES = {
    "\N{REPLACEMENT CHARACTER}": "which stands for a character that was lost where the text was decoded",
    "_x000[9AD]_": "as Excel's files write a line end or a tab",
    r"\A=\".*\"\Z": "a formula of Excel",
    r"&(?:quot|apos|amp|nbsp|#0?39|#x27);": "as web pages write a character",
    r"\\u(?:00[a-fA-F][0-9a-fA-F]|20[01][0-9a-fA-F]|[dD][89abAB][0-9a-fA-F]{2})": "as JSON writes a character",
    r"\A\"[^\"\\]*\\[\"\\/bfnrtu].*\"\Z": "a text as JSON writes it",
    r"\Ab(['\"]).*\1\Z": "bytes as Python prints them",
    "â€.?|[ÃÂ][\u0080-\u00bf]": "UTF-8 that was read as Windows-1252 or Latin-1",
}
# How a conversation begins in a text; as numpy prints it, it is neither JSON nor Python.
_PACKED = re.compile(r"\s*\[?\s*\{\s*['\"](role|content|from|value)['\"]\s*:")
# Who speaks in a message; what a template does with any other word is not what was meant.
_ROLES = ("system", "developer", "user", "assistant", "tool")
_RESPONSES = ("harmful_response", "harmless_response")
_OPTIONAL = (*_LABELS, "placebo", *_RESPONSES)
# Columns that look as if they were given to the model.
_UNREAD = ("system", "system_prompt", "messages", "conversation", "conversations")
_XSTEST = ("id", "prompt", "type", "label", "focus", "note")
# XSTest blocks whose unsafe contrasts have ids in the same order as their safe prompts.
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
    """Sentence frame; pairs of one template belong together (`placebo.components`). Empty: shared with nobody."""
    placebo: str = ""
    """Another harmless prompt, xp, that differs from `harmless` in the same words as `harmful` does; empty: none."""
    harmful_response: str = ""
    """Opening of an answer to the harmful prompt; empty: the model's own."""
    harmless_response: str = ""
    """Opening of an answer to the harmless prompt; empty: the model's own."""
    notes: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    """What else the file says of the pair, by column; it changes nothing that is measured."""
    aligned: bool = field(default=True, repr=False)
    """Whether the prompts are one text but for an edit; else they are compared from their ends only."""
    turns: tuple[tuple[str, Turn], ...] = field(default=(), repr=False)
    """Messages before the prompts (system, earlier turns), each with the prompt it belongs to: `harmful`, ..."""

    def before(self, prompt: str) -> tuple[Turn, ...]:
        """The messages before a prompt, named as the field is."""
        return tuple(turn for name, turn in self.turns if name == prompt)

    def of_placebo(self, name: str) -> PromptPair:
        """The harmless prompt against its placebo, which takes the harmful one's place, under another id."""
        turns = [(kind, turn) for kind, turn in self.turns if kind != "harmful"]
        moved = tuple(("harmful" if kind == "placebo" else kind, turn) for kind, turn in turns)
        return replace(self, id=name, harmful=self.placebo, placebo="", turns=moved)


def placebo_id(pair: str) -> str:
    """Id of a pair's placebo."""
    return f"{pair}~placebo"


class GivenOpenings(NamedTuple):
    """Openings of answers as text, for the outcome `refusal`."""

    compliant: tuple[str, ...]
    refusing: tuple[str, ...]


def load_openings(source: str) -> GivenOpenings | None:
    """The openings that a pairs file gives, in a header record or the same ones with its pairs; None where in neither.

    A header is a first record that has `openings` alone: an object of two lists of texts, `compliant` and `refusing`.

    Raises:
        PairsError: they are no two lists of texts, or pairs have different ones: the outcome is the same on all.
    """
    if source == BUILTIN:
        return None
    found: dict[GivenOpenings, str] = {}
    for number, record in enumerate(read_records(source), 1):
        if isinstance(record, dict) and record.get(HEADER):
            where = f"{source}, record {number}"
            found.setdefault(_openings(record[HEADER], where), where)
    if len(found) > 1:
        first, second, *_ = found.values()
        raise PairsError(
            f"{second} has other openings than {first}: the outcome `refusal` compares the same ones on every prompt; "
            "give them once, in a header record, or choose `response_logprob` and give responses"
        )
    return next(iter(found), None)


def _openings(value: Any, where: str) -> GivenOpenings:
    sides = value if isinstance(value, dict) else {}
    lists = [sides.get(side) for side in GivenOpenings._fields]
    if not all(isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts) for texts in lists):
        raise PairsError(
            f'{where}: {HEADER!r} is {value!r}; write {{"compliant": ["Sure"], "refusing": ["I\'m sorry"]}}'
        )
    return GivenOpenings(*(tuple(map(str, texts)) for texts in lists if texts))


def load_pairs(source: str) -> tuple[PromptPair, ...]:
    """Read pairs from a file (`records`), from a CSV in XSTest's layout, or the package's own (`builtin`).

    Raises:
        PairsError: missing, unreadable or empty file, wrong columns, duplicate ids, identical prompts, a placebo
            that is one of the two prompts.
    """
    if source == BUILTIN:
        text = resources.files("remote_mediation").joinpath("data/pairs.jsonl").read_text("utf-8")
        records = parse_json(text, BUILTIN)
    else:
        records = read_records(source)
    if records and isinstance(records[0], dict) and set(records[0]) == {HEADER}:
        records = records[1:]
    if records and isinstance(records[0], dict) and set(_XSTEST) <= set(records[0]):
        records = _xstest(records, source)
    pairs = named(_pair(record, source, number) for number, record in enumerate(records, 1))
    if not pairs:
        raise PairsError(f"{source} holds no pairs; give at least one record with {', '.join(_REQUIRED)}")
    _check_pairs(pairs, source)
    return pairs


def find_pair(pairs: Sequence[PromptPair], name: str) -> PromptPair:
    """The pair of an id.

    Raises:
        PairsError: there is none; names near ones.
    """
    known = {pair.id: pair for pair in pairs}
    if name not in known:
        near = difflib.get_close_matches(name, known, 3, 0.3) or list(known)[:3]
        raise PairsError(f"no pair has the id {name!r}; there are {', '.join(map(repr, near))}")
    return known[name]


def _xstest(records: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """Pair XSTest's safe prompts with their unsafe contrasts, block by block and by id, whatever the rows' order."""
    by_type: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        by_type.setdefault(record["type"], []).append(record)
    found = []
    for kind, contrast in _XSTEST_CONTRASTS.items():
        blocks = [sorted(by_type.get(block, ()), key=_xstest_number) for block in (kind, contrast)]
        _check_xstest(kind, contrast, blocks[0], blocks[1], name)
        found += [
            {
                "id": f"{kind}-{safe['id']}",
                "harmful": unsafe["prompt"],
                "harmless": safe["prompt"],
                "category": kind,
            }
            for safe, unsafe in zip(*blocks, strict=True)
        ]
    return found


def _xstest_number(record: dict[str, Any]) -> int:
    digits = re.search(r"\d+$", str(record["id"]))
    return int(digits[0]) if digits else 0


def _check_xstest(kind: str, contrast: str, safe: list[Any], unsafe: list[Any], name: str) -> None:
    """Refuse blocks whose ids or focuses show that they do not stand in the same order."""
    if len(safe) != len(unsafe):
        raise PairsError(
            f"{name} has {len(safe)} prompts of type {kind!r} and {len(unsafe)} of {contrast!r}; XSTest pairs them by "
            "their ids, so give the whole file"
        )
    steps = {_xstest_number(two) - _xstest_number(one) for one, two in zip(safe, unsafe, strict=True)}
    focuses = [(one["focus"], two["focus"]) for one, two in zip(safe, unsafe, strict=True)]
    apart = [pair for pair in focuses if pair[0] != pair[1]]
    # The published file has one pair whose two rows name their focus differently.
    if len(steps) > 1 or len(apart) > max(1, len(safe) // 20):
        seen = f"focus {apart[0][0]!r} beside {apart[0][1]!r}" if apart else f"ids {sorted(steps)} apart"
        raise PairsError(
            f"{name}: the prompts of {kind!r} and {contrast!r} do not belong together ({seen}); give XSTest with its "
            "own ids, or pairs with the columns harmful and harmless"
        )


def _pair(record: Any, name: str, number: int) -> PromptPair:
    where = f"{name}, record {number}"
    if not isinstance(record, dict):
        raise PairsError(f"{where} is {type(record).__name__}; it needs an object with {', '.join(_REQUIRED)}")
    fields = {str(key).strip().lower(): value for key, value in record.items()}
    if len(fields) < len(record):
        raise PairsError(f"{where} has two keys that differ in capitals or blanks only; keep one")
    if missing := [key for key in _REQUIRED if key not in fields]:
        raise PairsError(
            f"{where} has {sorted(fields)} and lacks {missing[0]!r}; it needs {', '.join(_REQUIRED)} (to a list of "
            "prompts of one kind give the other kind's, as `harmful` and `harmless` in a study or with --harmless)"
        )
    aligned, turns = _aligned(fields.pop("aligned", True), where), _turns(fields, where)
    written = {key: fields.pop(key) for key in (*_REQUIRED, *_OPTIONAL) if key in fields}
    known = {key: text_of(value, key, where) for key, value in written.items()}
    for key in (*_PROMPTS, *_RESPONSES):
        refuse_packed(known.get(key, ""), key, where)
    for key in _REQUIRED:
        if not known[key].strip():
            found = str(written[key]).strip() or "empty"
            raise PairsError(f"{where}: {key!r} is {found}; give a prompt")
    notes = tuple((key, text_of(value, key, where, anything=True)) for key, value in fields.items())
    for key, text in notes:
        _check_spelling(key, where)
        if key in _UNREAD and text:
            raise PairsError(
                f"{where} has a column {key!r}, which is given to no model: write messages in place of the prompts, or "
                "set [prompt] system; else call it something else"
            )
    texts: dict[str, str] = {**dict.fromkeys(("id", "category", "template"), ""), **known}
    return replace(PromptPair(**texts), notes=notes, aligned=aligned, turns=turns)  # type: ignore[arg-type]


def _aligned(value: Any, where: str) -> bool:
    """Whether the prompts of a pair are one text but for an edit: true, false, or one of them as a table has it."""
    known = {"true": True, "": True, "null": True, "false": False}
    if (word := json.dumps(value).strip('"').lower()) not in known:
        raise PairsError(f"{where}: 'aligned' is {value!r}; write true or false")
    return known[word]


def _turns(fields: dict[str, Any], where: str) -> tuple[tuple[str, Turn], ...]:
    """The messages before each prompt that is given as messages; their last one takes its place in `fields`."""
    found: list[tuple[str, Turn]] = []
    for name in _PROMPTS:
        value = _unpacked(fields.get(name))
        messages = value.get("messages") if isinstance(value, dict) else value
        if not isinstance(messages, list):
            continue
        turns = [_turn(message, f"{where}: {name!r}, message {i}") for i, message in enumerate(messages, 1)]
        if not turns or turns[-1].role != "user":
            raise PairsError(f"{where}: the messages of {name!r} do not end with one of the user; end them so")
        found += [(name, turn) for turn in turns[:-1]]
        fields[name] = turns[-1].content
    return tuple(found)


def _unpacked(value: Any) -> Any:
    """A list or an object that stands in a text, as a cell of a table holds it: as JSON, or as Python prints it.

    A text of any other kind is given back as it is.
    """
    if not (isinstance(value, str) and value.strip()[:1] in ("[", "{")):
        return value
    for read in (json.loads, ast.literal_eval):
        with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
            found = read(value.strip())
            if isinstance(found, list | dict):
                return found
    return value


def _turn(message: Any, where: str) -> Turn:
    if not (isinstance(message, dict) and {"role", "content"} <= set(message)):
        raise PairsError(f"{where} is {message!r}; write an object with role and content")
    turn = Turn(*(text_of(message[key], key, where) for key in ("role", "content")))
    if turn.role not in _ROLES:
        raise PairsError(f"{where} has the role {turn.role!r}; write one of {', '.join(_ROLES)}")
    return turn


def text_of(value: Any, key: str, where: str, *, anything: bool = False) -> str:
    """A field as text; empty for None and for the words that stand for it.

    anything: it is kept as it is, and values other than text are written as JSON.

    Raises:
        PairsError: it is no text, holds half a character, or was changed by another program.
    """
    if value is None:
        return ""
    if isinstance(value, int) and not isinstance(value, bool) and key in _LABELS:
        return str(value)
    if anything and not isinstance(value, str):
        value = json.dumps(value)
    if not isinstance(value, str):
        raise PairsError(f"{where}: {key!r} is not text but {value!r}; write it as a string")
    _check_characters(value, key, where)
    if not anything and key not in _LABELS:  # which no model reads
        _check_traces(value, key, where)
    return "" if value.strip() in _MISSING and not anything else value


def _check_characters(value: str, key: str, where: str) -> None:
    """Refuse half a surrogate pair: it is no character, and neither tokenizers nor files can hold it."""
    half = next((character for character in value if "\ud800" <= character <= "\udfff"), None)
    if half:
        raise PairsError(f"{where}: {key!r} holds half a character (U+{ord(half):04X}); write the whole one")


def _check_traces(value: str, key: str, where: str) -> None:
    """Refuse a text that another program has changed on its way: nobody meant the model to read that."""
    for trace, what in _TRACES.items():
        if found := re.search(trace, value, re.DOTALL):
            raise PairsError(f"{where}: {key!r} holds {found[0][:60]!r}, {what}; write what was meant")


def refuse_packed(value: str, key: str, where: str) -> None:
    """Refuse a text that is a list or an object, such as a conversation in a cell of a table.

    Raises:
        PairsError: it is one, and nobody meant the model to read its brackets.
    """
    if _PACKED.match(value) or not isinstance(_unpacked(value), str):
        raise PairsError(f"{where}: {key!r} is a list or an object, {value[:60]!r}; write the text that is in it")


def _check_spelling(key: str, where: str) -> None:
    near = difflib.get_close_matches(key, (*_REQUIRED, *_OPTIONAL), 1, 0.85)
    if near:
        raise PairsError(f"{where} has a column {key!r}; call it {near[0]!r} if it is that, or something else if not")


def folded(text: str) -> str:
    """A text by which repeats are known: neither capitals matter, nor what nobody sees (`unseen`)."""
    return visible(text).casefold()


def named(pairs: Iterable[PromptPair]) -> tuple[PromptPair, ...]:
    """The same, with an id made from the prompts where none is given, and a number behind it where they repeat."""
    seen: Counter[str] = Counter()
    found = []
    for pair in pairs:
        if not pair.id.strip():
            made = hashlib.blake2b(f"{pair.harmful}\0{pair.harmless}".encode(), digest_size=5).hexdigest()
            seen[made] += 1
            pair = replace(pair, id=made if seen[made] == 1 else f"{made}-{seen[made]}")
        found.append(pair)
    return tuple(found)


def _check_pairs(pairs: Sequence[PromptPair], name: str) -> None:
    seen: set[str] = set()
    placebos = {placebo_id(pair.id): pair.id for pair in pairs if pair.placebo}
    for pair in pairs:
        if pair.id in placebos:
            raise PairsError(
                f"{name} has the id {pair.id!r}, which is what the placebo of {placebos[pair.id]!r} is called; give "
                "another"
            )
        if pair.id in seen:
            raise PairsError(f"{name} has the id {pair.id!r} twice; ids must be unique")
        seen.add(pair.id)
        if pair.harmful == pair.harmless:
            raise PairsError(f"{name}, pair {pair.id!r} has two identical prompts; they must differ")
        if pair.placebo and folded(pair.placebo) in (folded(pair.harmful), folded(pair.harmless)):
            raise PairsError(
                f"{name}, pair {pair.id!r} repeats a prompt as its placebo, whatever its capitals and blanks; give "
                "another, or leave it empty"
            )
