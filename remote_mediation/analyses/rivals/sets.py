"""Three rivals that name sets: neurons of all layers, bands of thirds, and the fewest heads.

What has to be chosen is chosen on the discovery pairs, and the sets are swapped together on the
held-out ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from remote_mediation.analyses.claims.beside import Drawn, direction_of, random_beside
from remote_mediation.analyses.claims.samples import Sample, activations
from remote_mediation.analyses.claims.sparse import NO_NEURONS, Unit, column_norms, grouped
from remote_mediation.analyses.claims.sparse import matched as matched_neurons
from remote_mediation.analyses.claims.verdicts import HALF
from remote_mediation.analyses.rivals import rulings
from remote_mediation.analyses.rivals.rulings import (
    EARLY,
    HEADS,
    NEURONS,
    Carrier,
    Judged,
)
from remote_mediation.analyses.rivals.samples import few_pairs, measure_carriers, swapped_at
from remote_mediation.lab import Floats, Lab
from remote_mediation.result import Finding, Findings
from remote_mediation.sites import Component, Site, band, thirds

PARTS = (0.0001, 0.001, 0.01, 0.05)
"""Sets of neurons, as parts of those of all layers; the second decides."""
FEW_HEADS = 0.05
"""Largest part of all heads that counts as few."""


class JudgedSet(NamedTuple):
    """A rival with its verdict, and the set that it names."""

    judged: Judged
    sites: tuple[Site, ...] = ()


class Units(NamedTuple):
    """Neurons or heads, how they are swapped, and what is like them."""

    component: Component
    position: str
    sizes: Floats
    """`[layer, unit]`, size of each one's change on the discovery pairs."""
    like: Callable[[Sequence[Unit], Floats, np.random.Generator], list[Unit]]
    """Others of about the size of some, at random."""

    def sites(self, units: Sequence[Unit]) -> list[Site]:
        """Units as sites."""
        return grouped(self.component, units, self.position)

    def drawn(self, chosen: Sequence[Unit], rng: np.random.Generator) -> Drawn:
        """A random set like the chosen one; of no likeness that is known where that one does not change."""
        others = self.like(chosen, self.sizes, rng)
        own, theirs = (sum(self.sizes[unit] for unit in units) for units in (chosen, others))
        return Drawn(self.sites(others), float(theirs / own) if own else np.nan)


def analyse(lab: Lab, before: Findings) -> Finding:
    """`rivals.csv` and `rival_sets.csv`; what analyses build on are the few heads."""
    discovery, heldout = Sample.of(lab, "discovery"), Sample.of(lab, "heldout")
    position = swapped_at([discovery, heldout])
    neurons = across_layers(discovery, heldout, position)
    heads = head_gate(discovery, heldout, position)
    found = [neurons.judged, early_band(heldout, position), heads.judged]
    named = {"0.1% of all neurons": neurons.sites, "the fewest heads": heads.sites}
    return Finding(
        {"rivals.csv": rulings.claim_table(found), "rival_sets.csv": rulings.set_table(found)},
        {name: sites for name, sites in named.items() if sites},
        value=heads.sites,
    )


# --- neurons ------------------------------------------------------------------------------------


def across_layers(discovery: Sample, heldout: Sample, position: str) -> JudgedSet:
    """The first neurons of all layers by the size of their mean difference at the last prompt token."""
    lab, info = discovery.lab, discovery.lab.study.info
    if not info.has("mlp_neurons"):
        return JudgedSet(rulings.untested(NEURONS, NO_NEURONS))
    at_last, at_position = changes(discovery, "mlp_neurons", ["last", position])
    ranked = ranked_neurons(np.abs(at_last.mean(axis=0)))
    sizes = np.abs(at_position).mean(axis=0) * column_norms(lab)
    units = Units("mlp_neurons", position, sizes, matched_neurons)
    counts = sizes_of(len(ranked))
    chosen = ranked[: counts[PARTS[1]]]
    sets = {f"first {part:.2%} of all neurons": ranked[:count] for part, count in counts.items()}
    first, own, *more = _carriers(heldout, units, sets)
    own = _beside_random(heldout, own, units, chosen, lab.rng("rivals: neurons"))
    bench = heldout.bench()
    judged = rulings.judged(bench, NEURONS, rulings.few(bench, own), [own], [first, *more])
    return JudgedSet(judged, tuple(units.sites(chosen)))


def changes(discovery: Sample, component: Component, positions: Sequence[str]) -> list[Floats]:
    """`[pair, layer, column]` by position: activations on x1 minus those on x0."""
    found = activations(discovery, component, positions)
    change = found[:, 1] - found[:, 0]
    return [change[:, :, number] for number in range(len(positions))]


def ranked_neurons(scores: Floats) -> list[Unit]:
    """Layer and number of every neuron, the highest score first. scores: `[layer, neuron]`.

    Those of layer 0 stand last: at the edit its MLP embeds the changed word anew, which no set is
    credited with.
    """
    later = sorted(np.ndindex(scores.shape), key=lambda unit: (unit[0] == 0, -scores[unit]))
    return [(int(layer), int(neuron)) for layer, neuron in later]


def sizes_of(neurons: int) -> dict[float, int]:
    """Sizes of sets by part of all neurons; at least one neuron."""
    return {part: max(round(part * neurons), 1) for part in PARTS}


# --- thirds -------------------------------------------------------------------------------------


def early_band(heldout: Sample, position: str) -> Judged:
    """All that each third adds to the stream, swapped together."""
    info = heldout.lab.study.info
    bands = {
        f"all that the {name} third adds": third_band(layers, position)
        for name, layers in thirds(info.layers)._asdict().items()
    }
    if not all(bands.values()):
        return rulings.untested(EARLY, f"{info.layers} layers have no thirds")
    early, middle, late = measure_carriers(heldout, bands)
    bench = heldout.bench()
    ruling = rulings.early_layers(bench, early, late)
    return rulings.judged(bench, EARLY, ruling, [early], [middle, late])


def third_band(layers: Sequence[int], position: str) -> list[Site]:
    """Every contribution of some layers but that of the MLP of layer 0, which embeds anew."""
    mlps = [layer for layer in layers if layer > 0]
    return [*band("attention_output", layers, position), *band("mlp_output", mlps, position)]


# --- heads --------------------------------------------------------------------------------------


def head_gate(discovery: Sample, heldout: Sample, position: str) -> JudgedSet:
    """The fewest heads that carry half of TE in both directions on the discovery pairs, at most 5%."""
    ranked = ranked_heads(discovery, position)
    units = Units("attention_heads", position, head_changes(discovery, position), matched_heads)
    most = few_of(len(ranked))
    needed = fewest_heads(discovery, units, ranked) or most
    own, *beyond = _carriers(
        heldout,
        units,
        {f"first {count} of {len(ranked)} heads": ranked[:count] for count in (min(needed, most), needed)},
    )
    chosen = ranked[: min(needed, most)]
    own = _beside_random(heldout, own, units, chosen, discovery.lab.rng("rivals: heads"))
    bench = heldout.bench()
    judged = rulings.judged(bench, HEADS, rulings.few(bench, own), [own], beyond)
    return JudgedSet(judged, tuple(units.sites(chosen)))


def ranked_heads(discovery: Sample, position: str) -> list[Unit]:
    """All heads by the larger of their own mean NIE and TIE in the direction of TE, on a few pairs."""
    info = discovery.lab.study.info
    heads = [(layer, head) for layer in info.layers_with("attention_heads") for head in range(info.heads)]
    sites = [Site("attention_heads", layer, position, (head,)) for layer, head in heads]
    found = discovery.lab.indirect(sites, few_pairs(discovery.pairs))
    nie, tie = (direction_of(found.te) * np.nanmean(table, axis=1) for table in (found.nie, found.tie))
    return [heads[at] for at in np.argsort(-np.maximum(nie, tie), kind="stable")]


def fewest_heads(discovery: Sample, units: Units, ranked: Sequence[Unit]) -> int | None:
    """How many of the first heads carry half of TE in both directions; None where not all of them do."""
    sizes = head_sizes(len(ranked))
    found = discovery.lab.joint([units.sites(ranked[:size]) for size in sizes], discovery.pairs)
    whole = np.nanmean(found.te)
    nie, tie = (np.nanmean(table, axis=1) / whole for table in (found.nie, found.tie))
    return reaching(sizes, np.minimum(nie, tie))


def reaching(sizes: Sequence[int], shares: Floats) -> int | None:
    """The first size at which half is carried."""
    return next((size for size, share in zip(sizes, shares, strict=True) if share >= HALF), None)


def few_of(heads: int) -> int:
    """How many heads are few."""
    return max(int(FEW_HEADS * heads), 1)


def head_sizes(heads: int) -> list[int]:
    """Sizes that are tried: each half as large again as the one before, what counts as few, and all."""
    sizes, size = {few_of(heads), heads}, 1
    while size < heads:
        sizes.add(size)
        size = max(size + 1, round(1.5 * size))
    return sorted(sizes)


def head_changes(discovery: Sample, position: str) -> Floats:
    """`[layer, head]`, mean over pairs of the length of the change of a head's output; NaN in layers without heads."""
    info = discovery.lab.study.info
    (change,) = changes(discovery, "attention_heads", [position])
    by_head = change.reshape(len(change), info.layers, info.heads, info.d_head)
    lengths: Floats = np.linalg.norm(by_head, axis=-1).mean(axis=0)
    return lengths


def matched_heads(chosen: Sequence[Unit], sizes: Floats, rng: np.random.Generator) -> list[Unit]:
    """As many other heads, each the nearest in size to one of the set among a random half of the others.

    Layers have too few heads to match within them.
    """
    others = [(int(layer), int(head)) for layer, head in np.ndindex(sizes.shape)]
    others = [unit for unit in others if unit not in set(chosen) and not np.isnan(sizes[unit])]
    pool = [others[at] for at in rng.permutation(len(others))[: max(len(others) // 2, len(chosen))]]
    found: list[Unit] = []
    for at in rng.permutation(len(chosen)):
        size = sizes[chosen[at]]
        nearest = min(pool, key=lambda unit: abs(sizes[unit] - size))
        found.append(nearest)
        pool.remove(nearest)
    return found


# --- both ---------------------------------------------------------------------------------------


def _carriers(heldout: Sample, units: Units, sets: Mapping[str, Sequence[Unit]]) -> list[Carrier]:
    """Joint effects of sets of units on the held-out pairs."""
    return measure_carriers(heldout, {name: units.sites(chosen) for name, chosen in sets.items()})


def _beside_random(
    heldout: Sample, own: Carrier, units: Units, chosen: Sequence[Unit], rng: np.random.Generator
) -> Carrier:
    """A set with random ones beside it; without where there are not as many other units."""
    if units.sizes.size < 2 * len(chosen):
        return own
    return own._replace(beside=random_beside(heldout, own.effect, lambda: units.drawn(chosen, rng)))
