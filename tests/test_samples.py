"""Sampled answers against a loop written out by hand: plain hooks, no cache, the whole sequence anew for each token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from oracle import (
    HYBRIDS,
    KINDS,
    LOGIT_DIFF,
    MODULES,
    RESPONSE_LOGPROB,
    TOLERANCE,
    Oracle,
    Subject,
    random_rows,
    token_pair,
)

from remote_mediation.engine.budget import Budget, Setting
from remote_mediation.engine.rows import Constant, Projected, Row, Scale, Source, Write, held, swap_all
from remote_mediation.engine.samples import Manner, bare, plan_samples, sample_key, sample_seed
from remote_mediation.sites import COMPONENTS, Site, band
from remote_mediation.subspaces import Basis, Subspace
from remote_mediation.tokens import TokenPair

Subjects = Callable[[str], Subject]
NAMES = (*KINDS, *HYBRIDS, "qwen3_next", "gemma3_text_window", "mixtral_window")
PAIRS = (token_pair("unequal", before=6, edits=(1, 3)), token_pair("short", 1, (2, 2), 1, 1))
BY_ID = {pair.id: pair for pair in PAIRS}
SEED = 5


def setting(model: Subject) -> Setting:
    return Setting(model.info, "float32", LOGIT_DIFF)


def sampled(
    model: Subject, rows: Sequence[Row], manner: Manner, seed: int = SEED, batch_bytes: float = 1e9
) -> list[np.ndarray]:
    """`[quantity, sample, token]` of every row: ids, then logits."""
    found: dict[str, np.ndarray] = {}
    budget = Budget(lambda: 1e18, batch_bytes)
    for job in plan_samples(rows, BY_ID, manner, seed, setting(model), budget):
        readout = model.backend.collect(model.backend.submit(job))
        found.update(zip(job.keys, readout.values, strict=True))
    keys = [sample_key(row, BY_ID[row.pair], manner, seed, setting(model)) for row in rows]
    return [found[key].reshape(2, manner.samples, manner.tokens) for key in keys]


class Longhand:
    """One pair's rows, run without a cache."""

    def __init__(self, model: Subject, pair: TokenPair) -> None:
        self._plain, self._pair, self._oracle = model.plain, pair, Oracle(model.plain, pair)

    def sampled(self, row: Row, manner: Manner, seed: int = SEED) -> np.ndarray:
        """`[quantity, sample, token]`."""
        generator = torch.Generator().manual_seed(sample_seed(row.pair, seed))
        draws = torch.rand((manner.tokens, manner.samples), generator=generator, dtype=torch.float64)
        found = np.empty((2, manner.samples, manner.tokens))
        for sample in range(manner.samples):
            ids = list(self._pair.prompts[row.base])
            for step in range(manner.tokens):
                with torch.no_grad(), self._writing(row, manner.held):
                    logits = self._plain(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
                token = int(logits.argmax())
                if manner.temperature:
                    chances = (logits.double() / manner.temperature).softmax(-1)
                    token, height = 0, float(chances[0])
                    while height <= float(draws[step, sample]):
                        token += 1
                        height += float(chances[token])
                ids.append(token)
                found[:, sample, step] = token, float(logits[token])
        return found

    @contextmanager
    def _writing(self, row: Row, held: bool) -> Iterator[None]:
        handles = [self._oracle._hook(w.component, w.layer, self._change(w, row, held)) for w in row.writes]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _change(self, write: Write, row: Row, held: bool) -> Callable[[torch.Tensor], torch.Tensor]:
        length = len(self._pair.prompts[row.base])

        def change(tensor: torch.Tensor) -> torch.Tensor:
            tensor = tensor.clone()
            columns = list(write.columns) or list(range(tensor.shape[-1]))
            places = list(enumerate(write.places))
            if held and write.places[-1] == length - 1:
                places += [(len(write.places) - 1, place) for place in range(length, tensor.shape[1])]
            for number, place in places:
                own = tensor[0, place, columns]
                tensor[0, place, columns] = self._value(write, number, own, columns)
            return tensor

        return change

    def _value(self, write: Write, number: int, own: torch.Tensor, columns: list[int]) -> torch.Tensor:
        match write.value:
            case Scale(factor):
                return own * factor
            case Constant(values):
                return torch.tensor(values)
            case Source(side, places):
                return self._oracle._recorded[side, 0][write.component, write.layer][places[number], columns]
            case Projected(side, places, basis, along):
                other = self._oracle._recorded[side, 0][write.component, write.layer][places[number], columns]
                amounts = torch.tensor(basis.vectors) @ (other - own)
                return own + amounts @ torch.tensor(along.vectors)


def swaps(model: Subject, pair: TokenPair) -> list[Row]:
    """Single sites, and sets over several layers, at one token, at the edit and everywhere, on both prompts."""
    layers = range(model.info.layers)
    components = [name for name in COMPONENTS if name in MODULES[model.info.family]]
    middle = {name: 1 if 1 in model.info.layers_with(name) else 2 for name in components}
    sets = [[Site(name, middle[name], ("last", "edit")[at % 2])] for at, name in enumerate(components)]
    sets += [band("mlp_output", layers, "all"), band("attention_output", layers, "last")]
    sets += [[*band("mlp_output", layers[1:], "all"), *band("attention_output", layers[:1], "edit")]]
    read, along = (Basis.random(2, model.info.d_model, np.random.default_rng(at)) for at in (0, 1))
    sets += [[Subspace("layer_output", layers[-1], "last", basis=read)]]
    sets += [[Subspace("mlp_output", layer, "all", basis=read, along=along) for layer in layers]]
    return [swap_all(pair, sites, base, model.info) for sites in sets for base in (0, 1)]


def compare(model: Subject, rows: Sequence[Row], manner: Manner) -> None:
    """The same tokens and logits as by hand, and writes that change them."""
    by_hand = {pair.id: Longhand(model, pair) for pair in PAIRS}
    found = sampled(model, rows, manner)
    expected = [by_hand[row.pair].sampled(row, manner) for row in rows]
    np.testing.assert_array_equal([one[0] for one in found], [one[0] for one in expected])
    np.testing.assert_allclose([one[1] for one in found], [one[1] for one in expected], rtol=0, atol=TOLERANCE)
    plain = {(row.pair, row.base): one for row, one in zip(rows, expected, strict=True) if not row.writes}
    felt = [
        np.abs(one[1] - plain[row.pair, row.base][1]).max() > 10 * TOLERANCE
        for row, one in zip(rows, expected, strict=True)
        if row.writes
    ]
    assert np.mean(felt) > 0.75


GREEDY, SAMPLED = Manner(1, 5, 0.0), Manner(2, 5, 1.5)
MANNERS = {"greedy": GREEDY, "held greedy": GREEDY._replace(held=True), "sampled": SAMPLED}
MANNERS["held"] = SAMPLED._replace(held=True)


@pytest.mark.parametrize("manner", MANNERS)
@pytest.mark.parametrize("name", NAMES)
def test_answers_are_those_of_the_loop_by_hand(subject: Subjects, name: str, manner: str) -> None:
    model = subject(name)
    rows = [row for pair in PAIRS for row in (Row(pair.id, 0), Row(pair.id, 1), *swaps(model, pair))]
    compare(model, rows, MANNERS[manner])


@pytest.mark.parametrize("manner", ["sampled", "held"])
def test_writes_of_any_kind(subject: Subjects, manner: str) -> None:
    """Several to one tensor, scaled and constant ones, at any tokens and columns, from either prompt."""
    model, rng = subject("gemma2_window"), np.random.default_rng(3)
    rows = [row for pair in PAIRS for row in (Row(pair.id, 0), Row(pair.id, 1), *random_rows(pair, model.info, rng, 8))]
    compare(model, rows, MANNERS[manner])


def test_what_is_sampled_beside_a_row_changes_nothing(subject: Subjects) -> None:
    model = subject("llama")
    rows = [row for pair in PAIRS for row in (Row(pair.id, 0), *swaps(model, pair))]
    together = sampled(model, rows, SAMPLED)
    alone = sampled(model, rows, SAMPLED, batch_bytes=1.0)
    np.testing.assert_allclose(together, alone, rtol=0, atol=TOLERANCE)
    budget = Budget(lambda: 1.0, 1.0)
    assert [job.rows for job in plan_samples(rows, BY_ID, SAMPLED, SEED, setting(model), budget)] == [1] * len(rows)


def test_rows_of_a_pair_share_their_random_numbers(subject: Subjects) -> None:
    """A swap that changes nothing gives the very same answers; other pairs and other seeds give others."""
    model, pair = subject("llama"), PAIRS[0]
    itself = held(pair, Site("mlp_output", 1, "all"), 0, 0, model.info)
    manner = Manner(6, 8, 1.5)
    plain, same = sampled(model, [Row(pair.id, 0), Row(pair.id, 0, (itself,))], manner)
    np.testing.assert_array_equal(plain[0], same[0])
    assert len({tuple(answer) for answer in plain[0]}) == 6
    (other,) = sampled(model, [Row(pair.id, 0)], manner, seed=SEED + 1)
    assert (other[0] != plain[0]).any()
    assert sample_seed("a", 0) != sample_seed("b", 0)


def test_tokens_come_as_often_as_the_model_says(subject: Subjects) -> None:
    model, pair, manner = subject("llama"), PAIRS[0], Manner(4000, 1, 2.0)
    ((ids, logits),) = sampled(model, [Row(pair.id, 1)], manner)
    with torch.no_grad():
        expected = model.plain(input_ids=torch.tensor([pair.x1])).logits[0, -1].double()
    chances = (expected / manner.temperature).softmax(-1).numpy()
    counts = np.bincount(ids.ravel().astype(int), minlength=len(chances))
    often = chances > 5 / manner.samples
    off = (counts - manner.samples * chances)[often] / np.sqrt(manner.samples * chances * (1 - chances))[often]
    assert often.sum() > 10
    assert np.abs(off).max() < 4.5
    np.testing.assert_allclose(logits.ravel(), expected[ids.ravel().astype(int)], rtol=0, atol=TOLERANCE)


def test_keys_hash_what_answers_depend_on(subject: Subjects) -> None:
    model, pair = subject("llama"), PAIRS[0]
    row = swap_all(pair, [Site("mlp_output", 1, "all")], 0, model.info)
    named = setting(model)
    keys = [
        sample_key(row, pair, SAMPLED, SEED, named),
        sample_key(Row(pair.id, 0), pair, SAMPLED, SEED, named),
        sample_key(replace(row, base=1), pair, SAMPLED, SEED, named),
        sample_key(row, replace(pair, x1=pair.x1[::-1]), SAMPLED, SEED, named),
        sample_key(row, pair, SAMPLED, SEED + 1, named),
        sample_key(row, pair, SAMPLED, SEED, named._replace(dtype="bfloat16")),
        *(
            sample_key(row, pair, SAMPLED._replace(**changed), SEED, named)
            for changed in ({"samples": 3}, {"tokens": 6}, {"temperature": 1.0}, {"held": True})
        ),
    ]
    assert len(set(keys)) == len(keys)
    outcome = named._replace(outcome=RESPONSE_LOGPROB)
    assert sample_key(row, pair, SAMPLED, SEED, outcome) == keys[0]  # an answer is the same whatever is read of it


def test_nothing_is_fed_behind_a_bare_pair() -> None:
    pair = token_pair("fed", answers=(3, 2))
    assert pair.fed
    assert bare(pair).fed == 0
    assert len(bare(pair).places("last").x0) == 1
