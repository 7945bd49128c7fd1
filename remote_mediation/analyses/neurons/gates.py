"""The gate set: the smallest set of the strongest MLP's neurons that does its MLP's work, beside its controls.

Everything is chosen on the discovery split and reported on the held-out one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from remote_mediation.analyses.neurons.search import (
    first_units,
    of_whole_mlps,
    pairs_at,
    position_of,
    strengths,
    whole_mlp,
)
from remote_mediation.lab import Lab
from remote_mediation.sites import Site
from remote_mediation.stats import Interval, estimate_means, ratio_of_means

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


class GateSet(NamedTuple):
    """Gate neurons and what they are compared with."""

    gates: Site
    random: tuple[Site, ...]
    """Random sets of as many neurons of the same layer."""


class Gates(NamedTuple):
    """What the search for gates leaves."""

    found: GateSet | None
    """None where no MLP moves the outcome in the direction of TE by neurons that were found."""
    tables: dict[str, pd.DataFrame]
    """By name of the CSV file."""


def measure_gates(lab: Lab, ranked: dict[int, list[int]]) -> Gates:
    """The smallest set of the strongest MLP's neurons that carries `carry` of its NIE, beside its controls."""
    whole = strengths(of_whole_mlps(lab.effects, position_of(lab)))
    layers = [int(layer) for layer, _, _ in whole.index]
    if not layers or whole.iloc[0] <= 0 or not ranked.get(layers[0]):
        return Gates(None, {})
    layer = layers[0]
    curve, size = _curve(lab, layer, ranked[layer])
    gates, random = first_units(lab, layer, ranked[layer], size), _random_sets(lab, layer, size)
    earlier = [one for one in layers if one < layer and len(ranked.get(one, ())) >= size]
    sets = {
        "mlp": [whole_mlp(lab, layer)],
        "gates": [gates],
        "earlier": [first_units(lab, one, ranked[one], size) for one in earlier[:1]],
        "random": random,
    }
    tables = {"gates.csv": _compared(lab, sets), "gate_curve.csv": curve}
    return Gates(GateSet(gates, tuple(random)), tables)


def _random_sets(lab: Lab, layer: int, size: int) -> list[Site]:
    """Sets of so many neurons of a layer, each drawn without regard to what the others are."""
    draw, d_ff = lab.rng("random sets"), lab.study.info.d_ff
    drawn = [draw.permutation(d_ff)[:size] for _ in range(lab.study.config.neurons.random_sets)]
    return [Site("mlp_neurons", layer, position_of(lab), tuple(sorted(map(int, units)))) for units in drawn]


def _curve(lab: Lab, layer: int, ranked: Sequence[int]) -> tuple[pd.DataFrame, int]:
    """Joint NIE of the first neurons as a share of their MLP's, and the smallest size that carries enough of it."""
    shares, enough = _searched(lab, layer, ranked)
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


def _searched(lab: Lab, layer: int, ranked: Sequence[int]) -> tuple[dict[int, float], int]:
    """Shares by the sizes that were tried, powers of two and then halves between, and the smallest that is enough."""
    carry, most = lab.study.config.neurons.carry, len(ranked)
    sizes = sorted({*(2**power for power in range(most.bit_length())), most})
    shares = dict(zip(sizes, _shares(lab, layer, ranked, sizes), strict=True))
    enough = next((size for size in sizes if shares[size] >= carry), most)
    low = max((size for size in sizes if size < enough), default=0)
    while enough - low > 1 and shares[enough] >= carry:
        middle = (low + enough) // 2
        (shares[middle],) = _shares(lab, layer, ranked, [middle])
        low, enough = (low, middle) if shares[middle] >= carry else (middle, enough)
    return shares, enough


def _shares(lab: Lab, layer: int, ranked: Sequence[int], sizes: Sequence[int]) -> list[float]:
    """Of the MLP's mean NIE on the discovery split, by which the gates' MLP and size are chosen."""
    sites = [whole_mlp(lab, layer), *(first_units(lab, layer, ranked, size) for size in sizes)]
    whole, *means = np.nanmean(lab.indirect(sites, pairs_at(lab, "discovery")).nie, axis=1)
    return [float(mean / whole) for mean in means]


def _heldout_shares(lab: Lab, layer: int, ranked: Sequence[int], sizes: Sequence[int]) -> list[Interval]:
    sites = [whole_mlp(lab, layer), *(first_units(lab, layer, ranked, size) for size in sizes)]
    found = lab.indirect(sites, pairs_at(lab, "heldout"))
    whole, *parts = found.nie
    resamples = lab.study.config.statistics.resamples
    return [ratio_of_means(part, whole, found.clusters, lab.rng("curve"), resamples) for part in parts]


def _compared(lab: Lab, sets: dict[str, list[Site]]) -> pd.DataFrame:
    """`GATE_COLUMNS` of sets, on the held-out split."""
    named = [(name, site) for name, sites in sets.items() for site in sites]
    found = lab.indirect([site for _, site in named], pairs_at(lab, "heldout"))
    by = lab.study.config.statistics
    nie, tie = (
        estimate_means(table, found.clusters, lab.rng("gates"), by.resamples) for table in (found.nie, found.tie)
    )
    te = float(np.nanmean(found.te)) if len(found.te) else np.nan
    effects = zip(named, nie, tie, strict=True)
    rows = [{"set": name, **_gate_row(site, one, other, te)} for (name, site), one, other in effects]
    return pd.DataFrame(rows, columns=list(GATE_COLUMNS))


def _gate_row(site: Site, nie: Interval, tie: Interval, te: float) -> dict[str, Any]:
    """A set of neurons and what it does. te: mean TE on the same pairs."""
    return {
        "layer": site.layer,
        "position": site.position,
        "size": len(site.units),
        "units": " ".join(map(str, site.units)),
        **nie.columns("nie"),
        **tie.columns("tie"),
        "nie_share": nie.value / te,
        "tie_share": tie.value / te,
        "reason": nie.reason or tie.reason,
    }


def random_sets_reaching(sets: pd.DataFrame, quantity: str, direction: int) -> int:
    """How many random sets of a table of `GATE_COLUMNS` have at least the gates' mean NIE or TIE in a direction."""
    by = direction * sets.set_index("set")[quantity]
    return int((by.loc[["random"]] >= by.loc["gates"]).sum())
