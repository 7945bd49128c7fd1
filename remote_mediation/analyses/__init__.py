"""Questions. Each analysis compiles one to sites; the engine measures them all alike. A new analysis is one file.

An analysis names the sites to measure on a pair, and may go on from there with a `Lab`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pandas as pd

from remote_mediation.analyses import (
    attacks,
    checks,
    detect,
    heads,
    intervene,
    layers,
    modules,
    monitor,
    neurons,
    paths,
    tokens,
)
from remote_mediation.analyses.claims import ask as claims
from remote_mediation.config import StudyConfig
from remote_mediation.lab import Lab
from remote_mediation.sites import ModelInfo, Site
from remote_mediation.tokens import TokenPair

Tables = Mapping[str, pd.DataFrame]


@dataclass(frozen=True)
class Analysis:
    """One analysis of a study."""

    sites: Callable[[StudyConfig, ModelInfo, TokenPair], list[Site]] | None = None
    """Sites to measure on a pair; those of all analyses are measured together."""
    analyse: Callable[[Lab, Tables], dict[str, pd.DataFrame]] | None = None
    """What to do once they are: tables by name of their CSV file, from those of the analyses before it."""


ANALYSES: dict[str, Analysis] = {
    "checks": Analysis(checks.sites),
    "layers": Analysis(layers.sites),
    "modules": Analysis(modules.sites),
    "tokens": Analysis(tokens.sites),
    "heads": Analysis(heads.sites),
    "neurons": Analysis(neurons.sites, neurons.analyse),
    "detect": Analysis(analyse=detect.analyse),
    "paths": Analysis(analyse=paths.analyse),
    "intervene": Analysis(analyse=intervene.analyse),
    "attacks": Analysis(analyse=attacks.analyse),
    "monitor": Analysis(analyse=monitor.analyse),
    "claims": Analysis(analyse=claims.analyse),
}
