"""Questions. Each analysis compiles one to sites; the engine measures them all alike. A new analysis is one file.

An analysis names the sites to measure on a pair, and may, once these are measured, name further ones (`refine`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd

from remote_mediation.analyses import checks, heads, layers, modules, neurons, tokens
from remote_mediation.config import StudyConfig
from remote_mediation.prompts import TokenPair
from remote_mediation.sites import ModelInfo, Site


@dataclass(frozen=True)
class Analysis:
    """One granularity of a study."""

    sites: Callable[[StudyConfig, ModelInfo, TokenPair], list[Site]]
    """Sites to measure on a pair."""
    refine: Callable[[StudyConfig, ModelInfo, pd.DataFrame], list[Site]] | None = None
    """Further sites, the same for every pair, from the effects of the first ones."""


ANALYSES: dict[str, Analysis] = {
    "checks": Analysis(checks.sites),
    "layers": Analysis(layers.sites),
    "modules": Analysis(modules.sites),
    "tokens": Analysis(tokens.sites),
    "heads": Analysis(heads.sites),
    "neurons": Analysis(neurons.sites, neurons.units),
}
