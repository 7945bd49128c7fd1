"""Single sites as they are read: which are the strongest, and a table of them. Used by the maps and by neurons."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from remote_mediation.effects import SITE_COLUMNS
from remote_mediation.lab import Study
from remote_mediation.result import Result
from remote_mediation.show.section import Section
from remote_mediation.show.tables import Table, count, estimate, interval, notes_on, number, percent, q_value
from remote_mediation.summary import Strong, informative

NOUNS = {
    "layer_output": "residual stream",
    "attention_output": "attention",
    "mlp_output": "MLP",
    "mlp_neurons": "neuron",
    "attention_heads": "head",
    "query_heads": "query head",
    "key_heads": "key head",
    "value_heads": "value head",
    "router": "routing",
    "expert_output": "expert",
    "expert_neurons": "expert neuron",
    "shared_expert_output": "shared expert",
}
_ANEW = "which embeds the changed words anew"
CHOICE = (
    "the sites strongest on the discovery pairs, by the smaller of mean NIE and mean TIE; mean, q and share of TE are "
    "over all pairs and flatter the sites chosen, only the held-out columns are free of that choice"
)


def site_section(
    result: Result, name: str, title: str, swapped: str, draw: Callable[[pd.DataFrame], Figure | None]
) -> Section | None:
    """A section on the sites of an analysis; None where none was measured.

    name: the analysis, as the effects have it. swapped: what takes the value it has on the other prompt. draw: the
    figure of `Summary.sites`.
    """
    if name not in set(result.effects["analysis"]):
        return None
    did, sites = f"Swapped between the two prompts: {swapped}.", informative(result.summary.sites)
    if name not in set(sites["analysis"]):
        return Section(name, title, did, "Only sites whose effects follow by construction were measured.")
    table = sites_table(result, name)
    return Section(name, title, did, _strongest_in_words(table, result), (table,), draw(sites))


def _strongest_in_words(table: Table, result: Result) -> str:
    """The strongest site by both effects, the first of the table but for what only embeds the changed words anew.

    It was chosen without the held-out pairs.
    """
    if not table.rows:
        return "No discovery pair has been measured yet, so no site can be called strongest."
    others = [row for row in table.rows if not row[0].endswith(_ANEW)]
    but = "" if others[:1] == table.rows[:1] else f", but for the MLP of layer 0, {_ANEW}"
    if not others:
        return f"Nothing was measured{but}."
    (site, _, _, _, nie, _, nie_share), (_, _, _, _, tie, _, tie_share), *_ = others
    unit = result.study.outcome.unit
    return (
        f"Strongest on the discovery pairs{but}: {site}. Held out its mean NIE is {nie} and its mean TIE {tie} {unit}; "
        f"over all pairs these are {nie_share.split(' ')[0]} and {tie_share.split(' ')[0]} of TE."
    )


def sites_table(result: Result, analysis: str) -> Table:
    """The sites strongest on the discovery split, as all pairs and as the held-out pairs see them."""
    shown, sites = result.summary.strongest.get(analysis, ()), result.summary.sites
    everywhere, heldout = (_looked_up(sites, shown, split) for split in ("all", "heldout"))
    found = zip(shown, everywhere.itertuples(), heldout.itertuples(), strict=True)
    rows = [_site_row(one, on_all, fair) for one, on_all, fair in found]
    mean, share_of_te = mean_header(result.study), "share of TE"
    notes = (
        *notes_on("", [CHOICE if shown else "no discovery pair has been measured yet"]),
        *notes_on(mean, everywhere["reason"]),
        *notes_on("q", _resolution(result, analysis)),
        *notes_on("held-out q", heldout["reason"]),
        *notes_on(share_of_te, [one.share.reason for one in shown]),
    )
    return Table(("site", "effect", mean, "q", "held-out mean", "held-out q", share_of_te), rows, notes)


def _site_row(one: Strong, on_all: Any, fair: Any) -> tuple[str, ...]:
    """One effect of a site. on_all, fair: its estimates on all pairs and on the held-out ones."""
    return (
        site_name(*one.site[1:]),
        one.quantity.upper(),
        interval(on_all.mean, on_all.ci_low, on_all.ci_high),
        q_value(on_all.q),
        number(fair.mean),
        q_value(fair.q),
        estimate(one.share, percent),
    )


def _looked_up(sites: pd.DataFrame, shown: Sequence[Strong], split: str) -> pd.DataFrame:
    """Estimates of sites and quantities on a split, in the order given; NaN where there are none."""
    keys = [(*one.site, one.quantity) for one in shown]
    index = pd.MultiIndex.from_tuples(keys, names=[*SITE_COLUMNS, "quantity"])
    found = sites[sites["split"] == split].set_index(index.names).reindex(index)
    return found.fillna({"reason": "not measured on these pairs"})


def _resolution(result: Result, analysis: str) -> list[str]:
    """Says so where the test is too coarse to find a site on its own (see `stats.estimate_means`)."""
    family = result.summary.sites[result.summary.sites["analysis"] == analysis]
    by, clusters = result.study.config.statistics, int(family["clusters"].max())
    size = len(family[SITE_COLUMNS].drop_duplicates())
    floor = max(2.0 ** (1 - clusters), 1 / (by.resamples + 1))
    needed = math.ceil(size * floor / by.alpha)
    if needed <= 1:
        return []
    reach = f"reached by {needed} together or by none" if needed <= size else "out of reach"
    return [
        f"{count(clusters, 'cluster')} and {by.resamples} resamples give no p below {floor:.2g}, so among {size} "
        f"sites q ≤ {by.alpha:g} is {reach}; a large q is no evidence that a site does nothing"
    ]


def site_name(component: str, layer: int, position: str, start: str, stop: str) -> str:
    """A site in words. start, stop: its units, empty where it has all."""
    where = f"layer {layer} at '{position}'"
    if not start:
        anew = f", {_ANEW}" if embeds_anew(component, layer, position) else ""
        return f"{NOUNS[component]}, {where}{anew}"
    last = int(stop) - 1
    units = f" {start}" if last == int(start) else f"s {start}-{last}"
    return f"{NOUNS[component]}{units}, {where}"


def mean_header(study: Study) -> str:
    """Header of a column of means."""
    return f"mean [95% interval], {study.outcome.unit}"


def embeds_anew(component: str, layer: int, position: str) -> bool:
    """Whether a site is the first MLP at the changed words: it embeds them, and says nothing of where (METHOD, 3)."""
    return component == "mlp_output" and layer == 0 and position in ("edit", "all")
