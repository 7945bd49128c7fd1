"""Rates of yes and no over items that share clusters, and the rate behind the verdicts of a judge that errs."""

from dataclasses import replace
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike

from remote_mediation.intervals import CONFIDENCE, Clusters, Floats, Interval, join, standard_error, student

__all__ = ["corrected_difference", "corrected_rate", "rate"]

_FEWEST_RIGHT = 1.2
"""A judge whose sensitivity and specificity add up to no more tells too little to correct by."""
_Z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)


def rate(successes: ArrayLike, clusters: ArrayLike) -> Interval:
    """Share of successes with Wilson's interval of as many trials as the clustered items are worth.

    successes: [item], 0 or 1; NaN (not judged) is dropped. clusters: [item]. `n_pairs` of the result counts items.
    n items are worth n / (design effect) independent ones, with the design effect the squared cluster-robust standard
    error over that of items which are their own clusters, and that times (t of n - 1 / t of k - 1 degrees of
    freedom)^2 for k clusters, at most n (Korn & Graubard 1998, Survey Methodology 24, 193-201); Wilson's interval of
    an effective n: Dean & Pagano 2015, doi 10.1093/jssam/smv024. A rate of 0 or 1 shows no design effect, and n items
    are then worth k. Where every item is its own cluster this is `stats.wilson`. No resampling: near 0 and 1 a
    bootstrap has no spread to show.
    NaN with a reason if there is no item, or both 0 and 1 in one cluster only.
    Raises ValueError if the shapes differ or a success is neither 0, 1 nor NaN.
    """
    given = np.asarray(successes, dtype=np.float64)
    known = ~np.isnan(given)
    if given.ndim != 1 or not np.isin(given[known], (0, 1)).all():
        raise ValueError(f"successes must be [item], each 0, 1 or NaN; got shape {given.shape}: {given}")
    Clusters.of(clusters, given.size)
    hits = given[known]
    groups = Clusters.of(np.asarray(clusters)[known], hits.size)
    n, k = hits.size, len(groups.sizes)
    lost = given.size - n
    dropped = f"{lost} of {given.size} items dropped: not judged" if lost else ""
    if n == 0:
        return Interval(0, 0, np.nan, np.nan, np.nan, dropped or "no items")
    value = float(hits.mean())
    found = Interval(n, k, value, np.nan, np.nan, dropped)
    if value in (0.0, 1.0):
        return _with_wilson_ends(found, k)
    if k == 1:
        return replace(found, reason=join("one cluster only", dropped))
    return _with_wilson_ends(found, _effective_n(hits, groups))


def corrected_rate(observed: Interval, sensitivity: Interval, specificity: Interval) -> Interval:
    """Rate of what a judge looks for, from the rate of its yes and its errors (Rogan & Gladen 1978).

    rate = (observed + specificity - 1) / (sensitivity + specificity - 1), cut to 0..1; doi
    10.1093/oxfordjournals.aje.a112510. The three intervals are taken as independent. An end lies as far from the rate
    as the root of the sum of squares of what each of the three, moved to its own end in the direction that moves the
    rate there, moves it to first order (variance estimates recovered from the ends: Zou & Donner 2008, doi
    10.1002/sim.3095), so that intervals that are not symmetric keep their shape.
    n_pairs, n_clusters and pairs dropped are those of observed. NaN with a reason unless sensitivity + specificity is
    above 1.2 and every end is known.
    """
    parts = (observed, sensitivity, specificity)
    problem = _uncorrectable(*parts)
    if problem:
        return Interval(observed.n_pairs, observed.n_clusters, np.nan, np.nan, np.nan, problem)
    told = sensitivity.value + specificity.value - 1
    value = min(max((observed.value + specificity.value - 1) / told, 0.0), 1.0)
    return _combined(value, parts, (1 / told, -value / told, (1 - value) / told), 0.0)


def corrected_difference(observed: Interval, sensitivity: Interval, specificity: Interval) -> Interval:
    """Difference of two rates of what a judge looks for, from the difference of the rates of its yes.

    difference = observed / (sensitivity + specificity - 1), cut to -1..1; the judge is taken to err alike on
    both sides. Ends, assumptions and what is NaN are those of `corrected_rate`.
    """
    parts = (observed, sensitivity, specificity)
    problem = _uncorrectable(*parts)
    if problem:
        return Interval(observed.n_pairs, observed.n_clusters, np.nan, np.nan, np.nan, problem)
    told = sensitivity.value + specificity.value - 1
    value = min(max(observed.value / told, -1.0), 1.0)
    return _combined(value, parts, (1 / told, -value / told, -value / told), -1.0)


def _uncorrectable(observed: Interval, sensitivity: Interval, specificity: Interval) -> str:
    """Why a judge's errors cannot be allowed for; empty where they can."""
    if not all(np.isfinite([one.value, one.low, one.high]).all() for one in (observed, sensitivity, specificity)):
        return "no correction: a rate, a sensitivity or a specificity has no interval"
    both = sensitivity.value + specificity.value
    if both <= _FEWEST_RIGHT:
        return f"no correction: sensitivity + specificity is {both:.3g}, not above {_FEWEST_RIGHT}"
    return ""


def _combined(value: float, parts: tuple[Interval, ...], slopes: tuple[float, ...], least: float) -> Interval:
    """A corrected number with the ends of its parts, each moved to its own end; at least `least`, at most 1.

    parts: independent, the observed one first. slopes: what the number moves by to first order, by part.
    """
    down, up = 0.0, 0.0
    for part, slope in zip(parts, slopes, strict=True):
        to_low, to_high = slope * (part.low - part.value), slope * (part.high - part.value)
        down += min(to_low, to_high) ** 2
        up += max(to_low, to_high) ** 2
    low, high = max(value - down**0.5, least), min(value + up**0.5, 1.0)
    observed, method = parts[0], "Rogan-Gladen, ends combined"
    return Interval(observed.n_pairs, observed.n_clusters, value, low, high, observed.reason, method=method)


def _effective_n(hits: Floats, groups: Clusters) -> float:
    """Independent items that clustered hits [item] are worth, at most as many as there are; see `rate`."""
    n, k = hits.size, len(groups.sizes)
    residuals = (hits - hits.mean())[None]
    clustered, alone = standard_error(groups.sums(residuals)), standard_error(residuals)
    if not clustered[0]:
        return n
    design_effect = float((clustered[0] / alone[0]) ** 2)
    fewer = float((student(n)[1] / student(k)[1]) ** 2)
    return min(n / design_effect * fewer, n)


def _with_wilson_ends(found: Interval, n: float) -> Interval:
    """The share `found` with the ends of Wilson (1927) for n trials, which need not be whole."""
    share, spare = found.value, _Z**2 / n
    middle = (share + spare / 2) / (1 + spare)
    half = (spare * (share * (1 - share) + spare / 4)) ** 0.5 / (1 + spare)
    low, high = max(middle - half, 0.0), min(middle + half, 1.0)
    return replace(found, low=low, high=high, method=f"Wilson, worth {n:.3g} items")
