"""Statistics over prompt pairs: plain numpy in, frozen records out.

The pair is the unit, and every interval and every test here redraws or flips whole clusters of pairs (see
`intervals`, which has the resampling). Shares and slopes of effects are in `shares`, rates of yes and no in `rates`.
What cannot be known is NaN, and the `reason` beside it says why.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self, cast

import numpy as np
import scipy.stats as _untyped_scipy  # pyright: ignore[reportMissingTypeStubs]
from numpy.typing import ArrayLike, NDArray

from remote_mediation.errors import PairsError
from remote_mediation.intervals import (
    CONFIDENCE,
    RESAMPLES,
    ROUNDING,
    Clusters,
    Ends,
    Floats,
    Interval,
    complete_pairs,
    draw_weights,
    dropped_note,
    in_blocks_of,
    join,
    mean_intervals,
    percentiles,
)

__all__ = [
    "Estimate",
    "Interval",
    "Sparsity",
    "auroc",
    "benjamini_hochberg",
    "bootstrap_mean_of",
    "cohen_kappa",
    "estimate_means",
    "ratio_of_means",
    "sparsity",
    "split_clusters",
    "spread",
    "wilson",
]

_scipy = cast(Any, _untyped_scipy)


@dataclass(frozen=True)
class Estimate(Interval):
    """A mean over pairs (`value`) with its 95% interval and a test of zero."""

    p: float
    """Two-sided sign-flip p, not corrected for the number of sites (see `benjamini_hochberg`)."""
    p_floor: float = field(default=float("nan"), kw_only=True)
    """Smallest p that so many clusters and sign flips can give."""


class Sparsity(NamedTuple):
    """How few units carry a profile, judged by its positive part."""

    n_units: int
    """Units with a finite value."""
    gini: float
    """Gini index: 0 if all units are equal, 1 - 1/n_units if one carries everything."""
    fewest: float
    """Fewest units whose positive parts add up to the asked share of all positive parts; a whole number or NaN."""
    negative_share: float
    """Sum of |negative values| / sum of |values|: how much the positive part leaves out."""
    reason: str
    """Why a number is NaN, or how many units were dropped; '' if neither."""


def estimate_means(
    values: ArrayLike, clusters: ArrayLike, rng: np.random.Generator, resamples: int = RESAMPLES
) -> list[Estimate]:
    """Mean over pairs of each site, with a clustered bootstrap interval and a sign-flip p, in the unit of the values.

    values: [site, pair]. Entries that are not finite are dropped, site by site, and counted in `reason`.
    clusters: [pair], label of the template that each pair was made from.
    resamples: bootstrap draws, and the most sign flips tried. All sites see the same draws, so a site's estimate does
        not depend on which others are estimated beside it.

    Interval: the mean is the sum of cluster sums / the sum of their counts (Field & Welsh 2007,
    doi 10.1111/j.1467-9868.2007.00593.x); from 15 clusters on its ends are those of a studentised cluster bootstrap,
    below of t on cluster means, and `method` says which (`intervals.mean_intervals`). Both divide by a standard error,
    so they widen as t does where clusters are few, and the first follows a skew; percentiles do neither. Where all
    clusters agree the interval is the point, and `reason` says "no spread": that is no certainty.

    p: the signs of whole cluster sums are flipped; the null is that each cluster's sum is symmetric about 0. All 2^k
    flips are tried where 2^k <= resamples, and p >= 2^(1-k); else flips are sampled, p = (hits + 1) / (resamples + 1)
    (Phipson & Smyth 2010, doi 10.2202/1544-6115.1585), and p >= 1 / (resamples + 1). Benjamini-Hochberg at 0.05 over m
    sites cannot find r of them unless that floor is at most 0.05 r / m.

    Raises ValueError if values is not [site, pair] with one label per pair, or resamples < 1.
    """
    table = np.asarray(values, dtype=np.float64)
    if table.ndim != 2:
        raise ValueError(f"values must be [site, pair]; got shape {table.shape}")
    groups = Clusters.of(clusters, table.shape[1])
    finite = np.isfinite(table)
    sums = groups.sums(np.where(finite, table, 0.0))
    counts = groups.sums(finite.astype(np.float64))
    seed = int(rng.integers(2**63))
    estimates: dict[int, Estimate] = {}
    patterns, pattern_of_site = np.unique(counts > 0, axis=0, return_inverse=True)
    for number, present in enumerate(patterns):
        sites = np.flatnonzero(pattern_of_site == number)
        cells = np.ix_(sites, present)
        generator = np.random.default_rng(seed)
        found = _estimates(sums[cells], counts[cells], table.shape[1], generator, resamples)
        estimates.update(zip(sites.tolist(), found, strict=True))
    return [estimates[site] for site in range(len(table))]


def benjamini_hochberg(p: ArrayLike) -> Floats:
    """Smallest false discovery rate at which each test is called, q in the shape of p (Benjamini & Hochberg 1995).

    NaN stays NaN and is not counted in the family.
    Raises ValueError if a p lies outside [0, 1].
    """
    given = np.asarray(p, dtype=np.float64)
    defined = ~np.isnan(given)
    q = np.full(given.shape, np.nan)
    if defined.any():
        q[defined] = _scipy.false_discovery_control(given[defined])
    return q


def ratio_of_means(
    numerator: ArrayLike,
    denominator: ArrayLike,
    clusters: ArrayLike,
    rng: np.random.Generator,
    resamples: int = RESAMPLES,
) -> Interval:
    """Ratio mean(numerator) / mean(denominator), a pure number; NIE / TE: the proportion mediated (VanderWeele 2013).

    numerator, denominator: [pair], in the same unit; a pair that lacks either is dropped. clusters: [pair].
    The interval is `intervals.percentiles`, with the whole ratio recomputed in each resample; `shares.share` covers
    better. Unless the denominator's own interval is clear of 0 the ratio is not bounded by the data (Fieller 1954), and
    value, low and high are NaN.
    Raises ValueError if the shapes differ or resamples < 1.
    """
    above, below = np.asarray(numerator, dtype=np.float64), np.asarray(denominator, dtype=np.float64)
    if above.ndim != 1 or above.shape != below.shape:
        raise ValueError(f"numerator and denominator must both be [pair]; got {above.shape} and {below.shape}")
    sums, sizes, dropped = complete_pairs(np.stack([above, below]), clusters)

    def denominator_and_ratio(weights: Floats) -> Floats:
        top, bottom = sums @ weights.T
        return np.stack([bottom / (sizes @ weights.T), top / bottom])

    found = percentiles(denominator_and_ratio, len(sizes), rng, resamples)
    problem = _not_clear_of_zero(found, "the denominator")
    return found.interval(1, int(sizes.sum()), dropped, problem)


def bootstrap_mean_of(
    statistics: Callable[[Floats], Floats],
    values: ArrayLike,
    clusters: ArrayLike,
    rng: np.random.Generator,
    resamples: int = RESAMPLES,
) -> list[Interval]:
    """Statistics of means over pairs, such as a rank correlation of sites, with clustered intervals.

    values: [..., pair]; pairs that are not finite everywhere are dropped. clusters: [pair]. statistics: means
    [..., resample] to [statistic, resample]. The intervals are `intervals.percentiles`, with the means, and the
    statistics of them, recomputed in each resample.
    Raises ValueError if there is not one label per pair, or resamples < 1.
    """
    table = np.asarray(values, dtype=np.float64)
    shape = table.shape[:-1]
    sums, sizes, dropped = complete_pairs(table.reshape(-1, table.shape[-1]), clusters)

    def of_means(weights: Floats) -> Floats:
        return statistics(((sums @ weights.T) / (sizes @ weights.T)).reshape(*shape, len(weights)))

    found = percentiles(of_means, len(sizes), rng, resamples)
    return [found.interval(row, int(sizes.sum()), dropped) for row in range(len(found.value))]


def split_clusters(clusters: ArrayLike, rng: np.random.Generator) -> NDArray[np.str_]:
    """'discovery' or 'heldout' for each pair: whole clusters, with close to half of the pairs on each side.

    clusters: [pair], the component of each pair: pairs that share a template or a word are one. They are shuffled, then
    placed from large to small on the side that has fewer pairs so far, so the sides differ by at most the largest. The
    same state of rng gives the same split.
    Raises PairsError if there are fewer than two clusters, ValueError if clusters is not [pair].
    """
    labels = np.asarray(clusters)
    groups = Clusters.of(labels, labels.size)
    if len(groups.sizes) < 2:
        raise PairsError(
            f"a discovery and a held-out half need pairs from two templates or more; these {labels.size} come from "
            f"{len(groups.sizes)}. Add pairs that share neither template nor words with these."
        )
    order = rng.permutation(len(groups.sizes))
    side = np.zeros(len(order), dtype=np.intp)
    pairs_on_side = np.zeros(2, dtype=np.intp)
    for cluster in order[np.argsort(-groups.sizes[order], kind="stable")]:
        side[cluster] = int(pairs_on_side[1] < pairs_on_side[0])
        pairs_on_side[side[cluster]] += groups.sizes[cluster]
    return rng.permutation(np.array(["discovery", "heldout"]))[side[groups.of_pair]]


def spread(components: ArrayLike, most: int) -> NDArray[np.intp]:
    """Which pairs to keep of too many: at most so many indices, rising, with one of each component first.

    components: [pair]. The first pair of every component comes before the second of any, and so on; of a round that is
    cut short those taken are spread evenly over the pairs, so that categories stay mixed.
    Raises ValueError if most < 0.
    """
    if most < 0:
        raise ValueError(f"most must be at least 0; got {most}")
    labels = np.asarray(components)
    groups = Clusters.of(labels, labels.size)
    by_component = np.argsort(groups.of_pair, kind="stable")
    starts = np.cumsum(groups.sizes) - groups.sizes
    turn = np.empty(labels.size, dtype=np.intp)
    turn[by_component] = np.arange(labels.size) - np.repeat(starts, groups.sizes)
    order = np.argsort(turn, kind="stable")
    if most >= len(order):
        return np.sort(order)
    whole = order[turn[order] < turn[order[most]]]
    last = order[turn[order] == turn[order[most]]]
    wanted = most - len(whole)
    return np.sort(np.concatenate([whole, last[np.arange(wanted) * len(last) // max(wanted, 1)]]))


def sparsity(values: ArrayLike, share: float = 0.8) -> Sparsity:
    """Gini index of a profile over units (Hurley & Rickard 2009, arXiv 0811.4706), and the fewest that carry a share.

    values: [unit], in one unit of measure, such as the NIE of each neuron of an MLP; those not finite are dropped.
    Negative values count as 0: they carry none of the effect. The whole is the sum of the positive parts, which is not
    the effect of all units patched together: that takes its own run.
    Raises ValueError if values is not [unit] or share is not in (0, 1].
    """
    given = np.asarray(values, dtype=np.float64)
    if given.ndim != 1 or not 0 < share <= 1:
        raise ValueError(f"values must be [unit] and share in (0, 1]; got shape {given.shape} and share {share}")
    finite = given[np.isfinite(given)]
    n = len(finite)
    dropped = dropped_note(given.size - n, given.size, "units")
    rising = np.sort(np.maximum(finite, 0.0))
    whole, size = float(rising.sum()), float(np.abs(finite).sum())
    negative_share = float(np.maximum(-finite, 0.0).sum()) / size if size else np.nan
    if not whole:
        return Sparsity(n, np.nan, np.nan, negative_share, join("no unit has a positive value", dropped))
    gini = float((2 * np.arange(1, n + 1) - n - 1) @ rising) / (n * whole)
    enough = np.cumsum(rising[::-1]) >= share * whole * (1 - ROUNDING)
    return Sparsity(n, gini, int(np.argmax(enough)) + 1, negative_share, dropped)


def wilson(successes: int, n: int) -> Interval:
    """Share of successes in n independent trials, with 95% score interval (Wilson 1927); each is its own cluster.

    Where trials share clusters, see `rates.rate`. NaN with a reason if n is 0.
    Raises ValueError unless 0 <= successes <= n.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"successes must lie in 0..n; got {successes} of {n}")
    if n == 0:
        return Interval(0, 0, np.nan, np.nan, np.nan, "no trials")
    low, high = _scipy.binomtest(successes, n).proportion_ci(CONFIDENCE, method="wilson")
    return Interval(n, n, successes / n, float(low), float(high), "", method="Wilson")


def auroc(
    scores: ArrayLike,
    labels: ArrayLike,
    clusters: ArrayLike,
    rng: np.random.Generator,
    resamples: int = RESAMPLES,
) -> Interval:
    """Area under the ROC curve: the chance that a positive scores above a negative, ties counted half (Bamber 1975).

    scores, labels, clusters: [item]; labels 1 or 0 (positive or negative). The `n_pairs` of the result are items.
    Items with a score that is not finite are dropped. The interval is `intervals.percentiles`, with the area
    recomputed in each resample, which takes the wins of every cluster's positives over every cluster's negatives. An
    area of 1 or 0 leaves a bootstrap no spread; its interval is Wilson's, of as many disjoint pairs of clusters as can
    be compared, all of which were in one order.
    NaN with a reason if there is no positive or no negative. Raises ValueError if shapes differ, labels are not 0 and
    1, or resamples < 1.
    """
    given, positive = np.asarray(scores, dtype=np.float64), np.asarray(labels)
    if given.ndim != 1 or given.shape != positive.shape or not np.isin(positive, (0, 1)).all():
        raise ValueError(f"scores and labels (0 or 1) must both be [item]; got {given.shape} and {positive.shape}")
    Clusters.of(clusters, given.size)
    kept = np.isfinite(given)
    given, positive = given[kept], positive[kept].astype(np.bool_)
    groups = Clusters.of(np.asarray(clusters)[kept], given.size)
    dropped = dropped_note(int(np.sum(~kept)), kept.size, "items")
    if positive.all() or not positive.any():
        problem = join("no positives" if not positive.any() else "no negatives", dropped)
        return Interval(given.size, len(groups.sizes), np.nan, np.nan, np.nan, problem)
    compared = _Compared.of(given, positive, groups)
    found = percentiles(compared.area, len(groups.sizes), rng, resamples).interval(0, given.size, dropped)
    apart = compared.disjoint()
    if found.value not in (0.0, 1.0) or not apart:
        return found
    bound = wilson(int(found.value) * apart, apart)
    why = join(f"Wilson interval of {apart} disjoint pairs of clusters, all in one order", dropped)
    return Interval(found.n_pairs, found.n_clusters, found.value, bound.low, bound.high, why)


class _Compared(NamedTuple):
    """Every positive against every negative, by cluster."""

    wins: Floats
    """`[cluster of the positive, cluster of the negative]`: how often the positive scores above, ties counted half."""
    positives: Floats
    """`[cluster]`, how many."""
    negatives: Floats

    @classmethod
    def of(cls, scores: Floats, positive: NDArray[np.bool_], groups: Clusters) -> Self:
        """scores, positive: [item]."""
        above = (np.sign(scores[:, None] - scores) + 1) / 2
        wins = np.where(positive[:, None] & ~positive, above, 0.0)
        counts = groups.sums(np.stack([positive, ~positive]).astype(np.float64))
        return cls(groups.sums(groups.sums(wins).T).T, *counts)

    def area(self, weights: Floats) -> Floats:
        """`[1, resample]`, the area with clusters drawn so often. weights: [resample, cluster]."""
        won: Floats = ((weights @ self.wins) * weights).sum(axis=1)
        drawn: Floats = (weights @ self.positives) * (weights @ self.negatives)
        return (won / drawn)[None]

    def disjoint(self) -> int:
        """Most disjoint pairs of clusters of which one has a positive and the other a negative."""
        with_positives, with_negatives = (int(np.sum(counts > 0)) for counts in (self.positives, self.negatives))
        return min(with_positives, with_negatives, len(self.positives) // 2)


def cohen_kappa(
    truth: ArrayLike,
    judged: ArrayLike,
    clusters: ArrayLike,
    rng: np.random.Generator,
    resamples: int = RESAMPLES,
) -> Interval:
    """Agreement of yes-or-no verdicts with labels, beyond chance (Cohen 1960): 1 full, 0 as by chance, below 0 worse.

    truth, judged: [item], booleans. clusters: [item], label of those that belong together.
    kappa = (o - e) / (1 - e), with o the share of items on which both agree and e the share on which they would, were
    both to say yes as often but independently. It is computed from counts as
    2 (ad - bc) / ((a + b)(b + d) + (a + c)(c + d)), with a both yes, d both no, b and c the rest, which is the same and
    exactly 0 where it should be. The interval is `intervals.percentiles`, with kappa recomputed in each resample.
    Where all labels are the same, kappa is 0 or 0/0 whatever was judged, and all is NaN.
    Raises ValueError if the shapes differ or resamples < 1.
    """
    labels, verdicts = np.asarray(truth, dtype=np.bool_), np.asarray(judged, dtype=np.bool_)
    if labels.ndim != 1 or labels.shape != verdicts.shape:
        raise ValueError(f"truth and judged must both be [item]; got {labels.shape} and {verdicts.shape}")
    n = len(labels)
    groups = Clusters.of(clusters, n)
    k = len(groups.sizes)
    if not labels.any() or labels.all():
        return Interval(n, k, np.nan, np.nan, np.nan, "all labels are the same" if n else "no labels")
    cells = np.stack([labels & verdicts, labels & ~verdicts, ~labels & verdicts, ~labels & ~verdicts])
    sums = groups.sums(cells.astype(np.float64))

    def kappa(weights: Floats) -> Floats:
        a, b, c, d = sums @ weights.T
        return np.stack([2 * (a * d - b * c) / ((a + b) * (b + d) + (a + c) * (c + d))])

    return percentiles(kappa, k, rng, resamples).interval(0, n, "")


def _not_clear_of_zero(found: Ends, what: str, above_only: bool = False) -> str:
    """Why the first statistic of found is no base to divide by; '' if its interval is clear of 0."""
    low, high = float(found.low[0]), float(found.high[0])
    if np.isnan(low):
        return found.reasons[0]
    if low > 0 or (high < 0 and not above_only):
        return ""
    return f"the interval of {what}, {low:.3g} to {high:.3g}, {'is not above' if above_only else 'spans'} 0"


def _estimates(sums: Floats, counts: Floats, n_pairs: int, rng: np.random.Generator, resamples: int) -> list[Estimate]:
    """Estimates of sites that have values in the same clusters, from sums and counts [site, cluster]."""
    n_sites, n_clusters = sums.shape
    weights = draw_weights(n_clusters, rng, resamples)
    floor = _p_floor(n_clusters, resamples)
    flips_seed = int(rng.integers(2**63))
    estimates: list[Estimate] = []
    for start in range(0, n_sites, in_blocks_of(resamples)):
        block = slice(start, start + in_blocks_of(resamples))
        ends = mean_intervals(sums[block], counts[block], weights)
        p = _sign_flip_p(sums[block], np.random.default_rng(flips_seed), resamples)
        for row, n in enumerate(counts[block].sum(axis=1).astype(int).tolist()):
            interval = ends.interval(row, n, dropped_note(n_pairs - n, n_pairs, "pairs"))
            estimates.append(Estimate(**vars(interval), p=float(p[row]), p_floor=floor))
    return estimates


def _p_floor(n_clusters: int, resamples: int) -> float:
    """Smallest sign-flip p; see `estimate_means`."""
    if n_clusters < 2:
        return np.nan
    return 2.0 ** (1 - n_clusters) if 2**n_clusters <= resamples else 1 / (resamples + 1)


def _sign_flip_p(sums: Floats, rng: np.random.Generator, resamples: int) -> Floats:
    """Sign-flip p [site] of sums [site, cluster]; see `estimate_means`."""
    n_clusters = sums.shape[1]
    if n_clusters < 2:
        return np.full(len(sums), np.nan)
    size = np.abs(sums).sum(axis=1, keepdims=True)
    shares = np.divide(sums, size, out=np.zeros_like(sums), where=size > 0)

    def departure(signs: Floats, axis: int) -> Floats:
        share_left: Floats = np.abs(signs @ shares.T)
        return 1 + share_left  # SciPy's tolerance for ties is relative: the 1 keeps it above rounding

    test = _scipy.permutation_test(
        (np.ones(n_clusters),),
        departure,
        permutation_type="samples",
        n_resamples=resamples,
        batch=in_blocks_of(n_clusters),
        vectorized=True,
        alternative="greater",
        rng=rng,
    )
    p: Floats = test.pvalue
    return p
