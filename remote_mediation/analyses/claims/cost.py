"""What the five claims measure, at most."""

from __future__ import annotations

from collections.abc import Sequence

from remote_mediation.analyses.claims import handed, sparse
from remote_mediation.analyses.claims.ask import layer_sets
from remote_mediation.analyses.claims.beside import RANDOM_SETS
from remote_mediation.analyses.claims.verdicts import FEWEST_LAYERS
from remote_mediation.engine.tasks import columns_task, direct_rows, direct_task, screen_tasks, sharing_x0
from remote_mediation.lab import Study
from remote_mediation.later import Later, of_bases, of_readings, of_rows, of_tasks, pairs_of, with_placebos
from remote_mediation.sites import Site, band, thirds
from remote_mediation.tokens import TokenPair

_WAVES = 4
"""Times that base prompts run anew: before a wave of rows, and where a wave is more than a job."""


def cost(study: Study) -> Later:
    """Direct effects of every pair; where there are thirds, the joint ones of all five claims."""
    discovery, heldout, info = pairs_of(study, "discovery"), pairs_of(study, "heldout"), study.info
    every, both = with_placebos(study, study.pairs), with_placebos(study, heldout)
    sets = [band("mlp_output", range(info.layers), "last")] * (2 * len(layer_sets(info.layers)) + 1)
    direct = [
        of_tasks([direct_task(group, sets, study.setting)], direct_rows(len(group), len(sets)) * _reads(study))
        for group in sharing_x0(every)
    ]
    bands = of_rows(study, both, _late_site(study, _widest(study))).times(2)
    found = of_bases(study, every).plus(*direct, bands)
    return found if info.layers < FEWEST_LAYERS else found.plus(_claims_of_place(study, discovery, both, heldout))


def _claims_of_place(
    study: Study, discovery: Sequence[TokenPair], both: Sequence[TokenPair], heldout: Sequence[TokenPair]
) -> Later:
    """both: held-out pairs and their placebos."""
    info = study.info
    late = _late_site(study, _widest(study))
    stream = [Site("layer_output", layer, "last") for layer in range(info.layers)]
    frozen = 1 + 1 + 2 + handed.RANDOM_SETS  # the early site alone, twice named; middle and late MLPs; others
    found = (
        of_bases(study, [*discovery, *both])
        .times(_WAVES)
        .plus(
            *(of_rows(study, pairs, site) for pairs in (discovery, both) for site in stream),
            of_rows(study, both, late).times(3),
            of_rows(study, both, handed.early_site(info.layers)).times(frozen),
            of_readings(study, [*discovery, *both], (1 + info.layers) * info.d_model).times(2),
        )
    )
    return found if not info.has("mlp_neurons") else found.plus(_gate(study, discovery, heldout))


def _gate(study: Study, discovery: Sequence[TokenPair], heldout: Sequence[TokenPair]) -> Later:
    """What claim 3 measures beside late MLPs and their first neurons on the held-out pairs."""
    info = study.info
    sizes = len(sparse.grid(len(thirds(info.layers).late) * info.d_ff))
    late = _late_site(study, _widest(study))
    screened = screen_tasks(discovery, "mlp_neurons", _widest(study), study.setting, study.config.neurons.screen)
    return (
        of_rows(study, discovery, late)
        .times(1 + sizes)
        .plus(
            of_rows(study, heldout, late).times(sizes + sum(RANDOM_SETS)),
            of_rows(study, heldout, Site("mlp_output", 0, "last")).times(sizes),
            of_tasks(screened, 2 * info.layers * info.d_ff),
            of_tasks([columns_task("mlp_neurons", study.setting)], info.layers * info.d_ff),
            of_readings(study, discovery, info.layers * info.d_ff),
        )
    )


def _late_site(study: Study, position: str) -> Site:
    """The first module of the late third; of a model without one, of its last layer."""
    late = thirds(study.info.layers).late
    return Site("mlp_output", min(late.start, study.info.layers - 1), position)


def _widest(study: Study) -> str:
    """The position of the bands: everything from the edit on, or `last` where prompts have none."""
    return "all" if all(pair.aligned for pair in study.pairs) else "last"


def _reads(study: Study) -> int:
    return max(len(study.outcome.reads(pair)) for pair in study.pairs)
