"""From rows to jobs: what runs together, under which name, and what it will cost. Pure, and no weights are needed.

Pairs whose prompts and answers have the same lengths share their batches: a batch reads all weights of the model, for
however few rows. A job is as many pairs as fit its budget of floating-point operations; a pair that is more than a job
is cut between batches. A row is known by a key that hashes everything its values depend on, so a run that was cut
short, or planned with other budgets, finds again what it has already measured.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from remote_mediation.errors import SettingsError
from remote_mediation.outcomes import Outcome
from remote_mediation.prompts import TokenPair
from remote_mediation.rows import Constant, Row, Scale, Source, Value, Write
from remote_mediation.sites import FORWARD_ORDER, Component, ModelInfo, family_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Part of every row key: raise it when the meaning of a readout changes.
SCHEMA = 1
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Resident bytes of Python, torch, transformers, nnsight and what a run takes beside weights and batches
# (scripts/bench/memory measures them).
LIBRARIES = 0.6e9
DEFAULT_BATCH = 1e9
SMALLEST_BATCH = 0.1e9
# Layers' worth of a row's keys and values: shown to a layer and grown by it, of the one before, for the next one.
_CACHED_LAYERS = 3
# Copies of the answer logits that are alive at once: as computed, as float32, and inside logsumexp.
_LOGIT_COPIES = 3

_Item = TypeVar("_Item")
# Stack and place in it of each pair's prompts, by pair and side.
_Places = Mapping[tuple[str, int], tuple[int, int]]


class Setting(NamedTuple):
    """What all rows of a study share."""

    info: ModelInfo
    dtype: str
    outcome: Outcome


class Budget(NamedTuple):
    """What a job and a batch may cost."""

    job_flops: Callable[[], float]
    """Floating-point operations of the next job; asked anew for each, as the backend's speed becomes known."""
    batch_bytes: float
    """Memory of one batch's activations and of what base runs keep for it, in bytes."""


class Batch(NamedTuple):
    """Rows that run together from one token on, lower layers first."""

    start: int
    rows: tuple[Row, ...]


class Context(NamedTuple):
    """Pairs of one shape in one job, and their rows in the order in which they are measured."""

    pairs: tuple[TokenPair, ...]
    batches: tuple[Batch, ...]

    @property
    def rows(self) -> tuple[Row, ...]:
        """All rows."""
        return tuple(row for batch in self.batches for row in batch.rows)


class Side(NamedTuple):
    """One prompt of a pair."""

    pair: TokenPair
    number: int

    @property
    def ids(self) -> tuple[int, ...]:
        """Its tokens."""
        return self.pair.prompts[self.number]


class Part(NamedTuple):
    """One context of a job, as it is sent."""

    pairs: tuple[str, ...]
    """Ids of its pairs."""
    keys: tuple[str, ...]
    """Keys of the values it brings back; of a `measure` job the base prompts, then the rows."""
    payload: dict[str, Any]
    """The context's entry in `Job.payload`."""
    flops: float
    """Estimated floating-point operations."""
    rows: tuple[Row, ...] = ()
    """What the keys of a `measure` job stand for; base prompts are rows without writes."""


@dataclass(frozen=True)
class Job:
    """One unit of work for a backend."""

    task: str
    """What `program.perform` does with its contexts."""
    model: dict[str, Any]
    """The model's entry in the payload."""
    parts: tuple[Part, ...]
    """Its contexts."""

    @property
    def id(self) -> str:
        """Hash of its row keys, which hash everything its values depend on."""
        return digest(self.keys)

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys of the values it brings back, in order."""
        return tuple(key for part in self.parts for key in part.keys)

    @property
    def pairs(self) -> tuple[str, ...]:
        """Ids of the pairs in it."""
        return tuple(dict.fromkeys(pair for part in self.parts for pair in part.pairs))

    @property
    def payload(self) -> dict[str, Any]:
        """What `program.execute` takes: strings, numbers, tuples, ranges and dicts only."""
        return {"task": self.task, "model": self.model, "contexts": tuple(part.payload for part in self.parts)}

    @property
    def rows(self) -> int:
        """Rows it measures, base prompts not counted; contexts of the other tasks count as one each."""
        return sum(sum(bool(row.writes) for row in part.rows) if self.task == "measure" else 1 for part in self.parts)

    @property
    def flops(self) -> float:
        """Estimated floating-point operations."""
        return sum(part.flops for part in self.parts)


class Readout(NamedTuple):
    """What a job brought back."""

    values: list[npt.NDArray[np.float32]]
    """Per key of the job, the values of the outcome's reads."""
    seconds: float
    """Time the job took where it ran."""


class Backend(Protocol):
    """A place that runs jobs."""

    @property
    def info(self) -> ModelInfo:
        """Shape of its model."""
        ...

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Tokenizer of its model."""
        ...

    def submit(self, job: Job) -> str:
        """Hand over a job; what comes back is a ticket for its values, which outlives this process where it can.

        Raises:
            BackendError: it could not be handed over.
        """
        ...

    def collect(self, ticket: str) -> Readout:
        """Wait for a job's values.

        Raises:
            JobError: the job failed.
            LostJobError: nothing is known of this ticket (any more).
            BackendError: the backend could not be reached.
        """
        ...


class Keys:
    """Names rows by everything their values depend on, hashing what a pair's rows share only once."""

    def __init__(self, setting: Setting, pairs: Iterable[TokenPair]) -> None:
        info = setting.info
        shared = (SCHEMA, info.name, info.revision, info.weights, setting.dtype, setting.outcome.normalise)
        self._known: dict[Row, str] = {}
        self._prefixes = {
            pair.id: digest([*shared, pair.x0, pair.x1, pair.answers, setting.outcome.reads(pair)]) for pair in pairs
        }

    def __call__(self, row: Row) -> str:
        """The key of a row."""
        if row not in self._known:
            writes = [
                (w.component, w.layer, _brief(w.places), _brief(w.columns), repr(_brief_value(w))) for w in row.writes
            ]
            self._known[row] = digest([self._prefixes[row.pair], row.base, writes])
        return self._known[row]


def plan_jobs(
    rows: Iterable[Row], pairs: Mapping[str, TokenPair], setting: Setting, budget: Budget, keys: Keys
) -> Iterator[Job]:
    """Group rows into jobs, pairs of one shape together; duplicate rows are measured once.

    Rows without writes need no batch of their own: every context measures the base prompts of its pairs.
    """
    loads = [_load(pairs[name], group, setting) for name, group in _by(dict.fromkeys(rows), lambda row: row.pair)]
    contexts: list[Context] = []
    spent = 0.0
    for _, group in _by(loads, lambda load: _shape(load.pair)):
        pending = list(group)
        while pending:
            taken = _fitting(pending, budget.job_flops() - spent, budget.batch_bytes, setting)
            if taken:
                contexts.append(_context(taken, setting, budget))
                spent += sum(load.flops for load in taken)
                del pending[: len(taken)]
            elif contexts:
                yield _job(contexts, setting, keys)
                contexts, spent = [], 0.0
            else:
                yield from _cut(pending.pop(0), setting, budget, keys)
    if contexts:
        yield _job(contexts, setting, keys)


def layer_flops(info: ModelInfo, tokens: int, keys: int) -> float:
    """Floating-point operations of one layer over `tokens` tokens that attend to `keys` tokens each.

    Two per weight and token, and two matrix products of the attention (Kaplan et al. 2020, arXiv 2001.08361, table 1).
    """
    attention = 2 * info.d_model * info.d_head * (info.heads + info.kv_heads)
    mlp = (3 if info.gated else 2) * info.d_model * info.d_ff
    return 2.0 * tokens * (attention + mlp) + 4.0 * tokens * keys * info.heads * info.d_head


def run_from(row: Row, pair: TokenPair) -> int:
    """First token that a row has to run: its first written one, but no later than the one that predicts the answers."""
    return min(row.start, len(pair.prompts[row.base]) - 1)


def row_flops(row: Row, pair: TokenPair, setting: Setting) -> float:
    """Operations of one row in the engine: its tokens from the first written one on, its layers likewise."""
    length = len(pair.prompts[row.base]) + pair.fed
    layers = layer_flops(setting.info, length - run_from(row, pair), length) * (setting.info.layers - row.low)
    return layers + _unembedding_flops(pair, setting)


def base_flops(pair: TokenPair, setting: Setting) -> float:
    """Operations of a pair's two base runs."""
    lengths = [len(prompt) + pair.fed for prompt in pair.prompts]
    layers = sum(layer_flops(setting.info, length, length) for length in lengths) * setting.info.layers
    return layers + 2 * _unembedding_flops(pair, setting)


def row_bytes(pair: TokenPair, start: int, setting: Setting) -> float:
    """Peak memory of one row of a batch: answer logits, or one layer's activations, keys and values."""
    info, size = setting.info, DTYPE_BYTES[setting.dtype]
    length = max(len(prompt) for prompt in pair.prompts) + pair.fed
    logits = (1 + pair.fed) * info.vocab * 4 * _LOGIT_COPIES if setting.outcome.normalise else 0
    layer = (length - start) * (4 * info.d_model + 3 * info.d_ff) * size
    attention = 2 * length * info.heads * info.d_head * size + (length - start) * length * info.heads * size
    cache = 2 * _CACHED_LAYERS * length * info.kv_heads * info.d_head * size
    return max(logits, layer + attention + cache)


def held_bytes(pairs: Sequence[TokenPair], rows: Iterable[Row], setting: Setting) -> float:
    """Memory of what base runs keep for rows: keys and values, the stream, and the components that rows take."""
    info, size = setting.info, DTYPE_BYTES[setting.dtype]
    first, components = _captured(pairs, rows)
    width = info.d_model + sum(map(info.tensor_width, components))
    lengths = [len(prompt) + pair.fed for pair in pairs for prompt in pair.prompts]
    cached = 2 * info.kv_heads * info.d_head
    return float(info.layers * size * sum(length * cached + (length - first) * width for length in lengths))


def weight_bytes(info: ModelInfo, dtype: str) -> float:
    """Memory of the model's weights."""
    return (layer_flops(info, 1, 0) / 2 * info.layers + info.vocab * info.d_model * (1 if info.tied else 2)) * (
        DTYPE_BYTES[dtype]
    )


def batch_budget(setting: Setting, max_memory: float | None, here: bool) -> float:
    """Bytes that a batch's activations may take, of `max_memory` GB in all. here: the weights are on this machine.

    Raises:
        SettingsError: libraries and weights alone take as much.
    """
    if max_memory is None:
        return DEFAULT_BATCH
    fixed = LIBRARIES + weight_bytes(setting.info, setting.dtype) if here else 0.0
    left = max_memory * 1e9 - fixed
    if left < SMALLEST_BATCH:
        raise SettingsError(
            f"max_memory {max_memory:g} GB is too little: libraries and weights take {fixed / 1e9:.2f} GB; "
            f"give at least {math.ceil((fixed + SMALLEST_BATCH) / 1e7) / 100:.2f}"
        )
    return left


def batch_sizes(job: Job, pairs: Mapping[str, TokenPair], setting: Setting) -> list[float]:
    """Bytes of activations in each base run and batch of a `measure` job, with what its context keeps throughout."""
    sizes = []
    for part in job.parts:
        members = [pairs[name] for name in part.pairs]
        runs = [(len(stack["ids"]), 0) for stack in part.payload["stacks"]]
        runs += [(sum(map(len, batch["joining"])), batch["start"]) for batch in part.payload["batches"]]
        held = held_bytes(members, part.rows, setting)
        sizes += [held + rows * row_bytes(members[0], start, setting) for rows, start in runs]
    return sizes


def model_spec(setting: Setting) -> dict[str, Any]:
    """The part of a payload that describes the model."""
    family = family_of(setting.info.family)
    return {
        "blocks": family.blocks,
        "vocab": setting.info.vocab,
        "layers": setting.info.layers,
        "components": {component: tuple(family.hook(component)) for component in FORWARD_ORDER},
        "sliding": setting.info.sliding,
        "window": setting.info.window,
        "dtype": setting.dtype,
        "normalise": setting.outcome.normalise,
    }


def _unembedding_flops(pair: TokenPair, setting: Setting) -> float:
    read = setting.info.vocab if setting.outcome.normalise else len(setting.outcome.reads(pair))
    return 2.0 * (1 + pair.fed) * setting.info.d_model * read


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


def _shape(pair: TokenPair) -> tuple[int, ...]:
    """Lengths of both prompts and both answers; what makes tokens of two pairs stand at the same places."""
    return (*map(len, pair.prompts), *map(len, pair.answers))


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
    for batch in _context([load], setting, budget).batches:
        cost = sum(row_flops(row, load.pair, setting) for row in batch.rows)
        if batches and spent + cost > budget.job_flops():
            yield _job([Context((load.pair,), tuple(batches))], setting, keys)
            batches, spent = [], 0.0
        batches.append(batch)
        spent += cost
    yield _job([Context((load.pair,), tuple(batches))], setting, keys)


def _context(loads: Sequence[_Load], setting: Setting, budget: Budget) -> Context:
    """Rows by length of the prompt and first token, lower layers first, cut to the memory that base runs leave."""
    pairs = {load.pair.id: load.pair for load in loads}
    rows = [row for load in loads for row in load.rows]
    room = budget.batch_bytes - held_bytes(list(pairs.values()), rows, setting)
    batches = []
    for (_, start), group in _by(
        rows, lambda row: (len(pairs[row.pair].prompts[row.base]), run_from(row, pairs[row.pair]))
    ):
        ordered = sorted(group, key=lambda row: row.low)
        count = -(-len(ordered) // max(1, int(room / row_bytes(loads[0].pair, start, setting))))
        cuts = [part * len(ordered) // count for part in range(count + 1)]  # as few batches as fit, of even size
        batches += [Batch(start, tuple(ordered[begin:end])) for begin, end in pairwise(cuts)]
    return Context(tuple(pairs.values()), tuple(batches))


def _job(contexts: list[Context], setting: Setting, keys: Keys) -> Job:
    return Job("measure", model_spec(setting), tuple(_part(context, setting, keys) for context in contexts))


def _part(context: Context, setting: Setting, keys: Keys) -> Part:
    pairs, stacks = {pair.id: pair for pair in context.pairs}, _stacks(context.pairs)
    bases = [Row(side.pair.id, side.number) for stack in stacks for side in stack]
    flops = sum(base_flops(pair, setting) for pair in context.pairs)
    flops += sum(row_flops(row, pairs[row.pair], setting) for row in context.rows)
    rows = (*bases, *context.rows)
    return Part(tuple(pairs), tuple(map(keys, rows)), _context_payload(context, stacks, setting), flops, rows)


def _stacks(pairs: Sequence[TokenPair]) -> list[list[Side]]:
    """Prompts of pairs of one shape, those of one length together."""
    x0, x1 = ([Side(pair, number) for pair in pairs] for number in (0, 1))
    return [x0 + x1] if len(x0[0].ids) == len(x1[0].ids) else [x0, x1]


def _context_payload(context: Context, stacks: Sequence[Sequence[Side]], setting: Setting) -> dict[str, Any]:
    first, components = _captured(context.pairs, context.rows)
    places = {
        (side.pair.id, side.number): (number, place)
        for number, stack in enumerate(stacks)
        for place, side in enumerate(stack)
    }
    return {
        "stacks": tuple(stack_payload(stack, first, setting.outcome) for stack in stacks),
        "capture": tuple(component for component in FORWARD_ORDER if component in components),
        "batches": tuple(_batch_payload(batch, places, first, setting.info.layers) for batch in context.batches),
    }


def _captured(pairs: Iterable[TokenPair], rows: Iterable[Row]) -> tuple[int, set[Component]]:
    """What rows need of the base runs: from which token on, and which components."""
    writes = [write for row in rows for write in row.writes]
    sources = [(write.component, write.value.places) for write in writes if isinstance(write.value, Source)]
    begins = [*(write.places[0] for write in writes), *(taken[0] for _, taken in sources)]
    return min([*begins, *(pair.first for pair in pairs)]), {component for component, _ in sources}


def stack_payload(stack: Sequence[Side], first: int, outcome: Outcome) -> dict[str, Any]:
    """The packed sequences of prompts of one shape (segments: 0 prompt, 1 and 2 the answers), what is kept and read."""
    length = len(stack[0].ids)
    positions, segments = list(range(length)), [0] * length
    for segment, answer in enumerate(stack[0].pair.answers, 1):
        fed = max(len(answer) - 1, 0)
        positions += range(length, length + fed)
        segments += [segment] * fed
    reads = [outcome.reads(side.pair) for side in stack]
    return {
        "ids": tuple((*side.ids, *(token for answer in side.pair.answers for token in answer[:-1])) for side in stack),
        "positions": tuple(positions),
        "segments": tuple(segments),
        "first": first,
        "answers": tuple(range(length - 1, len(positions))),
        "queries": tuple(read.answer for read in reads[0]),
        "tokens": tuple(tuple(read.token for read in one) for one in reads),
    }


def _batch_payload(batch: Batch, places: _Places, first: int, layers: int) -> dict[str, Any]:
    low = batch.rows[0].low
    joining: list[list[int]] = [[] for _ in range(low, layers)]
    writes: dict[int, dict[str, list[Any]]] = {}
    for index, row in enumerate(batch.rows):
        joining[row.low - low].append(places[row.pair, row.base][1])
        for item in row.writes:
            value = _value_payload(item.value, row.pair, places, first)
            entry = (index, shifted(item.places, batch.start), _brief(item.columns), *value)
            writes.setdefault(item.layer, {}).setdefault(item.component, []).append(entry)
    return {
        "stack": places[batch.rows[0].pair, batch.rows[0].base][0],
        "start": batch.start,
        "low": low,
        "joining": tuple(map(tuple, joining)),
        "writes": {
            layer: tuple((name, tuple(parts[name])) for name in FORWARD_ORDER if name in parts)
            for layer, parts in writes.items()
        },
    }


def _value_payload(value: Value, pair: str, places: _Places, first: int) -> tuple[str, Any]:
    match value:
        case Source(side, taken):
            return "source", (*places[pair, side], shifted(taken, first))
        case Scale(factor):
            return "scale", factor
        case Constant(values):
            return "constant", values


def shifted(indices: tuple[int, ...], by: int) -> tuple[int, ...] | range:
    """Indices counted from another origin, as they are sent."""
    return _brief(tuple(index - by for index in indices))


def _brief(indices: tuple[int, ...]) -> tuple[int, ...] | range:
    """The same indices as a range where they are contiguous, which is what most are and what ships in a few bytes."""
    contiguous = bool(indices) and indices[-1] - indices[0] + 1 == len(indices)
    return range(indices[0], indices[-1] + 1) if contiguous else indices


def _brief_value(item: Write) -> Any:
    return (item.value.side, _brief(item.value.places)) if isinstance(item.value, Source) else item.value


def digest(data: Any) -> str:
    """Hash of nested tuples, lists, dicts, strings and numbers."""
    text = json.dumps(data, default=repr, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()
