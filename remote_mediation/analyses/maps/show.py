"""Maps as they are read: a figure of every site, and the strongest ones in a table; of the stream, what has passed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from remote_mediation.result import Result
from remote_mediation.show.figures import (
    QUESTIONS,
    by_layer,
    describe,
    estimates_of,
    heat_maps,
    legend,
    lines,
    panels,
    ticks,
    title,
)
from remote_mediation.show.section import Section
from remote_mediation.show.sites import NOUNS, embeds_anew, site_section
from remote_mediation.show.tables import NONE, Note, Table, count
from remote_mediation.sites import Component
from remote_mediation.stats import Estimate
from remote_mediation.summary import BOTH
from remote_mediation.tokens import SPANS

_MODULES = {"mlp_output": "MLP", "attention_output": "attention"}
_HEADS: dict[Component, str] = {
    "attention_heads": "the output of one attention head",
    "query_heads": "the queries that one head puts to attention",
    "key_heads": "the keys that one key head gives to attention",
    "value_heads": "the values that one value head gives to attention",
}
PASSED = (0.1, 0.5, 0.9)
"""Shares of TE whose passage is told."""
_PASSAGES = {
    "edit": "of TE has left the changed words",
    "last": "has arrived where the answer is read",
}
_MOVES = {"edit": "left", "post_instruction": "arrived at", "last": "arrived at"}
"""What the effect does at a position as layers go by."""
_MOST_TOKENS = 24
"""Labels along the token axis; they stand upright and need less room than others."""


def layers(result: Result) -> list[Section]:
    """The residual stream, layer by layer: where the effect leaves the changed words and arrives at the answer."""
    swapped = "the residual stream after one layer, at one position"
    found = _map(result, "layers", "Layers", swapped, lambda sites: layers_figure(sites, result.summary.total))
    sites, total = result.summary.sites, result.summary.total
    said = passage(sites, total)
    if not said:
        return found
    table = passage_table(sites, total)
    return [
        part._replace(lead=said if part.figure else "", brief=said, finding=said, tables=(table,)) for part in found
    ]


def passage(sites: pd.DataFrame, total: Estimate) -> str:
    """After which layers 10, 50 and 90% of TE have left `edit` and arrived at `last`, by mean NIE; empty without TE.

    sites: `Summary.sites`.
    """
    if not total.sign:
        return ""
    said = []
    for position, words in _PASSAGES.items():
        shares = _shares_by_layer(sites, total, position, "nie")
        if len(shares):
            tenth, half, most = ("none" if layer is None else str(layer) for layer in passed(shares, position))
            said.append(f"{words} after layer {half} (10% after {tenth}, 90% after {most})")
    return f"Half {', and half '.join(said)}, by the mean NIE of the residual stream." if said else ""


def passage_table(sites: pd.DataFrame, total: Estimate) -> Table:
    """The same by NIE and TIE at each position that the effect leaves or arrives at."""
    rows = []
    for position, move in _MOVES.items():
        for quantity in BOTH:
            shares = _shares_by_layer(sites, total, position, quantity)
            if len(shares):
                rows.append((f"{move} '{position}'", quantity.upper(), *_passed_in_words(shares, position)))
    part = sites[(sites["analysis"] == "layers") & (sites["split"] == "all")]
    pairs = f"{count(int(part['n'].max()), 'pair')} in {count(int(part['clusters'].max()), 'cluster')}"
    notes = (
        Note("", f"mean effect / mean TE on {pairs}; the first layer from which on so much has passed"),
        Note("", f"{NONE}: so much never passes; every layer's effect is in the figure and in `summary.csv`"),
    )
    return Table(("the effect has", "by", *(f"{share:.0%} of TE" for share in PASSED)), rows, notes)


def passed(shares: pd.Series, position: str) -> list[int | None]:
    """The first layers from which on 10, 50 and 90% of TE have passed and stay so; None where they never do.

    shares: `[layer]`, what the stream at a position carries of TE; from `edit` has passed what it no longer carries.
    """
    gone = 1 - shares if position == "edit" else shares
    return [_first(gone, share) for share in PASSED]


def _passed_in_words(shares: pd.Series, position: str) -> list[str]:
    return [NONE if layer is None else f"layer {layer}" for layer in passed(shares, position)]


def _first(gone: pd.Series, share: float) -> int | None:
    below = gone[gone < share]
    after = gone.index[gone.index > below.index[-1]] if len(below) else gone.index
    return int(after[0]) if len(after) else None


def _shares_by_layer(sites: pd.DataFrame, total: Estimate, position: str, quantity: str) -> pd.Series:
    """Mean effect / mean TE of the stream at a position, all pairs, by layer."""
    chosen = (sites["analysis"] == "layers") & (sites["position"] == position)
    chosen &= (sites["quantity"] == quantity) & (sites["split"] == "all")
    means = sites[chosen].astype({"layer": int}).set_index("layer")["mean"]
    return means.sort_index() / total.value


def modules(result: Result) -> list[Section]:
    """MLP beside attention, layer by layer."""
    swapped = "what the MLP or the attention of one layer adds to the residual stream"
    return _map(result, "modules", "Modules", swapped, modules_figure)


def tokens(result: Result) -> list[Section]:
    """The residual stream, token by token and layer by layer."""
    swapped, alpha = "the residual stream after one layer, at one token", result.study.config.statistics.alpha
    return _map(result, "tokens", "Tokens", swapped, lambda sites: tokens_figure(sites, alpha))


def heads(result: Result) -> list[Section]:
    """Attention heads, and queries, keys and values where they were asked for."""
    config = result.study.config
    swapped = "; ".join(_HEADS[component] for component in config.heads.components)
    return _map(result, "heads", "Heads", swapped, lambda sites: heads_figure(sites, config.statistics.alpha))


def _map(
    result: Result, name: str, heading: str, swapped: str, draw: Callable[[pd.DataFrame], Figure]
) -> list[Section]:
    section = site_section(result, name, heading, swapped, draw)
    return [section] if section else []


def layers_figure(sites: pd.DataFrame, total: Estimate) -> Figure:
    """Residual stream by layer, a line per position, with TE for comparison.

    sites: `Summary.sites` (all tables named `sites` here are), analysis `layers`.
    """
    return by_layer(estimates_of(sites, "layers"), total, _layers_title(sites, total))


def _layers_title(sites: pd.DataFrame, total: Estimate) -> str:
    """The result in a line, where half of TE passes at all; else what was done."""
    half = {}
    for position in _PASSAGES:
        shares = _shares_by_layer(sites, total, position, "nie")
        half[position] = passed(shares, position)[PASSED.index(0.5)] if len(shares) else None
    left, arrived = half["edit"], half["last"]
    if not total.sign or left is None or arrived is None:
        return "Residual stream after each layer, swapped at one position"
    return f"Half of the effect has left the changed words after layer {left}, and reached the answer after {arrived}"


def modules_figure(sites: pd.DataFrame) -> Figure:
    """MLP beside attention by layer, a row per position; the last third of the layers is shaded, layer 0 marked."""
    part = estimates_of(sites, "modules")
    part = part.assign(name=part["component"].map(_MODULES))
    layers = int(part["layer"].max()) + 1
    positions = list(dict.fromkeys(part["position"]))
    figure, axes = panels(len(positions))
    title(figure, "What MLP and attention add, swapped layer by layer", part, "mean and 95% interval")
    for row, position in zip(axes, positions, strict=True):
        for axis, quantity in zip(row, QUESTIONS, strict=True):
            estimates = part[(part["quantity"] == quantity) & (part["position"] == position)]
            lines(axis, estimates)
            axis.axvspan(2 * layers / 3 - 0.5, layers - 0.5, color="0.92", zorder=0, label="last third of layers")
            anew = [embeds_anew(one.component, one.layer, position) for one in estimates.itertuples()]
            if any(anew):
                axis.axvline(0, color="0.6", linestyle=":", zorder=0, label="its MLP embeds the changed words anew")
            describe(axis, estimates[~np.array(anew)], position)
    legend(figure, axes[0, 0], columns=4)
    return figure


def tokens_figure(sites: pd.DataFrame, alpha: float) -> Figure:
    """Residual stream by token and layer; the number of pairs that have a token stands above its column.

    alpha: cells whose q is at most this carry a dot, here and in the other maps.
    """
    part = estimates_of(sites, "tokens")
    part = part.assign(name=part["position"])
    figure, axes = heat_maps({"": part}, "position", _token_order, alpha)
    title(figure, "Residual stream after each layer, swapped at one token", part, "mean")
    counts = part.groupby("position")["n"].max()
    names = sorted(counts.index, key=_token_order)
    for axis in axes[0]:
        axis.set_xlabel("token, counted within its span")
        axis.set_xticks(*ticks(names, _MOST_TOKENS), rotation=90, fontsize=8)
        above = axis.secondary_xaxis("top")
        above.set_xlabel("pairs", fontsize=8)
        above.set_xticks(*ticks([counts[name] for name in names], _MOST_TOKENS), fontsize=8)
    return figure


def heads_figure(sites: pd.DataFrame, alpha: float) -> Figure:
    """Heads by layer, a row per kind and position."""
    part = estimates_of(sites, "heads")
    part = part.assign(name=part["component"].map(NOUNS) + " " + part["unit_start"])
    several = part["component"].nunique() > 1
    facets = {
        f"{position}, {NOUNS[component]}s" if several else position: facet
        for (component, position), facet in part.groupby(["component", "position"], sort=False)
    }
    figure, axes = heat_maps(facets, "unit_start", int, alpha)
    for axis in axes[-1]:
        axis.set_xlabel("head")
    title(figure, "Single attention heads", part, "mean")
    return figure


def _token_order(position: str) -> tuple[int, int]:
    """Order of tokens in the prompt: spans in reading order, then the number in the brackets."""
    span, _, number = position.rstrip("]").partition("[")
    return SPANS.index(span), int(number)
