"""How harm travels: the effect of an early site while later MLPs, attention or the gate neurons stay as they were.

The early site is the residual stream at the tokens that differ, after the last layer of the first third. What is left
of its effect while all later modules of a kind are frozen did not travel through them; the rest needed them. On a chain
through both kinds both shares can be near 1: they are what a path *needs*, not parts of a whole.
Sources: path-specific effects (Pearl 2001), path patching (Goldowsky-Dill et al. 2023, arXiv 2304.05969).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from remote_mediation.analyses.neurons.ask import gate_set
from remote_mediation.analyses.neurons.gates import GateSet
from remote_mediation.engine.rows import Row, as_it_is, swap
from remote_mediation.lab import Floats, Lab, Study
from remote_mediation.later import Later, of_bases, of_rows, pairs_of
from remote_mediation.result import Finding, Findings
from remote_mediation.sites import Component, Site
from remote_mediation.stats import estimate_means, ratio_of_means
from remote_mediation.tokens import TokenPair

PATH_COLUMNS: dict[str, str] = {
    "quantity": "nie (the early site as on the harmful prompt) or tie (as on the harmless one)",
    "layer": "layer of the early site, from 0",
    "frozen": "what stays as it was in all later layers; gates and random neurons in theirs alone",
    "n": "pairs",
    "clusters": "clusters of pairs",
    "mean": "mean effect of the early site that is left, in the outcome's unit",
    "ci_low": "lower end of the 95% clustered bootstrap interval",
    "ci_high": "upper end",
    "share": "1 - what is left / what there was: the part of the effect that needs the frozen modules",
    "share_low": "lower end of its 95% interval",
    "share_high": "upper end",
    "reason": "why a number is missing, or why to read it with care",
}
MLPS, ATTENTION, GATES, RANDOM = "MLPs", "attention", "gate neurons", "random neurons"
_MODULES: dict[str, Component] = {MLPS: "mlp_output", ATTENTION: "attention_output"}
# Random sets of neurons whose effects are averaged.
RANDOM_SETS = 20


def early_layer(layers: int) -> int:
    """The last layer of the first third."""
    return max(layers // 3 - 1, 0)


def analyse(lab: Lab, before: Findings) -> Finding:
    """Shares of the early site's effect by what is frozen (`PATH_COLUMNS`).

    Where the gate set is known, all of it is on the held-out split, on which the gates were not chosen.
    """
    gates = gate_set(before)
    pairs = [pair for pair in lab.pairs("heldout" if gates else "all") if pair.places("edit").x0]
    frozen = _frozen(lab, gates)
    every = [one for sets in frozen.values() for one in sets]
    lab.outcomes([_held(lab, pair, side, one) for pair in pairs for side in (0, 1) for one in every])
    rows = []
    for side, quantity in ((0, "nie"), (1, "tie")):
        left = {
            name: np.mean([_effect(lab, pairs, side, one) for one in sets], axis=0) for name, sets in frozen.items()
        }
        rows += [_row(lab, pairs, quantity, name, part, left["nothing"]) for name, part in left.items()]
    return Finding({"paths.csv": pd.DataFrame(rows, columns=list(PATH_COLUMNS))})


def _frozen(lab: Lab, gates: GateSet | None) -> dict[str, list[list[Site]]]:
    """By name the sets that stay as they were; the effects of several are averaged."""
    frozen: dict[str, list[list[Site]]] = {"nothing": [[]]}
    frozen |= {name: [_later(lab, component)] for name, component in _MODULES.items()}
    if gates:
        frozen |= {GATES: [[gates.gates]], RANDOM: [[one] for one in gates.random[:RANDOM_SETS]]}
    return frozen


def _later(lab: Lab, component: Component) -> list[Site]:
    layers = lab.study.info.layers
    return [Site(component, layer, "all") for layer in range(early_layer(layers) + 1, layers)]


def _effect(lab: Lab, pairs: Sequence[TokenPair], side: int, frozen: Sequence[Site]) -> Floats:
    """NIE (side 0) or TIE (side 1) of the early site on each pair, while sites stay as they are on that side."""
    found = lab.outcomes([_held(lab, pair, side, frozen) for pair in pairs])
    bases = lab.outcomes([Row(pair.id, side) for pair in pairs])
    return found - bases if side == 0 else bases - found


def _held(lab: Lab, pair: TokenPair, side: int, frozen: Sequence[Site]) -> Row:
    info = lab.study.info
    early = swap(pair, Site("layer_output", early_layer(info.layers), "edit"), side, info)
    kept = [as_it_is(pair, site, side) for site in frozen]
    return replace(early, writes=(*early.writes, *kept))


def _row(lab: Lab, pairs: Sequence[TokenPair], quantity: str, name: str, left: Floats, free: Floats) -> dict[str, Any]:
    clusters, by = [pair.cluster for pair in pairs], lab.study.config.statistics
    (mean,) = estimate_means([left], clusters, lab.rng("paths"), by.resamples)
    share = ratio_of_means(free - left, free, clusters, lab.rng("paths"), by.resamples)
    return {
        "quantity": quantity,
        "layer": early_layer(lab.study.info.layers),
        "frozen": name,
        "n": mean.n_pairs,
        "clusters": mean.n_clusters,
        **{"mean": mean.value, "ci_low": mean.low, "ci_high": mean.high},
        **share.columns("share"),
        "reason": share.reason or mean.reason,
    }


def cost(study: Study) -> Later:
    """What `analyse` asks for, at most."""
    gated = "neurons" in study.config.analyses
    site = Site("layer_output", early_layer(study.info.layers), "edit")
    count = 3 + (1 + RANDOM_SETS if gated else 0)  # nothing frozen, MLPs, attention, gates, random sets
    pairs = pairs_of(study, "heldout" if gated else "all")
    return of_bases(study, pairs).plus(of_rows(study, pairs, site).times(count))
