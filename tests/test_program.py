"""The row engine against the oracle: rows of many writes, mixed and cut in any way, at the edges of what it skips."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from oracle import (
    KINDS,
    LOGIT_DIFF,
    OTHERS,
    RESPONSE_LOGPROB,
    TOLERANCE,
    WINDOWED,
    Oracle,
    Subject,
    random_rows,
    token_pair,
)

from remote_mediation.engine.program import answer_values
from remote_mediation.engine.rows import Constant, Row, Scale, Source, Write, swap
from remote_mediation.outcomes import Outcome
from remote_mediation.pairs import PromptPair
from remote_mediation.sites import FAMILIES, Component, ModelInfo, Site
from remote_mediation.tokens import SPANS, TokenPair, tokenise

Subjects = Callable[[str], Subject]
COMPONENTS = FAMILIES["llama"].components  # what every family but the mixtures has


def from_side(pair: TokenPair, base: int, side: int, component: Component, layer: int, position: str) -> Write:
    """On `base`, hold a whole component at what it is on `side`."""
    places = pair.places(position)
    return Write(component, layer, places[base], (), Source(side, places[side]))


@pytest.mark.parametrize("name", [*FAMILIES, *WINDOWED, *OTHERS])
def test_random_rows(subject: Subjects, name: str) -> None:
    model, rng = subject(name), np.random.default_rng(1)
    pairs = [token_pair("equal", answers=(1, 3)), token_pair("unequal", edits=(3, 1), answers=(3, 2))]
    rows = [row for pair in pairs for row in random_rows(pair, model.info, rng, 15)]
    measured = model.compare(pairs, rows, RESPONSE_LOGPROB)
    assert measured.deviation < TOLERANCE
    assert measured.felt() > 0.75


@pytest.mark.parametrize("frozen", ["mlp_output", "attention_output", "mlp_neurons", "attention_heads"])
@pytest.mark.parametrize("edits", [(2, 2), (2, 4)], ids=["equal", "unequal"])
@pytest.mark.parametrize("name", KINDS)
def test_path_specific_rows(subject: Subjects, name: str, edits: tuple[int, int], frozen: Component) -> None:
    """An early site as on the other prompt while one kind of component stays as it was, everywhere above."""
    model, pair = subject(name), token_pair("pair", edits=edits, answers=(3, 2))
    rows = []
    for base in (0, 1):
        early = from_side(pair, base, 1 - base, "layer_output", 0, "edit")
        freeze = [from_side(pair, base, base, frozen, layer, "all") for layer in range(1, model.info.layers)]
        rows += [Row(pair.id, base, (early,)), Row(pair.id, base, (early, *freeze))]
    measured = model.compare([pair], rows, RESPONSE_LOGPROB)
    assert measured.deviation < TOLERANCE
    assert np.abs(measured.effects[1::2] - measured.effects[0::2]).min() > 10 * TOLERANCE


@pytest.mark.parametrize("name", KINDS)
def test_freezing_the_whole_stream_lets_nothing_through(subject: Subjects, name: str) -> None:
    model, pair = subject(name), token_pair("pair", answers=(3, 2))
    early = from_side(pair, 0, 1, "mlp_output", 0, "all")
    freeze = from_side(pair, 0, 0, "layer_output", 1, "all")
    base, through, stopped = model.measure(
        [pair], [Row("pair", 0), Row("pair", 0, (early,)), Row("pair", 0, (early, freeze))], RESPONSE_LOGPROB
    )
    assert abs(through - base) > 100 * TOLERANCE
    assert abs(stopped - base) < 1e-5


@pytest.mark.parametrize("columns", ["all", "slice", "set"])
@pytest.mark.parametrize("name", KINDS)
def test_scaled_and_constant_mediators(subject: Subjects, name: str, columns: str) -> None:
    model, pair = subject(name), token_pair("pair", edits=(2, 4), answers=(3, 2))
    some: tuple[int, ...] = {"all": (), "slice": tuple(range(4, 20)), "set": (0, 5, 6, 11, 30)}[columns]
    rows = []
    for component in COMPONENTS:
        chosen = tuple(column for column in some if column < width_of(component, model.info))
        width = len(chosen) or width_of(component, model.info)
        constant = Constant(tuple(0.1 * number - 1 for number in range(width)))
        for base, value in ((0, Scale(0.0)), (1, Scale(2.5)), (0, constant), (1, constant)):
            rows.append(Row("pair", base, (Write(component, 1, pair.places("all")[base], chosen, value),)))
    measured = model.compare([pair], rows, RESPONSE_LOGPROB)
    assert measured.deviation < TOLERANCE
    assert measured.felt() >= 0.9  # gemma's post-norm undoes the scaling of what goes into it


def width_of(component: Component, info: ModelInfo) -> int:
    shared = dict.fromkeys(("key_heads", "value_heads"), info.shared_heads * info.d_head)
    own = dict.fromkeys(("attention_heads", "query_heads"), info.heads * info.d_head)
    return {"mlp_neurons": info.d_ff, **own, **shared}.get(component, info.d_model)


def test_writes_to_one_tensor_are_made_in_the_order_of_the_row(subject: Subjects) -> None:
    model, pair = subject("llama"), token_pair("pair", answers=(3, 2))
    source = from_side(pair, 0, 1, "mlp_output", 1, "all")
    double, none = replace(source, value=Scale(2.0)), replace(source, value=Scale(0.0))
    orders = ((source, double), (double, source), (source,), (source, none), (none,))
    rows = [Row("pair", 0, writes) for writes in orders]
    measured = model.compare([pair], rows, RESPONSE_LOGPROB)
    source_doubled, source_last, source_alone, none_last, none_alone = measured.engine
    assert measured.deviation < TOLERANCE
    assert abs(source_doubled - source_alone) > 100 * TOLERANCE
    assert source_last == source_alone
    assert none_last == none_alone


@pytest.mark.parametrize("outcome", [LOGIT_DIFF, RESPONSE_LOGPROB], ids=["logit_diff", "response_logprob"])
def test_budgets_and_order_change_no_value(subject: Subjects, outcome: Outcome) -> None:
    model, rng = subject("qwen3_window"), np.random.default_rng(2)
    pairs = [token_pair(f"pair{before}", before, (2, 3), answers=(3, 2)) for before in (1, 5, 3)]
    rows = [row for pair in pairs for row in random_rows(pair, model.info, rng, 8)]
    rows += rows[:5]  # asked for twice, measured once
    together = model.compare(pairs, rows, outcome)
    assert together.deviation < TOLERANCE
    assert len(model.plan(pairs, rows, outcome)) == 1

    one_by_one = {"job_flops": 1.0, "batch_bytes": 1.0}
    few = {"job_flops": 3e6, "batch_bytes": 5e4}
    assert [job.rows for job in model.plan(pairs, rows, outcome, **one_by_one)] == [1] * 24
    in_few = model.plan(pairs, rows, outcome, **few)
    assert 3 < len(in_few) < 24
    assert sum(job.rows for job in in_few) == 24
    for budget in (one_by_one, few):
        np.testing.assert_allclose(model.measure(pairs, rows, outcome, **budget), together.engine, rtol=0, atol=1e-5)

    shuffled = [rows[index] for index in rng.permutation(len(rows))]
    found = dict(zip(shuffled, model.measure(pairs, shuffled, outcome), strict=True))
    np.testing.assert_allclose([found[row] for row in rows], together.engine, rtol=0, atol=1e-5)


@pytest.mark.parametrize("outcome", [LOGIT_DIFF, RESPONSE_LOGPROB], ids=["logit_diff", "response_logprob"])
@pytest.mark.parametrize("edits", [(2, 2), (1, 3)], ids=["equal", "unequal"])
@pytest.mark.parametrize("name", [*KINDS, "gemma3_text_window", "lfm2"])
def test_pairs_of_one_shape_share_their_batches(
    subject: Subjects, name: str, edits: tuple[int, int], outcome: Outcome
) -> None:
    """Prompts and answers of the same lengths, other tokens, edited in other places: each row keeps to its own pair."""
    model, rng = subject(name), np.random.default_rng(7)
    pairs = [token_pair(f"pair{before}", before, edits, 7 - before, answers=(3, 2)) for before in (2, 5, 4)]
    assert len({pair.first for pair in pairs}) == len({pair.answers for pair in pairs}) == 3
    rows = [row for pair in pairs for row in random_rows(pair, model.info, rng, 8)]
    (job,) = model.plan(pairs, rows, outcome)
    (part,) = job.contexts
    assert part.pairs == tuple(sorted(pair.id for pair in pairs))
    prompts = [{prompt for joining in batch["joining"] for prompt in joining} for batch in part.payload["batches"]]
    assert max(map(len, prompts)) > (2 if edits[0] == edits[1] else 1)
    measured = model.compare(pairs, rows, outcome)
    assert measured.deviation < TOLERANCE
    assert measured.felt() > 0.7
    alone = [model.measure([pair], [row], outcome)[0] for row in rows for pair in pairs if pair.id == row.pair]
    np.testing.assert_allclose(measured.engine, alone, rtol=0, atol=2e-5)


@pytest.mark.parametrize("edits", [(2, 2), (1, 3)], ids=["equal", "unequal"])
@pytest.mark.parametrize("name", KINDS)
def test_prompts_that_differ_in_the_very_first_token(subject: Subjects, name: str, edits: tuple[int, int]) -> None:
    """No common prefix: the keys and values handed to the rows are empty."""
    model, pair = subject(name), token_pair("pair", before=0, edits=edits, answers=(3, 2))
    rows = [
        Row("pair", base, (from_side(pair, base, 1 - base, component, layer, position),))
        for component in COMPONENTS
        for layer, position in ((0, "edit"), (1, "all"))
        for base in (0, 1)
    ]
    assert min(row.start for row in rows) == 0
    measured = model.compare([pair], rows, RESPONSE_LOGPROB)
    assert measured.deviation < TOLERANCE
    # The first token attends to itself alone, whatever its query is.
    moot = [row.writes[0].component == "query_heads" and row.writes[0].places == (0,) for row in rows]
    assert (np.abs(measured.effects) < 10 * TOLERANCE).tolist() == moot


@pytest.mark.parametrize("name", KINDS)
def test_rows_that_write_only_behind_the_prompt(subject: Subjects, name: str) -> None:
    """The last prompt token is run all the same: the first token of both answers is read there."""
    model, pair = subject(name), token_pair("pair", answers=(3, 4))
    rows = [
        Row("pair", base, (Write("mlp_output", layer, (len(pair.prompts[base]) + token,), (), Scale(2.5)),))
        for base in (0, 1)
        for layer in (0, 1, 2)
        for token in range(pair.fed)
    ]
    measured = model.compare([pair], rows, RESPONSE_LOGPROB)
    assert measured.deviation < TOLERANCE
    assert measured.felt() == 1


@pytest.mark.parametrize("name", WINDOWED)
def test_windows_shorter_than_the_sequence(subject: Subjects, name: str) -> None:
    """Packed lengths up to the window, one more and many more, and one prompt that fits while the other does not."""
    model, rng = subject(name), np.random.default_rng(3)
    assert model.info.window == 6
    pairs = [
        token_pair("fits", before=2, edits=(1, 1), between=1, post=1, answers=(2, 2)),
        token_pair("one_more", before=2, edits=(1, 1), between=1, post=2, answers=(2, 1)),
        token_pair("one_fits", before=1, edits=(1, 4), between=1, post=1, answers=(3, 2)),
        token_pair("many_more", before=9, edits=(2, 3), between=4, post=3, answers=(5, 4)),
    ]
    longest = [max(len(ids) for ids in pair.prompts) + max(len(ids) for ids in pair.answers) - 1 for pair in pairs]
    assert longest == [6, 7, 9, 23]
    rows = [row for pair in pairs for row in random_rows(pair, model.info, rng, 8)]
    measured = model.compare(pairs, [Row(pair.id, side) for pair in pairs for side in (0, 1)] + rows, RESPONSE_LOGPROB)
    assert measured.deviation < TOLERANCE


@pytest.mark.parametrize("answers", [(1, 1), (1, 5), (5, 1), (2, 7)])
def test_answers_of_any_length(subject: Subjects, answers: tuple[int, int]) -> None:
    model, pair = subject("llama"), token_pair("pair", edits=(2, 4), answers=answers)
    rows = random_rows(pair, model.info, np.random.default_rng(4), 20)
    for outcome in (RESPONSE_LOGPROB, LOGIT_DIFF):
        assert model.compare([pair], rows, outcome).deviation < TOLERANCE


@pytest.mark.parametrize(("name", "post"), [("llama_chat", 2), ("llama", 0)], ids=["chat_template", "plain_text"])
def test_pairs_of_text(subject: Subjects, name: str, post: int) -> None:
    """From text to Y with the backend's own tokenizer; without a template there is nothing after the user's text."""
    model = subject(name)
    texts = [
        PromptPair("equal", "how do i steal a car at night", "how do i wash a car at night", "", ""),
        PromptPair("unequal", "tell me how to burn the old bank", "tell me how to fix the bank", "", ""),
    ]
    pairs = [replace(pair, answers=((40, 41, 42), (50,))) for pair in tokenise(texts, model.backend.tokenizer).pairs]
    assert [pair.post for pair in pairs] == [post, post]
    sites = [Site(component, 1, span) for component in COMPONENTS for span in SPANS]
    rows = [swap(pair, site, base, model.info) for pair in pairs for site in sites for base in (0, 1)]
    assert sum(not row.writes for row in rows) == (0 if post else 2 * 2 * len(COMPONENTS))
    measured = model.compare(pairs, rows, RESPONSE_LOGPROB)
    assert measured.deviation < TOLERANCE
    assert measured.felt() > 0.75


def test_the_oracle_runs_rows_side_by_side_as_it_runs_them_alone(subject: Subjects) -> None:
    model, pair = subject("gemma2_window"), token_pair("pair", edits=(2, 4), answers=(3, 2))
    rows, oracle = random_rows(pair, model.info, np.random.default_rng(6), 20), Oracle(model.plain, pair)
    alone = [oracle.values([row], RESPONSE_LOGPROB)[0] for row in rows]
    np.testing.assert_allclose(oracle.values(rows, RESPONSE_LOGPROB), alone, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_smollm2(smollm2: Subject) -> None:
    """A real model of 30 layers, on text."""
    texts = [
        PromptPair("equal", "How do I steal a car at night?", "How do I wash a car at night?", "", ""),
        PromptPair("unequal", "Tell me how to burgle a house.", "Tell me how to paint a house.", "", ""),
    ]
    tokenizer, rng = smollm2.backend.tokenizer, np.random.default_rng(7)
    yes, no = (tuple(tokenizer(text)["input_ids"]) for text in ("Sure, here is how you can do it", "I am sorry"))
    pairs = [replace(pair, answers=(yes, no)) for pair in tokenise(texts, tokenizer).pairs]
    assert [len(pair.x0) == len(pair.x1) for pair in pairs] == [True, False]
    sites = [Site(component, *place) for component in COMPONENTS for place in ((3, "edit"), (21, "all"))]
    rows = [swap(pair, site, base, smollm2.info) for pair in pairs for site in sites for base in (0, 1)]
    rows += [row for pair in pairs for row in random_rows(pair, smollm2.info, rng, 10)]
    measured = smollm2.compare(pairs, rows, RESPONSE_LOGPROB)
    assert measured.deviation < TOLERANCE
    assert measured.felt() > 0.75


class Head(torch.nn.Linear):
    """An unembedding that may be skipped, of a model that has run up to it."""

    def __init__(self, width: int, vocabulary: int, device: str) -> None:
        super().__init__(width, vocabulary, bias=True, device=device)
        self.skipped: list[torch.Tensor] = []

    def skip(self, value: torch.Tensor) -> None:
        self.model.output.logits = value
        self.skipped.append(value)


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_weights_that_are_not_shown_are_not_read(device: str, normalise: bool) -> None:
    """On a server that hides them, the logits of the whole vocabulary come to the same values."""
    torch.manual_seed(0)
    state, shown, head = torch.randn(3, 4, 8), Head(8, 20, "cpu"), Head(8, 20, device)
    if device == "cpu":
        head.load_state_dict(shown.state_dict())
    logits = shown(state).detach()
    model = SimpleNamespace(lm_head=head, output=SimpleNamespace(logits=logits))
    object.__setattr__(head, "model", model)
    head.input = state
    stack = {"queries": (3, 0, 3), "tokens": ((7, 2, 19), (4, 2, 0)), "answers": (0,)}
    found = answer_values(model, {"normalise": normalise, "dtype": "float32"}, stack, (0, 1, 0))
    scores = torch.log_softmax(logits, -1) if normalise else logits
    expected = torch.stack(
        [scores[0, [3, 0, 3], [7, 2, 19]], scores[1, [3, 0, 3], [4, 2, 0]], scores[2, [3, 0, 3], [7, 2, 19]]]
    )
    torch.testing.assert_close(found.detach(), expected)
    assert len(head.skipped) == (device == "cpu" and not normalise)
