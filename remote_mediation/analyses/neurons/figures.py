"""Pictures of single neurons and of the gate set."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from remote_mediation.show.figures import (
    COLOURS,
    DPI,
    MARKERS,
    QUESTIONS,
    WIDTH,
    by_layer,
    estimates_of,
    legend,
    title,
    unit_of,
)
from remote_mediation.show.tables import count
from remote_mediation.stats import Estimate
from remote_mediation.summary import UNITS

_MOST_NAMED = 12
"""Units named in the scatter plot; more would cover each other."""
_QUANTITIES = {"nie": "NIE", "tie": "TIE"}


def whole_mlps_figure(sites: pd.DataFrame, total: Estimate) -> Figure:
    """All neurons of one MLP together by layer, a line per position, with TE for comparison."""
    return by_layer(estimates_of(sites, "neurons"), total, "All neurons of one MLP, swapped together, layer by layer")


def units_figure(sites: pd.DataFrame, mediators: pd.DataFrame, threshold: float, min_share: float) -> Figure:
    """Single neurons on the held-out pairs, NIE against TIE; those that mediate are named layer.neuron.

    mediators: `neurons.MEDIATOR_COLUMNS`. threshold: `min_share` of TE on the held-out pairs, in the outcome's unit.
    """
    part = estimates_of(sites, UNITS, "heldout")
    wide = part.pivot(index=["layer", "position", "unit_start"], columns="quantity", values="mean")
    mediates = mediators["mediates"].astype(bool)
    found = mediators[mediates]
    figure = Figure((WIDTH * 0.8, 5.8), DPI, layout="constrained")
    axis = figure.subplots()
    _unit_dots(axis, wide, found, mediators[~mediates])
    _name_units(axis, found)
    _threshold_lines(axis, threshold, f"{min_share:.0%} of TE")
    nie, tie = (f"{quantity.upper()} ({unit_of(part)}): {asked}" for quantity, asked in QUESTIONS.items())
    axis.set(xlabel=nie, ylabel=tie)
    axis.margins(0.1)
    title(figure, f"Single MLP neurons on held-out pairs: {len(found)} of {len(wide)} mediate", part, "mean")
    legend(figure, axis)
    return figure


def _unit_dots(axis: Axes, measured: pd.DataFrame, found: pd.DataFrame, others: pd.DataFrame) -> None:
    """A dot for every unit; those that mediate, and those chosen to and not confirmed, stand out."""
    axis.scatter(measured["nie"], measured["tie"], s=10, color="0.6", label=f"all {len(measured)} measured")
    axis.scatter(others["nie"], others["tie"], s=40, marker="x", color="0.2", label=f"{len(others)} not confirmed")
    axis.scatter(found["nie"], found["tie"], s=40, color=COLOURS[1], label=f"{len(found)} mediating")


def _name_units(axis: Axes, found: pd.DataFrame) -> None:
    """Names beside the strongest units, by turns above and below so that neighbours stay readable."""
    for number, unit in enumerate(found.sort_values("nie", ascending=False).head(_MOST_NAMED).itertuples()):
        offset = (5, -11 if number % 2 else 5)
        point = (unit.nie, unit.tie)
        axis.annotate(f"{unit.layer}.{unit.unit}", point, xytext=offset, textcoords="offset points", fontsize=9)


def _threshold_lines(axis: Axes, threshold: float, label: str) -> None:
    axis.axvline(threshold, color="black", linestyle="--", linewidth=0.9, label=label)
    axis.axhline(threshold, color="black", linestyle="--", linewidth=0.9)
    axis.axvline(0, color="0.8", linewidth=0.8, zorder=0)
    axis.axhline(0, color="0.8", linewidth=0.8, zorder=0)


_SETS = {"gates": "gates", "mlp": "whole MLP", "earlier": "earlier layer", "random": "random sets"}


def gate_figure(curve: pd.DataFrame, sets: pd.DataFrame, carry: float, unit: str) -> Figure:
    """What the first neurons carry of their MLP's NIE, and the gate set beside its controls, held out.

    curve: `neurons.CURVE_COLUMNS`. sets: `neurons.GATE_COLUMNS`. carry: share at which the curve was cut.
    """
    figure = Figure((WIDTH, 4.3), DPI, layout="constrained")
    left, right = figure.subplots(1, 2)
    gates = sets[sets["set"] == "gates"].iloc[0]
    figure.suptitle(f"The gate set: {count(gates['size'], 'neuron')} of layer {gates['layer']}", fontsize=11)
    _curve(left, curve, carry, int(gates["size"]))
    _controls(right, sets)
    left.set_title("The strongest neurons together, NIE", fontsize=10, loc="left")
    right.set_title("Effects on held-out pairs, 95% intervals", fontsize=10, loc="left")
    right.set(xlabel=f"joint effect ({unit}); a dot per random set")
    for axis in (left, right):
        axis.legend(fontsize=8, frameon=False)
    return figure


def _curve(axis: Axes, curve: pd.DataFrame, carry: float, size: int) -> None:
    for name, colour, marker in zip(("discovery", "heldout"), COLOURS, MARKERS, strict=False):
        label = {"heldout": "held out"}.get(name, name)
        axis.plot(curve["size"], curve[name], color=colour, marker=marker, markersize=3.5, label=label)
    axis.axhline(carry, color="black", linestyle="--", linewidth=0.9, label=f"{carry:.0%} of the MLP's NIE")
    axis.axvline(size, color="black", linestyle=":", linewidth=1.2, label=f"chosen: {size}")
    axis.axhline(0, color="0.8", linewidth=0.8, zorder=0)
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    axis.set(xlabel="neurons, the strongest first", ylabel="share of the whole MLP's NIE")


def _controls(axis: Axes, sets: pd.DataFrame) -> None:
    """Named sets with their intervals, and a small dot for each random set."""
    names = [name for name in _SETS if (sets["set"] == name).any()]
    found, random = sets[sets["set"] != "random"], sets[sets["set"] == "random"]
    for number, (column, label) in enumerate(_QUANTITIES.items()):
        colour, marker, beside = COLOURS[number], MARKERS[number], 0.24 * (number - 0.5)
        rows = [names.index(name) + beside for name in found["set"]]
        axis.hlines(rows, found[f"{column}_low"], found[f"{column}_high"], color=colour)
        axis.plot(found[column], rows, color=colour, marker=marker, linestyle="", label=label)
        row = names.index("random") if len(random) else 0
        _cloud(axis, random[column], row + beside, colour)
    axis.axvline(0, color="0.5", linewidth=0.8, zorder=0)
    axis.set_yticks(range(len(names)), [_SETS[name] for name in names])
    axis.invert_yaxis()


def _cloud(axis: Axes, values: pd.Series, row: float, colour: str) -> None:
    """Small dots about a row, spread so that they do not hide each other."""
    heights = row + 0.1 * np.sin(np.arange(len(values)) * 2.4)
    axis.scatter(values, heights, s=5, color=colour, alpha=0.4, linewidths=0)
