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
from remote_mediation.later import Later, of_bases, of_readings, of_rows, of_tasks, pairs_of
from remote_mediation.pairs import placebo_id
from remote_mediation.sites import Site, thirds
from remote_mediation.subspaces import Basis, Subspace
from remote_mediation.tokens import TokenPair


def directions(study: Study) -> Later:
    """The map, the direction held out, and random ones beside it at the middle layer."""
    info, discovery, heldout = study.info, pairs_of(study, "discovery"), pairs_of(study, "heldout")
    positions, few, both = (
        positions_of([*study.pairs, *study.placebos]),
        few_pairs(discovery),
        _both(study, heldout),
    )
    sites = [Site("layer_output", layer, position) for layer in range(info.layers) for position in positions]
    middle, everywhere = (
        Site("layer_output", info.layers // 2, positions[0]),
        Site("layer_output", 0, "all"),
    )
    one = of_rows(study, both, middle).plus(
        of_rows(study, both, everywhere),
        of_rows(study, heldout, middle).times(sum(RANDOM_SETS)),
    )
    return of_bases(study, [*few, *both]).plus(
        of_readings(study, discovery, len(sites) * info.d_model),
        of_readings(study, discovery, info.layers * len(PLACES) * info.d_model),
        *(of_rows(study, few, site) for site in most_sites(eligible(info.layers))),
        of_rows(study, both, most_sites(1)[0]).times(4),
        *(of_rows(study, few, site) for site in sites),
        of_rows(study, both, middle),
        one.times(2 if study.config.directions.basis else 1),
        made_bases(study),
    )


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
    one = of_rows(study, _both(study, heldout), middle).plus(
        of_rows(study, heldout, middle).times(sum(RANDOM_SETS)), of_rows(study, pairs, middle)
    )
    return learning.plus(of_bases(study, pairs), of_rows(study, pairs, middle), one.times(count))


def sets(study: Study) -> Later:
    """Neurons of all layers, bands of thirds, and heads; all as if they began at the first layer."""
    info, discovery, heldout = study.info, pairs_of(study, "discovery"), pairs_of(study, "heldout")
    both, few, lowest = (
        _both(study, heldout),
        few_pairs(discovery),
        Site("attention_output", 0, "all"),
    )
    heads = [Site("attention_heads", layer, "all", (0,)) for layer in info.layers_with("attention_heads")]
    found = of_bases(study, [*discovery, *both]).plus(
        *(of_rows(study, both, third_band(layers, "all")[0]) for layers in thirds(info.layers) if layers),
        *(of_rows(study, few, site).times(info.heads) for site in heads),
        of_rows(study, discovery, lowest).times(len(head_sizes(info.layers * info.heads))),
        of_rows(study, both, lowest).times(2),
        of_rows(study, heldout, lowest).times(sum(RANDOM_SETS)),
        of_readings(study, discovery, info.layers * info.heads * info.d_head),
    )
    if not info.has("mlp_neurons"):
        return found
    return found.plus(
        of_rows(study, both, lowest).times(len(PARTS)),
        of_rows(study, heldout, lowest).times(sum(RANDOM_SETS)),
        of_readings(study, discovery, 2 * info.layers * info.d_ff),
        of_tasks([columns_task("mlp_neurons", study.setting)], info.layers * info.d_ff),
    )


def _both(study: Study, pairs: list[TokenPair]) -> list[TokenPair]:
    """Pairs and their placebos."""
    beside = {pair.id: pair for pair in study.placebos}
    return [*pairs, *(beside[name] for pair in pairs if (name := placebo_id(pair.id)) in beside)]
