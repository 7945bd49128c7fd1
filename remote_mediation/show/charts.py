"""Charts of the claims for the page: the numbers behind each, and what the first late neurons carry, by how many."""

from __future__ import annotations

from typing import Any

import altair as alt
import pandas as pd

from remote_mediation.show.figures import COLOURS

_SIDES = {"harm": ("harm", COLOURS[0]), "placebo": ("common", "#8a8a8a")}
"""Column and colour: a placebo's own TE is often 0, and shares of it unknown."""
_SERIES = {
    "NIE": ("nie", COLOURS[0], [1, 0]),
    "TIE": ("tie", COLOURS[1], [1, 0]),
    "direct, NIE": ("direct_nie", COLOURS[0], [5, 4]),
    "direct, TIE": ("direct_tie", COLOURS[1], [5, 4]),
}
"""Column, colour and dashes of what is drawn by size of set."""
_SHARE = ".3~p"


def behind_chart(rows: pd.DataFrame) -> alt.LayerChart | None:
    """A claim's numbers with their intervals, the placebo's as shares of harm's TE too; None where none is known.

    rows: those of a claim in `claims.ask.SET_COLUMNS`. What does not decide is hollow.
    """
    points = [point for row in rows.to_dict("records") for point in _points(row)]
    if not points:
        return None
    base = alt.Chart(alt.InlineData(values=points))
    rows_of_sides = _rows_of_sides(points)
    colour = _colour_of_side(points)
    bars = base.mark_rule(strokeWidth=2).encode(color=colour, x=alt.X("low:Q"), x2="high:Q", **rows_of_sides)
    x = alt.X("value:Q", title=str(points[0]["axis"]), axis=alt.Axis(format="%"))
    filled = alt.condition("datum.decides", colour, alt.value("white"))
    tips = [alt.Tooltip(name, title=title) for name, title in _POINT_TIPS.items()]
    dots = base.mark_point(size=45, opacity=1).encode(x=x, stroke=colour, fill=filled, tooltip=tips, **rows_of_sides)
    return alt.layer(_levels(x="at:Q"), bars, dots).properties(width=420, height=alt.Step(14))


def _sides_of(points: list[dict[str, Any]]) -> list[str]:
    there = {point["side"] for point in points}
    return [side for side in _SIDES if side in there]


def _rows_of_sides(points: list[dict[str, Any]]) -> dict[str, Any]:
    """A row for every measure, and in it one beside the other the prompts that it was measured on."""
    order = list(dict.fromkeys(point["measure"] for point in points))
    y = alt.Y("measure:N", sort=order, title=None, axis=alt.Axis(labelLimit=330))
    return {"y": y, "yOffset": alt.YOffset("side:N", sort=_sides_of(points))}


def _colour_of_side(points: list[dict[str, Any]]) -> alt.Color:
    sides = _sides_of(points)
    scale = alt.Scale(domain=sides, range=[_SIDES[side][1] for side in sides])
    return alt.Color("side:N", scale=scale, title=None, legend=alt.Legend(labelLimit=300))


def _levels(**at: str) -> alt.Chart:
    """Lines at nothing of TE and at all of it."""
    return alt.Chart(alt.InlineData(values=[{"at": 0}, {"at": 1}])).mark_rule(color="#bbb").encode(**at)


_POINT_TIPS = {
    **{"measure:N": "measure", "side:N": "prompts", "share:N": "value", "interval:N": "95% interval"},
    **{"beta:N": "slope on TE", "pairs:Q": "pairs", "why:N": "note"},
}


def _points(row: dict[str, Any]) -> list[dict[str, Any]]:
    """A row of the table as a point for the harmful prompts and one for the placebo; what is unknown has none."""
    direction = row["direction"]
    measure = row["measure"] if pd.isna(direction) else f"{row['measure']}, {str(direction).upper()}"
    axis = "share of TE" if row["of"] == "TE" else f"share of {row['of']}"
    what = {"axis": axis, "decides": bool(row["decides"])}
    of_row = {"pairs": _known(row["n"]), "why": "" if pd.isna(row["reason"]) else str(row["reason"])}
    points = []
    for side, (column, _) in _SIDES.items():
        if not pd.isna(row[column]):
            slope = row["beta_harm" if column == "harm" else "beta_placebo"]
            ends = _ends_of(row, column)
            points.append({"measure": measure, "side": side, **what, **ends, "beta": _or_none(slope), **of_row})
    return points


def _ends_of(row: dict[str, Any], column: str) -> dict[str, Any]:
    """A number that is known with its interval, as numbers and as text; without one its ends are the number."""
    value, low, high = (row[f"{column}{end}"] for end in ("", "_low", "_high"))
    if pd.isna(low):
        return {"value": value, "low": value, "high": value, "share": f"{value:.3g}", "interval": "none"}
    interval = f"{low:.3g} to {high:.3g}"
    return {"value": value, "low": low, "high": high, "share": f"{value:.3g}", "interval": interval}


def _or_none(value: float) -> str:
    return "none" if pd.isna(value) else f"{value:.3g}"


def size_chart(gate_sets: pd.DataFrame) -> alt.LayerChart:
    """What the first late neurons carry of TE together, held-out pairs, by how many they are.

    gate_sets: `claims.sparse.GATE_SET_COLUMNS`.
    """
    x, colour, dash = _by_part(), *_colour_and_dash()
    y = alt.Y("value:Q", title="effect of the set / TE", axis=alt.Axis(format="%"))
    chosen = alt.selection_point(fields=["series"], bind="legend")
    seen = alt.condition(chosen, alt.value(1.0), alt.value(0.08))
    shaded = alt.condition(chosen, alt.value(0.15), alt.value(0.0))
    tips = [alt.Tooltip(column, title=title, format=form) for column, (title, form) in _SIZE_TIPS.items()]
    base = alt.Chart(alt.InlineData(values=_size_points(gate_sets)))
    joint = base.transform_filter(alt.FieldOneOfPredicate("series", [name for name in _SERIES if "direct" not in name]))
    band = joint.mark_area(opacity=0.15).encode(x=x, y="low:Q", y2="high:Q", color=colour, opacity=shaded)
    line = base.mark_line().encode(x=x, y=y, color=colour, strokeDash=dash, opacity=seen)
    dots = base.mark_circle(size=40).encode(x=x, y=y, color=colour, opacity=seen, tooltip=tips).add_params(chosen)
    layers = (_levels(y="at:Q"), _upright_at_chosen(gate_sets, x), band, line, dots)
    return alt.layer(*layers).properties(width=760, height=340)


def _by_part() -> alt.X:
    """From few neurons to all, by powers of ten."""
    ticks = alt.Axis(format=_SHARE, values=[10.0**power for power in range(-6, 1)], grid=False)
    return alt.X("part:Q", scale=alt.Scale(type="log"), title="part of the late neurons, strongest first", axis=ticks)


def _colour_and_dash() -> tuple[alt.Color, alt.StrokeDash]:
    """How the series are told apart."""
    names = list(_SERIES)
    colours, dashes = ([of[place] for of in _SERIES.values()] for place in (1, 2))
    legend = alt.Legend(title=None, symbolType="stroke", symbolOpacity=1, symbolStrokeWidth=2, symbolSize=300)
    colour = alt.Color("series:N", scale=alt.Scale(domain=names, range=colours), legend=legend)
    return colour, alt.StrokeDash("series:N", scale=alt.Scale(domain=names, range=dashes), legend=legend)


def _upright_at_chosen(gate_sets: pd.DataFrame, x: alt.X) -> alt.Chart:
    """A line at the size that was chosen on the discovery pairs."""
    smallest = alt.InlineData(values=gate_sets.loc[gate_sets["chosen"].astype(bool), ["part"]].to_dict("records"))
    return alt.Chart(smallest).mark_rule(color="#555", strokeDash=[2, 3]).encode(x=x)


_SIZE_TIPS = {
    "series:N": ("effect", ""),
    "size:Q": ("neurons", ","),
    "part:Q": ("of the late ones", _SHARE),
    "value:Q": ("share of TE", _SHARE),
    "low:Q": ("95% from", _SHARE),
    "high:Q": ("to", _SHARE),
    "neurons:N": ("which (layer.neuron)", ""),
}
"""Title and format of what the hover tells of a size."""


def _size_points(gate_sets: pd.DataFrame) -> list[dict[str, Any]]:
    """A point for every size and series."""
    return [
        {"size": row["size"], "part": row["part"], "series": name, "neurons": _first(row["neurons"])}
        | {end: _known(row[f"{column}{suffix}"]) for end, suffix in _ENDS.items()}
        for row in gate_sets.to_dict("records")
        for name, (column, _, _) in _SERIES.items()
    ]


_ENDS = {"value": "", "low": "_low", "high": "_high"}
"""What a number of a point is called, by the ending of its column."""


def _known(value: float) -> float | None:
    return None if pd.isna(value) else float(value)


def _first(neurons: Any, most: int = 8) -> str:
    """The first neurons of a set by name."""
    if pd.isna(neurons):
        return ""
    names = str(neurons).split()
    return " ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
