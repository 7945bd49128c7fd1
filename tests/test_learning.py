"""A basis that is learnt by gradient: what training ran is what the engine and plain hooks measure of what came out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from oracle import LOGIT_DIFF, REFUSAL, RESPONSE_LOGPROB, TOLERANCE, Subject, token_pair

from remote_mediation.engine import learning, program
from remote_mediation.engine.answers import lengths_of
from remote_mediation.engine.budget import Budget, Setting
from remote_mediation.engine.learning import Lesson, fitting, learn_task, learnt_numbers
from remote_mediation.engine.rows import Row, swap
from remote_mediation.engine.tasks import plan_tasks
from remote_mediation.outcomes import Outcome
from remote_mediation.sites import Component
from remote_mediation.subspaces import Basis, Subspace
from remote_mediation.tokens import TokenPair

Subjects = Callable[[str], Subject]
# Blocks that return a tuple, multiply, normalise twice and slide, run in parallel; one that takes no cache.
FAMILIES = ("llama", "gptj", "granite", "gemma2_window", "gpt_neox", "lfm2")
WIDTH = 32


def pairs_of(outcome: Outcome) -> list[TokenPair]:
    """Of two shapes, the first of which three share."""
    answers = (3, 2) if outcome.name == "response_logprob" else (0, 0)
    pairs = [token_pair(f"p{between}", before=between, between=8 - between, answers=answers) for between in (3, 4, 5)]
    pairs.append(token_pair("unequal", edits=(3, 1), answers=answers))
    return [replace(pair, openings=REFUSAL.openings) for pair in pairs] if outcome.name == "refusal" else pairs


def start_at(component: Component, layer: int, position: str, size: int, seed: int = 0) -> Subspace:
    basis = Basis.random(size, WIDTH, np.random.default_rng(seed))
    return Subspace(component, layer, position, basis=basis)


def rows_of(model: Subject, pairs: list[TokenPair], site: Subspace) -> list[Row]:
    return [swap(pair, site, side, model.info) for pair in pairs for side in (0, 1)]


class Trained:
    """A training on pairs whose targets are what the other prompt gives."""

    def __init__(self, model: Subject, start: Subspace, outcome: Outcome) -> None:
        self.model, self.start, self.outcome, self.pairs = model, start, outcome, pairs_of(outcome)
        rows = [Row(pair.id, side) for pair in self.pairs for side in (0, 1)]
        y = model.measure(self.pairs, rows, outcome).reshape(-1, 2)
        self.targets, self.scale = y[:, ::-1], float(np.sqrt(np.mean((y[:, 1] - y[:, 0]) ** 2)))
        self.setting = Setting(model.info, "float32", outcome)
        lessons = [Lesson(pair, (both[0], both[1])) for pair, both in zip(self.pairs, self.targets, strict=True)]
        self.task = learn_task(lessons, start, self.scale, self.setting)
        (self.job,) = plan_tasks([self.task], self.setting, Budget(lambda: 1e18, 1e18))
        (values,) = model.backend.collect(model.backend.submit(self.job)).values
        count = start.basis.vectors.size
        self.count, self.losses = len(values), values[count:]
        self.basis = Basis(values[:count].reshape(start.basis.vectors.shape))

    def loss(self, outcomes: np.ndarray) -> float:
        """From its definition. outcomes: of `rows_of`."""
        return float(np.mean(((outcomes.reshape(-1, 2) - self.targets) / self.scale) ** 2))

    def loss_of(self, basis: Basis) -> float:
        """By the engine's rows."""
        rows = rows_of(self.model, self.pairs, replace(self.start, basis=basis))
        return self.loss(self.model.measure(self.pairs, rows, self.outcome))


@pytest.mark.parametrize("outcome", [LOGIT_DIFF, RESPONSE_LOGPROB, REFUSAL], ids=lambda outcome: outcome.name)
@pytest.mark.parametrize("name", FAMILIES)
def test_what_was_learnt_is_what_engine_and_hooks_measure(subject: Subjects, name: str, outcome: Outcome) -> None:
    model = subject(name)
    found = Trained(model, start_at("layer_output", 1, "last", 2), outcome)
    rows = rows_of(model, found.pairs, replace(found.start, basis=found.basis))
    measured = model.compare(found.pairs, rows, outcome)
    assert measured.deviation < TOLERANCE
    assert found.losses[-1] == pytest.approx(found.loss(measured.engine), abs=1e-4)
    assert found.losses[-1] == pytest.approx(found.loss(measured.oracle), abs=1e-4)
    assert found.losses[0] == pytest.approx(found.loss_of(found.start.basis), abs=1e-4)
    assert found.losses[-1] < 0.5 * found.losses[0]


@pytest.mark.parametrize(
    "start",
    [
        start_at("layer_output", 0, "edit", 3),
        start_at("mlp_output", 1, "all", 1),
        start_at("attention_output", 0, "all", 2),
    ],
    ids=str,
)
def test_it_learns_wherever_a_projection_is_swapped(subject: Subjects, start: Subspace) -> None:
    found = Trained(subject("llama"), start, LOGIT_DIFF)
    assert found.losses[-1] == pytest.approx(found.loss_of(found.basis), abs=1e-4)
    assert found.losses[-1] < 0.9 * found.losses[0]


def test_each_step_is_the_steepest(subject: Subjects, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against finite differences of the loss as the engine's rows give it."""
    monkeypatch.setattr(learning, "STEPS", 1)
    monkeypatch.setattr(learning, "ANGLE", 0.1)
    found = Trained(subject("llama"), start_at("layer_output", 1, "last", 1), LOGIT_DIFF)
    start = found.start.basis.vectors[0].astype(np.float64)
    slope = [
        found.loss_of(Basis.spanning(start + 0.02 * along)) - found.loss_of(Basis.spanning(start - 0.02 * along))
        for along in np.eye(WIDTH)
    ]
    tangent = slope - start * (slope @ start)
    expected = Basis.spanning(start - 0.1 * tangent / np.linalg.norm(tangent))
    assert abs(found.basis.cosine(expected.vectors[0])) > 0.99999
    assert abs(found.basis.cosine(start)) == pytest.approx(np.cos(np.arctan(0.1)), abs=1e-4)


def test_only_what_leads_out_of_a_subspace_turns_it() -> None:
    basis, out = torch.eye(5)[:2], torch.zeros(2, 5)
    out[0, 4] = 2.0
    moved = torch.tensor([[1.0, 0, 0, 0, -0.3], [0, 1.0, 0, 0, 0]])
    moved[0] /= moved[0].norm()
    for slope, expected in ((out + 7 * basis, moved), (7 * basis, basis), (torch.zeros(2, 5), basis)):
        turned = program.turned(basis, slope, 0.3)
        torch.testing.assert_close(turned.T @ turned, expected.T @ expected)
        torch.testing.assert_close(turned @ turned.T, torch.eye(2))


def test_pairs_of_one_shape_share_batches_and_memory_bounds_them(
    subject: Subjects, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = start_at("layer_output", 1, "last", 1)
    together = Trained(subject("llama"), start, LOGIT_DIFF)
    assert [part["targets"] for part in together.task.payload["parts"]] != []
    sizes = [[len(batch) for batch in part["targets"]] for part in together.task.payload["parts"]]
    assert sorted(map(sorted, sizes)) == [[1, 1], [6]]
    monkeypatch.setattr(learning, "_BYTES", 1.0)
    alone = Trained(subject("llama"), start, LOGIT_DIFF)
    assert sorted(len(batch) for part in alone.task.payload["parts"] for batch in part["targets"]) == [1, 1, 2, 2, 2]
    np.testing.assert_allclose(alone.losses, together.losses, atol=1e-3)
    assert fitting(alone.pairs, start, alone.setting) == alone.pairs[:1]
    assert alone.task.keys != together.task.keys


def test_as_many_numbers_come_back_as_are_expected(subject: Subjects) -> None:
    found = Trained(subject("llama"), start_at("layer_output", 1, "last", 3), LOGIT_DIFF)
    assert lengths_of(found.job) == [found.count]
    assert found.count == learnt_numbers(found.start.basis)


def test_another_start_is_another_task(subject: Subjects) -> None:
    model, outcome = subject("llama"), LOGIT_DIFF
    lessons, setting = [Lesson(pair, (1.0, 0.0)) for pair in pairs_of(outcome)], Setting(model.info, "float32", outcome)
    one = start_at("layer_output", 1, "last", 1)
    other = replace(one, basis=Basis.spanning(one.basis.vectors[0] + 1e-6 * np.eye(WIDTH)[0]))
    keys = [learn_task(lessons, start, scale, setting).keys for start in (one, other) for scale in (1.0, 2.0)]
    assert len(set(keys)) == 4
    assert learn_task(lessons, one, 1.0, setting).keys == keys[0]
