"""Rates against Wilson's interval, a survey's formula written longhand, and simulated judges."""

import math
from typing import Any, cast

import numpy as np
import pytest
import scipy.stats as untyped_scipy  # pyright: ignore[reportMissingTypeStubs]
from statsmodels.stats import proportion as untyped_proportion  # pyright: ignore[reportMissingTypeStubs]

from remote_mediation import rates, stats

scipy_stats, proportion = cast(Any, untyped_scipy), cast(Any, untyped_proportion)
NaN = math.nan


class TestRate:
    @pytest.mark.parametrize(("successes", "n"), [(0, 5), (3, 7), (50, 50), (1, 1), (1, 40)])
    def test_items_that_are_their_own_clusters_have_wilsons_interval(self, successes: int, n: int) -> None:
        found = rates.rate(np.arange(n) < successes, range(n))
        low, high = proportion.proportion_confint(successes, n, method="wilson")
        assert (found.value, found.low, found.high) == pytest.approx((successes / n, low, high))

    def test_clusters_longhand(self) -> None:
        by_cluster = [[1, 1, 1], [0, 0], [1, 1, 0], [0], [1, 1], [0, 0, 0]]
        hits, labels = zip(*((x, c) for c, cluster in enumerate(by_cluster) for x in cluster), strict=True)
        n, k, share = 14, 6, 7 / 14
        clustered = k / (k - 1) * sum(sum(x - share for x in cluster) ** 2 for cluster in by_cluster)
        alone = n / (n - 1) * n * share * (1 - share)
        t = scipy_stats.t.ppf(0.975, [n - 1, k - 1])
        worth = n / (clustered / alone) * (t[0] / t[1]) ** 2
        low, high = proportion.proportion_confint(share * worth, worth, method="wilson")
        found = rates.rate(hits, labels)
        assert (found.value, found.low, found.high) == pytest.approx((share, low, high))
        assert (found.n_pairs, found.n_clusters) == (14, 6)
        assert worth < 5
        assert found.method == f"Wilson, worth {worth:.3g} items"

    def test_items_are_worth_no_more_than_they_are(self) -> None:
        balanced = rates.rate([0, 1] * 6, np.repeat(np.arange(6), 2))
        plain = stats.wilson(6, 12)
        assert (balanced.low, balanced.high) == pytest.approx((plain.low, plain.high))

    @pytest.mark.parametrize("value", [0, 1])
    def test_all_alike_are_worth_one_item_a_cluster(self, value: int) -> None:
        found, plain = rates.rate([value] * 30, np.repeat(np.arange(10), 3)), stats.wilson(10 * value, 10)
        assert (found.value, found.low, found.high) == pytest.approx((value, plain.low, plain.high))

    @pytest.mark.parametrize("chance", [0.5, 0.9])
    def test_covers_where_clusters_agree_and_plain_wilson_does_not(self, chance: float) -> None:
        generator, clusters = np.random.default_rng(1), np.repeat(np.arange(12), 4)
        covered, plain = 0, 0
        for _ in range(800):
            own = generator.beta(chance, 1 - chance, size=12)  # intraclass correlation 1/2
            hits = generator.random(48) < np.repeat(own, 4)
            found, naive = rates.rate(hits, clusters), stats.wilson(int(hits.sum()), 48)
            covered += found.low <= chance <= found.high
            plain += naive.low <= chance <= naive.high
        assert 0.93 <= covered / 800 <= 0.99
        assert plain / 800 < 0.85

    def test_the_unknown_and_the_not_judged(self) -> None:
        found, kept = rates.rate([1.0, NaN, 0.0, 1.0], [0, 1, 2, 3]), rates.rate([1, 0, 1], [0, 2, 3])
        assert (found.low, found.high, found.n_clusters) == (kept.low, kept.high, 3)
        assert found.reason == "1 of 4 items dropped: not judged"
        assert rates.rate([], []).reason == "no items"
        one = rates.rate([1, 0], [0, 0])
        assert one.value == 0.5
        assert math.isnan(one.low)
        assert one.reason == "one cluster only"

    def test_bad_input(self) -> None:
        with pytest.raises(ValueError, match="each 0, 1 or NaN"):
            rates.rate([0.5, 1], [0, 1])
        with pytest.raises(ValueError, match="each of 2 pairs"):
            rates.rate([0, 1], [0, 1, 2])


def known(value: float, low: float, high: float) -> stats.Interval:
    return stats.Interval(40, 20, value, low, high, "")


class TestCorrectedRate:
    def test_by_hand(self) -> None:
        found = rates.corrected_rate(known(0.4, 0.3, 0.55), known(0.9, 0.8, 0.95), known(0.8, 0.75, 0.9))
        assert found.value == pytest.approx(2 / 7)
        down = [0.1 / 0.7, 2 / 7 / 0.7 * 0.05, 5 / 7 / 0.7 * 0.05]
        up = [0.15 / 0.7, 2 / 7 / 0.7 * 0.1, 5 / 7 / 0.7 * 0.1]
        assert (found.low, found.high) == pytest.approx((2 / 7 - math.hypot(*down), 2 / 7 + math.hypot(*up)))
        assert (found.n_pairs, found.n_clusters, found.reason) == (40, 20, "")

    def test_a_judge_without_error_changes_nothing(self) -> None:
        sure = known(1.0, 1.0, 1.0)
        found = rates.corrected_rate(known(0.4, 0.3, 0.55), sure, sure)
        assert (found.value, found.low, found.high) == pytest.approx((0.4, 0.3, 0.55))

    def test_is_cut_to_what_a_rate_can_be(self) -> None:
        found = rates.corrected_rate(known(0.1, 0.05, 0.2), known(0.9, 0.85, 0.95), known(0.8, 0.75, 0.85))
        assert (found.value, found.low) == (0.0, 0.0)
        assert 0 < found.high < 0.3

    def test_covers_the_true_rate(self) -> None:
        generator, covered = np.random.default_rng(2), 0
        for _ in range(1000):
            hits = generator.binomial([60, 80, 80], [0.3 * 0.85 + 0.7 * 0.1, 0.85, 0.9])
            parts = (stats.wilson(int(hit), n) for hit, n in zip(hits, (60, 80, 80), strict=True))
            found = rates.corrected_rate(*parts)
            covered += found.low <= 0.3 <= found.high
        assert 0.93 <= covered / 1000 <= 0.975

    @pytest.mark.parametrize(("sensitivity", "defined"), [(0.45, False), (0.5, False), (0.55, True)])
    def test_needs_a_judge_that_tells(self, sensitivity: float, defined: bool) -> None:
        found = rates.corrected_rate(known(0.4, 0.3, 0.5), known(sensitivity, 0.4, 0.6), known(0.7, 0.6, 0.8))
        assert math.isfinite(found.value) == math.isfinite(found.low) == defined
        assert ("not above 1.2" in found.reason) != defined

    def test_what_has_no_interval_corrects_nothing(self) -> None:
        found = rates.corrected_rate(known(0.4, NaN, NaN), known(0.9, 0.8, 1.0), known(0.9, 0.8, 1.0))
        assert math.isnan(found.value)
        assert "has no interval" in found.reason


class TestCorrectedDifference:
    def test_by_hand(self) -> None:
        found = rates.corrected_difference(known(-0.35, -0.5, -0.25), known(0.9, 0.8, 0.95), known(0.8, 0.75, 0.9))
        assert found.value == pytest.approx(-0.5)
        down = [0.15 / 0.7, 0.5 / 0.7 * 0.1, 0.5 / 0.7 * 0.05]
        up = [0.1 / 0.7, 0.5 / 0.7 * 0.05, 0.5 / 0.7 * 0.1]
        assert (found.low, found.high) == pytest.approx((-0.5 - math.hypot(*down), -0.5 + math.hypot(*up)))

    def test_is_the_difference_of_corrected_rates(self) -> None:
        errors = known(0.9, 0.8, 0.95), known(0.8, 0.75, 0.9)
        one, other = (rates.corrected_rate(known(value, 0.2, 0.7), *errors).value for value in (0.6, 0.4))
        found = rates.corrected_difference(known(0.2, 0.1, 0.3), *errors)
        assert found.value == pytest.approx(one - other)

    def test_is_cut_to_what_a_difference_can_be(self) -> None:
        found = rates.corrected_difference(known(0.8, 0.7, 0.9), known(0.8, 0.75, 0.85), known(0.8, 0.75, 0.85))
        assert (found.value, found.high) == (1.0, 1.0)
        assert found.low < 1

    def test_needs_a_judge_that_tells(self) -> None:
        found = rates.corrected_difference(known(0.2, 0.1, 0.3), known(0.5, 0.4, 0.6), known(0.7, 0.6, 0.8))
        assert math.isnan(found.value)
        assert "not above 1.2" in found.reason

    def test_covers_the_true_difference(self) -> None:
        generator, covered = np.random.default_rng(3), 0
        truth, sensitivity, specificity = (0.7, 0.2), 0.85, 0.9
        chances = [rate * sensitivity + (1 - rate) * (1 - specificity) for rate in truth]
        for _ in range(600):
            one, other = (generator.random(60) < chance for chance in chances)
            hits = generator.binomial(80, [sensitivity, specificity])
            (observed,) = stats.estimate_means([one.astype(float) - other], np.arange(60), generator, 199)
            found = rates.corrected_difference(observed, *(stats.wilson(int(hit), 80) for hit in hits))
            covered += found.low <= truth[0] - truth[1] <= found.high
        assert 0.92 <= covered / 600 <= 0.985
