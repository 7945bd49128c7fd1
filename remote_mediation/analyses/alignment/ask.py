"""Mediators of another checkpoint: of the change that training made to the outcome, where in the model does it lie?

The prompt is the same in both models, only their weights differ. A set of mediators, at all tokens of the prompt, takes
the values that it has in the other model: *undone* is what the trained model loses of the change with the base's
values, *brought* is what the base gains of it with the trained model's. Both are read on harmful prompts, and on the
harmless ones beside them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from remote_mediation.engine.payload import digest
from remote_mediation.engine.rows import Given, Row, Write
from remote_mediation.engine.tasks import Reading, read_task
from remote_mediation.lab import Floats, Lab, Study
from remote_mediation.later import Later, of_bases, of_readings, of_rows, pairs_of
from remote_mediation.result import Finding, Findings
from remote_mediation.shares import share
from remote_mediation.sites import Component, Site, thirds
from remote_mediation.stats import estimate_means
from remote_mediation.tokens import TokenPair

ALIGNMENT_COLUMNS: dict[str, str] = {
    "prompts": "harmful (x1) or harmless (x0)",
    "mediators": "what takes the other model's values, at all tokens of the prompt; empty for the whole change",
    "quantity": "change (Y of the model - Y of the base), undone (in the model) or brought (in the base)",
    "mean": "over pairs, in the outcome's unit",
    "mean_low": "lower end of its 95% interval",
    "mean_high": "upper end",
    "share": "of the mean change on these prompts",
    "share_low": "lower end of its 95% interval",
    "share_high": "upper end",
    "n": "pairs",
    "clusters": "clusters of pairs",
    "reason": "why a number is missing, or why to read it with care",
}
PROMPTS = ("harmless", "harmful")
Mediator = tuple[Component, int]
_KINDS: dict[str, Component] = {"MLPs": "mlp_output", "attention": "attention_output"}


class _Models(NamedTuple):
    """The study on both checkpoints."""

    trained: Lab
    base: Lab


def analyse(lab: Lab, before: Findings) -> Finding:
    """`alignment.csv` (`ALIGNMENT_COLUMNS`)."""
    models = _Models(lab, lab.on_checkpoint(lab.study.config.alignment.base))
    rows = [row for side in (1, 0) for row in _rows(models, side)]
    return Finding({"alignment.csv": pd.DataFrame(rows, columns=list(ALIGNMENT_COLUMNS))})


def mediator_sets(layers: int) -> dict[str, tuple[Mediator, ...]]:
    """The MLPs and the attention of each third, and the stream where a third hands over to the next."""
    found: dict[str, tuple[Mediator, ...]] = {}
    for name, part in thirds(layers)._asdict().items():
        for kind, component in _KINDS.items():
            if part:
                found[f"{name} {kind}"] = tuple((component, layer) for layer in part)
    for name, part in list(thirds(layers)._asdict().items())[:-1]:
        if part:
            found[f"stream after the {name} third"] = (("layer_output", part[-1]),)
    return found


def cost(study: Study) -> Later:
    """What `analyse` asks for, at most."""
    pairs, sets = pairs_of(study), mediator_sets(study.info.layers)
    rows = of_rows(study, pairs, Site("mlp_output", 0, "all")).times(2 * len(sets))
    longer = max(len(ids) / (len(ids) - pair.first) for pair in pairs for ids in pair.prompts)
    return (
        of_bases(study, pairs)
        .times(6)
        .plus(Later(rows.rows, rows.flops * longer, rows.down), of_readings(study, pairs, 0).times(2))
    )


def _rows(models: _Models, side: int) -> list[dict[str, Any]]:
    """The whole change on the prompts of one side, then what each set undoes and brings of it."""
    lab, pairs = models.trained, models.trained.pairs()
    sets, clusters = mediator_sets(lab.study.info.layers), np.array([pair.cluster for pair in pairs])
    trained, base = (one.outcomes([Row(pair.id, side) for pair in pairs]) for one in models)
    change = trained - base
    undone = trained - _with_values_of(models.base, lab, pairs, side, list(sets.values()))
    brought = _with_values_of(lab, models.base, pairs, side, list(sets.values())) - base
    named = {"prompts": PROMPTS[side]}
    rows = [{**named, "mediators": "", "quantity": "change", **_columns(lab, change, change, clusters)}]
    for name, *both in zip(sets, undone, brought, strict=True):
        for quantity, found in zip(("undone", "brought"), both, strict=True):
            columns = _columns(lab, found, change, clusters)
            rows.append({**named, "mediators": name, "quantity": quantity, **columns})
    return rows


def _with_values_of(
    source: Lab, lab: Lab, pairs: Sequence[TokenPair], side: int, sets: Sequence[Sequence[Mediator]]
) -> Floats:
    """`[set, pair]`, Y while mediators have the values of the source's run of the same prompt.

    Pair by pair, as activations of all tokens are large.
    """
    found = [lab.outcomes([_row(source, pair, side, mediators) for mediators in sets]) for pair in pairs]
    return np.array(found).T


def _row(source: Lab, pair: TokenPair, side: int, mediators: Sequence[Mediator]) -> Row:
    """One prompt with mediators at all its tokens as another model has them."""
    ids = pair.prompts[side]
    info, places = source.study.info, tuple(range(len(ids)))
    read = cache(partial(_activations, source, pair.id, ids, tuple(mediators)))
    writes = []
    for number, (component, layer) in enumerate(mediators):
        name = digest([info.name, info.revision, info.weights, source.study.setting.precision, ids, component, layer])
        writes.append(Write(component, layer, places, (), Given(name, lambda at=number: read()[at])))  # type: ignore[misc]
    return Row(pair.id, side, tuple(writes))


def _activations(
    source: Lab, pair: str, ids: tuple[int, ...], mediators: tuple[Mediator, ...]
) -> list[npt.NDArray[np.float32]]:
    """`[place, column]` of each mediator, in their order, which is that of the forward pass."""
    readings = [Reading(component, layer, (at,)) for component, layer in mediators for at in range(len(ids))]
    values = source.read(read_task(pair, ids, readings, source.study.setting))
    return list(values.reshape(len(mediators), len(ids), -1))


def _columns(lab: Lab, found: Floats, change: Floats, clusters: npt.NDArray[np.str_]) -> dict[str, Any]:
    resamples = lab.study.config.statistics.resamples
    (mean,) = estimate_means([found], clusters, lab.rng("alignment"), resamples)
    part = share(found, change, clusters, lab.rng("alignment"), resamples)
    return {
        **mean.columns("mean"),
        **part.columns("share"),
        "n": mean.n_pairs,
        "clusters": mean.n_clusters,
        "reason": mean.reason or part.reason,
    }
