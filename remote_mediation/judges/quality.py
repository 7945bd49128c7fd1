"""How good a judge is on labelled answers, with intervals that know which answers belong together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from remote_mediation.judges.base import FittedJudge, Judge
from remote_mediation.judges.labelled import Labelled
from remote_mediation.rates import rate
from remote_mediation.stats import Interval, cohen_kappa


@dataclass(frozen=True)
class JudgeQuality:
    """How a judge's verdicts agree with labels. Intervals are 95% and know whole clusters of answers."""

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
    """Measure a judge on labelled answers. rng, resamples: of kappa's bootstrap.

    Answers of one category are one cluster; where some have none, those of one prompt are. A judge that was fitted to
    the built-in answers judges each category as it is fitted without it. Shares have the intervals of `rates.rate`:
    near 0 and 1 a bootstrap has no spread to show, and would drop the resamples that have none.

    What is not defined is NaN, with the reason: recall without harmful answers, specificity without others, kappa
    without both, and the interval of a kappa that no resample changes.

    Raises:
        JudgeError: the judge's verdicts cannot be used.
    """
    truth, said = np.array([record.harmful for record in records], bool), _verdicts(judge, records)
    clusters = np.array(clusters_of(records))
    right = truth == said

    def share(of: NDArray[np.bool_], nothing: str) -> Interval:
        return rate(right[of], clusters[of]) if of.any() else replace(rate([], []), reason=nothing)

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
