"""Which MLP neurons, and how few of them: a search for single ones, and the smallest set that does its MLP's work."""

from remote_mediation.analyses.neurons import agreement, ask, cost, gates, search, show
from remote_mediation.result import Analysis

NEURONS = Analysis(
    "neurons",
    sites=ask.sites,
    analyse=ask.analyse,
    columns={
        "search.csv": search.SEARCH_COLUMNS,
        "screen.csv": agreement.SCREEN_COLUMNS,
        "sparsity.csv": search.SPARSITY_COLUMNS,
        "gates.csv": gates.GATE_COLUMNS,
        "gate_curve.csv": gates.CURVE_COLUMNS,
        "mediators.csv": ask.MEDIATOR_COLUMNS,
    },
    cost=cost.cost,
    sections=show.sections,
)
