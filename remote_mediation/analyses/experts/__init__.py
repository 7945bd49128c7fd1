"""The parts of a mixture of experts: its routing, its shared expert, and each routed expert by layer."""

from remote_mediation.analyses.experts import ask, show
from remote_mediation.result import Analysis

EXPERTS = Analysis(
    "experts",
    sites=ask.sites,
    analyse=ask.analyse,
    columns={"experts.csv": ask.EXPERT_COLUMNS},
    cost=ask.cost,
    sections=show.sections,
)
