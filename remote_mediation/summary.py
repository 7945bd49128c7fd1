"""What the effects say: estimates per site, depth profiles, mediating units, and the paper's claims put to the test.

Everything here follows from the effects table, the split and a seed. Numbers come from `stats`; this module only says
which of them answer which question.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd

from remote_mediation.analyses.neurons import UNITS, random_sets_reaching
from remote_mediation.config import StatisticsSettings
from remote_mediation.effects import SITE_COLUMNS
from remote_mediation.probes import earlier
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
# With fewer clusters a 95% percentile interval cannot cover 95% (see `stats.estimate_means`).
_FEWEST_CLUSTERS = 6
# A gate set of more of its MLP's neurons than this is not called sparse.
_SPARSE = 0.1
# A set that carries less of TE than this, held out, is a part of the way and does not gate it.
_GATE = 0.5

Verdict = Literal["supported", "not supported", "undecided", "not tested"]


@dataclass(frozen=True)
class Claim:
    """One claim of the paper and what this run says of it."""

    name: str
    """The claim, in a few words."""
    verdict: Verdict
    """What the run says of it."""
    finding: str
    """The numbers behind the verdict, in a sentence."""


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
    claims: tuple[Claim, ...]
    """Verdicts."""
    identities: tuple[Identity, ...]
    """Checks."""


def summarise(
    effects: pd.DataFrame,
    tables: Mapping[str, pd.DataFrame],
    equal_length: set[str],
    layers: int,
    seed: int,
    by: StatisticsSettings,
) -> Summary:
    """All statistics of a study.

    effects: `EFFECT_COLUMNS`. tables: what analyses found beyond effects, by CSV file. equal_length: pairs whose
    prompts have equally many tokens; only on these is the residual stream at all positions the whole state, so only on
    these do its identities hold. layers: decoder layers.
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
        claims=(
            _where(total, modules.mlp),
            _what(total, modules.difference),
            _which(total, tables, layers, by),
            _understood(total, tables, sites, by),
            _handed_on(total, tables),
        ),
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


def _where(total: Estimate, profile: DepthProfile | None) -> Claim:
    name = "Harmful output is decided in late layers"
    if profile is None:
        return Claim(name, "not tested", "the modules analysis was not part of this study")
    share, centre = profile.last_third_share, profile.centre_of_mass
    if _unknown(total) or np.isnan(share.low):
        return Claim(name, "undecided", _unknown(total) or f"the MLPs' depth profile is undefined: {share.reason}")
    text = (
        f"the last third of the layers holds {share.value:.0%} [{share.low:.0%}, {share.high:.0%}] of the MLPs' NIE "
        f"(33% if depth did not matter); its centre of mass is at depth {centre.value:.2f} [{centre.low:.2f}, "
        f"{centre.high:.2f}]"
    )
    return Claim(name, _verdict(share.low - 1 / 3, share.high - 1 / 3), text)


def _what(total: Estimate, difference: Estimate | None) -> Claim:
    name = "MLP blocks carry it, not attention"
    if difference is None:
        return Claim(name, "not tested", "the modules analysis was not part of this study")
    if _unknown(total) or np.isnan(difference.low):
        return Claim(name, "undecided", _unknown(total) or difference.reason)
    text = (
        f"MLP minus attention, NIE in the direction of TE summed over layers, is {difference.value:+.3g} "
        f"[{difference.low:+.3g}, {difference.high:+.3g}] per pair (p = {difference.p:.2g})"
    )
    return Claim(name, _verdict(difference.low, difference.high), text)


def _which(total: Estimate, tables: Mapping[str, pd.DataFrame], layers: int, by: StatisticsSettings) -> Claim:
    name = "A sparse set of neurons in the final layers gates it"
    if "search.csv" not in tables:
        return Claim(name, "not tested", "no single neurons were measured in this study")
    if _unknown(total):
        return Claim(name, "undecided", _unknown(total))
    if "gates.csv" not in tables:
        return Claim(name, "not supported", "no MLP moves the outcome by its neurons where they were swapped")
    sets = tables["gates.csv"].set_index("set")
    gates, mlp = sets.loc["gates"], sets.loc["mlp"]
    if np.isnan(gates["nie_low"]) or np.isnan(gates["tie_low"]):
        return Claim(name, "undecided", f"the held-out split cannot test the gate set: {gates['reason']}")
    direction = -1 if total.value < 0 else 1
    ends = [direction * gates[end] for end in ("nie_low", "nie_high", "tie_low", "tie_high")]
    drawn = int((sets.index == "random").sum())
    if 1 / (1 + drawn) > by.alpha:
        return Claim(name, "undecided", f"{drawn} random sets are too few to compare the gate set with")
    p = (1 + random_sets_reaching(tables["gates.csv"], "nie", direction)) / (1 + drawn)
    failed = [
        reason
        for reason, fails in {
            "its layer is not in the last third": gates["layer"] < 2 * layers / 3,
            f"that is more than {_SPARSE:.0%} of its MLP": gates["size"] > _SPARSE * mlp["size"],
            "held out, it is not both sufficient and necessary": min(ends) <= 0,
            f"it carries less than {_GATE:.0%} of TE": min(gates[["nie_share", "tie_share"]]) < _GATE,
            "random sets of its size do as much": p > by.alpha,
        }.items()
        if fails
    ]
    text = (
        f"{gates['size']} of {mlp['size']} neurons of layer {gates['layer']} carry, held out, {gates['nie_share']:.0%} "
        f"of TE by NIE and {gates['tie_share']:.0%} by TIE (their whole MLP {mlp['nie_share']:.0%} and "
        f"{mlp['tie_share']:.0%}; p = {p:.2g} against random sets)"
    )
    return Claim(name, "not supported" if failed else "supported", "; ".join([text, *failed]))


def _understood(
    total: Estimate, tables: Mapping[str, pd.DataFrame], sites: pd.DataFrame, by: StatisticsSettings
) -> Claim:
    """At the last token: is harm readable at a depth where the residual stream there does not act yet?"""
    name = "Early layers understand harm before it acts"
    acting = stream_nie(sites, "last")
    if "probes.csv" not in tables or acting.empty:
        return Claim(name, "not tested", "it takes the analyses `detect` and `layers`, the latter at `last`")
    if _unknown(total):
        return Claim(name, "undecided", _unknown(total))
    probes = tables["probes.csv"].query("position == 'last'")
    found = earlier(probes, acting, total.value, by.alpha)
    verdicts: dict[str, Verdict] = {"before": "supported", "not before": "not supported", "undecided": "undecided"}
    return Claim(name, verdicts[found.verdict], f"at the last token {found.finding}")


def _handed_on(total: Estimate, tables: Mapping[str, pd.DataFrame]) -> Claim:
    """Does most of the early site's effect need the later MLPs?"""
    name = "That understanding is handed on through MLPs"
    if "paths.csv" not in tables:
        return Claim(name, "not tested", "the analysis `paths` was not part of this study")
    if _unknown(total):
        return Claim(name, "undecided", _unknown(total))
    shares = tables["paths.csv"].query("quantity == 'nie'").set_index("frozen")
    mlps, attention = shares.loc["MLPs"], shares.loc["attention"]
    if np.isnan(mlps["share_low"]):
        return Claim(name, "undecided", f"the share that needs the MLPs is unknown: {mlps['reason']}")
    text = (
        f"with all later MLPs frozen, {_share(mlps)} of the "
        f"NIE of the stream at the differing tokens after layer {mlps['layer']} is gone (supported from 50%); "
        f"with attention frozen, {_share(attention)}"
    )
    return Claim(name, _verdict(mlps["share_low"] - 0.5, mlps["share_high"] - 0.5), text)


def _share(row: pd.Series) -> str:
    ends = "no interval" if np.isnan(row["share_low"]) else f"{row['share_low']:.0%}, {row['share_high']:.0%}"
    return f"{row['share']:.0%} [{ends}]"


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


def _unknown(total: Estimate) -> str:
    """Why nothing can be said of shares and places of the total effect; empty where something can."""
    if total.n_clusters < _FEWEST_CLUSTERS:
        return f"{total.n_clusters} clusters of pairs are too few for a verdict, it takes {_FEWEST_CLUSTERS}"
    if total.sign:
        return ""
    return f"there is no total effect to mediate: {total.value:+.3g} [{total.low:+.3g}, {total.high:+.3g}] spans 0"


def _verdict(low: float, high: float) -> Verdict:
    return "supported" if low > 0 else "not supported" if high < 0 else "undecided"
