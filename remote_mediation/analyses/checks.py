"""Relations that hold by construction (METHOD, "identities"), measured in every run so that every run checks itself."""

from __future__ import annotations

from remote_mediation.config import StudyConfig
from remote_mediation.result import Analysis
from remote_mediation.sites import ModelInfo, Site
from remote_mediation.summary import CHECKS as NAME
from remote_mediation.tokens import TokenPair


def sites(config: StudyConfig, info: ModelInfo, pair: TokenPair) -> list[Site]:
    """The residual stream in three layers from the edit on, and after the last layer where the answer is read."""
    depths = sorted({0, info.layers // 2, info.layers - 1}) if pair.aligned else ()
    return [*(Site("layer_output", layer, "all") for layer in depths), Site("layer_output", info.layers - 1, "last")]


CHECKS = Analysis(NAME, sites=sites, sections=lambda result: [])
