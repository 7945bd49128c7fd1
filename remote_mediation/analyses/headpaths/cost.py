"""What head paths measure, at most: both senders, all receivers on a few discovery pairs, all ways on the held-out."""

from __future__ import annotations

from collections.abc import Sequence

from remote_mediation.analyses.headpaths.ask import FEW_PAIRS, MOST_AMPLIFIERS, OPENED, OTHERS
from remote_mediation.lab import Study, placebo_id
from remote_mediation.later import Later, of_bases, of_rows, pairs_of
from remote_mediation.sites import Component, Site
from remote_mediation.stats import spread
from remote_mediation.tokens import TokenPair

_SENDERS = 2
_FEW_HEADS = 0.05
"""Part of all heads that `rivals` may find to be few."""


def cost(study: Study) -> Later:
    """At most so much; heads are taken to lie in the first layer, from which all others can receive."""
    if "rivals" not in study.config.analyses:
        return Later()
    info, heldout = study.info, pairs_of(study, "heldout")
    wanted = {placebo_id(pair.id) for pair in heldout}
    both = [*heldout, *(pair for pair in study.placebos if pair.id in wanted)]
    discovery = pairs_of(study, "discovery")
    few = [discovery[at] for at in spread([pair.cluster for pair in discovery], FEW_PAIRS)]

    def rows(pairs: Sequence[TokenPair], component: Component, layer: int) -> Later:
        return of_rows(study, pairs, Site(component, layer, _position(study)))

    heads = max(int(_FEW_HEADS * len(info.layers_with("attention_heads")) * info.heads), 1)
    layers, there = range(info.layers), info.layers_with("attention_heads")
    sender = rows(few, "mlp_output", 0)
    modules = [rows(few, "mlp_output", layer) for layer in layers] + [rows(few, "mlp_output", layer) for layer in there]
    single = rows(few, "mlp_output", 0).times(OPENED * info.heads)
    ways = rows(both, "mlp_output", 0).times(5 + MOST_AMPLIFIERS)  # all, the answer, MLPs, heads, all amplifiers
    beside = rows(heldout, "mlp_output", 0).times(3 * OTHERS)  # by all ways, alone, and by the amplifiers
    each = Later().plus(*modules, single, ways, beside, sender.times(3))  # by all ways, and before either wave
    return of_bases(study, [*few, *both]).times(4).plus(sender.times(2 * heads), each.times(_SENDERS))


def _position(study: Study) -> str:
    """Where `rivals` swaps, at most."""
    return "all" if all(all(pair.places("all")) for pair in (*study.pairs, *study.placebos)) else "last"
