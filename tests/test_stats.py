"""The statistics against their definitions written longhand, closed forms, exact enumeration and other libraries."""

import ast
import itertools
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import scipy.stats as untyped_scipy  # pyright: ignore[reportMissingTypeStubs]
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import ArrayLike, NDArray
from statsmodels.regression import linear_model as untyped_regression  # pyright: ignore[reportMissingTypeStubs]
from statsmodels.stats import multitest as untyped_multitest  # pyright: ignore[reportMissingTypeStubs]
from statsmodels.stats import proportion as untyped_proportion  # pyright: ignore[reportMissingTypeStubs]

from remote_mediation import intervals, rates, shares, stats
from remote_mediation.errors import PairsError

scipy_stats, multitest, proportion, regression = (
    cast(Any, m) for m in (untyped_scipy, untyped_multitest, untyped_proportion, untyped_regression)
)

NaN = math.nan
RESAMPLES = 499
FEW = settings(max_examples=25, deadline=None, derandomize=True, database=None)

effects = st.floats(-100, 100, allow_nan=False).map(lambda x: round(x, 3))
clustered_effects = st.integers(2, 7).flatmap(
    lambda k: st.lists(st.lists(effects, min_size=1, max_size=4), min_size=k, max_size=k)
)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def flat(by_cluster: Sequence[Sequence[float]]) -> tuple[list[float], list[str]]:
    """Values and labels of pairs, from values listed by cluster; labels are not in sorted order."""
    pairs = [(x, f"template-{7 * c % 101}") for c, cluster in enumerate(by_cluster) for x in cluster]
    return [x for x, _ in pairs], [label for _, label in pairs]


def one_mean(by_cluster: Sequence[Sequence[float]], resamples: int = RESAMPLES, seed: int = 0) -> stats.Estimate:
    values, labels = flat(by_cluster)
    return stats.estimate_means([values], labels, rng(seed), resamples)[0]


def hierarchical(n_sites: int, k: int, size: int, seed: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Values [site, pair] with mean 0 and intraclass correlation 1/2, and cluster labels [pair]."""
    generator = rng(seed)
    between = np.repeat(generator.normal(size=(n_sites, k)), size, axis=1)
    return between + generator.normal(size=between.shape), np.repeat(np.arange(k), size)


def expanded_quantiles(outcomes: Sequence[float], k: int) -> tuple[float, float]:
    """Ends of the 95% expanded percentile interval, from all resamples of k clusters."""
    tail = scipy_stats.norm.cdf(scipy_stats.t.ppf(0.025, df=k - 1) * math.sqrt(k / (k - 1)))
    low, high = scipy_stats.quantile(np.array(outcomes), np.array([tail, 1 - tail]))
    return float(low), float(high)


def mean_and_error(by_cluster: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Mean over pairs, and its standard error from k clusters: residuals are summed within each, then squared."""
    k, n = len(by_cluster), sum(map(len, by_cluster))
    mean = sum(map(sum, by_cluster)) / n
    squares = sum(sum(x - mean for x in cluster) ** 2 for cluster in by_cluster)
    return mean, math.sqrt(k / (k - 1) * squares) / n


def sign_flip_p_longhand(by_cluster: Sequence[Sequence[float]]) -> float:
    sums = [math.fsum(cluster) for cluster in by_cluster]
    observed = abs(math.fsum(sums))
    slack = 1e-9 * math.fsum(abs(s) for s in sums)
    flips = list(itertools.product([1, -1], repeat=len(sums)))
    hits = sum(abs(math.fsum(f * s for f, s in zip(flip, sums, strict=True))) >= observed - slack for flip in flips)
    return hits / len(flips)


class TestMean:
    UNEQUAL = ([9.0, 8.0, 7.5, 9.5, 8.5], [1.0], [2.0, 3.0], [-1.0], [4.0, 5.0, 3.5], [0.5])
    """Clusters whose means rise with their size: the mean of cluster means is far from the mean over pairs."""

    def test_value_is_the_mean_over_pairs(self) -> None:
        estimate = one_mean(self.UNEQUAL)
        assert estimate.value == pytest.approx(np.mean([x for cluster in self.UNEQUAL for x in cluster]))
        assert (estimate.n_pairs, estimate.n_clusters, estimate.reason) == (13, 6, "")

    def test_few_clusters_have_the_t_interval_of_a_regression_with_clustered_errors(self) -> None:
        values, labels = flat(self.UNEQUAL)
        numbers = np.unique(labels, return_inverse=True)[1]
        fit = regression.OLS(values, np.ones(13)).fit(cov_type="cluster", cov_kwds={"groups": numbers}, use_t=True)
        estimate = one_mean(self.UNEQUAL)
        assert (estimate.low, estimate.high) == pytest.approx(fit.conf_int()[0])
        assert estimate.method == "t on cluster means"

    def test_for_clusters_of_one_size_it_is_the_t_interval_of_their_means(self) -> None:
        by_cluster = rng(3).lognormal(size=(14, 3))
        estimate = one_mean(by_cluster.tolist())
        expected = scipy_stats.ttest_1samp(by_cluster.mean(axis=1), 0).confidence_interval()
        assert (estimate.low, estimate.high) == pytest.approx((expected.low, expected.high))

    def test_studentised_interval_longhand(self) -> None:
        generator = rng(11)
        by_cluster = [list(generator.lognormal(size=1 + c % 3)) for c in range(15)]
        mean, error = mean_and_error(by_cluster)
        roots: list[float] = []
        for _ in range(6000):
            drawn = [by_cluster[c] for c in generator.integers(15, size=15)]
            found, its_error = mean_and_error(drawn)
            roots.append((found - mean) / its_error)
        low, high = mean - np.quantile(roots, [0.975, 0.025]) * error
        estimate = one_mean(by_cluster, resamples=20_000)
        assert estimate.method == "studentised cluster bootstrap"
        assert (estimate.low, estimate.high) == pytest.approx((low, high), abs=0.06 * (high - low))
        assert high - mean > 1.5 * (
            mean - low
        )  # the long side of a skewed distribution is the one it was not drawn from

    def test_resamples_without_a_standard_error_are_dropped_and_counted(self) -> None:
        estimate = one_mean([[1.0]] + [[0.0]] * 14)  # (14/15)^15 = 36% of resamples miss the one
        lost = re.fullmatch(r"(\d+) of 499 resamples dropped: no standard error", estimate.reason)
        assert lost
        assert 130 < int(lost[1]) < 225
        assert np.isfinite([estimate.low, estimate.high]).all()

    def test_skewed_effects_are_covered_better_than_by_percentiles(self) -> None:
        values = rng(4).lognormal(size=(1500, 17)) - math.exp(0.5)
        found = stats.estimate_means(values, range(17), rng(1), 999)
        studentised = np.mean([one.low <= 0 <= one.high for one in found])
        old = stats.bootstrap_mean_of(lambda means: means, values, range(17), rng(1), 999)
        percentiles = np.mean([one.low <= 0 <= one.high for one in old])
        assert studentised > 0.90
        assert percentiles < studentised - 0.02

    @pytest.mark.parametrize(("k", "resamples", "floor"), [(5, 99, 2 / 2**5), (20, 99, 1 / 100), (1, 99, NaN)])
    def test_floor_of_p_is_what_the_clearest_data_reach(self, k: int, resamples: int, floor: float) -> None:
        estimate = one_mean([[5.0]] * k, resamples=resamples)
        assert estimate.p_floor == pytest.approx(floor, nan_ok=True)
        assert estimate.p == pytest.approx(estimate.p_floor, nan_ok=True)

    @pytest.mark.parametrize("k", [6, 10, 16])
    def test_interval_covers_and_would_not_if_clusters_were_ignored(self, k: int) -> None:
        values, clusters = hierarchical(n_sites=1000, k=k, size=8, seed=k)

        def coverage(labels: ArrayLike) -> float:
            found = stats.estimate_means(values, labels, rng(1), 1999)
            return float(np.mean([estimate.low <= 0 <= estimate.high for estimate in found]))

        assert 0.92 <= coverage(clusters) <= 0.98
        assert coverage(range(8 * k)) < 0.70

    def test_p_is_uniform_under_the_null_and_would_not_be_if_clusters_were_ignored(self) -> None:
        values, clusters = hierarchical(n_sites=1000, k=9, size=8, seed=3)

        def false_alarms(labels: ArrayLike) -> float:
            return float(
                np.mean([estimate.p <= 0.05 for estimate in stats.estimate_means(values, labels, rng(1), 600)])
            )

        assert 0.03 <= false_alarms(clusters) <= 0.07
        assert false_alarms(range(8 * 9)) > 0.25

    @FEW
    @given(clustered_effects)
    def test_exact_p_matches_all_sign_flips_enumerated(self, by_cluster: list[list[float]]) -> None:
        assert one_mean(by_cluster).p == pytest.approx(sign_flip_p_longhand(by_cluster), abs=1e-12)

    def test_ties_are_ties_though_sums_are_rounded(self) -> None:
        values = [0.7, -0.6, -0.8, 0.7, -0.9, 0.1, -0.8, 1.6]  # these sum to 0, and so do other flips; floats disagree
        assert stats.estimate_means([values], np.arange(8), rng())[0].p == 1

    @pytest.mark.parametrize("unit", [1e-20, 1e20])
    def test_p_does_not_depend_on_the_unit(self, unit: float) -> None:
        values = np.array([[0.7, -0.6, 0.8, 0.4, -0.9, 1.1, 0.8]])
        plain, scaled = (stats.estimate_means(x, range(7), rng())[0].p for x in (values, unit * values))
        assert scaled == plain < 0.5

    def test_sampled_p_is_close_to_the_exact_one(self) -> None:
        by_cluster = [[x] for x in rng(5).normal(0.4, 1.0, size=14)]
        exact, sampled = sign_flip_p_longhand(by_cluster), one_mean(by_cluster, resamples=9_999).p
        assert 0.01 < exact < 0.5
        assert sampled == pytest.approx(exact, abs=0.015)

    def test_p_is_never_zero(self) -> None:
        assert one_mean([[5.0]] * 20, resamples=99).p == 1 / 100
        assert one_mean([[5.0]] * 5).p == 2 / 2**5
        assert one_mean([[1e8], [-1e8], [1e-7], [1e-7]]).p >= 2 / 2**4

    @FEW
    @given(clustered_effects, st.floats(0.01, 50), st.floats(-20, 20))
    def test_scale_and_shift(self, by_cluster: list[list[float]], scale: float, shift: float) -> None:
        values, labels = flat(by_cluster)
        x = np.array(values)
        sites = [x, scale * x, -x, x + shift]
        plain, scaled, negated, shifted = stats.estimate_means(sites, labels, rng(), RESAMPLES)

        def near(*expected: float) -> object:
            return pytest.approx(expected, abs=1e-8, nan_ok=True)

        value, low, high = plain.value, plain.low, plain.high
        assert (scaled.value, scaled.low, scaled.high) == near(scale * value, scale * low, scale * high)
        assert (shifted.value, shifted.low, shifted.high) == near(value + shift, low + shift, high + shift)
        assert (negated.value, negated.low, negated.high) == near(-value, -high, -low)
        assert plain.p == scaled.p == negated.p

    def test_labels_and_order_of_pairs_do_not_matter(self) -> None:
        values, labels = flat(self.UNEQUAL)
        order = rng(2).permutation(len(values))
        shuffled = stats.estimate_means([np.array(values)[order]], np.array(labels)[order], rng(), RESAMPLES)[0]
        plain = stats.estimate_means([values], labels, rng(), RESAMPLES)[0]
        assert (shuffled.value, shuffled.low, shuffled.high) == pytest.approx((plain.value, plain.low, plain.high))
        numbered = stats.estimate_means([values], [int(label[9:]) + 20 for label in labels], rng(), RESAMPLES)[0]
        assert numbered.value == plain.value
        assert numbered.p == plain.p

    def test_a_site_does_not_depend_on_its_neighbours_nor_on_blocks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        values, clusters = hierarchical(n_sites=7, k=15, size=3, seed=4)
        values[2, 5], values[4, :3] = NaN, NaN  # the second takes the whole first cluster

        def numbers(estimates: list[stats.Estimate]) -> NDArray[Any]:
            return np.array([(e.n_clusters, e.value, e.low, e.high, e.p) for e in estimates])

        together = numbers(stats.estimate_means(values, clusters, rng(), RESAMPLES))
        alone = [stats.estimate_means(row[None], clusters, rng(), RESAMPLES)[0] for row in values]
        assert numbers(alone) == pytest.approx(together, abs=1e-12)
        monkeypatch.setattr(intervals, "_BLOCK", 2 * RESAMPLES)  # two sites, and 66 resamples, at a time
        assert numbers(stats.estimate_means(values, clusters, rng(), RESAMPLES)) == pytest.approx(together, abs=1e-12)

    def test_missing_pairs_are_dropped_site_by_site(self) -> None:
        values, clusters = hierarchical(n_sites=3, k=8, size=2, seed=6)
        values[1, 4], values[2, [0, 1, 7]] = math.inf, NaN
        found = stats.estimate_means(values, clusters, rng(), RESAMPLES)
        assert [e.reason for e in found] == [
            "",
            "1 of 16 pairs dropped: not finite",
            "3 of 16 pairs dropped: not finite",
        ]
        for row, estimate in zip(values, found, strict=True):
            kept = np.isfinite(row)
            alone = stats.estimate_means([row[kept]], clusters[kept], rng(), RESAMPLES)[0]
            assert (estimate.n_pairs, estimate.n_clusters) == (alone.n_pairs, alone.n_clusters)
            assert (estimate.value, estimate.low, estimate.high, estimate.p) == pytest.approx(
                (alone.value, alone.low, alone.high, alone.p)
            )
        assert [e.n_clusters for e in found] == [8, 8, 7]

    def test_the_unknown_is_nan_with_a_reason(self) -> None:
        one_cluster, all_missing = one_mean([[1.0, 2.0, 3.0]]), one_mean([[NaN], [math.inf]])
        assert one_cluster.value == 2.0
        assert np.isnan([one_cluster.low, one_cluster.high, one_cluster.p]).all()
        assert one_cluster.reason == "one cluster only"
        assert np.isnan([all_missing.value, all_missing.low, all_missing.high, all_missing.p]).all()
        assert all_missing.reason == "no finite values; 2 of 2 pairs dropped: not finite"
        assert (all_missing.n_pairs, all_missing.n_clusters) == (0, 0)

    @pytest.mark.parametrize(("value", "p"), [(0.0, 1.0), (0.1, 2 / 2**7)])
    def test_constant_data_are_a_point_without_spread_and_have_a_p(self, value: float, p: float) -> None:
        estimate = one_mean([[value] * n for n in (1, 2, 3, 1, 2, 3, 3)])
        assert estimate.value == pytest.approx(value)
        assert estimate.low == estimate.value == estimate.high
        assert estimate.reason == "no spread"
        assert estimate.p == p

    def test_few_clusters_are_called_few(self) -> None:
        reasons = [one_mean([[float(x)] for x in range(k)]).reason for k in (2, 5, 6)]
        assert reasons == [
            "only 2 clusters: t takes their means as normal",
            "only 5 clusters: t takes their means as normal",
            "",
        ]

    def test_the_generator_decides(self) -> None:
        by_cluster = [[float(x)] for x in range(15)]
        assert one_mean(by_cluster, seed=1) == one_mean(by_cluster, seed=1)
        assert one_mean(by_cluster, seed=1).low != one_mean(by_cluster, seed=2).low
        generator = rng()
        first, second = (stats.estimate_means([[1.0, 2.0, 4.0]], [0, 1, 2], generator, 20) for _ in range(2))
        assert generator.bit_generator.state != rng().bit_generator.state
        assert first[0].value == second[0].value

    @pytest.mark.parametrize(
        ("values", "clusters", "resamples", "message"),
        [
            ([1.0, 2.0], [0, 1], 9, r"\[site, pair\]; got shape \(2,\)"),
            ([[1.0, 2.0]], [0, 1, 2], 9, r"each of 2 pairs; got shape \(3,\)"),
            ([[1.0, 2.0]], [0, 1], 0, "at least 1; got 0"),
        ],
    )
    def test_bad_input(self, values: object, clusters: list[int], resamples: int, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            stats.estimate_means(values, clusters, rng(), resamples)  # type: ignore[arg-type]

    def test_no_sites(self) -> None:
        assert stats.estimate_means(np.empty((0, 3)), [0, 1, 2], rng()) == []


class TestBenjaminiHochberg:
    @FEW
    @given(st.lists(st.floats(0, 1) | st.just(NaN), max_size=30))
    def test_matches_statsmodels_and_leaves_nan_out_of_the_family(self, p: list[float]) -> None:
        q = stats.benjamini_hochberg(p)
        defined = ~np.isnan(np.array(p))
        assert np.isnan(q[~defined]).all()
        if defined.any():
            assert q[defined] == pytest.approx(multitest.multipletests(np.array(p)[defined], method="fdr_bh")[1])

    def test_by_hand_in_any_shape(self) -> None:
        q = stats.benjamini_hochberg([[0.01, 0.04], [NaN, 0.03]])
        assert q == pytest.approx(np.array([[0.03, 0.04], [NaN, 0.04]]), nan_ok=True)

    def test_refuses_what_is_no_probability(self) -> None:
        with pytest.raises(ValueError, match=r"0\.? and 1"):  # as scipy's versions say it
            stats.benjamini_hochberg([0.5, 1.5])


class TestRatio:
    def test_value_and_interval_longhand(self) -> None:
        generator = rng(8)
        sizes = [1, 3, 2, 4, 1, 2]
        nie = [list(generator.normal(1.0, 0.4, size=n)) for n in sizes]
        te = [list(generator.normal(2.0, 0.4, size=n)) for n in sizes]
        ratios = [
            sum(sum(nie[c]) for c in drawn) / sum(sum(te[c]) for c in drawn)
            for drawn in itertools.product(range(6), repeat=6)
        ]
        low, high = expanded_quantiles(ratios, 6)
        found = stats.ratio_of_means(flat(nie)[0], flat(te)[0], flat(te)[1], rng(), 20_000)
        assert found.value == pytest.approx(sum(map(sum, nie)) / sum(map(sum, te)))
        assert (found.low, found.high) == pytest.approx((low, high), abs=0.01)
        assert high - low > 0.1
        assert (found.n_pairs, found.n_clusters, found.reason) == (13, 6, "")

    def test_is_not_the_mean_of_ratios(self) -> None:
        found = stats.ratio_of_means([1.0, 9.0, 2.0], [1.0, 3.0, 4.0], [0, 1, 2], rng(), 99)
        assert found.value == 12 / 8

    def test_undefined_when_the_denominator_spans_zero(self) -> None:
        found = stats.ratio_of_means([1.0, 2.0] * 4, [-1.0, 1.5] * 4, range(8), rng(), RESAMPLES)
        assert np.isnan([found.value, found.low, found.high]).all()
        assert found.reason.startswith("the interval of the denominator, -")
        assert found.reason.endswith(" spans 0")

    def test_a_denominator_below_zero_will_do(self) -> None:
        above = stats.ratio_of_means([1.0, 2.0] * 4, [3.0, 4.0] * 4, range(8), rng(), RESAMPLES)
        below = stats.ratio_of_means([-1.0, -2.0] * 4, [-3.0, -4.0] * 4, range(8), rng(), RESAMPLES)
        assert below == above
        assert 0 < above.low < above.value < above.high < 1

    def test_a_pair_that_lacks_either_is_dropped_from_both(self) -> None:
        numerator, denominator = np.arange(1.0, 9.0), np.arange(11.0, 19.0)
        whole = stats.ratio_of_means(numerator[2:], denominator[2:], range(6), rng(), RESAMPLES)
        numerator[0], denominator[1] = NaN, math.inf
        holed = stats.ratio_of_means(numerator, denominator, range(8), rng(), RESAMPLES)
        assert (holed.value, holed.low, holed.high) == (whole.value, whole.low, whole.high)
        assert holed.reason == "2 of 8 pairs dropped: not finite"
        assert (holed.n_pairs, holed.n_clusters) == (6, 6)

    def test_identity_has_a_value_and_no_spread(self) -> None:
        te = np.linspace(1.0, 3.0, 8)
        found = stats.ratio_of_means(te, te, range(8), rng(), RESAMPLES)
        assert found.low == found.value == found.high == 1.0
        assert found.reason == "no spread"

    def test_a_constant_denominator_is_clear_of_zero_unless_it_is_zero(self) -> None:
        numerator = np.linspace(1.0, 3.0, 8)
        assert stats.ratio_of_means(numerator, np.full(8, 2.0), range(8), rng(), RESAMPLES).value == 1.0
        zero = stats.ratio_of_means(numerator, np.zeros(8), range(8), rng(), RESAMPLES)
        assert math.isnan(zero.value)
        assert zero.reason == "the interval of the denominator, 0 to 0, spans 0"

    def test_one_cluster_and_no_pairs(self) -> None:
        one = stats.ratio_of_means([1.0, 2.0], [3.0, 4.0], ["t", "t"], rng())
        none = stats.ratio_of_means([NaN], [1.0], ["t"], rng())
        assert math.isnan(one.value)
        assert one.reason == "one cluster only"
        assert math.isnan(none.value)
        assert none.reason == "no finite values; 1 of 1 pairs dropped: not finite"

    def test_bad_input(self) -> None:
        with pytest.raises(ValueError, match=r"\(2,\) and \(3,\)"):
            stats.ratio_of_means([1.0, 2.0], [1.0, 2.0, 3.0], [0, 1], rng())
        with pytest.raises(ValueError, match="each of 2 pairs"):
            stats.ratio_of_means([1.0, 2.0], [1.0, 2.0], [0, 1, 1], rng())


class TestMeansOf:
    VALUES, LABELS = hierarchical(3, k=7, size=4, seed=1)

    def test_means_have_the_percentiles_of_all_resamples(self) -> None:
        values, labels = hierarchical(3, k=6, size=2, seed=1)
        clusters = values.reshape(3, 6, 2).sum(axis=2)
        means = np.array([clusters[:, list(drawn)].sum(axis=1) / 12 for drawn in itertools.product(range(6), repeat=6)])
        found = stats.bootstrap_mean_of(lambda means: means, values, labels, rng(5), 20_000)
        for one, site in zip(found, means.T, strict=True):
            assert (one.low, one.high) == pytest.approx(expanded_quantiles(list(site), 6), abs=0.03)
            assert (one.n_pairs, one.n_clusters) == (12, 6)

    def test_a_linear_statistic_has_the_interval_of_its_values(self) -> None:
        def both(means: Any) -> Any:
            return np.stack([means[0] - 2 * means[1], means.sum(0)])

        a, b, c = self.VALUES
        found = stats.bootstrap_mean_of(both, self.VALUES, self.LABELS, rng(5), RESAMPLES)
        self.assert_like(found, [a - 2 * b, a + b + c], self.LABELS)

    def assert_like(self, found: Sequence[stats.Interval], values: ArrayLike, labels: ArrayLike) -> None:
        expected = stats.bootstrap_mean_of(lambda means: means, values, labels, rng(5), RESAMPLES)
        for one, other in zip(found, expected, strict=True):
            assert (one.value, one.low, one.high) == pytest.approx((other.value, other.low, other.high))
            assert one.low < one.value < one.high

    def test_the_statistic_is_of_means_and_not_a_mean_of_statistics(self) -> None:
        (found,) = stats.bootstrap_mean_of(
            lambda means: (means**2).sum(0, keepdims=True), self.VALUES, self.LABELS, rng(), RESAMPLES
        )
        assert found.value == pytest.approx((self.VALUES.mean(1) ** 2).sum())

    def test_resamples_draw_whole_clusters(self) -> None:
        seen: list[Any] = []

        def watched(means: Any) -> Any:
            seen.append(means)
            return means

        stats.bootstrap_mean_of(watched, [[0.0, 6.0, 9.0]], ["a", "a", "b"], rng(), 200)
        possible = {round(sum(one) / len(one), 6) for one in ([0, 6], [9], [0, 6, 9], [0, 6, 0, 6], [9, 9])}
        assert set(np.round(np.concatenate(seen[1:], axis=1), 6).ravel()) == possible == {3.0, 9.0, 5.0}

    def test_values_of_any_shape(self) -> None:
        shapes = []

        def flattened(means: Any) -> Any:
            shapes.append(means.shape[:-1])
            return means.reshape(-1, means.shape[-1])

        table = np.stack([self.VALUES, 2 * self.VALUES])
        found = stats.bootstrap_mean_of(flattened, table, self.LABELS, rng(), RESAMPLES)
        assert set(shapes) == {(2, 3)}
        assert [one.value for one in found] == pytest.approx(table.mean(2).ravel().tolist())

    def test_pairs_that_lack_a_value_are_dropped_everywhere(self) -> None:
        gaps = self.VALUES.copy()
        gaps[1, 2], gaps[0, 9] = NaN, math.inf
        kept = np.isfinite(gaps).all(0)
        found = stats.bootstrap_mean_of(lambda means: means, gaps, self.LABELS, rng(5), RESAMPLES)
        self.assert_like(found, gaps[:, kept], self.LABELS[kept])
        assert {one.reason for one in found} == {f"2 of {gaps.shape[1]} pairs dropped: not finite"}

    def test_bad_input(self) -> None:
        with pytest.raises(ValueError, match="one label for each of 3 pairs"):
            stats.bootstrap_mean_of(lambda means: means, [[1.0, 2.0, 3.0]], ["a"], rng())
        with pytest.raises(ValueError, match="resamples must be at least 1"):
            stats.bootstrap_mean_of(lambda means: means, [[1.0, 2.0]], ["a", "b"], rng(), 0)


class TestSplit:
    @FEW
    @given(st.lists(st.integers(1, 12), min_size=2, max_size=20), st.integers(0, 1000))
    def test_whole_clusters_near_halves(self, sizes: list[int], seed: int) -> None:
        clusters = rng(seed).permutation(np.repeat([f"t{c}" for c in range(len(sizes))], sizes))
        split = stats.split_clusters(clusters, rng(seed))
        assert split.shape == clusters.shape
        assert set(split) == {"discovery", "heldout"}
        assert all(len(set(split[clusters == label])) == 1 for label in set(clusters))
        assert abs(int(np.sum(split == "discovery")) - int(np.sum(split == "heldout"))) <= max(sizes)

    def test_equal_clusters_are_halved_exactly_and_differently_by_seed(self) -> None:
        clusters = np.repeat(np.arange(10), 4)
        splits = [stats.split_clusters(clusters, rng(seed)) for seed in range(8)]
        assert [int(np.sum(split == "discovery")) for split in splits] == [20] * 8
        assert len({tuple(split) for split in splits}) > 2
        assert (splits[3] == stats.split_clusters(clusters, rng(3))).all()

    def test_large_clusters_are_placed_first(self) -> None:
        clusters = np.repeat(
            np.arange(4), [1, 3, 2, 6]
        )  # 6 against 3 + 2 + 1; the 6 placed last would give 9 against 3
        for seed in range(10):
            assert int(np.sum(stats.split_clusters(clusters, rng(seed)) == "discovery")) == 6

    def test_either_side_can_hold_the_largest_cluster(self) -> None:
        sides = {str(stats.split_clusters([0, 0, 0, 1, 2], rng(seed))[0]) for seed in range(20)}
        assert sides == {"discovery", "heldout"}

    @pytest.mark.parametrize("clusters", [["t"] * 3, []])
    def test_needs_two_clusters(self, clusters: list[str]) -> None:
        with pytest.raises(PairsError, match=f"these {len(clusters)} come from {len(set(clusters))}"):
            stats.split_clusters(clusters, rng())


class TestSpread:
    LABELS = ("a", "a", "a", "b", "c", "b", "a")

    @pytest.mark.parametrize(
        ("most", "kept"),
        [(0, []), (2, [0, 3]), (3, [0, 3, 4]), (4, [0, 1, 3, 4]), (6, [0, 1, 2, 3, 4, 5]), (9, [0, 1, 2, 3, 4, 5, 6])],
    )
    def test_one_of_each_component_before_a_second_of_any(self, most: int, kept: list[int]) -> None:
        assert stats.spread(self.LABELS, most).tolist() == kept

    def test_nothing_to_choose_from_and_bad_input(self) -> None:
        assert stats.spread([], 3).tolist() == []
        with pytest.raises(ValueError, match="got -1"):
            stats.spread(self.LABELS, -1)


class TestSparsity:
    def test_gini_closed_forms(self) -> None:
        assert stats.sparsity([3.0] * 8).gini == pytest.approx(0)
        assert stats.sparsity([0.0] * 7 + [3.0]).gini == pytest.approx(1 - 1 / 8)
        assert stats.sparsity(np.arange(1, 101)).gini == pytest.approx((100 - 1) / (3 * 100))  # of 1..n: (n-1) / 3n

    @FEW
    @given(st.lists(st.floats(0.001, 100), min_size=1, max_size=12), st.floats(0.05, 1), st.floats(0.01, 100))
    def test_longhand_and_scale_free(self, values: list[float], share: float, scale: float) -> None:
        found = stats.sparsity(values, share)
        differences = sum(abs(a - b) for a in values for b in values)
        assert found.gini == pytest.approx(differences / (2 * len(values) * sum(values)), abs=1e-9)
        carrying = [
            n
            for n in range(1, len(values) + 1)
            for some in itertools.combinations(values, n)
            if sum(some) >= share * sum(values) * (1 - 1e-9)
        ]
        assert found.fewest == min(carrying)
        scaled = stats.sparsity(scale * np.array(values), share)
        assert (scaled.gini, scaled.fewest) == (pytest.approx(found.gini, abs=1e-9), found.fewest)

    def test_fewest_by_hand(self) -> None:
        assert stats.sparsity([5.0, 1.0, 3.0, 1.0]).fewest == 2
        assert stats.sparsity([5.0, 1.0, 3.0, 1.0], share=0.81).fewest == 3
        assert stats.sparsity([0.1] * 10).fewest == 8  # though eight times 0.1 sums to less than 0.8
        assert stats.sparsity([0.1, 0.0, 0.0], share=1).fewest == 1

    def test_negative_and_missing_values(self) -> None:
        found = stats.sparsity([4.0, -1.0, NaN, 3.0])
        assert found[1:] == (*stats.sparsity([4.0, 0.0, 3.0])[1:3], 1 / 8, "1 of 4 units dropped: not finite")
        assert found.n_units == 3

    def test_no_positive_mass_is_nan_with_a_reason(self) -> None:
        for values, negative_share in (([-1.0, -2.0], 1.0), ([0.0], NaN), ([], NaN)):
            found = stats.sparsity(values)
            assert math.isnan(found.gini)
            assert math.isnan(found.fewest)
            assert found.negative_share == pytest.approx(negative_share, nan_ok=True)
            assert found.reason == "no unit has a positive value"

    def test_bad_input(self) -> None:
        with pytest.raises(ValueError, match="share 0"):
            stats.sparsity([1.0], share=0)
        with pytest.raises(ValueError, match=r"shape \(1, 1\)"):
            stats.sparsity([[1.0]])


class TestWilson:
    @pytest.mark.parametrize(("successes", "n"), [(0, 5), (3, 7), (50, 50), (1, 1)])
    def test_matches_statsmodels(self, successes: int, n: int) -> None:
        found = stats.wilson(successes, n)
        low, high = proportion.proportion_confint(successes, n, method="wilson")
        assert (found.value, found.low, found.high) == pytest.approx((successes / n, low, high))
        assert (found.n_pairs, found.n_clusters, found.reason) == (n, n, "")

    def test_nothing_tried_and_impossible_counts(self) -> None:
        assert math.isnan(stats.wilson(0, 0).value)
        assert stats.wilson(0, 0).reason == "no trials"
        for successes in (-1, 4):
            with pytest.raises(ValueError, match=f"got {successes} of 3"):
                stats.wilson(successes, 3)


MODULES = (intervals, rates, shares, stats)


def test_imports_no_more_than_numpy_and_scipy() -> None:
    nodes = [node for module in MODULES for node in ast.walk(ast.parse(Path(module.__file__).read_text()))]
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
    others = {name for name in imported if name.split(".")[0] not in sys.stdlib_module_names}
    own = {"remote_mediation.errors", "remote_mediation.intervals"}
    assert others == {"numpy", "numpy.typing", "scipy.optimize", "scipy.stats", *own}


@pytest.mark.parametrize("module", MODULES)
def test_exports_are_sorted_and_public(module: Any) -> None:
    defined = {
        name
        for name, thing in vars(module).items()
        if getattr(thing, "__module__", "") == module.__name__ and not name.startswith("_")
    }
    handed_on = {"Interval"} if module is stats else set()
    data = {name for name in module.__all__ if name.isupper() or name in ("Floats", "GateVerdict")}
    assert set(module.__all__) == defined | handed_on | data
    assert module.__all__ == sorted(module.__all__, key=lambda name: (not name.isupper(), name))


def test_draws_asked_for_twice_are_the_same_and_leave_the_generator_where_it_would_be() -> None:
    first, again, plain = (np.random.default_rng(7) for _ in range(3))
    expected = plain.multinomial(20, np.full(20, 1 / 20), size=50)
    for generator in (first, again):
        assert (intervals.draw_weights(20, generator, 50) == expected).all()
    assert first.random() == again.random() == plain.random()
    with pytest.raises(ValueError, match="read-only"):
        intervals.draw_weights(20, np.random.default_rng(7), 50)[0, 0] = 1
