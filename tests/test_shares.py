"""Shares, slopes and the gate against closed forms, regressions with clustered errors, and data made by hand."""

import math
from typing import Any, cast

import numpy as np
import pytest
import scipy.stats as untyped_scipy  # pyright: ignore[reportMissingTypeStubs]
from numpy.typing import NDArray
from statsmodels.regression import linear_model as untyped_regression  # pyright: ignore[reportMissingTypeStubs]

from remote_mediation import intervals, shares, stats

scipy_stats, regression = cast(Any, untyped_scipy), cast(Any, untyped_regression)
NaN = math.nan
RESAMPLES = 499
STEPS = np.linspace(-np.pi / 2, np.pi / 2, 33)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def effects_of(k: int, size: int = 1, seed: int = 1, level: float = 2.0) -> tuple[Any, Any, Any]:
    """Effects that are 0.6 of the totals and noise, totals, clusters: [pair] each."""
    generator = rng(seed)
    total = level + np.repeat(generator.normal(size=k), size) + 0.3 * generator.normal(size=k * size)
    effect = 0.6 * total + np.repeat(0.4 * generator.normal(size=k), size)
    return effect, total, np.repeat(np.arange(k), size)


def fieller(effect: NDArray[Any], total: NDArray[Any]) -> list[float]:
    """Roots of (mean E - c mean T)^2 = t^2 var(E - c T) / k, for one pair a cluster."""
    k = len(effect)
    cov, reach = np.cov(effect, total) / k, scipy_stats.t.ppf(0.975, k - 1) ** 2
    e, t = effect.mean(), total.mean()
    squares = [t * t - reach * cov[1, 1], -2 * (e * t - reach * cov[0, 1]), e * e - reach * cov[0, 0]]
    return sorted(np.roots(squares).tolist())


class TestShare:
    @pytest.mark.parametrize("unit", [1.0, -3e-4, 1e5])
    @pytest.mark.parametrize(("k", "level"), [(5, 2.0), (9, 1.2), (14, 0.8)])
    def test_few_clusters_have_the_roots_of_the_quadratic(self, k: int, level: float, unit: float) -> None:
        effect, total, clusters = effects_of(k, level=level)
        found = shares.share(effect, unit * total, clusters, rng())
        low, high = sorted(end / unit for end in fieller(effect, total))
        assert found.value == pytest.approx(effect.mean() / total.mean() / unit)
        assert (found.low, found.high) == pytest.approx((low, high), rel=1e-9)
        assert found.method == "Fieller, t on cluster means"

    @pytest.mark.parametrize("sign", [1, -1])
    @pytest.mark.parametrize("k", [8, 16])
    def test_the_verdict_at_a_threshold_and_the_interval_agree(self, k: int, sign: int) -> None:
        effect, total, clusters = effects_of(k, size=2, seed=k)
        found = shares.share(sign * effect, sign * total, clusters, rng(), RESAMPLES)

        def sign_at(threshold: float) -> int:
            return shares.share_exceeds(sign * effect, sign * total, clusters, rng(), threshold, RESAMPLES).sign

        near = 1e-7
        assert [sign_at(end) for end in (found.low - near, found.low + near)] == [1, 0]
        assert [sign_at(end) for end in (found.high - near, found.high + near)] == [0, -1]

    def test_the_verdict_is_in_the_unit_of_the_effects(self) -> None:
        effect, total, clusters = effects_of(9)
        found = shares.share_exceeds(effect, total, clusters, rng(), 0.25)
        expected = scipy_stats.ttest_1samp(effect - 0.25 * total, 0).confidence_interval()
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
        assert found.value == pytest.approx((effect - 0.25 * total).mean())

    def test_the_set_holds_the_true_share_as_often_as_it_says(self) -> None:
        held = 0
        for seed in range(400):
            effect, total, clusters = effects_of(8, seed=seed, level=3.0)
            found = shares.share(effect, total, clusters, rng())
            held += found.low <= 0.6 <= found.high
        assert 0.92 <= held / 400 <= 0.98

    @pytest.mark.parametrize("k", [8, 16])
    def test_undefined_where_the_total_spans_zero(self, k: int) -> None:
        found = shares.share(np.ones(k), np.tile([-1.0, 1.5], k // 2), range(k), rng(), RESAMPLES)
        assert np.isnan([found.value, found.low, found.high]).all()
        assert found.reason.startswith("undefined: the interval of the total, -")
        assert found.reason.endswith(" spans 0")
        assert found.method == ""

    def test_the_ends_are_those_of_halving_alone(self) -> None:
        """Each share is tried by a test of its own, and the outermost that are not rejected are followed to the end."""
        for seed in range(12):
            generator = rng(seed)
            total, effect = 3 + generator.standard_t(3, size=16), generator.standard_t(2, size=16)

            def held(share: float, effect: Any = effect, total: Any = total) -> bool:
                return shares.share_exceeds(effect, total, range(16), rng(), share, RESAMPLES).sign == 0

            found = shares.share(effect, total, range(16), rng(), RESAMPLES)
            if math.isnan(found.low):
                continue
            inside = [angle for angle in (math.atan(found.value), *STEPS[1:-1]) if held(math.tan(angle))]
            for end, within, step in ((found.low, min(inside), -1), (found.high, max(inside), 1)):
                beyond = min(abs(angle - within) for angle in STEPS if step * (angle - within) > 0) * step + within
                for _ in range(50):
                    middle = (within + beyond) / 2
                    within, beyond = (middle, beyond) if held(math.tan(middle)) else (within, middle)
                assert end == pytest.approx(math.tan(within), abs=1e-9)

    def test_undefined_exactly_where_the_quadratic_has_no_bounded_set(self) -> None:
        bounded = []
        for seed in range(60):
            effect, total, clusters = effects_of(7, seed=seed, level=0.9)
            reach = scipy_stats.t.ppf(0.975, 6) ** 2
            bounded.append(total.mean() ** 2 > reach * total.var(ddof=1) / 7)
            assert math.isfinite(shares.share(effect, total, clusters, rng()).low) == bounded[-1]
        assert 10 < sum(bounded) < 50

    def test_the_whole_and_a_fixed_part_have_no_spread(self) -> None:
        _, total, clusters = effects_of(16)
        for part in (1.0, 0.3, -2.0):
            found = shares.share(part * total, total, clusters, rng(), RESAMPLES)
            assert found.low == found.value == found.high == pytest.approx(part)
            assert found.reason == "no spread"

    def test_a_constant_total_leaves_the_interval_of_the_mean(self) -> None:
        effect, _, clusters = effects_of(16)
        found = shares.share(effect, np.full(16, 4.0), clusters, rng(), RESAMPLES)
        mean = shares.share_exceeds(effect, np.full(16, 4.0), clusters, rng(), 0.0, RESAMPLES)
        assert (found.low, found.high) == pytest.approx((mean.low / 4, mean.high / 4))

    def test_pairs_without_a_value_and_too_few_clusters(self) -> None:
        effect, total, clusters = effects_of(10)
        holed = np.where(clusters == 3, NaN, effect)
        found, whole = (
            shares.share(e, t, c, rng())
            for e, t, c in ((holed, total, clusters), (*(x[clusters != 3] for x in (effect, total, clusters)),))
        )
        assert (found.low, found.high, found.n_clusters) == (whole.low, whole.high, 9)
        assert found.reason == "1 of 10 pairs dropped: not finite"
        assert shares.share([1.0, 2.0], [1.0, 2.0], [0, 0], rng()).reason == "one cluster only"
        assert shares.share([NaN], [2.0], [0], rng()).reason.startswith("no finite values")

    def test_bad_input(self) -> None:
        with pytest.raises(ValueError, match=r"\(2,\) and \(3,\)"):
            shares.share([1.0, 2.0], [1.0, 2.0, 3.0], [0, 1], rng())
        with pytest.raises(ValueError, match="at least 1; got 0"):
            shares.share_exceeds([1.0, 2.0], [1.0, 2.0], [0, 1], rng(), 0.5, 0)


class TestSlope:
    def test_is_least_squares_through_the_origin(self) -> None:
        effect, total, _ = effects_of(12)
        assert shares.slope(effect, total) == pytest.approx(np.linalg.lstsq(total[:, None], effect)[0][0])
        assert shares.slope([*effect, NaN, 1.0], [*total, 7.0, NaN]) == pytest.approx(shares.slope(effect, total))

    def test_is_defined_where_the_mean_total_is_zero_and_not_where_all_are(self) -> None:
        assert shares.slope([-1.0, 1.0], [-2.0, 2.0]) == 0.5
        assert math.isnan(shares.slope([1.0, 1.0], [0.0, 0.0]))
        assert math.isnan(shares.slope([], []))

    @pytest.mark.parametrize("k", [7, 14])
    def test_difference_matches_a_regression_with_clustered_errors(self, k: int) -> None:
        harm, placebo = effects_of(k, size=2), effects_of(k, size=2, seed=2, level=0.1)
        found = shares.slope_difference(*harm[:2], *placebo[:2], harm[2], rng())
        nothing = np.zeros(2 * k)
        sides = np.column_stack([np.append(harm[1], nothing), np.append(nothing, placebo[1])])
        groups = {"groups": np.tile(harm[2], 2), "use_correction": False, "df_correction": True}
        fit = regression.OLS(np.append(harm[0], placebo[0]), sides).fit(cov_type="cluster", cov_kwds=groups)
        value = fit.params[0] - fit.params[1]
        error = math.sqrt(k / (k - 1) * float(np.array([1, -1]) @ fit.cov_params() @ np.array([1, -1])))
        reach = scipy_stats.t.ppf(0.975, k - 1) * error
        assert found.value == pytest.approx(value)
        assert (found.low, found.high) == pytest.approx((value - reach, value + reach))

    @pytest.mark.parametrize("k", [14, 20])
    def test_what_both_sides_share_cancels(self, k: int) -> None:
        generator = rng(3)
        total = generator.lognormal(size=k)
        shared = generator.normal(size=k)
        found = shares.slope_difference(
            total * (0.7 + shared), total, total * (0.2 + shared) + 0.01, total, range(k), rng(), RESAMPLES
        )
        assert found.value == pytest.approx(0.5, abs=0.02)
        assert found.high - found.low < 0.02  # alone each is known to 0.5 or so

    def test_studentised_difference_longhand(self) -> None:
        harm, placebo = effects_of(16), effects_of(16, seed=2, level=0.5)
        table = np.stack([harm[0], harm[1], placebo[0], placebo[1]])

        def difference_and_error(drawn: Any) -> tuple[float, float]:
            e, t, f, u = table[:, drawn]
            first, second = (e * t).sum() / (t * t).sum(), (f * u).sum() / (u * u).sum()
            each = t * (e - first * t) / (t * t).sum() - u * (f - second * u) / (u * u).sum()
            return first - second, math.sqrt(16 / 15 * float((each**2).sum()))

        value, error = difference_and_error(np.arange(16))
        draws = (difference_and_error(rng(seed).integers(16, size=16)) for seed in range(6000))
        roots = [(found - value) / its_error for found, its_error in draws]
        low, high = value - np.quantile(roots, [0.975, 0.025]) * error
        found = shares.slope_difference(*harm[:2], *placebo[:2], harm[2], rng())
        assert (found.low, found.high) == pytest.approx((low, high), abs=0.05 * (high - low))

    def test_no_spread_and_the_unknown(self) -> None:
        total = rng(5).lognormal(size=16)
        exact = shares.slope_difference(0.7 * total, total, 0.2 * total, total, range(16), rng(), RESAMPLES)
        assert exact.low == exact.value == exact.high == pytest.approx(0.5)
        assert exact.reason == "no spread"
        none = shares.slope_difference(total, total, total, 0 * total, range(16), rng(), RESAMPLES)
        assert math.isnan(none.value)
        assert none.reason == "every total effect of a side is 0"
        assert shares.slope_difference([1.0], [1.0], [1.0], [1.0], [0], rng()).reason == "one cluster only"


class TestGate:
    HARM = np.array([3.0, 4.0, 5.0, 4.5, 3.5, 4.2, 3.9, 4.8])
    NEAR = HARM + np.array([0.3, -0.3] * 4)

    def verdict(self, harm: Any, placebo: Any, k: int = 8) -> str:
        return shares.gate(harm, placebo, range(k), rng(), RESAMPLES).verdict

    @pytest.mark.parametrize("sign", [1, -1])
    def test_verdicts_whichever_way_harm_acts(self, sign: int) -> None:
        harm = sign * self.HARM
        assert self.verdict(harm, 0.2 * harm) == ""
        assert self.verdict(harm, -harm) == ""
        assert self.verdict(harm, sign * self.NEAR) == "not about harm"
        assert self.verdict(harm, 2 * harm) == "not about harm"
        assert self.verdict(harm, None) == "placebo not tested"

    def test_no_effect_comes_first(self) -> None:
        spans = np.array([1.0, -1.0] * 4)
        assert self.verdict(spans, None) == "no effect"
        assert self.verdict(spans, -10 - spans) == "no effect"

    def test_pairs_without_a_placebo_are_left_out_of_the_difference(self) -> None:
        placebo = np.where(np.arange(8) < 5, 0.2 * self.HARM, NaN)
        found = shares.gate(-self.HARM, -placebo, range(8), rng())
        assert found.verdict == ""
        assert (found.te_harm.n_pairs, found.te_placebo.n_pairs, found.excess.n_pairs) == (8, 5, 5)
        assert found.excess.value == pytest.approx(0.8 * self.HARM[:5].mean())
        assert found.te_harm == shares.share_exceeds(-self.HARM, np.ones(8), range(8), rng(), 0.0)
        assert self.verdict(self.HARM, np.where(np.arange(8) < 1, 0.0, NaN)) == "placebo not tested"

    def test_bad_input(self) -> None:
        with pytest.raises(ValueError, match=r"\(8,\) and \(7,\)"):
            shares.gate(self.HARM, self.HARM[1:], range(8), rng())


def test_the_mean_behind_a_verdict_is_that_of_estimate_means() -> None:
    effect, total, clusters = effects_of(10, size=2)
    plain = stats.estimate_means((effect - 0.5 * total)[None], clusters, rng())[0]
    found = shares.share_exceeds(effect, total, clusters, rng(), 0.5)
    assert (found.value, found.low, found.high) == pytest.approx((plain.value, plain.low, plain.high))


@pytest.mark.parametrize("resamples", [1, 19, 39, 199, 999])
def test_counting_roots_says_what_the_ends_of_intervals_say(resamples: int) -> None:
    """Values at every root, next to it and between, so that many lie where a quantile is; some roots are lost."""
    draws = rng(resamples)
    roots = draws.standard_t(4, resamples)
    error = draws.uniform(0.5, 2, 6)
    places = np.sort(np.concatenate([roots, roots + 1e-9, roots - 1e-9, np.nextafter(roots, 0), [0.0, 9.0, -9.0]]))
    value = (places[:, None] * error).ravel()
    errors = np.tile(error, len(places))
    errors[::7] = 0.0
    rows = np.tile(roots, (len(value), 1))
    rows[::5, : resamples // 3] = np.nan
    ends = intervals.studentised_ends(value, errors, 20, rows)
    expected = (ends.low <= 0) & (ends.high >= 0) & (errors > 0)
    assert intervals.hold_zero(value, errors, 20, rows).tolist() == expected.tolist()
    assert resamples < 39 or 0 < expected.sum() < len(expected)


def test_without_roots_the_ends_of_t_say_it() -> None:
    value, error = np.array([-3.0, -0.1, 0.0, 0.1, 3.0, 0.0]), np.array([1.0] * 5 + [0.0])
    assert intervals.hold_zero(value, error, 8, None).tolist() == [False, True, True, True, False, False]
