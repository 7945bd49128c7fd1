"""Probes against scikit-learn used longhand, planted harm, and data in which harm cannot be read."""

from __future__ import annotations

import math
from typing import Any, cast

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from statsmodels.stats import multitest as untyped_multitest  # pyright: ignore[reportMissingTypeStubs]
from statsmodels.stats import proportion as untyped_proportion  # pyright: ignore[reportMissingTypeStubs]

from remote_mediation import probes
from remote_mediation.probes import PROBE_COLUMNS, earlier, onset, probe, probe_profile

multitest, proportion = (cast(Any, m) for m in (untyped_multitest, untyped_proportion))
NaN = math.nan
PAIRS_PER_CLUSTER = 3
Data = tuple[NDArray[Any], NDArray[Any], NDArray[Any]]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def prompts(clusters: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Labels and clusters of pairs, harmful and harmless in turn; cluster labels are not in sorted order."""
    names = np.repeat([f"template-{7 * c % 101}" for c in range(clusters)], 2 * PAIRS_PER_CLUSTER)
    return np.tile([1, 0], clusters * PAIRS_PER_CLUSTER), names


def planted(strength: float, clusters: int = 20, width: int = 60, seed: int = 0) -> Data:
    """Noise, and one direction that harm has in all clusters."""
    labels, names = prompts(clusters)
    generator = rng(seed)
    harm = np.outer(labels - 0.5, generator.normal(size=width))
    return generator.normal(size=harm.shape) + strength * harm, labels, names


def accidental(clusters: int, width: int, seed: int, noise: float = 0.1) -> Data:
    """Harm has a direction of its own in every cluster, shared by all pairs of the cluster and by no other cluster."""
    labels, names = prompts(clusters)
    generator = rng(seed)
    directions = np.repeat(generator.normal(size=(clusters, width)), 2 * PAIRS_PER_CLUSTER, axis=0)
    return (labels - 0.5)[:, None] * directions + noise * generator.normal(size=directions.shape), labels, names


class TestProbe:
    def test_planted_harm_is_read(self) -> None:
        found = probe(*planted(0.6), rng(), repetitions=99)
        assert found.accuracy.value > 0.85
        assert found.auroc.value > 0.93
        assert found.accuracy.low > found.control_high
        assert found.p == 0.01
        assert (found.folds, found.reason) == (5, "")
        assert (found.accuracy.n_pairs, found.accuracy.n_clusters) == (120, 20)

    @pytest.mark.parametrize("seed", range(3))
    def test_nothing_is_read_from_noise(self, seed: int) -> None:
        found = probe(*planted(0, seed=seed), rng(seed), repetitions=99)
        assert found.accuracy.low < 0.5 < found.accuracy.high
        assert found.auroc.low < 0.5 < found.auroc.high
        assert found.control == pytest.approx(0.5, abs=0.03)
        assert 0.52 < found.control_high < 0.68
        assert found.p > 0.05

    def test_what_is_known_of_a_cluster_is_of_no_use_and_would_be_if_folds_split_clusters(self) -> None:
        features, labels, names = accidental(20, 60, seed=1)
        assert probe(features, labels, names, rng(), repetitions=9).accuracy.value < 0.65
        assert probe(features, labels, range(len(labels)), rng(), repetitions=9).accuracy.value > 0.95

    def test_a_cluster_has_no_say_in_its_own_scores(self) -> None:
        features, labels, names = planted(0.3)
        own = names == names[0]
        changed = np.where(own[:, None], features + 100.0, features)
        before = probe(features, labels, names, rng(), repetitions=1)
        after = probe(changed, np.where(own, 1 - labels, labels), names, rng(), repetitions=1)
        shift = after.scores[own] - before.scores[own]
        assert shift == pytest.approx(shift[0])
        assert not np.allclose(after.scores[~own], before.scores[~own], atol=1e-3)

    def test_scores_are_those_of_scikit_learn_fold_by_fold(self) -> None:
        features, labels, names = planted(0.3, clusters=2)
        found = probe(features, labels, names, rng(), repetitions=1)
        assert found.folds == 2
        for name in np.unique(names):
            fit, judge = names != name, names == name
            scaler = StandardScaler().fit(features[fit])
            model = LogisticRegression(C=1 / 60, tol=1e-8).fit(scaler.transform(features[fit]), labels[fit])
            expected = model.decision_function(scaler.transform(features[judge]))
            assert found.scores[judge] == pytest.approx(expected, abs=1e-4)

    def test_folds_are_shuffled_by_the_generator_alone(self) -> None:
        data = planted(0.3)
        one, same, other = (probe(*data, rng(seed), repetitions=9) for seed in (0, 0, 1))
        assert np.array_equal(one.scores, same.scores)
        assert (one.accuracy, one.p, one.control) == (same.accuracy, same.p, same.control)
        assert not np.allclose(one.scores, other.scores, atol=1e-3)

    def test_accuracy_without_an_error_has_the_wilson_interval_of_its_clusters(self) -> None:
        found = probe(*planted(5.0), rng(), repetitions=9)
        low, _ = proportion.proportion_confint(20, 20, method="wilson")
        assert (found.accuracy.value, found.accuracy.high) == (1, 1)
        assert found.accuracy.low == pytest.approx(low)
        assert (found.accuracy.method, found.reason) == ("Wilson, worth 20 items", "")

    def test_few_clusters_are_few_folds(self) -> None:
        found = probe(*planted(0.6, clusters=3), rng(), repetitions=9)
        assert found.folds == 3
        assert found.reason.startswith("3 folds, as there are only 3 clusters")

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            (lambda x, y, c: (x, y, np.zeros(len(y))), "one cluster only"),
            (lambda x, y, c: (x, np.ones(len(y)), c), "one class only"),
            (lambda x, y, c: (np.where(np.arange(len(x))[:, None] < 2, NaN, x), y, c), "2 of 120 prompts have acti"),
            (lambda x, y, c: (x, y, y), "a fold leaves one class only to fit to"),
            (lambda x, y, c: (x[:0], y[:0], c[:0]), "one class only"),
        ],
    )
    def test_what_cannot_be_known_is_nan_with_a_reason(self, change: Any, reason: str) -> None:
        found = probe(*change(*planted(0.6)), rng(), repetitions=9)
        values = (
            found.accuracy.value,
            found.accuracy.low,
            found.auroc.value,
            found.control,
            found.control_high,
            found.p,
        )
        assert np.isnan(values).all()
        assert found.reason.startswith(reason)

    def test_without_half_of_each_class_in_a_cluster_there_is_no_control(self) -> None:
        features, labels, names = planted(0.6)
        found = probe(features[1:], labels[1:], names[1:], rng(), repetitions=9)
        assert found.accuracy.value > 0.8
        assert np.isnan([found.control, found.control_high, found.p]).all()
        assert found.reason == "no control: labels in a cluster are not half and half"

    @pytest.mark.parametrize(
        ("features", "labels", "settings", "message"),
        [
            (np.zeros((4, 2)), [0, 1, 2, 1], {}, "must be 0 or 1"),
            (np.zeros(4), [0, 1, 0, 1], {}, r"must be \[prompt, width\]"),
            (np.zeros((4, 2)), [0, 1, 0], {}, r"must be \[prompt, width\]"),
            (np.zeros((4, 2)), [0, 1, 0, 1], {"folds": 1}, "folds must be at least 2"),
            (np.zeros((4, 2)), [0, 1, 0, 1], {"repetitions": 0}, "repetitions at least 1"),
        ],
    )
    def test_refuses(self, features: Any, labels: Any, settings: dict[str, int], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            probe(features, labels, [0, 0, 1, 1], rng(), **settings)


class TestControl:
    @pytest.mark.parametrize("shape", [(40, 90), (90, 40), (60, 60)])
    def test_fits_of_many_labellings_are_those_of_scikit_learn(self, shape: tuple[int, int]) -> None:
        """Rotated onto singular vectors and solved together, against the plain pipeline, one labelling at a time."""
        generator = rng(3)
        scale = generator.exponential(size=shape[1])
        features, judged = (generator.normal(size=(n, shape[1])) * scale + 5 for n in (shape[0], 7))
        features[:, 0] = 2.0  # constant: has no direction
        labels = generator.integers(2, size=(shape[0], 4)).astype(bool)
        labels[:, 3] = features[:, 1] > 5  # can be read
        scores = probes.fit_many(features, labels, judged)
        for column in range(4):
            (expected,) = probes.fit_scores(features, labels[:, column], judged)
            assert scores[:, column] == pytest.approx(expected, abs=3e-4)

    @pytest.mark.parametrize("apart", [0.0, 3.0, 300.0])
    def test_a_fit_of_one_labelling_is_that_of_scikit_learn(self, apart: float) -> None:
        """Solved in the prompts' products, against the plain pipeline in all 90 directions."""
        generator = rng(4)
        scale = 10.0 ** generator.normal(size=90)
        features, asked = (generator.normal(size=(n, 90)) * scale + 5 for n in (21, 7))
        features[:, 0] = 2.0  # constant: has no direction
        labels = generator.permutation(21) % 2
        features[labels == 1] += apart
        (expected,) = probes.fit_scores(features, labels, asked)
        found = probes.fit_many(features, labels[:, None] == 1, asked)[:, 0]
        assert found == pytest.approx(expected, abs=1e-4, rel=1e-5)

    def test_unswapped_labels_would_give_the_probe_itself(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Never(np.random.Generator):
            def integers(self, *args: Any, **kwargs: Any) -> Any:
                drawn = super().integers(*args, **kwargs)
                return np.zeros_like(drawn) if np.ndim(drawn) == 2 else drawn

        found = probe(*planted(0.2), Never(np.random.PCG64(0)), repetitions=3)
        assert 0.5 < found.accuracy.value < 1
        assert found.control == found.control_high == pytest.approx(found.accuracy.value)
        assert found.p == 1

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "null",
        [
            pytest.param(lambda seed: planted(0, clusters=8, width=10, seed=seed), id="noise"),
            pytest.param(lambda seed: accidental(8, 10, seed), id="pairs of a cluster share an accident"),
        ],
    )
    def test_p_is_uniform_where_there_is_nothing_to_read(self, null: Any) -> None:
        """Swapping pairs one by one fails the second: a false alarm on a fifth of such data in place of a tenth."""
        p = np.array([probe(*null(seed), rng(seed), repetitions=39).p for seed in range(150)])
        assert 0.03 < np.mean(p <= 0.1) < 0.17
        assert 0.36 < np.mean(p <= 0.5) < 0.62

    def test_high_end_is_an_accuracy_that_occurred(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(probes, "_control", lambda *_: (np.linspace(0.4, 0.6, 11), ""))
        found = probe(*planted(0.2), rng())
        assert (found.control, found.control_high) == pytest.approx((0.5, 0.6))

    def test_p_counts_the_labelling_measured(self) -> None:
        assert probe(*planted(0.6), rng(), repetitions=19).p == 0.05


def features_by_position() -> tuple[dict[str, NDArray[Any]], NDArray[Any], NDArray[Any]]:
    """Three layers; harm is read at `edit` from layer 1 on, and nowhere at `last`."""
    layers = [planted(strength, seed=seed)[0] for seed, strength in enumerate((0, 0.7, 0.9))]
    noise = [planted(0, seed=seed)[0] for seed in (10, 11, 12)]
    return {"edit": np.stack(layers, axis=1), "last": np.stack(noise, axis=1)}, *prompts(20)


class TestProfile:
    def test_has_a_row_for_every_position_and_layer(self) -> None:
        features, labels, names = features_by_position()
        profile = probe_profile(features, labels, names, rng(), repetitions=199)
        assert list(profile.columns) == list(PROBE_COLUMNS)
        assert profile["position"].tolist() == ["edit"] * 3 + ["last"] * 3
        assert profile["layer"].tolist() == [0, 1, 2] * 2
        assert profile["relative_depth"].tolist() == [0, 0.5, 1] * 2
        assert set(profile["n"]) == {120}
        assert set(profile["clusters"]) == {20}
        assert profile["q"].to_numpy() == pytest.approx(multitest.multipletests(profile["p"], method="fdr_bh")[1])
        assert onset(profile) == {"edit": 1, "last": None}

    def test_a_row_is_the_probe_of_its_layer_whatever_else_is_probed(self) -> None:
        features, labels, names = features_by_position()
        both = probe_profile(features, labels, names, rng(), repetitions=19)
        last = probe_profile({"last": features["last"][:, 1:2]}, labels, names, rng(), repetitions=19)
        shared = [c for c in PROBE_COLUMNS if c not in ("layer", "relative_depth", "q")]
        assert both[shared].iloc[4].tolist() == last[shared].iloc[0].tolist()
        alone = probe(features["edit"][:, 1], labels, names, rng(int(rng().integers(2**63))), repetitions=19)
        expected = (alone.accuracy.value, alone.auroc.low, alone.control_high, alone.p)
        assert tuple(both.loc[1, ["accuracy", "auroc_low", "control_high", "p"]]) == expected
        assert last["relative_depth"].tolist() == [0]

    def test_a_layer_that_cannot_be_probed_is_left_out_of_the_family(self) -> None:
        features, labels, names = features_by_position()
        features["edit"][0, 0, 0] = np.inf
        profile = probe_profile(features, labels, names, rng(), repetitions=19)
        assert np.isnan(profile.loc[0, ["accuracy", "p", "q"]].to_numpy(float)).all()
        assert "not finite" in profile.loc[0, "reason"]
        assert profile["q"].notna().sum() == 5

    def test_refuses_a_table_without_layers(self) -> None:
        with pytest.raises(ValueError, match=r"must be \[prompt, layer, width\]; got shape \(120, 60\) at 'last'"):
            probe_profile({"last": planted(0)[0]}, *prompts(20), rng())


def profile_of(*rows: dict[str, float]) -> pd.DataFrame:
    """Rows of one position, layer by layer; readable unless said otherwise."""
    readable = {"q": 0.01, "low": 0.7, "high": 0.9, "control_high": 0.6, "position": "last"}
    return pd.DataFrame([readable | {"layer": layer} | row for layer, row in enumerate(rows)])


@pytest.mark.parametrize(
    ("first", "settings", "expected"),
    [
        ({}, {}, 0),
        ({"q": 0.05}, {}, 0),
        ({"q": 0.06}, {}, 1),
        ({"q": 0.06}, {"alpha": 0.1}, 0),
        ({"q": NaN}, {}, 1),
        ({"low": 0.6}, {}, 1),
        ({"low": 0.45, "control_high": 0.4}, {}, 1),
        ({}, {"floor": 0.8}, None),
    ],
)
def test_onset_is_the_first_layer_that_passes_every_bar(first: Any, settings: Any, expected: int | None) -> None:
    assert onset(profile_of(first, {}), **settings) == {"last": expected}


def nie_of(*intervals: tuple[float, float, float]) -> pd.DataFrame:
    """NIE by layer as (low, high, q), last layer first."""
    rows = [{"layer": n, "ci_low": low, "ci_high": high, "q": q} for n, (low, high, q) in enumerate(intervals)]
    return pd.DataFrame(rows[::-1])


QUIET, UNSURE, ACTIVE = (-0.02, 0.04, 0.5), (-0.2, 0.4, 0.5), (0.3, 0.8, 0.01)
DARK, DIM = {"q": 0.5, "high": 0.6}, {"q": 0.5, "high": 0.8}


@pytest.mark.parametrize(
    ("probed", "nie", "readable", "acts", "verdict", "why"),
    [
        ([DARK, {}, {}], [QUIET, QUIET, ACTIVE], 1, 2, "before", "NIE at layer 1 is at most 4% of TE"),
        ([DARK, {}, {}], [QUIET, UNSURE, ACTIVE], 1, 2, "undecided", "at most 40% of TE, not shown to be below 5%"),
        ([DARK, DARK, {}], [QUIET, QUIET, ACTIVE], 2, 2, "not before", "accuracy before layer 2 may be up to 60%"),
        ([DARK, DIM, {}], [QUIET, QUIET, ACTIVE], 2, 2, "undecided", "up to 80%, not shown to be below 75%"),
        ([DARK, DARK, DARK], [QUIET, ACTIVE, QUIET], None, 1, "not before", "accuracy before layer 1 may be up to 60%"),
        ([{}, {}, {}], [ACTIVE, QUIET, QUIET], 0, 0, "not before", "no layer comes before"),
        ([{}, {}, {}], [QUIET, QUIET, UNSURE], 0, None, "undecided", "without a layer that acts"),
        ([{}, {}], [(-0.8, -0.3, 0.01), ACTIVE], 0, 1, "before", "at most -30% of TE"),
        ([{}, {}], [(0.3, 0.8, 0.2), ACTIVE], 0, 1, "undecided", "at most 80% of TE"),
    ],
)
@pytest.mark.parametrize("sign", [1, -1])
def test_order(
    sign: int, probed: Any, nie: Any, readable: int | None, acts: int | None, verdict: str, why: str
) -> None:
    signed = nie_of(*((*sorted((sign * low, sign * high)), q) for low, high, q in nie))
    found = earlier(profile_of(*probed), signed, total=sign * 1.0)
    assert (found.readable, found.acts, found.verdict) == (readable, acts, verdict)
    assert why in found.finding


def test_order_says_both_layers_and_scales_by_te() -> None:
    found = earlier(profile_of(DARK, {}, {}), nie_of(QUIET, QUIET, ACTIVE), total=0.5)
    assert found.finding.startswith("harm is first readable after layer 1 and first acts after layer 2; ")
    assert found.verdict == "undecided"  # 0.04 of 0.5 is 8%
    assert earlier(profile_of(DARK, {}, {}), nie_of(QUIET, QUIET, ACTIVE), total=0.0).verdict == "undecided"
