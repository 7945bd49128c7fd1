"""Sampled answers as jobs: what a model says to a base prompt while mediators are swapped. Pure, and without weights.

Rows are those of the engine, on prompts that nothing is fed behind (`bare`). A row's answers are known by a key that
hashes everything they depend on, whichever rows are sampled beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from remote_mediation.engine.budget import DTYPE_BYTES, Budget, Setting, layer_flops
from remote_mediation.engine.jobs import Context, Job
from remote_mediation.engine.payload import addressed, brief, digest, model_spec, shifted
from remote_mediation.engine.rows import Constant, Given, Projected, Reached, Row, Scale, Source, Write
from remote_mediation.errors import SiteError
from remote_mediation.sites import FORWARD_ORDER, ModelInfo
from remote_mediation.tokens import TokenPair

# Part of every key: raise it when the meaning of a sample changes.
SCHEMA = 1
# Answers that are generated side by side at most: more do not run faster on a CPU, and jobs would become long.
_TOGETHER = 64
# Copies of a step's logits, in float32 or twice as wide, while a token is drawn from them.
_LOGIT_COPIES = 8


class Manner(NamedTuple):
    """How answers are generated."""

    samples: int
    """Answers per row."""
    tokens: int
    """Tokens of each; what follows its end is cut off later."""
    temperature: float = 1.0
    """Logits are divided by it; 0: the likeliest token, so that all samples are the same."""
    held: bool = False
    """Whether writes that reach the last prompt token go on at every new one, with their value there."""


class Samples(NamedTuple):
    """What came back for one row."""

    ids: Any
    """`[sample, token]` token ids."""
    logits: Any
    """`[sample, token]` the logits of these tokens where they were drawn."""


def bare(pair: TokenPair) -> TokenPair:
    """A pair whose prompts have nothing fed behind them, so that `last` is the last prompt token alone."""
    return replace(pair, answers=((), ()), openings=())


def sample_seed(pair: str, seed: int) -> int:
    """Seed of the uniform numbers that all rows of a pair share."""
    return int(digest(["sample", seed, pair]), 16) % 2**53


def sample_key(row: Row, pair: TokenPair, manner: Manner, seed: int, setting: Setting) -> str:
    """Hash of everything that the answers of a row depend on."""
    info = setting.info
    model = [info.name, info.revision, info.weights, setting.precision]
    writes = [[w.component, w.layer, brief(w.places), brief(w.columns), repr(w.value)] for w in row.writes]
    return digest(["sample", SCHEMA, *model, pair.prompts, row.base, writes, manner, seed])


def plan_samples(
    rows: Iterable[Row], pairs: Mapping[str, TokenPair], manner: Manner, seed: int, setting: Setting, budget: Budget
) -> Iterator[Job]:
    """Group rows into jobs, as many side by side as the memory allows.

    pairs: `bare`, by id. seed: the study's; of it and the pair's id come the uniform numbers.
    """
    contexts: list[Context] = []
    spent = 0.0
    for group in _groups(list(rows), pairs, manner, setting, budget):
        context = _context(group, pairs, manner, seed, setting)
        if contexts and spent + context.flops > budget.job_flops():
            yield Job(model_spec(setting), tuple(contexts))
            contexts, spent = [], 0.0
        contexts.append(context)
        spent += context.flops
    if contexts:
        yield Job(model_spec(setting), tuple(contexts))


def sample_flops(length: int, manner: Manner, info: ModelInfo) -> float:
    """Operations of one row's answers to a prompt of so many tokens."""
    tokens = manner.samples * (length + manner.tokens)
    return layer_flops(info, tokens, length) * info.layers + 2.0 * manner.samples * manner.tokens * (
        info.d_model * info.vocab
    )


def _groups(
    rows: Sequence[Row], pairs: Mapping[str, TokenPair], manner: Manner, setting: Setting, budget: Budget
) -> Iterator[list[Row]]:
    """Rows that are sampled side by side: of one pair where possible, and of prompts that are equally long."""
    ordered = sorted(rows, key=lambda row: (max(map(len, pairs[row.pair].prompts)), row.pair))
    group: list[Row] = []
    for row in ordered:
        length = max(map(len, pairs[row.pair].prompts))
        most = min(_TOGETHER, budget.batch_bytes / _sequence_bytes(length, manner, setting)) / manner.samples
        if group and len(group) >= int(most):
            yield group
            group = []
        group.append(row)
    if group:
        yield group


def _sequence_bytes(length: int, manner: Manner, setting: Setting) -> float:
    """Peak memory of one answer: its keys and values, one layer's activations of the prompt, and a step's logits."""
    info, size = setting.info, DTYPE_BYTES[setting.dtype]
    cache = 2 * info.layers * (length + manner.tokens) * info.kv_heads * info.d_head * size
    prompt = length * (4 * info.d_model + 3 * info.d_ff) * size + length * length * info.heads * size
    return float(cache + prompt + _LOGIT_COPIES * 4 * info.vocab)


def _context(
    rows: Sequence[Row], pairs: Mapping[str, TokenPair], manner: Manner, seed: int, setting: Setting
) -> Context:
    members = {row.pair: pairs[row.pair] for row in rows}
    prompts = list(dict.fromkeys(prompt for pair in members.values() for prompt in pair.prompts))
    payload = {
        "prompts": tuple(prompts),
        "rows": tuple(prompts.index(members[row.pair].prompts[row.base]) for row in rows),
        "seeds": tuple(sample_seed(row.pair, seed) for row in rows),
        **manner._asdict(),
        **_writes(rows, members, prompts, manner.held, setting.info),
    }
    keys = tuple(sample_key(row, members[row.pair], manner, seed, setting) for row in rows)
    flops = sum(sample_flops(len(members[row.pair].prompts[row.base]), manner, setting.info) for row in rows)
    return Context("sample", tuple(members), keys, payload, flops)


def _writes(
    rows: Sequence[Row],
    members: Mapping[str, TokenPair],
    prompts: Sequence[tuple[int, ...]],
    held: bool,
    info: ModelInfo,
) -> dict[str, Any]:
    """The writes at the prompts' tokens, those at every new token, and what of plain runs they take."""
    written = [
        _written(number, item, members[row.pair].prompts, row.base, prompts, info)
        for number, row in enumerate(rows)
        for item in row.writes
    ]
    first = [(one, (one.row, one.places, one.columns, *one.value)) for one in written]
    later = [(one, (one.row, range(1), one.columns, *_at_last(*one.value))) for one in written if held and one.ends]
    taken = _ordered([(one, ()) for one in written if one.taken])
    return {
        "writes": _ordered(first),
        "later": _ordered(later),
        "taken": {layer: tuple(name for name, _ in parts) for layer, parts in taken.items()},
    }


class _Written(NamedTuple):
    """A write of a row, as it is sent."""

    row: int
    """Number of the row."""
    layer: int
    component: str
    places: Any
    """Counted from the beginning of the longest prompt, as shorter ones are padded in front."""
    columns: Any
    value: tuple[str, Any]
    """Its kind, and what it is made of."""
    taken: bool
    """Whether the value is taken from a plain run."""
    ends: bool
    """Whether the last token of the prompt is among its places."""


def _written(
    number: int,
    item: Write,
    both: Sequence[tuple[int, ...]],
    base: int,
    prompts: Sequence[tuple[int, ...]],
    info: ModelInfo,
) -> _Written:
    """both: prompts of the row's pair. base: the one that is run."""
    width, length = max(map(len, prompts)), len(both[base])
    component, columns = addressed(item.component, item.columns, info)
    return _Written(
        number,
        item.layer,
        component,
        shifted(item.places, length - width),
        columns,
        _value(item, both, prompts, width),
        taken=isinstance(item.value, Source | Projected),
        ends=item.places[-1] == length - 1,
    )


def _ordered(entries: Iterable[tuple[_Written, Any]]) -> dict[int, Any]:
    """Entries by layer from below, and in each by component in the order of the forward pass."""
    by: dict[int, dict[str, list[Any]]] = {}
    for one, entry in entries:
        by.setdefault(one.layer, {}).setdefault(one.component, []).append(entry)
    return {
        layer: tuple((name, tuple(by[layer][name])) for name in FORWARD_ORDER if name in by[layer])
        for layer in sorted(by)
    }


def _value(
    item: Write, both: Sequence[tuple[int, ...]], prompts: Sequence[tuple[int, ...]], width: int
) -> tuple[str, Any]:
    match item.value:
        case Source(side, places):
            return "source", (prompts.index(both[side]), shifted(places, len(both[side]) - width))
        case Scale(factor):
            return "scale", factor
        case Constant(values):
            return "constant", values
        case Projected(side, places, basis, along):
            taken = (prompts.index(both[side]), shifted(places, len(both[side]) - width))
            return "projected", (*taken, basis.tensor, along.tensor)
        case Given(_, load):
            return "constant", load().tolist()
        case Reached():
            raise SiteError(
                f"{item.component} of layer {item.layer} is taken from another row, and answers are sampled from every "
                "row by itself; sample while sites are swapped instead"
            )


def _at_last(kind: str, value: Any) -> tuple[str, Any]:
    """A value at its last place alone."""
    if kind == "constant" and isinstance(value, list):  # a row of values per place
        return kind, value[-1:]
    if kind in ("scale", "constant"):
        return kind, value
    prompt, places, *bases = value
    return kind, (prompt, range(places[-1], places[-1] + 1), *bases)
