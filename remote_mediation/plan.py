"""From rows to jobs: what runs together, under which name, and what it will cost. Pure, and no weights are needed.

Rows of one pair, base prompt and first token make a batch; a job is as many batches, of as many pairs, as fit its
budget of floating-point operations. A row is known by a key that hashes everything its values depend on, so a run that
was cut short, or planned with other budgets, finds again what it has already measured.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from remote_mediation.errors import SettingsError
from remote_mediation.outcomes import Outcome
from remote_mediation.prompts import TokenPair
from remote_mediation.rows import Constant, Row, Scale, Source, Write
from remote_mediation.sites import FORWARD_ORDER, ModelInfo, family_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Part of every row key: raise it when the meaning of a readout changes.
SCHEMA = 1
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Resident bytes of Python, torch, transformers, nnsight and what a run takes beside weights and batches
# (scripts/bench/memory measures them).
LIBRARIES = 0.55e9
DEFAULT_BATCH = 1e9
SMALLEST_BATCH = 0.1e9
# Copies of the answer logits that are alive at once: as computed, as float32, and inside logsumexp.
_LOGIT_COPIES = 3


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
    """Memory of one batch's activations, in bytes."""


class Context(NamedTuple):
    """The rows of one pair in one job, in the order in which they are measured."""

    pair: TokenPair
    batches: tuple[tuple[Row, ...], ...]


class Part(NamedTuple):
    """One context of a job, as it is sent."""

    pair: str
    """Id of the pair."""
    keys: tuple[str, ...]
    """Keys of the values it brings back; of a `measure` job both base prompts, then the rows."""
    payload: dict[str, Any]
    """The context's entry in `Job.payload`."""
    flops: float
    """Estimated floating-point operations."""


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
    def payload(self) -> dict[str, Any]:
        """What `program.execute` takes: strings, numbers, tuples, ranges and dicts only."""
        return {"task": self.task, "model": self.model, "contexts": tuple(part.payload for part in self.parts)}

    @property
    def rows(self) -> int:
        """Rows it measures, base prompts not counted; contexts of the other tasks count as one each."""
        return sum(len(part.keys) - 2 if self.task == "measure" else 1 for part in self.parts)

    @property
    def flops(self) -> float:
        """Estimated floating-point operations."""
        return sum(part.flops for part in self.parts)

    def split(self) -> list[Job]:
        """One job per context, so that one pair's failure is its own."""
        return [Job(self.task, self.model, (part,)) for part in self.parts]


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

    def answer(self, prompts: Sequence[tuple[int, ...]], tokens: int) -> list[tuple[int, ...]]:
        """The model's greedy answers to prompts, up to `tokens` tokens each, end-of-text tokens left out."""
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
    rows: Iterable[Row], pairs: dict[str, TokenPair], setting: Setting, budget: Budget, keys: Keys
) -> Iterator[Job]:
    """Group rows into jobs, pair by pair; duplicate rows are measured once.

    Rows without writes need no batch of their own: every context measures both base prompts.
    """
    unique = dict.fromkeys(rows)
    contexts: list[Context] = []
    spent = 0.0
    for pair_id, group in groupby(sorted(unique, key=lambda row: row.pair), key=lambda row: row.pair):
        pair = pairs[pair_id]
        for batch in list(_batches([row for row in group if row.writes], pair, setting, budget)) or [()]:
            cost = sum(row_flops(row, pair, setting) for row in batch)
            if contexts and spent + cost > budget.job_flops():
                yield _job(contexts, setting, keys)
                contexts, spent = [], 0.0
            if not contexts or contexts[-1].pair.id != pair_id:
                contexts.append(Context(pair, ()))
                spent += base_flops(pair, setting)
            contexts[-1] = contexts[-1]._replace(batches=(*contexts[-1].batches, *([batch] if batch else ())))
            spent += cost
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
    """Peak memory of one row of a batch: answer logits, one layer's activations, and keys and values of all layers."""
    info, size = setting.info, DTYPE_BYTES[setting.dtype]
    length = max(len(prompt) for prompt in pair.prompts) + pair.fed
    logits = (1 + pair.fed) * info.vocab * 4 * _LOGIT_COPIES if setting.outcome.normalise else 0
    layer = (length - start) * (4 * info.d_model + 3 * info.d_ff) * size
    attention = 2 * length * info.heads * info.d_head * size + (length - start) * length * info.heads * size
    cache = 2 * info.layers * length * info.kv_heads * info.d_head * size
    return max(logits, layer + attention) + cache


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
    """Bytes of each batch's activations in a `measure` job."""
    return [
        sum(batch["joining"]) * row_bytes(pairs[part.pair], batch["start"], setting)
        for part in job.parts
        for batch in part.payload["batches"]
    ]


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


def _batches(rows: list[Row], pair: TokenPair, setting: Setting, budget: Budget) -> Iterator[tuple[Row, ...]]:
    """Rows of one pair by base prompt and first token, lower layers first, cut to the memory budget."""
    by_start: Callable[[Row], tuple[int, int]] = lambda row: (row.base, run_from(row, pair))  # noqa: E731
    for (_, start), group in groupby(sorted(rows, key=by_start), key=by_start):
        ordered = sorted(group, key=lambda row: row.low)
        size = max(1, int(budget.batch_bytes / row_bytes(pair, start, setting)))
        count = -(-len(ordered) // size)  # as few batches as fit, of even size
        for part in range(count):
            yield tuple(ordered[part * len(ordered) // count : (part + 1) * len(ordered) // count])


def _job(contexts: list[Context], setting: Setting, keys: Keys) -> Job:
    return Job("measure", model_spec(setting), tuple(_part(context, setting, keys) for context in contexts))


def _part(context: Context, setting: Setting, keys: Keys) -> Part:
    pair, rows = context.pair, [row for batch in context.batches for row in batch]
    names = tuple(keys(row) for row in (Row(pair.id, 0), Row(pair.id, 1), *rows))
    flops = base_flops(pair, setting) + sum(row_flops(row, pair, setting) for row in rows)
    return Part(pair.id, names, _context_payload(context, setting), flops)


def _context_payload(context: Context, setting: Setting) -> dict[str, Any]:
    pair, writes = context.pair, [write for batch in context.batches for row in batch for write in row.writes]
    sources = [(write.component, write.value) for write in writes if isinstance(write.value, Source)]
    used = {component for component, _ in sources}
    first = min([pair.first, *(write.places[0] for write in writes), *(source.places[0] for _, source in sources)])
    return {
        "prompts": tuple(side_payload(pair, side, first, setting.outcome) for side in (0, 1)),
        "capture": tuple(component for component in FORWARD_ORDER if component in used),
        "batches": tuple(_batch_payload(batch, pair, first, setting.info.layers) for batch in context.batches),
    }


def side_payload(pair: TokenPair, side: int, first: int, outcome: Outcome) -> dict[str, Any]:
    """The packed sequence (segments: 0 prompt, 1 and 2 the answers), and what is kept and read of it."""
    prompt = pair.prompts[side]
    ids, positions, segments = list(prompt), list(range(len(prompt))), [0] * len(prompt)
    for segment, answer in enumerate(pair.answers, 1):
        ids += answer[:-1]
        positions += range(len(prompt), len(prompt) + max(len(answer) - 1, 0))
        segments += [segment] * max(len(answer) - 1, 0)
    return {
        "ids": tuple(ids),
        "positions": tuple(positions),
        "segments": tuple(segments),
        "first": first,
        "answers": tuple(range(len(prompt) - 1, len(ids))),
        "reads": tuple((read.answer, read.token) for read in outcome.reads(pair)),
    }


def _batch_payload(batch: tuple[Row, ...], pair: TokenPair, first: int, layers: int) -> dict[str, Any]:
    low, start = batch[0].low, run_from(batch[0], pair)
    joining = [0] * (layers - low)
    writes: dict[int, dict[str, list[Any]]] = {}
    for index, row in enumerate(batch):
        joining[row.low - low] += 1
        for item in row.writes:
            entry = (index, shifted(item.places, start), _brief(item.columns), *_value_payload(item, first))
            writes.setdefault(item.layer, {}).setdefault(item.component, []).append(entry)
    return {
        "base": batch[0].base,
        "start": start,
        "low": low,
        "joining": tuple(joining),
        "writes": {
            layer: tuple((name, tuple(parts[name])) for name in FORWARD_ORDER if name in parts)
            for layer, parts in writes.items()
        },
    }


def _value_payload(item: Write, first: int) -> tuple[str, Any]:
    match item.value:
        case Source(side, places):
            return "source", (side, shifted(places, first))
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
