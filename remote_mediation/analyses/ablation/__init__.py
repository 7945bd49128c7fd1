"""A direction taken out, or added, while the model generates: refusals, false refusals, and what else changes."""

from remote_mediation.analyses.ablation import ask, show
from remote_mediation.analyses.intervene.judging import JUDGE_COLUMNS
from remote_mediation.result import Analysis

ABLATION = Analysis(
    "ablation",
    analyse=ask.analyse,
    columns={"ablation.csv": ask.ABLATION_COLUMNS, "ablation_judge.csv": JUDGE_COLUMNS},
    cost=ask.cost,
    sections=show.sections,
    needs=("directions",),
)
