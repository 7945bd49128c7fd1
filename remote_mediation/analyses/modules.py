"""Attention or MLP: what each adds to the residual stream, layer by layer, so that the two can be compared in pairs."""

from __future__ import annotations

from remote_mediation.config import StudyConfig
from remote_mediation.sites import Component, ModelInfo, Site
from remote_mediation.tokens import TokenPair

COMPONENTS: tuple[Component, ...] = ("attention_output", "mlp_output")


def sites(config: StudyConfig, info: ModelInfo, pair: TokenPair) -> list[Site]:
    """Every layer's attention and MLP output at the positions asked for."""
    return [
        Site(component, layer, position)
        for position in config.positions.modules
        for layer in range(info.layers)
        for component in COMPONENTS
        if pair.places(position).x0
    ]
