"""Which attention heads: each head's own contribution before the output projection mixes them."""

from __future__ import annotations

from remote_mediation.config import StudyConfig
from remote_mediation.sites import ModelInfo, Site
from remote_mediation.tokens import TokenPair


def sites(config: StudyConfig, info: ModelInfo, pair: TokenPair) -> list[Site]:
    """Every head of every layer at the positions asked for."""
    return [
        Site("attention_heads", layer, position, (head,))
        for position in config.positions.heads
        for layer in range(info.layers)
        for head in range(info.heads)
        if pair.places(position).x0
    ]
