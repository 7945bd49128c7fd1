"""What an analysis goes on to ask once the first wave is measured, counted before anything runs: at most so much.

The cost of an analysis is made of these parts. What hangs on what was found is taken to be as much as it may be.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from remote_mediation.engine.budget import base_flops, row_flops
from remote_mediation.engine.jobs import Context
from remote_mediation.engine.rows import swap
from remote_mediation.engine.tasks import forward_flops, generate_task
from remote_mediation.lab import Study
from remote_mediation.pairs import placebo_id
from remote_mediation.sites import Site
from remote_mediation.tokens import TokenPair


class Later(NamedTuple):
    """Forward runs and what they take."""

    rows: int = 0
    """Forward runs with a mediator overwritten."""
    flops: float = 0.0
    """Operations, those of prompts read, screened or continued included."""
    down: float = 0.0
    """Bytes of the numbers that come back."""

    def plus(self, *others: Later) -> Later:
        """All together."""
        return Later(*(sum(values) for values in zip(self, *others, strict=True)))

    def times(self, count: float) -> Later:
        """So many of it."""
        return Later(round(count * self.rows), count * self.flops, count * self.down)


def pairs_of(study: Study, split: str = "all") -> list[TokenPair]:
    """Pairs of a split (`all`, `discovery`, `heldout`)."""
    splits = study.splits() if split != "all" else {}
    return [pair for pair in study.pairs if split in ("all", splits.get(pair.id))]


def with_placebos(study: Study, pairs: Sequence[TokenPair]) -> list[TokenPair]:
    """Pairs, then the placebo pairs of those that have one."""
    known = {pair.id: pair for pair in study.placebos}
    wanted = [placebo_id(pair.id) for pair in pairs]
    return [*pairs, *(known[name] for name in wanted if name in known)]


def of_rows(study: Study, pairs: Sequence[TokenPair], site: Site) -> Later:
    """One row on each prompt, as if it overwrote this site."""
    rows = [(swap(pair, site, side, study.info), pair) for pair in pairs for side in (0, 1)]
    written = [(row, pair) for row, pair in rows if row.writes]
    flops = sum(row_flops(row, pair, study.setting) for row, pair in written)
    return Later(len(written), flops, 4.0 * sum(len(study.outcome.reads(pair)) for _, pair in written))


def of_bases(study: Study, pairs: Sequence[TokenPair]) -> Later:
    """The prompts as they are, which every wave of rows begins with."""
    return Later(0, sum(base_flops(pair, study.setting) for pair in pairs))


def of_tasks(tasks: Sequence[Context], numbers: int) -> Later:
    """So many numbers come back from each."""
    return Later(0, sum(task.flops for task in tasks), 4.0 * numbers * len(tasks))


def of_readings(study: Study, pairs: Sequence[TokenPair], numbers: int) -> Later:
    """So many activations are read on each prompt."""
    prompts = [ids for pair in pairs for ids in pair.prompts]
    return Later(0, forward_flops(sum(map(len, prompts)), study.setting), 4.0 * numbers * len(prompts))


def of_answers(study: Study, prompts: Sequence[tuple[int, ...]], tokens: int) -> Later:
    """Each prompt is continued by so many tokens."""
    return of_tasks([generate_task(prompts, tokens, (), study.setting)], len(prompts) * tokens)
