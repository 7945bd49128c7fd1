"""Harm is not refusal: two directions, each at its own token, and what either does at the token of the other.

Harm is the direction at the last token of the user's text, refusal that at the last prompt token (`geometry`). The
layer of each is the one below 80% of the depth where it carries most on discovery pairs; on the held-out pairs the
projection onto it is swapped there, and in its place the projection onto the other one (arXiv 2507.11878).
"""

from __future__ import annotations

import contextlib

import numpy as np

from remote_mediation.analyses.claims.samples import Sample
from remote_mediation.analyses.rivals import rulings
from remote_mediation.analyses.rivals.geometry import PLACES, Streams
from remote_mediation.analyses.rivals.rulings import TWO, Judged
from remote_mediation.analyses.rivals.samples import few_pairs, measure_carriers
from remote_mediation.lab import UnmeasuredError
from remote_mediation.sites import Site
from remote_mediation.subspaces import Basis, Direction, Subspace

END = "instruction_end"


def measure_two_directions(discovery: Sample, heldout: Sample, refusal: Direction, depth: int) -> list[Judged]:
    """The rival claim; nothing where a report is rebuilt of a run that was made before it was tested.

    refusal: the best direction at `last`. depth: layers that may be chosen.
    """
    unfinished = () if heldout.lab.can_measure else (UnmeasuredError,)
    with contextlib.suppress(*unfinished):
        return [measure_claim(discovery, heldout, refusal, depth)]
    return []


def measure_claim(discovery: Sample, heldout: Sample, refusal: Direction, depth: int) -> Judged:
    """The rival claim on held-out pairs."""
    if not (_have_both_ends(discovery) and _have_both_ends(heldout)):
        return rulings.untested(
            TWO, "not all prompts have a token of the user's text and one of the template behind it"
        )
    found = {"harm": harm(discovery, depth), "refusal": _site(refusal.basis, refusal.layer or 0, "last")}
    sites: dict[str, Subspace] = {}
    for name, other in (PLACES, reversed(PLACES)):
        site = found[name]
        sites[f"{name} at '{site.position}', layer {site.layer}"] = site
        sites[f"{other} in its place"] = _site(found[other].basis, site.layer, site.position)
    carriers = measure_carriers(heldout, {name: [site] for name, site in sites.items()})
    own, crossed, bench = carriers[::2], carriers[1::2], heldout.bench()
    return rulings.judged(bench, TWO, rulings.two_directions(bench, own, crossed), own, crossed)


def _have_both_ends(sample: Sample) -> bool:
    """Whether all prompts end in a token of the user's text and at least one of the template behind it."""
    return all(pair.post and all(pair.places(END)) for pair in (*sample.pairs, *sample.placebos))


def harm(discovery: Sample, depth: int) -> Subspace:
    """The direction of harm that carries most on a few discovery pairs, by the smaller of NIE and TIE."""
    directions = Streams.of(discovery).directions()[:depth, PLACES.index("harm")]
    sites = [_site(Basis.spanning(one), layer, END) for layer, one in enumerate(directions) if one.any()]
    effects = discovery.lab.joint([[site] for site in sites], few_pairs(discovery.pairs))
    shares = np.array([np.nanmean(table, axis=1) for table in (effects.nie, effects.tie)]) / np.nanmean(effects.te)
    return sites[int(np.argmax(shares.min(axis=0)))]


def _site(basis: Basis, layer: int, position: str) -> Subspace:
    return Subspace("layer_output", layer, position, basis=basis)


def most_sites(depth: int) -> list[Site]:
    """Where harm is looked for."""
    return [Site("layer_output", layer, END) for layer in range(depth)]
