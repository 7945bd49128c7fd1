"""Repair: gate neurons held while the model generates, its benefit and its cost."""

from remote_mediation.analyses.intervene import ask, judging, show
from remote_mediation.result import Analysis

INTERVENE = Analysis(
    "intervene",
    analyse=ask.analyse,
    columns={"intervene.csv": ask.INTERVENE_COLUMNS, "judge.csv": judging.JUDGE_COLUMNS},
    cost=ask.cost,
    sections=show.sections,
    needs=("neurons",),
)
