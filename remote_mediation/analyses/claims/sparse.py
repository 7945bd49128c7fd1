"""Claim 3's sets: late neurons ranked by a screen, cut on the discovery pairs, and judged on the held-out ones.

A gate may be spread over layers, so neurons of all late layers are ranked together and swapped together. How few will
do is read from a curve over fixed sizes; random sets of as many neurons whose activity changes as much, layer by layer,
stand beside the set.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from remote_mediation.analyses.claims import verdicts
from remote_mediation.analyses.claims.beside import Drawn, direction_of, random_beside
from remote_mediation.analyses.claims.samples import Sample, activations, failing
from remote_mediation.analyses.claims.verdicts import (
    CARRIED,
    SPARSE,
    Bench,
    Claim,
    Sparse,
)
from remote_mediation.engine.jobs import Context
from remote_mediation.engine.rows import Row, direct_row, swap_all, swaps
from remote_mediation.engine.tasks import columns_task, screen_tasks
from remote_mediation.intervals import Interval
from remote_mediation.lab import Floats, Indirect, Lab
from remote_mediation.shares import share
from remote_mediation.sites import Component, Site, band, thirds

GATE_SET_COLUMNS: dict[str, str] = {
    "size": "neurons of the late third in the set, the first by rank",
    "part": "size / neurons of the late third",
    "carried_nie": "NIE of the set / NIE of the late MLPs, discovery pairs",
    "carried_tie": "the same for TIE",
    "nie": "NIE of the set / TE, held-out pairs; may exceed 1",
    "nie_low": "lower end of its 95% interval",
    "nie_high": "upper end",
    "tie": "TIE of the set / TE, held-out pairs",
    "tie_low": "lower end of its 95% interval",
    "tie_high": "upper end",
    "direct_nie": "direct effect of the set at `last` / TE, held-out pairs, harmless prompt changed",
    "direct_nie_low": "lower end of its 95% interval",
    "direct_nie_high": "upper end",
    "direct_tie": "the same, harmful prompt changed",
    "direct_tie_low": "lower end of its 95% interval",
    "direct_tie_high": "upper end",
    "chosen": "whether it is the smallest size that does the late MLPs' work on the discovery pairs",
    "neurons": "the set as layer.unit, first by rank; empty above 1% of the late third's neurons",
    "reason": "why a number is missing, or why to read it with care",
}
NO_NEURONS = "a mixture of experts has no MLP whose neurons could be named"
PARTS = (0.0001, 0.001, SPARSE, 0.05)
"""Sizes that are measured beside the powers of two, as parts of the late third's neurons."""
Unit = tuple[int, int]
"""Layer and number of a neuron or head."""


class Gated(NamedTuple):
    """Claim 3 with what stands beside it."""

    claim: Claim
    tables: dict[str, pd.DataFrame]
    """`gate_sets.csv` where the neurons could be ranked."""
    sets: dict[str, tuple[Site, ...]]
    """The neurons that do the late MLPs' work on the discovery pairs, where there are such."""


def measure_gate(discovery: Sample, heldout: Sample) -> Gated:
    """Claim 3."""
    if not discovery.lab.study.info.has("mlp_neurons"):
        return Gated(verdicts.untested(3, NO_NEURONS), {}, {})
    position = "all" if _has_all(discovery) and _has_all(heldout) else "last"
    lab = discovery.lab
    problem = failing(lab, "claims-screen", lambda: lab.run(_screen(discovery, position)))
    if problem:
        return Gated(verdicts.untested(3, f"the late neurons could not be ranked: {problem}"), {}, {})
    search = Search.of(discovery, position)
    lab.measure_ahead(lambda: search.rows(heldout))
    found = search.judged(heldout)
    claim = verdicts.sparse_gate(heldout.bench(), found)
    sets = {} if search.size is None else {"late gate neurons": tuple(first(search.ranked, search.size, position))}
    return Gated(claim, {"gate_sets.csv": search.curve(heldout)}, sets)


class Search(NamedTuple):
    """Late neurons as the discovery pairs rank and cut them."""

    lab: Lab
    position: str
    ranked: list[Unit]
    """Layer and unit of every late neuron, the strongest first."""
    changes: Floats
    """`[layer, unit]`, size of what the neuron adds or takes away from x0 to x1 (`_changes`)."""
    sizes: list[int]
    """Sizes that were measured."""
    carried: Floats
    """`[size, direction]`, of the late MLPs' own mean effect."""
    size: int | None
    """The smallest that does their work."""

    @classmethod
    def of(cls, discovery: Sample, position: str) -> Search:
        """Rank all late neurons and find how few of them do the late MLPs' work."""
        lab = discovery.lab
        late = thirds(lab.study.info.layers).late
        bench = discovery.bench()
        ranked = _ranked(discovery, position, bench)
        sizes = grid(len(ranked))
        sets = [first(ranked, size, position) for size in sizes]
        found = lab.joint([band("mlp_output", late, position), *sets], discovery.pairs)
        whole = [
            share(table[0], found.te, found.clusters, bench.rng(), bench.resamples) for table in (found.nie, found.tie)
        ]
        works, carried = all(one.low > 0 for one in whole), _of_the_first(found)
        return cls(
            lab=lab,
            position=position,
            ranked=ranked,
            changes=_changes(discovery, position),
            sizes=sizes,
            carried=carried,
            size=fewest(sizes, carried) if works else None,
        )

    def rows(self, heldout: Sample) -> list[Row]:
        """What `judged` and `curve` measure, random sets apart."""
        info, pairs = self.lab.study.info, heldout.pairs
        joint = swaps(swap_all, [self._first(size) for size in self.sizes], pairs, info)
        direct = swaps(direct_row, [first(self.ranked, size, "last") for size in self.sizes], pairs, info)
        return [*heldout.rows(self._judged_sets()), *joint, *direct]

    def _judged_sets(self) -> list[list[Site]]:
        """All late MLPs, the first 1% of their neurons, and as many as do their work, where there are such."""
        late = thirds(self.lab.study.info.layers).late
        sizes = [self.most, *([self.size] if self.size else [])]
        return [list(band("mlp_output", late, self.position)), *(self._first(size) for size in sizes)]

    def judged(self, heldout: Sample) -> Sparse:
        """The sets on the held-out pairs; random ones beside them where a rule asks for these."""
        whole, few, *chosen = heldout.effects(self.lab.joint, self._judged_sets())
        found = Sparse(len(self.ranked), whole, few, self.size, chosen[0] if chosen else None)
        if found.chosen is None or not found.size or found.size > self.most:
            return found
        neurons, rng = self.ranked[: found.size], self.lab.rng("claims: matched sets")

        def draw() -> Drawn:
            other = matched(neurons, self.changes, rng)
            return Drawn(grouped("mlp_neurons", other, self.position), _likeness(neurons, other, self.changes))

        return replace(found, beside=random_beside(heldout, found.chosen, draw))

    @property
    def most(self) -> int:
        """1% of the neurons, at least one."""
        return max(int(SPARSE * len(self.ranked)), 1)

    def curve(self, heldout: Sample) -> pd.DataFrame:
        """`GATE_SET_COLUMNS` of every size: the joint effect, and what of it goes straight to the answer."""
        bench, lab = heldout.bench(), self.lab
        joint = lab.joint([self._first(size) for size in self.sizes], heldout.pairs)
        direct = lab.direct([first(self.ranked, size, "last") for size in self.sizes], heldout.pairs)
        curves = {
            "nie": joint.nie,
            "tie": joint.tie,
            "direct_nie": direct.nie,
            "direct_tie": direct.tie,
        }
        rows = [
            self._curve_row(place, {name: bench.share(of[place], joint.te) for name, of in curves.items()})
            for place in range(len(self.sizes))
        ]
        return pd.DataFrame(rows, columns=list(GATE_SET_COLUMNS))

    def _curve_row(self, place: int, shares: Mapping[str, Interval]) -> dict[str, Any]:
        """A size of the curve. shares: of TE on the held-out pairs, by column."""
        size = self.sizes[place]
        carried_nie, carried_tie = self.carried[place]
        listed = self.ranked[:size] if size <= self.most else []
        row: dict[str, Any] = {
            "size": size,
            "part": size / len(self.ranked),
            "chosen": size == self.size,
            "carried_nie": carried_nie,
            "carried_tie": carried_tie,
            "neurons": " ".join(f"{layer}.{unit}" for layer, unit in listed),
            "reason": shares["nie"].reason,
        }
        for name, found in shares.items():
            row |= found.columns(name)
        return row

    def _first(self, size: int) -> list[Site]:
        return first(self.ranked, size, self.position)


def _of_the_first(found: Indirect) -> Floats:
    """`[set, direction]`, mean effects of all sets but the first as shares of that of the first."""
    means = found.means()
    with np.errstate(divide="ignore", invalid="ignore"):  # a set that does nothing has no share
        shares: Floats = means[1:] / means[0]
    return shares


def grid(neurons: int) -> list[int]:
    """Sizes at which the curve is measured: powers of two, `PARTS`, and all."""
    powers = [2**power for power in range(neurons.bit_length())]
    return sorted({*powers, *(max(int(part * neurons), 1) for part in PARTS), neurons})


def fewest(sizes: Sequence[int], carried: Floats) -> int | None:
    """The smallest size from which on enough is carried in both directions, up to the curve's peak.

    carried: `[size, direction]`, shares of the late MLPs' own effect. The peak is where the smaller of both is largest.
    None where it does not carry enough either.
    """
    enough = np.min(carried, axis=1) >= CARRIED
    found = None
    for place in reversed(range(int(np.argmax(np.min(carried, axis=1))) + 1)):
        if not enough[place]:
            break
        found = sizes[place]
    return found


def matched(chosen: Sequence[Unit], changes: Floats, rng: np.random.Generator) -> list[Unit]:
    """As many other neurons of the same layers, each the nearest to one of the set in the size of its change.

    Nearest among a random half of the layer's other neurons, without replacement and in random order: else every draw
    would be the same set.
    """
    found: list[Unit] = []
    for layer in sorted({layer for layer, _ in chosen}):
        units = [unit for one, unit in chosen if one == layer]
        others = np.delete(np.arange(changes.shape[1]), units)
        pool = rng.permutation(others)[: max(len(others) // 2, len(units))]
        for unit in rng.permutation(units):
            nearest = int(np.argmin(np.abs(changes[layer, pool] - changes[layer, unit])))
            found.append((layer, int(pool[nearest])))
            pool = np.delete(pool, nearest)
    return found


def first(ranked: Sequence[Unit], size: int, position: str) -> list[Site]:
    """The first neurons as sites, one a layer."""
    return grouped("mlp_neurons", ranked[:size], position)


def grouped(component: Component, units: Sequence[Unit], position: str) -> list[Site]:
    """Neurons or heads as sites, one a layer."""
    layers: dict[int, list[int]] = {}
    for layer, unit in units:
        layers.setdefault(layer, []).append(unit)
    return [Site(component, layer, position, tuple(sorted(found))) for layer, found in sorted(layers.items())]


def _has_all(sample: Sample) -> bool:
    return all(all(pair.places("all")) for pair in sample.pairs)


def _likeness(chosen: Sequence[Unit], drawn: Sequence[Unit], changes: Floats) -> float:
    """Ratio of the summed changes of a random set to those of the set."""
    sizes = [sum(changes[layer, unit] for layer, unit in neurons) for neurons in (drawn, chosen)]
    return float(sizes[0] / sizes[1]) if sizes[1] else float("nan")


def _screen(discovery: Sample, position: str) -> list[Context]:
    study = discovery.lab.study
    return screen_tasks(discovery.pairs, "mlp_neurons", position, study.setting, study.config.neurons.screen)


def _ranked(discovery: Sample, position: str, bench: Bench) -> list[Unit]:
    """Late neurons by the larger of the screen's NIE and TIE in the direction of TE."""
    study = discovery.lab.study
    late = thirds(study.info.layers).late
    found = discovery.lab.run(_screen(discovery, position))
    shape = (-1, 2, study.info.layers, study.info.d_ff)
    nie, tie = np.array(found, dtype=np.float64).reshape(shape).sum(axis=0)
    direction = direction_of(bench.total.harm)
    scores = np.maximum(direction * nie, direction * tie)[late.start :]
    order = np.argsort(-scores, axis=None, kind="stable")
    return [(late.start + int(flat // study.info.d_ff), int(flat % study.info.d_ff)) for flat in order]


def _changes(discovery: Sample, position: str) -> Floats:
    """Size of what each neuron adds to the stream or takes away: mean |change| of its activation x norm of its column.

    The activation is averaged over the tokens of the position, its change over pairs. Where a server shows no weights
    it is the change alone.
    """
    values = activations(discovery, "mlp_neurons", [position])[:, :, :, 0]
    found: Floats = np.abs(values[:, 1] - values[:, 0]).mean(axis=0)
    return found * column_norms(discovery.lab)


def column_norms(lab: Lab) -> Floats:
    """Norm of each neuron's column, `[layer, unit]`; ones where the weights are not shown."""
    study = lab.study
    task = columns_task("mlp_neurons", study.setting)
    if failing(lab, "claims-columns", lambda: lab.run([task])):
        return np.ones((study.info.layers, study.info.d_ff))
    (norms,) = lab.run([task])
    return norms.astype(np.float64).reshape(study.info.layers, study.info.d_ff)
