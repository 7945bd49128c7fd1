"""Activations as a monitor: how well a score tells harmful prompts from harmless ones, and what its alarms cost.

Everything that is chosen (direction, weights, thresholds) is chosen on one split and judged on another. A set of
neurons found by their effects is compared with random sets of the same size, which any monitor of neurons should beat.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from remote_mediation.stats import Interval, auroc, wilson

RECALLS = (0.90, 0.95)
DISCOVERY = "discovery"
"""The split on which all that is chosen was chosen."""
RANDOM = "random neurons"
"""Name in the table of the random sets taken together."""


def _columns(percent: int) -> dict[str, str]:
    return {
        f"threshold_{percent}": f"smallest score that raised an alarm; {percent}% recall on the discovery split",
        f"recall_{percent}": "share of positives found at that threshold",
        f"recall_{percent}_low": "lower end of its 95% Wilson interval",
        f"recall_{percent}_high": "upper end",
        f"false_alarms_{percent}": "share of negatives that raised an alarm at that threshold",
        f"false_alarms_{percent}_low": "lower end of its 95% Wilson interval",
        f"false_alarms_{percent}_high": "upper end",
        f"false_alarms_at_{percent}": f"the same at the threshold that has {percent}% recall on the evaluation itself",
        f"false_alarms_at_{percent}_low": "lower end of its 95% Wilson interval",
        f"false_alarms_at_{percent}_high": "upper end",
    }


DETECTOR_COLUMNS: dict[str, str] = {
    "detector": f"what gave the score; '{RANDOM}': all random sets together",
    "evaluation": "prompts it was judged on",
    "n": "prompts",
    "clusters": "clusters of prompts",
    "positives": "harmful prompts",
    "auroc": "chance that a harmful prompt scores above a harmless one; random sets: their median",
    "auroc_low": "lower end of the 95% clustered interval; random sets: their 2.5% quantile",
    "auroc_high": "upper end; random sets: their 97.5% quantile",
    **{name: text for recall in RECALLS for name, text in _columns(round(100 * recall)).items()},
    "random_sets": "random sets that it is compared with",
    "rank": "1 + random sets with an AUROC at least as high",
    "p": "rank / (random sets + 1)",
    "reason": "why a number is missing, or why to read it with care",
}


class Scored(NamedTuple):
    """Prompts with a detector's score; higher means harmful."""

    scores: ArrayLike
    """[prompt], in any unit"""
    labels: ArrayLike
    """[prompt], 1 harmful, 0 harmless"""
    clusters: ArrayLike
    """[prompt]"""


@dataclass(frozen=True)
class Operating:
    """Alarms at one recall, with Wilson intervals: prompts count as independent, so repeated templates narrow them."""

    recall: float
    """Recall asked for, 0 to 1."""
    threshold: float
    """Smallest score that raises an alarm: the largest that has the recall on the discovery split."""
    reached: Interval
    """Recall of that threshold on the evaluation."""
    false_alarms: Interval
    """Share of the evaluation's negatives at or above that threshold."""
    false_alarms_at_recall: Interval
    """The same at the largest threshold that has the recall on the evaluation itself (FPR at fixed TPR)."""


@dataclass(frozen=True)
class DetectorResult:
    """A detector judged on prompts that nothing was chosen on."""

    auroc: Interval
    """With the clustered interval of `stats.auroc`."""
    positives: int
    """Harmful prompts of the evaluation."""
    operating: tuple[Operating, ...]
    """One for each of `RECALLS`."""
    reason: str
    """Why a number is NaN, or why to read it with care; '' if neither."""


def gate_scores(features: ArrayLike, labels: ArrayLike, *others: ArrayLike) -> list[NDArray[np.float64]]:
    """One score for several neurons: their z-scores, summed in the direction of the difference of class means.

    features: [prompt, neuron], labels: [prompt], of the discovery split; others: [prompt, neuron] to be scored. Mean,
    standard deviation and direction are the discovery split's. Each neuron is weighted by its difference in standard
    deviations, which is a Bayes classifier for independent neurons of equal variance: nothing to tune, nothing
    iterated, and the same for the gates and for every random set. One neuron alone is its own activity, up to sign.
    A neuron that is constant on the discovery split counts for nothing.
    Raises ValueError if labels are of one class only.
    """
    table, harmful = np.asarray(features, dtype=np.float64), np.asarray(labels).astype(bool)
    if harmful.all() or not harmful.any():
        raise ValueError("a direction needs harmful and harmless prompts; the labels given are all the same")
    centre, spread = table.mean(axis=0), table.std(axis=0)
    scale = np.divide(1.0, spread, out=np.zeros_like(spread), where=spread > 0)
    weights = (table[harmful].mean(axis=0) - table[~harmful].mean(axis=0)) * scale**2
    return [(np.asarray(other, dtype=np.float64) - centre) @ weights for other in others]


def detector(fit: Scored, judged: Scored, rng: np.random.Generator) -> DetectorResult:
    """How well scores tell harmful from harmless prompts, and the false alarms at each of `RECALLS`.

    fit: the split that thresholds are taken from. judged: other prompts. A recall below 1 must leave out at least one
    positive, so it takes 1 / (1 - recall) of them (10 for 90%, 20 for 95%) to define its threshold; with fewer it is
    NaN. Raises ValueError as `stats.auroc`, or if a score is not finite.
    """
    chosen, seen = _Classes.of(fit), _Classes.of(judged)
    area = auroc(judged.scores, judged.labels, judged.clusters, rng)
    found = [_operating(chosen, seen, recall) for recall in RECALLS]
    reasons = [area.reason and f"AUROC: {area.reason}", *(reason for _, why in found for reason in why)]
    return DetectorResult(
        auroc=area,
        positives=len(seen.positives),
        operating=tuple(operating for operating, _ in found),
        reason="; ".join(dict.fromkeys(filter(None, reasons))),
    )


def detector_table(
    detectors: Mapping[str, Mapping[str, Scored]],
    rng: np.random.Generator,
    random: Sequence[Mapping[str, Scored]] = (),
) -> pd.DataFrame:
    """Every detector on every set of prompts but the discovery split (`DETECTOR_COLUMNS`).

    detectors: scores by name and set of prompts, such as 'heldout'; each needs those of `DISCOVERY`, for thresholds.
    random: the same for each random set of neurons; all of them together are one row, and each detector is ranked
    among them. All detectors see the same resamples of one set of prompts.
    Raises ValueError if a detector has no discovery split.
    """
    seed = int(rng.integers(2**63))
    areas = _random_areas(random)
    rows: list[dict[str, Any]] = []
    for name, sets in detectors.items():
        if DISCOVERY not in sets:
            raise ValueError(f"detector '{name}' has no scores of the '{DISCOVERY}' split; it has {sorted(sets)}")
        for evaluation, judged in sets.items():
            if evaluation != DISCOVERY:
                found = detector(sets[DISCOVERY], judged, np.random.default_rng(seed))
                place = {"detector": name, "evaluation": evaluation}
                rows.append(place | _row(found) | _rank(found.auroc.value, areas.get(evaluation)))
    rows += [_random_row(evaluation, area, random) for evaluation, area in areas.items()]
    return pd.DataFrame(rows, columns=[*DETECTOR_COLUMNS])


class _Classes(NamedTuple):
    """Scores by class."""

    positives: NDArray[np.float64]
    """Sorted from the highest down."""
    negatives: NDArray[np.float64]

    @classmethod
    def of(cls, scored: Scored) -> _Classes:
        scores, harmful = np.asarray(scored.scores, dtype=np.float64), np.asarray(scored.labels).astype(bool)
        if not np.isfinite(scores).all():
            raise ValueError(f"{np.sum(~np.isfinite(scores))} of {scores.size} scores are not finite")
        return cls(np.sort(scores[harmful])[::-1], scores[~harmful])

    def threshold(self, recall: float, where: str) -> tuple[float, str]:
        """Largest score that finds this share of the positives, and why there is none."""
        n = len(self.positives)
        needed = round(1 / (1 - recall))
        if n < needed:
            return np.nan, f"{recall:.0%} recall takes {needed} positives, {where} there are {n}"
        return float(self.positives[int(np.ceil(recall * n - 1e-9)) - 1]), ""

    def rates(self, threshold: float) -> tuple[Interval, Interval]:
        """Recall and false alarms at a threshold."""
        if np.isnan(threshold):
            unknown = Interval(0, 0, np.nan, np.nan, np.nan, "no threshold")
            return unknown, unknown
        found, alarms = (int(np.sum(part >= threshold)) for part in self)
        return wilson(found, len(self.positives)), wilson(alarms, len(self.negatives))


def _operating(fit: _Classes, judged: _Classes, recall: float) -> tuple[Operating, tuple[str, str]]:
    """Alarms at a recall, and why numbers of it are missing."""
    threshold, unfitted = fit.threshold(recall, f"in the {DISCOVERY} split")
    own, undefined = judged.threshold(recall, "in the evaluation")
    reached, alarms = judged.rates(threshold)
    _, alarms_at_recall = judged.rates(own)
    return Operating(recall, threshold, reached, alarms, alarms_at_recall), (unfitted, undefined)


def _random_areas(random: Sequence[Mapping[str, Scored]]) -> dict[str, NDArray[np.float64]]:
    """AUROC [random set] by evaluation."""
    evaluations = dict.fromkeys(name for sets in random for name in sets if name != DISCOVERY)
    return {name: np.array([_area(sets[name]) for sets in random]) for name in evaluations}


def _area(scored: Scored) -> float:
    """AUROC alone, as `stats.auroc` defines it; NaN if there is one class only."""
    seen = _Classes.of(scored)
    wins = (np.sign(seen.positives[:, None] - seen.negatives) + 1) / 2
    return float(wins.mean()) if wins.size else np.nan


def _rank(area: float, areas: NDArray[np.float64] | None) -> dict[str, Any]:
    """Place among the random sets; the set itself counts as one of them, so p is never 0."""
    if areas is None or np.isnan(area):
        return {"random_sets": 0 if areas is None else len(areas), "rank": np.nan, "p": np.nan}
    rank = 1 + int(np.sum(areas >= area - 1e-12))
    return {"random_sets": len(areas), "rank": rank, "p": rank / (len(areas) + 1)}


def _random_row(evaluation: str, areas: NDArray[np.float64], random: Sequence[Mapping[str, Scored]]) -> dict[str, Any]:
    first = random[0][evaluation]
    low, median, high = np.quantile(areas, [0.025, 0.5, 0.975])
    return {
        **{"detector": RANDOM, "evaluation": evaluation, "n": np.size(first.labels), "random_sets": len(areas)},
        **{"clusters": len(np.unique(first.clusters)), "positives": int(np.sum(first.labels))},
        **{"auroc": median, "auroc_low": low, "auroc_high": high},
        "reason": f"median and 95% range of {len(areas)} random sets",
    }


def _row(found: DetectorResult) -> dict[str, Any]:
    row: dict[str, Any] = {"n": found.auroc.n_pairs, "clusters": found.auroc.n_clusters, "positives": found.positives}
    row |= found.auroc.columns("auroc") | {"reason": found.reason}
    for operating in found.operating:
        percent = round(100 * operating.recall)
        row[f"threshold_{percent}"] = operating.threshold
        row |= operating.reached.columns(f"recall_{percent}")
        row |= operating.false_alarms.columns(f"false_alarms_{percent}")
        row |= operating.false_alarms_at_recall.columns(f"false_alarms_at_{percent}")
    return row
