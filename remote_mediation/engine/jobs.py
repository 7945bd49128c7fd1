"""From rows to jobs: what runs together, under which name, and what it will cost. Pure, and no weights are needed.

Pairs whose prompts and answers have the same lengths share their batches: a batch reads all weights of the model, for
however few rows. A job is as many pairs as fit its budget of floating-point operations; a pair that is more than a job
is cut between batches. A row is known by a key that hashes everything its values depend on, so a run that was cut
short, or planned with other budgets, finds again what it has already measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from remote_mediation.engine.budget import Budget, Setting, base_flops, held_bytes, row_bytes, row_flops, run_from
from remote_mediation.engine.payload import Batch, Cohort, brief, cohort_payload, digest, model_spec, stacks_of
from remote_mediation.engine.rows import Reached, Row, Source, Value
from remote_mediation.tokens import TokenPair

# Part of every row key: raise it when the meaning of a readout changes.
SCHEMA = 1
_Item = TypeVar("_Item")


class Context(NamedTuple):
    """What a job measures at a time: rows of some pairs, or one of the tasks that are not made of rows.

    It is known by its keys, which hash all that its values depend on, so whatever it asks is resumed, retried and kept
    in the run folder alike.
    """

    task: str
    """What `program.perform` does with it."""
    pairs: tuple[str, ...]
    """Ids of its pairs."""
    keys: tuple[str, ...]
    """Of the values it brings back; of rows those of the base prompts first."""
    payload: dict[str, Any]
    """What the program takes."""
    flops: float
    """Estimated floating-point operations."""
    rows: tuple[Row, ...] = ()
    """What the keys stand for where it measures rows; base prompts are rows without writes."""


@dataclass(frozen=True)
class Job:
    """One unit of work for a backend."""

    model: dict[str, Any]
    """The model's entry in the payload."""
    contexts: tuple[Context, ...]
    """What it measures, all by the same task."""

    @property
    def task(self) -> str:
        """What `program.perform` does with its contexts."""
        return self.contexts[0].task

    @property
    def id(self) -> str:
        """Hash of its row keys, which hash everything its values depend on."""
        return digest(self.keys)

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys of the values it brings back, in order."""
        return tuple(key for context in self.contexts for key in context.keys)

    @property
    def pairs(self) -> tuple[str, ...]:
        """Ids of the pairs in it."""
        return tuple(dict.fromkeys(pair for context in self.contexts for pair in context.pairs))

    @property
    def payload(self) -> dict[str, Any]:
        """What `program.execute` takes: strings, numbers, tuples, ranges, dicts and tensors only."""
        contexts = tuple(context.payload for context in self.contexts)
        return {"task": self.task, "id": self.id, "model": self.model, "contexts": contexts}

    @property
    def rows(self) -> int:
        """Rows it measures, base prompts not counted; of the other tasks, as many as bring values back."""
        if self.task != "measure":
            return len(self.keys)
        return sum(bool(row.writes) for context in self.contexts for row in dict.fromkeys(context.rows))

    @property
    def flops(self) -> float:
        """Estimated floating-point operations."""
        return sum(context.flops for context in self.contexts)


class Readout(NamedTuple):
    """What a job brought back."""

    values: list[npt.NDArray[np.float32]]
    """Per key of the job, the values of the outcome's reads."""
    seconds: float
    """Time the job took where it ran."""
    job: str = ""
    """Id of the job, as it was told where it ran; empty where nobody says."""


class Keys:
    """Names rows by everything their values depend on, hashing what a pair's rows share only once."""

    def __init__(self, setting: Setting, pairs: Iterable[TokenPair]) -> None:
        info = setting.info
        shared = (SCHEMA, info.name, info.revision, info.weights, setting.precision, setting.outcome.normalise)
        self._known: dict[Row, str] = {}
        self._prefixes = {
            pair.id: digest([*shared, pair.x0, pair.x1, *_answered(pair), setting.outcome.reads(pair)])
            for pair in pairs
        }

    def __call__(self, row: Row) -> str:
        """The key of a row."""
        known = self._known.get(row)  # one look: the hash of a row is that of all its writes
        if known is None:
            writes = [
                (w.component, w.layer, brief(w.places), brief(w.columns), repr(self._brief(w.value)))
                for w in row.writes
            ]
            known = self._known[row] = digest([self._prefixes[row.pair], row.base, writes])
        return known

    def _brief(self, value: Value) -> Any:
        """A value in few words: one of another row by the key of that row."""
        match value:
            case Source(side, places):
                return side, brief(places)
            case Reached(row):
                return "reached", self(row)
        return value


def plan_jobs(
    rows: Iterable[Row], pairs: Mapping[str, TokenPair], setting: Setting, budget: Budget, keys: Keys
) -> Iterator[Job]:
    """Group rows into jobs, pairs of one shape together; duplicate rows are measured once.

    Rows without writes need no batch of their own: every cohort measures the base prompts of its pairs. A row whose
    values others take comes along in each of their batches.
    """
    every = with_sources(rows)
    loads = [_load(pairs[name], group, setting) for name, group in _by(every, lambda row: row.pair)]
    cohorts: list[Cohort] = []
    spent = 0.0
    for _, group in _by(loads, lambda load: shape_of(load.pair)):
        pending = list(group)
        while pending:
            taken = _fitting(pending, budget.job_flops() - spent, budget.batch_bytes, setting)
            if taken:
                cohorts.append(_cohort(taken, setting, budget))
                spent += sum(load.flops for load in taken)
                del pending[: len(taken)]
            elif cohorts:
                yield _job(cohorts, setting, keys)
                cohorts, spent = [], 0.0
            else:
                yield from _cut(pending.pop(0), setting, budget, keys)
    if cohorts:
        yield _job(cohorts, setting, keys)


def with_sources(rows: Iterable[Row]) -> dict[Row, None]:
    """Rows, once each, behind those that they take values from."""
    return dict.fromkeys(one for row in rows for one in (*row.sources, row))


def batch_sizes(job: Job, pairs: Mapping[str, TokenPair], setting: Setting) -> list[float]:
    """Bytes of activations in each base run and batch of a `measure` job, with what its context keeps throughout."""
    sizes = []
    for context in job.contexts:
        members = [pairs[name] for name in context.pairs]
        runs = [(len(stack["ids"]), 0) for stack in context.payload["stacks"]]
        runs += [(sum(map(len, batch["joining"])), batch["start"]) for batch in context.payload["batches"]]
        held = held_bytes(members, context.rows, setting)
        sizes += [held + rows * row_bytes(members[0], start, setting) for rows, start in runs]
    return sizes


class _Load(NamedTuple):
    """A pair with its rows and what they cost."""

    pair: TokenPair
    rows: tuple[Row, ...]
    flops: float
    held: float


def _load(pair: TokenPair, rows: Iterable[Row], setting: Setting) -> _Load:
    written = tuple(row for row in rows if row.writes)
    flops = base_flops(pair, setting) + sum(row_flops(row, pair, setting) for row in written)
    return _Load(pair, written, flops, held_bytes([pair], written, setting))


def _by(items: Iterable[_Item], key: Callable[[_Item], Any]) -> Iterator[tuple[Any, Iterator[_Item]]]:
    """Items grouped by a key, in its order; the order within a group stays."""
    return groupby(sorted(items, key=key), key=key)


def shape_of(pair: TokenPair) -> tuple[int, ...]:
    """Lengths of both prompts and all answers; what makes tokens of two pairs stand at the same places."""
    return (*map(len, pair.prompts), *map(len, pair.answers), *map(len, pair.openings))


def _answered(pair: TokenPair) -> list[Any]:
    """What is fed after the prompts."""
    return [pair.answers, pair.openings] if pair.openings else [pair.answers]


def _fitting(pending: Sequence[_Load], flops: float, room: float, setting: Setting) -> list[_Load]:
    """The first pairs that go together: their operations fit the job, and their base runs half the memory."""
    taken: list[_Load] = []
    spent = used = 0.0
    for load in pending:
        spent += load.flops
        used += load.held + 2 * row_bytes(load.pair, 0, setting)
        if spent > flops or (taken and used > room / 2):
            break
        taken.append(load)
    return taken


def _cut(load: _Load, setting: Setting, budget: Budget, keys: Keys) -> Iterator[Job]:
    """Jobs for a pair that is more than one."""
    batches: list[Batch] = []
    spent = 0.0
    for batch in _cohort([load], setting, budget).batches:
        cost = sum(row_flops(row, load.pair, setting) for row in batch.rows)
        if batches and spent + cost > budget.job_flops():
            yield _job([Cohort((load.pair,), tuple(batches))], setting, keys)
            batches, spent = [], 0.0
        batches.append(batch)
        spent += cost
    yield _job([Cohort((load.pair,), tuple(batches))], setting, keys)


def _cohort(loads: Sequence[_Load], setting: Setting, budget: Budget) -> Cohort:
    """Rows by length of the prompt and first token, lower layers first, cut to the memory that base runs leave."""
    pairs = {load.pair.id: load.pair for load in loads}
    rows = [row for load in loads for row in load.rows]
    room = budget.batch_bytes - held_bytes(list(pairs.values()), rows, setting)
    taken = {source for row in rows for source in row.sources}

    def length_and_start(row: Row) -> tuple[int, int]:
        pair = pairs[row.pair]
        return len(pair.prompts[row.base]), run_from(row, pair, setting.info)

    batches: list[Batch] = []
    for (_, start), group in _by([row for row in rows if row not in taken], length_and_start):
        most = max(1, int(room / row_bytes(loads[0].pair, start, setting)))
        batches += [Batch(start, part) for part in _parts(list(group), most)]
    return Cohort(tuple(pairs.values()), tuple(batches))


def _parts(rows: Sequence[Row], most: int) -> list[tuple[Row, ...]]:
    """At most so many rows each; those that take values from others come beside these."""
    alone, taking = ([row for row in rows if bool(row.sources) == takes] for takes in (False, True))
    return [*_even(alone, most), *_beside_sources(taking, most)]


def _even(rows: Sequence[Row], most: int) -> list[tuple[Row, ...]]:
    """As few batches as fit, of even size, lower layers first."""
    ordered = sorted(rows, key=lambda row: row.low)
    count = -(-len(ordered) // most)
    cuts = [part * len(ordered) // count for part in range(count + 1)] if count else []
    return [tuple(ordered[begin:end]) for begin, end in pairwise(cuts)]


def _beside_sources(rows: Sequence[Row], most: int) -> Iterator[tuple[Row, ...]]:
    """Batches of rows and of those that they take values from, which are few where rows that share them are neighbours.

    A row that is more than fits with its sources runs all the same: without them it cannot.
    """
    batch: dict[Row, None] = {}
    for row in rows:
        wanted = with_sources([row])
        if batch and len(batch | wanted) > most:
            yield tuple(sorted(batch, key=lambda one: one.low))
            batch = {}
        batch |= wanted
    if batch:
        yield tuple(sorted(batch, key=lambda one: one.low))


def _job(cohorts: list[Cohort], setting: Setting, keys: Keys) -> Job:
    return Job(model_spec(setting), tuple(_context(cohort, setting, keys) for cohort in cohorts))


def _context(cohort: Cohort, setting: Setting, keys: Keys) -> Context:
    pairs, stacks = {pair.id: pair for pair in cohort.pairs}, stacks_of(cohort.pairs)
    bases = [Row(side.pair.id, side.number) for stack in stacks for side in stack]
    flops = sum(base_flops(pair, setting) for pair in cohort.pairs)
    flops += sum(row_flops(row, pairs[row.pair], setting) for row in cohort.rows)
    rows = (*bases, *cohort.rows)
    payload = cohort_payload(cohort, stacks, setting)
    return Context("measure", tuple(pairs), tuple(map(keys, rows)), payload, flops, rows)
