"""What a job takes along, as strings, numbers, tuples, ranges, dicts and tensors only: what `program` reads."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from remote_mediation.engine.budget import Setting, captured
from remote_mediation.engine.rows import Constant, Given, Projected, Reached, Row, Scale, Source, Value
from remote_mediation.engine.unfold import unfolding
from remote_mediation.sites import FORWARD_ORDER, PROJECTED_HEADS, Component, ModelInfo, family_of
from remote_mediation.tokens import TokenPair, trie

# Stack and place in it of each pair's prompts, by pair and side.
_Places = Mapping[tuple[str, int], tuple[int, int]]


class Batch(NamedTuple):
    """Rows that run together from one token on, lower layers first."""

    start: int
    rows: tuple[Row, ...]


class Cohort(NamedTuple):
    """Pairs of one shape that run together, and their rows in the order in which they are measured."""

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


def model_spec(setting: Setting) -> dict[str, Any]:
    """The part of a payload that describes the model."""
    family = family_of(setting.info.family)
    return {
        "blocks": family.blocks,
        "vocab": setting.info.vocab,
        "layers": setting.info.layers,
        "components": {component: tuple(hook) for component, hook in family.hooks.items()},
        "columns": {name: tuple(where) for name in PROJECTED_HEADS if (where := setting.info.columns_within(name))},
        "mixture": _mixture_payload(setting.info),
        "mixer": tuple(family.mixer or ()),
        "lacking": _lacking(setting.info),
        "factors": dict.fromkeys(("attention_output", "mlp_output"), setting.info.multiplier),
        "sliding": setting.info.sliding,
        "window": setting.info.window,
        "dtype": setting.dtype,
        "normalise": setting.outcome.normalise,
    }


def _lacking(info: ModelInfo) -> dict[str, tuple[int, ...]]:
    """Layers without a component that other layers have."""
    layers = {name: info.layers_with(name) for name in family_of(info.family).components}
    return {name: tuple(sorted({*range(info.layers)} - {*there})) for name, there in layers.items()}


def _mixture_payload(info: ModelInfo) -> dict[str, Any]:
    """Where the experts are, how many, and in which layers; empty for a model without."""
    mixture = family_of(info.family).mixture
    if mixture is None:
        return {}
    return {
        "module": mixture.module,
        "shared": mixture.shared_module,
        "gate": mixture.shared_gate,
        "experts": info.experts,
        "layers": info.routed,
    }


def stacks_of(pairs: Sequence[TokenPair]) -> list[list[Side]]:
    """Prompts of pairs of one shape, those of one length together."""
    x0, x1 = ([Side(pair, number) for pair in pairs] for number in (0, 1))
    return [x0 + x1] if len(x0[0].ids) == len(x1[0].ids) else [x0, x1]


def cohort_payload(cohort: Cohort, stacks: Sequence[Sequence[Side]], setting: Setting) -> dict[str, Any]:
    """A cohort as a context of `program.measure`."""
    first, components = captured(cohort.pairs, cohort.rows, setting.info)
    places = {
        (side.pair.id, side.number): (number, place)
        for number, stack in enumerate(stacks)
        for place, side in enumerate(stack)
    }
    return {
        "stacks": tuple(stack_payload(stack, first, setting) for stack in stacks),
        "capture": tuple(component for component in FORWARD_ORDER if component in components),
        "batches": tuple(_batch_payload(batch, places, first, setting.info) for batch in cohort.batches),
    }


def stack_payload(stack: Sequence[Side], first: int, setting: Setting) -> dict[str, Any]:
    """The packed sequences of prompts of one shape, what is kept of them and what is read.

    After the prompt come the fed answer tokens. Two answers are told apart by `segments` (0 prompt, 1 and 2); openings
    are packed as a trie, by the `parents` that they go on from.
    """
    length = len(stack[0].ids)
    packed = _trie_payload(stack[0], length) if stack[0].pair.openings else _answers_payload(stack[0], length)
    reads = [setting.outcome.reads(side.pair) for side in stack]
    return {
        "ids": tuple((*side.ids, *_fed(side.pair)) for side in stack),
        **packed,
        **unfolding(stack[0].pair, stack[0].number, setting.info),
        "first": first,
        "answers": tuple(range(length - 1, len(packed["positions"]))),
        "queries": tuple(read.answer for read in reads[0]),
        "tokens": tuple(tuple(read.token for read in one) for one in reads),
    }


def _fed(pair: TokenPair) -> tuple[int, ...]:
    if pair.openings:
        return tuple(node.token for node in trie(pair.openings).values())
    return tuple(token for answer in pair.answers for token in answer[:-1])


def _answers_payload(side: Side, length: int) -> dict[str, Any]:
    positions, segments = list(range(length)), [0] * length
    for segment, answer in enumerate(side.pair.answers, 1):
        fed = max(len(answer) - 1, 0)
        positions += range(length, length + fed)
        segments += [segment] * fed
    return {"positions": tuple(positions), "segments": tuple(segments)}


def _trie_payload(side: Side, length: int) -> dict[str, Any]:
    nodes = trie(side.pair.openings).values()
    return {
        "positions": (*range(length), *(length - 1 + node.depth for node in nodes)),
        "parents": tuple(length + node.parent for node in nodes),
    }


def _batch_payload(batch: Batch, places: _Places, first: int, info: ModelInfo) -> dict[str, Any]:
    low = batch.rows[0].low
    joining: list[list[int]] = [[] for _ in range(low, info.layers)]
    for row in batch.rows:
        joining[row.low - low].append(places[row.pair, row.base][1])
    return {
        "stack": places[batch.rows[0].pair, batch.rows[0].base][0],
        "start": batch.start,
        "low": low,
        "joining": tuple(map(tuple, joining)),
        "writes": _writes_payload(batch, places, first, info),
    }


def _writes_payload(batch: Batch, places: _Places, first: int, info: ModelInfo) -> dict[int, Any]:
    """What each row writes, by layer, and in each layer by component in the order of the forward pass."""
    numbers = {row: index for index, row in enumerate(batch.rows)}
    writes: dict[int, dict[str, list[Any]]] = {}
    for index, row in enumerate(batch.rows):
        for item in row.writes:
            value = _value_payload(item.value, row.pair, places, first, numbers)
            component, columns = addressed(item.component, item.columns, info)
            entry = (index, shifted(item.places, batch.start), columns, *value)
            writes.setdefault(item.layer, {}).setdefault(component, []).append(entry)
    return {
        layer: tuple((name, _reached_first(parts[name])) for name in FORWARD_ORDER if name in parts)
        for layer, parts in writes.items()
    }


def _reached_first(entries: Sequence[Any]) -> tuple[Any, ...]:
    """Writes to one tensor: first those that take what is in another row, then what that row itself writes there."""
    return tuple(sorted(entries, key=lambda entry: entry[3] != "reached"))


def _value_payload(value: Value, pair: str, places: _Places, first: int, numbers: Mapping[Row, int]) -> tuple[str, Any]:
    """A kind of value and what it is made of. numbers: place of each row in its batch."""
    match value:
        case Source(side, taken):
            return "source", (*places[pair, side], shifted(taken, first))
        case Scale(factor):
            return "scale", factor
        case Constant(values):
            return "constant", values
        case Projected(side, taken, basis, along):
            return "projected", (*places[pair, side], shifted(taken, first), basis.tensor, along.tensor)
        case Given(_, load):
            return "constant", load().tolist()
        case Reached(row):
            return "reached", numbers[row]


def addressed(
    component: Component, columns: tuple[int, ...], info: ModelInfo
) -> tuple[Component, tuple[int, ...] | range | str | dict[int, Any]]:
    """A component and its columns as the program names them: all parts of experts are some of the experts."""
    if component == "shared_expert_output":
        return "expert_output", "shared"
    if component == "expert_neurons":
        every = columns or range(info.width(component))
        by_expert = groupby(every, key=lambda unit: unit // info.expert_ff)
        return "expert_output", {
            expert: brief(tuple(unit % info.expert_ff for unit in units)) for expert, units in by_expert
        }
    return component, brief(columns)


def shifted(indices: tuple[int, ...], by: int) -> tuple[int, ...] | range:
    """Indices counted from another origin, as they are sent."""
    return brief(tuple(index - by for index in indices))


def brief(indices: tuple[int, ...]) -> tuple[int, ...] | range:
    """The same indices as a range where they are contiguous, which is what most are and what ships in a few bytes."""
    contiguous = bool(indices) and indices[-1] - indices[0] + 1 == len(indices)
    return range(indices[0], indices[-1] + 1) if contiguous else indices


def digest(data: Any) -> str:
    """Hash of nested tuples, lists, dicts, strings and numbers."""
    text = json.dumps(data, default=repr, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()
