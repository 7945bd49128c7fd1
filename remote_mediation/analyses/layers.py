"""Where in depth: the residual stream after every layer, at each named position."""

from __future__ import annotations

from remote_mediation.config import StudyConfig
from remote_mediation.sites import ModelInfo, Site
from remote_mediation.tokens import TokenPair


def sites(config: StudyConfig, info: ModelInfo, pair: TokenPair) -> list[Site]:
    """Every layer's output at the positions asked for."""
    return [
        Site("layer_output", layer, position)
        for position in config.positions.layers
        for layer in range(info.layers)
        if pair.places(position).x0
    ]
