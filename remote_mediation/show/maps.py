"""Maps of single sites for the page: layer by position, for the mean over pairs and for each pair on its own.

A map is first a small table (`map_of`), a row per cell and pair, numbers as in the CSV files to six digits; a chart
draws it and chooses the pair. Pairs are numbers in it, and their ids labels of the choice, so no id is ever code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import altair as alt
import pandas as pd

from remote_mediation.effects import SITE_COLUMNS
from remote_mediation.show.figures import QUESTIONS
from remote_mediation.show.printed import Printed, Tokens
from remote_mediation.show.sites import NOUNS
from remote_mediation.summary import CHECKS, UNITS
from remote_mediation.tokens import SPANS

MOST_COLUMNS = 96
"""A wider map is no map: single neurons have no neighbours."""
MOST_ROWS = 24_000
"""Cells of single pairs in one map, about 1 MB of the page; pairs beyond are left out of its choice."""
DIGITS = 6
_KEY = ["component", "position", "unit_start", "unit_stop"]
_NUMBER = ".3~g"
_LEAST_STEP, _MOST_STEP, _MOST_WIDTH = 9, 130, 470


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
    single = effects[effects["pair_id"].isin(kept)]
    number = {name: place for place, name in enumerate(kept, start=1)}
    single = single.assign(pair=single["pair_id"].map(number), x=_labels(single, sites))
    rows = pd.concat([_means(sites.assign(x=labels), run.total.value), single], ignore_index=True)
    wanted = ["pair", "x", "layer", "te", "n", *_measures(), "position", "pair_id"]
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


def map_chart(drawn: SiteMap) -> alt.HConcatChart:
    """NIE on the left, TIE on the right, one choice of the pair and one scale of colours, centred on 0."""
    largest = drawn.rows.groupby("pair")[list(QUESTIONS)].agg(lambda of: of.abs().max()).max(axis=1)
    pick = alt.param(
        name="pick",
        value=0,
        bind=alt.binding_select(
            options=[0, *range(1, len(drawn.names) + 1)],
            labels=[f"mean over {_pairs(drawn)} pairs", *drawn.names],
            name="pair ",
        ),
    )
    limits = alt.param(name="limits", value=[float(one) or 1.0 for one in largest])
    numbers = dict.fromkeys(["pair", "layer", "te", "n", *_measures()], "number")
    data = alt.InlineData(
        values=drawn.rows.to_csv(index=False, lineterminator="\n", float_format=f"%.{DIGITS}g"),
        format=alt.CsvDataFormat(type="csv", parse=numbers),
    )
    panels = [_panel(drawn, quantity) for quantity in QUESTIONS]
    return alt.hconcat(*panels, data=data, spacing=50).add_params(pick, limits)


def _panel(drawn: SiteMap, quantity: str) -> alt.VConcatChart | alt.LayerChart:
    """The cells of one quantity and, where there are texts, the tokens below them."""
    layers = drawn.rows["layer"].nunique()
    step = min(_MOST_STEP, max(_LEAST_STEP, _MOST_WIDTH // len(drawn.columns)))
    width, height = step * len(drawn.columns), layers * (14 if layers <= 40 else 8)
    lean = -45 if len(drawn.columns) > 4 else 0
    x = alt.X("x:N", sort=list(drawn.columns), title=None, axis=alt.Axis(labelAngle=lean, labelLimit=140))
    y = alt.Y("layer:O", sort="descending", title="layer", axis=alt.Axis(labelOverlap=True))
    shown = alt.Chart().transform_filter("datum.pair === pick")
    ends = {"domainMin": alt.expr("-limits[pick]"), "domainMax": alt.expr("limits[pick]")}
    scale = alt.Scale(scheme="redblue", reverse=True, **ends)
    colour = alt.Color(f"{quantity}:Q", scale=scale, legend=alt.Legend(title=drawn.unit, format=_NUMBER))
    cells = (
        shown.transform_calculate(**_texts_of(quantity))
        .mark_rect()
        .encode(x=x, y=y, color=colour, tooltip=_tooltip(quantity, drawn.unit))
    )
    certain = shown.transform_filter(f"isValid(datum.{quantity}_q) && datum.{quantity}_q <= {drawn.alpha}")
    dots = certain.mark_circle(size=14, color="white", stroke="black", strokeWidth=0.7, opacity=1).encode(x=x, y=y)
    title = alt.Title(f"{quantity.upper()}: {QUESTIONS[quantity]}", anchor="start", fontSize=13)
    missing = alt.ViewBackground(fill="#d9d9d9", stroke=None)
    layered = alt.layer(cells, dots).properties(width=width, height=height, title=title, view=missing)
    if "harmful" not in drawn.rows:
        return layered
    strips = [_strip(drawn, side, width) for side in ("harmful", "harmless")]
    return alt.vconcat(layered, *strips, spacing=4)


def _strip(drawn: SiteMap, side: str, width: int) -> alt.Chart:
    """The chosen pair's tokens of one prompt, each below its column."""
    lean = len(drawn.columns) > 4
    x = alt.X("x:N", sort=list(drawn.columns), axis=None)
    mark: dict[str, Any] = {"angle": 315, "align": "right"} if lean else {"align": "center"}
    return (
        alt.Chart()
        .transform_filter(f"datum.pair === pick && datum.{side}")
        .mark_text(baseline="middle", fontSize=11, limit=110 if lean else width // len(drawn.columns), **mark)
        .encode(x=x, text=f"{side}:N", tooltip=alt.Tooltip(f"{side}:N", title=f"tokens, {side}"))
        .properties(width=width, height=70 if lean else 18, title=alt.Title(side, anchor="start", fontSize=10))
    )


def _tooltip(quantity: str, unit: str) -> list[alt.Tooltip]:
    return [
        alt.Tooltip("x:N", title="site"),
        alt.Tooltip("layer:O", title="layer"),
        alt.Tooltip(f"{quantity}:Q", title=f"{quantity.upper()} ({unit})", format=_NUMBER),
        alt.Tooltip("interval:N", title="95% interval"),
        alt.Tooltip("q:N", title="q"),
        alt.Tooltip("te:Q", title=f"TE ({unit})", format=_NUMBER),
        alt.Tooltip("of:N", title="pairs"),
    ]


def _texts_of(quantity: str) -> dict[str, str]:
    """What the hover says, as Vega expressions."""
    low, high, q = (f"datum.{quantity}_{end}" for end in ("low", "high", "q"))
    single = "datum.pair ? 'none: a single pair' : 'none: too few clusters'"
    return {
        "interval": f"isValid({low}) ? format({low}, '{_NUMBER}') + ' to ' + format({high}, '{_NUMBER}') : {single}",
        "q": f"!isValid({q}) ? 'none' : {q} < 0.001 ? '< 0.001' : format({q}, '.2~g')",
        "of": "datum.pair ? 'this one' : format(datum.n, 'd')",
    }


def _measures() -> list[str]:
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
    names = {}
    for component, position, start, stop in sites[_KEY].drop_duplicates().itertuples(index=False):
        units = _units(component, start, stop)
        words = [NOUNS.get(component, component)] if components else []
        words += [position] if positions or not (units or components) else []
        names[component, position, *_bounds(start, stop)] = ", ".join([*words, units] if units else words)
    keys = zip(sites["component"], sites["position"], sites["unit_start"], sites["unit_stop"], strict=True)
    return pd.Series([names[key[0], key[1], *_bounds(*key[2:])] for key in keys], index=sites.index, dtype="str")


def _bounds(start: Any, stop: Any) -> tuple[int, int]:
    return (-1, -1) if pd.isna(start) else (int(start), int(stop))


def _units(component: str, start: Any, stop: Any) -> str:
    """A site's units in words; empty for a whole tensor."""
    first, after = _bounds(start, stop)
    if first < 0:
        return ""
    noun = "head" if component == "attention_heads" else "neurons"
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


def _pairs(drawn: SiteMap) -> int:
    return len(drawn.names) + drawn.left_out
