"""The claims as figures: what decides them beside the placebo, how few neurons do, how far claim 2 depends on choices.

Tables of `ask.analyse` in, figures out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from remote_mediation.analyses.claims.specification import RANDOM
from remote_mediation.analyses.claims.verdicts import ACTS, DIRECTIONS, HALF, HANDED, MOST
from remote_mediation.show.figures import COLOURS, DPI, MARKERS, WIDTH, legend, share_axis

SIGNS = {"positive": "#0072B2", "unclear": "0.8", "negative": "#D55E00"}
"""Colours of what an interval says, as elsewhere for effects with TE and against it."""
SPLITS = {"discovery": "discovery", "heldout": "held out", "all": "all", RANDOM: RANDOM}
"""Pairs that claim 2 is taken on, in words; their colours are none of `SIGNS`."""
_ABOVE = {1: MOST, 2: 0.0, 3: HALF, 4: 0.0, 5: HANDED}
"""What the numbers that decide a claim have to lie above for it to be supported."""
_STILL = {4: ACTS}
"""What others of its numbers have to lie below: what is read must not act yet."""
_SIDES = {
    "harm": ("harm", "harm", COLOURS[0], "o", -0.16),
    "placebo": ("placebo's effect, over the TE of harm", "common", "0.45", "D", 0.16),
}
"""Name, column, colour, marker and place in its row of each side.

A placebo's own TE is often 0, and shares of it unknown: that its effect is small then is no sign that a mediator is
specific to harm.
"""


def claims_figure(sets: pd.DataFrame, claims: pd.DataFrame) -> Figure:
    """What decides each claim, harm beside placebo, and where it has to lie; marked where no verdict rests on it.

    sets: `ask.SET_COLUMNS`. claims: `ask.CLAIM_COLUMNS`.
    """
    untested = set(claims.loc[claims["verdict"] == "not tested", "number"])
    still = ~sets["decides"] & sets["number"].isin(list(_STILL))
    deciding = sets[(sets["decides"] | still) & sets["harm"].notna()].reset_index(drop=True)
    figure = Figure((WIDTH, 1.5 + 0.36 * len(deciding)), DPI, layout="constrained")
    axis = figure.subplots()
    for side in _SIDES:
        _numbers_of(axis, deciding, side)
    _asked(axis, deciding[deciding["decides"]], _ABOVE, ">", "above")
    _asked(axis, deciding[~deciding["decides"]], _STILL, "<", "below")
    axis.set_yticks(deciding.index, [_label(row, row.number in untested) for row in deciding.itertuples()], fontsize=9)
    axis.set_ylim(len(deciding) - 0.5, -0.5)
    share_axis(axis, "share of the TE of harm; of claim 4 the gain in accuracy")
    figure.suptitle("What decides each claim, held-out pairs, 95% intervals", fontsize=11)
    legend(figure, axis)
    return figure


def _numbers_of(axis: Axes, deciding: pd.DataFrame, side: str) -> None:
    """A dot with its interval in each row; those of the placebo are hollow and lie below."""
    name, column, colour, marker, beside = _SIDES[side]
    rows = deciding.index + beside
    axis.hlines(rows, deciding[f"{column}_low"], deciding[f"{column}_high"], color=colour, linewidth=1.4)
    filled = colour if side == "harm" else "white"
    axis.plot(deciding[column], rows, marker, color=colour, markerfacecolor=filled, markersize=5, label=name)


def _asked(axis: Axes, part: pd.DataFrame, thresholds: Mapping[int, float], arrow: str, where: str) -> None:
    """What the claim's rule asks of each row, by the number of the claim."""
    at = part["number"].map(thresholds)
    axis.plot(at, part.index, arrow, color="black", markersize=6, label=f"harm has to lie {where}")


def _label(row: Any, untested: bool) -> str:
    """The number of the claim and what was measured."""
    direction = f", {row.direction.upper()}" if row.direction in DIRECTIONS else ""
    return f"{row.number}. {row.measure}{direction}{' (not tested)' if untested else ''}"


def specification_figure(specification: pd.DataFrame) -> Figure:
    """The share by layers, direction and pairs, and how often it is positive, negative or unclear on random halves."""
    names = list(dict.fromkeys(specification["layers"]))
    figure = Figure((WIDTH, 1.6 + 0.5 * len(names)), DPI, layout="constrained")
    axes = figure.subplots(1, 3, sharey=True, width_ratios=(2, 2, 1))
    for axis, direction in zip(axes, DIRECTIONS, strict=False):
        _shares(axis, specification[specification["direction"] == direction], names)
        axis.set_title(direction.upper(), fontsize=10, loc="left")
    _frequencies(axes[2], specification, names)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    figure.suptitle("Direct effect of the MLPs minus that of attention, by choice", fontsize=11)
    legend(figure, axes[0])
    return figure


def curve_figure(gate_sets: pd.DataFrame, bands: pd.DataFrame) -> Figure:
    """What the first late neurons carry of TE together, held out; shares may exceed 1.

    gate_sets: `sparse.GATE_SET_COLUMNS`. bands: the rows of `ask.SET_COLUMNS` of the late MLPs together.
    """
    figure = Figure((WIDTH * 0.8, 4.2), DPI, layout="constrained")
    axis = figure.subplots()
    for name, colour, marker in zip(DIRECTIONS, COLOURS, MARKERS, strict=False):
        _by_size(axis, gate_sets, name, colour, marker)
        whole = bands[bands["direction"] == name]["harm"]
        if len(whole):
            label = f"late MLPs together, {name.upper()}"
            axis.axhline(float(whole.iloc[0]), color=colour, linestyle=":", linewidth=1, label=label)
    axis.axhline(HALF, color="0.6", linewidth=0.8, zorder=0)
    axis.axvline(1, color="0.6", linewidth=0.8, zorder=0)
    axis.set(xscale="log", xlabel="late neurons, strongest first (%)", ylabel="joint effect / TE")
    axis.xaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    figure.suptitle("The first late neurons together, held-out pairs; grey: 1% and half of TE", fontsize=11)
    legend(figure, axis, columns=3)
    return figure


def _by_size(axis: Axes, gate_sets: pd.DataFrame, name: str, colour: str, marker: str) -> None:
    """Joint effects in one direction with their band; dashed: the direct ones."""
    part = 100 * gate_sets["part"]
    axis.plot(part, gate_sets[name], color=colour, marker=marker, markersize=4, label=name.upper())
    direct, label = gate_sets[f"direct_{name}"], f"direct, {name.upper()}"
    axis.plot(part, direct, "--", color=colour, linewidth=1, label=label)
    low, high = gate_sets[f"{name}_low"], gate_sets[f"{name}_high"]
    axis.fill_between(part, low, high, color=colour, alpha=0.15, linewidth=0)


def _shares(axis: Axes, part: pd.DataFrame, names: list[str]) -> None:
    """A dot with its interval for every kind of pairs."""
    for place, (split, colour) in enumerate(zip(SPLITS, COLOURS[2:], strict=True)):
        own = part[part["pairs"] == split].set_index("layers").reindex(names)
        at = [row + 0.18 * (place - 1.5) for row in range(len(names))]
        axis.hlines(at, own["share_low"], own["share_high"], color=colour, linewidth=1.2)
        axis.plot(own["share"], at, MARKERS[place], color=colour, markersize=4, label=SPLITS[split])
    axis.axvline(0, color="0.5", linewidth=0.8)
    axis.xaxis.set_major_formatter(PercentFormatter(1.0))
    axis.set_xlabel("share of TE")


def _frequencies(axis: Axes, specification: pd.DataFrame, names: list[str]) -> None:
    """How often the interval of a random half says what, both directions together."""
    halves = specification[specification["pairs"] == RANDOM]
    counts = halves.groupby("layers")[list(SIGNS)].sum().reindex(names)
    parts = counts.div(counts.sum(axis=1), axis=0)
    start = parts.iloc[:, 0] * 0
    for name, colour in SIGNS.items():
        axis.barh(range(len(names)), parts[name], left=start, color=colour, label=name)
        start = start + parts[name]
    axis.xaxis.set_major_formatter(PercentFormatter(1.0))
    axis.set_xlabel("random halves")
    axis.legend(fontsize=7, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
