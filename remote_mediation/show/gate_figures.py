"""Pictures of the gate set: how it was cut, what needs it, what holding it does, and whether that can be got around.

Tables of analyses in, figures out, in the style of `figures`: intervals are drawn where there are any.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from remote_mediation.analyses import intervene
from remote_mediation.show.figures import COLOURS, DPI, MARKERS, WIDTH, legend

_QUANTITIES = {"nie": "NIE", "tie": "TIE"}
_SETS = {"gates": "gates", "mlp": "whole MLP", "earlier": "earlier layer", "random": "random sets"}
_SIDES = ("harmful", "harmless")
_LEVELS = {intervene.MEAN: "--", intervene.RANDOM: ":"}


def gate_figure(curve: pd.DataFrame, sets: pd.DataFrame, carry: float, unit: str) -> Figure:
    """What the first neurons carry of their MLP's NIE, and the gate set beside its controls, held out.

    curve: `neurons.CURVE_COLUMNS`. sets: `neurons.GATE_COLUMNS`. carry: share at which the curve was cut.
    """
    figure = Figure((WIDTH, 4.3), DPI, layout="constrained")
    left, right = figure.subplots(1, 2)
    gates = sets[sets["set"] == "gates"].iloc[0]
    figure.suptitle(f"The gate set: {gates['size']} neurons of layer {gates['layer']}", fontsize=11)
    _curve(left, curve, carry, int(gates["size"]))
    _controls(right, sets)
    left.set_title("The strongest neurons together, NIE", fontsize=10, loc="left")
    right.set_title("Effects on held-out pairs, 95% intervals", fontsize=10, loc="left")
    right.set(xlabel=f"joint effect ({unit}); a dot per random set")
    for axis in (left, right):
        axis.legend(fontsize=8, frameon=False)
    return figure


def path_figure(paths: pd.DataFrame) -> Figure:
    """The share of the early site's NIE and TIE that needs what was frozen.

    paths: `paths.PATH_COLUMNS`.
    """
    part = paths[paths["frozen"] != "nothing"]
    names = list(dict.fromkeys(part["frozen"]))
    figure = Figure((WIDTH * 0.8, 1.9 + 0.45 * len(names)), DPI, layout="constrained")
    axis = figure.subplots()
    shares = {label: part[part["quantity"] == name] for name, label in _QUANTITIES.items()}
    _dots(axis, [(label, one, "share", "frozen") for label, one in shares.items()], names)
    _shares(axis, "gone when it is frozen, share of the early site's effect")
    counts = f"pairs: {part['n'].max()}, clusters: {part['clusters'].max()}"
    title = f"What the effect of layer {part['layer'].iloc[0]} at the differing tokens needs later"
    figure.suptitle(f"{title}\n95% intervals; {counts}", fontsize=11)
    legend(figure, axis)
    return figure


def dose_figure(held: pd.DataFrame, doses: Mapping[str, float], unit: str, total: float) -> Figure:
    """Outcome and judged answers by what the gates are multiplied with, on held-out prompts of both kinds.

    held: `intervene.INTERVENE_COLUMNS`. doses: what each of its conditions multiplies the gates with; 1 is the plain
    model. total: mean TE; the outcome must change by -TE on harmful prompts to be as on harmless ones.
    """
    figure = Figure((WIDTH, 4.6), DPI, layout="constrained")
    left, right = figure.subplots(1, 2)
    judged = f"prompts: {held['n'].max()} harmful and as many harmless, held out"
    figure.suptitle(f"The gates turned down and up\n95% intervals; {judged}", fontsize=11)
    for side, colour, marker in zip(_SIDES, COLOURS, MARKERS, strict=False):
        part = held[held["prompts"] == side]
        label = f"{side} prompts"
        _dose(left, part, doses, "change", label, colour, marker)
        _dose(right, part, doses, "complied", label, colour, marker)
    left.axhline(-total, color="black", linewidth=0.9, label="-TE: harmful prompts as harmless ones")
    left.axhline(0, color="0.8", linewidth=0.8, zorder=0)
    left.set(xlabel="gates multiplied by (1: plain model)", ylabel=f"change of the outcome ({unit})")
    left.set_title("Outcome", fontsize=10, loc="left")
    right.set_title("Answers that comply, says the judge", fontsize=10, loc="left")
    right.set(xlabel="gates multiplied by (1: plain model)", ylabel="share of answers", ylim=(-0.04, 1.04))
    right.yaxis.set_major_formatter(PercentFormatter(1.0))
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    return figure


def attack_figure(attacks: pd.DataFrame, undone: str) -> Figure:
    """What the gates carry under every attack, and how much of TE holding them undoes.

    attacks: `attacks.ATTACK_COLUMNS`. undone: what the right panel shows, in a few words.
    """
    names = list(attacks["attack"])
    figure = Figure((WIDTH, 1.9 + 0.45 * len(names)), DPI, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    counts = f"held-out pairs: {attacks['n'].max()}, clusters: {attacks['clusters'].max()}"
    figure.suptitle(f"The gate set under attack\n95% intervals; {counts}", fontsize=11)
    series = [(f"{label} / TE", attacks, f"{name}_share", "attack") for name, label in _QUANTITIES.items()]
    _dots(left, series, names)
    _dots(right, [("held", attacks, "repair", "attack")], names, first=2)
    _shares(left, "share of TE")
    _shares(right, "share of TE")
    left.set_title("What the gates carry", fontsize=10, loc="left")
    right.set_title(undone, fontsize=10, loc="left")
    legend(figure, left)
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
    for number, (column, label) in enumerate(_QUANTITIES.items()):
        colour, marker, beside = COLOURS[number], MARKERS[number], 0.24 * (number - 0.5)
        found = sets[sets["set"] != "random"]
        rows = [names.index(name) + beside for name in found["set"]]
        axis.hlines(rows, found[f"{column}_low"], found[f"{column}_high"], color=colour)
        axis.plot(found[column], rows, color=colour, marker=marker, linestyle="", label=label)
        random = sets[sets["set"] == "random"]
        spread = 0.1 * np.sin(np.arange(len(random)) * 2.4)  # so that dots do not hide each other
        heights = (names.index("random") if len(random) else 0) + beside + spread
        axis.scatter(random[column], heights, s=5, color=colour, alpha=0.4, linewidths=0)
    axis.axvline(0, color="0.5", linewidth=0.8, zorder=0)
    axis.set_yticks(range(len(names)), [_SETS[name] for name in names])
    axis.invert_yaxis()


def _dose(
    axis: Axes, part: pd.DataFrame, doses: Mapping[str, float], column: str, label: str, colour: str, marker: str
) -> None:
    """A line over doses, and as level lines what does not depend on one."""
    line = part[part["held"].isin(list(doses))]
    line = line.assign(dose=line["held"].map(doses)).sort_values("dose")
    low, high = (line[f"{column}_{end}"].fillna(line[column]) for end in ("low", "high"))
    axis.fill_between(line["dose"], low, high, color=colour, alpha=0.2, linewidth=0)
    axis.plot(line["dose"], line[column], color=colour, marker=marker, markersize=4, label=label)
    for name, style in _LEVELS.items():
        for value in part.loc[part["held"] == name, column]:
            axis.axhline(
                value, color=colour, linestyle=style, linewidth=1.2, label=f"{name.split()[0]} at mean, {label}"
            )


def _dots(
    axis: Axes, series: Sequence[tuple[str, pd.DataFrame, str, str]], names: Sequence[str], first: int = 0
) -> None:
    """A dot with its interval per row; series (label, table, column of values, column of names) side by side.

    first: colour of the first series.
    """
    for number, ((label, table, column, by), colour, marker) in enumerate(
        zip(series, cycle(COLOURS[first:]), cycle(MARKERS[first:]), strict=False)
    ):
        beside = 0.25 * (number - (len(series) - 1) / 2)
        rows = [names.index(name) + beside for name in table[by]]
        axis.hlines(rows, table[f"{column}_low"], table[f"{column}_high"], color=colour)
        axis.plot(table[column], rows, color=colour, marker=marker, linestyle="", label=label)
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.5, -0.5)


def _shares(axis: Axes, label: str) -> None:
    """Percentages, with 0 and 100% marked and in sight."""
    for at in (0, 1):
        axis.axvline(at, color="0.8", linewidth=0.8, zorder=0)
    low, high = axis.get_xlim()
    axis.set_xlim(min(low, -0.05), max(high, 1.05))
    axis.xaxis.set_major_formatter(PercentFormatter(1.0))
    axis.set_xlabel(label)
