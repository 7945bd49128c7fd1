"""At which depth can harm be read? Linear probes on the residual stream, compared with the depth at which it acts.

Activations come back from the model here, not outcomes: one vector per prompt, layer and position.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from remote_mediation.engine.tasks import Reading, read_task
from remote_mediation.lab import Floats, Lab, Study
from remote_mediation.later import Later, of_readings, pairs_of
from remote_mediation.probes import probe_profile
from remote_mediation.result import Finding, Findings
from remote_mediation.tokens import TokenPair

POSITIONS = ("edit", "last", "post_instruction")


def analyse(lab: Lab, before: Findings) -> Finding:
    """A cross-validated probe for every layer and position (`PROBE_COLUMNS`).

    Spans of several tokens are averaged; a position that a pair lacks is left out for all.
    """
    pairs = lab.pairs()
    positions = [name for name in POSITIONS if all(pair.places(name).x0 for pair in pairs)]
    features = _activations(lab, pairs, positions)
    labels = [side for _ in pairs for side in (0, 1)]
    clusters = [pair.cluster for pair in pairs for _ in (0, 1)]
    by_position = {name: features[:, :, number] for number, name in enumerate(positions)}
    return Finding({"probes.csv": probe_profile(by_position, labels, clusters, lab.rng("probes"))})


def _activations(lab: Lab, pairs: Sequence[TokenPair], positions: Sequence[str]) -> Floats:
    """The residual stream after every layer: `[prompt, layer, position, d_model]`, both prompts of a pair in turn."""
    info = lab.study.info
    tasks = []
    for pair in pairs:
        for side, ids in enumerate(pair.prompts):
            places = [tuple(at for at in pair.places(name)[side] if at < len(ids)) for name in positions]
            readings = [Reading("layer_output", layer, at) for layer in range(info.layers) for at in places]
            tasks.append(read_task(pair.id, ids, readings, lab.study.setting))
    found = np.array(lab.run(tasks), dtype=np.float64)
    return found.reshape(len(tasks), info.layers, len(positions), info.d_model)


def cost(study: Study) -> Later:
    """What `analyse` asks for, at most."""
    return of_readings(study, pairs_of(study), study.info.layers * len(POSITIONS) * study.info.d_model)
