"""Pairs of a split beside their placebos: every question is put to both, and answered as `[pair]` of the pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter

from remote_mediation.analyses.claims.verdicts import Bench, Both, Effect
from remote_mediation.engine.jobs import Context
from remote_mediation.engine.rows import Row, swap_all, swaps
from remote_mediation.engine.tasks import Reading, read_task
from remote_mediation.errors import JobError
from remote_mediation.lab import Floats, Indirect, Lab
from remote_mediation.pairs import placebo_id
from remote_mediation.sites import Component, Site
from remote_mediation.tokens import TokenPair

_Asked = TypeVar("_Asked")


@dataclass(frozen=True)
class Sample:
    """Pairs of a split that have a position."""

    lab: Lab
    pairs: tuple[TokenPair, ...]
    placebos: tuple[TokenPair, ...]
    """Of those pairs that have one; none where their Y is another one."""

    @classmethod
    def of(cls, lab: Lab, split: str, position: str = "last") -> Sample:
        """Pairs of `discovery`, `heldout` or `all` that have a position on both sides."""
        pairs = tuple(pair for pair in lab.pairs(split) if all(pair.places(position)))
        asked = lab.placebos(pairs) if lab.study.outcome.same_on_placebo else ()
        return cls(lab, pairs, tuple(one for one in asked if all(one.places(position))))

    @property
    def clusters(self) -> npt.NDArray[np.str_]:
        """`[pair]`."""
        return np.array([pair.cluster for pair in self.pairs])

    @property
    def reads_edit(self) -> bool:
        """Whether an answer token lies in the edit of a pair."""
        return any(pair.after == 0 for pair in self.pairs)

    def bench(self) -> Bench:
        """Total effects and what all statistics share."""
        study = self.lab.study
        return Bench(
            total=self.change(lambda pair: (Row(pair.id, 1), Row(pair.id, 0))),
            clusters=self.clusters,
            layers=study.info.layers,
            seed=study.config.seed,
            resamples=study.config.statistics.resamples,
            comparable=self.lab.study.outcome.same_on_placebo or not self.lab.placebos(self.pairs),
        )

    def effects(
        self, ask: Callable[[Sequence[_Asked], Sequence[TokenPair]], Indirect], asked: Sequence[_Asked]
    ) -> list[Effect]:
        """Effects of sets by `Lab.joint` or `Lab.direct`, of ways by `Lab.through`."""
        found = ask(asked, (*self.pairs, *self.placebos))
        return [Effect(self._both(nie), self._both(tie)) for nie, tie in zip(found.nie, found.tie, strict=True)]

    def rows(self, sets: Sequence[Sequence[Site]]) -> list[Row]:
        """What `effects` by `Lab.joint` measures."""
        return swaps(swap_all, sets, (*self.pairs, *self.placebos), self.lab.study.info)

    def change(self, rows: Callable[[TokenPair], tuple[Row, Row]]) -> Both:
        """Y of the first row minus Y of the second, on every pair."""
        asked = [rows(pair) for pair in (*self.pairs, *self.placebos)]
        found = self.lab.outcomes([row for both in asked for row in both]).reshape(-1, 2)
        return self._both(found[:, 0] - found[:, 1])

    def _both(self, values: Floats) -> Both:
        """Values of pairs, then of placebos, as values of pairs."""
        count = len(self.pairs)
        return Both(values[:count], self.spread(values[count:], np.nan))

    def spread(self, values: Floats, missing: float) -> Floats:
        """`[placebo, ...]` as `[pair, ...]`."""
        by_pair = np.full((len(self.pairs), *values.shape[1:]), missing)
        number = {placebo_id(pair.id): place for place, pair in enumerate(self.pairs)}
        for placebo, value in zip(self.placebos, values, strict=True):
            by_pair[number[placebo.id]] = value
        return by_pair


def activations(sample: Sample, component: Component, positions: Sequence[str]) -> Floats:
    """`[pair, side, layer, position, width]`, averaged over each position's prompt tokens; NaN in layers without."""

    def places(pair: TokenPair, side: int) -> list[tuple[int, ...]]:
        length = len(pair.prompts[side])
        return [tuple(at for at in pair.places(name)[side] if at < length) for name in positions]

    return activations_at(sample, component, places)


def activations_at(
    sample: Sample, component: Component, places: Callable[[TokenPair, int], list[tuple[int, ...]]]
) -> Floats:
    """`[pair, side, layer, place, width]`, averaged over a place's token indices; NaN in layers without."""
    study = sample.lab.study
    there = list(study.info.layers_with(component))

    def task(pair: TokenPair, side: int) -> Context:
        every = places(pair, side)
        readings = [Reading(component, layer, at) for layer in there for at in every]
        return read_task(pair.id, pair.prompts[side], readings, study.setting)

    read = np.array(sample.lab.run([task(pair, side) for pair in sample.pairs for side in (0, 1)]), dtype=np.float64)
    read = read.reshape(len(sample.pairs), 2, len(there), -1, study.info.tensor_width(component))
    found = np.full((*read.shape[:2], study.info.layers, *read.shape[3:]), np.nan)
    found[:, :, there] = read
    return found


def failing(lab: Lab, name: str, run: Callable[[], object]) -> str:
    """Why a backend cannot do something; empty where it can. Noted in the run folder, as a failure leaves no values.

    name: of the note. run: asks for it.
    """

    def attempt(_: object) -> str:
        try:
            run()
        except JobError as error:
            return str(error)
        return ""

    return lab.noted(name, attempt, TypeAdapter(str))
