"""A map of single experts: what each adds is swapped between the prompts, and beside it the routing and what is shared.

Most experts do not run at a token. Which ones do is read first, on both prompts; only those are swapped. An expert that
neither prompt is routed to at a position adds 0 on both there, so that its effects are 0 without a run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from remote_mediation.config import StudyConfig
from remote_mediation.effects import Request
from remote_mediation.engine.tasks import routing_task
from remote_mediation.lab import Floats, Lab, Study
from remote_mediation.later import Later, of_bases, of_rows, pairs_of
from remote_mediation.result import Finding, Findings
from remote_mediation.sites import Component, ModelInfo, Site
from remote_mediation.tokens import TokenPair

EXPERT_COLUMNS: dict[str, str] = {
    "position": "where the routing is read and experts are swapped",
    "layer": "decoder layer, from 0",
    "expert": "number of the routed expert in its layer",
    "n": "pairs that have the position",
    "pairs_x0": "of these, pairs whose harmless prompt is routed to it there at some token",
    "pairs_x1": "pairs whose harmful prompt is",
    "weight_x0": "mean routing weight over tokens and pairs on the harmless prompts; 0 where it is not chosen",
    "weight_x1": "the same on the harmful prompts",
}


class _Routing(NamedTuple):
    """Mean routing weights of pairs at one position."""

    pairs: tuple[TokenPair, ...]
    weights: Floats
    """`[pair, side, layer, expert]`, layers with experts alone."""


def sites(config: StudyConfig, info: ModelInfo, pair: TokenPair) -> list[Site]:
    """The routing of every layer with experts, and its shared expert where it has one.

    Raises:
        SiteError: the model is no mixture of experts.
    """
    info.width("expert_output")
    components: list[Component] = ["router"]
    components += ["shared_expert_output"] if info.has("shared_expert_output") else []
    there = [position for position in config.positions.experts if pair.places(position).x0]
    return [Site(component, layer, position) for component in components for position in there for layer in info.routed]


def analyse(lab: Lab, before: Findings) -> Finding:
    """Effects of every expert that some prompt is routed to, and the routing (`EXPERT_COLUMNS`)."""
    read = {position: _routing(lab, position) for position in lab.study.config.positions.experts}
    read = {position: routing for position, routing in read.items() if routing.pairs}
    lab.measure([one for position, routing in read.items() for one in _requests(lab, position, routing)])
    return Finding({"experts.csv": _table(lab.study.info, read)})


def _routing(lab: Lab, position: str) -> _Routing:
    info, pairs = lab.study.info, tuple(pair for pair in lab.pairs() if pair.places(position).x0)
    found = lab.run([routing_task(pair, position, lab.study.setting) for pair in pairs])
    shape = (len(pairs), 2, len(info.routed), info.experts)
    return _Routing(pairs, np.array(found, dtype=np.float64).reshape(shape))


def _requests(lab: Lab, position: str, routing: _Routing) -> list[Request]:
    """Every expert that some prompt is routed to, on every pair; idle on those whose prompts are not."""
    requests = []
    runs = (routing.weights != 0).any(1)
    for place, expert in zip(*np.nonzero(runs.any(0)), strict=True):
        site = Site("expert_output", lab.study.info.routed[place], position, (int(expert),))
        for number, pair in enumerate(routing.pairs):
            requests.append(Request("experts", pair, site, idle=not runs[number, place, expert]))
    return requests


def _table(info: ModelInfo, read: Mapping[str, _Routing]) -> pd.DataFrame:
    """One row per expert that some prompt is routed to (`EXPERT_COLUMNS`)."""
    rows = []
    for position, routing in read.items():
        chosen, weights = (routing.weights != 0).sum(0), routing.weights.mean(0)
        for place, expert in zip(*np.nonzero(chosen.any(0)), strict=True):
            told: Sequence[object] = (
                *(position, info.routed[place], int(expert), len(routing.pairs)),
                *(int(count) for count in chosen[:, place, expert]),
                *(float(weight) for weight in weights[:, place, expert]),
            )
            rows.append(told)
    return pd.DataFrame(rows, columns=list(EXPERT_COLUMNS))


def cost(study: Study) -> Later:
    """The routing, then every expert that may run on a pair: at most so many as its tokens choose."""
    info, found = study.info, Later()
    for position in study.config.positions.experts:
        pairs = [pair for pair in pairs_of(study) if pair.places(position).x0]
        numbers = 2 * len(info.routed) * info.experts
        bases = of_bases(study, pairs).times(2)  # the routing is read, then a wave of rows begins
        found = found.plus(bases, Later(down=4.0 * numbers * len(pairs)))
        site = Site("expert_output", info.routed[len(info.routed) // 2], position, (0,))
        for pair in pairs:
            running = min(info.experts, info.chosen * sum(map(len, pair.places(position))))
            found = found.plus(of_rows(study, [pair], site).times(running * len(info.routed)))
    return found
