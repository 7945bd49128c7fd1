"""How good a judge is on labelled answers, with intervals that know which answers belong together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from remote_mediation.judges.base import FittedJudge, Judge
from remote_mediation.judges.labelled import Labelled
from remote_mediation.stats import Interval, cohen_kappa, estimate_means, wilson


@dataclass(frozen=True)
class JudgeQuality:
    """How a judge's verdicts agree with labels. Intervals are 95% and resample whole clusters of answers."""

    judge: str
    """Name of the judge."""
    n: int
    """Labelled answers."""
    harmful: int
    """Of these, labelled harmful."""
    accuracy: Interval
    """Share of answers judged as labelled."""
    recall: Interval
    """Share of the harmful answers that were found."""
    specificity: Interval
    """Share of the other answers that were let pass."""
    kappa: Interval
    """Cohen's kappa of judge and labels."""


def check_judge(
    judge: Judge, records: Sequence[Labelled], rng: np.random.Generator, resamples: int = 9999
) -> JudgeQuality:
    """Measure a judge on labelled answers. rng, resamples: of the bootstrap.

    Answers of one category are one cluster; where some have none, those of one prompt are. A judge that was fitted to
    the built-in answers judges each category as it is fitted without it. A share of 0 or 1 leaves a bootstrap no
    spread: its interval is Wilson's, of as many trials as there are clusters. Any other's ends are cut to 0..1.

    What is not defined is NaN, with the reason: recall without harmful answers, specificity without others, kappa
    without both, and the interval of a kappa that no resample changes.

    Raises:
        JudgeError: the judge's verdicts cannot be used.
    """
    truth, said = np.array([record.harmful for record in records], bool), _verdicts(judge, records)
    clusters = np.array(clusters_of(records))
    right = truth == said

    def share(of: NDArray[np.bool_], nothing: str) -> Interval:
        return _share(right[of], clusters[of], rng, resamples) if of.any() else replace(wilson(0, 0), reason=nothing)

    return JudgeQuality(
        judge=judge.name,
        n=len(truth),
        harmful=int(truth.sum()),
        accuracy=share(np.ones(len(truth), bool), "no answers"),
        recall=share(truth, "no answer is labelled harmful"),
        specificity=share(~truth, "all answers are labelled harmful"),
        kappa=cohen_kappa(truth, said, clusters, rng, resamples),
    )


def clusters_of(records: Sequence[Labelled]) -> list[str]:
    """The label of each answer's cluster: its category, or its prompt where some answers have no category."""
    by_category = all(record.category for record in records)
    return [record.category if by_category else record.prompt for record in records]


def _verdicts(judge: Judge, records: Sequence[Labelled]) -> NDArray[np.bool_]:
    """[answer]; of a fitted judge, each category's by what was fitted without it."""
    said = np.zeros(len(records), bool)
    categories = np.array([record.category if isinstance(judge, FittedJudge) else "" for record in records])
    for category in np.unique(categories):
        asked = np.flatnonzero(categories == category).tolist()
        fitting = judge.without(str(category)) if isinstance(judge, FittedJudge) else judge
        said[asked] = fitting([records[at].prompt for at in asked], [records[at].answer for at in asked])
    return said


def _share(right: NDArray[np.bool_], clusters: NDArray[Any], rng: np.random.Generator, resamples: int) -> Interval:
    (found,) = estimate_means(right[None], clusters, rng, resamples)
    if right.any() and not right.all():
        low, high = max(found.low, 0.0), min(found.high, 1.0)
        return Interval(found.n_pairs, found.n_clusters, found.value, low, high, found.reason)
    bound = wilson(found.n_clusters if right.all() else 0, found.n_clusters)
    why = f"Wilson interval of {found.n_clusters} clusters, all judged alike"
    return Interval(found.n_pairs, found.n_clusters, found.value, bound.low, bound.high, why)
