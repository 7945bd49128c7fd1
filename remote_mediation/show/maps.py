"""Maps of single sites for the page: layer by position, for the mean over pairs and for each pair on its own.

A map is first a small table (`map_of`), a row per cell and pair, numbers as in the CSV files. Pairs are numbers in it,
and their ids labels of a choice (`map_chart`), so no id is ever code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from remote_mediation.effects import SITE_COLUMNS
from remote_mediation.printed import Printed, Tokens
from remote_mediation.show.figures import QUESTIONS
from remote_mediation.show.sites import NOUNS
from remote_mediation.sites import HEAD_COMPONENTS
from remote_mediation.summary import CHECKS, UNITS
from remote_mediation.tokens import SPANS

MOST_COLUMNS = 96
"""A wider map is no map: single neurons have no neighbours."""
MOST_ROWS = 16_000
"""Cells of single pairs in one map, under 1 MB of the page; pairs beyond are left out of its choice."""
_KEY = ["component", "position", "unit_start", "unit_stop"]


@dataclass(frozen=True)
class SiteMap:
    """One analysis as a map."""

    analysis: str
    columns: tuple[str, ...]
    """Of the map, from left to right."""
    rows: pd.DataFrame
    """`pair` (0: the mean over pairs, then 1, 2 ...), `x` (a column), `layer`; `te`; `nie` and `tie`; of the mean its
    ends (`nie_low`, `nie_high`), q (`nie_q`) and pairs (`n`); `harmless`, `harmful`: tokens at `x`, once a column."""
    names: tuple[str, ...]
    """Ids of the pairs that can be chosen, from 1 on."""
    left_out: int
    """Pairs beyond `MOST_ROWS`."""
    unit: str
    alpha: float
    """Cells whose q is at most this carry a dot."""


def maps_of(run: Printed, texts: Mapping[tuple[str, str], Tokens]) -> list[SiteMap]:
    """Every analysis of a run that has maps, in the order of its tables. texts: tokens to show, by pair and position.

    Raises:
        StoreError: a table lacks columns.
    """
    effects = run.table("effects.csv", [*SITE_COLUMNS, "pair_id", "te", *QUESTIONS])
    sites = run.table("summary.csv", [*SITE_COLUMNS, "quantity", "split", "mean", "ci_low", "ci_high", "q", "n"])
    if effects is None or sites is None:
        return []
    names = [name for name in dict.fromkeys(sites["analysis"]) if name not in (CHECKS, UNITS)]
    found = [map_of(run, name, effects, sites, texts) for name in names]
    return [one for one in found if len(one.columns) <= MOST_COLUMNS]


def map_of(
    run: Printed, analysis: str, effects: pd.DataFrame, sites: pd.DataFrame, texts: Mapping[tuple[str, str], Tokens]
) -> SiteMap:
    """One analysis as a map. effects, sites: its CSV files."""
    sites = sites[(sites["analysis"] == analysis) & (sites["split"] == "all")]
    effects = effects[effects["analysis"] == analysis]
    labels = _labels(sites)
    columns = tuple(dict.fromkeys(labels.loc[labels.map(_order(sites, labels)).sort_values().index]))
    every = list(dict.fromkeys(effects["pair_id"]))
    kept = every[: max(1, MOST_ROWS * len(every) // max(len(effects), 1))]
    parts = [_means(sites.assign(x=labels), run.total.value), _single_pairs(effects, sites, kept)]
    rows = pd.concat(parts, ignore_index=True)
    wanted = ["pair", "x", "layer", "te", "n", *measures(), "position", "pair_id"]
    rows = rows.reindex(columns=wanted).astype({"layer": int, "pair": int})
    rows = _with_texts(rows, texts if _one_position_each(sites) else {})
    return SiteMap(
        analysis,
        columns,
        rows.drop(columns=["position", "pair_id"]),
        tuple(kept),
        len(every) - len(kept),
        run.unit,
        run.config.statistics.alpha,
    )


def measures() -> list[str]:
    """Columns of a map's numbers."""
    return [f"{name}{end}" for name in QUESTIONS for end in ("", "_low", "_high", "_q")]


def _means(sites: pd.DataFrame, total: float) -> pd.DataFrame:
    """The mean over pairs, a row per cell. sites: one analysis and split of `SUMMARY_COLUMNS`, with `x`."""
    ends = {"mean": "", "ci_low": "_low", "ci_high": "_high", "q": "_q"}
    cells: dict[tuple[str, Any], dict[str, Any]] = {}
    for row in sites[sites["quantity"].isin(list(QUESTIONS))].to_dict("records"):
        cell = cells.setdefault((row["x"], row["layer"]), {"x": row["x"], "layer": row["layer"], "n": row["n"]})
        cell |= {"pair": 0, "te": total, "position": row["position"], "pair_id": ""}
        cell |= {f"{row['quantity']}{end}": row[column] for column, end in ends.items()}
    return pd.DataFrame(list(cells.values()))


def _single_pairs(effects: pd.DataFrame, sites: pd.DataFrame, kept: Sequence[str]) -> pd.DataFrame:
    """Effects on single pairs, numbered from 1 on in this order. kept: ids of those that can be chosen."""
    number = {name: place for place, name in enumerate(kept, start=1)}
    single = effects[effects["pair_id"].isin(kept)]
    return single.assign(pair=single["pair_id"].map(number), x=_labels(single, sites))


def _with_texts(rows: pd.DataFrame, texts: Mapping[tuple[str, str], Tokens]) -> pd.DataFrame:
    """Tokens of each pair, in the first row of each column; no column where there are none to show."""
    if not texts:
        return rows
    first = ~rows.duplicated(["pair", "x"])
    empty = Tokens("", "")
    keys = zip(rows["pair_id"], rows["position"], first, strict=True)
    found = [texts.get((pair, position), empty) if shown else empty for pair, position, shown in keys]
    return rows.assign(harmless=[one.harmless for one in found], harmful=[one.harmful for one in found])


def _labels(sites: pd.DataFrame, among: pd.DataFrame | None = None) -> pd.Series:
    """What each row's column is called: no more words than tell the columns of `among` apart."""
    every = sites if among is None else among
    components, positions = every["component"].nunique() > 1, every["position"].nunique() > 1
    keys = [(row.component, row.position, *_bounds(row.unit_start, row.unit_stop)) for row in sites[_KEY].itertuples()]
    names = {key: _name(*key, components, positions) for key in dict.fromkeys(keys)}
    return pd.Series([names[key] for key in keys], index=sites.index, dtype="str")


def _name(component: str, position: str, first: int, after: int, components: bool, positions: bool) -> str:
    """What a site is called. components, positions: whether there are several, so that it takes a word to tell."""
    noun, units = NOUNS.get(component, component), _units(component, first, after)
    words = [noun] if components and not units.startswith(noun) else []
    words += [position] if positions or not (units or components) else []
    return ", ".join([*words, units] if units else words)


def _bounds(start: Any, stop: Any) -> tuple[int, int]:
    """First unit and one after the last; negative for a whole tensor."""
    return (-1, -1) if pd.isna(start) else (int(start), int(stop))


def _units(component: str, first: int, after: int) -> str:
    """A site's units in words; empty for a whole tensor."""
    if first < 0:
        return ""
    noun = NOUNS[component] if component in (*HEAD_COMPONENTS, "expert_output", "expert_neurons") else "neurons"
    return f"{noun} {first}" if after == first + 1 else f"{noun} {first} to {after - 1}"


def _order(sites: pd.DataFrame, labels: pd.Series) -> dict[str, tuple[Any, ...]]:
    """Where a column stands: by component, then in reading order, then by unit."""
    order = {}
    for label, row in zip(labels, sites[_KEY].itertuples(index=False), strict=True):
        span, _, number = row.position.rstrip("]").partition("[")
        reading = (SPANS.index(span) if span in SPANS else len(SPANS), int(number) if number else 0)
        order[label] = (row.component, *reading, _bounds(row.unit_start, row.unit_stop))
    return order


def _one_position_each(sites: pd.DataFrame) -> bool:
    """Whether a column is a position, so that tokens can stand below it."""
    return bool(sites["component"].nunique() == 1 and sites["unit_start"].isna().all())
