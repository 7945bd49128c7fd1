"""Where inside a language model is harmful text decided? Causal mediation analysis, local or on NDIF.

Names are imported when they are first used, so that the command line answers `--help` without loading numerics.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from remote_mediation.config import StudyConfig
    from remote_mediation.door import open_lab, open_run
    from remote_mediation.engine.local import LocalBackend
    from remote_mediation.engine.remote import NdifBackend
    from remote_mediation.errors import MediationError
    from remote_mediation.outcomes import Outcome
    from remote_mediation.result import Analysis
    from remote_mediation.sites import Site, band
    from remote_mediation.study import run_study

__all__ = [
    "Analysis",
    "LocalBackend",
    "MediationError",
    "NdifBackend",
    "Outcome",
    "Site",
    "StudyConfig",
    "band",
    "open_lab",
    "open_run",
    "run_study",
]

_HOMES = {
    "Analysis": "result",
    "LocalBackend": "engine.local",
    "MediationError": "errors",
    "NdifBackend": "engine.remote",
    "Outcome": "outcomes",
    "Site": "sites",
    "StudyConfig": "config",
    "band": "sites",
    "open_lab": "door",
    "open_run": "door",
    "run_study": "study",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
