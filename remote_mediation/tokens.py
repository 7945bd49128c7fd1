"""Prompt pairs: loading, tokenising, aligning. The only place that knows the words "harmful" and "harmless".

Which way the arrow goes: `x1` is the harmful prompt (treatment), `x0` its harmless counterpart (control). Everywhere
else a prompt is a *side*, 0 or 1, and a pair's effect is always measured from side 0 to side 1.

Two token sequences of a pair are equal up to the first differing token and again in a common suffix; the *edit* lies
between. Tokens after the first difference are aligned from the right, so that with edits of unequal length the last
tokens of the longer edit have partners and its first ones have none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import TypeAdapter

from remote_mediation.errors import PairsError, SiteError
from remote_mediation.kinds import of_kind
from remote_mediation.pairs import PromptPair
from remote_mediation.placebo import components
from remote_mediation.prompts import PLAIN, Asked, Encoded, PromptForm, Surroundings, encode_prompts, surroundings
from remote_mediation.sites import ModelInfo
from remote_mediation.unseen import first_otherwise, respelled, visible

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPANS = ("edit", "after_edit", "instruction_end", "post_instruction", "last", "all")
# Edits whose lengths differ by more tokens than this leave too much of the longer one without a partner.
MAX_EDIT_DIFFERENCE = 4
# Pairs that are encoded together.
_TOGETHER = 500


class Places(NamedTuple):
    """The same places in both sequences: `x0[i]` and `x1[i]` are token indices of partners."""

    x0: tuple[int, ...]
    x1: tuple[int, ...]


class Node(NamedTuple):
    """A fed token of a trie of openings."""

    token: int
    """Token id."""
    parent: int
    """Index of the node before it; -1 for the last prompt token."""
    depth: int
    """Tokens from the last prompt token on; 1 for the first of an opening."""


@lru_cache
def trie(openings: tuple[tuple[int, ...], ...]) -> dict[tuple[int, ...], Node]:
    """Fed tokens of openings by what they end: all but each opening's last, beginnings that are shared once.

    The order is that in which they are packed after the prompt.
    """
    nodes: dict[tuple[int, ...], Node] = {}
    number: dict[tuple[int, ...], int] = {(): -1}
    for opening in openings:
        for length in range(1, len(opening)):
            beginning = opening[:length]
            if beginning not in nodes:
                number[beginning] = len(nodes)
                nodes[beginning] = Node(beginning[-1], number[beginning[:-1]], length)
    return nodes


@dataclass(frozen=True)
class TokenPair:
    """A tokenised and aligned pair.

    A packed sequence is the prompt, then the answer tokens that are fed (all but the last of each answer).
    """

    id: str
    """Of the `PromptPair`."""
    cluster: str
    """What statistics resample: the component of pairs that share a template, a prompt or an edit word."""
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
    openings: tuple[tuple[int, ...], ...] = ()
    """Token ids of the openings that the `refusal` outcome compares, the same for every pair; or empty."""
    aligned: bool = True
    """Whether the prompts have an edit; else only places behind the user's text are the same in both."""
    notes: tuple[tuple[str, str], ...] = ()
    """Other columns of the pairs file."""

    @property
    def prompts(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Both prompts, by side."""
        return self.x0, self.x1

    @property
    def fed(self) -> int:
        """Answer tokens that are fed after the prompt."""
        if self.openings:
            return len(trie(self.openings))
        return sum(max(len(answer) - 1, 0) for answer in self.answers)

    def places(self, position: str) -> Places:
        """Token indices of a position in both packed sequences; possibly empty.

        Positions: `edit` (the differing tokens), `after_edit` (the user's text behind them), `instruction_end` (the
        last token of the user's text), `post_instruction` (template tokens after it), `last` (where the answer is read:
        the last prompt token and the fed answer tokens), `all` (everything from the first differing token on), or one
        token of a span, `edit[-1]`.

        Raises:
            SiteError: not a position.
        """
        if position not in self._known:  # every row of a study asks for one
            self._known[position] = self._places(position)
        return self._known[position]

    @cached_property
    def _known(self) -> dict[str, Places]:
        return {}

    def _places(self, position: str) -> Places:
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
        if not self.aligned and span not in ("instruction_end", "post_instruction", "last"):
            return ()
        paired = min(len(self.x0), len(self.x1)) - self.first
        end = self.post + 1
        bounds = {
            "edit": (-paired, -self.after),
            "after_edit": (-self.after, -self.post),
            "instruction_end": (-end, 1 - end if end <= paired else -end),
            "post_instruction": (-self.post, 0),
            "last": (-1, self.fed),
            "all": (-paired, self.fed),
        }
        return tuple(range(*bounds[span]))


_PAIR = TypeAdapter(TokenPair)


@dataclass(frozen=True)
class Refusal:
    """A pair that is left out, and why."""

    id: str
    reason: str


class Prepared(NamedTuple):
    """What became of a file's pairs: those that can be run, and those refused."""

    pairs: tuple[TokenPair, ...]
    refusals: tuple[Refusal, ...]


def tokenise(pairs: Sequence[PromptPair], tokenizer: PreTrainedTokenizerBase, form: PromptForm = PLAIN) -> Prepared:
    """Tokenise and align pairs, with the tokenizer's chat template when it has one. form: what else is around them.

    A pair that is refused links no others: clusters are the components of the pairs that can be run.

    Raises:
        ModelError: the tokenizer does not say where in a text its tokens lie.
    """
    done: list[TokenPair] = []
    used: list[PromptPair] = []
    refused: list[Refusal] = []
    for pair, outcome in zip(pairs, _aligned(pairs, tokenizer, form), strict=True):
        if isinstance(outcome, Refusal):
            refused.append(outcome)
            continue
        done.append(outcome)
        used.append(pair)
    clustered = [replace(pair, cluster=name) for pair, name in zip(done, components(used), strict=True)]
    return Prepared(tuple(clustered), tuple(refused))


def fitting(prepared: Prepared, info: ModelInfo, answer: int) -> Prepared:
    """The pairs whose tokens the model has and whose sequences it was made for; the others are refused.

    answer: tokens of the longest answer behind a prompt.
    """
    kept, refused = [], list(prepared.refusals)
    for pair in prepared.pairs:
        length, highest = max(map(len, pair.prompts)) + answer, max(map(max, pair.prompts))
        if highest >= info.vocab:
            refused.append(Refusal(pair.id, f"token {highest} is beyond the {info.vocab} that the model embeds"))
        elif info.context and length > info.context:
            reason = f"{length - answer} tokens and {answer} of an answer are more than the model's context"
            refused.append(Refusal(pair.id, f"{reason} of {info.context}"))
        else:
            kept.append(pair)
    return Prepared(tuple(kept), tuple(refused))


def with_answers(pair: TokenPair, answers: tuple[tuple[int, ...], tuple[int, ...]]) -> TokenPair | Refusal:
    """Add the answers to x1 and x0, or refuse: an empty or a shared answer measures nothing."""
    if not all(answers):
        side = "harmless" if answers[0] else "harmful"
        return Refusal(pair.id, f"the answer to the {side} prompt has no tokens")
    if answers[0] == answers[1]:
        return Refusal(pair.id, "both prompts have the same answer, so the outcome is 0 by definition")
    return replace(pair, answers=answers)


def to_record(pair: TokenPair) -> dict[str, Any]:
    """A token pair as JSON data."""
    return asdict(pair)


def from_record(record: Any) -> TokenPair:
    """The inverse of `to_record`, after a way through JSON.

    Raises:
        ValueError: it is no pair, or its prompts have no such places.
    """
    pair = of_kind(_PAIR, record)
    if not (0 <= pair.post <= pair.after and 0 <= pair.first <= min(map(len, pair.prompts)) - pair.after):
        raise ValueError(f"{pair.first} tokens before an edit, {pair.after} behind it and {pair.post} of the template")
    return pair


class _Setting(NamedTuple):
    """How prompts are encoded."""

    tokenizer: PreTrainedTokenizerBase
    form: PromptForm
    known: Surroundings

    def encoded(self, asked: Sequence[Asked]) -> list[Encoded | PairsError]:
        """What a model is given of each."""
        return encode_prompts(asked, *self)


def _aligned(
    pairs: Sequence[PromptPair], tokenizer: PreTrainedTokenizerBase, form: PromptForm
) -> Iterator[TokenPair | Refusal]:
    """What becomes of each pair; so many are encoded together as are soon done and take little memory."""
    setting = _Setting(tokenizer, form, surroundings(tokenizer, form))
    for start in range(0, len(pairs), _TOGETHER):
        part = pairs[start : start + _TOGETHER]
        asked = [
            Asked(text, pair.before(name))
            for pair in part
            for name, text in (("harmless", pair.harmless), ("harmful", pair.harmful))
        ]
        found = setting.encoded(asked)
        for number, pair in enumerate(part):
            sides = slice(2 * number, 2 * number + 2)
            yield _align(pair, asked[sides], found[sides], setting)


def _spelled_otherwise(harmless: Asked, harmful: Asked, x1: Sequence[int], setting: _Setting) -> str:
    """Why a pair is refused whose prompts differ beside their edit in what nobody sees; empty where they do not.

    The edit would reach as far as that. What a tokenizer or a template takes away by itself, as some do with blanks at
    the ends, is no difference.
    """
    again = _respelled(harmful, harmless)
    if again == harmful:
        return ""
    (encoded,) = setting.encoded([again])
    if isinstance(encoded, Encoded) and encoded.ids == x1:
        return ""
    written = next(both for both in zip(_texts(harmful), _texts(again), strict=True) if both[0] != both[1])
    other, one = map(ascii, first_otherwise(*written))
    return (
        f"beside the edit the prompts differ in what cannot be seen: {one} in the harmless one is {other} in the "
        "other; spell both alike"
    )


def _respelled(harmful: Asked, harmless: Asked) -> Asked:
    """The harmful prompt with what looks alike in both as the harmless one has it, earlier messages one by one."""
    turns = harmful.turns
    if len(turns) == len(harmless.turns):
        contents = [respelled(one.content, other.content) for one, other in zip(turns, harmless.turns, strict=True)]
        turns = tuple(turn._replace(content=content) for turn, content in zip(turns, contents, strict=True))
    return Asked(respelled(harmful.request, harmless.request), turns)


def _texts(asked: Asked) -> list[str]:
    return [*(turn.content for turn in asked.turns), asked.request]


def _align(
    pair: PromptPair, asked: Sequence[Asked], found: Sequence[Encoded | PairsError], setting: _Setting
) -> TokenPair | Refusal:
    """What becomes of a pair. asked, found: its harmless prompt and its harmful one."""
    harmless, harmful = found
    for encoded in (harmless, harmful):
        if isinstance(encoded, PairsError):
            return Refusal(pair.id, str(encoded))
    assert isinstance(harmless, Encoded)
    assert isinstance(harmful, Encoded)
    if reason := _no_difference(pair, harmless, harmful):
        return Refusal(pair.id, reason)
    if pair.aligned and (reason := _spelled_otherwise(asked[0], asked[1], harmful.ids, setting)):
        return Refusal(pair.id, reason)
    aligned = _with_ends(pair, harmless, harmful)
    if pair.aligned:
        reason = _edit_refused(aligned, setting.tokenizer)
    else:
        reason = _unknown_word((harmless, harmful), setting.tokenizer)
    return Refusal(pair.id, reason) if reason else aligned


def _no_difference(pair: PromptPair, harmless: Encoded, harmful: Encoded) -> str:
    """Why the prompts of a pair count as one; empty where they do not."""
    if harmless.ids == harmful.ids:
        return "both prompts have the same tokens"
    if visible(pair.harmless) == visible(pair.harmful) and pair.before("harmless") == pair.before("harmful"):
        return "the prompts differ in nothing that can be seen: in blanks or in how characters are coded"
    return ""


def _with_ends(pair: PromptPair, harmless: Encoded, harmful: Encoded) -> TokenPair:
    """The pair with how much its prompts share before the edit and behind it."""
    x0, x1 = harmless.ids, harmful.ids
    shorter = min(len(x0), len(x1))
    first = next((i for i in range(shorter) if x0[i] != x1[i]), shorter)
    after = next((i for i in range(shorter - first) if x0[-1 - i] != x1[-1 - i]), shorter - first)
    post = min(harmless.post, harmful.post, after)
    return TokenPair(
        pair.id, pair.id, pair.category, x0, x1, first, after, post, aligned=pair.aligned, notes=pair.notes
    )


def _edit_refused(pair: TokenPair, tokenizer: PreTrainedTokenizerBase) -> str:
    """Why a pair cannot be aligned by its edit; empty where it can."""
    edits = [ids[pair.first : len(ids) - pair.after] for ids in pair.prompts]
    control, treatment = map(len, edits)
    if any(tokenizer.unk_token_id in edit for edit in edits):
        return f"the tokenizer has only {tokenizer.unk_token!r} for a word in which the prompts differ"
    if abs(control - treatment) > MAX_EDIT_DIFFERENCE:
        return f"edits of {control} and {treatment} tokens differ by more than {MAX_EDIT_DIFFERENCE}"
    if control != treatment and pair.after == 0:
        return f"edits of {control} and {treatment} tokens reach the last token: nothing to align by"
    return ""


def _unknown_word(prompts: Sequence[Encoded], tokenizer: PreTrainedTokenizerBase) -> str:
    """Why a pair without an edit is refused: a word of the user's text that the tokenizer does not have; or empty."""
    unknown = any(tokenizer.unk_token_id in _of_text(encoded) for encoded in prompts)
    return f"the tokenizer has only {tokenizer.unk_token!r} for a word of it" if unknown else ""


def _of_text(encoded: Encoded) -> list[int]:
    """Ids of the tokens of the user's text."""
    text = encoded.rendered
    spans = zip(encoded.ids, encoded.offsets, strict=False)  # an end that was taken off still has its place
    return [token for token, (start, stop) in spans if stop > text.begin and start < text.end]
