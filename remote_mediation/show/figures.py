"""How figures look, and what several of them are made of: lines by layer, heat maps, dots with their intervals.

NIE and TIE stand side by side on one scale, because a site mediates only if it is both sufficient and necessary. What
is uncertain is drawn as such: bands are 95% intervals and are left out where there is none. Figures are plain objects;
nothing here touches pyplot or matplotlib's settings, so importing and drawing change nothing for the caller.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import CenteredNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from remote_mediation.stats import Estimate

DPI = 150
WIDTH = 9.0
"""Inches; with `DPI`, 1350 pixels, which GitHub shows at about two thirds."""

# Okabe & Ito 2008: told apart with any common colour vision. Lines also differ by marker.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")
_DIVERGING = "RdBu_r"
QUESTIONS = {"nie": "is it sufficient?", "tie": "is it necessary?"}
"""What the left and the right panel ask."""
_MOST_TICKS = 9


def png(figure: Figure) -> bytes:
    """The figure as PNG; the same bytes for the same figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


def estimates_of(sites: pd.DataFrame, analysis: str, split: str = "all") -> pd.DataFrame:
    """NIE and TIE of an analysis's sites on a split. sites: `Summary.sites`."""
    chosen = sites["quantity"].isin(list(QUESTIONS)) & (sites["split"] == split)
    return sites[chosen & (sites["analysis"] == analysis)]


def by_layer(part: pd.DataFrame, total: Estimate, text: str) -> Figure:
    """Effects by layer, a line per position, with TE for comparison. text: the figure's title."""
    part = part.assign(name=part["position"])
    figure, axes = panels(1)
    title(figure, text, part, "mean and 95% interval")
    for axis, quantity in zip(axes[0], QUESTIONS, strict=True):
        estimates = part[part["quantity"] == quantity]
        lines(axis, estimates)
        axis.axhline(total.value, color="black", linestyle="--", label=f"TE, {total.value:.3g}")
        describe(axis, estimates)
    legend(figure, axes[0, 0])
    return figure


def unit_of(estimates: pd.DataFrame) -> str:
    """What estimates are measured in."""
    return str(estimates["unit"].iloc[0])


def panels(rows: int, height: float = 3.6) -> tuple[Figure, npt.NDArray[Any]]:
    """A row of panels for each facet: NIE on the left, TIE on the right."""
    figure = Figure((WIDTH, height * rows + 0.7), DPI, layout="constrained")
    axes = figure.subplots(rows, len(QUESTIONS), sharey=True, squeeze=False)
    return figure, axes


def title(figure: Figure, text: str, estimates: pd.DataFrame, shown: str) -> None:
    """What was done, over how many pairs, and what most estimates ask to be read with care for."""
    lines = [text, f"{shown}; pairs: {estimates['n'].max()}, clusters: {estimates['clusters'].max()}"]
    care = estimates["reason"].mode().iloc[0]
    figure.suptitle("\n".join([*lines, care] if care else lines), fontsize=11)


def legend(figure: Figure, axis: Axes, columns: int = 5) -> None:
    """What an axis shows, below the figure."""
    figure.legend(
        *axis.get_legend_handles_labels(), loc="outside lower center", ncols=columns, fontsize=9, frameon=False
    )


def lines(axis: Axes, estimates: pd.DataFrame) -> None:
    """A line with its 95% band for every `name`, in alphabetical order so that colours stay the same."""
    for (name, line), colour, marker in zip(estimates.groupby("name"), cycle(COLOURS), cycle(MARKERS), strict=False):
        ordered = line.sort_values("layer")
        layers = ordered["layer"]
        axis.fill_between(layers, ordered["ci_low"], ordered["ci_high"], color=colour, alpha=0.2, linewidth=0)
        axis.plot(layers, ordered["mean"], color=colour, marker=marker, markersize=3.5, label=str(name))
    axis.axhline(0, color="0.5", linewidth=0.8)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set(xlabel="layer", ylabel=f"effect ({unit_of(estimates)})")


def describe(axis: Axes, estimates: pd.DataFrame, position: str = "") -> None:
    """A title that says what is asked and where the effect is strongest."""
    axis.label_outer()
    top = estimates.loc[estimates["mean"].abs().idxmax()]
    quantity = str(top["quantity"])
    where = f" at '{position}'" if position else ""
    asked = f"{quantity.upper()}{where}: {QUESTIONS[quantity]}"
    strongest = f"strongest: {top['name']}, layer {top['layer']}: {top['mean']:.3g}"
    axis.set_title(f"{asked}\n{strongest}", fontsize=10, loc="left")


def heat_maps(
    facets: Mapping[str, pd.DataFrame], column: str, order: Callable[[str], Any], alpha: float
) -> tuple[Figure, npt.NDArray[Any]]:
    """Layer by column, coloured by the mean on one scale that is centred on 0; a row per position."""
    every = pd.concat(facets.values())
    figure, axes = panels(len(facets), min(7.0, 2.5 + 0.08 * every["layer"].nunique()))
    colours = CenteredNorm(halfrange=float(every["mean"].abs().max()) or 1.0)
    for row, (position, part) in zip(axes, facets.items(), strict=True):
        for axis, quantity in zip(row, QUESTIONS, strict=True):
            estimates = part[part["quantity"] == quantity]
            means, q = (_matrix(estimates, column, order, values) for values in ("mean", "q"))
            _heat_map(axis, means, colours)
            _dots(axis, q, alpha)
            describe(axis, estimates, position)
    scale = ScalarMappable(colours, _DIVERGING)
    figure.colorbar(scale, ax=axes, label=f"effect ({unit_of(every)}); dot: q ≤ {alpha:g}", shrink=0.9)
    return figure, axes


def _matrix(estimates: pd.DataFrame, column: str, order: Callable[[str], Any], values: str) -> pd.DataFrame:
    table = estimates.pivot(index="layer", columns=column, values=values)
    return table[sorted(table.columns, key=order)]


def _heat_map(axis: Axes, means: pd.DataFrame, colours: CenteredNorm) -> None:
    axis.set_facecolor("0.85")  # shows where nothing was measured
    axis.imshow(means, origin="lower", aspect="auto", cmap=_DIVERGING, norm=colours, interpolation="nearest")
    axis.set_xticks(*ticks(list(means.columns), _MOST_TICKS), fontsize=8)
    axis.set_yticks(*ticks(list(means.index), _MOST_TICKS), fontsize=8)
    axis.set_ylabel("layer")


def _dots(axis: Axes, q: pd.DataFrame, alpha: float) -> None:
    rows, columns = np.nonzero(q.to_numpy(float) <= alpha)
    axis.scatter(columns, rows, s=7, color="white", edgecolors="black", linewidths=0.6)


def ticks(labels: Sequence[Any], most: int) -> tuple[list[int], list[str]]:
    """Places and texts of evenly spaced labels."""
    places = list(range(0, len(labels), math.ceil(len(labels) / most)))
    return places, [str(labels[place]) for place in places]


def dot_rows(
    axis: Axes, series: Sequence[tuple[str, pd.DataFrame, str, str]], names: Sequence[str], first: int = 0
) -> None:
    """A dot with its interval per row; series (label, table, column of values, column of names) side by side.

    first: colour of the first series.
    """
    looks = zip(series, cycle(COLOURS[first:]), cycle(MARKERS[first:]), strict=False)
    for number, ((label, table, column, by), colour, marker) in enumerate(looks):
        beside = 0.25 * (number - (len(series) - 1) / 2)
        rows = [names.index(name) + beside for name in table[by]]
        axis.hlines(rows, table[f"{column}_low"], table[f"{column}_high"], color=colour)
        axis.plot(table[column], rows, color=colour, marker=marker, linestyle="", label=label)
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.5, -0.5)


def share_axis(axis: Axes, label: str) -> None:
    """Percentages, with 0 and 100% marked and in sight."""
    for at in (0, 1):
        axis.axvline(at, color="0.8", linewidth=0.8, zorder=0)
    low, high = axis.get_xlim()
    axis.set_xlim(min(low, -0.05), max(high, 1.05))
    axis.xaxis.set_major_formatter(PercentFormatter(1.0))
    axis.set_xlabel(label)
