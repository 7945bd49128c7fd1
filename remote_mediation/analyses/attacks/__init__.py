"""Can the repair be got around? The gate set under rewrapped prompts and on other checkpoints."""

from remote_mediation.analyses.attacks import ask, show
from remote_mediation.result import Analysis

ATTACKS = Analysis(
    "attacks",
    analyse=ask.analyse,
    columns={"attacks.csv": ask.ATTACK_COLUMNS},
    cost=ask.cost,
    sections=show.sections,
    needs=("neurons",),
)
