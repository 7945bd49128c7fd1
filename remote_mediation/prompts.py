"""Prompt pairs: loading, tokenising, aligning. The only place that knows the words "harmful" and "harmless".

Which way the arrow goes: `x1` is the harmful prompt (treatment), `x0` its harmless counterpart (control). Everywhere
else a prompt is a *side*, 0 or 1, and a pair's effect is always measured from side 0 to side 1.

Two token sequences of a pair are equal up to the first differing token and again in a common suffix; the *edit* lies
between. Tokens after the first difference are aligned from the right, so that with edits of unequal length the last
tokens of the longer edit have partners and its first ones have none.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from remote_mediation.errors import PairsError, SiteError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BUILTIN = "builtin"
SPANS = ("edit", "after_edit", "post_instruction", "last", "all")
# Edits whose lengths differ by more tokens than this leave too much of the longer one without a partner.
MAX_EDIT_DIFFERENCE = 4

_REQUIRED = ("id", "harmful", "harmless", "category", "template")
_OPTIONAL = ("harmful_response", "harmless_response")
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
    harmful_response: str = ""
    """Opening of an answer to the harmful prompt; empty: the model's own."""
    harmless_response: str = ""
    """Opening of an answer to the harmless prompt; empty: the model's own."""


class Places(NamedTuple):
    """The same places in both sequences: `x0[i]` and `x1[i]` are token indices of partners."""

    x0: tuple[int, ...]
    x1: tuple[int, ...]


@dataclass(frozen=True)
class TokenPair:
    """A tokenised and aligned pair.

    A packed sequence is the prompt, then the answer tokens that are fed (all but the last of each answer).
    """

    id: str
    """Of the `PromptPair`."""
    cluster: str
    """What statistics resample: the template, or the pair itself."""
    category: str
    """Of the `PromptPair`."""
    x0: tuple[int, ...]
    """Token ids of the control prompt."""
    x1: tuple[int, ...]
    """Token ids of the treatment prompt."""
    first: int
    """Index of the first differing token, the same in both."""
    after: int
    """Tokens after the edit, the same in both."""
    post: int
    """Of these, template tokens after the user's text."""
    answers: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    """Token ids of the answer to x1 and of the answer to x0; empty where the outcome needs none."""

    @property
    def prompts(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Both prompts, by side."""
        return self.x0, self.x1

    @property
    def fed(self) -> int:
        """Answer tokens that are fed after the prompt."""
        return sum(max(len(answer) - 1, 0) for answer in self.answers)

    def places(self, position: str) -> Places:
        """Token indices of a position in both packed sequences; possibly empty.

        Positions: `edit` (the differing tokens), `after_edit` (the user's text behind them), `post_instruction`
        (template tokens after the user's text), `last` (where the answer is read: the last prompt token and the fed
        answer tokens), `all` (everything from the first differing token on), or one token of a span, `edit[-1]`.

        Raises:
            SiteError: not a position.
        """
        span, bracket, index = position.partition("[")
        if span not in SPANS:
            raise SiteError(f"unknown position {position!r}; use one of {', '.join(SPANS)}, or one token as 'edit[-1]'")
        offsets = self._offsets(span)
        if bracket:
            try:
                offsets = (offsets[int(index.rstrip("]"))],)
            except ValueError:
                raise SiteError(f"position {position!r} has no token number between its brackets") from None
            except IndexError:
                offsets = ()
        return Places(*(tuple(len(ids) + offset for offset in offsets) for ids in self.prompts))

    def tokens(self) -> list[str]:
        """Every single prompt token from the first difference on, as positions, in order."""
        names = []
        for span in ("edit", "after_edit", "post_instruction"):
            count = len(self._offsets(span))
            # From the end for the edit, so that the same name means the same partner in every pair.
            names += [f"{span}[{i - count if span == 'edit' else i}]" for i in range(count)]
        return names

    def _offsets(self, span: str) -> tuple[int, ...]:
        """Token offsets from the end of the prompt (-1 is its last token, 0 the first fed answer token)."""
        paired = min(len(self.x0), len(self.x1)) - self.first
        bounds = {
            "edit": (-paired, -self.after),
            "after_edit": (-self.after, -self.post),
            "post_instruction": (-self.post, 0),
            "last": (-1, self.fed),
            "all": (-paired, self.fed),
        }
        return tuple(range(*bounds[span]))


@dataclass(frozen=True)
class Refusal:
    """A pair that is left out, and why."""

    id: str
    reason: str


class Prepared(NamedTuple):
    """What became of a file's pairs: those that can be run, and those refused."""

    pairs: tuple[TokenPair, ...]
    refusals: tuple[Refusal, ...]


def load_pairs(source: str) -> tuple[PromptPair, ...]:
    """Read pairs from JSONL or CSV, from a CSV in XSTest's layout, or the package's own (`builtin`).

    Raises:
        PairsError: missing, unreadable or empty file, wrong columns, duplicate ids, identical prompts.
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


def tokenise(pairs: Sequence[PromptPair], tokenizer: PreTrainedTokenizerBase) -> Prepared:
    """Tokenise and align pairs, with the tokenizer's chat template when it has one."""
    done: list[TokenPair] = []
    refused: list[Refusal] = []
    for pair in pairs:
        outcome = _align(pair, tokenizer)
        (done if isinstance(outcome, TokenPair) else refused).append(outcome)  # type: ignore[arg-type]
    return Prepared(tuple(done), tuple(refused))


def with_answers(pair: TokenPair, answers: tuple[tuple[int, ...], tuple[int, ...]]) -> TokenPair | Refusal:
    """Add the answers to x1 and x0, or refuse: an empty or a shared answer measures nothing."""
    if not all(answers):
        side = "harmless" if answers[0] else "harmful"
        return Refusal(pair.id, f"the answer to the {side} prompt has no tokens")
    if answers[0] == answers[1]:
        return Refusal(pair.id, "both prompts have the same answer, so the outcome is 0 by definition")
    return replace(pair, answers=answers)


def encode_response(text: str, pair_id: str, tokenizer: PreTrainedTokenizerBase, tokens: int) -> tuple[int, ...]:
    """The first tokens of a response text.

    Raises:
        PairsError: the text has no tokens.
    """
    ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"][:tokens])
    if not ids:
        raise PairsError(f"pair {pair_id!r}: the response {text!r} has no tokens; give text, or leave the field empty")
    return ids


def to_record(pair: TokenPair) -> dict[str, Any]:
    """A token pair as JSON data."""
    return asdict(pair)


def from_record(record: dict[str, Any]) -> TokenPair:
    """The inverse of `to_record`."""
    answers = tuple(tuple(answer) for answer in record["answers"])
    return TokenPair(**{**record, "x0": tuple(record["x0"]), "x1": tuple(record["x1"]), "answers": answers})


def _align(pair: PromptPair, tokenizer: PreTrainedTokenizerBase) -> TokenPair | Refusal:
    (x0, post0), (x1, post1) = (_encode(text, tokenizer) for text in (pair.harmless, pair.harmful))
    if x0 == x1:
        return Refusal(pair.id, "both prompts have the same tokens")
    shorter = min(len(x0), len(x1))
    first = next((i for i in range(shorter) if x0[i] != x1[i]), shorter)
    after = next((i for i in range(shorter - first) if x0[-1 - i] != x1[-1 - i]), shorter - first)
    edits = (len(x0) - first - after, len(x1) - first - after)
    if abs(edits[0] - edits[1]) > MAX_EDIT_DIFFERENCE:
        return Refusal(pair.id, f"edits of {edits[0]} and {edits[1]} tokens differ by more than {MAX_EDIT_DIFFERENCE}")
    if edits[0] != edits[1] and after == 0:
        return Refusal(pair.id, f"edits of {edits[0]} and {edits[1]} tokens reach the last token: nothing to align by")
    cluster = pair.template or pair.id
    return TokenPair(pair.id, cluster, pair.category, x0, x1, first, after, min(post0, post1, after))


def _encode(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[int, ...], int]:
    """Token ids of a prompt, and how many of them lie wholly after the user's text."""
    if not tokenizer.chat_template:
        return tuple(tokenizer(text)["input_ids"]), 0
    messages = [{"role": "user", "content": text}]
    rendered = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    encoding = tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=True)
    end = rendered.rfind(text.strip()) + len(text.strip())
    return tuple(encoding["input_ids"]), sum(1 for start, _ in encoding["offset_mapping"] if start >= end)


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
