"""Could one watch the gates? Their activity at the last prompt token as a detector of harmful prompts.

Direction and thresholds come from the discovery split. The gates are compared with a probe on the residual stream of
their layer and with random sets of neurons, on held-out pairs and, where given, on hard negatives: prompts that only
sound harmful, beside harmful ones (XSTest, Röttger et al. 2024, arXiv 2308.01263).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

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


class _Watched(NamedTuple):
    """One set of prompts as the detectors see it."""

    units: Floats
    """`[prompt, d_ff]`, neurons of the gates' layer at the last prompt token."""
    stream: Floats
    """`[prompt, d_model]`, the residual stream after that layer."""
    labels: NDArray[np.int_]
    """`[prompt]`, 1 where it is harmful."""
    clusters: NDArray[np.str_]
    """`[prompt]`."""

    @classmethod
    def of(cls, lab: Lab, pairs: Sequence[TokenPair], layer: int) -> _Watched:
        """Both prompts of every pair, the harmless one first."""
        units, stream = np.split(_activity(lab, pairs, layer), [lab.study.info.d_ff], axis=1)
        return cls(units, stream, np.tile([0, 1], len(pairs)), np.repeat([pair.cluster for pair in pairs], 2))


def analyse(lab: Lab, before: Findings) -> Finding:
    """Every detector on every set of prompts (`DETECTOR_COLUMNS`); nothing where there is no gate set."""
    found = gate_set(before)
    if found is None:
        return Finding()
    sets = {name: _Watched.of(lab, pairs, found.gates.layer) for name, pairs in _prompts(lab).items()}
    detectors = {"gates": _by_neurons(sets, found.gates), "residual probe": _by_probe(sets)}
    random = [_by_neurons(sets, site) for site in found.random]
    return Finding({"detectors.csv": detector_table(detectors, lab.rng("monitor"), random)})


def _prompts(lab: Lab) -> dict[str, Sequence[TokenPair]]:
    """Sets of prompts: those that the detectors learn from, and those on which they are judged."""
    sets: dict[str, Sequence[TokenPair]] = {split: lab.pairs(split) for split in (DISCOVERY, HELDOUT)}
    hard = lab.study.config.monitor.hard_negatives
    if hard:
        sets[HARD] = lab.tokenised(f"hard-negatives-{digest(hard)}", lambda: load_pairs(hard)).pairs
    return sets


def _by_neurons(sets: Mapping[str, _Watched], site: Site) -> dict[str, Scored]:
    """Some neurons as a detector, on every set."""
    learnt = sets[DISCOVERY]
    activity = [one.units[:, site.units] for one in sets.values()]
    return _scored(sets, gate_scores(learnt.units[:, site.units], learnt.labels, *activity))


def _by_probe(sets: Mapping[str, _Watched]) -> dict[str, Scored]:
    """A probe on the stream as a detector, on every set."""
    learnt = sets[DISCOVERY]
    return _scored(sets, fit_scores(learnt.stream, learnt.labels, *(one.stream for one in sets.values())))


def _scored(sets: Mapping[str, _Watched], scores: Sequence[Floats]) -> dict[str, Scored]:
    """Scores by set, in the order of the sets."""
    found = zip(sets.items(), scores, strict=True)
    return {name: Scored(of_set, one.labels, one.clusters) for (name, one), of_set in found}


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
