"""Where single sites are swapped, one at a time, over the whole model. Maps describe; they decide no claim."""

from __future__ import annotations

from remote_mediation.config import StudyConfig
from remote_mediation.sites import Component, ModelInfo, Site
from remote_mediation.tokens import TokenPair

MODULES: tuple[Component, ...] = ("attention_output", "mlp_output")


def layer_sites(config: StudyConfig, info: ModelInfo, pair: TokenPair) -> list[Site]:
    """Every layer's output at the positions asked for."""
    return [
        Site("layer_output", layer, position)
        for position in _there(config.positions.layers, pair)
        for layer in range(info.layers)
    ]


def module_sites(config: StudyConfig, info: ModelInfo, pair: TokenPair) -> list[Site]:
    """What attention and MLP of every layer add to the residual stream, so that they can be compared in pairs."""
    layers = [(position, n) for position in _there(config.positions.modules, pair) for n in range(info.layers)]
    return [Site(component, layer, position) for position, layer in layers for component in MODULES]


def token_sites(config: StudyConfig, info: ModelInfo, pair: TokenPair) -> list[Site]:
    """Every layer's output at every token from the first difference on; a name means the same place in every pair."""
    return [Site("layer_output", layer, token) for token in pair.tokens() for layer in range(info.layers)]


def head_sites(config: StudyConfig, info: ModelInfo, pair: TokenPair) -> list[Site]:
    """Every attention head's own contribution, before the output projection mixes them; or its query, key or value.

    Raises:
        SiteError: the model has no such heads.
    """
    return [
        Site(component, layer, position, (head,))
        for component in config.heads.components
        for position in _there(config.positions.heads, pair)
        for layer in info.layers_with(component)
        for head in range(info.width(component))
    ]


def _there(positions: list[str], pair: TokenPair) -> list[str]:
    """Positions at which a pair has tokens."""
    return [position for position in positions if pair.places(position).x0]
