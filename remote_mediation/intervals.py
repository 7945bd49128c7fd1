"""Intervals of statistics over clusters of pairs: who belongs together, what is redrawn, where the ends lie.

The pair is the unit. Pairs that are not independent form one *cluster* (`Clusters`, the one definition), and whatever
is redrawn here is whole clusters. A statistic is a function of how often each cluster was drawn. Means have two matrix
products for that, so that thousands of sites share one set of resamples, and a standard error of their own
(`mean_intervals`); anything else has percentiles (`percentiles`). What cannot be known is NaN, and the `reason` beside
it says why.
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import numpy as np
import scipy.stats as _untyped_scipy  # pyright: ignore[reportMissingTypeStubs]
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "CONFIDENCE",
    "RESAMPLES",
    "ROUNDING",
    "STUDENTISED_FROM",
    "ClusterMeans",
    "Clusters",
    "CompletePairs",
    "Ends",
    "Floats",
    "Interval",
    "TwoMeans",
    "cluster_means",
    "complete_pairs",
    "draw_weights",
    "dropped_note",
    "hold_zero",
    "in_blocks_of",
    "join",
    "mean_intervals",
    "percentiles",
    "standard_error",
    "student",
    "studentised_ends",
]

Floats = NDArray[np.float64]
_scipy = cast(Any, _untyped_scipy)

CONFIDENCE = 0.95
_TAILS = ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2)
RESAMPLES = 9999
STUDENTISED_FROM = 15
"""Fewest clusters whose means are redrawn; below, 15 values or fewer are too few to tell a skew by."""
ROUNDING = 1e-12
"""Relative difference that the rounding of a sum can explain."""
_BLOCK = 2**21
"""Most numbers in one temporary array (16 MiB): sites and resamples are worked through in blocks of this size."""
_NEIGHBOURS = 2
"""Roots on either side of the place of a quantile that it may be interpolated from, and one more."""
_FEW_FOR_T = 6
"""Below this many clusters the reader is told what t rests on."""


@dataclass(frozen=True)
class Interval:
    """A statistic with its 95% interval, in the unit that the function names."""

    n_pairs: int
    """Pairs that entered: those with finite values."""
    n_clusters: int
    """Clusters that these pairs belong to."""
    value: float
    """The statistic on the pairs that entered."""
    low: float
    high: float
    reason: str
    """Why a number is NaN, or why to read it with care (pairs dropped, few clusters); '' if neither."""
    method: str = field(default="", kw_only=True)
    """How the ends were found, such as "studentised cluster bootstrap"; '' where there are none."""

    @property
    def sign(self) -> int:
        """1 or -1 where the interval is clear of 0, else 0."""
        return int(self.low > 0) - int(self.high < 0)

    def columns(self, name: str) -> dict[str, float]:
        """As columns of a table: `name`, `name_low` and `name_high`."""
        return {name: self.value, f"{name}_low": self.low, f"{name}_high": self.high}


class Clusters(NamedTuple):
    """Which pairs belong together."""

    of_pair: NDArray[np.intp]
    """[pair], number of the pair's cluster."""
    sizes: NDArray[np.intp]
    """[cluster], number of pairs."""

    @classmethod
    def of(cls, labels: ArrayLike, n_pairs: int) -> "Clusters":
        """Pairs with equal labels, [pair], are one cluster. Raises ValueError if there is not one label per pair."""
        given = np.asarray(labels)
        if given.shape != (n_pairs,):
            raise ValueError(f"clusters must hold one label for each of {n_pairs} pairs; got shape {given.shape}")
        _, of_pair, sizes = np.unique(given, return_inverse=True, return_counts=True)
        return cls(of_pair, sizes)

    def sums(self, values: Floats) -> Floats:
        """[row, pair] to [row, cluster]."""
        starts = np.cumsum(self.sizes) - self.sizes
        return np.add.reduceat(values[:, np.argsort(self.of_pair, kind="stable")], starts, axis=1)


class CompletePairs(NamedTuple):
    """Cluster sums over the pairs that have a value everywhere."""

    sums: Floats
    """[row, cluster]"""
    sizes: NDArray[np.intp]
    """[cluster], number of pairs."""
    dropped: str
    """How many pairs were left out; '' if none."""

    @property
    def n_pairs(self) -> int:
        """Pairs that entered."""
        return int(self.sizes.sum())


def complete_pairs(rows: Floats, labels: ArrayLike) -> CompletePairs:
    """Cluster sums of rows [row, pair] over the pairs that are finite in every row; labels: [pair]."""
    n_pairs = rows.shape[1]
    Clusters.of(labels, n_pairs)
    kept = np.isfinite(rows).all(axis=0)
    n_kept = int(kept.sum())
    groups = Clusters.of(np.asarray(labels)[kept], n_kept)
    dropped = dropped_note(n_pairs - n_kept, n_pairs, "pairs")
    return CompletePairs(groups.sums(rows[:, kept]), groups.sizes, dropped)


class Ends(NamedTuple):
    """Statistics with the ends of their intervals; arrays are [statistic]."""

    n_clusters: int
    value: Floats
    low: Floats
    high: Floats
    reasons: list[str]
    """Why the ends are NaN, or why to read them with care; '' if neither."""
    method: str

    def interval(self, row: int, n_pairs: int, dropped: str, problem: str = "") -> Interval:
        """One statistic; a problem makes all of it NaN."""
        reason = join(problem or self.reasons[row], dropped)
        if problem:
            return Interval(n_pairs, self.n_clusters, np.nan, np.nan, np.nan, reason)
        value, low, high = float(self.value[row]), float(self.low[row]), float(self.high[row])
        method = "" if np.isnan(low) else self.method
        return Interval(n_pairs, self.n_clusters, value, low, high, reason, method=method)


class _Drawn(NamedTuple):
    weights: Floats
    """[resample, cluster], not to be written to."""
    after: Mapping[str, Any]
    """State of the generator afterwards."""


_DRAWN: dict[tuple[int, int, str], _Drawn] = {}
"""The last draws, by what was asked for and the state before: a report asks for the same ones hundreds of times."""
_DRAWS_KEPT = 4


def draw_weights(n_clusters: int, rng: np.random.Generator, resamples: int) -> Floats:
    """How often each cluster is drawn, [resample, cluster]; no rows where `mean_intervals` needs none.

    Raises ValueError if resamples < 1.
    """
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1; got {resamples}")
    if n_clusters < STUDENTISED_FROM:
        return np.empty((0, n_clusters))
    asked = (n_clusters, resamples, repr(rng.bit_generator.state))
    if asked not in _DRAWN:
        chances = np.full(n_clusters, 1 / n_clusters)
        weights = rng.multinomial(n_clusters, chances, size=resamples).astype(np.float64)
        weights.flags.writeable = False
        if len(_DRAWN) >= _DRAWS_KEPT:
            del _DRAWN[next(iter(_DRAWN))]
        _DRAWN[asked] = _Drawn(weights, rng.bit_generator.state)
    drawn = _DRAWN[asked]
    rng.bit_generator.state = drawn.after
    return drawn.weights


def mean_intervals(sums: Floats, counts: Floats, weights: Floats) -> Ends:
    """Intervals of sum(sums) / sum(counts), row by row; weights are those of `draw_weights`.

    sums, counts: [row, cluster] (counts [1, cluster] where rows share them); in every row some count is above 0.
    With the residuals e = sums - mean * counts of k clusters the standard error is
    sqrt(k / (k - 1) * sum(e^2)) / sum(counts): the sandwich of a ratio of sums (Cochran 1977, chapter 6), which for
    clusters of one size is the standard error of the mean of cluster means.

    From 15 clusters on the ends are mean - error * q, with q the 97.5% and 2.5% quantiles of the same root, (mean* -
    mean) / error*, over resamples of whole clusters (bootstrap-t: Hall 1988, doi
    10.1214/aos/1176350933; for clusters: Cameron, Gelbach & Miller 2008, doi 10.1162/rest.90.3.414). Resamples
    with no standard error have no root; they are dropped, and `reasons` counts them. Below 15 clusters q are quantiles
    of t with k - 1 degrees of freedom. Where the residuals are 0 the interval is the point.
    """
    k = sums.shape[1]
    found = cluster_means(sums, counts)
    if k < 2:
        unknown = np.full(found.value.shape, np.nan)
        reason = "one cluster only" if k else "no finite values"
        return Ends(k, found.value, unknown, unknown, [reason] * found.value.size, "")
    roots = _mean_roots(found.residuals, counts, weights) if len(weights) else None
    return studentised_ends(found.value, found.error, k, roots)


class ClusterMeans(NamedTuple):
    """Means over pairs with their standard errors."""

    value: Floats
    """[row]"""
    error: Floats
    """[row], cluster-robust; 0 where the residuals are."""
    residuals: Floats
    """[row, cluster]"""


def cluster_means(sums: Floats, counts: Floats) -> ClusterMeans:
    """The means that `mean_intervals` takes intervals of, from the same sums and counts."""
    with np.errstate(divide="ignore", invalid="ignore"):
        value = sums.sum(axis=1) / counts.sum(axis=1)
    if sums.shape[1] < 2:
        return ClusterMeans(value, np.full(value.shape, np.nan), np.zeros(sums.shape))
    residuals = sums - value[:, None] * counts
    same = np.abs(residuals).max(axis=1) <= ROUNDING * np.abs(sums).max(axis=1)
    residuals[same] = 0.0
    return ClusterMeans(value, standard_error(residuals / counts.sum(axis=1, keepdims=True)), residuals)


def standard_error(influences: Floats) -> Floats:
    """Cluster-robust standard error [row] of a statistic, from what each cluster adds to it, [row, cluster]."""
    k = influences.shape[1]
    error: Floats = np.sqrt(k / (k - 1) * (influences**2).sum(axis=1))
    return error


def studentised_ends(value: Floats, error: Floats, n_clusters: int, roots: Floats | None) -> Ends:
    """Intervals of value [row] from its standard error: of t, or of the roots [row, resample] of a bootstrap.

    A root that is NaN is dropped and counted. Where the error is 0 the interval is the point; see `mean_intervals`.
    """
    if roots is None:
        lower, upper = np.broadcast_to(student(n_clusters)[:, None], (2, value.size))
        method, few = "t on cluster means", n_clusters < _FEW_FOR_T
        care = f"only {n_clusters} clusters: t takes their means as normal" if few else ""
        reasons = [care] * value.size
    else:
        lower, upper = _quantiles(roots)
        method = "studentised cluster bootstrap"
        reasons = [_lost_note(lost, roots.shape[1]) for lost in np.isnan(roots).sum(axis=1).tolist()]
    low, high = value - upper * error, value - lower * error
    for row in np.flatnonzero(error == 0):
        low[row] = high[row] = value[row]
        reasons[row] = "no spread"
    return Ends(n_clusters, value, low, high, reasons, method)


def hold_zero(value: Floats, error: Floats, n_clusters: int, roots: Floats | None) -> NDArray[np.bool_]:
    """Which intervals of `studentised_ends` have ends on both sides of 0 or on it, [row]; without an error, none.

    It takes no quantile where counting decides: an end lies on its side of 0 where its quantile times the error does
    on that of the value, so the place of the value among the roots tells. Only next to the place of a quantile, where
    how that is interpolated matters, the ends themselves are looked at.
    """
    if roots is None:
        return _span_zero(studentised_ends(value, error, n_clusters, roots), error)
    scaled, own = roots * error[:, None], value[:, None]
    below, up_to = ((scaled < own).sum(axis=1), (scaled <= own).sum(axis=1))
    places = (np.isfinite(roots).sum(axis=1) + 1)[:, None] * np.array(_TAILS)
    held: NDArray[np.bool_] = (up_to > places[:, 0]) & (below < places[:, 1]) & (error > 0)
    near = np.abs(np.stack([up_to, below], axis=1) - places).min(axis=1) <= _NEIGHBOURS
    if near.any():
        held[near] = _span_zero(studentised_ends(value[near], error[near], n_clusters, roots[near]), error[near])
    return held


def _span_zero(ends: Ends, error: Floats) -> NDArray[np.bool_]:
    found: NDArray[np.bool_] = (ends.low <= 0) & (ends.high >= 0) & (error > 0)
    return found


def student(n_clusters: int) -> Floats:
    """Lower and upper 95% quantile of t with a degree of freedom less than there are clusters."""
    found: Floats = np.asarray(_scipy.t.ppf(_TAILS, n_clusters - 1), dtype=np.float64)
    return found


def _mean_roots(residuals: Floats, counts: Floats, weights: Floats) -> Floats:
    """(mean* - mean) / error* of every resample, [row, resample]; NaN where the error is 0."""
    drawn = weights.T
    return _roots(
        residuals @ drawn, residuals**2 @ drawn, (residuals * counts) @ drawn, _CountProducts.of(counts, drawn)
    )


class _CountProducts(NamedTuple):
    """What resamples hold of the counts, [row, resample]."""

    total: Floats
    squares: Floats
    n_clusters: int

    @classmethod
    def of(cls, counts: Floats, drawn: Floats) -> "_CountProducts":
        """counts: [row, cluster]. drawn: [cluster, resample]."""
        return cls(counts @ drawn, counts**2 @ drawn, len(drawn))


def _roots(summed: Floats, squared: Floats, crossed: Floats, counts: _CountProducts) -> Floats:
    """Roots of `mean_intervals` from sums over resamples: of residuals e, of e^2 and of e * counts, [row, resample].

    With d = mean* - mean the residuals of a resample are e - d * counts, so that all sums over its clusters are
    products with the weights.
    """
    k = counts.n_clusters
    with np.errstate(divide="ignore", invalid="ignore"):
        shift = summed / counts.total
        squares = squared - 2 * shift * crossed + shift**2 * counts.squares
        squares[squares <= ROUNDING * squared] = np.nan
        roots: Floats = shift * counts.total / np.sqrt(k / (k - 1) * squares)
    return roots


class TwoMeans(NamedTuple):
    """Residuals of two rows in every resample, from which those of any sum of the two follow."""

    summed: Floats
    """[2, resample]"""
    squared: Floats
    """[3, resample], of the first, of both, of the second."""
    crossed: Floats
    """[2, resample], times the counts."""
    counts: _CountProducts

    @classmethod
    def of(cls, residuals: Floats, counts: Floats, weights: Floats) -> "TwoMeans":
        """residuals: [2, cluster]. counts: [1, cluster]. weights: [resample, cluster]."""
        drawn, (first, second) = weights.T, residuals
        squared = np.stack([first**2, first * second, second**2]) @ drawn
        return cls(residuals @ drawn, squared, (residuals * counts) @ drawn, _CountProducts.of(counts, drawn))

    def roots(self, factors: Floats) -> Floats:
        """Those of `mean_intervals` for factors [row, 2] times the two rows, [row, resample]."""
        first, second = factors.T
        squared = np.stack([first**2, 2 * first * second, second**2], axis=1) @ self.squared
        return _roots(factors @ self.summed, squared, factors @ self.crossed, self.counts)


def _quantiles(roots: Floats) -> Floats:
    """[tail, row] of roots [row, resample] that are not NaN; the p-quantile of B is the (B + 1) p-th smallest."""
    whole = ~np.isnan(roots).any(axis=1)
    found = np.full((len(_TAILS), len(roots)), np.nan)
    found[:, whole] = np.quantile(roots[whole], _TAILS, axis=1, method="weibull")
    for row in np.flatnonzero(~whole):
        kept = roots[row][~np.isnan(roots[row])]
        if kept.size:
            found[:, row] = np.quantile(kept, _TAILS, method="weibull")
    return found


def _lost_note(lost: int, resamples: int) -> str:
    return f"{lost} of {resamples} resamples dropped: no standard error" if lost else ""


def percentiles(
    statistic: Callable[[Floats], Floats], n_clusters: int, rng: np.random.Generator, resamples: int
) -> Ends:
    """Expanded percentiles of a statistic, weights [resample, cluster] to [statistic, resample].

    A weight is how often a cluster was drawn; weights of one give the statistic on the data as they are. With few
    clusters plain percentiles are too narrow, by sqrt((k-1)/k) and by normal in place of t quantiles; the expansion
    undoes both (Hesterberg 2015, arXiv 1411.5279), but no skew: a mean has `mean_intervals`. No percentile leaves the
    range of the k clusters, which holds the centre of a symmetric distribution with probability 1 - 2^(1-k): where that
    is below 95% (k < 6), the reason says so. Where all resamples agree the interval is the point.
    Raises ValueError if resamples < 1.
    """
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1; got {resamples}")

    with np.errstate(divide="ignore", invalid="ignore"):
        value = statistic(np.ones((1, n_clusters)))[:, 0]
    if n_clusters < 2:
        unknown = np.full(value.shape, np.nan)
        reason = "one cluster only" if n_clusters else "no finite values"
        return Ends(n_clusters, value, unknown, unknown, [reason] * value.size, "")
    result = _resampled(statistic, n_clusters, rng, resamples)
    outcomes: Floats = result.bootstrap_distribution
    low, high = (getattr(result.confidence_interval, end).copy() for end in ("low", "high"))
    reasons = [_few_note(n_clusters)] * value.size
    for row in np.flatnonzero(_agree(outcomes)):
        low[row] = high[row] = value[row]
        reasons[row] = "no spread"
    undefined = np.sum(~np.isfinite(outcomes), axis=1)
    for row in np.flatnonzero(undefined):
        low[row] = high[row] = np.nan
        reasons[row] = f"undefined in {undefined[row]} of {resamples} resamples"
    return Ends(n_clusters, value, low, high, reasons, "percentiles of a cluster bootstrap")


def _resampled(statistic: Callable[[Floats], Floats], n_clusters: int, rng: np.random.Generator, resamples: int) -> Any:
    """SciPy's bootstrap of a statistic of cluster weights, at the expanded level."""

    def of_drawn(drawn: NDArray[np.intp], axis: int) -> Floats:
        rows = np.arange(len(drawn))[:, None] * n_clusters
        return statistic(np.bincount((drawn + rows).ravel(), minlength=drawn.size).reshape(drawn.shape).astype(float))

    with np.errstate(divide="ignore", invalid="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", _scipy.DegenerateDataWarning)  # resamples that are NaN are counted later
        return _scipy.bootstrap(
            (np.arange(n_clusters),),
            of_drawn,
            n_resamples=resamples,
            batch=in_blocks_of(n_clusters),
            vectorized=True,
            confidence_level=_expanded_level(n_clusters),
            method="percentile",
            rng=rng,
        )


def _agree(outcomes: Floats) -> NDArray[np.bool_]:
    """Of which statistics all resamples are the same. outcomes: [statistic, resample]."""
    with np.errstate(invalid="ignore"):
        same: NDArray[np.bool_] = np.ptp(outcomes, axis=1) <= ROUNDING * np.abs(outcomes).max(axis=1)
    return same


def _few_note(n_clusters: int) -> str:
    """What so few clusters take from an interval, if anything."""
    reach = 1 - 2.0 ** (1 - n_clusters)
    return f"only {n_clusters} clusters: the interval covers {reach:.0%} at most" if reach < CONFIDENCE else ""


def _expanded_level(n_clusters: int) -> float:
    """Level whose normal quantiles, times sqrt((k-1)/k), are the t quantiles of the nominal level."""
    student = float(_scipy.t.ppf((1 - CONFIDENCE) / 2, n_clusters - 1))
    return 1 - 2 * float(_scipy.norm.cdf(student * np.sqrt(n_clusters / (n_clusters - 1))))


def in_blocks_of(width: int) -> int:
    """Rows of this width that fit into one temporary array."""
    return max(1, _BLOCK // max(1, width))


def dropped_note(n_lost: int, n_all: int, what: str) -> str:
    """Says how many were left out; '' if none."""
    return f"{n_lost} of {n_all} {what} dropped: not finite" if n_lost else ""


def join(*reasons: str) -> str:
    """Those reasons that say something, as one."""
    return "; ".join(filter(None, reasons))
