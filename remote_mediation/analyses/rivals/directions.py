"""One direction: the map of differences of means over layers and template tokens, the best of them held out.

A direction is the mean over discovery pairs of the residual stream on the harmful prompt minus that on the harmless
one, after a layer and at a token behind the user's text (arXiv 2406.11717). Its mediator is the stream's projection
onto it, at that site; which one is best is chosen on discovery pairs, among layers below 80% of the depth, as there:
above, the stream is all but the answer itself. Beside it the same change, token by token, along random directions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from remote_mediation.analyses.claims.beside import Drawn, random_beside
from remote_mediation.analyses.claims.samples import Sample, activations
from remote_mediation.analyses.rivals import rulings
from remote_mediation.analyses.rivals.rulings import DIRECTION, Carrier, Judged, values_of
from remote_mediation.analyses.rivals.samples import few_pairs, swapped_at
from remote_mediation.lab import Floats, Lab
from remote_mediation.result import Finding, Findings
from remote_mediation.sites import Site
from remote_mediation.subspaces import Basis, Subspace
from remote_mediation.tokens import TokenPair

MAP_COLUMNS: dict[str, str] = {
    "layer": "decoder layer, after which the stream is read and swapped",
    "position": "token behind the user's text; `last`: the last prompt token, and swapped at the answer tokens, too",
    "norm": "length of the mean difference, harmful minus harmless, over the discovery pairs",
    "nie": "mean NIE of the projection / mean TE, on some discovery pairs",
    "tie": "the same for TIE",
    "cosine_below": "cosine with the direction at the layer below, same token",
    "cosine_before": "cosine with the direction at the token before, same layer",
    "cosine_chosen": "cosine with the chosen direction",
    "eligible": "whether it lies below 80% of the depth",
    "chosen": "whether it is the best of these, by the smaller of NIE and TIE",
    "n": "pairs of nie and tie",
}
DEPTH = 0.8
"""Of the layers, those that may be chosen (arXiv 2406.11717)."""
FILE = "direction.safetensors"
"""Of the run folder: the chosen direction, as long as 1."""


class Map(NamedTuple):
    """Differences of means and what their projections carry."""

    positions: list[str]
    differences: Floats
    """`[layer, position, d_model]`"""
    shares: Floats
    """`[direction, layer, position]`, NIE then TIE as shares of TE."""
    pairs: int
    """Pairs of the shares."""

    @property
    def chosen(self) -> tuple[int, int]:
        """Layer and number of the position of the best direction."""
        strength = self.shares.min(axis=0)
        strength[eligible(len(strength)) :] = -np.inf
        layer, position = np.unravel_index(int(np.argmax(strength)), strength.shape)
        return int(layer), int(position)

    def site(self, layer: int, position: int) -> Subspace:
        """The projection onto a direction, where it was found."""
        basis = Basis.spanning(self.differences[layer, position])
        return Subspace("layer_output", layer, self.positions[position], basis=basis)


def eligible(layers: int) -> int:
    """How many of the first layers may be chosen."""
    return max(int(np.ceil(DEPTH * layers)), 1)


def positions_of(pairs: Sequence[TokenPair]) -> list[str]:
    """Template tokens behind the user's text that all pairs have, counted from the end, and `last`."""
    post = min(pair.post for pair in pairs)
    return [*(f"post_instruction[{at - post}]" for at in range(post - 1)), "last"]


def analyse(lab: Lab, before: Findings) -> Finding:
    """`directions.csv`, the rival claim with its numbers, and the direction itself as a file."""
    discovery, heldout = Sample.of(lab, "discovery"), Sample.of(lab, "heldout")
    found = mapped(discovery, positions_of([*lab.pairs(), *lab.placebos(lab.pairs())]))
    site = found.site(*found.chosen)
    lab.keep(
        FILE,
        site.basis.safetensors(model=lab.study.info.name, layer=str(site.layer), position=site.position),
    )
    everywhere = at_all_layers(site, lab.study.info.layers, swapped_at([discovery, heldout]))
    judged = tested(heldout, site, everywhere)
    tables = {
        "directions.csv": map_table(found),
        "direction.csv": rulings.claim_table([judged]),
        "direction_sets.csv": rulings.set_table([judged]),
    }
    return Finding(
        tables,
        {"the direction": (site,), "the direction at all layers": tuple(everywhere)},
        site.basis,
    )


def mapped(discovery: Sample, positions: list[str]) -> Map:
    """Differences of means on all discovery pairs; effects of their projections on a few."""
    streams = activations(discovery, "layer_output", positions)
    differences = (streams[:, 1] - streams[:, 0]).mean(axis=0)
    pairs, shape = few_pairs(discovery.pairs), differences.shape[:2]
    places = [place for place in np.ndindex(shape) if np.linalg.norm(differences[place]) > 0]
    drawn = Map(positions, differences, np.full((2, *shape), np.nan), len(pairs))
    effects = discovery.lab.joint([[drawn.site(*place)] for place in places], pairs)
    shares = np.zeros((2, *shape))  # where both prompts have the same stream, it carries nothing
    for number, place in enumerate(places):
        shares[(slice(None), *place)] = [
            np.nanmean(table[number]) / np.nanmean(effects.te) for table in (effects.nie, effects.tie)
        ]
    return drawn._replace(shares=shares)


def at_all_layers(site: Subspace, layers: int, position: str) -> list[Site]:
    """The projection onto one direction after every layer, at all tokens where pairs can be aligned."""
    return [Subspace("layer_output", layer, position, basis=site.basis) for layer in range(layers)]


def tested(heldout: Sample, site: Subspace, everywhere: list[Site]) -> Judged:
    """The rival claim on held-out pairs."""
    lab = heldout.lab
    sets: Mapping[str, list[Site]] = {
        f"the direction of layer {site.layer} at '{site.position}'": [site],
        "the same direction after all layers": everywhere,
        "the whole stream there": [Site(site.component, site.layer, site.position)],
    }
    effects = heldout.effects(lab.joint, list(sets.values()))
    own, all_layers, whole = (
        Carrier(name, values_of(sites, lab.study.info), effect)
        for (name, sites), effect in zip(sets.items(), effects, strict=True)
    )
    rng, basis = lab.rng("directions: random ones"), site.basis

    def draw() -> Drawn:
        return Drawn([_elsewhere(site, Basis.random(1, basis.width, rng))])

    own, bench = own._replace(beside=random_beside(heldout, own.effect, draw)), heldout.bench()
    return rulings.judged(bench, DIRECTION, rulings.one_direction(bench, own, all_layers), [own], [all_layers, whole])


def _elsewhere(site: Subspace, along: Basis) -> Subspace:
    """The same change, at every token, along another direction."""
    return Subspace(site.component, site.layer, site.position, basis=site.basis, along=along)


def map_table(found: Map) -> pd.DataFrame:
    """`MAP_COLUMNS`."""
    norms = np.linalg.norm(found.differences, axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):  # no direction, no cosine
        units = found.differences / norms[..., None]
    chosen = found.chosen
    rows = [
        {
            "layer": layer,
            "position": found.positions[position],
            "norm": norms[layer, position],
            "nie": found.shares[0, layer, position],
            "tie": found.shares[1, layer, position],
            "cosine_below": units[layer, position] @ units[layer - 1, position] if layer else np.nan,
            "cosine_before": units[layer, position] @ units[layer, position - 1] if position else np.nan,
            "cosine_chosen": units[layer, position] @ units[chosen],
            "eligible": layer < eligible(len(norms)),
            "chosen": (layer, position) == chosen,
            "n": found.pairs,
        }
        for layer, position in np.ndindex(norms.shape)
    ]
    return pd.DataFrame(rows, columns=list(MAP_COLUMNS))
