"""How claim 2's number depends on choices: layers, direction, and which half of the components it is taken on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from remote_mediation.analyses.claims.verdicts import DIRECTIONS, Direction, Effect
from remote_mediation.intervals import Floats, complete_pairs, draw_weights, mean_intervals
from remote_mediation.shares import share
from remote_mediation.stats import split_clusters

SPECIFICATION_COLUMNS: dict[str, str] = {
    "layers": "layers whose contributions are compared",
    "direction": "nie (the harmless prompt's are exchanged) or tie (the harmful prompt's)",
    "pairs": "pairs used: discovery, heldout, all, or random halves of the components",
    "components": "components of pairs; of random halves the mean",
    "share": "(direct effect of the MLPs - that of attention) / TE; of random halves the mean",
    "share_low": "lower end of its 95% interval; of random halves their 2.5% quantile",
    "share_high": "upper end; of random halves their 97.5% quantile",
    "positive": "how often its interval lies above 0",
    "negative": "how often below",
    "unclear": "how often it spans 0, or cannot be had",
    "reason": "why a number is missing, or why to read it with care",
}
RANDOM = "random halves"
DIVISIONS = 50
"""Random divisions of the components into two halves."""


class Compared(NamedTuple):
    """MLPs minus attention on some pairs."""

    differences: Mapping[str, Effect]
    """By layers."""
    total: Floats
    """TE, `[pair]`."""
    clusters: npt.NDArray[np.str_]


def specification(
    by_split: Mapping[str, Compared], fresh: Callable[[], np.random.Generator], resamples: int
) -> pd.DataFrame:
    """`SPECIFICATION_COLUMNS`, for the splits and for random halves of all pairs.

    fresh: gives the draws of the claims' other statistics, so that the same share has the same interval everywhere.
    """
    whole = by_split["all"]
    choices = [(layers, direction) for layers in whole.differences for direction in DIRECTIONS]
    often = _often(np.stack([_effect(whole, *choice) for choice in choices]), whole, fresh(), resamples)
    rows: list[dict[str, Any]] = []
    for choice, halves in zip(choices, often, strict=True):
        place = dict(zip(("layers", "direction"), choice, strict=True))
        for split, found in by_split.items():
            rows.append({**place, "pairs": split, **_once(_effect(found, *choice), found, fresh(), resamples)})
        rows.append({**place, "pairs": RANDOM, **halves})
    return pd.DataFrame(rows, columns=list(SPECIFICATION_COLUMNS))


def _effect(of: Compared, layers: str, direction: Direction) -> Floats:
    difference = of.differences[layers]
    return (difference.nie if direction == "nie" else difference.tie).harm


def _once(effect: Floats, of: Compared, rng: np.random.Generator, resamples: int) -> dict[str, Any]:
    found = share(effect, of.total, of.clusters, rng, resamples)
    sign = 0 if np.isnan(found.low) else found.sign
    return {
        "components": found.n_clusters,
        **found.columns("share"),
        **{name: int(sign == meant) for name, meant in _SIGNS.items()},
        "reason": found.reason,
    }


def _often(effects: Floats, of: Compared, rng: np.random.Generator, resamples: int) -> list[dict[str, Any]]:
    """The same of effects `[choice, pair]` on halves of the components: they overlap, so this is no test."""
    splits = [split_clusters(of.clusters, rng) for _ in range(DIVISIONS)]
    halves = [
        _half(effects, of, split == name, rng, resamples) for split in splits for name in ("discovery", "heldout")
    ]
    shares, signs = (
        np.stack(parts, axis=1) for parts in zip(*((one.shares, one.signs) for one in halves), strict=True)
    )
    components = float(np.mean([one.components for one in halves]))
    return [
        {
            "components": components,
            "share": float(own.mean()),
            **dict(zip(("share_low", "share_high"), np.quantile(own, [0.025, 0.975]), strict=True)),
            **{name: int((said == meant).sum()) for name, meant in _SIGNS.items()},
            "reason": "halves overlap: how far the choice matters, not a test",
        }
        for own, said in zip(shares, signs, strict=True)
    ]


_SIGNS = {"positive": 1, "negative": -1, "unclear": 0}


class _Half(NamedTuple):
    shares: Floats
    """`[choice]`"""
    signs: npt.NDArray[np.intp]
    """`[choice]`, 0 where the interval spans 0."""
    components: int


def _half(
    effects: Floats, of: Compared, part: npt.NDArray[np.bool_], rng: np.random.Generator, resamples: int
) -> _Half:
    """Signs of mean effects in the direction of TE; that of TE is taken from all pairs."""
    direction = -1.0 if np.nansum(of.total) < 0 else 1.0
    rows = direction * np.vstack([effects, of.total])[:, part]
    pairs = complete_pairs(rows, of.clusters[part])
    weights = draw_weights(len(pairs.sizes), rng, resamples)
    found = mean_intervals(pairs.sums[:-1], pairs.sizes[None].astype(np.float64), weights)
    sums = pairs.sums.sum(axis=1)
    signs = (found.low > 0).astype(np.intp) - (found.high < 0)
    return _Half(sums[:-1] / sums[-1], signs, len(pairs.sizes))
