"""Pictures of a study: tables of estimates in, matplotlib figures out.

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

from remote_mediation.analyses.neurons import UNITS
from remote_mediation.stats import DepthProfile, Estimate
from remote_mediation.tokens import SPANS

DPI = 150
WIDTH = 9.0
"""Inches; with `DPI`, 1350 pixels, which GitHub shows at about two thirds."""

# Okabe & Ito 2008: told apart with any common colour vision. Lines also differ by marker.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")
_DIVERGING = "RdBu_r"
_QUESTIONS = {"nie": "is it sufficient?", "tie": "is it necessary?"}
"""What the left and the right panel ask."""
_MODULES = {"mlp_output": "MLP", "attention_output": "attention"}
_MOST_NAMED = 12
"""Units named in the scatter plot; more would cover each other."""
_MOST_TICKS = 9
_MOST_TOKENS = 24
"""Labels along an axis of a map; those of tokens stand upright and need less room."""


def depth(sites: pd.DataFrame, total: Estimate) -> Figure:
    """Residual stream by layer, a line per position, with TE for comparison.

    sites: `Summary.sites` (all tables named `sites` here are), analysis `layers`.
    """
    return _by_layer(_of(sites, "layers"), total, "Residual stream after each layer, swapped at one position")


def neurons(sites: pd.DataFrame, total: Estimate) -> Figure:
    """All neurons of one MLP together by layer, a line per position, with TE for comparison."""
    return _by_layer(_of(sites, "neurons"), total, "All neurons of one MLP, swapped together, layer by layer")


def modules(sites: pd.DataFrame, mlp: DepthProfile | None, attention: DepthProfile | None) -> Figure:
    """MLP against attention by layer, a row per position; the last third of the layers is shaded.

    mlp, attention: profiles of NIE at the first position measured; their centres of mass are marked where defined.
    """
    part = _of(sites, "modules")
    part = part.assign(name=part["component"].map(_MODULES))
    layers = int(part["layer"].max()) + 1
    positions = list(dict.fromkeys(part["position"]))
    figure, axes = _panels(len(positions))
    _title(figure, "What MLP and attention add, swapped layer by layer", part, "mean and 95% interval")
    for row, position in zip(axes, positions, strict=True):
        for axis, quantity in zip(row, _QUESTIONS, strict=True):
            estimates = part[(part["quantity"] == quantity) & (part["position"] == position)]
            _lines(axis, estimates)
            axis.axvspan(2 * layers / 3 - 0.5, layers - 0.5, color="0.92", zorder=0, label="last third of layers")
            _describe(axis, estimates, position)
    _mark_centre(axes[0, 0], mlp, layers, "MLP")
    _mark_centre(axes[0, 0], attention, layers, "attention")
    legend(figure, axes[0, 0])
    return figure


def tokens(sites: pd.DataFrame, alpha: float) -> Figure:
    """Residual stream by token and layer; the number of pairs that have a token stands above its column.

    alpha: cells whose q is at most this carry a dot, here and in the other maps.
    """
    part = _of(sites, "tokens")
    part = part.assign(name=part["position"])
    figure, axes = _heat_maps({"": part}, "position", _token_order, alpha)
    _title(figure, "Residual stream after each layer, swapped at one token", part, "mean")
    counts = part.groupby("position")["n"].max()
    names = sorted(counts.index, key=_token_order)
    for axis in axes[0]:
        axis.set_xlabel("token, counted within its span")
        axis.set_xticks(*_ticks(names, _MOST_TOKENS), rotation=90, fontsize=8)
        above = axis.secondary_xaxis("top")
        above.set_xlabel("pairs", fontsize=8)
        above.set_xticks(*_ticks([counts[name] for name in names], _MOST_TOKENS), fontsize=8)
    return figure


def heads(sites: pd.DataFrame, alpha: float) -> Figure:
    """Attention heads by layer, a row per position."""
    part = _of(sites, "heads")
    return _unit_maps(part.assign(name="head " + part["unit_start"]), "Single attention heads", "head", alpha)


def units(sites: pd.DataFrame, mediators: pd.DataFrame, threshold: float, min_share: float) -> Figure:
    """Single neurons on the held-out pairs, NIE against TIE; those that mediate are named layer.neuron.

    mediators: `Summary.mediators`. threshold: `min_share` of TE on the held-out pairs, in the outcome's unit.
    """
    part = _of(sites, UNITS, "heldout")
    wide = part.pivot(index=["layer", "position", "unit_start"], columns="quantity", values="mean")
    mediates = mediators["mediates"].astype(bool)
    found, others = mediators[mediates], mediators[~mediates]
    figure = Figure((WIDTH * 0.8, 5.8), DPI, layout="constrained")
    axis = figure.subplots()
    axis.scatter(wide["nie"], wide["tie"], s=10, color="0.6", label=f"all {len(wide)} measured")
    axis.scatter(others["nie"], others["tie"], s=40, marker="x", color="0.2", label=f"{len(others)} not confirmed")
    axis.scatter(found["nie"], found["tie"], s=40, color=COLOURS[1], label=f"{len(found)} mediating")
    _name_units(axis, found)
    _threshold_lines(axis, threshold, f"{min_share:.0%} of TE")
    nie, tie = (f"{quantity.upper()} ({_unit(part)}): {asked}" for quantity, asked in _QUESTIONS.items())
    axis.set(xlabel=nie, ylabel=tie)
    axis.margins(0.1)
    _title(figure, f"Single MLP neurons on held-out pairs: {len(found)} of {len(wide)} mediate", part, "mean")
    legend(figure, axis)
    return figure


def comparison(shares: pd.DataFrame) -> Figure:
    """NIE / TE of MLP (solid) and attention (dashed) by relative depth, a colour per run; the last third is shaded.

    shares: `compare.PROFILE_COLUMNS` of one run or more, in the order of the legend.
    """
    figure = Figure((WIDTH, 5.0), DPI, layout="constrained")
    axis = figure.subplots()
    styles = zip(shares.groupby("run", sort=False), cycle(COLOURS), cycle(MARKERS), strict=False)
    for (run, part), colour, marker in styles:
        for component, dashes in (("mlp_output", "-"), ("attention_output", "--")):
            line = part[part["component"] == component].sort_values("depth")
            label = f"{run}, {_MODULES[component]}"
            axis.plot(line["depth"], line["share"], dashes, color=colour, marker=marker, markersize=3.5, label=label)
    axis.axhline(0, color="0.5", linewidth=0.8)
    axis.axvspan(2 / 3, 1, color="0.92", zorder=0)
    axis.set(xlabel="relative depth (0 first layer, 1 last; shaded: last third)", ylabel="mean NIE / mean TE")
    axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    figure.suptitle("What MLP and attention carry of each run's own total effect, layer by layer", fontsize=11)
    figure.legend(loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    return figure


def png(figure: Figure) -> bytes:
    """The figure as PNG; the same bytes for the same figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


def _of(sites: pd.DataFrame, analysis: str, split: str = "all") -> pd.DataFrame:
    chosen = sites["quantity"].isin(list(_QUESTIONS)) & (sites["split"] == split)
    return sites[chosen & (sites["analysis"] == analysis)]


def _by_layer(part: pd.DataFrame, total: Estimate, title: str) -> Figure:
    part = part.assign(name=part["position"])
    figure, axes = _panels(1)
    _title(figure, title, part, "mean and 95% interval")
    for axis, quantity in zip(axes[0], _QUESTIONS, strict=True):
        estimates = part[part["quantity"] == quantity]
        _lines(axis, estimates)
        axis.axhline(total.value, color="black", linestyle="--", label=f"TE, {total.value:.3g}")
        _describe(axis, estimates)
    legend(figure, axes[0, 0])
    return figure


def _unit(estimates: pd.DataFrame) -> str:
    return str(estimates["unit"].iloc[0])


def _panels(rows: int, height: float = 3.6) -> tuple[Figure, npt.NDArray[Any]]:
    """A row of panels for each facet: NIE on the left, TIE on the right."""
    figure = Figure((WIDTH, height * rows + 0.7), DPI, layout="constrained")
    axes = figure.subplots(rows, len(_QUESTIONS), sharey=True, squeeze=False)
    return figure, axes


def _title(figure: Figure, text: str, estimates: pd.DataFrame, shown: str) -> None:
    """What was done, over how many pairs, and what most estimates ask to be read with care for."""
    lines = [text, f"{shown}; pairs: {estimates['n'].max()}, clusters: {estimates['clusters'].max()}"]
    care = estimates["reason"].mode().iloc[0]
    figure.suptitle("\n".join([*lines, care] if care else lines), fontsize=11)


def legend(figure: Figure, axis: Axes) -> None:
    """What an axis shows, below the figure."""
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=9, frameon=False)


def _lines(axis: Axes, estimates: pd.DataFrame) -> None:
    """A line with its 95% band for every `name`, in alphabetical order so that colours stay the same."""
    for (name, line), colour, marker in zip(estimates.groupby("name"), cycle(COLOURS), cycle(MARKERS), strict=False):
        ordered = line.sort_values("layer")
        layers = ordered["layer"]
        axis.fill_between(layers, ordered["ci_low"], ordered["ci_high"], color=colour, alpha=0.2, linewidth=0)
        axis.plot(layers, ordered["mean"], color=colour, marker=marker, markersize=3.5, label=str(name))
    axis.axhline(0, color="0.5", linewidth=0.8)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set(xlabel="layer", ylabel=f"effect ({_unit(estimates)})")


def _describe(axis: Axes, estimates: pd.DataFrame, position: str = "") -> None:
    """A title that says what is asked and where the effect is strongest."""
    axis.label_outer()
    top = estimates.loc[estimates["mean"].abs().idxmax()]
    quantity = str(top["quantity"])
    where = f" at '{position}'" if position else ""
    asked = f"{quantity.upper()}{where}: {_QUESTIONS[quantity]}"
    strongest = f"strongest: {top['name']}, layer {top['layer']}: {top['mean']:.3g}"
    axis.set_title(f"{asked}\n{strongest}", fontsize=10, loc="left")


def _mark_centre(axis: Axes, profile: DepthProfile | None, layers: int, name: str) -> None:
    """The centre of mass as a dotted line in the colour of its profile; none where it is undefined."""
    if profile is None or math.isnan(profile.centre_of_mass.value):
        return
    layer = profile.centre_of_mass.value * (layers - 1)
    colour = next(line.get_color() for line in axis.lines if line.get_label() == name)
    axis.axvline(layer, color=colour, linestyle=":", linewidth=1.8, label=f"centre of {name}: {layer:.3g}")


def _unit_maps(part: pd.DataFrame, title: str, x_label: str, alpha: float) -> Figure:
    facets = {str(position): facet for position, facet in part.groupby("position", sort=False)}
    figure, axes = _heat_maps(facets, "unit_start", int, alpha)
    for axis in axes[-1]:
        axis.set_xlabel(x_label)
    _title(figure, title, part, "mean")
    return figure


def _heat_maps(
    facets: Mapping[str, pd.DataFrame], column: str, order: Callable[[str], Any], alpha: float
) -> tuple[Figure, npt.NDArray[Any]]:
    """Layer by column, coloured by the mean on one scale that is centred on 0; a row per position."""
    every = pd.concat(facets.values())
    figure, axes = _panels(len(facets), min(7.0, 2.5 + 0.08 * every["layer"].nunique()))
    colours = CenteredNorm(halfrange=float(every["mean"].abs().max()) or 1.0)
    for row, (position, part) in zip(axes, facets.items(), strict=True):
        for axis, quantity in zip(row, _QUESTIONS, strict=True):
            estimates = part[part["quantity"] == quantity]
            _heat_map(axis, _matrix(estimates, column, order, "mean"), colours)
            _dots(axis, _matrix(estimates, column, order, "q"), alpha)
            _describe(axis, estimates, position)
    scale = ScalarMappable(colours, _DIVERGING)
    figure.colorbar(scale, ax=axes, label=f"effect ({_unit(every)}); dot: q ≤ {alpha:g}", shrink=0.9)
    return figure, axes


def _matrix(estimates: pd.DataFrame, column: str, order: Callable[[str], Any], values: str) -> pd.DataFrame:
    table = estimates.pivot(index="layer", columns=column, values=values)
    return table[sorted(table.columns, key=order)]


def _heat_map(axis: Axes, means: pd.DataFrame, colours: CenteredNorm) -> None:
    axis.set_facecolor("0.85")  # shows where nothing was measured
    axis.imshow(means, origin="lower", aspect="auto", cmap=_DIVERGING, norm=colours, interpolation="nearest")
    axis.set_xticks(*_ticks(list(means.columns), _MOST_TICKS), fontsize=8)
    axis.set_yticks(*_ticks(list(means.index), _MOST_TICKS), fontsize=8)
    axis.set_ylabel("layer")


def _dots(axis: Axes, q: pd.DataFrame, alpha: float) -> None:
    rows, columns = np.nonzero(q.to_numpy(float) <= alpha)
    axis.scatter(columns, rows, s=7, color="white", edgecolors="black", linewidths=0.6)


def _ticks(labels: Sequence[Any], most: int) -> tuple[list[int], list[str]]:
    """Places and texts of evenly spaced labels."""
    places = list(range(0, len(labels), math.ceil(len(labels) / most)))
    return places, [str(labels[place]) for place in places]


def _token_order(position: str) -> tuple[int, int]:
    """Order of tokens in the prompt: spans in reading order, then the number in the brackets."""
    span, _, number = position.rstrip("]").partition("[")
    return SPANS.index(span), int(number)


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


def probe_figure(profile: pd.DataFrame, acts: Mapping[str, int]) -> Figure:
    """Accuracy of harm probes by depth, a panel per position, above what swapped labels reach.

    profile: `probes.PROBE_COLUMNS`. acts: first layer whose NIE is significant, by name of what acts.
    """
    facets = {str(position): part.sort_values("layer") for position, part in profile.groupby("position", sort=False)}
    figure = Figure((WIDTH, 4.3), DPI, layout="constrained")
    axes = figure.subplots(1, len(facets), sharey=True, squeeze=False)[0]
    counts = f"prompts: {profile['n'].max()}, clusters: {profile['clusters'].max()}"
    figure.suptitle(f"Harm read by linear probes, layer by layer\naccuracy and 95% interval; {counts}", fontsize=11)
    for axis, (position, part), colour in zip(axes, facets.items(), cycle(COLOURS), strict=False):
        _accuracies(axis, part, colour)
        for (name, layer), style in zip(acts.items(), cycle((":", "--", "-.")), strict=False):
            depths = part.loc[part["layer"] == layer, "relative_depth"]
            if len(depths):
                axis.axvline(depths.iloc[0], color="black", linestyle=style, label=f"{name} acts from layer {layer} on")
        axis.set_title(f"at '{position}'\n{_best(part)}", fontsize=10, loc="left")
        axis.set(xlabel="relative depth", ylabel="accuracy on other templates", xlim=(-0.03, 1.03))
        axis.label_outer()
    legend(figure, axes[0])
    return figure


def detector_figure(table: pd.DataFrame, recall: int = 95) -> Figure:
    """Detectors of harm: AUROC on the left, false alarms at a recall on the right; a colour per set of prompts.

    table: `detectors.DETECTOR_COLUMNS`. recall: percent, a column of the table.
    """
    names = list(dict.fromkeys(table["detector"]))
    evaluations = list(dict.fromkeys(table["evaluation"]))
    figure = Figure((WIDTH, 2.2 + 0.45 * len(names)), DPI, layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    counts = ", ".join(f"{name}: {table.loc[table['evaluation'] == name, 'n'].max()}" for name in evaluations)
    title = "Detectors of harmful prompts, thresholds from other prompts"
    figure.suptitle(f"{title}\n95% intervals; prompts: {counts}", fontsize=11)
    for axis, column in zip(axes, ("auroc", f"false_alarms_{recall}"), strict=True):
        _detectors(axis, table[table[column].notna()], column, names, evaluations)
    axes[0].axvline(0.5, color="0.5", linewidth=0.8)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    axes[0].set_title("AUROC: are harmful prompts scored higher?", fontsize=10, loc="left")
    axes[0].set(xlabel="AUROC (random sets: median and 95% range)")
    axes[1].set_title(f"False alarms at the threshold for {recall}% recall", fontsize=10, loc="left")
    axes[1].set(xlabel="share of harmless prompts", xlim=(-0.03, 1.03))
    legend(figure, axes[0])
    return figure


def _accuracies(axis: Axes, part: pd.DataFrame, colour: str) -> None:
    """Accuracy with its 95% band, and in grey what swapped labels reach."""
    depths = part["relative_depth"]
    reached = "swapped labels: mean to 95% quantile"
    axis.fill_between(depths, part["control"], part["control_high"], color="0.8", label=reached)
    axis.fill_between(depths, part["low"], part["high"], color=colour, alpha=0.2, linewidth=0)
    axis.plot(depths, part["accuracy"], color=colour, marker="o", markersize=3.5)
    axis.axhline(0.5, color="0.5", linewidth=0.8)


def _best(part: pd.DataFrame) -> str:
    if part["accuracy"].isna().all():
        return f"none: {part['reason'].iloc[0]}"
    best = part.loc[part["accuracy"].idxmax()]
    return f"best: layer {best['layer']}: {best['accuracy']:.0%}"


def _detectors(axis: Axes, table: pd.DataFrame, column: str, names: list[str], evaluations: list[str]) -> None:
    """A dot with its interval per detector; sets of prompts side by side, each in its colour."""
    styles = zip(evaluations, cycle(COLOURS), cycle(MARKERS), strict=False)
    for number, (evaluation, colour, marker) in enumerate(styles):
        part = table[table["evaluation"] == evaluation]
        beside = 0.25 * (number - (len(evaluations) - 1) / 2)
        rows = [names.index(name) + beside for name in part["detector"]]
        axis.hlines(rows, part[f"{column}_low"], part[f"{column}_high"], color=colour)
        axis.plot(part[column], rows, color=colour, marker=marker, linestyle="", label=evaluation)
