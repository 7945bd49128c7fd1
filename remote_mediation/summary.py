"""What the effects say of single sites: estimates of each, the total effect, the identities. Nothing is added up.

Everything here follows from the effects table, the split and a seed. Numbers come from `stats`; this module only says
which of them answer which question.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from remote_mediation.config import StatisticsSettings
from remote_mediation.effects import SITE_COLUMNS
from remote_mediation.stats import Estimate, Interval, benjamini_hochberg, estimate_means, ratio_of_means

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
UNITS = "neurons:units"
"""What effects of single neurons count as."""
MOST_SITES = 5
"""Sites of an analysis that are named as its strongest."""
BOTH = ("nie", "tie")
"""What a mediator must show: it is sufficient and necessary."""


class Strong(NamedTuple):
    """One effect of one of the strongest sites of an analysis."""

    site: tuple[Any, ...]
    """Values of `SITE_COLUMNS`."""
    quantity: str
    """`nie` or `tie`."""
    share: Interval
    """Mean effect / mean TE over all pairs (VanderWeele 2013: of NIE, the proportion mediated)."""


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
    identities: tuple[Identity, ...]
    """Checks."""
    heldout: Estimate
    """The same over the held-out pairs, which shares on them are of."""
    strongest: Mapping[str, tuple[Strong, ...]]
    """By analysis, both effects of its strongest sites."""


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
    sites = site_estimates(effects[effects["analysis"] != CHECKS], rng, by)
    total, shown = total_effect(effects, seed, by), informative(sites)
    return Summary(
        sites=sites,
        total=total,
        heldout=heldout_effect(effects, seed, by),
        strongest={name: _strong(effects, part, total, seed, by) for name, part in shown.groupby("analysis")},
        identities=identities_of(effects, equal_length, layers),
    )


def total_effect(effects: pd.DataFrame, seed: int, by: StatisticsSettings) -> Estimate:
    """Mean total effect over the pairs of an effects table, in the outcome's unit."""
    totals = effects.groupby("pair_id").agg(te=("te", "first"), cluster=("cluster", "first"))
    return estimate_means(totals[["te"]].T, totals["cluster"], _Generators(seed)("total"), by.resamples)[0]


def heldout_effect(effects: pd.DataFrame, seed: int, by: StatisticsSettings) -> Estimate:
    """Mean total effect over the held-out pairs of an effects table."""
    pairs = effects[effects["split"] == "heldout"].drop_duplicates("pair_id")
    if pairs.empty:
        return Estimate(0, 0, np.nan, np.nan, np.nan, "no held-out pair has been measured", np.nan)
    return estimate_means([pairs["te"]], pairs["cluster"], np.random.default_rng(seed), by.resamples)[0]


def informative(sites: pd.DataFrame) -> pd.DataFrame:
    """Estimates, without the residual stream at all positions, where NIE = TE whatever the model does."""
    return sites[(sites["component"] != "layer_output") | (sites["position"] != "all")]


def strongest_sites(sites: pd.DataFrame, total: Estimate, most: int = MOST_SITES) -> list[tuple[Any, ...]]:
    """Values of `SITE_COLUMNS` by the smaller of mean NIE and mean TIE on the discovery split, in TE's direction."""
    discovery = sites[sites["split"] == "discovery"]
    means = discovery.pivot_table(index=SITE_COLUMNS, columns="quantity", values="mean", sort=False)
    direction = -1 if total.value < 0 else 1
    return list((direction * means.reindex(columns=BOTH)).min(axis=1).nlargest(most).index)


def _strong(
    effects: pd.DataFrame, sites: pd.DataFrame, total: Estimate, seed: int, by: StatisticsSettings
) -> tuple[Strong, ...]:
    """Shares of the strongest sites. sites: the estimates of one analysis."""
    own = effects[effects["analysis"].isin(set(sites["analysis"]))]
    tables = {quantity: pivot(own, quantity, SITE_COLUMNS) for quantity in (*BOTH, "te")}
    (te, clusters), found = tables["te"], []
    for site in strongest_sites(sites, total):
        for quantity in BOTH:
            effect, rng = tables[quantity][0].loc[:, site], np.random.default_rng(seed)
            share = ratio_of_means(effect, te.loc[:, site], clusters, rng, by.resamples)
            found.append(Strong(site, quantity, share))
    return tuple(found)


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


def identities_of(effects: pd.DataFrame, equal_length: set[str], layers: int) -> tuple[Identity, ...]:
    """What holds by construction, on the effects of the checks. Arguments: as `summarise`."""
    checks = effects[effects["analysis"] == CHECKS]
    whole = checks[(checks["position"] == "all") & checks["pair_id"].isin(equal_length)]
    final = checks[(checks["position"] == "last") & (checks["layer"] == layers - 1)]
    deviations = {
        "residual stream at all positions: NIE = TE": whole["nie"] - whole["te"],
        "residual stream at all positions: NDE = 0": whole["nde"],
        "last layer where the answer is read: NIE = TE": final["nie"] - final["te"],
        "last layer where the answer is read: NDE = 0": final["nde"],
    }
    return tuple(Identity(name, len(part), float(part.abs().max())) for name, part in deviations.items())
