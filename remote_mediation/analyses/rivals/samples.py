"""Which pairs, and which position, the rooms of the rival claims take, and how their sets are measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from remote_mediation.analyses.claims.samples import Sample
from remote_mediation.analyses.rivals.rulings import Carrier, values_of
from remote_mediation.sites import Site
from remote_mediation.stats import spread
from remote_mediation.tokens import TokenPair

FEW_PAIRS = 12
"""Discovery pairs on which single sites are measured: maps and ranks need many sites more than many pairs."""


def few_pairs(pairs: Sequence[TokenPair], most: int = FEW_PAIRS) -> list[TokenPair]:
    """At most so many, one of each component first."""
    if len(pairs) <= most:
        return list(pairs)
    return [pairs[at] for at in spread([pair.cluster for pair in pairs], most)]


def swapped_at(samples: Sequence[Sample]) -> str:
    """Where the pairs and placebos of samples are swapped."""
    return position_of([pair for sample in samples for pair in (*sample.pairs, *sample.placebos)])


def position_of(pairs: Sequence[TokenPair]) -> str:
    """`all` where every pair can be aligned, else `last`."""
    return "all" if all(all(pair.places("all")) for pair in pairs) else "last"


def measure_carriers(heldout: Sample, sets: Mapping[str, Sequence[Site]]) -> list[Carrier]:
    """Joint effects of sets of mediators on the held-out pairs. sets: by what they are called."""
    info, effects = heldout.lab.study.info, heldout.effects(heldout.lab.joint, list(sets.values()))
    named = zip(sets.items(), effects, strict=True)
    return [Carrier(name, values_of(sites, info), effect) for (name, sites), effect in named]
