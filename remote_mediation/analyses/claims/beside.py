"""Random sets beside a set of mediators: how many of them do as much."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from remote_mediation.analyses.claims.samples import Sample
from remote_mediation.analyses.claims.verdicts import MOST_REACHING, Beside, Effect, clear_of_half
from remote_mediation.lab import Floats
from remote_mediation.sites import Site

RANDOM_SETS = (50, 150)
"""Random sets that are measured first, and then where few of them reach the set."""


class Drawn(NamedTuple):
    """A random set."""

    sites: Sequence[Site]
    likeness: float = 1.0
    """Size of its change over that of the set that it stands beside."""


def random_beside(heldout: Sample, chosen: Effect, draw: Callable[[], Drawn]) -> Beside | None:
    """Random sets beside a set that carries enough for a rule to ask for them; else nothing is measured."""
    enough = clear_of_half(heldout.bench().shares(chosen))
    return beside_random(heldout, chosen, draw) if enough else None


def beside_random(heldout: Sample, chosen: Effect, draw: Callable[[], Drawn]) -> Beside:
    """How many random sets do as much in either direction: 50 first, and more where at most 2 of these do."""
    sign = direction_of(heldout.bench().total.harm)
    bars = [sign * np.nanmean(both.harm) for both in chosen]
    reached, likeness = 0, list[float]()
    for count in RANDOM_SETS:
        drawn = [draw() for _ in range(count)]
        likeness += [one.likeness for one in drawn]
        found = heldout.lab.joint([one.sites for one in drawn], heldout.pairs)
        nie, tie = (sign * np.nanmean(table, axis=1) for table in (found.nie, found.tie))
        reached += int(((nie >= bars[0]) | (tie >= bars[1])).sum())
        if reached > MOST_REACHING:
            break
    return Beside(reached, len(likeness), float(np.mean(likeness)))


def direction_of(effect: Floats) -> float:
    """Sign of the mean total effect."""
    return -1.0 if np.nanmean(effect) < 0 else 1.0
