"""Shares of the total effect, slopes on it, and the gate before any verdict: is there an effect, and is it harm's?

A share is mean(E) / mean(TE) over pairs, never a mean of ratios. Its interval is the set of shares c that a test of
mean(E - c TE) = 0 does not reject (Fieller 1954), and a verdict at a threshold is that test (`share_exceeds`), so an
interval and the verdicts beside it cannot disagree. The test is the interval of a mean, `intervals.mean_intervals`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import scipy.optimize as _untyped_scipy  # pyright: ignore[reportMissingTypeStubs]
from numpy.typing import ArrayLike, NDArray

from remote_mediation.intervals import (
    RESAMPLES,
    ROUNDING,
    ClusterMeans,
    CompletePairs,
    Floats,
    Interval,
    TwoMeans,
    cluster_means,
    complete_pairs,
    draw_weights,
    hold_zero,
    join,
    mean_intervals,
    standard_error,
    studentised_ends,
)

__all__ = ["ANY_EDIT", "Gate", "GateVerdict", "gate", "share", "share_exceeds", "slope", "slope_difference"]

_scipy = cast(Any, _untyped_scipy)
_ANGLES = 33
"""Shares that are tried before the ends are searched for, as angles: all of -inf to inf."""
_HALVINGS = 12
"""Of a grid's step, before an end is taken to be the only one there: quantiles may cross 0 more than once."""
_PRECISION = 1e-15
"""Of an angle at which the set ends."""

ANY_EDIT = "of any edit"
"""What qualifies a supported claim whose numbers are not shown to be larger for harm than for the placebo."""

GateVerdict = Literal["no effect", "not about harm", "placebo not tested", ""]


@dataclass(frozen=True)
class Gate:
    """What has to hold before any claim is tested."""

    verdict: GateVerdict
    """Why no claim can be, or what it has to be read with; '' if the effect is one of harm."""
    te_harm: Interval
    """Mean total effect of the harmful prompt."""
    te_placebo: Interval
    """Mean total effect of the placebo, over the pairs that have one."""
    excess: Interval
    """Mean of sign(TE_harm) * (TE_harm - TE_placebo), over the pairs that have both."""


def share(
    effect: ArrayLike,
    total: ArrayLike,
    clusters: ArrayLike,
    rng: np.random.Generator,
    resamples: int = RESAMPLES,
) -> Interval:
    """Share mean(effect) / mean(total), a pure number; of NIE and TE the proportion mediated (VanderWeele 2013).

    effect, total: [pair], in the same unit; a pair that lacks either is dropped. clusters: [pair].
    The interval holds every c for which the 95% interval of mean(effect - c * total) contains 0 (Fieller 1954, with the
    interval of `estimate_means`); the sign of the total makes no difference to it. Where the interval of the total
    contains 0 that set has no end: the share is undefined, and all is NaN. Else c runs over angles, c = tan(angle), and
    the outermost on a grid that are in the set are followed to its ends by halving, then by Brent's method. (Of t the
    ends are the roots of a quadratic, which the tests hold this to; of the bootstrap they have no closed form, as its
    quantiles depend on c.)
    Raises ValueError if the shapes differ or resamples < 1.
    """
    pairs = _both(effect, total, clusters)
    above, below = pairs.sums
    counts = pairs.sizes[None].astype(np.float64)
    weights = draw_weights(len(pairs.sizes), rng, resamples)
    base = mean_intervals(below[None], counts, weights).interval(0, pairs.n_pairs, "")
    problem = _no_base(base)
    if problem:
        reason = join(problem, pairs.dropped)
        return Interval(base.n_pairs, base.n_clusters, np.nan, np.nan, np.nan, reason)

    value = float(above.sum() / below.sum())
    low, high, note = value, value, "no spread"
    if np.abs(above - value * below).max() > ROUNDING * np.abs(above).max():
        span = _set_of(_Remainder.of(above - value * below, below, counts, weights), value)
        low, high, note = span.low, span.high, base.reason
    reason, method = join(note, pairs.dropped), f"Fieller, {base.method}"
    return Interval(base.n_pairs, base.n_clusters, value, low, high, reason, method=method)


def share_exceeds(
    effect: ArrayLike,
    total: ArrayLike,
    clusters: ArrayLike,
    rng: np.random.Generator,
    threshold: float,
    resamples: int = RESAMPLES,
) -> Interval:
    """Mean of s * (effect - threshold * total), in their unit, with s the sign of the mean total.

    The share exceeds the threshold where this lies above 0, and falls short of it where it lies below. With an rng in
    the same state, that is where all of `share` lies above or below the threshold. Arguments and errors are those of
    `share`.
    """
    pairs = _both(effect, total, clusters)
    above, below = pairs.sums
    sign = -1.0 if below.sum() < 0 else 1.0
    return _mean(pairs._replace(sums=(sign * (above - threshold * below))[None]), rng, resamples)


def slope(effects: ArrayLike, totals: ArrayLike) -> float:
    """Slope of effects on totals through the origin, sum(total * effect) / sum(total^2), a pure number.

    effects, totals: [pair], in the same unit; a pair that lacks either is dropped. It is defined although the mean
    total is near 0, where a share is not; NaN if every total is 0 or there is none.
    Raises ValueError if the shapes differ.
    """
    products = _products(effects, totals)
    moments = products[:, np.isfinite(products).all(axis=0)].sum(axis=1)
    return float(moments[0] / moments[1]) if moments[1] else float("nan")


def slope_difference(
    harm_effects: ArrayLike,
    harm_totals: ArrayLike,
    placebo_effects: ArrayLike,
    placebo_totals: ArrayLike,
    clusters: ArrayLike,
    rng: np.random.Generator,
    resamples: int = RESAMPLES,
) -> Interval:
    """`slope` of harm minus that of the placebo; a mediator is harm-specific where it is clear of 0.

    All but rng: [pair], the same pairs; one that lacks any is dropped. Clusters are resampled jointly. The standard
    error adds up, cluster by cluster, what the two slopes owe to it (their linearisation), and the ends are those of
    `intervals.studentised_ends`, as for a mean. NaN with a reason if a slope is not defined.
    Raises ValueError if the shapes differ or resamples < 1.
    """
    moments = np.concatenate([_products(harm_effects, harm_totals), _products(placebo_effects, placebo_totals)])
    pairs = complete_pairs(moments, clusters)
    k = len(pairs.sizes)
    weights = draw_weights(k, rng, resamples)
    ratios = _Ratios(pairs.sums[::2], pairs.sums[1::2])
    problem = "no finite values" if not k else "one cluster only" if k == 1 else ""
    if not problem and not ratios.below.any(axis=1).all():
        problem = "every total effect of a side is 0"
    if problem:
        return Interval(pairs.n_pairs, k, np.nan, np.nan, np.nan, join(problem, pairs.dropped))
    found = ratios.differences(np.ones((1, k)))
    error = standard_error(found.influence)
    error[error <= ROUNDING * ratios.size()] = 0.0
    roots = _difference_roots(ratios, found.value, weights) if len(weights) else None
    return studentised_ends(found.value, error, k, roots).interval(0, pairs.n_pairs, pairs.dropped)


def gate(
    te_harm: ArrayLike,
    te_placebo: ArrayLike | None,
    clusters: ArrayLike,
    rng: np.random.Generator,
    resamples: int = RESAMPLES,
) -> Gate:
    """Whether there is an effect, and whether it is one of harm; in this order.

    te_harm, te_placebo: [pair], in the same unit, NaN for a pair without a placebo, None if no pair has one; clusters:
    [pair]. "no effect": the interval of TE_harm is not clear of 0. "placebo not tested": no interval of the difference
    can be had. "not about harm": the lower end of sign(TE_harm) * (TE_harm - TE_placebo) is not above 0.
    Raises ValueError if the shapes differ or resamples < 1.
    """
    harm = np.asarray(te_harm, dtype=np.float64)
    placebo = np.full(harm.shape, np.nan) if te_placebo is None else np.asarray(te_placebo, dtype=np.float64)
    _check_shapes(harm, placebo)
    of_harm = _mean(complete_pairs(harm[None], clusters), rng, resamples)
    of_placebo = _mean(complete_pairs(placebo[None], clusters), rng, resamples)
    sign = -1.0 if of_harm.value < 0 else 1.0
    excess = _mean(complete_pairs(sign * (harm - placebo)[None], clusters), rng, resamples)
    return Gate(_gate_verdict(of_harm, excess), of_harm, of_placebo, excess)


def _gate_verdict(harm: Interval, excess: Interval) -> GateVerdict:
    if harm.sign == 0:
        return "no effect"
    if np.isnan(excess.low):
        return "placebo not tested"
    return "" if excess.low > 0 else "not about harm"


def _mean(pairs: CompletePairs, rng: np.random.Generator, resamples: int) -> Interval:
    """Mean over pairs of the one row of pairs."""
    weights = draw_weights(len(pairs.sizes), rng, resamples)
    ends = mean_intervals(pairs.sums, pairs.sizes[None].astype(np.float64), weights)
    return ends.interval(0, pairs.n_pairs, pairs.dropped)


def _no_base(total: Interval) -> str:
    """Why a share of this total is undefined; '' if it is not."""
    if np.isnan(total.low):
        return total.reason
    if total.sign == 0:
        return f"undefined: the interval of the total, {total.low:.3g} to {total.high:.3g}, spans 0"
    return ""


def _both(effect: ArrayLike, total: ArrayLike, clusters: ArrayLike) -> CompletePairs:
    """Cluster sums [2, cluster] of effects and totals."""
    given, whole = np.asarray(effect, dtype=np.float64), np.asarray(total, dtype=np.float64)
    _check_shapes(given, whole)
    return complete_pairs(np.stack([given, whole]), clusters)


def _products(effects: ArrayLike, totals: ArrayLike) -> Floats:
    """total * effect and total^2, [2, pair]."""
    given, whole = np.asarray(effects, dtype=np.float64), np.asarray(totals, dtype=np.float64)
    _check_shapes(given, whole)
    return np.stack([whole * given, whole**2])


def _check_shapes(first: Floats, second: Floats) -> None:
    if first.ndim != 1 or first.shape != second.shape:
        raise ValueError(f"effects must be [pair], of one shape; got {first.shape} and {second.shape}")


class _Remainder(NamedTuple):
    """Cluster sums of effect - c * total at any share c, by how far c lies from the share of the means.

    They are at_share - shift * below, and what a resample needs of them is linear or quadratic in the shift. So the
    products with the weights, nearly all of the work of `intervals.mean_intervals`, are taken once for all shares that
    are tried. Nothing large cancels: at_share has a mean of 0.
    """

    at_share: Floats
    """[cluster], effect - share * total."""
    below: Floats
    """[cluster], total."""
    counts: Floats
    """[1, cluster]"""
    drawn: TwoMeans | None
    """Of residuals of both in every resample; None where there is none."""

    @classmethod
    def of(cls, at_share: Floats, below: Floats, counts: Floats, weights: Floats) -> "_Remainder":
        """Of weights [resample, cluster]."""
        both = np.stack([at_share, below])
        residuals = both - both.sum(axis=1, keepdims=True) / counts.sum() * counts
        drawn = TwoMeans.of(residuals, counts, weights) if len(weights) else None
        return cls(at_share, below, counts, drawn)

    def margins(self, shifts: Floats) -> Floats:
        """By how many standard errors the interval reaches beyond 0, [shift]; below 0 where it does not hold 0."""
        found = self._means(shifts)
        ends = studentised_ends(found.value, found.error, len(self.below), self._roots(shifts))
        with np.errstate(divide="ignore", invalid="ignore"):
            margins = np.minimum(-ends.low, ends.high) / found.error
        return np.nan_to_num(margins, nan=-1.0, neginf=-1.0)

    def held(self, shifts: Floats) -> NDArray[np.bool_]:
        """Where margins are at least 0, [shift], which is known far sooner than by how much."""
        found = self._means(shifts)
        return hold_zero(found.value, found.error, len(self.below), self._roots(shifts))

    def _means(self, shifts: Floats) -> ClusterMeans:
        return cluster_means(self.at_share - shifts[:, None] * self.below, self.counts)

    def _roots(self, shifts: Floats) -> Floats | None:
        return None if self.drawn is None else self.drawn.roots(np.stack([np.ones_like(shifts), -shifts], axis=1))


class _Span(NamedTuple):
    low: float
    high: float


def _set_of(tested: _Remainder, share: float) -> _Span:
    """The outermost shares that are not rejected; this share is none of them that is, and an infinite one is."""
    grid = np.linspace(-np.pi / 2, np.pi / 2, _ANGLES)

    def shifts(angles: Floats) -> Floats:
        return np.tan(angles) - share

    held = np.append(grid[1:-1][tested.held(shifts(grid[1:-1]))], np.arctan(share))
    within = np.array([held.min(), held.max()])
    beyond = np.array([grid[grid < within[0]].max(), grid[grid > within[1]].min()])
    for _ in range(_HALVINGS):
        middle = (within + beyond) / 2
        inside = tested.held(shifts(middle))
        within, beyond = np.where(inside, middle, within), np.where(inside, beyond, middle)
    brackets = zip(within, beyond, strict=True)
    return _Span(*(_end(lambda angles: tested.margins(shifts(angles)), *bracket) for bracket in brackets))


def _end(margin: Callable[[Floats], Floats], within: float, beyond: float) -> float:
    """The share between two angles, one in the set and one not, where the set ends (Brent's method)."""

    def of_one(angle: float) -> float:
        return float(margin(np.array([angle]))[0])

    if of_one(within) <= 0:  # where the end is the share itself
        return float(np.tan(within))
    return float(np.tan(_scipy.brentq(of_one, within, beyond, xtol=_PRECISION, rtol=_PRECISION)))


class _Differences(NamedTuple):
    """The first ratio minus the second, of each resample."""

    value: Floats
    """[resample]"""
    influence: Floats
    """[resample, cluster], what each cluster adds to the error: its residuals over the sums below."""


class _Ratios(NamedTuple):
    """Two ratios of sums, of harm and of the placebo."""

    above: Floats
    """[side, cluster]"""
    below: Floats
    """[side, cluster]"""

    def differences(self, weights: Floats) -> _Differences:
        """Of weights [resample, cluster]."""
        whole = self.below @ weights.T
        ratio = (self.above @ weights.T) / whole
        residuals = self.above[:, None] - ratio[..., None] * self.below[:, None]
        influence = residuals / whole[..., None]
        return _Differences(ratio[0] - ratio[1], influence[0] - influence[1])

    def size(self) -> float:
        """Largest influence that a cluster could have, to tell rounding by."""
        return float((np.abs(self.above).max(axis=1) / self.below.sum(axis=1)).sum())


def _difference_roots(ratios: _Ratios, value: Floats, weights: Floats) -> Floats:
    """(difference* - difference) / error* of every resample, [1, resample]; NaN where the error is 0."""
    k = weights.shape[1]
    with np.errstate(divide="ignore", invalid="ignore"):
        drawn = ratios.differences(weights)
        error = np.sqrt(k / (k - 1) * (weights * drawn.influence**2).sum(axis=1))
        error[error <= ROUNDING * ratios.size()] = np.nan
        roots: Floats = ((drawn.value - value) / error)[None]
    return roots
