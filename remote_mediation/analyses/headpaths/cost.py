"""What head paths measure, at most: both senders, all receivers on a few discovery pairs, all ways on the held-out.

Heads are taken to lie in the first layer, from which all others can receive, and all amplifiers to be heads.
"""

from __future__ import annotations

from collections.abc import Sequence

from remote_mediation.analyses.headpaths.ask import FEW_PAIRS, MOST_AMPLIFIERS, OPENED, OTHERS
from remote_mediation.analyses.headpaths.inputs import ways_by_input
from remote_mediation.analyses.rivals.samples import position_of
from remote_mediation.analyses.rivals.sets import few_of
from remote_mediation.lab import Study
from remote_mediation.later import Later, of_bases, of_rows, pairs_of
from remote_mediation.pairs import placebo_id
from remote_mediation.sites import Component, ModelInfo, Site
from remote_mediation.stats import spread
from remote_mediation.tokens import TokenPair

_SENDERS = 2


def cost(study: Study) -> Later:
    """At most so much; nothing without `rivals`."""
    if "rivals" not in study.config.analyses:
        return Later()
    info, heldout = study.info, pairs_of(study, "heldout")
    position = position_of([*study.pairs, *study.placebos])
    wanted = {placebo_id(pair.id) for pair in heldout}
    both = [*heldout, *(pair for pair in study.placebos if pair.id in wanted)]
    discovery = pairs_of(study, "discovery")
    few = [discovery[at] for at in spread([pair.cluster for pair in discovery], FEW_PAIRS)]

    def rows(pairs: Sequence[TokenPair], component: Component, layer: int) -> Later:
        return of_rows(study, pairs, Site(component, layer, position))

    layers, there = range(info.layers), info.layers_with("attention_heads")
    heads = few_of(len(there) * info.heads)
    sender = rows(few, "mlp_output", 0)
    modules = [rows(few, "mlp_output", layer) for layer in layers] + [rows(few, "mlp_output", layer) for layer in there]
    single = rows(few, "mlp_output", 0).times(OPENED * info.heads)
    ways = rows(both, "mlp_output", 0).times(5 + MOST_AMPLIFIERS)  # all, the answer, MLPs, heads, all amplifiers
    by_input = rows(both, "mlp_output", 0).times(1 + MOST_AMPLIFIERS * _rows_by_input(info, position))  # alone, again
    beside = rows(heldout, "mlp_output", 0).times(3 * OTHERS)  # by all ways, alone, and by the amplifiers
    each = Later().plus(*modules, single, ways, by_input, beside, sender.times(3))  # by all ways, before either wave
    return of_bases(study, [*few, *both]).times(6).plus(sender.times(2 * heads), each.times(_SENDERS))


def _rows_by_input(info: ModelInfo, position: str) -> int:
    """Of one later head: its inputs, and after those that are shared the head alone."""
    head = Site("attention_heads", 0, position, (0,))
    return sum(1 + len(way.onward) for way in ways_by_input((), head, info).values())
