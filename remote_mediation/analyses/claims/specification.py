"""How claim 2's number depends on choices: layers, direction, and which half of the components it is taken on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from remote_mediation.analyses.claims.verdicts import DIRECTIONS, Effect
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


def specification(by_split: Mapping[str, Compared], rng: np.random.Generator, resamples: int) -> pd.DataFrame:
    """`SPECIFICATION_COLUMNS`, for the splits and for random halves of all pairs."""
    names = list(by_split["all"].differences)
    seed = int(rng.integers(2**63))
    rows: list[dict[str, Any]] = []
    for layers in names:
        for direction in DIRECTIONS:
            place = {"layers": layers, "direction": direction}
            for split, found in by_split.items():
                effect = getattr(found.differences[layers], direction).harm
                rows.append({**place, "pairs": split, **_once(effect, found, seed, resamples)})
            whole = by_split["all"]
            effect = getattr(whole.differences[layers], direction).harm
            rows.append({**place, "pairs": RANDOM, **_often(effect, whole, seed, resamples)})
    return pd.DataFrame(rows, columns=list(SPECIFICATION_COLUMNS))


def _once(effect: Floats, of: Compared, seed: int, resamples: int) -> dict[str, Any]:
    found = share(effect, of.total, of.clusters, np.random.default_rng(seed), resamples)
    sign = 0 if np.isnan(found.low) else found.sign
    return {
        "components": found.n_clusters,
        **found.columns("share"),
        **{"positive": int(sign > 0), "negative": int(sign < 0), "unclear": int(sign == 0)},
        "reason": found.reason,
    }


def _often(effect: Floats, of: Compared, seed: int, resamples: int) -> dict[str, Any]:
    """The same on halves of the components: they overlap, so this shows how far the choice matters, no test."""
    rng = np.random.default_rng(seed)
    halves = [_half(effect, of, part, rng, resamples) for part in _halves(of.clusters, rng)]
    shares = np.array([half.share for half in halves])
    signs = np.array([half.sign for half in halves])
    low, high = np.quantile(shares, [0.025, 0.975])
    return {
        "components": float(np.mean([half.components for half in halves])),
        **{"share": float(shares.mean()), "share_low": float(low), "share_high": float(high)},
        **{name: int((signs == sign).sum()) for name, sign in _SIGNS.items()},
        "reason": "halves overlap: how far the choice matters, not a test",
    }


_SIGNS = {"positive": 1, "negative": -1, "unclear": 0}


class _Half(NamedTuple):
    share: float
    sign: int
    components: int


def _halves(clusters: npt.NDArray[np.str_], rng: np.random.Generator) -> list[npt.NDArray[np.bool_]]:
    splits = [split_clusters(clusters, rng) for _ in range(DIVISIONS)]
    return [split == name for split in splits for name in ("discovery", "heldout")]


def _half(
    effect: Floats,
    of: Compared,
    part: npt.NDArray[np.bool_],
    rng: np.random.Generator,
    resamples: int,
) -> _Half:
    """Sign of the mean effect in the direction of TE; TE is taken as clear of 0, as on all pairs."""
    total = of.total[part]
    direction = -1.0 if np.nansum(of.total) < 0 else 1.0
    pairs = complete_pairs(np.stack([direction * effect[part], total]), of.clusters[part])
    weights = draw_weights(len(pairs.sizes), rng, resamples)
    found = mean_intervals(pairs.sums[:1], pairs.sizes[None].astype(float), weights)
    ratio = float(pairs.sums[0].sum() / (direction * pairs.sums[1].sum()))
    return _Half(ratio, found.interval(0, pairs.n_pairs, "").sign, len(pairs.sizes))
