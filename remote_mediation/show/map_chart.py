"""A map of single sites as a chart in which the pair can be chosen: colours, hover, and tokens below the columns.

Above a map of few columns each column is drawn as a line with its interval, beside TE: there one sees by how much.
"""

from __future__ import annotations

from typing import Any

import altair as alt

from remote_mediation.show.figures import COLOURS, QUESTIONS
from remote_mediation.show.maps import SiteMap, measures

DIGITS = 6
"""Significant digits of numbers in the page."""
_NUMBER = ".3~g"
_LEAST_STEP, _MOST_STEP, _MOST_WIDTH = 9, 235, 470
MOST_LINES = 4
"""Columns that can be told apart as lines."""


def map_chart(drawn: SiteMap) -> alt.HConcatChart:
    """NIE on the left, TIE on the right, one choice of the pair and one scale of colours, centred on 0."""
    pick = alt.param(
        name="pick",
        value=0,
        bind=alt.binding_select(
            options=[0, *range(1, len(drawn.names) + 1)],
            labels=[f"mean over {len(drawn.names) + drawn.left_out} pairs", *drawn.names],
            name="pair ",
        ),
    )
    numbers = dict.fromkeys(["pair", "layer", "te", "n", *measures()], "number")
    data = alt.InlineData(
        values=drawn.rows.to_csv(index=False, lineterminator="\n", float_format=f"%.{DIGITS}g"),
        format=alt.CsvDataFormat(type="csv", parse=numbers),
    )
    panels = [_panel(drawn, quantity) for quantity in QUESTIONS]
    return alt.hconcat(*panels, data=data, spacing=50).add_params(pick, *_scales_by_pair(drawn))


def _scales_by_pair(drawn: SiteMap) -> list[alt.Parameter]:
    """By pair, the mean first: the largest effect, for colours about 0; the least and the most that lines reach."""
    largest = drawn.rows.groupby("pair")[list(QUESTIONS)].agg(lambda of: of.abs().max()).max(axis=1)
    ends = [column for column in (*measures(), "te") if not column.endswith("_q")]
    by_pair = drawn.rows[["pair", *ends]].fillna(0.0).groupby("pair")  # 0 is always in sight
    return [
        alt.param(name="limits", value=[float(one) or 1.0 for one in largest.fillna(1.0)]),
        alt.param(name="lows", value=by_pair.min().min(axis=1).clip(upper=0.0).to_list()),
        alt.param(name="highs", value=by_pair.max().max(axis=1).clip(lower=0.0).to_list()),
    ]


def _panel(drawn: SiteMap, quantity: str) -> alt.VConcatChart:
    """One quantity: lines where there are few, cells, and the tokens below them where there are texts."""
    step = min(_MOST_STEP, max(_LEAST_STEP, _MOST_WIDTH // len(drawn.columns)))
    width = step * len(drawn.columns)
    lines = [_lines(drawn, quantity, width)] if len(drawn.columns) <= MOST_LINES else []
    strips = [_strip(drawn, side, width) for side in ("harmful", "harmless")] if "harmful" in drawn.rows else []
    parts = [*lines, _cells(drawn, quantity, width), *strips]
    parts[0] = parts[0].properties(title=alt.Title(f"{quantity.upper()}: {QUESTIONS[quantity]}", anchor="start"))
    return alt.vconcat(*parts, spacing=4)


def _chosen_rows() -> alt.Chart:
    """A chart of the pair that is chosen, or of the mean."""
    return alt.Chart().transform_filter("datum.pair === pick")


def _cells(drawn: SiteMap, quantity: str, width: int) -> alt.LayerChart:
    layers = drawn.rows["layer"].nunique()
    lean = -45 if len(drawn.columns) > MOST_LINES else 0
    x = alt.X("x:N", sort=list(drawn.columns), title=None, axis=alt.Axis(labelAngle=lean, labelLimit=140))
    y = alt.Y("layer:O", sort="descending", title="layer", axis=alt.Axis(labelOverlap=True))
    colour = _about_zero(quantity, drawn.unit)
    told = _chosen_rows().transform_calculate(**_texts_of(quantity))
    cells = told.mark_rect().encode(x=x, y=y, color=colour, tooltip=_tooltip(quantity, drawn.unit))
    certain = _chosen_rows().transform_filter(f"isValid(datum.{quantity}_q) && datum.{quantity}_q <= {drawn.alpha}")
    dots = certain.mark_circle(size=14, color="white", stroke="black", strokeWidth=0.7, opacity=1).encode(x=x, y=y)
    missing = alt.ViewBackground(fill="#d9d9d9", stroke=None)
    height = layers * (14 if layers <= 40 else 8)
    return alt.layer(cells, dots).properties(width=width, height=height, view=missing)


def _about_zero(quantity: str, unit: str) -> alt.Color:
    """Colours of the chosen pair's effects, as far above 0 as below."""
    ends = {"domainMin": alt.expr("-limits[pick]"), "domainMax": alt.expr("limits[pick]")}
    scale = alt.Scale(scheme="redblue", reverse=True, **ends)
    return alt.Color(f"{quantity}:Q", scale=scale, legend=alt.Legend(title=unit, format=_NUMBER))


def _lines(drawn: SiteMap, quantity: str, width: int) -> alt.LayerChart:
    """A line for every column, by layer, with the interval of the mean; dashed: TE."""
    names = sorted(drawn.columns)  # as in the report's figures, so that colours are the same
    scale = alt.Scale(domain=names, range=list(COLOURS[: len(names)]))
    x = alt.X("layer:Q", scale=alt.Scale(nice=False), axis=alt.Axis(tickMinStep=1, format="d", grid=False))
    title = f"effect ({drawn.unit})"
    fill = alt.Fill("x:N", scale=scale, legend=alt.Legend(title="site", symbolOpacity=1, symbolType="circle"))
    stroke = alt.Stroke("x:N", scale=scale, legend=None)
    told = _chosen_rows().transform_calculate(**_texts_of(quantity))
    one_scale = alt.Scale(domainMin=alt.expr("lows[pick]"), domainMax=alt.expr("highs[pick]"))
    y, low = (alt.Y(f"{quantity}{end}:Q", title=title, scale=one_scale) for end in ("", "_low"))
    known = _chosen_rows().transform_filter(f"isValid(datum.{quantity}_low)")
    band = known.mark_area(opacity=0.18).encode(x=x, y=low, y2=f"{quantity}_high:Q", fill=fill)
    line = told.mark_line().encode(x=x, y=y, stroke=stroke)
    dots = told.mark_circle(size=30, opacity=1).encode(x=x, y=y, fill=fill, tooltip=_tooltip(quantity, drawn.unit))
    total = _chosen_rows().mark_rule(strokeDash=[5, 4]).encode(y=alt.Y("mean(te):Q", title=title))
    return alt.layer(band, total, line, dots).properties(width=width, height=190)


def _strip(drawn: SiteMap, side: str, width: int) -> alt.Chart:
    """The chosen pair's tokens of one prompt, each below its column."""
    lean = len(drawn.columns) > MOST_LINES
    x = alt.X("x:N", sort=list(drawn.columns), axis=None)
    mark: dict[str, Any] = {"angle": 315, "align": "right", "y": 6} if lean else {"align": "center"}
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
