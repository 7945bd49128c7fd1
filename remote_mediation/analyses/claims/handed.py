"""Claim 5 in rows: the early site swapped while modules are held as they are, in both directions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from remote_mediation.analyses.claims import verdicts
from remote_mediation.analyses.claims.samples import Sample
from remote_mediation.analyses.claims.verdicts import Both, Claim, Handed
from remote_mediation.engine.rows import Row, as_it_is, swap
from remote_mediation.lab import Lab
from remote_mediation.sites import ModelInfo, Site, band, thirds
from remote_mediation.tokens import TokenPair

RANDOM_SETS = 10
"""Random sets of other modules whose effects are averaged."""
_POSITION = "all"


def early_site(layers: int) -> Site:
    """The stream at the edit after the early third."""
    return Site("layer_output", thirds(layers).early.stop - 1, "edit")


def handed_on(heldout: Sample) -> Claim:
    """Claim 5 on pairs that have the edit on both sides."""
    lab = heldout.lab
    layers = lab.study.info.layers
    (own,) = heldout.effects(lab.joint, [[early_site(layers)]])
    found = Handed(*(_mean([_lost(heldout, one) for one in sets]) for sets in frozen_sets(lab)))
    return verdicts.handed_on(heldout.bench(), own, found, len(thirds(layers).middle))


def handed_rows(heldout: Sample) -> list[Row]:
    """All that claim 5 measures."""
    info, pairs = heldout.lab.study.info, (*heldout.pairs, *heldout.placebos)
    sets = [(), *(one for sets in frozen_sets(heldout.lab) for one in sets)]
    rows = [held(pair, side, one, info) for pair in pairs for side in (0, 1) for one in sets]
    return [*heldout.rows([[early_site(info.layers)]]), *rows]


def frozen_sets(lab: Lab) -> tuple[list[list[Site]], ...]:
    """The middle MLPs, the late MLPs, and random attention modules, which are held while the early site is swapped."""
    layers = lab.study.info.layers
    _, middle, late = thirds(layers)
    return (
        [band("mlp_output", middle, _POSITION)],
        [band("mlp_output", late, _POSITION)],
        random_sets(layers, len(middle), lab.rng("claims: other modules")),
    )


def random_sets(layers: int, size: int, rng: np.random.Generator) -> list[list[Site]]:
    """Sets of as many attention modules after the early third.

    Late MLPs are no control: a gate among them lets nothing through while it is held, whatever handed it on.
    """
    _, middle, late = thirds(layers)
    others = [
        *band("attention_output", middle, _POSITION),
        *band("attention_output", late, _POSITION),
    ]
    return [sorted(others[place] for place in rng.permutation(len(others))[:size]) for _ in range(RANDOM_SETS)]


def held(pair: TokenPair, side: int, frozen: Sequence[Site], info: ModelInfo) -> Row:
    """The early site as on the other prompt, while sites stay as they are on this one."""
    early = swap(pair, early_site(info.layers), side, info)
    return replace(early, writes=(*early.writes, *(as_it_is(pair, site, side) for site in frozen)))


def _lost(heldout: Sample, frozen: Sequence[Site]) -> Both:
    """What is lost of the early site's effect while a set is held, the mean of both directions.

    ½ [Y(x0,E1) − Y(x0,E1,M0) + Y(x1,E0,M1) − Y(x1,E0)] for early site E and modules M.
    """
    info = heldout.lab.study.info
    sufficient = heldout.change(lambda pair: (held(pair, 0, (), info), held(pair, 0, frozen, info)))
    necessary = heldout.change(lambda pair: (held(pair, 1, frozen, info), held(pair, 1, (), info)))
    return _mean([sufficient, necessary])


def _mean(effects: Sequence[Both]) -> Both:
    return Both(*(np.mean(side, axis=0) for side in zip(*effects, strict=True)))
