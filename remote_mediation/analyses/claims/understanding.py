"""Claim 4: at which layer the edit is read best before it acts, and whether the words alone would do.

A probe reads the mean over the edit's tokens. It is fitted to the discovery pairs and judged on the held-out ones; the
layer is chosen on the discovery pairs, leaving out one component after the other. A probe of what enters the first
layer, the embeddings, says what the words give away. The placebo is put to the same test, x0 against xp.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from remote_mediation.analyses.claims import verdicts
from remote_mediation.analyses.claims.samples import Sample
from remote_mediation.analyses.claims.verdicts import ACTS, Claim, Read
from remote_mediation.engine.tasks import Reading, read_task
from remote_mediation.intervals import Interval
from remote_mediation.lab import Floats, Lab
from remote_mediation.probes import fit_many
from remote_mediation.rates import rate
from remote_mediation.sites import Site
from remote_mediation.tokens import TokenPair

READABLE_COLUMNS: dict[str, str] = {
    "layer": "decoder layer, from 0; -1 is what enters the first one, the embeddings",
    "discovery": "accuracy of the probe on discovery pairs, one component left out after the other",
    "accuracy": "accuracy on the held-out pairs of the probe of the discovery pairs",
    "accuracy_low": "lower end of its 95% interval",
    "accuracy_high": "upper end",
    "placebo": "the same with the placebo in place of the harmful prompt",
    "placebo_low": "lower end of its 95% interval",
    "placebo_high": "upper end",
    "nie": "NIE of the stream at `last` after this layer / TE, held-out pairs",
    "nie_low": "lower end of its 95% interval",
    "nie_high": "upper end",
    "chosen": "whether it is the readable layer, chosen on the discovery pairs",
    "reason": "why a number is missing, or why to read it with care",
}
_LABELS = (0, 1)


class Features(NamedTuple):
    """What the stream holds at the edit, of the prompts of a sample."""

    harm: Floats
    """`[pair, side, 1 + layer, d_model]`, the embeddings first."""
    placebo: Floats
    """The same with the placebo in place of the harmful prompt."""
    clusters: npt.NDArray[np.str_]


def measure_understanding(discovery: Sample, heldout: Sample) -> tuple[Claim, dict[str, pd.DataFrame]]:
    """Claim 4, and `readable.csv`; both samples have the edit on both sides."""
    lab = heldout.lab
    known, asked = _features(discovery), _features(heldout)
    left_out = leave_one_out(known.harm, known.clusters)
    found = lab.joint(stream(lab), discovery.pairs)
    layer = choose(left_out[1:], [discovery.bench().share(nie, found.te) for nie in found.nie])
    harm = _read(known.harm, asked.harm)
    placebo = _spread(heldout, _read(known.placebo, asked.placebo))
    acting = heldout.effects(lab.joint, stream(lab))
    bench = heldout.bench()
    shares = [bench.share(effect.nie.harm, bench.total.harm) for effect in acting]
    claim = verdicts.understood(bench, layer, _as_read(harm), _as_read(placebo), acting[layer].nie, shares)
    return claim, {"readable.csv": _table(heldout, left_out, harm, placebo, shares, layer)}


def leave_one_out(features: Floats, clusters: npt.NDArray[np.str_]) -> Floats:
    """`[1 + layer]`, accuracy of probes on the component that they were not fitted to; both sides together."""
    right = np.full((features.shape[2], *features.shape[:2]), np.nan)
    for cluster in np.unique(clusters):
        own = clusters == cluster
        if not own.all():
            right[:, own] = _read(features[~own], features[own])
    found: Floats = right.mean(axis=(1, 2))
    return found


def choose(accuracies: Floats, shares: Sequence[Interval]) -> int:
    """The layer that is read best among those that clearly do not act yet, the earliest of equals.

    accuracies: `[layer]`. shares: NIE of the stream at `last` as share of TE, by layer. Both on discovery. One whose
    interval holds the bar would hold it on the held-out pairs as well: such layers are allowed where none is clearly
    silent, and all are where none is below the bar.
    """
    clearly = np.array([share.high < ACTS for share in shares])
    perhaps = np.array([share.value < ACTS for share in shares])
    allowed = next((some for some in (clearly, perhaps) if some.any()), np.ones_like(perhaps))
    return int(np.argmax(np.where(allowed, accuracies, -np.inf)))


def _read(known: Floats, asked: Floats) -> Floats:
    """`[1 + layer, pair, side]`, 1 where the probe of the known prompts reads an asked one rightly, else 0."""
    labels = np.tile(_LABELS, len(known))
    right = np.full((asked.shape[2], *asked.shape[:2]), np.nan)
    if not len(known) or not len(asked):
        return right
    for place in range(asked.shape[2]):
        features, others = (part[:, :, place].reshape(-1, part.shape[-1]) for part in (known, asked))
        scores = fit_many(features, labels[:, None] == 1, others)
        right[place] = (scores.reshape(-1, 2) > 0) == np.array(_LABELS, dtype=bool)
    return right


def _as_read(right: Floats) -> Read:
    return Read(layers=right[1:], embedding=right[0])


def _spread(sample: Sample, right: Floats) -> Floats:
    """Of placebos, as of pairs: `[1 + layer, pair, side]`."""
    return np.moveaxis(sample.spread(np.moveaxis(right, 0, -1), np.nan), -1, 0)


def stream(lab: Lab) -> list[list[Site]]:
    """The residual stream where the answer is read, layer by layer."""
    return [[Site("layer_output", layer, "last")] for layer in range(lab.study.info.layers)]


def _features(sample: Sample) -> Features:
    return Features(
        harm=_at_edit(sample.lab, sample.pairs),
        placebo=_at_edit(sample.lab, sample.placebos),
        clusters=sample.clusters,
    )


def _at_edit(lab: Lab, pairs: Sequence[TokenPair]) -> Floats:
    """The stream at the edit, averaged over its tokens: `[pair, side, 1 + layer, d_model]`."""
    info, setting = lab.study.info, lab.study.setting
    tasks = []
    for pair in pairs:
        for side, ids in enumerate(pair.prompts):
            at = pair.places("edit")[side]
            readings = [Reading("layer_input", 0, at)]
            readings += [Reading("layer_output", layer, at) for layer in range(info.layers)]
            tasks.append(read_task(pair.id, ids, readings, setting))
    shape = (len(pairs), 2, 1 + info.layers, info.d_model)
    return np.array(lab.run(tasks), dtype=np.float64).reshape(shape)


def _table(
    heldout: Sample,
    left_out: Floats,
    harm: Floats,
    placebo: Floats,
    shares: Sequence[Interval],
    layer: int,
) -> pd.DataFrame:
    twice = np.repeat(heldout.clusters, 2)
    rows = []
    for place, discovery in enumerate(left_out):
        of_harm, of_placebo = (rate(right[place].ravel(), twice) for right in (harm, placebo))
        row = {"layer": place - 1, "discovery": discovery, "chosen": place - 1 == layer}
        row |= {**of_harm.columns("accuracy"), **of_placebo.columns("placebo")}
        row |= shares[place - 1].columns("nie") if place else dict.fromkeys(("nie", "nie_low", "nie_high"), np.nan)
        rows.append(row | {"reason": of_harm.reason})
    return pd.DataFrame(rows, columns=list(READABLE_COLUMNS))
