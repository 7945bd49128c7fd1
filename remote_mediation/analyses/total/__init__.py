"""The total effect, and how much of what the model says the outcome's openings cover."""

from remote_mediation.analyses.total import ask, show
from remote_mediation.result import Analysis

TOTAL = Analysis(
    "total",
    analyse=ask.analyse,
    columns={"coverage.csv": ask.COVERAGE_COLUMNS, "openings.csv": ask.OPENING_COLUMNS},
    sections=show.sections,
)
