"""Does it hold in what the model says? Judged answers while the sites and sets that a run found are swapped."""

from remote_mediation.analyses.intervene.judging import JUDGE_COLUMNS
from remote_mediation.analyses.verify import ask, show
from remote_mediation.result import Analysis

VERIFY = Analysis(
    "verify",
    analyse=ask.analyse,
    columns={
        "verify.csv": ask.VERIFY_COLUMNS,
        "judged.csv": ask.JUDGED_COLUMNS,
        "verify_judge.csv": JUDGE_COLUMNS,
    },
    cost=ask.cost,
    sections=show.sections,
)
