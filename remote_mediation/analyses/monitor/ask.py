"""Could one watch the gates? Their activity at the last prompt token as a detector of harmful prompts.

Direction and thresholds come from the discovery split. The gates are compared with a probe on the residual stream of
their layer and with random sets of neurons, on held-out pairs and, where given, on hard negatives: prompts that only
sound harmful, beside harmful ones (XSTest, Röttger et al. 2024, arXiv 2308.01263).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from remote_mediation.analyses.monitor.detectors import DISCOVERY, Scored, detector_table, gate_scores
from remote_mediation.analyses.neurons.ask import gate_set
from remote_mediation.engine.payload import digest
from remote_mediation.engine.tasks import Reading, read_task
from remote_mediation.lab import Floats, Lab, Study
from remote_mediation.later import Later, of_readings, pairs_of
from remote_mediation.pairs import load_pairs
from remote_mediation.probes import fit_scores
from remote_mediation.result import Finding, Findings
from remote_mediation.sites import Site
from remote_mediation.tokens import TokenPair

HELDOUT, HARD = "heldout", "hard negatives"


def analyse(lab: Lab, before: Findings) -> Finding:
    """Every detector on every set of prompts (`DETECTOR_COLUMNS`); nothing where there is no gate set."""
    found = gate_set(before)
    if found is None:
        return Finding()
    gates = found.gates
    sets = {split: lab.pairs(split) for split in (DISCOVERY, HELDOUT)}
    hard = lab.study.config.monitor.hard_negatives
    if hard:
        sets[HARD] = lab.tokenised(f"hard-negatives-{digest(hard)}", lambda: load_pairs(hard)).pairs
    activity = {name: _activity(lab, pairs, gates.layer) for name, pairs in sets.items()}
    d_ff = lab.study.info.d_ff
    units = {name: table[:, :d_ff] for name, table in activity.items()}
    stream = {name: table[:, d_ff:] for name, table in activity.items()}
    labels = {name: np.tile([0, 1], len(pairs)) for name, pairs in sets.items()}
    clusters = {name: np.repeat([pair.cluster for pair in pairs], 2) for name, pairs in sets.items()}

    def scored(scores: Mapping[str, Floats]) -> dict[str, Scored]:
        return {name: Scored(scores[name], labels[name], clusters[name]) for name in sets}

    def watched(site: Site) -> dict[str, Scored]:
        scores = gate_scores(
            units[DISCOVERY][:, site.units], labels[DISCOVERY], *(table[:, site.units] for table in units.values())
        )
        return scored(dict(zip(units, scores, strict=True)))

    probed = fit_scores(stream[DISCOVERY], labels[DISCOVERY], *stream.values())
    detectors = {"gates": watched(gates), "residual probe": scored(dict(zip(stream, probed, strict=True)))}
    random = [watched(site) for site in found.random]
    return Finding({"detectors.csv": detector_table(detectors, lab.rng("monitor"), random)})


def _activity(lab: Lab, pairs: Sequence[TokenPair], layer: int) -> Floats:
    """At the last prompt token: all neurons of a layer, then the stream after it; `[prompt, d_ff + d_model]`."""
    tasks = []
    for pair in pairs:
        for ids in pair.prompts:
            last = (len(ids) - 1,)
            readings = [Reading("mlp_neurons", layer, last), Reading("layer_output", layer, last)]
            tasks.append(read_task(pair.id, ids, readings, lab.study.setting))
    return np.array(lab.run(tasks), dtype=np.float64)


def cost(study: Study) -> Later:
    """What `analyse` asks for, at most."""
    hard = study.config.monitor.hard_negatives
    more = len(load_pairs(hard)) / len(study.pairs) if hard else 0.0
    return of_readings(study, pairs_of(study), study.info.d_ff + study.info.d_model).times(1 + more)
