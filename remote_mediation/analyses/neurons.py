"""Which MLP neurons, and how few of them: a search for single neurons, then the smallest set that does its MLP's work.

Everything is chosen on the discovery split and reported on the held-out one. `search` says how single neurons are
found; each way ends in exact measurements:

- `gradient`: attribution patching ranks all neurons in a few passes (`program.screen`), the first ones are measured.
  What it may have missed is estimated from a random sample of the others.
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

from remote_mediation.config import StudyConfig
from remote_mediation.engine.tasks import screen_tasks
from remote_mediation.errors import JobError, SiteError
from remote_mediation.lab import Floats, Lab
from remote_mediation.sites import ModelInfo, Site, check_site
from remote_mediation.stats import Interval, estimate_means, ratio_of_means, sparsity, wilson
from remote_mediation.tokens import TokenPair

LAYERS, UNITS, WINDOWS, SAMPLE = "neurons", "neurons:units", "neurons:windows", "neurons:sample"
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
GATE_COLUMNS: dict[str, str] = {
    "set": "gates, random (same size and layer), earlier (best same-size set of an earlier layer), mlp (all neurons)",
    "layer": "decoder layer, from 0",
    "position": "where they were swapped",
    "size": "neurons in the set",
    "units": "the neurons",
    "nie": "mean joint NIE on the held-out split",
    "nie_low": "lower end of its 95% interval",
    "nie_high": "upper end",
    "tie": "mean joint TIE on the held-out split",
    "tie_low": "lower end of its 95% interval",
    "tie_high": "upper end",
    "nie_share": "mean NIE / mean TE, both held out",
    "tie_share": "mean TIE / mean TE, both held out",
    "reason": "why a number is missing, or why to read it with care",
}
CURVE_COLUMNS: dict[str, str] = {
    "size": "neurons in the set, the strongest first",
    "discovery": "mean joint NIE / mean NIE of the whole MLP, discovery split",
    "heldout": "the same, held-out split; missing where the MLP's own NIE is not told apart from 0",
    "heldout_low": "lower end of its 95% interval",
    "heldout_high": "upper end",
    "reason": "why a number is missing, or why to read it with care",
}
SPARSITY_COLUMNS: dict[str, str] = {
    "layer": "decoder layer, from 0",
    "gini": "Gini index of the neurons' NIE (its positive part)",
    "fewest": "fewest neurons whose NIE adds up to 80% of all positive ones",
    "of": "neurons of the layer",
    "negative_share": "share of the profile that works the other way",
    "by": "measured, or estimated by attribution patching",
}


class Found(NamedTuple):
    """What a search leaves."""

    ranked: dict[int, list[int]]
    """By layer its neurons, the strongest first; perhaps not all of them."""
    steps: list[dict[str, Any]]
    """Rows of `SEARCH_COLUMNS`."""
    profiles: pd.DataFrame
    """Rows of `SPARSITY_COLUMNS`."""


def sites(config: StudyConfig, info: ModelInfo, pair: TokenPair) -> list[Site]:
    """All neurons of every layer to search, together.

    Raises:
        SiteError: a layer out of range.
    """
    whole = [
        Site("mlp_neurons", layer, position, tuple(range(info.d_ff)))
        for position in config.positions.neurons
        for layer in _layers(config, info)
        if pair.places(position).x0
    ]
    for site in whole:
        check_site(site, info)
    return whole


def analyse(lab: Lab, tables: Mapping[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """Search at the first position asked for, measure what was found on all pairs, find the gate set."""
    found = _search(lab)
    return {
        "search.csv": pd.DataFrame(found.steps, columns=list(SEARCH_COLUMNS)),
        "sparsity.csv": found.profiles,
        **_gate_tables(lab, found.ranked),
    }


def gate_set(tables: Mapping[str, pd.DataFrame]) -> Site | None:
    """The gate set that `analyse` found, or None if there is none."""
    return next(iter(_sets(tables, "gates")), None)


def random_sets(tables: Mapping[str, pd.DataFrame]) -> list[Site]:
    """The random sets that it was compared with."""
    return _sets(tables, "random")


def random_sets_reaching(sets: pd.DataFrame, quantity: str, direction: int) -> int:
    """How many random sets of a table of `GATE_COLUMNS` have at least the gates' mean NIE or TIE in a direction."""
    by = direction * sets.set_index("set")[quantity]
    return int((by.loc[["random"]] >= by.loc["gates"]).sum())


def _sets(tables: Mapping[str, pd.DataFrame], name: str) -> list[Site]:
    if "gates.csv" not in tables:
        return []
    rows = tables["gates.csv"].query("set == @name")
    return [
        Site("mlp_neurons", int(row.layer), str(row.position), tuple(map(int, row.units.split())))
        for row in rows.itertuples()
    ]


def whole_mlp(lab: Lab, layer: int) -> Site:
    """All neurons of a layer, at the position that is searched."""
    return Site("mlp_neurons", layer, _position(lab), tuple(range(lab.study.info.d_ff)))


def of_whole_mlps(effects: pd.DataFrame, position: str) -> pd.DataFrame:
    """The effects of each layer's neurons together."""
    return effects[(effects["analysis"] == LAYERS) & (effects["position"] == position)]


def strengths(effects: pd.DataFrame) -> pd.Series:
    """By layer, first and last unit the smaller of mean NIE and mean TIE on the discovery split, in TE's direction.

    A mediator is both sufficient and necessary. Sorted, the strongest first.
    """
    used = effects[effects["split"] == "discovery"]
    means = used.groupby(["layer", "unit_start", "unit_stop"])[["nie", "tie"]].mean()
    strength: pd.Series = (_direction(used) * means).min(axis=1).sort_values(ascending=False)
    return strength


def _search(lab: Lab) -> Found:
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


def _by_gradient(lab: Lab) -> Found:
    """Rank by attribution, measure the first `exact` and a sample of the others."""
    study, settings, position = lab.study, lab.study.config.neurons, _position(lab)
    scores = _screened(lab, position)
    order = [
        (int(flat // study.info.d_ff), int(flat % study.info.d_ff))
        for flat in np.argsort(-scores.rank, axis=None, kind="stable")
        if np.isfinite(scores.rank.flat[flat])
    ]
    first, rest = order[: settings.exact], order[settings.exact :]
    sample = [rest[i] for i in sorted(lab.rng("sample").permutation(len(rest))[: settings.exact])]
    measured = lab.measure_sites(UNITS, [_unit(position, *one) for one in first])
    checked = lab.measure_sites(SAMPLE, [_unit(position, *one) for one in sample], "discovery")
    strong, missed = strengths(measured), strengths(checked)
    least = _least(lab, checked)
    hits = wilson(int((missed >= least).sum()), len(missed))
    steps = [
        _step("screened by gradients", study.info.d_ff * len(_layers(study.config, study.info)), lab, len(first)),
        _step("measured, first ranks", len(first), lab, int((strong >= _least(lab, measured)).sum()), "all"),
        {
            **_step("measured, random others", len(sample), lab, int((missed >= least).sum())),
            "missed": hits.value * len(rest),
            "missed_high": hits.high * len(rest),
        },
    ]
    exact = dict.fromkeys((int(layer), int(unit)) for layer, unit, _ in strong[strong > 0].index)
    ranked = _by_layer([*exact, *(one for one in order if one not in exact)])
    profiles = [
        _profile(layer, scores.nie[layer], "attribution patching") for layer in _layers(study.config, study.info)
    ]
    return Found(ranked, steps, pd.DataFrame(profiles, columns=list(SPARSITY_COLUMNS)))


class _Scores(NamedTuple):
    """Attribution scores `[layer, unit]`."""

    rank: Floats
    """By which neurons are ranked: the smaller of NIE and TIE, GradDrop's size; -inf in layers not searched."""
    nie: Floats
    """AtP's estimate of NIE in TE's direction."""


def _screened(lab: Lab, position: str) -> _Scores:
    study = lab.study
    pairs = _pairs(lab, "discovery")
    found = lab.run(screen_tasks(pairs, "mlp_neurons", position, study.setting))
    shape = (-1, 2, 2, study.info.layers, study.info.d_ff)
    mean = np.array(found, dtype=np.float64).reshape(shape).sum(0) / max(len(pairs), 1)
    rank = mean[:, 1].min(0)
    unsearched = sorted(set(range(study.info.layers)) - set(_layers(study.config, study.info)))
    rank[unsearched] = -np.inf
    return _Scores(rank, _direction(lab.effects) * mean[0, 0])


def _by_windows(lab: Lab) -> Found:
    """Split windows, breadth first, wherever the discovery split leaves room for a mediator."""
    position, settings = _position(lab), lab.study.config.neurons
    effects, steps, leaves = of_whole_mlps(lab.effects, position), [], []
    width = lab.study.info.d_ff
    while not effects.empty:
        kept = _plausible(lab, effects)
        leaves += [window for window in kept if window.stop - window.start == 1]
        wide = [window for window in kept if window.stop - window.start > 1]
        followed = wide[: settings.max_windows]
        count = len(effects.groupby(["layer", "unit_start"]))
        step = _step(f"windows of up to {width} neurons", count, lab, len(kept))
        steps.append({**step, "followed": len(kept) - len(wide) + len(followed)})
        parts = [part for window in followed for part in _split(window)]
        width = max((part.stop - part.start for part in parts), default=0)
        sites = [Site("mlp_neurons", part.layer, position, tuple(range(part.start, part.stop))) for part in parts]
        effects = lab.measure_sites(WINDOWS, sites, "discovery")
    units = lab.measure_sites(UNITS, [_unit(position, leaf.layer, leaf.start) for leaf in leaves])
    ranked = _by_layer((layer, unit) for layer, unit, _ in strengths(units).index)
    return Found(ranked, steps, pd.DataFrame(columns=list(SPARSITY_COLUMNS)))


class _Window(NamedTuple):
    layer: int
    start: int
    stop: int


def _plausible(lab: Lab, effects: pd.DataFrame) -> list[_Window]:
    """Windows whose NIE and TIE may both reach `min_share` of TE by their intervals, the strongest first."""
    used = effects[effects["split"] == "discovery"]
    least, direction = _least(lab, used), _direction(used)
    kept = None
    for quantity in ("nie", "tie"):
        table = direction * used.pivot_table(
            index=["layer", "unit_start", "unit_stop"], columns=["pair_id", "cluster"], values=quantity
        )
        clusters = table.columns.get_level_values("cluster")
        found = estimate_means(table.to_numpy(), clusters, lab.rng("windows"), _RESAMPLES)
        reach = [one.value if np.isnan(one.high) else one.high for one in found]
        possible = set(table.index[np.array(reach) >= least])
        kept = possible if kept is None else kept & possible
    return [_Window(*map(int, window)) for window in strengths(used).index if window in (kept or ())]


def _split(window: _Window) -> list[_Window]:
    bounds = np.unique(np.linspace(window.start, window.stop, BRANCHES + 1).round().astype(int))
    return [_Window(window.layer, int(low), int(high)) for low, high in pairwise(bounds)]


def _all(lab: Lab) -> Found:
    """Measure every neuron on every pair."""
    study, position = lab.study, _position(lab)
    layers = _layers(study.config, study.info)
    units = [_unit(position, layer, unit) for layer in layers for unit in range(study.info.d_ff)]
    effects = lab.measure_sites(UNITS, units)
    strong = strengths(effects)
    ranked = _by_layer((layer, unit) for layer, unit, _ in strong.index)
    used = effects[effects["split"] == "discovery"]
    nie = _direction(used) * used.groupby(["layer", "unit_start"])["nie"].mean()
    profiles = [_profile(layer, nie[layer].to_numpy(float), "measured") for layer in layers]
    step = _step("every neuron", len(units), lab, int((strong >= _least(lab, used)).sum()), "all")
    return Found(ranked, [step], pd.DataFrame(profiles, columns=list(SPARSITY_COLUMNS)))


def _gate_tables(lab: Lab, ranked: dict[int, list[int]]) -> dict[str, pd.DataFrame]:
    """The smallest set of the strongest MLP's neurons that carries `carry` of its NIE, beside its controls."""
    whole = strengths(of_whole_mlps(lab.effects, _position(lab)))
    layers = [int(layer) for layer, _, _ in whole.index]
    if not layers or whole.iloc[0] <= 0 or not ranked.get(layers[0]):
        return {}
    layer = layers[0]
    curve, size = _curve(lab, layer, ranked[layer])
    sets = {"mlp": [whole_mlp(lab, layer)], "gates": [_first(lab, layer, ranked[layer], size)]}
    earlier = [one for one in layers if one < layer and len(ranked.get(one, ())) >= size]
    sets["earlier"] = [_first(lab, one, ranked[one], size) for one in earlier[:1]]
    draw, d_ff = lab.rng("random sets"), lab.study.info.d_ff
    sets["random"] = [
        Site("mlp_neurons", layer, _position(lab), tuple(sorted(map(int, draw.permutation(d_ff)[:size]))))
        for _ in range(lab.study.config.neurons.random_sets)
    ]
    return {"gates.csv": _compared(lab, sets), "gate_curve.csv": curve}


def _curve(lab: Lab, layer: int, ranked: Sequence[int]) -> tuple[pd.DataFrame, int]:
    """Joint NIE of the first neurons as a share of their MLP's, and the smallest size that carries enough of it."""
    carry, most = lab.study.config.neurons.carry, len(ranked)
    sizes = sorted({*(2**power for power in range(most.bit_length())), most})
    shares = dict(zip(sizes, _shares(lab, layer, ranked, sizes), strict=True))
    enough = next((size for size in sizes if shares[size] >= carry), most)
    low = max((size for size in sizes if size < enough), default=0)
    while enough - low > 1 and shares[enough] >= carry:
        middle = (low + enough) // 2
        (shares[middle],) = _shares(lab, layer, ranked, [middle])
        low, enough = (low, middle) if shares[middle] >= carry else (middle, enough)
    sizes = sorted(shares)
    heldout = _heldout_shares(lab, layer, ranked, sizes)
    rows = [
        {
            "size": size,
            "discovery": shares[size],
            **one.columns("heldout"),
            "reason": one.reason,
        }
        for size, one in zip(sizes, heldout, strict=True)
    ]
    return pd.DataFrame(rows, columns=list(CURVE_COLUMNS)), enough


def _shares(lab: Lab, layer: int, ranked: Sequence[int], sizes: Sequence[int]) -> list[float]:
    """Of the MLP's mean NIE on the discovery split, by which the gates' MLP and size are chosen."""
    sites = [whole_mlp(lab, layer), *(_first(lab, layer, ranked, size) for size in sizes)]
    whole, *means = np.nanmean(lab.indirect(sites, _pairs(lab, "discovery")).nie, axis=1)
    return [float(mean / whole) for mean in means]


def _heldout_shares(lab: Lab, layer: int, ranked: Sequence[int], sizes: Sequence[int]) -> list[Interval]:
    sites = [whole_mlp(lab, layer), *(_first(lab, layer, ranked, size) for size in sizes)]
    found = lab.indirect(sites, _pairs(lab, "heldout"))
    whole, *parts = found.nie
    resamples = lab.study.config.statistics.resamples
    return [ratio_of_means(part, whole, found.clusters, lab.rng("curve"), resamples) for part in parts]


def _compared(lab: Lab, sets: dict[str, list[Site]]) -> pd.DataFrame:
    """`GATE_COLUMNS` of sets, on the held-out split."""
    named = [(name, site) for name, sites in sets.items() for site in sites]
    found = lab.indirect([site for _, site in named], _pairs(lab, "heldout"))
    by = lab.study.config.statistics
    nie, tie = (
        estimate_means(table, found.clusters, lab.rng("gates"), by.resamples) for table in (found.nie, found.tie)
    )
    te = float(np.nanmean(found.te)) if len(found.te) else np.nan
    rows = [
        {
            "set": name,
            "layer": site.layer,
            "position": site.position,
            "size": len(site.units),
            "units": " ".join(map(str, site.units)),
            **one.columns("nie"),
            **other.columns("tie"),
            "nie_share": one.value / te,
            "tie_share": other.value / te,
            "reason": one.reason or other.reason,
        }
        for (name, site), one, other in zip(named, nie, tie, strict=True)
    ]
    return pd.DataFrame(rows, columns=list(GATE_COLUMNS))


def _position(lab: Lab) -> str:
    return lab.study.config.positions.neurons[0]


def _pairs(lab: Lab, split: str) -> list[TokenPair]:
    """Those that have the position."""
    return [pair for pair in lab.pairs(split) if pair.places(_position(lab)).x0]


def _layers(config: StudyConfig, info: ModelInfo) -> Sequence[int]:
    return range(info.layers) if config.neurons.layers is None else config.neurons.layers


def _by_layer(ranked: Iterable[tuple[int, int]]) -> dict[int, list[int]]:
    """Layers and units in order, as units by layer in that order."""
    units: dict[int, list[int]] = {}
    for layer, unit in ranked:
        units.setdefault(int(layer), []).append(int(unit))
    return units


def _unit(position: str, layer: int, unit: int) -> Site:
    return Site("mlp_neurons", layer, position, (unit,))


def _first(lab: Lab, layer: int, ranked: Sequence[int], size: int) -> Site:
    return Site("mlp_neurons", layer, _position(lab), tuple(sorted(ranked[:size])))


def _direction(effects: pd.DataFrame) -> int:
    return -1 if effects["te"].mean() < 0 else 1


def _least(lab: Lab, effects: pd.DataFrame) -> float:
    """The effect from which on a neuron counts as a mediator, on the discovery split."""
    te = effects[effects["split"] == "discovery"].drop_duplicates("pair_id")["te"].mean()
    return abs(float(te)) * lab.study.config.statistics.min_share


def _step(name: str, count: int, lab: Lab, kept: int, split: str = "discovery") -> dict[str, Any]:
    pairs = len(_pairs(lab, split))
    unknown = {"missed": np.nan, "missed_high": np.nan}
    return {"step": name, "sites": count, "pairs": pairs, "kept": kept, "followed": kept, **unknown}


def _profile(layer: int, nie: Floats, by: str) -> dict[str, Any]:
    found = sparsity(nie)
    return {
        "layer": layer,
        "gini": found.gini,
        "fewest": found.fewest,
        "of": found.n_units,
        "negative_share": found.negative_share,
        "by": by,
    }
