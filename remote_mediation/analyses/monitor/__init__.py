"""The gates' activity as a detector of harmful prompts, beside a probe and random neurons."""

from remote_mediation.analyses.monitor import ask, show
from remote_mediation.analyses.monitor.detectors import DETECTOR_COLUMNS
from remote_mediation.result import Analysis

MONITOR = Analysis(
    "monitor",
    analyse=ask.analyse,
    columns={"detectors.csv": DETECTOR_COLUMNS},
    cost=ask.cost,
    sections=show.sections,
    needs=("neurons",),
)
