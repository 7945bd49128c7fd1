"""Which token and how deep: the residual stream at every single token from the first difference on."""

from __future__ import annotations

from remote_mediation.config import StudyConfig
from remote_mediation.sites import ModelInfo, Site
from remote_mediation.tokens import TokenPair


def sites(config: StudyConfig, info: ModelInfo, pair: TokenPair) -> list[Site]:
    """Every layer's output at every token; the same name means the same place in every pair."""
    return [Site("layer_output", layer, token) for token in pair.tokens() for layer in range(info.layers)]
