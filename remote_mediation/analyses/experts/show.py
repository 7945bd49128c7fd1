"""Experts as they are read: a map of layer by expert, the strongest parts in a table, and how the routing differs."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from remote_mediation.result import Result
from remote_mediation.show.figures import estimates_of, heat_maps, title
from remote_mediation.show.section import Section
from remote_mediation.show.sites import site_section
from remote_mediation.show.tables import Table, count, notes_on

_SWAPPED = (
    "what one routed expert adds to the residual stream, weighted, where either prompt is routed to it; of a layer the "
    "routing weights, or what the expert that always runs adds"
)
_MOST_ROWS = 5
_NOTE = "experts whose share of pairs that are routed to them differs most between the prompts"


def sections(result: Result) -> list[Section]:
    """The map, and the experts whose routing the harmful words change most."""
    alpha = result.study.config.statistics.alpha
    section = site_section(result, "experts", "Experts", _SWAPPED, lambda sites: experts_figure(sites, alpha))
    routing = result.tables.get("experts.csv")
    if section is None or routing is None or routing.empty:
        return [section] if section else []
    finding = f"{section.finding} {routed_in_words(routing, result)}"
    return [section._replace(finding=finding, brief=section.finding, tables=(*section.tables, routing_table(routing)))]


def experts_figure(sites: pd.DataFrame, alpha: float) -> Figure | None:
    """Layer by expert, a row per position; None where no single expert has been measured.

    sites: `Summary.sites`. alpha: cells whose q is at most this carry a dot.
    """
    part = estimates_of(sites, "experts")
    part = part[part["component"] == "expert_output"]
    if part.empty:
        return None
    part = part.assign(name="expert " + part["unit_start"].astype(str))
    facets = {str(position): facet for position, facet in part.groupby("position", sort=False)}
    figure, axes = heat_maps(facets, "unit_start", int, alpha)
    for axis in axes[-1]:
        axis.set_xlabel("expert; grey: no prompt is routed to it")
    title(figure, "Single experts of a mixture", part, "mean")
    return figure


def routed_in_words(routing: pd.DataFrame, result: Result) -> str:
    """How many experts run at all. routing: `EXPERT_COLUMNS`."""
    info = result.study.info
    there = len(info.routed) * info.experts
    said = [
        f"at '{position}' {len(part)} of {there} experts run on some prompt"
        for position, part in routing.groupby("position", sort=False)
    ]
    return (
        f"A token is routed to {info.chosen} of {count(info.experts, 'expert')} in each of "
        f"{count(len(info.routed), 'layer')}; {'; '.join(said)}. The others add nothing on either side."
    )


def routing_table(routing: pd.DataFrame) -> Table:
    """The experts to which the most pairs are routed on one of their prompts alone. routing: `EXPERT_COLUMNS`."""
    change = (routing["pairs_x1"] - routing["pairs_x0"]).abs()
    shown = routing.loc[change.sort_values(ascending=False, kind="stable").index[:_MOST_ROWS]]
    rows = [
        (
            f"expert {row.expert}, layer {row.layer} at '{row.position}'",
            f"{row.pairs_x0} of {row.n}",
            f"{row.pairs_x1} of {row.n}",
            f"{row.weight_x0:.3f}",
            f"{row.weight_x1:.3f}",
        )
        for row in shown.itertuples()
    ]
    header = ("routed to", "harmless prompts", "harmful prompts", "mean weight, harmless", "harmful")
    return Table(header, rows, tuple(notes_on("", [_NOTE])))
