"""Three rivals that name sets: neurons of all layers by mean difference, bands of thirds, and the fewest heads.

What has to be chosen is chosen on the discovery pairs, and the sets are swapped together on the held-out ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from remote_mediation.analyses.claims.samples import Sample
from remote_mediation.analyses.claims.sparse import matched as matched_neurons
from remote_mediation.analyses.claims.verdicts import HALF
from remote_mediation.analyses.rivals import rulings
from remote_mediation.analyses.rivals.rulings import EARLY, HEADS, NEURONS, Carrier, Judged, values_of
from remote_mediation.analyses.rivals.samples import (
    Unit,
    activations,
    beside_random,
    direction_of,
    few_pairs,
    grouped,
    swapped_at,
)
from remote_mediation.lab import Floats, Lab
from remote_mediation.result import Finding, Findings
from remote_mediation.sites import Site, band, family_of, thirds

PARTS = (0.0001, 0.001, 0.01, 0.05)
"""Sets of neurons, as parts of those of all layers; the second decides."""
FEW_HEADS = 0.05
"""Largest part of all heads that counts as few."""


def analyse(lab: Lab, before: Findings) -> Finding:
    """`rivals.csv` and `rival_sets.csv`."""
    discovery, heldout = Sample.of(lab, "discovery"), Sample.of(lab, "heldout")
    position = swapped_at([discovery, heldout])
    sets: dict[str, tuple[Site, ...]] = {}
    found = [
        across_layers(discovery, heldout, position, sets),
        early_band(heldout, position),
        head_gate(discovery, heldout, position, sets),
    ]
    return Finding({"rivals.csv": rulings.claim_table(found), "rival_sets.csv": rulings.set_table(found)}, sets)


def across_layers(discovery: Sample, heldout: Sample, position: str, sets: dict[str, tuple[Site, ...]]) -> Judged:
    """The first neurons of all layers by the size of their mean difference at the last prompt token."""
    lab, info = discovery.lab, discovery.lab.study.info
    if family_of(info.family).mlp_neurons is None:
        return rulings.untested(NEURONS, "a mixture of experts has no MLP whose neurons could be named")
    streams = activations(discovery, "mlp_neurons", ["last", position])
    change = streams[:, 1] - streams[:, 0]
    ranked = ranked_units(np.abs(change[:, :, 0].mean(axis=0)))
    sizes = sizes_of(info.layers * info.d_ff)
    carriers = _carriers(
        heldout, {_named(part): grouped("mlp_neurons", ranked[:size], position) for part, size in sizes.items()}
    )
    decides = list(sizes).index(PARTS[1])
    changes, rng = np.abs(change[:, :, 1]).mean(axis=0), lab.rng("rivals: matched neurons")
    chosen, own = ranked[: sizes[PARTS[1]]], carriers.pop(decides)
    likeness: list[float] = []

    def draw() -> list[Site]:
        units = matched_neurons(chosen, changes, rng)
        likeness.append(_size(units, changes) / _size(chosen, changes))
        return grouped("mlp_neurons", units, position)

    beside = beside_random(heldout, own.effect, draw)
    own = own._replace(beside=beside._replace(likeness=float(np.mean(likeness))))
    sets["0.1% of all neurons"] = tuple(grouped("mlp_neurons", chosen, position))
    bench = heldout.bench()
    return rulings.judged(bench, NEURONS, rulings.few(bench, own), [own], carriers)


def ranked_units(scores: Floats) -> list[Unit]:
    """Layer and number of every unit, the highest score first. scores: `[layer, unit]`.

    Those of layer 0 stand last: at the edit its MLP embeds the changed word anew, which no set is credited with.
    """
    order = np.argsort(-scores[1:], axis=None, kind="stable")
    first = [(0, int(unit)) for unit in np.argsort(-scores[0], kind="stable")]
    return [*((1 + int(flat // scores.shape[1]), int(flat % scores.shape[1])) for flat in order), *first]


def sizes_of(neurons: int) -> dict[float, int]:
    """Sizes of sets by part of all neurons; at least one neuron."""
    return {part: max(round(part * neurons), 1) for part in PARTS}


def early_band(heldout: Sample, position: str) -> Judged:
    """All that each third adds to the stream, swapped together; the MLP of layer 0 embeds anew and is left out."""
    info = heldout.lab.study.info
    bands = {name: third_band(layers, position) for name, layers in thirds(info.layers)._asdict().items() if layers}
    if len(bands) < len(thirds(info.layers)):
        return rulings.untested(EARLY, f"{info.layers} layers have no thirds")
    early, middle, late = _carriers(heldout, {f"all that the {name} third adds": one for name, one in bands.items()})
    bench = heldout.bench()
    return rulings.judged(bench, EARLY, rulings.early_layers(bench, early, late), [early], [middle, late])


def third_band(layers: Sequence[int], position: str) -> list[Site]:
    """Every contribution of some layers, without the MLP of layer 0."""
    mlps = [layer for layer in layers if layer > 0]
    return [*band("attention_output", layers, position), *band("mlp_output", mlps, position)]


def head_gate(discovery: Sample, heldout: Sample, position: str, sets: dict[str, tuple[Site, ...]]) -> Judged:
    """The fewest heads that carry half of TE in both directions on the discovery pairs."""
    lab = discovery.lab
    ranked = ranked_heads(discovery, position)
    sizes = head_sizes(len(ranked))
    found = lab.joint([grouped("attention_heads", ranked[:size], position) for size in sizes], discovery.pairs)
    whole = np.nanmean(found.te)
    carried = np.array([np.nanmean(table, axis=1) / whole for table in (found.nie, found.tie)]).min(axis=0)
    reaching = [size for size, share in zip(sizes, carried, strict=True) if share >= HALF]
    most = max(int(FEW_HEADS * len(ranked)), 1)
    chosen = ranked[: min(reaching[0], most) if reaching else most]
    others = dict.fromkeys([reaching[0]] if reaching and reaching[0] > most else [])
    names = {f"first {len(chosen)} of {len(ranked)} heads": chosen}
    names |= {f"first {size} of {len(ranked)} heads": ranked[:size] for size in others}
    own, *beyond = _carriers(
        heldout, {name: grouped("attention_heads", units, position) for name, units in names.items()}
    )
    changes, rng = head_changes(discovery, position), lab.rng("rivals: matched heads")
    likeness: list[float] = []

    def draw() -> list[Site]:
        units = matched_heads(chosen, changes, rng)
        likeness.append(_size(units, changes) / _size(chosen, changes))
        return grouped("attention_heads", units, position)

    beside = beside_random(heldout, own.effect, draw)
    own = own._replace(beside=beside._replace(likeness=float(np.mean(likeness))))
    sets["the fewest heads"] = tuple(grouped("attention_heads", chosen, position))
    bench = heldout.bench()
    return rulings.judged(bench, HEADS, rulings.few(bench, own), [own], beyond)


def ranked_heads(discovery: Sample, position: str) -> list[Unit]:
    """All heads by the larger of their own mean NIE and TIE in the direction of TE, on a few discovery pairs."""
    info = discovery.lab.study.info
    units = [(layer, head) for layer in range(info.layers) for head in range(info.heads)]
    sites = [Site("attention_heads", layer, position, (head,)) for layer, head in units]
    found = discovery.lab.indirect(sites, few_pairs(discovery.pairs))
    sign = direction_of(found.te)
    scores = np.maximum(*(sign * np.nanmean(table, axis=1) for table in (found.nie, found.tie)))
    return [units[at] for at in np.argsort(-scores, kind="stable")]


def head_sizes(heads: int) -> list[int]:
    """Sizes that are tried: each half as large again as the one before, the largest that counts as few, and all."""
    sizes, size = set(), 1
    while size < heads:
        sizes.add(size)
        size = max(size + 1, round(1.5 * size))
    return sorted({*sizes, max(int(FEW_HEADS * heads), 1), heads})


def head_changes(discovery: Sample, position: str) -> Floats:
    """`[layer, head]`, mean over pairs of the length of the change of a head's output."""
    info = discovery.lab.study.info
    found = activations(discovery, "attention_heads", [position])[:, :, :, 0]
    change = (found[:, 1] - found[:, 0]).reshape(len(found), info.layers, info.heads, info.d_head)
    lengths: Floats = np.linalg.norm(change, axis=-1).mean(axis=0)
    return lengths


def matched_heads(chosen: Sequence[Unit], changes: Floats, rng: np.random.Generator) -> list[Unit]:
    """As many other heads, each the nearest in change to one of the set among a random half of the others.

    Layers have too few heads to match within them.
    """
    others = [unit for unit in np.ndindex(changes.shape) if unit not in set(chosen)]
    count = max(len(others) // 2, len(chosen))
    pool = [others[at] for at in rng.permutation(len(others))[:count]]
    found: list[Unit] = []
    for at in rng.permutation(len(chosen)):
        nearest = min(pool, key=lambda unit: abs(changes[unit] - changes[chosen[at]]))
        found.append((int(nearest[0]), int(nearest[1])))
        pool.remove(nearest)
    return found


def _carriers(heldout: Sample, sets: dict[str, list[Site]]) -> list[Carrier]:
    effects = heldout.effects(heldout.lab.joint, list(sets.values()))
    info = heldout.lab.study.info
    return [
        Carrier(name, values_of(sites, info), effect)
        for (name, sites), effect in zip(sets.items(), effects, strict=True)
    ]


def _named(part: float) -> str:
    return f"first {part:.2%} of all neurons"


def _size(units: Sequence[Unit], changes: Floats) -> float:
    return float(sum(changes[unit] for unit in units))
