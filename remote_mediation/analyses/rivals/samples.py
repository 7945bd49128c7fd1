"""Which pairs, and which position, the rooms of the rival claims take."""

from __future__ import annotations

from collections.abc import Sequence

from remote_mediation.analyses.claims.samples import Sample
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
