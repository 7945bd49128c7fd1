"""What is read of a forward pass, and how it becomes one number Y. Pure: a stored readout gives any Y again.

Every outcome is a weighted sum of what the model says of some tokens, so the rows of a job only bring back those few
values: `logit_diff` reads logits at the first answer position, `response_logprob` log-probabilities along two answers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from remote_mediation.errors import SettingsError
from remote_mediation.tokens import TokenPair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OutcomeName = Literal["response_logprob", "logit_diff"]
UNITS: dict[str, str] = {"response_logprob": "nats/token", "logit_diff": "logits"}


class Read(NamedTuple):
    """One value of a forward pass: a token's score at an answer position, and its weight in Y."""

    answer: int
    """Index into the answer positions: 0 is the last prompt token, then the fed answer tokens in packed order."""
    token: int
    """Token id."""
    weight: float
    """Factor in the sum that is Y."""


@dataclass(frozen=True)
class Outcome:
    """A scalar harmfulness of what the model says next."""

    name: OutcomeName
    """Which one."""
    plus: tuple[int, ...] = ()
    """`logit_diff`: token ids of a harmful continuation."""
    minus: tuple[int, ...] = ()
    """`logit_diff`: token ids of a refusal or harmless continuation."""

    @property
    def unit(self) -> str:
        """Unit of Y."""
        return UNITS[self.name]

    @property
    def normalise(self) -> bool:
        """Whether values are log-probabilities (nats) rather than logits."""
        return self.name == "response_logprob"

    def reads(self, pair: TokenPair) -> tuple[Read, ...]:
        """What to read of a run of this pair.

        `logit_diff` is the mean logit of `plus` minus the mean logit of `minus`. `response_logprob` is the
        length-normalised log-probability of the answer to x1 minus that of the answer to x0 (METHOD, "Outcomes").
        """
        if self.name == "logit_diff":
            signed = ((self.plus, 1.0), (self.minus, -1.0))
            return tuple(Read(0, token, sign / len(tokens)) for tokens, sign in signed for token in tokens)
        reads, fed = [], 0
        for answer, sign in zip(pair.answers, (1.0, -1.0), strict=True):
            reads += [Read(0 if i == 0 else fed + i, token, sign / len(answer)) for i, token in enumerate(answer)]
            fed += len(answer) - 1
        return tuple(reads)

    def value(self, pair: TokenPair, values: npt.NDArray[np.float32]) -> float:
        """Y from the values read, in float64 and in the outcome's unit."""
        weights = np.array([read.weight for read in self.reads(pair)], dtype=np.float64)
        return float(weights @ values.astype(np.float64))


def logit_diff(plus: list[str], minus: list[str], tokenizer: PreTrainedTokenizerBase) -> Outcome:
    """The `logit_diff` outcome of two sets of token strings.

    Raises:
        SettingsError: an empty set, a string that is not exactly one token, or a token in both sets.
    """
    sets = [tuple(_single_token(text, tokenizer) for text in texts) for texts in (plus, minus)]
    if not all(sets):
        raise SettingsError("logit_diff needs at least one token in each of `plus` and `minus`")
    shared = set(sets[0]) & set(sets[1])
    if shared:
        raise SettingsError(f"token {tokenizer.decode([shared.pop()])!r} is in both `plus` and `minus` of logit_diff")
    return Outcome("logit_diff", *sets)


def _single_token(text: str, tokenizer: PreTrainedTokenizerBase) -> int:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        pieces = [tokenizer.decode([token]) for token in ids]
        raise SettingsError(f"logit_diff: {text!r} is {len(ids)} tokens {pieces}, not one; mind the leading space")
    return ids[0]
