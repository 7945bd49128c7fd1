"""Where in depth: the residual stream after every layer, at each named position."""

from __future__ import annotations

from remote_mediation.config import StudyConfig
from remote_mediation.prompts import TokenPair
from remote_mediation.sites import ModelInfo, Site


def sites(config: StudyConfig, info: ModelInfo, pair: TokenPair) -> list[Site]:
    """Every layer's output at the positions asked for, and at all positions in three layers.

    The latter are a check that every run carries: there NIE = TE and NDE = 0 by construction (METHOD, "identities").
    """
    checks = [Site("layer_output", layer, "all") for layer in sorted({0, info.layers // 2, info.layers - 1})]
    profile = [
        Site("layer_output", layer, position)
        for position in config.positions.layers
        for layer in range(info.layers)
        if pair.places(position).x0
    ]
    return list(dict.fromkeys([*checks, *profile]))
