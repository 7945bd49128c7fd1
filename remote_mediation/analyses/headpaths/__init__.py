"""Which way do heads act: straight to the answer, or by way of later MLPs and heads, as a gate does by amplifiers?"""

from remote_mediation.analyses.headpaths import ask, cost, show
from remote_mediation.result import Analysis

HEADPATHS = Analysis(
    "headpaths",
    analyse=ask.analyse,
    columns={
        "two_step.csv": ask.STEP_COLUMNS,
        "head_paths.csv": ask.PATH_COLUMNS,
        "receivers.csv": ask.RECEIVER_COLUMNS,
    },
    cost=cost.cost,
    sections=show.sections,
    needs=("rivals",),
)
