"""Which MLP neurons: windows of neighbours over all layers, then the single neurons of the strongest windows.

Windows are chosen on the discovery split only, so what the held-out split says of their neurons is free of the choice.
"""

from __future__ import annotations

import pandas as pd

from remote_mediation.config import StudyConfig
from remote_mediation.errors import SiteError
from remote_mediation.prompts import TokenPair
from remote_mediation.sites import ModelInfo, Site, check_site


def sites(config: StudyConfig, info: ModelInfo, pair: TokenPair) -> list[Site]:
    """All windows of every layer to search.

    Raises:
        SiteError: a layer out of range, or a window wider than the layer.
    """
    if config.neurons.window > info.d_ff:
        raise SiteError(f"neurons.window {config.neurons.window} is wider than the {info.d_ff} neurons of {info.name}")
    windows = [
        Site("mlp_neurons", layer, position, tuple(range(start, min(start + config.neurons.window, info.d_ff))))
        for position in config.positions.neurons
        for layer in (range(info.layers) if config.neurons.layers is None else config.neurons.layers)
        for start in range(0, info.d_ff, config.neurons.window)
        if pair.places(position).x0
    ]
    for site in windows:
        check_site(site, info)
    return windows


def units(config: StudyConfig, info: ModelInfo, effects: pd.DataFrame) -> list[Site]:
    """The single neurons of the windows with the largest effects on the discovery split.

    A window's effect is the smaller of its mean NIE and mean TIE, both in the direction of the mean TE: sufficient and
    necessary.
    """
    discovery = effects[effects["split"] == "discovery"]
    if discovery.empty:
        return []
    means = discovery.groupby(["layer", "position", "unit_start", "unit_stop"])[["nie", "tie"]].mean()
    direction = -1 if discovery["te"].mean() < 0 else 1
    strongest = (direction * means).min(axis=1).nlargest(config.neurons.max_windows)
    return [
        Site("mlp_neurons", int(layer), str(position), (unit,))
        for layer, position, start, stop in strongest[strongest > 0].index
        for unit in range(int(start), int(stop))
    ]
