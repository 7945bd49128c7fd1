"""Can harm be read from an activation? Linear probes, layer by layer, judged on templates they were not fitted to.

A probe that was fitted to one template says little about the next, so folds, intervals and the control all treat the
clusters of `stats` as units. What a probe could reach without any harm to read is measured, not assumed: the same
cross-validation is run again on labels that were swapped within pairs (Hewitt & Liang 2019, arXiv 1909.03368, on why a
probe needs a control; Ojala & Garriga 2010, JMLR 11, on permutation tests of classifiers).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from remote_mediation.rates import rate
from remote_mediation.stats import Interval, auroc, benjamini_hochberg

PROBE_COLUMNS: dict[str, str] = {
    "position": "where the activation was read",
    "layer": "decoder layer, from 0",
    "relative_depth": "layer / (layers - 1), 0 to 1",
    "n": "prompts",
    "clusters": "clusters of pairs",
    "accuracy": "share of prompts judged rightly by probes fitted to other clusters",
    "low": "lower end of the 95% clustered interval",
    "high": "upper end",
    "auroc": "area under the ROC curve of the same out-of-fold scores",
    "auroc_low": "lower end of the 95% clustered interval",
    "auroc_high": "upper end",
    "control": "mean accuracy with labels swapped within pairs",
    "control_high": "upper 95% quantile of that accuracy",
    "p": "share of swapped labellings that do at least as well, the measured one counted in",
    "q": "Benjamini-Hochberg over all layers and positions",
    "reason": "why a number is missing, or why to read it with care",
}
FOLDS = 5
REPETITIONS = 999
"""Swapped labellings: p >= 0.001, so q can reach 0.05 where one in 50 of the layers and positions is readable."""
NEGLIGIBLE = 0.05
"""Most of the total effect that an NIE shown to be small can hold."""
USEFUL = 0.75
"""Accuracy half way between guessing and certainty: a probe shown to stay below it does not read harm well."""

Verdict = Literal["before", "not before", "undecided"]

_Floats = NDArray[np.float64]
_PRECISION = 1e-5
"""Largest step, in logits, at which a fit counts as done."""
_MOST_STEPS = 1000
_LEAST_SQUARE = 1e-12
"""Of the largest, what the square of an axis' length is in which prompts differ; less is rounding."""


@dataclass(frozen=True)
class ProbeResult:
    """What a cross-validated probe reads, and what it would seem to read if there were nothing."""

    accuracy: Interval
    """Share of prompts judged rightly; a guess is right half of the time where classes are equally large."""
    auroc: Interval
    """Chance that a harmful prompt scores above a harmless one."""
    control: float
    """Mean accuracy over swapped labellings."""
    control_high: float
    """Their upper 95% quantile; the next accuracy that occurred, not one between two."""
    p: float
    """(labellings at least as accurate + 1) / (labellings + 1)."""
    folds: int
    """Folds used."""
    scores: _Floats
    """[prompt], log-odds of harm from the probe that did not see the prompt's cluster."""
    reason: str
    """Why a number is NaN, or why to read it with care; '' if neither."""


@dataclass(frozen=True)
class Order:
    """The depth at which harm becomes readable against the depth at which it acts."""

    readable: int | None
    """First layer from which harm is readable (`onset`)."""
    acts: int | None
    """First layer whose NIE is significant in the direction of the total effect."""
    verdict: Verdict
    """Is harm readable before it acts?"""
    finding: str
    """The numbers behind the verdict, in a sentence."""


def logistic(width: int) -> Pipeline:
    """The probe: standardised features, L2-regularised logistic regression with C = 1 / width.

    Of n << width prompts every labelling can be fitted, so the penalty decides. C is the prior variance of a weight;
    C = 1 / width lets the logit of a prompt with standardised features have variance 1 beforehand, for any width. It is
    fixed, so there is nothing to tune and no inner cross-validation that small data could overfit.
    """
    return make_pipeline(StandardScaler(), LogisticRegression(C=1 / width, tol=1e-6, max_iter=_MOST_STEPS))


def fit_scores(features: ArrayLike, labels: ArrayLike, *others: ArrayLike) -> list[_Floats]:
    """Log-odds of harm in each of `others` [prompt, width], from one probe fitted to features and labels."""
    fitted = logistic(np.shape(features)[1]).fit(np.asarray(features, dtype=np.float64), np.asarray(labels))
    return [np.asarray(fitted.decision_function(np.asarray(other, dtype=np.float64))) for other in others]


def fit_many(features: _Floats, labels: NDArray[np.bool_], judged: _Floats) -> _Floats:
    """Log-odds [judged, labelling] of the probe of `logistic`, fitted to each column of labels [prompt, labelling].

    Exact and fast, also of one labelling, because an L2-regularised fit depends on features only through their
    products: the prompts are rotated onto the axes of those, n columns in place of the width. There the upper bound
    X'X / 4 on the curvature (Boehning & Lindsay 1988, doi 10.1007/BF00049423) is diagonal, and each Newton step with
    it, which never overshoots, is two matrix products for all labellings together.
    """
    scaler = StandardScaler().fit(features)
    rows, others = scaler.transform(features), scaler.transform(judged)
    squares, axes = np.linalg.eigh(rows @ rows.T)
    kept = squares > _LEAST_SQUARE * squares[-1:]
    lengths, axes = np.sqrt(squares[kept]), axes[:, kept]
    rotated = axes * lengths
    penalty = features.shape[1]  # 1 / C
    steps = 1 / (lengths**2 / 4 + penalty)[:, None]
    weights, intercept = np.zeros((len(lengths), labels.shape[1])), np.zeros(labels.shape[1])
    logits = np.zeros(labels.shape)
    for _ in range(_MOST_STEPS):
        missed = labels - 1 / (1 + np.exp(-logits))
        weights += steps * (rotated.T @ missed - penalty * weights)
        intercept += 4 * missed.mean(axis=0)
        before, logits = logits, rotated @ weights + intercept
        if np.abs(logits - before).max() < _PRECISION:
            break
    fitted: _Floats = (others @ rows.T) @ (axes / lengths) @ weights + intercept
    return fitted


def probe_weights(features: ArrayLike, labels: ArrayLike) -> _Floats:
    """`[width]`, how the log-odds of harm rise with each number of an activation, of one probe fitted to all prompts.

    features: `[prompt, width]`. labels: `[prompt]`, 1 harmful.
    """
    scaler, model = logistic(np.shape(features)[1]).fit(np.asarray(features, dtype=np.float64), np.asarray(labels))
    return np.asarray(model.coef_[0] / scaler.scale_)


def probe(
    features: ArrayLike,
    labels: ArrayLike,
    clusters: ArrayLike,
    rng: np.random.Generator,
    folds: int = FOLDS,
    repetitions: int = REPETITIONS,
) -> ProbeResult:
    """Accuracy and AUROC of a linear probe for harm on clusters that it was not fitted to, with a control.

    features: [prompt, width], activations in any unit. labels: [prompt], 1 harmful, 0 harmless. clusters: [prompt].
    Folds are whole clusters in random order, close to equally large. Scores of all folds are pooled, which is fair only
    because folds of whole pairs leave the classes equally large in every training part (Airola et al. 2011, doi
    10.1016/j.csda.2010.11.018, on the bias of pooling otherwise). Intervals take clusters as
    drawn, given the probes: they do not say how much other training prompts would change the probe.

    Accuracy has the interval of `rates.rate`; without a single error its lower end is that of k clusters drawn of which
    k had none.

    Control: every cluster's labels are swapped with probability 1/2, harmful for harmless, all its pairs together, and
    the cross-validation is run again. That keeps classes, clusters and folds as they are and only takes away what harm
    means. Swapping pairs one by one would ask too much of the null: pairs from one template share words, and a
    difference that they share by accident makes accuracies vary more than independent swaps show (as in
    `estimate_means`, whose signs flip by cluster for the same reason). Under a null that grants pair-wise swaps,
    cluster-wise ones are valid too. If labels in a cluster are not half and half, a swap changes the class sizes, and
    there is no control.

    Raises ValueError if shapes do not fit, labels are not 0 and 1, folds < 2 or repetitions < 1.
    """
    data = _Data.of(features, labels, clusters)
    if folds < 2 or repetitions < 1:
        raise ValueError(f"folds must be at least 2 and repetitions at least 1; got {folds} and {repetitions}")
    n_clusters = int(data.cluster.max(initial=-1)) + 1
    used = min(folds, n_clusters)
    splits = _splits(data.cluster, used, rng) if used >= 2 else []
    problem = data.problem(splits)
    if problem:
        return _nothing(len(data.labels), n_clusters, problem)
    scores = _out_of_fold(data, splits)
    right = (scores > 0) == data.labels
    accuracy = rate(right, data.cluster)
    control, lacking = _control(data, splits, rng, repetitions)
    few = f"{used} folds, as there are only {n_clusters} clusters" if used < folds else ""
    return ProbeResult(
        accuracy=accuracy,
        auroc=auroc(scores, data.labels, data.cluster, rng),
        control=float(control.mean()),
        control_high=float(np.quantile(control, 0.95, method="higher")),
        p=float((np.sum(control >= right.mean() - 1e-9) + 1) / (len(control) + 1)) if not lacking else np.nan,
        folds=used,
        scores=scores,
        reason="; ".join(filter(None, (few, accuracy.reason, lacking))),
    )


def probe_profile(
    features: Mapping[str, ArrayLike],
    labels: ArrayLike,
    clusters: ArrayLike,
    rng: np.random.Generator,
    folds: int = FOLDS,
    repetitions: int = REPETITIONS,
) -> pd.DataFrame:
    """A probe for every position and layer (`PROBE_COLUMNS`).

    features: [prompt, layer, width] by position, first layer to last. labels, clusters: [prompt].
    All probes see the same folds, swaps and resamples: layers differ by their activations only. q is over all of them,
    and no q of m probes is below m / (r (repetitions + 1)) where r of them reach the lowest p.
    Raises ValueError as `probe`, or if an array is not [prompt, layer, width].
    """
    seed = int(rng.integers(2**63))
    rows: list[dict[str, Any]] = []
    for position, given in features.items():
        table = np.asarray(given)
        if table.ndim != 3:
            raise ValueError(f"features must be [prompt, layer, width]; got shape {table.shape} at '{position}'")
        for layer in range(table.shape[1]):
            found = probe(table[:, layer], labels, clusters, np.random.default_rng(seed), folds, repetitions)
            place = {"position": position, "layer": layer, "relative_depth": layer / max(table.shape[1] - 1, 1)}
            rows.append(place | _row(found))
    profile = pd.DataFrame(rows, columns=[*PROBE_COLUMNS])
    profile["q"] = benjamini_hochberg(profile["p"].to_numpy(float))
    return profile


def onset(profile: pd.DataFrame, alpha: float = 0.05, floor: float = 0.5) -> dict[str, int | None]:
    """First layer from which harm is readable, by position; None where no layer is.

    profile: `PROBE_COLUMNS`. A layer counts if q <= alpha and its accuracy's whole interval lies above both the
    control's 95% quantile and floor. Little data delay the onset, they never bring it forward.
    """
    bar = np.maximum(profile["control_high"], floor)
    readable = profile[(profile["q"] <= alpha) & (profile["low"] > bar)]
    first = readable.groupby("position")["layer"].min()
    return {position: int(first[position]) if position in first else None for position in profile["position"].unique()}


def earlier(profile: pd.DataFrame, nie: pd.DataFrame, total: float, alpha: float = 0.05) -> Order:
    """Is harm readable at a layer before the first at which it acts?

    profile: `PROBE_COLUMNS`, one position. nie: `layer, ci_low, ci_high, q`, one row per layer, of one component
    and position. total: mean TE in the same unit; effects count in its direction.

    Both first layers are late estimates, as too few data only delay a finding. So the order alone proves nothing: a
    probe may just have more power than an NIE. The verdict therefore needs both sides shown, the one present and the
    other *small* (an equivalence test by interval, Schuirmann 1987). *before*: readable < acts, and at the layer where
    harm is readable the whole interval of NIE is below `NEGLIGIBLE` of the total effect. *not before*: no layer is
    before acts, or at all of them the whole interval of accuracy is below `USEFUL`. Else *undecided*.
    """
    layers = nie.sort_values("layer").set_index("layer")
    sign = -1.0 if total < 0 else 1.0
    near, far = ("ci_high", "ci_low") if total < 0 else ("ci_low", "ci_high")
    active = layers.index[(layers["q"] <= alpha) & (sign * layers[near] > 0)]
    acts = int(active[0]) if len(active) else None
    readable = next(iter(onset(profile, alpha).values()), None)
    most = sign * layers[far] / abs(total) if total else layers[far] * np.nan
    share = float(most.get(readable, np.nan)) if readable is not None else np.nan
    ahead = profile.loc[profile["layer"] < (acts or 0), "high"].to_numpy(float)
    verdict, why = _order(readable, acts, share, ahead)
    text = f"harm is first readable after {_layer(readable)} and first acts after {_layer(acts)}; {why}"
    return Order(readable, acts, verdict, text)


class _Data(NamedTuple):
    """Checked input."""

    features: _Floats
    """[prompt, width]"""
    labels: NDArray[np.bool_]
    """[prompt]"""
    cluster: NDArray[np.intp]
    """[prompt], from 0."""

    @classmethod
    def of(cls, features: ArrayLike, labels: ArrayLike, clusters: ArrayLike) -> _Data:
        table, given, names = np.asarray(features, dtype=np.float64), np.asarray(labels), np.asarray(clusters)
        if table.ndim != 2 or given.shape != table.shape[:1] or names.shape != table.shape[:1]:
            shapes = f"{table.shape}, {given.shape} and {names.shape}"
            raise ValueError(f"features must be [prompt, width], labels and clusters [prompt]; got {shapes}")
        if not np.isin(given, (0, 1)).all():
            raise ValueError(f"labels must be 0 or 1; got {np.unique(given)}")
        return cls(table, given.astype(bool), np.unique(names, return_inverse=True)[1])

    def problem(self, splits: list[_Split]) -> str:
        """Why there is nothing to cross-validate; '' if there is."""
        missing = int(np.sum(~np.isfinite(self.features).all(axis=1)))
        if missing:
            return f"{missing} of {len(self.labels)} prompts have activations that are not finite"
        if len(np.unique(self.labels)) < 2:
            return "one class only"
        if not splits:
            return "one cluster only"
        if any(len(np.unique(self.labels[split.fit])) < 2 for split in splits):
            return "a fold leaves one class only to fit to"
        return ""

    def balanced(self) -> bool:
        """Is every cluster half harmful?"""
        return not np.bincount(self.cluster, np.where(self.labels, 1.0, -1.0)).any()


class _Split(NamedTuple):
    """Prompts of one fold."""

    fit: NDArray[np.intp]
    judge: NDArray[np.intp]


def _splits(cluster: NDArray[np.intp], folds: int, rng: np.random.Generator) -> list[_Split]:
    """Whole clusters, from large to small into the smallest fold; renumbered at random, which shuffles equal ones."""
    groups = rng.permutation(int(cluster.max()) + 1)[cluster]
    return [_Split(fit, judge) for fit, judge in GroupKFold(folds).split(groups, groups=groups)]


def _out_of_fold(data: _Data, splits: list[_Split]) -> _Floats:
    scores = np.full(len(data.labels), np.nan)
    for fit, judge in splits:
        (scores[judge],) = fit_scores(data.features[fit], data.labels[fit], data.features[judge])
    return scores


def _control(data: _Data, splits: list[_Split], rng: np.random.Generator, repetitions: int) -> tuple[_Floats, str]:
    """Accuracies [repetition] with swapped labels, and why there are none."""
    if not data.balanced():
        return np.array([np.nan]), "no control: labels in a cluster are not half and half"
    swap = rng.integers(2, size=(int(data.cluster.max()) + 1, repetitions)).astype(bool)
    labels = data.labels[:, None] ^ swap[data.cluster]
    scores = np.empty(labels.shape)
    for fit, judge in splits:
        scores[judge] = fit_many(data.features[fit], labels[fit], data.features[judge])
    return ((scores > 0) == labels).mean(axis=0), ""


def _nothing(n: int, n_clusters: int, why: str) -> ProbeResult:
    unknown = Interval(n, n_clusters, np.nan, np.nan, np.nan, why)
    return ProbeResult(unknown, unknown, np.nan, np.nan, np.nan, 0, np.full(n, np.nan), why)


def _row(found: ProbeResult) -> dict[str, Any]:
    accuracy, area = found.accuracy, found.auroc
    return {
        **{"n": accuracy.n_pairs, "clusters": accuracy.n_clusters},
        **{"accuracy": accuracy.value, "low": accuracy.low, "high": accuracy.high},
        **area.columns("auroc"),
        **{"control": found.control, "control_high": found.control_high, "p": found.p, "reason": found.reason},
    }


def _order(readable: int | None, acts: int | None, share: float, ahead: _Floats) -> tuple[Verdict, str]:
    """Verdict and why, from the most that NIE can be where harm is readable, and accuracies' upper ends before acts."""
    if acts is None:
        return "undecided", "without a layer that acts there is nothing to be before"
    if readable is not None and readable < acts:
        bound = f"NIE at layer {readable} is at most {100 * share:.2g}% of TE"
        if share < NEGLIGIBLE:
            return "before", bound
        return "undecided", f"{bound}, not shown to be below {NEGLIGIBLE:.0%}"
    if len(ahead) == 0:
        return "not before", "no layer comes before"
    bound = f"accuracy before layer {acts} may be up to {ahead.max():.0%}"
    if (ahead < USEFUL).all():
        return "not before", bound
    return "undecided", f"{bound}, not shown to be below {USEFUL:.0%}"


def _layer(layer: int | None) -> str:
    return "no layer" if layer is None else f"layer {layer}"
