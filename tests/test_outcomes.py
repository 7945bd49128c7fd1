"""Y from its definition (METHOD.md, "Outcomes"), written longhand over a table of logits."""

from dataclasses import replace

import numpy as np
import pytest
from fakes import token_pair, words_tokenizer

from remote_mediation.errors import SettingsError
from remote_mediation.outcomes import LogitOutcome, Outcome, Read, ResponseOutcome, logit_diff, refusal

ANSWERS = ((4, 1, 3), (2, 0))
PAIR = token_pair(answers=ANSWERS)
# Logits after the prompt, after each fed token of the answer to x1 (two), and of the answer to x0 (one).
LOGITS = np.random.default_rng(0).normal(0, 3, size=(4, 6)).astype(np.float32)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def test_logit_diff_is_a_difference_of_means() -> None:
    outcome = LogitOutcome(plus=(1, 4, 5), minus=(0, 3))
    reads = outcome.reads(PAIR)
    assert [(read.answer, read.token) for read in reads] == [(0, 1), (0, 4), (0, 5), (0, 0), (0, 3)]
    values = np.array([LOGITS[read.answer, read.token] for read in reads])
    first = LOGITS[0].astype(np.float64)
    assert outcome.value(PAIR, values) == pytest.approx(
        (first[1] + first[4] + first[5]) / 3 - (first[0] + first[3]) / 2
    )
    assert outcome.unit == "logits"
    assert not outcome.normalise


def test_response_logprob_is_a_difference_of_means_per_token() -> None:
    outcome = ResponseOutcome()
    reads = outcome.reads(PAIR)
    assert [(read.answer, read.token) for read in reads] == [(0, 4), (1, 1), (2, 3), (0, 2), (3, 0)]
    scores = log_softmax(LOGITS)
    values = np.array([scores[read.answer, read.token] for read in reads], np.float32)
    compliant = (scores[0, 4] + scores[1, 1] + scores[2, 3]) / 3
    refusing = (scores[0, 2] + scores[3, 0]) / 2
    assert outcome.value(PAIR, values) == pytest.approx(compliant - refusing, rel=1e-6)
    assert outcome.unit == "nats/token"
    assert outcome.normalise


def test_answers_of_one_token_are_read_at_the_prompt() -> None:
    outcome = ResponseOutcome()
    assert outcome.reads(replace(PAIR, answers=((4,), (2,)))) == (Read(0, 4, 1.0), Read(0, 2, -1.0))
    assert outcome.reads(replace(PAIR, answers=((4,), (2, 5)))) == (Read(0, 4, 1.0), Read(0, 2, -0.5), Read(1, 5, -0.5))


def test_y_is_added_up_in_double_precision() -> None:
    outcome = LogitOutcome(plus=(1, 2), minus=(3,))
    values = np.array([2.0**24, 1.0, 2.0**23], np.float32)
    assert outcome.value(PAIR, values) == 0.5  # float32 would lose the 1
    thirds = LogitOutcome(plus=(1, 2, 3), minus=(4,))
    assert thirds.value(PAIR, np.array([3, 3, 3, 0], np.float32)) == pytest.approx(3, rel=1e-12)


def test_tokens_of_logit_diff() -> None:
    assert logit_diff(["sure", "yes"], ["sorry"], words_tokenizer()) == LogitOutcome((21, 22), (23,))


@pytest.mark.parametrize(
    ("plus", "minus", "message"),
    [
        (["sure yes"], ["no"], r"'sure yes' is 2 tokens \['sure', 'yes'\], not one; mind the leading space"),
        (["sure"], [""], "logit_diff: '' has no tokens behind the prompt"),
        (["sure"], [], r"needs at least one token in each of `plus` and `minus`"),
        ([], ["no"], r"needs at least one token in each of `plus` and `minus`"),
        (["sure", "yes"], ["no", "yes"], r"token 'yes' is in both `plus` and `minus`"),
        (["sure", "yes", "sure"], ["no"], r"token 'sure' is twice in `plus` of logit_diff, and would count twice"),
        (["sure"], ["no", "no"], r"token 'no' is twice in `minus` of logit_diff"),
    ],
)
def test_tokens_that_measure_nothing(plus: list[str], minus: list[str], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        logit_diff(plus, minus, words_tokenizer())


@pytest.mark.parametrize(
    "outcome",
    [
        LogitOutcome(plus=(1, 4, 5), minus=(0, 3)),
        ResponseOutcome(),
        refusal(((1,), (2, 3, 4), (5,) * 11), ((4, 1), (0, 2, 2, 2))),
    ],
    ids=lambda outcome: outcome.name,
)
def test_readouts_have_the_same_y_together_to_the_last_digit(outcome: Outcome) -> None:
    """An opening of eleven tokens: from eight on NumPy adds numbers that lie side by side up in another order."""
    reads = len(outcome.reads(PAIR))
    readouts = list(np.random.default_rng(0).normal(-5, 3, size=(40, reads)).astype(np.float32))
    found = outcome.each([PAIR] * 40, readouts)
    assert found.tolist() == [outcome.value(PAIR, values) for values in readouts]
    assert outcome.each([], []).shape == (0,)


def test_openings_are_added_up_along_each_and_then_as_probabilities() -> None:
    outcome = refusal(((1,), (2, 3)), ((4,),))
    place = {(read.answer, read.token): index for index, read in enumerate(outcome.reads(PAIR))}
    logprobs = log_softmax(LOGITS)
    values = np.array([logprobs[answer, token] for answer, token in place], np.float32)
    exact = np.exp(values.astype(np.float64))
    after = next(answer for answer, token in place if token == 3)
    compliant = exact[place[0, 1]] + exact[place[0, 2]] * exact[place[after, 3]]
    assert outcome.each([PAIR], [values]) == pytest.approx(np.log(compliant / exact[place[0, 4]]))
