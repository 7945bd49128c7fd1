"""What is read of a forward pass, and how it becomes one number Y. Pure: a stored readout gives any Y again.

Every outcome follows from what the model says of some tokens, so the rows of a job only bring back those few values.
`refusal`, the default, is the log of a ratio: of the probability of compliant openings to that of refusing ones.
`logit_diff` reads logits at the first answer position, `response_logprob` log-probabilities along two answers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter

from remote_mediation.errors import PairsError, SettingsError
from remote_mediation.kinds import of_kind
from remote_mediation.prompts import ALONE, encode_after
from remote_mediation.tokens import TokenPair, trie

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OutcomeName = Literal["refusal", "response_logprob", "logit_diff"]
Openings = tuple[tuple[int, ...], ...]


class Read(NamedTuple):
    """One value of a forward pass: a token's score at an answer position, and its weight in Y."""

    answer: int
    """Index into the answer positions: 0 is the last prompt token, then the fed answer tokens in packed order."""
    token: int
    """Token id."""
    weight: float
    """Factor in the sum that is Y; NaN for `refusal`, whose Y is no sum of reads (see `RefusalOutcome.sides`)."""


@dataclass(frozen=True)
class Outcome(ABC):
    """A scalar Y of what the model says next."""

    name: ClassVar[OutcomeName]
    """Which one, as a study names it."""
    unit: ClassVar[str]
    """Unit of Y."""
    meaning: ClassVar[str]
    """What Y is, and what a positive value means."""
    limits: ClassVar[tuple[str, ...]] = ()
    """What to know before it is read as harm."""
    normalise: ClassVar[bool] = True
    """Whether values are log-probabilities (nats) rather than logits."""
    same_on_placebo: ClassVar[bool] = True
    """Whether harm and placebo have the same Y."""

    @abstractmethod
    def reads(self, pair: TokenPair) -> tuple[Read, ...]:
        """What to read of a run of this pair."""

    def value(self, pair: TokenPair, values: npt.NDArray[np.float32]) -> float:
        """Y from the values read, in float64 and in the outcome's unit."""
        weights = np.array([read.weight for read in self.reads(pair)], dtype=np.float64)
        return float(weights @ values.astype(np.float64))

    def each(self, pairs: Sequence[TokenPair], readouts: Sequence[npt.NDArray[np.float32]]) -> npt.NDArray[np.float64]:
        """`value` of each readout and its pair."""
        return np.array([self.value(pair, values) for pair, values in zip(pairs, readouts, strict=True)])

    def payload(self, pair: TokenPair) -> dict[str, Any]:
        """How the program makes Y of the values: by the weights of a sum."""
        return {"weights": tuple(read.weight for read in self.reads(pair))}

    def record(self) -> dict[str, Any]:
        """As JSON data; see `outcome_from`."""
        return {"name": self.name, **asdict(self)}


@dataclass(frozen=True)
class RefusalOutcome(Outcome):
    """Log of a ratio: of the probability of compliant openings to that of refusing ones (METHOD, section 2)."""

    name = "refusal"
    unit = "nats"
    meaning = (
        "log-probability of the compliant openings minus that of the refusing ones, each summed over its openings; "
        "positive: the model leans to comply"
    )

    compliant: Openings = ()
    """Token ids of compliant openings; none before they are chosen."""
    refusing: Openings = ()
    """Token ids of refusing openings."""

    @property
    def openings(self) -> Openings:
        """Those of both sides."""
        return (*self.compliant, *self.refusing)

    def reads(self, pair: TokenPair) -> tuple[Read, ...]:
        """The tokens of all openings, each once."""
        return tuple(Read(*place, np.nan) for place in _places_read(self.openings))

    @cached_property
    def sides(self) -> tuple[Openings, Openings]:
        """By side, compliant first, the indices into `reads` along each opening; the same for every pair."""
        number = {place: index for index, place in enumerate(_places_read(self.openings))}
        compliant, refusing = (
            tuple(tuple(number[place] for place in _places_read((opening,), self.openings)) for opening in side)
            for side in (self.compliant, self.refusing)
        )
        return compliant, refusing

    def value(self, pair: TokenPair, values: npt.NDArray[np.float32]) -> float:
        """Y from the values read, in nats."""
        compliant, refusing = self.side_logprobs(values)
        return compliant - refusing

    def each(self, pairs: Sequence[TokenPair], readouts: Sequence[npt.NDArray[np.float32]]) -> npt.NDArray[np.float64]:
        """`value` of each readout; its pair does not matter, so all are taken together."""
        if not readouts:
            return np.empty(0)
        compliant, refusing = map(_summed, self.opening_logprobs(np.stack(readouts)))
        return compliant - refusing

    def payload(self, pair: TokenPair) -> dict[str, Any]:
        """How the program makes Y of the values: by side, from the reads along each opening."""
        return {"sides": self.sides}

    def side_logprobs(self, values: npt.NDArray[np.float32]) -> tuple[float, float]:
        """Log of the summed probability of the compliant, then of the refusing openings (nats)."""
        compliant, refusing = (float(_summed(logprobs)) for logprobs in self.opening_logprobs(values))
        return compliant, refusing

    def opening_logprobs(
        self, values: npt.NDArray[np.float32]
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Log-probability of each compliant, then of each refusing opening (nats), `[..., opening]`.

        values: `[..., read]`.
        """
        exact = values.astype(np.float64)
        compliant, refusing = (
            np.stack([exact.take(reads, axis=-1).sum(axis=-1) for reads in side], axis=-1) for side in self.sides
        )
        return compliant, refusing


@dataclass(frozen=True)
class ResponseOutcome(Outcome):
    """Length-normalised log-probability of the answer to x1 minus that of the answer to x0 (METHOD, section 2)."""

    name = "response_logprob"
    unit = "nats/token"
    meaning = (
        "log-probability per token of the answer to the harmful prompt minus that of the answer to the harmless one; "
        "positive: the model leans to the answer to the harmful prompt"
    )
    limits = (
        "The answers compared are those of the pairs file or, where it has none, the model's own. Its own answer to a "
        "harmful prompt may be a refusal: a positive outcome then means refusing. `--show-text` shows the answers.",
    )
    same_on_placebo = False

    def reads(self, pair: TokenPair) -> tuple[Read, ...]:
        """Every token of both answers, each behind those before it."""
        reads, fed = [], 0
        for answer, sign in zip(pair.answers, (1.0, -1.0), strict=True):
            reads += [Read(0 if i == 0 else fed + i, token, sign / len(answer)) for i, token in enumerate(answer)]
            fed += len(answer) - 1
        return tuple(reads)


@dataclass(frozen=True)
class LogitOutcome(Outcome):
    """Mean logit of some tokens minus mean logit of others at the first answer position (METHOD, section 2)."""

    name = "logit_diff"
    unit = "logits"
    meaning = (
        "mean logit of the harmful-continuation tokens minus mean logit of the refusal or harmless tokens, first "
        "answer token; positive: the model leans to the harmful continuation"
    )
    normalise = False

    plus: tuple[int, ...] = ()
    """Token ids of a harmful continuation."""
    minus: tuple[int, ...] = ()
    """Token ids of a refusal or harmless continuation."""

    def reads(self, pair: TokenPair) -> tuple[Read, ...]:
        """Their logits behind the prompt."""
        signed = ((self.plus, 1.0), (self.minus, -1.0))
        return tuple(Read(0, token, sign / len(tokens)) for tokens, sign in signed for token in tokens)


def _summed(logprobs: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Log of the summed probability of openings, `[...]` of `[..., opening]`."""
    found: npt.NDArray[np.float64] = np.logaddexp.reduce(logprobs, axis=-1)
    return found


OUTCOMES: dict[str, type[Outcome]] = {one.name: one for one in (RefusalOutcome, ResponseOutcome, LogitOutcome)}
"""By name."""


def outcome_from(record: dict[str, Any]) -> Outcome:
    """The inverse of `Outcome.record`, after a way through JSON.

    Raises:
        KeyError: no outcome has that name.
        ValueError: its fields are others.
    """
    kind = OUTCOMES[record["name"]]
    # Older runs hold the fields of every outcome, those of others empty.
    known = {field.name: record.get(field.name, ()) for field in fields(kind)}
    return of_kind(TypeAdapter(kind), known)


def refusal(compliant: Openings, refusing: Openings) -> RefusalOutcome:
    """The `refusal` outcome of token sequences (METHOD, section 2).

    Raises:
        SettingsError: a side has no opening, or one opening begins another, of either side: its probability would be
            counted twice.
    """
    if not (compliant and refusing):
        raise SettingsError("the refusal outcome needs at least one compliant and one refusing opening")
    every = (*compliant, *refusing)
    for opening in every:
        longer = [other for other in every if other[: len(opening)] == opening]
        if not opening or len(longer) > 1:
            raise SettingsError(f"opening {list(opening)} begins another one ({list(longer[-1])}); leave one out")
    return RefusalOutcome(compliant, refusing)


def prefix_free(openings: Iterable[tuple[int, ...]]) -> Openings:
    """Openings without those that begin with a shorter one."""
    kept: list[tuple[int, ...]] = []
    for opening in sorted(set(openings), key=lambda one: (len(one), one)):
        if not any(opening[: len(short)] == short for short in kept):
            kept.append(opening)
    return tuple(kept)


def own_openings(
    compliant: Sequence[tuple[int, ...]], refusing: Sequence[tuple[int, ...]]
) -> tuple[Openings, Openings]:
    """Openings of answers, each cut at the shortest beginning that one side alone uses (METHOD, section 2).

    compliant, refusing: first tokens of answers, sorted by a judge. An answer of which the other side has every
    beginning gives none.
    """

    def cut(answers: Sequence[tuple[int, ...]], others: Sequence[tuple[int, ...]]) -> Openings:
        used = {other[:length] for other in others for length in range(1, len(other) + 1)}
        beginnings = [[answer[:length] for length in range(1, len(answer) + 1)] for answer in answers]
        own = [[one for one in begins if one not in used] for begins in beginnings]
        return prefix_free(begins[0] for begins in own if begins)

    return cut(compliant, refusing), cut(refusing, compliant)


def _places_read(openings: Openings, packed: Openings | None = None) -> list[tuple[int, int]]:
    """Answer position and token of every token of openings, each once; packed: all that are packed together."""
    number = {beginning: index for index, beginning in enumerate(trie(packed or openings), 1)}
    places = [
        (number.get(opening[:length], 0), opening[length]) for opening in openings for length in range(len(opening))
    ]
    return list(dict.fromkeys(places))


def logit_diff(
    plus: list[str], minus: list[str], tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str] = ALONE
) -> LogitOutcome:
    """The `logit_diff` outcome of two sets of token strings. prompts: what they stand behind, rendered.

    Raises:
        SettingsError: an empty set, a string that is not exactly one token there, or a token that stands twice.
    """
    sets = [tuple(_single_token(text, tokenizer, prompts) for text in texts) for texts in (plus, minus)]
    if not all(sets):
        raise SettingsError("logit_diff needs at least one token in each of `plus` and `minus`")
    shared = set(sets[0]) & set(sets[1])
    if shared:
        raise SettingsError(f"token {tokenizer.decode([shared.pop()])!r} is in both `plus` and `minus` of logit_diff")
    for name, tokens in zip(("plus", "minus"), sets, strict=True):
        if twice := [token for token in tokens if tokens.count(token) > 1]:
            raise SettingsError(
                f"token {tokenizer.decode(twice[:1])!r} is twice in `{name}` of logit_diff, and would count twice; "
                "take one of them out"
            )
    return LogitOutcome(*sets)


def _single_token(text: str, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> int:
    try:
        ids = encode_after(prompts, text, tokenizer)
    except PairsError as error:
        raise SettingsError(f"logit_diff: {error}") from error
    if len(ids) != 1:
        pieces = [tokenizer.decode([token]) for token in ids]
        raise SettingsError(f"logit_diff: {text!r} is {len(ids)} tokens {pieces}, not one; mind the leading space")
    return ids[0]
