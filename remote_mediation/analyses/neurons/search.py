"""How single neurons are found; each way ends in exact measurements on the discovery split.

- `gradient`: a screen, by default attribution patching, ranks all neurons in a few passes (`program.screen`), the first
  ones are measured. What it may have missed is estimated from a random sample of the others, and how far its estimates
  agree with what was measured is told (`agreement`).
- `windows`: whole layers are split into ever smaller windows, only where an interval leaves room for a mediator. Rows
  grow with the number of mediators and the logarithm of the width. Neurons that cancel within a window are missed.
- `all`: every neuron is measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from remote_mediation.analyses.neurons.agreement import SCREEN_COLUMNS, agreement
from remote_mediation.config import Screen, StudyConfig
from remote_mediation.engine.jobs import Context
from remote_mediation.engine.tasks import screen_tasks
from remote_mediation.errors import JobError, SiteError
from remote_mediation.lab import Floats, Lab, Study
from remote_mediation.sites import ModelInfo, Site
from remote_mediation.stats import estimate_means, sparsity, wilson
from remote_mediation.summary import UNITS
from remote_mediation.tokens import TokenPair

LAYERS, WINDOWS, SAMPLE = "neurons", "neurons:windows", "neurons:sample"
"""What the effects of whole MLPs, of windows and of the random sample count as; single neurons are `summary.UNITS`."""
# A window that may hold a mediator is split into so many.
BRANCHES = 4
_RESAMPLES = 999

SEARCH_COLUMNS: dict[str, str] = {
    "step": "what was measured",
    "sites": "neurons or windows measured",
    "pairs": "pairs they were measured on",
    "kept": "those that may be or hold a mediator, as far as the discovery split can tell",
    "followed": "those of them that were followed; fewer than kept where the study's limit cut the search short",
    "missed": "estimated mediators among the neurons that were not measured",
    "missed_high": "upper end of its 95% interval",
}
SPARSITY_COLUMNS: dict[str, str] = {
    "layer": "decoder layer, from 0",
    "gini": "Gini index of the neurons' NIE (its positive part)",
    "fewest": "fewest neurons whose NIE adds up to 80% of all positive ones",
    "of": "neurons of the layer",
    "negative_share": "share of the profile that works the other way",
    "by": "measured, or the screen that estimated it",
}
SCREEN_NAMES: dict[Screen, str] = {
    "atp": "attribution patching",
    "relp": "relevance patching",
    "ig": "integrated gradients",
}


class Ranking(NamedTuple):
    """What a search leaves."""

    ranked: dict[int, list[int]]
    """By layer its neurons, the strongest first; perhaps not all of them."""
    steps: list[dict[str, Any]]
    """Rows of `SEARCH_COLUMNS`."""
    profiles: pd.DataFrame
    """Rows of `SPARSITY_COLUMNS`."""
    screen: pd.DataFrame | None = None
    """Rows of `SCREEN_COLUMNS`, where a screen ranked."""


def search(lab: Lab) -> Ranking:
    """The first way of searching that the backend can go.

    Raises:
        SiteError: it can go none.
    """
    ways = {"gradient": _by_gradient, "windows": _by_windows, "all": _all}
    refusals = []
    for way in lab.study.config.neurons.search:
        try:
            return ways[way](lab)
        except JobError as error:  # a sandboxed server, or a model whose weights allow no gradient
            refusals.append(f"{way}: {error}")
    raise SiteError(
        f"the neurons could not be searched ({'; '.join(refusals)}); allow another way, as neurons.search = "
        '["gradient", "windows"]'
    )


def _by_gradient(lab: Lab) -> Ranking:
    """Rank by a screen, measure the first `exact` and a sample of the others."""
    study, screen = lab.study, lab.study.config.neurons.screen
    layers = layers_of(study.config, study.info)
    scores = _screened(lab, position_of(lab))
    order = _ranked(scores.rank)
    part = _measure_part(lab, order)
    strong = strengths(part.first)
    reached = int((strong >= _least(lab, part.first)).sum())
    missed = _missed(lab, part)
    steps = [
        _step("screened by gradients", study.info.d_ff * len(layers), lab, part.firsts),
        _step("measured, first ranks", part.firsts, lab, reached, "all"),
        missed,
    ]
    nie = direction_of(lab.effects) * scores.means[0]
    by_layer = {layer: nie[layer] for layer in layers}
    agreed = agreement(screen, scores.means, (part.first, part.sample), reached, missed["missed"])
    return Ranking(
        _exact_first(strong, order),
        steps,
        _profiles(by_layer, SCREEN_NAMES[screen]),
        pd.DataFrame(agreed, columns=list(SCREEN_COLUMNS)),
    )


class _MeasuredPart(NamedTuple):
    """What is measured of the neurons that a screen has ranked."""

    first: pd.DataFrame
    """Effects of the first ranks, on all pairs."""
    sample: pd.DataFrame
    """Effects of a random sample of the others, on the discovery pairs."""
    firsts: int
    """Neurons of the first ranks."""
    sampled: int
    """Neurons of the sample."""
    others: int
    """Neurons that the sample was drawn from."""


def _measure_part(lab: Lab, order: Sequence[tuple[int, int]]) -> _MeasuredPart:
    """The first `exact` neurons of a ranking, and as many of the others."""
    exact, position = lab.study.config.neurons.exact, position_of(lab)
    first, rest = order[:exact], order[exact:]
    sample = [rest[i] for i in sorted(lab.rng("sample").permutation(len(rest))[:exact])]
    return _MeasuredPart(
        lab.measure_sites(UNITS, [_unit(position, *one) for one in first]),
        lab.measure_sites(SAMPLE, [_unit(position, *one) for one in sample], "discovery"),
        firsts=len(first),
        sampled=len(sample),
        others=len(rest),
    )


def _exact_first(strong: pd.Series, order: Sequence[tuple[int, int]]) -> dict[int, list[int]]:
    """By layer the neurons that were measured to act with TE, the strongest first; then all others as ranked.

    strong: `strengths` of those that were measured.
    """
    exact = dict.fromkeys((int(layer), int(unit)) for layer, unit, _ in strong[strong > 0].index)
    return _by_layer([*exact, *(one for one in order if one not in exact)])


def _ranked(scores: Floats) -> list[tuple[int, int]]:
    """Layer and unit of every finite score, the highest first. scores: `[layer, unit]`."""
    falling = np.argsort(-scores, axis=None, kind="stable")
    layers, units = np.unravel_index(falling[np.isfinite(scores.flat[falling])], scores.shape)
    return list(zip(layers.tolist(), units.tolist(), strict=True))


def _missed(lab: Lab, part: _MeasuredPart) -> dict[str, Any]:
    """A step: how many mediators are among the neurons that were not measured, by a random sample of them."""
    reached = strengths(part.sample) >= _least(lab, part.sample)
    share = wilson(int(reached.sum()), len(reached))
    step = _step("measured, random others", part.sampled, lab, int(reached.sum()))
    return {**step, "missed": share.value * part.others, "missed_high": share.high * part.others}


class _Scores(NamedTuple):
    """A screen's scores."""

    rank: Floats
    """`[layer, unit]`, by which neurons are ranked: the smaller size of NIE and TIE; -inf in layers not searched."""
    means: Floats
    """`[quantity, layer, unit]`: estimates of NIE and TIE, means over the discovery pairs."""


def _screened(lab: Lab, position: str) -> _Scores:
    study = lab.study
    pairs = pairs_at(lab, "discovery")
    found = lab.run(search_tasks(study, pairs, position))
    shape = (-1, 2, variants(study.config), study.info.layers, study.info.d_ff)
    mean = np.array(found, dtype=np.float64).reshape(shape).sum(0) / max(len(pairs), 1)
    rank = np.abs(mean[:, -1]).min(0)
    unsearched = sorted(set(range(study.info.layers)) - set(layers_of(study.config, study.info)))
    rank[unsearched] = -np.inf
    return _Scores(rank, mean[:, 0])


def search_tasks(study: Study, pairs: Sequence[TokenPair], position: str) -> list[Context]:
    """What screens all neurons: of every `[base, variant, layer, unit]`, by the last variant of which they are ranked.

    Raises:
        SiteError: the study's screen is not defined for the model.
    """
    dropping = variants(study.config) > 1
    return screen_tasks(pairs, "mlp_neurons", position, study.setting, study.config.neurons.screen, dropping=dropping)


def variants(config: StudyConfig) -> int:
    """Estimates of each effect: attribution patching has a second one, GradDrop."""
    return 2 if config.neurons.screen == "atp" else 1


def _by_windows(lab: Lab) -> Ranking:
    """Split windows, breadth first, wherever the discovery split leaves room for a mediator."""
    position, settings = position_of(lab), lab.study.config.neurons
    effects, steps, leaves = of_whole_mlps(lab.effects, position), [], []
    width = lab.study.info.d_ff
    while not effects.empty:
        kept = _plausible(lab, effects)
        single = [window for window in kept if window.width == 1]
        followed = [window for window in kept if window.width > 1][: settings.max_windows]
        steps.append(_windows_step(lab, effects, width, len(kept), len(single) + len(followed)))
        leaves += single
        parts = [part for window in followed for part in _split(window)]
        width = max((part.width for part in parts), default=0)
        effects = lab.measure_sites(WINDOWS, [part.site(position) for part in parts], "discovery")
    units = lab.measure_sites(UNITS, [_unit(position, leaf.layer, leaf.start) for leaf in leaves])
    ranked = _by_layer((layer, unit) for layer, unit, _ in strengths(units).index)
    return Ranking(ranked, steps, pd.DataFrame(columns=list(SPARSITY_COLUMNS)))


def _windows_step(lab: Lab, effects: pd.DataFrame, width: int, kept: int, followed: int) -> dict[str, Any]:
    """A step: windows that were measured. width: neurons of the widest. followed: of those kept."""
    count = len(effects.groupby(["layer", "unit_start"]))
    return {**_step(f"windows of up to {width} neurons", count, lab, kept), "followed": followed}


class _Window(NamedTuple):
    """Neurons of one layer that lie side by side."""

    layer: int
    start: int
    stop: int

    @property
    def width(self) -> int:
        """How many."""
        return self.stop - self.start

    def site(self, position: str) -> Site:
        """All of them together."""
        return Site("mlp_neurons", self.layer, position, tuple(range(self.start, self.stop)))


def _plausible(lab: Lab, effects: pd.DataFrame) -> list[_Window]:
    """Windows whose NIE and TIE may both reach `min_share` of TE by their intervals, the strongest first."""
    used = effects[effects["split"] == "discovery"]
    kept = _reaching(lab, used, "nie") & _reaching(lab, used, "tie")
    return [_Window(*map(int, window)) for window in strengths(used).index if window in kept]


def _reaching(lab: Lab, used: pd.DataFrame, quantity: str) -> set[tuple[int, int, int]]:
    """Layer, start and stop of the windows of which a quantity may reach `min_share` of TE."""
    windows, pairs = ["layer", "unit_start", "unit_stop"], ["pair_id", "cluster"]
    table = direction_of(used) * used.pivot_table(index=windows, columns=pairs, values=quantity)
    clusters = table.columns.get_level_values("cluster")
    found = estimate_means(table.to_numpy(), clusters, lab.rng("windows"), _RESAMPLES)
    highest = np.array([one.value if np.isnan(one.high) else one.high for one in found])
    return set(table.index[highest >= _least(lab, used)])


def _split(window: _Window) -> list[_Window]:
    bounds = np.unique(np.linspace(window.start, window.stop, BRANCHES + 1).round().astype(int))
    return [_Window(window.layer, int(low), int(high)) for low, high in pairwise(bounds)]


def _all(lab: Lab) -> Ranking:
    """Measure every neuron on every pair."""
    study, position = lab.study, position_of(lab)
    layers = layers_of(study.config, study.info)
    units = [_unit(position, layer, unit) for layer in layers for unit in range(study.info.d_ff)]
    effects = lab.measure_sites(UNITS, units)
    strong = strengths(effects)
    ranked = _by_layer((layer, unit) for layer, unit, _ in strong.index)
    used = effects[effects["split"] == "discovery"]
    nie = direction_of(used) * used.groupby(["layer", "unit_start"])["nie"].mean()
    by_layer = {layer: nie[layer].to_numpy(float) for layer in layers}
    step = _step("every neuron", len(units), lab, int((strong >= _least(lab, used)).sum()), "all")
    return Ranking(ranked, [step], _profiles(by_layer, "measured"))


def strengths(effects: pd.DataFrame) -> pd.Series:
    """By layer, first and last unit the smaller of mean NIE and mean TIE on the discovery split, in TE's direction.

    A mediator is both sufficient and necessary. Sorted, the strongest first.
    """
    used = effects[effects["split"] == "discovery"]
    means = used.groupby(["layer", "unit_start", "unit_stop"])[["nie", "tie"]].mean()
    strength: pd.Series = (direction_of(used) * means).min(axis=1).sort_values(ascending=False)
    return strength


def of_whole_mlps(effects: pd.DataFrame, position: str) -> pd.DataFrame:
    """The effects of each layer's neurons together."""
    return effects[(effects["analysis"] == LAYERS) & (effects["position"] == position)]


def whole_mlp(lab: Lab, layer: int) -> Site:
    """All neurons of a layer, at the position that is searched."""
    return Site("mlp_neurons", layer, position_of(lab), tuple(range(lab.study.info.d_ff)))


def position_of(lab: Lab) -> str:
    """Where neurons are searched."""
    return lab.study.config.positions.neurons[0]


def pairs_at(lab: Lab, split: str) -> list[TokenPair]:
    """Those that have the position."""
    return [pair for pair in lab.pairs(split) if pair.places(position_of(lab)).x0]


def layers_of(config: StudyConfig, info: ModelInfo) -> Sequence[int]:
    """Layers to search."""
    return range(info.layers) if config.neurons.layers is None else config.neurons.layers


def first_units(lab: Lab, layer: int, ranked: Sequence[int], size: int) -> Site:
    """The first neurons of a layer by rank, as one site."""
    return Site("mlp_neurons", layer, position_of(lab), tuple(sorted(ranked[:size])))


def direction_of(effects: pd.DataFrame) -> int:
    """1 where the harmful prompts raise the outcome, else -1."""
    return -1 if effects["te"].mean() < 0 else 1


def _by_layer(ranked: Iterable[tuple[int, int]]) -> dict[int, list[int]]:
    """Layers and units in order, as units by layer in that order."""
    units: dict[int, list[int]] = {}
    for layer, unit in ranked:
        units.setdefault(int(layer), []).append(int(unit))
    return units


def _unit(position: str, layer: int, unit: int) -> Site:
    return Site("mlp_neurons", layer, position, (unit,))


def _least(lab: Lab, effects: pd.DataFrame) -> float:
    """The effect from which on a neuron counts as a mediator, on the discovery split."""
    te = effects[effects["split"] == "discovery"].drop_duplicates("pair_id")["te"].mean()
    return abs(float(te)) * lab.study.config.statistics.min_share


def _step(name: str, count: int, lab: Lab, kept: int, split: str = "discovery") -> dict[str, Any]:
    pairs = len(pairs_at(lab, split))
    unknown = {"missed": np.nan, "missed_high": np.nan}
    return {"step": name, "sites": count, "pairs": pairs, "kept": kept, "followed": kept, **unknown}


def _profiles(nie: Mapping[int, Floats], by: str) -> pd.DataFrame:
    """How few neurons of each layer carry its NIE (`SPARSITY_COLUMNS`). nie: of every neuron, by layer."""
    found = {layer: sparsity(values) for layer, values in nie.items()}
    rows = [
        {
            "layer": layer,
            "gini": one.gini,
            "fewest": one.fewest,
            "of": one.n_units,
            "negative_share": one.negative_share,
            "by": by,
        }
        for layer, one in found.items()
    ]
    return pd.DataFrame(rows, columns=list(SPARSITY_COLUMNS))
