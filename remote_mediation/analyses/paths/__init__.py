"""How harm travels: what is left of an early site's effect while later modules stay as they were."""

from remote_mediation.analyses.paths import ask, show
from remote_mediation.result import Analysis

PATHS = Analysis(
    "paths",
    analyse=ask.analyse,
    columns={"paths.csv": ask.PATH_COLUMNS},
    cost=ask.cost,
    sections=show.sections,
    needs=("neurons",),
)
