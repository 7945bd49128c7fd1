"""Figures of the rival claims: directions by layer and token, and all mediators on one axis."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import CenteredNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import PercentFormatter

from remote_mediation.analyses.rivals.geometry import PLACES
from remote_mediation.analyses.rivals.rulings import DIRECTION, EARLY, HEADS, NEURONS, TWO
from remote_mediation.show.figures import COLOURS, DPI, MARKERS, QUESTIONS, WIDTH, legend, ticks

_MOST_TICKS = 9
AXIS = (
    *("rival", "said", "measure", "values", "direction", "decides"),
    *("harm", "harm_low", "harm_high"),
)
"""Columns of what is drawn on one axis: those of `rulings.SET_COLUMNS`, and what is said of the claim."""
LATE_GATE = "sparse late gate, claim 3"
"""How claim 3 is called there."""
_NAMES = (*(rival.name for rival in (DIRECTION, TWO, NEURONS, EARLY, HEADS)), LATE_GATE)
_LOOKS = dict(zip(_NAMES, zip(COLOURS, MARKERS, strict=True), strict=True))
"""Colour and marker of each claim, the same in every report."""
_BESIDE = 1.3
"""How far apart dots of claims stand that swap as many numbers, a factor."""
_MOST_BEYOND = 0.5
"""How far beyond all values an interval is drawn."""


def map_figure(table: pd.DataFrame, said: str) -> Figure:
    """Share of TE by layer and token of the direction, NIE beside TIE.

    table: `directions.MAP_COLUMNS`. said: of the chosen one on the held-out pairs.
    """
    figure = Figure((WIDTH, 5.2), DPI, layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    colours = CenteredNorm(halfrange=float(table[["nie", "tie"]].abs().to_numpy().max()) or 1.0)
    maps = [_share_map(axis, table, quantity, colours) for axis, quantity in zip(axes, QUESTIONS, strict=True)]
    axes[0].set_ylabel("layer; above the line none is chosen")
    figure.colorbar(maps[-1], ax=axes, label="share of TE", format=PercentFormatter(1.0), shrink=0.9)
    shown = f"{table['n'].iloc[0]} discovery pairs; dot: chosen, held out: {said}"
    figure.suptitle(f"Projections onto differences of means, {shown}", fontsize=11)
    return figure


def _share_map(axis: Axes, table: pd.DataFrame, quantity: str, colours: CenteredNorm) -> AxesImage:
    """One quantity by layer and token, with a dot on the chosen direction and a line above those that may be it."""
    positions = list(dict.fromkeys(table["position"]))
    shares = table.pivot(index="layer", columns="position", values=quantity)[positions]
    drawn = axis.imshow(
        shares,
        origin="lower",
        aspect="auto",
        cmap="RdBu_r",
        norm=colours,
        interpolation="nearest",
    )
    best = table[table["chosen"]].iloc[0]
    axis.axhline(float(table.loc[table["eligible"], "layer"].max()) + 0.5, color="black", linewidth=0.8)
    axis.plot(positions.index(best["position"]), best["layer"], "o", color="white", markeredgecolor="black")
    axis.set_xticks(range(len(positions)), positions, rotation=30, ha="right", fontsize=8)
    axis.set_yticks(*ticks(list(shares.index), _MOST_TICKS), fontsize=8)
    axis.set_title(f"{quantity.upper()}: {QUESTIONS[quantity]}", fontsize=10, loc="left")
    return drawn


def geometry_figure(table: pd.DataFrame) -> Figure:
    """Cosine, silhouettes and lengths of the directions of harm and refusal by layer. table: `GEOMETRY_COLUMNS`."""
    figure = Figure((WIDTH, 3.6), DPI, layout="constrained")
    panels = {"cosine": "cosine", "silhouette": "silhouette", "length": "length of the difference"}
    for axis, (quantity, label) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        if quantity == "cosine":
            axis.plot(table["layer"], table["cosine"], color="black", label="harm with refusal")
        for name, colour, marker in zip(PLACES, COLOURS, MARKERS, strict=False):
            text = f"{name}, of two halves" if quantity == "cosine" else f"direction of {name}"
            style = ":" if quantity == "cosine" else "-"
            axis.plot(table["layer"], table[f"{quantity}_{name}"], style, color=colour, marker=marker, ms=3, label=text)
        axis.axhline(0, color="0.8", linewidth=0.8, zorder=0)
        axis.set(xlabel="layer", ylabel=label)
        axis.legend(fontsize=7, frameon=False)
    figure.suptitle(f"Harm and refusal in the stream ({table['n'].max()} discovery pairs)", fontsize=11)
    return figure


def axis_figure(every: pd.DataFrame, result: str) -> Figure:
    """Share of TE against the numbers that are swapped at each token; the legend says each verdict.

    every: `AXIS`. result: for the title, in a line.
    """
    figure = Figure((WIDTH, 5.0), DPI, layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, quantity in zip(axes, QUESTIONS, strict=True):
        _by_numbers(axis, every[every["direction"] == quantity])
        axis.set_title(f"{quantity.upper()}: {QUESTIONS[quantity]}", fontsize=10, loc="left")
    values = every["harm"]
    low = min(max(every["harm_low"].min(), values.min() - _MOST_BEYOND), -0.1)
    high = max(min(every["harm_high"].max(), values.max() + _MOST_BEYOND), 1.1)
    axes[0].set_ylim(low - 0.1, high + 0.1)
    axes[0].set_ylabel("share of TE carried")
    axes[0].yaxis.set_major_formatter(PercentFormatter(1.0))
    shown = "share of TE by the numbers swapped; held-out pairs, 95% intervals; filled: what a verdict rests on"
    figure.suptitle(f"{result}\n{shown}", fontsize=11)
    legend(figure, axes[0], columns=2)
    return figure


def _by_numbers(axis: Axes, part: pd.DataFrame) -> None:
    """Every claim's sets in one direction, by how many numbers are swapped."""
    place = part.groupby("values")["rival"].transform(lambda names: pd.factorize(names)[0])
    part = part.assign(values=part["values"] * _BESIDE**place)
    for (rival, said), own in part.groupby(["rival", "said"], sort=False):
        _dots(axis, own, *_LOOKS[rival], f"{rival}: {said}")
    for share in (0, 0.5, 1):
        axis.axhline(share, color="0.8", linewidth=0.8, zorder=0)
    axis.set(xscale="log", xlabel="numbers swapped at each token; as many: side by side")


def _dots(axis: Axes, own: pd.DataFrame, colour: str, marker: str, label: str) -> None:
    """A claim's sets: filled what its verdict rests on, hollow what stands beside it."""
    axis.vlines(own["values"], own["harm_low"], own["harm_high"], color=colour, linewidth=1)
    for decides, part in own.groupby("decides"):  # what a verdict rests on is drawn last, and seen
        fill = colour if decides else "white"
        axis.plot(part["values"], part["harm"], marker, color=colour, markerfacecolor=fill, markersize=5)
    axis.plot([], [], marker, color=colour, markersize=5, label=label)
