"""What the rival claims measure, at most."""

from __future__ import annotations

import numpy as np

from remote_mediation.analyses.claims.beside import RANDOM_SETS
from remote_mediation.analyses.rivals.bases import MOST_PAIRS
from remote_mediation.analyses.rivals.directions import eligible, positions_of
from remote_mediation.analyses.rivals.geometry import PLACES
from remote_mediation.analyses.rivals.harm import most_sites
from remote_mediation.analyses.rivals.samples import few_pairs
from remote_mediation.analyses.rivals.sets import PARTS, head_sizes, third_band
from remote_mediation.engine.learning import Lesson, learn_task, learnt_numbers
from remote_mediation.engine.tasks import columns_task
from remote_mediation.lab import Study
from remote_mediation.later import Later, of_bases, of_readings, of_rows, of_tasks, pairs_of, with_placebos
from remote_mediation.sites import Site, thirds
from remote_mediation.subspaces import Basis, Subspace
from remote_mediation.tokens import TokenPair


def directions(study: Study) -> Later:
    """The map, the direction held out, and random ones beside it at the middle layer."""
    info, discovery, heldout = study.info, pairs_of(study, "discovery"), pairs_of(study, "heldout")
    few, both = few_pairs(discovery), with_placebos(study, heldout)
    positions = positions_of([*study.pairs, *study.placebos])
    middle, everywhere = Site("layer_output", info.layers // 2, positions[0]), Site("layer_output", 0, "all")
    sites = [Site("layer_output", layer, position) for layer in range(info.layers) for position in positions]
    one = of_rows(study, both, middle).plus(
        of_rows(study, both, everywhere),
        of_rows(study, heldout, middle).times(sum(RANDOM_SETS)),
    )
    return of_bases(study, [*few, *both]).plus(
        of_readings(study, discovery, len(sites) * info.d_model),
        *_harm_and_refusal(study, few, both),
        *(of_rows(study, few, site) for site in sites),
        of_rows(study, both, middle),
        one.times(2 if study.config.directions.basis else 1),
        made_bases(study),
    )


def _harm_and_refusal(study: Study, few: list[TokenPair], both: list[TokenPair]) -> list[Later]:
    """Their directions, what harm's do on a few pairs, and each at its own token and in place of the other."""
    info = study.info
    return [
        of_readings(study, pairs_of(study, "discovery"), info.layers * len(PLACES) * info.d_model),
        *(of_rows(study, few, site) for site in most_sites(eligible(info.layers))),
        of_rows(study, both, most_sites(1)[0]).times(4),
    ]


def made_bases(study: Study) -> Later:
    """Other bases at the middle layer: what they learn from, and what they do there and held out."""
    info, settings, heldout = study.info, study.config.directions, pairs_of(study, "heldout")
    pairs = few_pairs(pairs_of(study, "discovery"), MOST_PAIRS)
    if not (settings.bases and pairs):
        return Later()
    start = Basis.random(settings.rank, info.d_model, np.random.default_rng(0))
    middle = Subspace("layer_output", info.layers // 2, positions_of([*study.pairs, *study.placebos])[0], basis=start)
    learning = Later()
    if "learnt" in settings.bases:
        task = learn_task([Lesson(pair, (0.0, 0.0)) for pair in pairs], middle, 1.0, study.setting)
        learning = of_tasks([task], learnt_numbers(start)).times(2)
    count = len(settings.bases) + ("learnt" in settings.bases)
    one = of_rows(study, with_placebos(study, heldout), middle).plus(
        of_rows(study, heldout, middle).times(sum(RANDOM_SETS)), of_rows(study, pairs, middle)
    )
    return learning.plus(of_bases(study, pairs), of_rows(study, pairs, middle), one.times(count))


def sets(study: Study) -> Later:
    """Neurons of all layers, bands of thirds, and heads; all as if they began at the first layer."""
    discovery, both = pairs_of(study, "discovery"), with_placebos(study, pairs_of(study, "heldout"))
    bands = [third_band(layers, "all")[0] for layers in thirds(study.info.layers) if layers]
    return of_bases(study, [*discovery, *both]).plus(
        *(of_rows(study, both, band) for band in bands),
        *_heads(study, both),
        *(_neurons(study, both) if study.info.has("mlp_neurons") else ()),
    )


_LOWEST = Site("attention_output", 0, "all")
"""What runs as much of the model as any set."""


def _heads(study: Study, both: list[TokenPair]) -> list[Later]:
    """Every single head on a few pairs, the sizes that are tried, and the fewest held out, with random ones beside."""
    info, discovery = study.info, pairs_of(study, "discovery")
    few = few_pairs(discovery)
    heads = [Site("attention_heads", layer, "all", (0,)) for layer in info.layers_with("attention_heads")]
    return [
        *(of_rows(study, few, site).times(info.heads) for site in heads),
        of_rows(study, discovery, _LOWEST).times(len(head_sizes(info.layers * info.heads))),
        of_rows(study, both, _LOWEST).times(2),
        of_rows(study, pairs_of(study, "heldout"), _LOWEST).times(sum(RANDOM_SETS)),
        of_readings(study, discovery, info.layers * info.heads * info.d_head),
    ]


def _neurons(study: Study, both: list[TokenPair]) -> list[Later]:
    """Sets of every size held out, random ones beside the second, and what ranks and matches them."""
    info = study.info
    return [
        of_rows(study, both, _LOWEST).times(len(PARTS)),
        of_rows(study, pairs_of(study, "heldout"), _LOWEST).times(sum(RANDOM_SETS)),
        of_readings(study, pairs_of(study, "discovery"), 2 * info.layers * info.d_ff),
        of_tasks([columns_task("mlp_neurons", study.setting)], info.layers * info.d_ff),
    ]
