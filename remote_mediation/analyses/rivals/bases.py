"""Other bases where the chosen direction lies: probe weights, top components of the differences, and learnt ones.

All are made from the same discovery pairs. A learnt basis is what gradients find whose swapped projection carries Y
(DAS, Geiger et al. 2023, arXiv 2303.02536). It could carry whatever these pairs have in common by accident, or wake a
path that lies dormant otherwise (Makelov et al. 2023, arXiv 2311.17030). So each basis stands with what it carries on
the pairs that it was made from beside what it carries held out, and beside the learnt one stands the same training with
shuffled labels: on half of the components the swap should move Y as far the other way. What a basis fits of these is
memory, and held out it should carry nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from remote_mediation.analyses.claims.samples import Sample, activations
from remote_mediation.analyses.rivals.samples import few_pairs
from remote_mediation.engine.learning import Lesson, fitting, learn_task
from remote_mediation.engine.rows import Row
from remote_mediation.errors import SettingsError
from remote_mediation.lab import Floats, Lab, Study
from remote_mediation.later import pairs_of
from remote_mediation.probes import probe_weights
from remote_mediation.subspaces import Basis, Direction, Subspace
from remote_mediation.tokens import TokenPair

BASIS_COLUMNS: dict[str, str] = {
    "basis": "what it is made of",
    "values": "directions in it",
    "layer": "decoder layer after which it is swapped, that of the chosen direction",
    "position": "token at which it is swapped, that of the chosen direction",
    "nie": "mean NIE / mean TE on the pairs that it was made from; with shuffled labels in the way that it was taught",
    "tie": "the same for TIE",
    "loss_before": "of a learnt one: mean squared miss of Y where training began, in mean squared TE of these pairs",
    "loss": "the same of what was learnt; 0: on every pair the swap does just what the other prompt does",
    "cosine_chosen": "cosine of the chosen direction with it, or with what several span",
    "n": "pairs that it was made from",
}
MEAN, PROBE, SHUFFLED = "the chosen direction", "probe weights", "shuffled labels"
MOST_PAIRS = 32
"""Pairs to make bases from: each step of a training runs all of them."""


class Made(NamedTuple):
    """A basis that was made from discovery pairs."""

    kind: str
    """As `directions.bases` names it; empty where it is none of these."""
    name: str
    site: Subspace
    signs: Floats
    """`[pair]`, -1 where it was taught that the swap moves Y the other way."""
    losses: tuple[float, ...] = ()
    """Of each step, and of what was learnt."""

    def columns(self) -> dict[str, Any]:
        """What of `BASIS_COLUMNS` it says of itself."""
        return {
            "basis": self.name,
            "values": self.site.basis.size,
            "layer": self.site.layer,
            "position": self.site.position,
            "loss_before": self.losses[0] if self.losses else np.nan,
            "loss": self.losses[-1] if self.losses else np.nan,
        }


class Bases(NamedTuple):
    """All of them, the chosen direction first; none where a study names none."""

    pairs: Sequence[TokenPair]
    """What they were made from."""
    every: Sequence[Made]

    @property
    def beside(self) -> dict[str, Subspace]:
        """Those that stand beside the chosen direction, by name."""
        return {one.name: one.site for one in self.every[1:]}

    def files(self, chosen: Direction) -> dict[str, bytes]:
        """Those that a study names, as files; one direction is as long as the difference of means along it."""
        found = {}
        for one in self.every:
            if one.kind:
                basis = one.site.basis
                length = chosen.length * basis.cosine(chosen.basis.vectors[0]) if basis.size == 1 else np.nan
                found[f"{one.kind}.safetensors"] = replace(chosen, basis=basis, length=length).safetensors()
        return found


def check(study: Study) -> None:
    """Refuse bases that cannot be made.

    Raises:
        SettingsError: gradients of a server, or more directions than there are pairs to make them from, or numbers.
    """
    settings, pairs = study.config.directions, min(len(pairs_of(study, "discovery")), MOST_PAIRS)
    if "learnt" in settings.bases and study.config.backend != "local":
        raise SettingsError(
            "directions.bases names 'learnt', and learning takes dozens of gradient steps, each on what the one before "
            'found, which servers do not run; learn it with backend = "local", and give the file learnt.safetensors '
            "of that run as directions.basis"
        )
    if settings.bases and settings.rank > min(pairs, study.info.d_model):
        raise SettingsError(
            f"directions.rank is {settings.rank}, and bases are made from {pairs} discovery pairs, in a stream "
            f"{study.info.d_model} wide; give a rank that is no larger than either"
        )


def make_bases(discovery: Sample, chosen: Subspace, positions: Sequence[str]) -> Bases:
    """The bases that the study names.

    chosen: the projection onto the chosen direction. positions: of the map of directions, whose activations are known.
    """
    lab, settings = discovery.lab, discovery.lab.study.config.directions
    if not settings.bases:
        return Bases((), ())
    pairs = fitting(few_pairs(discovery.pairs, MOST_PAIRS), chosen, lab.study.setting)
    streams, rank, plain = _streams(discovery, pairs, chosen, positions), settings.rank, np.ones(len(pairs))
    found = [Made("", MEAN, chosen, plain)]
    if "probe" in settings.bases:
        found.append(Made("probe", PROBE, _at(chosen, by_probe(streams)), plain))
    if "components" in settings.bases:
        top = f"top {rank} components" if rank > 1 else "top component"
        found.append(Made("components", f"{top} of the differences", _at(chosen, by_components(streams, rank)), plain))
    if "learnt" in settings.bases:
        found += _taught(lab, pairs, chosen, rank)
    return Bases(pairs, found)


def by_probe(streams: Floats) -> Basis:
    """The direction along which a linear probe's log-odds of harm rise. streams: `[pair, side, width]`."""
    features = streams.transpose(1, 0, 2).reshape(-1, streams.shape[-1])
    return Basis.spanning(probe_weights(features, np.repeat([0, 1], len(streams))))


def by_components(streams: Floats, rank: int) -> Basis:
    """The top right singular vectors of the differences between the sides, whose mean is left in.

    streams: `[pair, side, width]`.
    """
    return Basis.spanning(np.linalg.svd(streams[:, 1] - streams[:, 0], full_matrices=False)[2][:rank])


def learn_basis(
    lab: Lab, pairs: Sequence[TokenPair], site: Subspace, rank: int, signs: Floats
) -> tuple[Basis, tuple[float, ...]]:
    """A basis whose swap makes of Y what it is on the other prompt, or the reverse where a sign is -1; and its losses.

    signs: `[pair]`.
    """
    y0, y1 = (lab.outcomes([Row(pair.id, side) for pair in pairs]) for side in (0, 1))
    moved = signs * (y1 - y0)
    targets = np.stack([y0 + moved, y1 - moved], axis=1).tolist()
    lessons = [Lesson(pair, (onto_x0, onto_x1)) for pair, (onto_x0, onto_x1) in zip(pairs, targets, strict=True)]
    scale = float(np.sqrt(np.mean(moved**2))) or 1.0  # where nothing changes, nothing is missed
    start = Basis.random(rank, site.basis.width, lab.rng("directions: where training begins"))
    (values,) = lab.run([learn_task(lessons, replace(site, basis=start), scale, lab.study.setting)])
    vectors = values[: start.vectors.size].reshape(start.vectors.shape)
    return Basis.spanning(vectors), tuple(values[start.vectors.size :].tolist())


def _taught(lab: Lab, pairs: Sequence[TokenPair], chosen: Subspace, rank: int) -> list[Made]:
    """A learnt basis, and beside it one that was taught the other way on half of the pairs."""
    flipped = half_flipped(pairs, lab.rng("directions: shuffled labels"))
    name, found = f"learnt basis of {rank}", []
    for kind, label, signs in (
        ("learnt", name, np.ones(len(pairs))),
        ("", f"{name}, {SHUFFLED}", flipped),
    ):
        basis, losses = learn_basis(lab, pairs, chosen, rank, signs)
        found.append(Made(kind, label, _at(chosen, basis), signs, losses))
    return found


def half_flipped(pairs: Sequence[TokenPair], rng: np.random.Generator) -> Floats:
    """`[pair]`, -1 for the pairs of half of the components, at random, as near as their number allows, else 1."""
    names = sorted({pair.cluster for pair in pairs})
    flipped = {names[at] for at in rng.permutation(len(names))[: len(names) // 2]}
    return np.array([-1.0 if pair.cluster in flipped else 1.0 for pair in pairs])


def measure_bases(lab: Lab, found: Bases) -> dict[str, pd.DataFrame]:
    """`bases.csv` (`BASIS_COLUMNS`); nothing where none were made."""
    if not found.every:
        return {}
    effects = lab.joint([[one.site] for one in found.every], found.pairs)
    chosen, total = found.every[0].site.basis.vectors[0], np.mean(effects.te)
    rows = [
        {
            **one.columns(),
            "nie": np.mean(one.signs * nie) / total,
            "tie": np.mean(one.signs * tie) / total,
            "cosine_chosen": one.site.basis.cosine(chosen),
            "n": len(found.pairs),
        }
        for one, nie, tie in zip(found.every, effects.nie, effects.tie, strict=True)
    ]
    return {"bases.csv": pd.DataFrame(rows, columns=list(BASIS_COLUMNS))}


def _streams(discovery: Sample, pairs: Sequence[TokenPair], chosen: Subspace, positions: Sequence[str]) -> Floats:
    """`[pair, side, width]` where the chosen direction lies."""
    place, known = positions.index(chosen.position), [pair.id for pair in discovery.pairs]
    found = activations(discovery, "layer_output", positions)[:, :, chosen.layer, place]
    return found[[known.index(pair.id) for pair in pairs]]


def _at(chosen: Subspace, basis: Basis) -> Subspace:
    """A basis where the chosen direction lies, with each of its own pointing the same way."""
    signs = np.where(basis.vectors @ chosen.basis.vectors[0] < 0, -1, 1).astype(np.float32)
    return replace(chosen, basis=Basis(signs[:, None] * basis.vectors))
