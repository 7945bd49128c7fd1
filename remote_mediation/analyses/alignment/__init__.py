"""What did training change, and where? Mediators of the checkpoint before it, put into the model, and the other way."""

from remote_mediation.analyses.alignment import ask, show
from remote_mediation.result import Analysis

ALIGNMENT = Analysis(
    "alignment",
    analyse=ask.analyse,
    columns={"alignment.csv": ask.ALIGNMENT_COLUMNS},
    cost=ask.cost,
    sections=show.sections,
)
