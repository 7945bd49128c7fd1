"""What the search for neurons and gates measures, at most; gates are taken to sit in the middle of the network."""

from __future__ import annotations

import math

from remote_mediation.analyses.neurons.search import BRANCHES, search_tasks, variants
from remote_mediation.lab import Study
from remote_mediation.later import Later, of_bases, of_rows, of_tasks, pairs_of
from remote_mediation.sites import Site

# Sets beside the random ones that gates are compared with: their MLP, the gates themselves, an earlier layer's best.
_OTHER_SETS = 3


def cost(study: Study) -> Later:
    """The search for single neurons and its gate set."""
    everywhere = neurons_measured(study) + _curve_sizes(study)
    heldout = everywhere + study.config.neurons.random_sets + _OTHER_SETS
    steps = 2 + study.info.d_ff.bit_length()  # of a search by windows, or of the search for the smallest set
    found = of_bases(study, pairs_of(study)).times(2 * steps)
    found = found.plus(gate_rows(study, "discovery").times(everywhere), gate_rows(study, "heldout").times(heldout))
    if "gradient" not in study.config.neurons.search:
        return found
    position = study.config.positions.neurons[0]
    pairs = [pair for pair in pairs_of(study, "discovery") if pair.places(position).x0]
    values = 2 * variants(study.config) * study.info.layers * study.info.d_ff
    return found.plus(of_tasks(search_tasks(study, pairs, position), values))


def gate_rows(study: Study, split: str) -> Later:
    """A row on each prompt of a split, as if it overwrote neurons of the middle layer."""
    site = Site("mlp_neurons", study.info.layers // 2, study.config.positions.neurons[0], (0,))
    return of_rows(study, pairs_of(study, split), site)


def neurons_measured(study: Study) -> int:
    """Single neurons or windows that the search measures on every pair, at most, whichever way it goes."""
    settings, width = study.config.neurons, study.info.d_ff
    searched = len(settings.layers or range(study.info.layers)) * width
    ways = {
        "windows": BRANCHES * settings.max_windows * math.ceil(math.log(width, BRANCHES)),
        "all": searched,
        "gradient": min(2 * settings.exact, searched),
    }
    return max(ways[way] for way in settings.search)


def _curve_sizes(study: Study) -> int:
    """Sizes at which the gate set is tried, at most: powers of two and all neurons, then a bisection between two."""
    return 2 * study.info.d_ff.bit_length()
