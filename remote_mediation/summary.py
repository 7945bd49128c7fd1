"""What the effects say of single sites: estimates, depth profiles, mediating units. Claims are an analysis apart.

Everything here follows from the effects table, the split and a seed. Numbers come from `stats`; this module only says
which of them answer which question.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from remote_mediation.analyses.neurons import UNITS
from remote_mediation.config import StatisticsSettings
from remote_mediation.effects import SITE_COLUMNS
from remote_mediation.stats import (
    DepthProfile,
    Estimate,
    benjamini_hochberg,
    depth_profile,
    estimate_means,
)

SUMMARY_COLUMNS: dict[str, str] = {
    **dict.fromkeys(SITE_COLUMNS, "as in effects.csv"),
    "quantity": "te, nie, nde, tie or int",
    "split": "pairs used: all, discovery or heldout",
    "n": "pairs",
    "clusters": "clusters of pairs",
    "mean": "mean over pairs, in `unit`",
    "ci_low": "lower end of the 95% clustered bootstrap interval",
    "ci_high": "upper end",
    "p": "two-sided sign-flip permutation p over clusters",
    "q": "Benjamini-Hochberg over the sites of one analysis, quantity and split",
    "unit": "unit of the mean",
    "reason": "why a number is missing, or why to read it with care",
}
SPLITS = ("all", "discovery", "heldout")
CHECKS = "checks"
MEDIATOR_COLUMNS: dict[str, str] = {
    "layer": "decoder layer, from 0",
    "position": "where it was swapped",
    "unit": "neuron",
    "nie": "mean NIE on the held-out split",
    "nie_low": "lower end of its 95% interval",
    "nie_high": "upper end",
    "nie_share": "mean NIE / mean TE, both held out",
    "tie": "mean TIE on the held-out split",
    "tie_low": "lower end of its 95% interval",
    "tie_high": "upper end",
    "tie_share": "mean TIE / mean TE, both held out",
    "p": "the larger of the sign-flip p of NIE and TIE",
    "q": "Benjamini-Hochberg over the neurons chosen on the discovery split",
    "mediates": "q and both shares reach the study's thresholds, and there is a total effect",
    "reason": "why a number is missing, or why to read it with care",
}


@dataclass(frozen=True)
class Identity:
    """A relation that holds by construction, checked on this run's numbers."""

    name: str
    """What must hold."""
    n: int
    """Measurements it was checked on."""
    largest: float
    """Largest deviation found, in the outcome's unit; NaN if there was nothing to check."""


@dataclass(frozen=True)
class Summary:
    """All that a report says in numbers."""

    sites: pd.DataFrame
    """Estimates (`SUMMARY_COLUMNS`), one row per site, quantity and split."""
    total: Estimate
    """Mean total effect over pairs."""
    mlp: DepthProfile | None
    """Where in depth the MLPs' NIE lies; None without the modules analysis."""
    attention: DepthProfile | None
    """The same for attention."""
    difference: Estimate | None
    """MLP - attention, NIE summed over layers, paired by pair."""
    mediators: pd.DataFrame
    """Units chosen on the discovery split, as the held-out split sees them (`MEDIATOR_COLUMNS`)."""
    identities: tuple[Identity, ...]
    """Checks."""


def summarise(
    effects: pd.DataFrame,
    equal_length: set[str],
    layers: int,
    seed: int,
    by: StatisticsSettings,
) -> Summary:
    """All statistics of a study.

    effects: `EFFECT_COLUMNS`. equal_length: pairs whose prompts have equally many tokens; only on these is the residual
    stream at all positions the whole state, so only on these do its identities hold. layers: decoder layers.
    """
    rng = _Generators(seed)
    totals = effects.groupby("pair_id").agg(te=("te", "first"), cluster=("cluster", "first"))
    total = estimate_means(totals[["te"]].T, totals["cluster"], rng("total"), by.resamples)[0]
    modules = _modules(effects, total, rng, by)
    mediators = _mediators(effects, rng, by)
    if not total.sign:
        mediators["mediates"] = False  # a share of nothing
    sites = site_estimates(effects[effects["analysis"] != CHECKS], rng, by)
    return Summary(
        sites=sites,
        total=total,
        mlp=modules.mlp,
        attention=modules.attention,
        difference=modules.difference,
        mediators=mediators,
        identities=_identities(effects[effects["analysis"] == CHECKS], equal_length, layers),
    )


def site_estimates(effects: pd.DataFrame, rng: _Generators, by: StatisticsSettings) -> pd.DataFrame:
    """Estimates of every site (`SUMMARY_COLUMNS`)."""
    tables = [
        _estimates(used, quantity, split, rng, by)
        for _, group in effects.groupby("analysis", sort=False)
        for split in SPLITS
        if not (used := group if split == "all" else group[group["split"] == split]).empty
        for quantity in (("nie", "tie", "nde", "int") if split == "all" else ("nie", "tie"))
    ]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=list(SUMMARY_COLUMNS))


def stream_nie(sites: pd.DataFrame, position: str) -> pd.DataFrame:
    """NIE of the residual stream at a position (rows of `SUMMARY_COLUMNS`), all pairs, layers as numbers."""
    chosen = (sites["analysis"] == "layers") & (sites["position"] == position)
    chosen &= (sites["quantity"] == "nie") & (sites["split"] == "all")
    return sites[chosen].astype({"layer": int})


def pivot(effects: pd.DataFrame, quantity: str, columns: list[str]) -> tuple[pd.DataFrame, pd.Series]:
    """A quantity as `[pair, site]`, and the cluster of each pair."""
    keyed = effects.assign(**{name: effects[name].astype("string").fillna("") for name in ("unit_start", "unit_stop")})
    table = keyed.pivot_table(index=["pair_id", "cluster"], columns=columns, values=quantity, sort=False)
    return table, table.index.get_level_values("cluster").to_series()


class _Modules(NamedTuple):
    """MLP against attention."""

    mlp: DepthProfile | None
    attention: DepthProfile | None
    difference: Estimate | None


class _Generators:
    """A generator per question, so that no answer depends on which other questions were asked."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def __call__(self, question: str) -> np.random.Generator:
        return np.random.default_rng([self._seed, zlib.crc32(question.encode())])


def _estimates(used: pd.DataFrame, quantity: str, split: str, rng: _Generators, by: StatisticsSettings) -> pd.DataFrame:
    """One quantity of all sites of an analysis, on the pairs of a split."""
    table, clusters = pivot(used, quantity, SITE_COLUMNS)
    found = estimate_means(table.to_numpy().T, clusters, rng(f"{quantity} {split}"), by.resamples)
    sites = table.columns.to_frame(index=False)
    p = np.array([estimate.p for estimate in found])
    return sites.assign(
        quantity=quantity,
        split=split,
        n=[estimate.n_pairs for estimate in found],
        clusters=[estimate.n_clusters for estimate in found],
        mean=[estimate.value for estimate in found],
        ci_low=[estimate.low for estimate in found],
        ci_high=[estimate.high for estimate in found],
        p=p,
        q=benjamini_hochberg(p),
        unit=used["unit"].iloc[0],
        reason=[estimate.reason for estimate in found],
    )[list(SUMMARY_COLUMNS)]


def _modules(effects: pd.DataFrame, total: Estimate, rng: _Generators, by: StatisticsSettings) -> _Modules:
    """Both kinds of module at the first position measured; effects count in the direction of the total effect."""
    modules = effects[effects["analysis"] == "modules"]
    if modules.empty:
        return _Modules(None, None, None)
    modules = modules[modules["position"] == modules["position"].iloc[0]]
    table, clusters = pivot(modules, "nie", ["component", "layer"])
    table *= -1.0 if total.value < 0 else 1.0
    mlp, attention = (table[name].sort_index(axis=1).to_numpy() for name in ("mlp_output", "attention_output"))
    difference = (mlp - attention).sum(axis=1)[None, :]
    return _Modules(
        mlp=depth_profile(mlp, clusters, rng("depth"), by.resamples),
        attention=depth_profile(attention, clusters, rng("depth"), by.resamples),
        difference=estimate_means(difference, clusters, rng("difference"), by.resamples)[0],
    )


def _mediators(effects: pd.DataFrame, rng: _Generators, by: StatisticsSettings) -> pd.DataFrame:
    """Units that carry at least `min_share` of TE on the discovery split, as the held-out split sees them.

    Columns: `MEDIATOR_COLUMNS`. Both NIE and TIE are tested and the larger p counts; q is Benjamini-Hochberg over the
    units chosen.
    """
    units = effects[effects["analysis"] == UNITS]
    site = ["layer", "position", "unit_start"]
    discovery = units[units["split"] == "discovery"].groupby(site)[["nie", "tie", "te"]].mean()
    shares = discovery[["nie", "tie"]].div(discovery["te"], axis=0).min(axis=1)
    chosen = shares[shares >= by.min_share].sort_values(ascending=False).index
    heldout = dict(list(units[units["split"] == "heldout"].groupby(site)))
    records = [_mediator(key, heldout[key], rng, by) for key in chosen if key in heldout]
    table = pd.DataFrame(records, columns=[*MEDIATOR_COLUMNS])
    table["q"] = benjamini_hochberg(table["p"].to_numpy(float))
    carried = table[["nie_share", "tie_share"]].min(axis=1) >= by.min_share
    table["mediates"] = (carried & (table["q"] <= by.alpha)).astype(bool)
    return table


def _mediator(
    key: tuple[int, str, int], heldout: pd.DataFrame, rng: _Generators, by: StatisticsSettings
) -> dict[str, Any]:
    nie, tie = estimate_means(heldout[["nie", "tie"]].T, heldout["cluster"], rng("mediators"), by.resamples)
    layer, position, unit = key
    te = heldout["te"].mean()
    return {
        "layer": int(layer),
        "position": position,
        "unit": int(unit),
        **{"nie": nie.value, "nie_low": nie.low, "nie_high": nie.high, "nie_share": nie.value / te},
        **{"tie": tie.value, "tie_low": tie.low, "tie_high": tie.high, "tie_share": tie.value / te},
        "p": max(nie.p, tie.p),
        "reason": nie.reason,
    }


def _identities(checks: pd.DataFrame, equal_length: set[str], layers: int) -> tuple[Identity, ...]:
    whole = checks[(checks["position"] == "all") & checks["pair_id"].isin(equal_length)]
    final = checks[(checks["position"] == "last") & (checks["layer"] == layers - 1)]
    deviations = {
        "residual stream at all positions: NIE = TE": whole["nie"] - whole["te"],
        "residual stream at all positions: NDE = 0": whole["nde"],
        "last layer where the answer is read: NIE = TE": final["nie"] - final["te"],
        "last layer where the answer is read: NDE = 0": final["nde"],
    }
    return tuple(Identity(name, len(part), float(part.abs().max())) for name, part in deviations.items())
