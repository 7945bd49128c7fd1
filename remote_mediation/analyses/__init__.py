"""The analyses of this package, in the order in which they run; each is a folder, and a line or two here."""

from __future__ import annotations

from collections.abc import Sequence

from remote_mediation.analyses.ablation import ABLATION
from remote_mediation.analyses.alignment import ALIGNMENT
from remote_mediation.analyses.attacks import ATTACKS
from remote_mediation.analyses.checks import CHECKS
from remote_mediation.analyses.claims import CLAIMS
from remote_mediation.analyses.detect import DETECT
from remote_mediation.analyses.experts import EXPERTS
from remote_mediation.analyses.headpaths import HEADPATHS
from remote_mediation.analyses.intervene import INTERVENE
from remote_mediation.analyses.maps import HEADS, LAYERS, MODULES, TOKENS
from remote_mediation.analyses.monitor import MONITOR
from remote_mediation.analyses.neurons import NEURONS
from remote_mediation.analyses.paths import PATHS
from remote_mediation.analyses.rivals import DIRECTIONS, RIVALS
from remote_mediation.analyses.total import TOTAL
from remote_mediation.analyses.verify import VERIFY
from remote_mediation.errors import SettingsError
from remote_mediation.result import Analysis
from remote_mediation.show.section import Section

ALWAYS = (CHECKS, TOTAL)
"""What every study runs first."""
EVERY: tuple[Analysis, ...] = (
    *(CLAIMS, DIRECTIONS, ABLATION, RIVALS, LAYERS, MODULES, TOKENS, HEADS, EXPERTS),
    *(NEURONS, DETECT, PATHS, HEADPATHS, INTERVENE, ATTACKS, MONITOR, ALIGNMENT, VERIFY),
)
"""All that a study can name."""


def chosen(names: Sequence[str], more: Sequence[Analysis] = ()) -> tuple[Analysis, ...]:
    """The analyses of a study: those of every study first, then those named, in the order in which they run.

    more: analyses from outside the package; one of a name that is known takes the place of that one. `verify` runs
    last, as it takes up what all others found.

    Raises:
        SettingsError: a name that is not known.
    """
    known = {one.name: one for one in (*EVERY, *more)}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise SettingsError(f"unknown analysis {unknown[0]!r}; known: {', '.join(known)}")
    named = [one for name, one in known.items() if name in names]
    return (*ALWAYS, *sorted(named, key=lambda one: one.name == VERIFY.name))


def with_needed(names: Sequence[str]) -> list[str]:
    """Names of analyses, each after those that it builds on, once.

    Raises:
        SettingsError: a name that is not known.
    """
    found: list[str] = []
    for one in chosen(names)[len(ALWAYS) :]:
        found += [*one.needs, one.name]
    return list(dict.fromkeys(found))


def stranger(name: str) -> Analysis:
    """Stands for an analysis from outside the package where it was not given: its report says so."""
    said = f"This analysis is not part of the package; `open_run(folder, analyses=[{name}])` shows what it found."
    return Analysis(name, sections=lambda result: [Section(name, name, "", said)])
