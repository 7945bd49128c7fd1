"""What the rooms of the rival claims share: a few discovery pairs, changes of activations, and random sets beside."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from remote_mediation.analyses.claims.samples import Sample
from remote_mediation.analyses.claims.sparse import RANDOM_SETS
from remote_mediation.analyses.claims.verdicts import MOST_REACHING, Effect, clear_of_half
from remote_mediation.analyses.rivals.rulings import Beside, Carrier
from remote_mediation.engine.tasks import Reading, read_task
from remote_mediation.lab import Floats
from remote_mediation.sites import Component, Site
from remote_mediation.stats import spread
from remote_mediation.tokens import TokenPair

FEW_PAIRS = 12
"""Discovery pairs on which single sites are measured: maps and ranks need many sites more than many pairs."""
Unit = tuple[int, int]
"""Layer and number of a neuron or head."""


class Drawn(NamedTuple):
    """A random set."""

    sites: Sequence[Site]
    likeness: float = 1.0
    """Size of its change over that of the set that it stands beside."""


def few_pairs(pairs: Sequence[TokenPair]) -> list[TokenPair]:
    """At most `FEW_PAIRS`, one of each component first."""
    if len(pairs) <= FEW_PAIRS:
        return list(pairs)
    return [pairs[at] for at in sorted(spread([pair.cluster for pair in pairs], FEW_PAIRS))]


def swapped_at(samples: Sequence[Sample]) -> str:
    """`all` where every pair and placebo can be aligned, else `last`."""
    every = [pair for sample in samples for pair in (*sample.pairs, *sample.placebos)]
    return "all" if all(all(pair.places("all")) for pair in every) else "last"


def activations(sample: Sample, component: Component, positions: Sequence[str]) -> Floats:
    """`[pair, side, layer, position, width]`, averaged over the prompt tokens of each position."""
    study = sample.lab.study
    tasks = []
    for pair in sample.pairs:
        for side, ids in enumerate(pair.prompts):
            places = [tuple(at for at in pair.places(name)[side] if at < len(ids)) for name in positions]
            readings = [Reading(component, layer, at) for layer in range(study.info.layers) for at in places]
            tasks.append(read_task(pair.id, ids, readings, study.setting))
    found = np.array(sample.lab.run(tasks), dtype=np.float64)
    width = study.info.tensor_width(component)
    return found.reshape(len(sample.pairs), 2, study.info.layers, len(positions), width)


def grouped(component: Component, units: Sequence[Unit], position: str) -> list[Site]:
    """Units as sites, one a layer."""
    layers: dict[int, list[int]] = {}
    for layer, unit in units:
        layers.setdefault(layer, []).append(unit)
    return [Site(component, layer, position, tuple(sorted(found))) for layer, found in sorted(layers.items())]


def direction_of(effect: Floats) -> float:
    """Sign of the mean total effect."""
    return -1.0 if np.nanmean(effect) < 0 else 1.0


def with_random(heldout: Sample, own: Carrier, draw: Callable[[], Drawn]) -> Carrier:
    """A set with random ones beside it, where it carries enough for a rule that asks for them."""
    enough = clear_of_half(heldout.bench().shares(own.effect))
    return own._replace(beside=beside_random(heldout, own.effect, draw)) if enough else own


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
