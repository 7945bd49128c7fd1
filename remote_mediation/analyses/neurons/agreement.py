"""How far a screen's estimates agree with exact effects: of its first ranks, and of a random sample of the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from remote_mediation.lab import Floats

SCREEN_COLUMNS: dict[str, str] = {
    "component": "whose units were screened",
    "screen": "atp, relp or ig",
    "quantity": "nie or tie, the mean over the discovery pairs",
    "first": "units of the first ranks that were measured",
    "spearman_first": "rank correlation of estimate and exact effect over them",
    "random": "random others that were measured",
    "spearman_random": "rank correlation over them",
    "recall": "mediators among the first ranks / those and the ones estimated among all others",
}


def agreement(
    screen: str, estimates: Floats, effects: Sequence[pd.DataFrame], found: int, missed: float
) -> list[dict[str, Any]]:
    """Rows of `SCREEN_COLUMNS`.

    estimates: `[quantity, layer, unit]`, means over the discovery pairs. effects: of the first ranks and of the random
    others. found: mediators among the first ranks. missed: mediators estimated among all others.
    """
    recall = found / (found + missed) if found + missed else np.nan
    rows = []
    for number, quantity in enumerate(("nie", "tie")):
        row: dict[str, Any] = {"component": "mlp_neurons", "screen": screen, "quantity": quantity, "recall": recall}
        for name, table in zip(("first", "random"), effects, strict=True):
            used = table[table["split"] == "discovery"]
            exact = used.groupby(["layer", "unit_start"])[quantity].mean()
            row[name] = len(exact)
            row[f"spearman_{name}"] = _agreeing(estimates[number], exact)
        rows.append(row)
    return rows


def _agreeing(estimates: Floats, exact: pd.Series) -> float:
    """Rank correlation of estimates `[layer, unit]` with what was measured, by layer and unit."""
    layers, units = (exact.index.get_level_values(level).to_numpy(int) for level in (0, 1))
    return rank_correlation(estimates[layers, units], exact.to_numpy(float))


def rank_correlation(one: Floats, other: Floats) -> float:
    """Spearman's; NaN where there are too few, or all are alike."""
    if len(one) < 3 or np.ptp(one) == 0 or np.ptp(other) == 0:
        return np.nan
    return float(spearmanr(one, other).statistic)
