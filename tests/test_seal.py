"""What travels with a job's values: their checksum, and what made them; and what the caller's settings do not touch."""

from __future__ import annotations

import struct
from collections.abc import Callable

import numpy as np
import pytest
import torch
from oracle import Subject, token_pair

from remote_mediation.engine.answers import changes
from remote_mediation.engine.program import checksum, execute, fingerprint, opened
from remote_mediation.engine.rows import swap
from remote_mediation.outcomes import LogitOutcome, Outcome, ResponseOutcome
from remote_mediation.sites import Site


def by_hand(numbers: list[float], shape: tuple[int, ...], power: int = 3) -> int:
    """The checksum in whole numbers."""
    bits = [struct.unpack("<i", struct.pack("<f", number))[0] for number in numbers]
    total = sum(bit * (2 * index + 1) ** power * 0x1E3779B97F4A7C15 for index, bit in enumerate(bits))
    return (total + sum(size * 7919 ** (axis + 1) for axis, size in enumerate(shape)) + 2**63) % 2**64 - 2**63


def test_the_checksum_is_the_one_by_hand() -> None:
    numbers = [1.5, -2.25, 3e38, -0.0, float("inf"), 1e-45]
    assert checksum([torch.tensor(numbers).reshape(2, 3), torch.empty(0)]).tolist() == [
        by_hand(numbers, (2, 3)),
        by_hand([], (0,)),
    ]
    large = torch.tensor([2**62 + 1])  # not to be told from its neighbours in float32
    assert not torch.equal(checksum([large]), checksum([large + 1]))
    assert checksum([]).tolist() == []
    assert fingerprint(torch.tensor(numbers)).tolist() == [by_hand(numbers, (6,), 1)]


def test_a_long_table_has_the_checksum_by_hand_too() -> None:
    values = np.random.default_rng(1).normal(size=(3, 2**18 - 5)).astype(np.float32)
    bits = values.view(np.int32).ravel().astype(np.int64)
    odd = (2 * np.arange(bits.size) + 1) ** 3 * np.int64(0x1E3779B97F4A7C15)
    total = int((bits * odd).sum()) + sum(size * 7919 ** (axis + 1) for axis, size in enumerate(values.shape))
    assert checksum([torch.from_numpy(values)]).tolist() == [total]


def test_nothing_can_change_without_the_checksum() -> None:
    rng = np.random.default_rng(0)
    values = torch.tensor(rng.normal(size=(5, 7)), dtype=torch.float32)
    known = checksum([values])
    for row, column in np.ndindex(5, 7):
        for bit in range(32):
            changed = values.clone()
            changed.view(torch.int32)[row, column] ^= -(2**31) if bit == 31 else 2**bit
            assert not torch.equal(checksum([changed]), known), (row, column, bit)
    for order in ([1, 0, 2, 3, 4], [4, 3, 2, 1, 0]):
        assert not torch.equal(checksum([values[order]]), known)
    one, other = values[:1], values[1:2]
    assert not torch.equal(
        checksum([torch.cat([one, other, other, one])]), checksum([torch.cat([other, one, one, other])])
    )
    for other in (values.T, values.reshape(7, 5), values[:-1], torch.cat([values, torch.zeros(1, 7)])):
        assert not torch.equal(checksum([other]), known)
    assert not torch.equal(checksum([values, values]), known)


def test_what_a_job_returns_can_be_opened(subject: Callable[[str], Subject]) -> None:
    model = subject("llama")
    pair = token_pair("pair", answers=(3, 2))
    rows = [swap(pair, Site("mlp_output", 1, "all"), side, model.info) for side in (0, 1)]
    (job,) = model.plan([pair], rows, ResponseOutcome())
    found = execute(model.backend.model, job.payload)
    values, made = opened(found)
    assert [value.shape[0] for value in values] == [len(job.keys)]
    assert (made["job"], made["dtype"], made["torch"]) == (job.id, "float32", torch.__version__)
    for less in range(len(found)):
        with pytest.raises(ValueError, match=r"their checksum is another one|nothing of what made them"):
            opened(found[:less])
    with pytest.raises(ValueError, match="their checksum is another one"):
        opened([found[0] * 2, *found[1:]])


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("outcome", [ResponseOutcome(), LogitOutcome((11,), (13,))], ids=lambda one: one.name)
def test_a_callers_autocast_changes_no_value(
    subject: Callable[[str], Subject], kind: torch.dtype, outcome: Outcome
) -> None:
    model = subject("llama")
    pair = token_pair("pair", answers=(3, 2))
    rows = [swap(pair, Site("mlp_neurons", 1, "all", (1, 2)), side, model.info) for side in (0, 1)]
    (job,) = model.plan([pair], rows, outcome)
    plain = model.backend.collect(model.backend.submit(job)).values
    with torch.autocast("cpu", dtype=kind):
        found = model.backend.collect(model.backend.submit(job)).values
    for value, wanted in zip(found, plain, strict=True):
        np.testing.assert_array_equal(value, wanted)


def test_changes_in_words() -> None:
    before = {"torch": "2.1", "revision": "", "host": "a", "device": "cpu", "old": "x"}
    assert changes(before, before) == ""
    assert changes(before, {**before, "host": "b", "device": "cuda", "job": "1", "new": "y"}) == ""
    now = {**before, "torch": "2.2", "revision": "abc"}
    assert changes(before, now) == "torch 2.1 before and 2.2 now, revision none before and abc now"
    assert changes({}, now) == ""
