"""Where inside a language model is harmful text decided? Causal mediation analysis, local or on NDIF.

Names are imported when they are first used, so that the command line answers `--help` without loading numerics.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from remote_mediation.config import StudyConfig, load_config
    from remote_mediation.engine.local import LocalBackend
    from remote_mediation.errors import MediationError
    from remote_mediation.report import write_report
    from remote_mediation.sites import Site
    from remote_mediation.store import Store
    from remote_mediation.study import reread, run_study

__all__ = [
    "LocalBackend",
    "MediationError",
    "Site",
    "Store",
    "StudyConfig",
    "load_config",
    "reread",
    "run_study",
    "write_report",
]

_HOMES = {
    "LocalBackend": "engine.local",
    "MediationError": "errors",
    "Site": "sites",
    "Store": "store",
    "StudyConfig": "config",
    "load_config": "config",
    "reread": "study",
    "run_study": "study",
    "write_report": "report",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
