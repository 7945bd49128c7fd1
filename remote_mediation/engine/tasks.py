"""What rows cannot do, as jobs of the same kind: read activations, screen units by gradients, generate, measure drift.

Each is a context of a job of its own kind, with one key. Pure, as `jobs` is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from remote_mediation.config import Screen
from remote_mediation.engine.budget import LOGIT_COPIES, Budget, Setting, base_flops, layer_flops, prompt_flops
from remote_mediation.engine.jobs import Context, Job
from remote_mediation.engine.payload import Side, addressed, digest, model_spec, shifted, stack_payload
from remote_mediation.engine.rows import Constant, Scale
from remote_mediation.engine.unfold import tokens_run
from remote_mediation.errors import SiteError
from remote_mediation.sites import FORWARD_ORDER, Component, ModelInfo, Site, family_of
from remote_mediation.subspaces import Basis, Subspace
from remote_mediation.tokens import TokenPair

# Backward passes of a screening that share a batch; each keeps its whole graph in memory.
_CUTS_TOGETHER = 16
# Tokens of all rows of a batch of integrated gradients, whose graph is kept, too.
_LINE_TOKENS = 256
# Pairs whose estimates are summed where they arise.
_PAIRS_TOGETHER = 16
# Bytes of answer logits that the sets of a `direct` task may take at once.
_DIRECT_BYTES = 0.3e9

# What can be read of a layer, in the order in which it comes about; `layer_input` is the stream that enters it.
Readable = Component | Literal["layer_input"]
_READ_ORDER: tuple[Readable, ...] = ("layer_input", *FORWARD_ORDER)
Kind = Literal["read", "routing", "columns", "screen", "learn", "generate", "drift", "direct"]


class Reading(NamedTuple):
    """An activation to read: some columns (all if empty) of a component, averaged over token indices."""

    component: Readable
    layer: int
    places: tuple[int, ...]
    columns: tuple[int, ...] = ()


class Held(NamedTuple):
    """MLP neurons of one layer held at a value from the last prompt token on."""

    layer: int
    units: tuple[int, ...]
    value: Scale | Constant


@dataclass(frozen=True)
class Ablated:
    """Directions taken out of the residual stream at every token, of prompt and answer (arXiv 2406.11717).

    Out of embeddings, of what attention and MLP add, and of the stream after each layer.
    """

    basis: Basis


@dataclass(frozen=True)
class Added:
    """A vector added to the residual stream after one layer at every token, of prompt and answer (arXiv 2406.11717)."""

    layer: int
    vector: tuple[float, ...]
    """As wide as the stream."""


Intervention = Sequence[Held] | Ablated | Added


def read_task(pair: str, ids: tuple[int, ...], readings: Sequence[Reading], setting: Setting) -> Context:
    """Read activations of one prompt; values come back in the order of layers, then of `_READ_ORDER`."""
    ordered = sorted(readings, key=lambda one: (one.layer, _READ_ORDER.index(one.component)))
    by_layer = {
        layer: tuple(_reading_payload(one, setting.info) for one in group)
        for layer, group in groupby(ordered, key=lambda one: one.layer)
    }
    return task_context("read", (pair,), {"ids": ids, "reads": by_layer}, forward_flops(len(ids), setting), setting)


def _reading_payload(one: Reading, info: ModelInfo) -> tuple[Any, ...]:
    if one.component == "layer_input":
        return one.component, shifted(one.places, 0), shifted(one.columns, 0)
    component, columns = addressed(one.component, one.columns, info)
    return component, shifted(one.places, 0), columns


def columns_task(component: Component, setting: Setting) -> Context:
    """Norm of each unit's column of the weights that read a component: `[layer, unit]`; no prompt is run."""
    weights = 2.0 * setting.info.layers * setting.info.d_model * setting.info.tensor_width(component)
    return task_context("columns", (), {"component": component}, weights, setting)


def screen_tasks(
    pairs: Sequence[TokenPair],
    component: Component,
    position: str,
    setting: Setting,
    screen: Screen = "atp",
    *,
    dropping: bool = False,
    steps: int = 5,
) -> list[Context]:
    """Estimate NIE and TIE of every unit of a component at a position: `[base, variant, layer, unit]`, to be summed.

    One task for several pairs: what comes back is as large as all units of the model. dropping: GradDrop as a second
    variant beside AtP, which takes a backward pass more for every layer. steps: points of the mean of `ig`.

    Raises:
        SiteError: the screen is not defined for the model.
    """
    refuse_screen(screen, setting.info)
    cuts = 1 + setting.info.layers if dropping else 1
    manner: dict[str, Any] = {"cuts": cuts, "rows": _CUTS_TOGETHER}
    passes = cuts
    if screen == "relp":
        manner["relp"] = setting.info.gated
    if screen == "ig":
        points, weights = np.polynomial.legendre.leggauss(steps)
        manner["line"] = tuple(((1 + points) / 2).tolist()), tuple((weights / 2).tolist())
        longest = max((_length(pair, setting.info) - _start(pair, position, setting.info) for pair in pairs), default=1)
        manner["rows"] = _LINE_TOKENS // longest
        passes = steps * (1 + setting.info.layers) // 2  # a pass begins at the layer that it is of
    groups = [pairs[begin : begin + _PAIRS_TOGETHER] for begin in range(0, len(pairs), _PAIRS_TOGETHER)]
    return [_screen_task(group, component, position, setting, manner, passes) for group in groups]


def refuse_screen(screen: Screen, info: ModelInfo) -> None:
    """Refuse a way of screening that is not defined for a model.

    Raises:
        SiteError: relevance patching of a mixture of experts, or of layers without softmax attention.
    """
    if screen == "relp" and (info.experts or info.recurrent):
        lacking = "routed experts" if info.experts else "layers without softmax attention"
        raise SiteError(f"relevance patching has no rule for the {lacking} of {info.name}; screen by atp or ig")


def _screen_task(
    pairs: Sequence[TokenPair],
    component: Component,
    position: str,
    setting: Setting,
    manner: dict[str, Any],
    passes: int,
) -> Context:
    """manner: how estimates are made. passes: backward passes per prompt through the whole model."""
    parts, tokens = [], 0
    for pair in pairs:
        start, length = _start(pair, position, setting.info), _length(pair, setting.info)
        parts.append(_screened_pair(pair, position, start, setting))
        tokens += 2 * length + 6 * passes * (length - start)
    payload = {"component": component, **manner, "pairs": tuple(parts)}
    return task_context("screen", [pair.id for pair in pairs], payload, forward_flops(tokens, setting), setting)


def _screened_pair(pair: TokenPair, position: str, start: int, setting: Setting) -> dict[str, Any]:
    """Both prompts of a pair, with what is read of them. start: token from which on they are run."""
    return {
        "start": start,
        "stacks": tuple(stack_payload([Side(pair, number)], start, setting) for number in (0, 1)),
        "places": tuple(shifted(one, start) for one in pair.places(position)),
        **setting.outcome.payload(pair),
    }


def _start(pair: TokenPair, position: str, info: ModelInfo) -> int:
    """Token from which on a screening runs both prompts."""
    places = pair.places(position)
    return 0 if info.unfolded else min(min(places.x0), min(places.x1), *(len(prompt) - 1 for prompt in pair.prompts))


def _length(pair: TokenPair, info: ModelInfo) -> int:
    """Tokens of the longer one of a pair's packed prompts."""
    return max(tokens_run(pair, side, info) for side in (0, 1))


def direct_task(pairs: Sequence[TokenPair], sets: Sequence[Sequence[Site]], setting: Setting) -> Context:
    """Direct effects of sets of contributions at `last`, from one base run of each prompt (`direct_readouts`).

    pairs: of one and the same x0 (`sharing_x0`), which runs once. sets: sites whose component is `attention_output` or
    `mlp_output`; their position is taken to be `last`.

    Raises:
        SiteError: a subspace, or what is no whole contribution; its direct effect is not measured.
    """
    for sites in sets:
        for site in sites:
            _refuse_indirect(site)
    pair = pairs[0]
    sides = [Side(pair, 0), *(Side(one, 1) for one in pairs)]
    logits = (1 + pair.fed) * setting.info.vocab * 4 * LOGIT_COPIES
    payload = {
        "stacks": tuple(stack_payload([side], len(side.ids) - 1, setting) for side in sides),
        "others": (tuple(range(1, len(sides))), *((0,) for _ in pairs)),
        "sets": tuple(tuple((site.component, site.layer) for site in sites) for sites in sets),
        "rows": max(1, int(_DIRECT_BYTES / logits)),
    }
    flops = sum(prompt_flops(side.pair, side.number, setting) for side in sides)
    changed = direct_rows(len(pairs), len(sets)) - len(sides)
    flops += 2.0 * changed * (1 + pair.fed) * setting.info.d_model * setting.info.vocab
    return task_context("direct", [one.id for one in pairs], payload, flops, setting)


def sharing_x0(pairs: Iterable[TokenPair]) -> list[list[TokenPair]]:
    """Pairs, those together that have the same harmless prompt with the same answers behind it, as placebos have."""
    found: dict[Any, list[TokenPair]] = {}
    for pair in pairs:
        found.setdefault((pair.x0, pair.answers, pair.openings), []).append(pair)
    return list(found.values())


def direct_rows(pairs: int, sets: int) -> int:
    """How many answers a `direct` task reads: of every prompt as it is, and with each set as on each other one."""
    return 1 + pairs + 2 * pairs * sets


def direct_readouts(values: npt.NDArray[np.float32], pairs: int, sets: int) -> npt.NDArray[np.float32]:
    """What a `direct` task of so many pairs brought back as `[pair, side, set, read]`; the first set is none at all.

    values: `[(row, read)]` of x0 and each pair's x1 as they are, of x0 changed to each x1, and of these changed to x0.
    """
    rows = values.reshape(direct_rows(pairs, sets), -1)
    x0, x1, changed = np.split(rows, [1, 1 + pairs])
    plain = np.stack([np.broadcast_to(x0, x1.shape), x1])  # [side, pair, read]
    swapped = changed.reshape(2, pairs, sets, -1)
    return np.concatenate([plain[:, :, None], swapped], axis=2).swapaxes(0, 1)


def _refuse_indirect(site: Site) -> None:
    """What is no whole contribution to the stream."""
    if isinstance(site, Subspace):
        raise SiteError(f"direct effects are of whole contributions, not of {site.basis}; ask for its joint effect")
    if site.component not in ("attention_output", "mlp_output"):
        raise SiteError(
            f"direct effects are of attention_output and mlp_output, not of {site}; ask for its joint effect"
        )


def routing_task(pair: TokenPair, position: str, setting: Setting) -> Context:
    """Mean routing weight of each expert over a position's tokens, fed answers included: `[side, layer, expert]`.

    Layers without experts are left out; a weight is 0 where no token is routed to the expert.
    """
    places = pair.places(position)
    starts = [min(at) for at in places]
    stacks = tuple(stack_payload([Side(pair, side)], start, setting) for side, start in enumerate(starts))
    payload = {"stacks": stacks, "places": tuple(map(shifted, places, starts))}
    return task_context("routing", (pair.id,), payload, base_flops(pair, setting), setting)


def generate_task(prompts: Sequence[tuple[int, ...]], tokens: int, held: Intervention, setting: Setting) -> Context:
    """Continue prompts greedily while neurons are held or the stream is steered: `[prompt, token]` of token ids."""
    payload = {"prompts": tuple(prompts), "tokens": tokens, **_intervention_payload(held, setting)}
    flops = forward_flops(sum(len(ids) + tokens for ids in prompts), setting)
    return task_context("generate", (), payload, flops, setting)


def drift_task(
    pair: str, ids: tuple[int, ...], answer: tuple[int, ...], held: Intervention, setting: Setting
) -> Context:
    """What holding or steering changes along an answer: `[quantity, token]` of KL, plain loss and loss held (nats)."""
    payload = {"ids": ids, "answer": answer, **_intervention_payload(held, setting)}
    return task_context("drift", (pair,), payload, forward_flops(2 * (len(ids) + len(answer)), setting), setting)


def task_context(task: Kind, pairs: Sequence[str], payload: dict[str, Any], flops: float, setting: Setting) -> Context:
    """A context that is not made of rows. pairs: ids of those that it belongs to."""
    info = setting.info
    key = digest([info.name, info.revision, info.weights, setting.precision, task, payload])
    return Context(task, tuple(pairs), (key,), payload, flops)


def plan_tasks(tasks: Iterable[Context], setting: Setting, budget: Budget) -> Iterator[Job]:
    """Group contexts of one task into jobs that fit the budget of operations."""
    for _, group in groupby(sorted(tasks, key=lambda one: one.task), key=lambda one: one.task):
        together: list[Context] = []
        spent = 0.0
        for context in group:
            if together and spent + context.flops > budget.job_flops():
                yield Job(model_spec(setting), tuple(together))
                together, spent = [], 0.0
            together.append(context)
            spent += context.flops
        yield Job(model_spec(setting), tuple(together))


def _intervention_payload(held: Intervention, setting: Setting) -> dict[str, Any]:
    """What is held, or else steered; directions are sent, and hashed, once."""
    match held:
        case Ablated(basis):
            paths = family_of(setting.info.family).embedding_paths
            return {"held": {}, "ablated": {"embeddings": paths, "basis": tuple(map(tuple, basis.vectors.tolist()))}}
        case Added(layer, vector):
            return {"held": {}, "added": {"layer": layer, "vector": vector}}
        case _:
            return {"held": _held_payload(held)}


def _held_payload(held: Sequence[Held]) -> dict[int, Any]:
    layers: dict[int, tuple[Any, ...]] = {}
    for one in sorted(held, key=lambda one: one.layer):
        value = ("scale", one.value.factor) if isinstance(one.value, Scale) else ("constant", one.value.values)
        layers[one.layer] = (*layers.get(one.layer, ()), ("mlp_neurons", one.units, *value))
    return layers


def forward_flops(tokens: int, setting: Setting) -> float:
    """Operations of all layers on so many tokens of any prompts."""
    return layer_flops(setting.info, tokens, 0) * setting.info.layers
