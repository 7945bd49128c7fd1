"""Harm and refusal in the stream, layer by layer: how far apart, how long, and how well they tell prompts apart.

The direction of *harm* is the difference of means, harmful minus harmless, at the last token of the user's text; that
of *refusal* is the same at the last prompt token, where the answer begins (arXiv 2507.11878). A cosine says little
where a direction is not told from noise, so beside it stands that of the same direction on two halves of the pairs.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import numpy as np
import pandas as pd

from remote_mediation.analyses.claims.samples import Sample, activations_at
from remote_mediation.lab import Floats, Lab, UnmeasuredError
from remote_mediation.tokens import TokenPair

GEOMETRY_COLUMNS: dict[str, str] = {
    "layer": "decoder layer, after which the stream is read",
    "cosine": "of the directions of harm (last token of the user's text) and of refusal (last prompt token)",
    "cosine_harm": "of the direction of harm on two halves of the pairs: what noise leaves of it",
    "cosine_refusal": "the same of the direction of refusal",
    "length_harm": "of the mean difference, harmful minus harmless, at the last token of the user's text",
    "length_refusal": "the same at the last prompt token",
    "silhouette_harm": "mean silhouette of harmful and harmless prompts by the stream at the token of harm",
    "silhouette_refusal": "the same at the token of refusal",
    "n": "discovery pairs",
}
PLACES = ("harm", "refusal")


class Streams(NamedTuple):
    """The stream of pairs at both tokens."""

    values: Floats
    """`[pair, side, layer, place, d_model]`, places as in `PLACES`."""
    half: Floats
    """`[pair]`, 0 or 1: halves of the pairs, of whole clusters where there are two."""

    @classmethod
    def of(cls, sample: Sample) -> Streams:
        """Of the pairs of a sample."""
        clusters = np.unique(sample.clusters, return_inverse=True)[1]
        return cls(activations_at(sample, "layer_output", places_of), (clusters % 2).astype(np.float64))

    def directions(self, chosen: Floats | None = None) -> Floats:
        """`[layer, place, d_model]`, differences of means over some of the pairs, all by default."""
        used = self.values if chosen is None else self.values[chosen.astype(bool)]
        found: Floats = (used[:, 1] - used[:, 0]).mean(axis=0)
        return found


def measure_geometry(lab: Lab, sample: Sample) -> dict[str, pd.DataFrame]:
    """`geometry.csv`; nothing where a report is rebuilt of a run that was made before this was read."""
    unfinished = () if lab.can_measure else (UnmeasuredError,)
    with contextlib.suppress(*unfinished):
        return {"geometry.csv": geometry_table(Streams.of(sample))}
    return {}


def places_of(pair: TokenPair, side: int) -> list[tuple[int, ...]]:
    """Token indices of the last token of the user's text and of the last prompt token."""
    length = len(pair.prompts[side])
    return [(length - pair.post - 1,), (length - 1,)]


def geometry_table(streams: Streams) -> pd.DataFrame:
    """`GEOMETRY_COLUMNS`."""
    whole = streams.directions()
    halves = [streams.directions(half) for half in (streams.half, 1 - streams.half)] if streams.half.any() else []
    rows = []
    for layer, both in enumerate(whole):
        row: dict[str, float] = {"layer": layer, "cosine": cosine(*both), "n": len(streams.values)}
        for at, name in enumerate(PLACES):
            kinds = np.swapaxes(streams.values[:, ::-1, layer, at], 0, 1)
            row[f"cosine_{name}"] = cosine(*(half[layer, at] for half in halves)) if halves else np.nan
            row[f"length_{name}"] = float(np.linalg.norm(both[at]))
            row[f"silhouette_{name}"] = silhouette(*kinds)
        rows.append(row)
    return pd.DataFrame(rows, columns=list(GEOMETRY_COLUMNS))


def cosine(one: Floats, other: Floats) -> float:
    """Of the angle between two vectors; NaN where one of them is 0."""
    lengths = float(np.linalg.norm(one) * np.linalg.norm(other))
    return float(one @ other) / lengths if lengths else np.nan


def silhouette(one: Floats, other: Floats) -> float:
    """Mean over the points `[point, width]` of two groups of (b - a) / max(a, b), from -1 to 1.

    a: mean distance to the others of its own group, b: to those of the other one (Rousseeuw 1987, doi
    10.1016/0377-0427(87)90125-7). NaN where a group has fewer than two points, or all points are one.
    """
    if min(len(one), len(other)) < 2:
        return np.nan
    points = np.concatenate([one, other])
    distances = _distances(points)
    first = np.arange(len(points)) < len(one)
    within, across = np.empty(len(points)), np.empty(len(points))
    for group in (first, ~first):
        within[group] = distances[np.ix_(group, group)].sum(axis=1) / (group.sum() - 1)
        across[group] = distances[np.ix_(group, ~group)].mean(axis=1)
    most = np.maximum(within, across)
    if not most.any():
        return np.nan
    scores = np.divide(across - within, most, out=np.zeros_like(most), where=most > 0)
    return float(scores.mean())


def _distances(points: Floats) -> Floats:
    """`[point, point]`."""
    squares = (points**2).sum(axis=1)
    distances: Floats = np.sqrt(np.maximum(squares[:, None] + squares - 2 * points @ points.T, 0.0))
    np.fill_diagonal(distances, 0.0)
    return distances
