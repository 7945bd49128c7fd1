"""At which depth can harm be read? Linear probes, beside the depth at which it acts."""

from remote_mediation.analyses.detect import ask, show
from remote_mediation.probes import PROBE_COLUMNS
from remote_mediation.result import Analysis

DETECT = Analysis(
    "detect",
    analyse=ask.analyse,
    columns={"probes.csv": PROBE_COLUMNS},
    cost=ask.cost,
    sections=show.sections,
    needs=("layers",),
)
