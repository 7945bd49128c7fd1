"""Probes as they are read: from which layer on harm can be read, beside the layer from which on it acts."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import cycle

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from remote_mediation.probes import Order, earlier
from remote_mediation.result import Result
from remote_mediation.show.figures import COLOURS, DPI, WIDTH, legend
from remote_mediation.show.section import Section
from remote_mediation.show.tables import NONE, Table, interval, notes_on, percent
from remote_mediation.show.words import UNMEASURED, no_effect
from remote_mediation.summary import stream_nie


def sections(result: Result) -> list[Section]:
    """From where on harm can be read."""
    name, title = "probes", "Early understanding"
    did = (
        "Linear probes read from the residual stream, layer by layer, whether a prompt is the harmful one of its pair, "
        "on all pairs; each is judged on clusters that it was not fitted to, beside probes on swapped labels."
    )
    profile = result.tables.get("probes.csv")
    if profile is None or profile.empty:
        return [Section(name, title, did, UNMEASURED)]
    by_position = profile.groupby("position", sort=False)
    orders = {str(position): _order(result, part) for position, part in by_position}
    table, figure = _probes_table(result, profile, orders), probe_figure(profile, _acting(orders))
    if absent := no_effect(result):
        alone = "Whether harm is readable before it acts cannot be asked; the probes stand alone."
        return [Section(name, title, did, f"{absent} {alone}", (table,), figure, alone)]
    said = {position: f"At '{position}' {order.finding} ({order.verdict})." for position, order in orders.items()}
    brief = said.get("last", next(iter(said.values())))
    return [Section(name, title, did, " ".join(said.values()), (table,), figure, brief)]


def _acting(orders: Mapping[str, Order]) -> dict[str, int]:
    """First layers that act, by what does: the stream at each position."""
    acts = {f"stream at '{position}'": order.acts for position, order in orders.items()}
    return {name: layer for name, layer in acts.items() if layer is not None}


def _order(result: Result, profile: pd.DataFrame) -> Order:
    """Readable against acting at one position; nothing acts where there is no total effect or no measurement."""
    sites, position = result.summary.sites, str(profile["position"].iloc[0])
    acting = stream_nie(sites, position)
    if no_effect(result):
        acting = acting.iloc[:0]
    found = earlier(profile, acting, result.summary.total.value, result.study.config.statistics.alpha)
    if acting.empty:
        why = "where it acts was not measured there"
        readable = "no layer" if found.readable is None else f"layer {found.readable}"
        return Order(found.readable, None, "undecided", f"harm is first readable after {readable}; {why}")
    return found


def _probes_table(result: Result, profile: pd.DataFrame, orders: dict[str, Order]) -> Table:
    by_position = profile.groupby("position", sort=False)
    rows = [_probe_row(str(position), part, orders[str(position)]) for position, part in by_position]
    reading = "best accuracy [95% interval], chance 50%"
    header = (
        "position",
        "first readable",
        reading,
        "best layer",
        "swapped labels there: mean, 95% quantile",
        "first acts",
    )
    few = sorted({str(reason) for reason in profile["reason"] if reason})
    readable = "first layer whose accuracy lies above the swapped labels' 95% quantile by its whole interval (q too)"
    acts = "first layer of the residual stream there whose NIE is significant in the direction of TE"
    notes = (*notes_on("first readable", [readable]), *notes_on(reading, few), *notes_on("first acts", [acts]))
    return Table(header, rows, notes)


def _probe_row(position: str, part: pd.DataFrame, order: Order) -> tuple[str, ...]:
    """The best probe of a position, and the layers from which on harm is readable there and acts."""
    known = part["accuracy"].notna().any()
    best = part.loc[part["accuracy"].idxmax()] if known else part.iloc[0]
    return (
        f"'{position}'",
        _layer(order.readable),
        f"{interval(best['accuracy'], best['low'], best['high'], percent)}" if known else NONE,
        f"layer {best['layer']}" if known else NONE,
        f"{percent(best['control'])}, {percent(best['control_high'])}",
        _layer(order.acts),
    )


def _layer(layer: int | None) -> str:
    return "none found" if layer is None else f"layer {layer}"


def probe_figure(profile: pd.DataFrame, acts: Mapping[str, int]) -> Figure:
    """Accuracy of harm probes by layer, a panel per position, above what swapped labels reach.

    profile: `probes.PROBE_COLUMNS`. acts: first layer whose NIE is significant, by name of what acts.
    """
    facets = {str(position): part.sort_values("layer") for position, part in profile.groupby("position", sort=False)}
    figure = Figure((WIDTH, 4.3), DPI, layout="constrained")
    axes = figure.subplots(1, len(facets), sharey=True, squeeze=False)[0]
    counts = f"prompts: {profile['n'].max()}, clusters: {profile['clusters'].max()}"
    figure.suptitle(f"Harm read by linear probes, layer by layer\naccuracy and 95% interval; {counts}", fontsize=11)
    for axis, (position, part), colour in zip(axes, facets.items(), cycle(COLOURS), strict=False):
        _accuracies(axis, part, colour)
        _acting_lines(axis, acts, set(part["layer"]))
        axis.set_title(f"at '{position}'\n{_best(part)}", fontsize=10, loc="left")
        axis.set(xlabel="layer", ylabel="accuracy on other templates (chance: 50%)")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.yaxis.set_major_formatter(PercentFormatter(1.0))
        axis.label_outer()
    legend(figure, axes[0], columns=2)
    return figure


def _accuracies(axis: Axes, part: pd.DataFrame, colour: str) -> None:
    """Accuracy with its 95% band, and in grey what swapped labels reach."""
    layers = part["layer"]
    reached = "swapped labels: mean to 95% quantile"
    axis.fill_between(layers, part["control"], part["control_high"], color="0.8", label=reached)
    axis.fill_between(layers, part["low"], part["high"], color=colour, alpha=0.2, linewidth=0)
    axis.plot(layers, part["accuracy"], color=colour, marker="o", markersize=3.5)
    axis.axhline(0.5, color="0.5", linewidth=0.8)


def _acting_lines(axis: Axes, acts: Mapping[str, int], layers: set[int]) -> None:
    """An upright at the first layer that acts, in a style of its own for each name. layers: those that are drawn."""
    for (name, layer), style in zip(acts.items(), cycle((":", "--", "-.")), strict=False):
        if layer in layers:
            axis.axvline(layer, color="black", linestyle=style, label=f"{name} first acts after layer {layer}")


def _best(part: pd.DataFrame) -> str:
    if part["accuracy"].isna().all():
        return f"none: {part['reason'].iloc[0]}"
    best = part.loc[part["accuracy"].idxmax()]
    return f"best: layer {best['layer']}: {best['accuracy']:.0%}"
