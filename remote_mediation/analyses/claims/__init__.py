"""The five claims, put to joint and direct effects of whole sets on held-out pairs, with their placebos beside them."""

from remote_mediation.analyses.claims import ask, cost, show
from remote_mediation.analyses.claims.sparse import GATE_SET_COLUMNS
from remote_mediation.analyses.claims.specification import SPECIFICATION_COLUMNS
from remote_mediation.analyses.claims.understanding import READABLE_COLUMNS
from remote_mediation.result import Analysis

CLAIMS = Analysis(
    "claims",
    analyse=ask.analyse,
    columns={
        "claims.csv": ask.CLAIM_COLUMNS,
        "sets.csv": ask.SET_COLUMNS,
        "set_pairs.csv": ask.PAIR_COLUMNS,
        "specification.csv": SPECIFICATION_COLUMNS,
        "gate_sets.csv": GATE_SET_COLUMNS,
        "readable.csv": READABLE_COLUMNS,
    },
    cost=cost.cost,
    sections=show.sections,
    verdicts=show.verdicts,
)
