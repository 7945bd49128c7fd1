"""What others say carries the effect: one direction, 0.1% of the neurons, early layers, a few heads."""

from remote_mediation.analyses.rivals import bases, cost, directions, geometry, given, sets, show
from remote_mediation.analyses.rivals.rulings import CLAIM_COLUMNS, SET_COLUMNS
from remote_mediation.lab import Study
from remote_mediation.result import Analysis


def _check(study: Study) -> None:
    """Refuse what cannot stand beside the direction of a study."""
    given.check(study)
    bases.check(study)


DIRECTIONS = Analysis(
    "directions",
    analyse=directions.analyse,
    columns={
        "directions.csv": directions.MAP_COLUMNS,
        "direction.csv": CLAIM_COLUMNS,
        "direction_sets.csv": SET_COLUMNS,
        "geometry.csv": geometry.GEOMETRY_COLUMNS,
        "bases.csv": bases.BASIS_COLUMNS,
    },
    cost=cost.directions,
    sections=show.directions,
    verdicts=show.direction_verdicts,
    check=_check,
)
RIVALS = Analysis(
    "rivals",
    analyse=sets.analyse,
    columns={"rivals.csv": CLAIM_COLUMNS, "rival_sets.csv": SET_COLUMNS},
    cost=cost.sets,
    sections=show.rivals,
    verdicts=show.rival_verdicts,
)
