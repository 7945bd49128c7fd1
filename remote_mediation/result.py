"""What an analysis is, and what a measured study is: the two that every part of a report is made from.

An analysis says which sites it measures on a pair, goes on from there with a `Lab`, and says how its tables are read.
It can be written outside this package: `open_lab(study, analyses=["layers", mine])`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import pandas as pd

from remote_mediation.config import StudyConfig
from remote_mediation.lab import Lab, Study
from remote_mediation.later import Later
from remote_mediation.show.section import Section, Verdict
from remote_mediation.sites import ModelInfo, Site
from remote_mediation.summary import Summary
from remote_mediation.tokens import TokenPair


class Finding(NamedTuple):
    """What an analysis leaves."""

    tables: Mapping[str, pd.DataFrame] = MappingProxyType({})
    """By name of the CSV file."""
    sets: Mapping[str, tuple[Site, ...]] = MappingProxyType({})
    """Sets of sites that it found to carry the effect, by what they are."""
    value: Any = None
    """What analyses after it build on, such as `neurons.GateSet`, or what its sections say beside its tables."""
    files: Mapping[str, bytes] = MappingProxyType({})
    """Other files that it leaves in the run folder, and in what is exported of it, by name."""


Findings = Mapping[str, Finding]
"""By name of the analysis, those that ran before."""


@dataclass(frozen=True)
class Analysis:
    """One analysis of a study; only its name is needed."""

    name: str
    """As the study's `analyses` has it, and the column `analysis` of its effects."""
    sites: Callable[[StudyConfig, ModelInfo, TokenPair], list[Site]] | None = None
    """Sites to measure on a pair; their effects become part of the study's."""
    analyse: Callable[[Lab, Findings], Finding] | None = None
    """What to do once they are measured. The same code runs when a report is rebuilt without a model."""
    columns: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """What the columns of its tables mean, in their order, by name of the CSV file."""
    cost: Callable[[Study], Later] | None = None
    """What `analyse` asks for, at most."""
    sections: Callable[[Result], list[Section]] | None = None
    """What the report says of it; by default a table of its strongest sites."""
    verdicts: Callable[[Result], list[Verdict]] | None = None
    """Its rows of the table of claims."""
    needs: tuple[str, ...] = ()
    """Analyses whose findings it builds on; `extend` adds them."""
    check: Callable[[Study], None] | None = None
    """Refuses a study of which it could not be asked, before anything is measured."""


@dataclass(frozen=True)
class Result:
    """A measured study."""

    study: Study
    effects: pd.DataFrame
    """`EFFECT_COLUMNS`."""
    tables: dict[str, pd.DataFrame]
    """What analyses found beyond effects, by name of the CSV file."""
    summary: Summary
    analyses: tuple[Analysis, ...] = ()
    """Those that were asked for, in the order in which they ran."""
    files: Mapping[str, bytes] = field(default_factory=dict)
    """What they left beside tables, by name."""
    values: Mapping[str, Any] = field(default_factory=dict)
    """`Finding.value` of those that left one, by name of the analysis."""
    lost: int = 0
    """Values that the run had when it was finished, and whose files are gone or damaged since."""

    def verdicts(self) -> list[Verdict]:
        """The table of claims."""
        return [verdict for one in self.analyses if one.verdicts for verdict in one.verdicts(self)]

    def columns(self) -> dict[str, Mapping[str, str]]:
        """Documented columns of the tables, by name of the CSV file."""
        return {name: columns for one in self.analyses for name, columns in one.columns.items()}
