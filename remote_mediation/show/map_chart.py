"""A map of single sites as a chart in which the pair can be chosen: colours, hover, and tokens below the columns."""

from __future__ import annotations

from typing import Any

import altair as alt

from remote_mediation.show.figures import QUESTIONS
from remote_mediation.show.maps import SiteMap, measures

DIGITS = 6
"""Significant digits of numbers in the page."""
_NUMBER = ".3~g"
_LEAST_STEP, _MOST_STEP, _MOST_WIDTH = 9, 130, 470


def map_chart(drawn: SiteMap) -> alt.HConcatChart:
    """NIE on the left, TIE on the right, one choice of the pair and one scale of colours, centred on 0."""
    largest = drawn.rows.groupby("pair")[list(QUESTIONS)].agg(lambda of: of.abs().max()).max(axis=1)
    pick = alt.param(
        name="pick",
        value=0,
        bind=alt.binding_select(
            options=[0, *range(1, len(drawn.names) + 1)],
            labels=[f"mean over {len(drawn.names) + drawn.left_out} pairs", *drawn.names],
            name="pair ",
        ),
    )
    limits = alt.param(name="limits", value=[float(one) or 1.0 for one in largest])
    numbers = dict.fromkeys(["pair", "layer", "te", "n", *measures()], "number")
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
