"""From potential outcomes to effects: one row per pair and site, every quantity a difference of measured outcomes.

Sources: Pearl 2001 (natural effects), Robins & Greenland 1992, VanderWeele 2013 (interaction), Vig et al. 2020.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from remote_mediation.engine.jobs import Keys
from remote_mediation.engine.rows import Row, swap
from remote_mediation.outcomes import Outcome
from remote_mediation.sites import ModelInfo, Site
from remote_mediation.tokens import TokenPair

EFFECT_COLUMNS: dict[str, str] = {
    "pair_id": "the prompt pair",
    "cluster": "what statistics resample: the component of pairs that share a template, a prompt or an edit word",
    "split": "discovery (sites are chosen on it) or heldout (chosen sites are reported on it)",
    "analysis": "the analysis that asked for the site; the family of its multiple-testing correction",
    "component": "tensor that is swapped",
    "layer": "decoder layer, from 0",
    "position": "span of the prompt, or one token of it, at which it is swapped",
    "unit_start": "first unit (neuron, head or expert); empty for the whole tensor",
    "unit_stop": "one after the last unit; empty for the whole tensor",
    "y_base": "Y(x0, M(x0)): the harmless prompt as it is",
    "y_source": "Y(x1, M(x1)): the harmful prompt as it is",
    "y_base_patched": "Y(x0, M(x1)): the harmless prompt, the site as on the harmful one",
    "y_source_patched": "Y(x1, M(x0)): the harmful prompt, the site as on the harmless one",
    "te": "total effect, y_source - y_base",
    "nie": "natural indirect effect, y_base_patched - y_base: is the site sufficient?",
    "nde": "natural direct effect, y_source_patched - y_base: how much bypasses the site?",
    "tie": "total indirect effect, y_source - y_source_patched: is the site necessary?",
    "int": "interaction, te - nde - nie",
    "outcome": "what Y is",
    "unit": "unit of Y and of every effect",
}
SITE_COLUMNS = ["analysis", "component", "layer", "position", "unit_start", "unit_stop"]
QUANTITIES = ("te", "nie", "nde", "tie", "int")

_POTENTIAL = 4
"""Potential outcomes that effects are differences of."""
Values = Mapping[str, npt.NDArray[np.float32]]


@dataclass(frozen=True)
class Request:
    """One site to be measured on one pair, for one analysis."""

    analysis: str
    """Name of the analysis."""
    pair: TokenPair
    """The pair."""
    site: Site
    """The site."""
    idle: bool = False
    """Whether it is known to be the same on both prompts, so that its effects are 0 without a run."""

    def rows(self, info: ModelInfo) -> tuple[Row, Row]:
        """Y(x0, M(x1)) and Y(x1, M(x0))."""
        if self.idle:
            return Row(self.pair.id, 0), Row(self.pair.id, 1)
        return swap(self.pair, self.site, 0, info), swap(self.pair, self.site, 1, info)


def effects_table(
    requests: Sequence[Request],
    values: Values,
    keys: Keys,
    outcome: Outcome,
    info: ModelInfo,
    splits: Mapping[str, str],
) -> pd.DataFrame:
    """The effects of all requests whose four potential outcomes were measured (columns: `EFFECT_COLUMNS`)."""
    known: list[Request] = []
    readouts: list[npt.NDArray[np.float32]] = []
    for request in requests:
        base, source = (Row(request.pair.id, side) for side in (0, 1))
        found = [values[key] for key in map(keys, (base, source, *request.rows(info))) if key in values]
        if len(found) == _POTENTIAL:
            known.append(request)
            readouts += found
    measured = outcome.each([request.pair for request in known for _ in range(_POTENTIAL)], readouts)
    records = [
        {
            **_site_columns(request),
            **_effect_columns(*potential),
            "split": splits[request.pair.id],
            "outcome": outcome.name,
            "unit": outcome.unit,
        }
        for request, potential in zip(known, measured.reshape(-1, _POTENTIAL).tolist(), strict=True)
    ]
    table = pd.DataFrame(records, columns=list(EFFECT_COLUMNS))
    return table.astype({"unit_start": "Int64", "unit_stop": "Int64"})


def _site_columns(request: Request) -> dict[str, Any]:
    """What was swapped, and on which pair."""
    pair, site = request.pair, request.site
    return {
        "pair_id": pair.id,
        "cluster": pair.cluster,
        "analysis": request.analysis,
        "component": site.component,
        "layer": site.layer,
        "position": site.position,
        "unit_start": site.units[0] if site.units else None,
        "unit_stop": site.units[-1] + 1 if site.units else None,
    }


def _effect_columns(y_base: float, y_source: float, y_base_patched: float, y_source_patched: float) -> dict[str, float]:
    """Effects as differences of the four potential outcomes: Y(x0), Y(x1), Y(x0, M(x1)), Y(x1, M(x0))."""
    return {
        "y_base": y_base,
        "y_source": y_source,
        "y_base_patched": y_base_patched,
        "y_source_patched": y_source_patched,
        "te": y_source - y_base,
        "nie": y_base_patched - y_base,
        "nde": y_source_patched - y_base,
        "tie": y_source - y_source_patched,
        "int": (y_source - y_base) - (y_source_patched - y_base) - (y_base_patched - y_base),
    }
