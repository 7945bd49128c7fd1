"""One direction: the map of differences of means over layers and template tokens, the best of them held out.

A direction is the mean over discovery pairs of the residual stream on the harmful prompt minus that on the harmless
one, after a layer and at a token behind the user's text (arXiv 2406.11717). Its mediator is the stream's projection
onto it, at that site; which one is best is chosen on discovery pairs, among layers below 80% of the depth, as there:
above, the stream is all but the answer itself. Beside it the same change, token by token, along random directions.
The direction is left as a file. One of another run, or from elsewhere, is measured in the same way where it was found
(`given`), with its cosines with all of these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pandas as pd

from remote_mediation.analyses.claims.beside import Drawn, random_beside
from remote_mediation.analyses.claims.samples import Sample, activations
from remote_mediation.analyses.rivals import bases, geometry, given, harm, rulings
from remote_mediation.analyses.rivals.rulings import DIRECTION, Carrier, Judged
from remote_mediation.analyses.rivals.samples import few_pairs, measure_carriers, swapped_at
from remote_mediation.lab import Floats, Lab
from remote_mediation.result import Finding, Findings
from remote_mediation.sites import Site
from remote_mediation.subspaces import Basis, Direction, Subspace
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
    "cosine_given": "cosine with the direction given in a file, or with what several span; empty where none was",
    "eligible": "whether it lies below 80% of the depth",
    "chosen": "whether it is the best of these, by the smaller of NIE and TIE",
    "n": "pairs of nie and tie",
}
DEPTH = 0.8
"""Of the layers, those that may be chosen (arXiv 2406.11717)."""
FILE = "direction.safetensors"
"""Of the run folder: the chosen direction, as long as 1, with its length and its place."""
FOUND, GIVEN = "the direction", "the given direction"


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
    def strength(self) -> Floats:
        """`[layer, position]`, the smaller of both shares; of layers that may not be chosen minus infinity."""
        found: Floats = self.shares.min(axis=0)
        found[eligible(len(found)) :] = -np.inf
        return found

    @property
    def chosen(self) -> tuple[int, int]:
        """Layer and number of the position of the best direction."""
        layer, position = np.unravel_index(int(np.argmax(self.strength)), self.strength.shape)
        return int(layer), int(position)

    @property
    def best(self) -> Direction:
        """The best direction."""
        return self.direction(*self.chosen)

    @property
    def best_last(self) -> Direction:
        """The best of those at the last prompt token."""
        return self.direction(int(np.argmax(self.strength[:, -1])), len(self.positions) - 1)

    def direction(self, layer: int, position: int) -> Direction:
        """A direction with its place."""
        length = float(np.linalg.norm(self.differences[layer, position]))
        return Direction(self.site(layer, position).basis, layer, self.positions[position], length)

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


class Mediators(NamedTuple):
    """What a direction is swapped as."""

    own: Subspace
    """Where it was found."""
    everywhere: tuple[Subspace, ...]
    """After every layer, at all tokens where pairs can be aligned."""

    @classmethod
    def of(cls, one: Direction, layers: int, position: str) -> Mediators:
        """position: of `everywhere`."""
        assert one.layer is not None
        every = (Subspace("layer_output", layer, position, basis=one.basis) for layer in range(layers))
        return cls(Subspace("layer_output", one.layer, one.position, basis=one.basis), tuple(every))


def analyse(lab: Lab, before: Findings) -> Finding:
    """`directions.csv`, the rival claim with its numbers, and the direction itself as a file."""
    discovery, heldout = Sample.of(lab, "discovery"), Sample.of(lab, "heldout")
    found = measure_map(discovery, positions_of([*lab.pairs(), *lab.placebos(lab.pairs())]))
    best, other = replace(found.best, model=lab.study.info.name), given.loaded(lab)
    directions = {FOUND: best, **({GIVEN: given.placed(other, best)} if other else {})}
    position, layers = swapped_at([discovery, heldout]), lab.study.info.layers
    mediators = {name: Mediators.of(one, layers, position) for name, one in directions.items()}
    made = bases.make_bases(discovery, mediators[FOUND].own, found.positions)
    claims = [
        measure_direction(heldout, mediators[FOUND], mediators.get(GIVEN), made.beside),
        *harm.measure_two_directions(discovery, heldout, found.best_last, eligible(layers)),
    ]
    tables = {
        "directions.csv": map_table(found, other),
        "direction.csv": rulings.claim_table(claims),
        "direction_sets.csv": rulings.set_table(claims),
        **geometry.measure_geometry(lab, discovery),
        **bases.measure_bases(lab, made),
    }
    return Finding(tables, _sets_of(mediators), directions, {FILE: best.safetensors(), **made.files(best)})


def _sets_of(mediators: Mapping[str, Mediators]) -> dict[str, tuple[Site, ...]]:
    """What other analyses may put to further tests: each direction where it was found, and at all layers."""
    own = {name: (one.own,) for name, one in mediators.items()}
    return {**own, **{f"{name} at all layers": one.everywhere for name, one in mediators.items()}}


def measure_map(discovery: Sample, positions: list[str]) -> Map:
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


def measure_direction(
    heldout: Sample, found: Mediators, other: Mediators | None, more: Mapping[str, Subspace]
) -> Judged:
    """The rival claim on held-out pairs.

    other: of a given direction, which stands beside it. more: what does so, too, by name.
    """
    sets = [*_found_sets(found), *(_given_sets(other) if other else ())]
    sets += [_Set(name, [basis], basis, f"directions: random ones beside the {name}") for name, basis in more.items()]
    measured = measure_carriers(heldout, {one.name: one.sites for one in sets})
    own, all_layers, *beside = (
        _beside_random(heldout, carrier, one.controlled, one.purpose) if one.controlled else carrier
        for one, carrier in zip(sets, measured, strict=True)
    )
    bench = heldout.bench()
    ruling = rulings.one_direction(bench, own, all_layers)
    return rulings.judged(bench, DIRECTION, ruling, [own], [all_layers, *beside])


class _Set(NamedTuple):
    """What is swapped together on the held-out pairs."""

    name: str
    sites: Sequence[Site]
    controlled: Subspace | None = None
    """The projection that random ones are put beside, if any are."""
    purpose: str = ""
    """Of their random numbers."""


def _found_sets(found: Mediators) -> list[_Set]:
    site = found.own
    name = f"the direction of layer {site.layer} at '{site.position}'"
    return [
        _Set(name, [site], site, "directions: random ones"),
        _Set("the same direction after all layers", found.everywhere),
        _Set("the whole stream there", [Site(site.component, site.layer, site.position)]),
    ]


def _given_sets(other: Mediators) -> list[_Set]:
    name = f"{GIVEN}, layer {other.own.layer} at '{other.own.position}'"
    return [
        _Set(name, [other.own], other.own, "directions: random ones beside the given"),
        _Set(f"{GIVEN} after all layers", other.everywhere),
    ]


def _beside_random(heldout: Sample, carrier: Carrier, site: Subspace, purpose: str) -> Carrier:
    """A direction with random ones beside it, along which the same change is written at every token."""
    rng, basis = heldout.lab.rng(purpose), site.basis

    def draw() -> Drawn:
        return Drawn([replace(site, along=Basis.random(basis.size, basis.width, rng))])

    return carrier._replace(beside=random_beside(heldout, carrier.effect, draw))


def map_table(found: Map, other: Direction | None = None) -> pd.DataFrame:
    """`MAP_COLUMNS`. other: a given direction."""
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
            **_cosines(units, layer, position),
            "cosine_chosen": units[layer, position] @ units[chosen],
            "cosine_given": other.basis.cosine(found.differences[layer, position]) if other else np.nan,
            "eligible": layer < eligible(len(norms)),
            "chosen": (layer, position) == chosen,
            "n": found.pairs,
        }
        for layer, position in np.ndindex(norms.shape)
    ]
    return pd.DataFrame(rows, columns=list(MAP_COLUMNS))


def _cosines(units: Floats, layer: int, position: int) -> dict[str, float]:
    """Of a direction with that of the layer below and that of the token before. units: `[layer, position, width]`."""
    own = units[layer, position]
    return {
        "cosine_below": own @ units[layer - 1, position] if layer else np.nan,
        "cosine_before": own @ units[layer, position - 1] if position else np.nan,
    }
