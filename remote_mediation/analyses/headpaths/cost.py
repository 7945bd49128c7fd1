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
from remote_mediation.later import Later, of_bases, of_rows, pairs_of, with_placebos
from remote_mediation.sites import ModelInfo, Site
from remote_mediation.stats import spread
from remote_mediation.tokens import TokenPair

_SENDERS = 2


def cost(study: Study) -> Later:
    """At most so much; nothing without `rivals`."""
    if "rivals" not in study.config.analyses:
        return Later()
    discovery, heldout = pairs_of(study, "discovery"), pairs_of(study, "heldout")
    few = [discovery[at] for at in spread([pair.cluster for pair in discovery], FEW_PAIRS)]
    both, position = with_placebos(study, heldout), position_of([*study.pairs, *study.placebos])
    sender = _at_layer(study, few, position, 0)
    heads = few_of(len(study.info.layers_with("attention_heads")) * study.info.heads)
    each = Later().plus(
        *_receiving(study, few, position),
        *_by_ways(study, heldout, both, position),
        sender.times(3),  # by all ways, before either wave
    )
    return of_bases(study, [*few, *both]).times(6).plus(sender.times(2 * heads), each.times(_SENDERS))


def _receiving(study: Study, few: Sequence[TokenPair], position: str) -> list[Later]:
    """Every later MLP, the heads of every later layer, and single heads of those layers that are opened."""
    info = study.info
    layers = (*range(info.layers), *info.layers_with("attention_heads"))
    return [
        *(_at_layer(study, few, position, layer) for layer in layers),
        _at_layer(study, few, position, 0).times(OPENED * info.heads),
    ]


def _by_ways(study: Study, heldout: Sequence[TokenPair], both: Sequence[TokenPair], position: str) -> list[Later]:
    """What a sender does by each way, and what other heads do. both: the held-out pairs and their placebos."""
    of_way, inputs = _at_layer(study, both, position, 0), _rows_by_input(study.info, position)
    return [
        of_way.times(5 + MOST_AMPLIFIERS),  # all, the answer, MLPs, heads, all amplifiers
        of_way.times(1 + MOST_AMPLIFIERS * inputs),  # alone, again
        _at_layer(study, heldout, position, 0).times(3 * OTHERS),  # by all ways, alone, and by the amplifiers
    ]


def _at_layer(study: Study, pairs: Sequence[TokenPair], position: str, layer: int) -> Later:
    """A row on each prompt that begins at a layer, whatever it overwrites there."""
    return of_rows(study, pairs, Site("mlp_output", layer, position))


def _rows_by_input(info: ModelInfo, position: str) -> int:
    """Of one later head: its inputs, and after those that are shared the head alone."""
    head = Site("attention_heads", 0, position, (0,))
    return sum(1 + len(way.onward) for way in ways_by_input((), head, info).values())
