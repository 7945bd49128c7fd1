"""Learning a basis by gradient, as a job (`program.learn`): what it is taught, on how many pairs, and in which memory.

The rows that are run on the way are those that measure the basis afterwards, in the same batches, so that what was
learnt is what is measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from remote_mediation.engine.budget import (
    DEFAULT_BATCH,
    Setting,
    base_flops,
    graph_bytes,
    held_bytes,
    row_bytes,
    row_flops,
    run_from,
)
from remote_mediation.engine.jobs import Context, shape_of
from remote_mediation.engine.payload import Batch, Cohort, cohort_payload, stacks_of
from remote_mediation.engine.rows import Row, swap
from remote_mediation.engine.tasks import task_context
from remote_mediation.subspaces import Basis, Subspace
from remote_mediation.tokens import TokenPair

STEPS = 24
ANGLE = 0.3
"""Of the first step, in radians; all of them together turn by half a circle and more, where they go one way."""
_BYTES = DEFAULT_BATCH / 2
"""For what base runs keep, and for one batch with its graph."""


class Lesson(NamedTuple):
    """What the swaps of a pair should do."""

    pair: TokenPair
    targets: tuple[float, float]
    """Y that should come out where x0 is run, then x1, while the projection is as on the other prompt."""


def learn_task(lessons: Sequence[Lesson], start: Subspace, scale: float, setting: Setting) -> Context:
    """Learn a basis for a site: `[direction * width]` numbers of it, then the loss of each step and of what came out.

    start: the site, which all pairs have, with the basis to begin with. scale: change of Y that counts as 1.
    """
    info, basis = setting.info, start.basis
    targets = {(lesson.pair.id, side): lesson.targets[side] for lesson in lessons for side in (0, 1)}
    cohorts = list(_cohorts([lesson.pair for lesson in lessons], start, setting))
    payload = {
        "start": tuple(map(tuple, basis.vectors.tolist())),
        "steps": STEPS,
        "angle": ANGLE,
        "scale": scale,
        "rows": len(targets),
        "parts": tuple(_taught(cohort, targets, setting) for cohort in cohorts),
    }
    flops = 0.0
    for pair, _ in lessons:
        rows = [swap(pair, start, side, info) for side in (0, 1)]
        # Backwards takes twice what it takes forwards.
        flops += base_flops(pair, setting) + 3 * (STEPS + 1) * sum(row_flops(row, pair, setting) for row in rows)
    return task_context("learn", [lesson.pair.id for lesson in lessons], payload, flops, setting)


def learnt_numbers(basis: Basis) -> int:
    """How many come back."""
    return basis.vectors.size + STEPS + 1


def fitting(pairs: Sequence[TokenPair], start: Subspace, setting: Setting) -> list[TokenPair]:
    """The first pairs whose base runs can be kept while a basis is learnt; at least one."""
    taken: list[TokenPair] = []
    held = 0.0
    for pair in pairs:
        held += held_bytes([pair], [swap(pair, start, side, setting.info) for side in (0, 1)], setting)
        if taken and held > _BYTES:
            break
        taken.append(pair)
    return taken


def _cohorts(pairs: Sequence[TokenPair], start: Subspace, setting: Setting) -> Iterator[Cohort]:
    """Pairs of one shape together, as many as memory allows."""
    for _, group in groupby(sorted(pairs, key=shape_of), key=shape_of):
        alike = list(group)
        first = run_from(swap(alike[0], start, 0, setting.info), alike[0], setting.info)
        graph = graph_bytes(alike[0], first, setting.info.layers - start.layer, setting)
        most = max(1, int(_BYTES / (2 * max(graph, row_bytes(alike[0], 0, setting)))))
        for begin in range(0, len(alike), most):
            yield _cohort(alike[begin : begin + most], start, setting)


def _cohort(pairs: Sequence[TokenPair], start: Subspace, setting: Setting) -> Cohort:
    """Both swaps of some pairs; those of prompts of one length run together, from one token on."""
    by_id = {pair.id: pair for pair in pairs}

    def run(row: Row) -> tuple[int, int]:
        pair = by_id[row.pair]
        return len(pair.prompts[row.base]), run_from(row, pair, setting.info)

    rows = sorted((swap(pair, start, side, setting.info) for pair in pairs for side in (0, 1)), key=run)
    return Cohort(tuple(pairs), tuple(Batch(first, tuple(group)) for (_, first), group in groupby(rows, key=run)))


def _taught(cohort: Cohort, targets: dict[tuple[str, int], float], setting: Setting) -> dict[str, Any]:
    return {
        **cohort_payload(cohort, stacks_of(cohort.pairs), setting),
        **setting.outcome.payload(cohort.pairs[0]),
        "targets": tuple(tuple(targets[row.pair, row.base] for row in batch.rows) for batch in cohort.batches),
    }
