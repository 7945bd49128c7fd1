"""Detectors against counting longhand, and AUROC against pairs, enumeration and scikit-learn."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import pytest
import scipy.stats as untyped_scipy  # pyright: ignore[reportMissingTypeStubs]
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score
from statsmodels.stats import proportion as untyped_proportion  # pyright: ignore[reportMissingTypeStubs]

from remote_mediation.analyses.monitor.detectors import (
    DETECTOR_COLUMNS,
    DISCOVERY,
    RANDOM,
    Scored,
    detector,
    detector_table,
    gate_scores,
)
from remote_mediation.stats import Interval, auroc

scipy_stats, proportion = (cast(Any, m) for m in (untyped_scipy, untyped_proportion))
NaN = math.nan


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def area_longhand(scores: Sequence[float], labels: Sequence[int]) -> float:
    """Pairs of a positive and a negative that are in order, ties half, over all such pairs."""
    pairs = [(p, q) for p, a in zip(scores, labels, strict=True) for q, b in zip(scores, labels, strict=True) if a > b]
    return sum(1.0 if p > q else 0.5 if p == q else 0.0 for p, q in pairs) / len(pairs)


def scored(positives: Sequence[float], negatives: Sequence[float], per_cluster: int = 1) -> Scored:
    """Prompts in clusters of neighbours."""
    n = len(positives) + len(negatives)
    return Scored([*positives, *negatives], [1] * len(positives) + [0] * len(negatives), np.arange(n) // per_cluster)


def paired(shift: float, pairs: int = 60, seed: int = 0) -> Scored:
    """Pairs, three to a cluster; harmful prompts score higher by shift standard deviations."""
    labels = np.tile([1, 0], pairs)
    return Scored(labels * shift + rng(seed).normal(size=2 * pairs), labels, np.arange(2 * pairs) // 6)


def assert_wilson(found: Interval, successes: int, n: int) -> None:
    low, high = proportion.proportion_confint(successes, n, method="wilson")
    assert (found.value, found.low, found.high) == pytest.approx((successes / n, low, high), abs=1e-9)


class TestAuroc:
    @pytest.mark.parametrize("seed", range(5))
    def test_counts_pairs_in_order_and_ties_half(self, seed: int) -> None:
        generator = rng(seed)
        labels = generator.permutation([1] * 9 + [0] * 14)
        scores = generator.integers(6, size=23).astype(float)
        found = auroc(scores, labels, np.arange(23) % 7, rng(), 19)
        assert found.value == pytest.approx(area_longhand(scores.tolist(), labels.tolist()))
        assert found.value == pytest.approx(roc_auc_score(labels, scores))
        assert (found.n_pairs, found.n_clusters) == (23, 7)

    def test_interval_matches_all_resamples_enumerated(self) -> None:
        """Clusters of unequal size; a resample counts every copy, as if its prompts were written down again."""
        clusters = [[(3.0, 1), (1.0, 0)], [(2.0, 1), (2.5, 0), (0.0, 0)], [(1.5, 1), (0.5, 1), (1.2, 0)]]
        clusters += [[(2.2, 1), (2.4, 0)], [(0.3, 1), (0.1, 0)]]
        areas = []
        for drawn in itertools.product(clusters, repeat=5):
            items = [item for cluster in drawn for item in cluster]
            areas.append(area_longhand([s for s, _ in items], [y for _, y in items]))
        tail = scipy_stats.norm.cdf(scipy_stats.t.ppf(0.025, df=4) * math.sqrt(5 / 4))
        low, high = scipy_stats.quantile(np.array(areas), np.array([tail, 1 - tail]))
        items = [(s, y, c) for c, cluster in enumerate(clusters) for s, y in cluster]
        found = auroc(*(np.array(column) for column in zip(*items, strict=True)), rng(), 20_000)
        assert (found.low, found.high) == pytest.approx((low, high), abs=0.03)
        assert found.reason == "only 5 clusters: the interval covers 94% at most"

    def test_interval_covers_and_would_not_if_clusters_were_ignored(self) -> None:
        """Half of each cluster positive, all of its scores moved by one number per class."""
        labels, names = np.tile([1, 0], 90), np.repeat(np.arange(15), 12)

        def covered(clusters: NDArray[Any]) -> float:
            hits = []
            for seed in range(150):
                moved = rng(seed).normal(size=(15, 2))[names, labels]
                found = auroc(moved + 0.3 * rng(seed + 999).normal(size=180), labels, clusters, rng(), 499)
                hits.append(found.low <= 0.5 <= found.high)
            return float(np.mean(hits))

        assert covered(names) > 0.88
        assert covered(np.arange(180)) < 0.7

    @pytest.mark.parametrize(("sign", "successes"), [(1, 10), (-1, 0)])
    def test_one_order_throughout_has_a_wilson_interval_of_disjoint_pairs_of_clusters(
        self, sign: int, successes: int
    ) -> None:
        labels = np.tile([1, 0], 40)
        found = auroc(sign * labels, labels, np.arange(80) // 4, rng(), 99)
        assert_wilson(found, successes, 10)
        assert found.reason == "Wilson interval of 10 disjoint pairs of clusters, all in one order"
        unpaired = auroc([2.0, *[1.0] * 39], [1] + [0] * 39, range(40), rng(), 99)
        assert unpaired.n_clusters == 40
        assert "of 1 disjoint pairs" in unpaired.reason

    def test_what_cannot_be_known_is_nan_with_a_reason(self) -> None:
        for labels, reason in (([1, 1, 1, 1], "no negatives"), ([0, 0, 0, 0], "no positives")):
            found = auroc([1.0, 2.0, 3.0, NaN], labels, range(4), rng(), 9)
            assert np.isnan([found.value, found.low, found.high]).all()
            assert found.reason == f"{reason}; 1 of 4 items dropped: not finite"
        one = auroc([2.0, 1.0, 0.0, NaN], [1, 0, 0, 1], [0] * 4, rng(), 9)
        assert (one.value, one.reason) == (1, "one cluster only; 1 of 4 items dropped: not finite")
        assert np.isnan([one.low, one.high]).all()

    @pytest.mark.parametrize(
        ("labels", "clusters", "message"),
        [([0, 1], [0, 1, 2], "must both be"), ([0, 1, 2], [0, 1, 2], "0 or 1"), ([0, 1, 1], [0, 1], "one label for")],
    )
    def test_refuses(self, labels: list[int], clusters: list[int], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            auroc([1.0, 2.0, 3.0], labels, clusters, rng())


class TestGateScores:
    def test_is_the_sum_of_z_scores_times_the_difference_of_class_means(self) -> None:
        generator = rng(1)
        labels = generator.permutation([1] * 8 + [0] * 12)
        fit, other = generator.normal(size=(20, 3)) * [1, 10, 0.1] + 4, generator.normal(size=(5, 3))
        (found,) = gate_scores(fit, labels, other)
        for prompt, score in zip(other, found, strict=True):
            total = 0.0
            for neuron in range(3):
                mean, spread = np.mean(fit[:, neuron]), np.std(fit[:, neuron])
                z = (fit[:, neuron] - mean) / spread
                total += (z[labels == 1].mean() - z[labels == 0].mean()) * (prompt[neuron] - mean) / spread
            assert score == pytest.approx(total)

    def test_one_neuron_is_its_activity_up_to_sign(self) -> None:
        labels = np.array([1, 0, 1, 0])
        falling = np.array([[1.0], [5.0], [2.0], [4.0]])
        (scores,) = gate_scores(falling, labels, falling)
        assert np.argsort(scores).tolist() == [1, 3, 2, 0]

    def test_a_constant_neuron_counts_for_nothing(self) -> None:
        labels, fit = np.array([1, 0, 1, 0]), np.array([[1.0, 7], [5, 7], [2, 7], [4, 7]])
        (alone,), (beside,) = (
            gate_scores(fit[:, :1], labels, fit[:, :1]),
            gate_scores(fit, labels, fit + np.array([0, 9])),
        )
        assert beside == pytest.approx(alone)

    def test_the_others_have_no_say(self) -> None:
        labels, fit = np.array([1, 0, 1, 0]), np.array([[1.0], [5.0], [2.0], [4.0]])
        one, both = gate_scores(fit, labels, fit[:1]), gate_scores(fit, labels, fit[:1], 100 * fit)
        assert one[0].tolist() == both[0].tolist()

    def test_refuses_one_class(self) -> None:
        with pytest.raises(ValueError, match="labels given are all the same"):
            gate_scores(np.zeros((3, 1)), [1, 1, 1])


class TestDetector:
    FIT = scored(positives=range(1, 21), negatives=[0.0] * 20)
    """20 positives with scores 1 to 20: 95% recall is 19 of them, down to 2; 90% is 18, down to 3."""
    JUDGED = scored(positives=[*range(2, 22), 0.5, 2.5], negatives=[0, 0, 2, 2.2, 2.9, 3, 3, 4, 5, 6, -1, 30])

    def test_thresholds_come_from_the_discovery_split_and_are_judged_on_the_other(self) -> None:
        at_90, at_95 = detector(self.FIT, self.JUDGED, rng()).operating
        assert (at_90.recall, at_90.threshold) == (0.9, 3)
        assert (at_95.recall, at_95.threshold) == (0.95, 2)
        assert_wilson(at_90.reached, 19, 22)
        assert_wilson(at_90.false_alarms, 6, 12)
        assert_wilson(at_95.reached, 21, 22)
        assert_wilson(at_95.false_alarms, 9, 12)

    def test_false_alarms_at_a_recall_of_the_evaluation_take_its_own_threshold(self) -> None:
        """22 positives: 90% recall is 20 of them, down to 2.5; 95% is 21, down to 2."""
        at_90, at_95 = detector(self.FIT, self.JUDGED, rng()).operating
        assert_wilson(at_90.false_alarms_at_recall, 7, 12)
        assert_wilson(at_95.false_alarms_at_recall, 9, 12)
        assert detector(self.FIT, self.JUDGED, rng()).positives == 22

    @pytest.mark.parametrize("n", [10, 20, 30, 40, 57, 60, 100, 140, 180])
    def test_threshold_has_the_recall_and_the_next_has_not(self, n: int) -> None:
        positives = rng(n).permutation(n).tolist()
        for operating in detector(scored(positives, [0.0]), self.JUDGED, rng()).operating:
            if math.isnan(operating.threshold):
                assert n < 20
                continue
            percent = round(100 * operating.recall)
            assert 100 * sum(s >= operating.threshold for s in positives) >= percent * n
            assert 100 * sum(s > operating.threshold for s in positives) < percent * n

    def test_a_recall_takes_positives_enough_to_miss_one(self) -> None:
        found = detector(scored(range(10), [0.0] * 5), scored(range(9), [0.0] * 5), rng())
        at_90, at_95 = found.operating
        assert at_90.threshold == 1
        assert at_90.reached.value == pytest.approx(8 / 9)
        assert math.isnan(at_90.false_alarms_at_recall.value)
        assert np.isnan([at_95.threshold, at_95.reached.value, at_95.false_alarms.low]).all()
        assert found.reason == (
            "AUROC: undefined in 12 of 9999 resamples; 90% recall takes 10 positives, in the evaluation there are 9; "
            "95% recall takes 20 positives, in the discovery split there are 10; "
            "95% recall takes 20 positives, in the evaluation there are 9"
        )

    def test_one_class_only(self) -> None:
        harmless = detector(self.FIT, scored([], [0.0, 1.0, 2.0, 3.0]), rng())
        assert math.isnan(harmless.auroc.value)
        assert_wilson(harmless.operating[0].false_alarms, 1, 4)
        assert math.isnan(harmless.operating[0].reached.value)
        assert harmless.reason.startswith("AUROC: no positives; ")
        harmful = detector(self.FIT, scored(range(20), []), rng())
        assert harmful.operating[1].reached.value == 18 / 20
        assert math.isnan(harmful.operating[1].false_alarms.value)

    def test_auroc_is_that_of_the_evaluation(self) -> None:
        judged = paired(1.0)
        found = detector(paired(3.0, seed=1), judged, rng())
        assert found.auroc == auroc(judged.scores, judged.labels, judged.clusters, rng())

    def test_refuses_scores_that_are_not_finite(self) -> None:
        with pytest.raises(ValueError, match="1 of 3 scores are not finite"):
            detector(self.FIT, scored([NaN, 1.0], [0.0]), rng())


def sets(shift: float, seed: int) -> dict[str, Scored]:
    names = (DISCOVERY, "heldout", "hard_negatives")
    return {name: paired(shift, seed=10 * seed + number) for number, name in enumerate(names)}


class TestTable:
    GATES, PROBE = sets(2.0, 1), sets(3.0, 2)
    CHANCE = tuple(sets(0.1 * (seed % 5), seed) for seed in range(3, 23))

    def table(self) -> Any:
        return detector_table({"gates": self.GATES, "residual probe": self.PROBE}, rng(), self.CHANCE)

    def test_has_every_detector_on_every_evaluation(self) -> None:
        table = self.table()
        assert list(table.columns) == list(DETECTOR_COLUMNS)
        assert list(zip(table["detector"], table["evaluation"], strict=True)) == [
            (name, evaluation)
            for name in ("gates", "residual probe", RANDOM)
            for evaluation in ("heldout", "hard_negatives")
        ]
        assert set(table["n"]) == {120}
        assert set(table["clusters"]) == {20}
        assert set(table["positives"]) == {60}

    def test_numbers_are_those_of_the_detector(self) -> None:
        row = self.table().iloc[3]
        found = detector(self.PROBE[DISCOVERY], self.PROBE["hard_negatives"], rng(int(rng().integers(2**63))))
        assert [row[f"auroc{end}"] for end in ("", "_low", "_high")] == [
            found.auroc.value,
            found.auroc.low,
            found.auroc.high,
        ]
        for percent, operating in zip((90, 95), found.operating, strict=True):
            assert row[f"threshold_{percent}"] == operating.threshold
            for name, rate in (
                ("recall", operating.reached),
                ("false_alarms", operating.false_alarms),
                ("false_alarms_at", operating.false_alarms_at_recall),
            ):
                shown = [row[f"{name}_{percent}{end}"] for end in ("", "_low", "_high")]
                assert shown == [rate.value, rate.low, rate.high]

    def test_random_sets_are_one_row_of_their_own(self) -> None:
        row = self.table().iloc[4]
        areas = [area_longhand(list(s["heldout"].scores), list(s["heldout"].labels)) for s in self.CHANCE]
        assert row["auroc"] == pytest.approx(np.median(areas))
        assert [row["auroc_low"], row["auroc_high"]] == pytest.approx(np.quantile(areas, [0.025, 0.975]))
        assert row["random_sets"] == 20
        assert np.isnan([row["rank"], row["threshold_90"], row["false_alarms_at_95"]]).all()

    def test_rank_counts_the_random_sets_at_least_as_good(self) -> None:
        table = self.table()
        assert (table.loc[0, "rank"], table.loc[0, "p"]) == (1, 1 / 21)
        middling = detector_table({"one of them": self.CHANCE[7]}, rng(), self.CHANCE)
        areas = [area_longhand(list(s["heldout"].scores), list(s["heldout"].labels)) for s in self.CHANCE]
        better = sum(area >= areas[7] for area in areas)
        assert 1 < better < 20
        assert middling.loc[0, "rank"] == 1 + better
        assert middling.loc[0, "p"] == pytest.approx((1 + better) / 21)

    def test_without_random_sets_there_is_no_rank(self) -> None:
        table = detector_table({"gates": self.GATES}, rng())
        assert table["rank"].isna().all()
        assert table["random_sets"].tolist() == [0, 0]

    def test_no_detectors_are_an_empty_table(self) -> None:
        assert list(detector_table({}, rng()).columns) == list(DETECTOR_COLUMNS)

    def test_refuses_a_detector_without_a_discovery_split(self) -> None:
        with pytest.raises(ValueError, match="'gates' has no scores of the 'discovery' split; it has \\['heldout'\\]"):
            detector_table({"gates": {"heldout": paired(1.0)}}, rng())
