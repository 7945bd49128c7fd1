"""Which MLP neurons, and how few of them: a search for single neurons, then the smallest set that does its MLP's work.

Everything is chosen on the discovery split and reported on the held-out one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

from remote_mediation.analyses.neurons.gates import GateSet, measure_gates
from remote_mediation.analyses.neurons.search import SEARCH_COLUMNS, layers_of, search
from remote_mediation.config import StatisticsSettings, StudyConfig
from remote_mediation.engine.tasks import refuse_screen
from remote_mediation.lab import Lab
from remote_mediation.result import Finding, Findings
from remote_mediation.sites import ModelInfo, Site, check_site
from remote_mediation.stats import Estimate, benjamini_hochberg, estimate_means
from remote_mediation.summary import UNITS, total_effect
from remote_mediation.tokens import TokenPair

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


def sites(config: StudyConfig, info: ModelInfo, pair: TokenPair) -> list[Site]:
    """All neurons of every layer to search, together.

    Raises:
        SiteError: a layer out of range, or a screen that is not defined for the model.
    """
    if "gradient" in config.neurons.search:
        refuse_screen(config.neurons.screen, info)
    whole = [
        Site("mlp_neurons", layer, position, tuple(range(info.d_ff)))
        for position in config.positions.neurons
        for layer in layers_of(config, info)
        if pair.places(position).x0
    ]
    for site in whole:
        check_site(site, info)
    return whole


def analyse(lab: Lab, before: Findings) -> Finding:
    """Search at the first position asked for, measure what was found on all pairs, find the gate set."""
    found = search(lab)
    gates = measure_gates(lab, found.ranked)
    by = lab.study.config.statistics
    total = total_effect(lab.effects, lab.study.config.seed, by)
    tables = {
        "search.csv": pd.DataFrame(found.steps, columns=list(SEARCH_COLUMNS)),
        "sparsity.csv": found.profiles,
        "mediators.csv": mediators(lab.effects, total, lambda: lab.rng("mediators"), by),
        **({} if found.screen is None else {"screen.csv": found.screen}),
        **gates.tables,
    }
    return Finding(tables, {"gate neurons": (gates.found.gates,)} if gates.found else {}, gates.found)


def gate_set(before: Findings) -> GateSet | None:
    """The gate set that `analyse` found; None where there is none, or neurons were not asked for."""
    found: GateSet | None = before["neurons"].value if "neurons" in before else None
    return found


def mediators(
    effects: pd.DataFrame, total: Estimate, draw: Callable[[], np.random.Generator], by: StatisticsSettings
) -> pd.DataFrame:
    """Units that carry at least `min_share` of TE on the discovery split, as the held-out split sees them.

    Columns: `MEDIATOR_COLUMNS`. Both NIE and TIE are tested and the larger p counts; q is Benjamini-Hochberg over the
    units chosen. Where `total`, the mean TE, spans 0, none mediates: there are no shares of nothing.
    """
    units = effects[effects["analysis"] == UNITS]
    shares = _smaller_shares(units[units["split"] == "discovery"])
    chosen = shares[shares >= by.min_share].sort_values(ascending=False).index
    heldout = dict(list(units[units["split"] == "heldout"].groupby(_UNIT)))
    records = [_mediator(key, heldout[key], draw(), by) for key in chosen if key in heldout]
    table = pd.DataFrame(records, columns=[*MEDIATOR_COLUMNS])
    table["q"] = benjamini_hochberg(table["p"].to_numpy(float))
    carried = table[["nie_share", "tie_share"]].min(axis=1) >= by.min_share
    table["mediates"] = (carried & (table["q"] <= by.alpha) & (total.sign != 0)).astype(bool)
    return table


_UNIT = ["layer", "position", "unit_start"]
"""What tells a unit from others."""


def _smaller_shares(units: pd.DataFrame) -> pd.Series:
    """By unit the smaller of mean NIE and mean TIE, over mean TE."""
    means = units.groupby(_UNIT)[["nie", "tie", "te"]].mean()
    return means[["nie", "tie"]].div(means["te"], axis=0).min(axis=1)


def _mediator(
    key: tuple[int, str, int], heldout: pd.DataFrame, rng: np.random.Generator, by: StatisticsSettings
) -> dict[str, Any]:
    nie, tie = estimate_means(heldout[["nie", "tie"]].T, heldout["cluster"], rng, by.resamples)
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
