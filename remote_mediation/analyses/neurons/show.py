"""The search, single neurons and the gate set as they are read."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from remote_mediation.analyses.neurons.figures import gate_figure, units_figure, whole_mlps_figure
from remote_mediation.analyses.neurons.gates import random_sets_reaching
from remote_mediation.analyses.neurons.search import LAYERS, SCREEN_NAMES, of_whole_mlps, strengths
from remote_mediation.result import Result
from remote_mediation.show.section import Section
from remote_mediation.show.sites import site_section
from remote_mediation.show.tables import Table, count, interval, notes_on, number, percent, q_value
from remote_mediation.show.words import (
    ENDS,
    UNMEASURED,
    no_effect,
    refusal_in_words,
    why_no_share,
)
from remote_mediation.summary import BOTH, UNITS

_MOST_MEDIATORS = 20


def sections(result: Result) -> list[Section]:
    """Whole MLPs, single neurons, and the set of them that gates."""
    whole = site_section(
        result,
        LAYERS,
        "Neurons of whole MLPs",
        "all neurons of one MLP together",
        lambda sites: whole_mlps_figure(sites, result.summary.total),
    )
    single = site_section(
        result,
        UNITS,
        "Single neurons",
        "one neuron that the search on the discovery pairs led to",
        lambda sites: _units(result, sites),
    )
    return [*([whole] if whole else []), *([_with_mediators(result, single)] if single else []), _gates(result)]


def _gates(result: Result) -> Section:
    name, title = "gates", "Gate neurons"
    did = (
        "Single neurons were searched for on the discovery pairs, and of the MLP whose neurons are strongest there the "
        f"smallest set was taken that carries {result.study.config.neurons.carry:.0%} of its NIE. What the set does is "
        "given on the held-out pairs, on which neither it nor its size was chosen."
    )
    absent = no_effect(result)
    if absent or "search.csv" not in result.tables:
        return Section(name, title, did, absent or UNMEASURED)
    search = result.tables["search.csv"]
    tables: tuple[Table, ...] = (_search_table(search), *_screen_tables(result))
    cut = _cut_short(search)
    sets = result.tables.get("gates.csv")
    if sets is None or sets.empty:
        nothing = "There is no gate set: no MLP moves the outcome in the direction of TE by neurons that were found."
        return Section(name, title, did, f"{cut} {nothing}", tables)
    curve = result.tables["gate_curve.csv"]
    found = f"{cut} {_set_in_words(result, sets, curve)} {refusal_in_words(result)}".strip()
    unit, carry = result.study.outcome.unit, result.study.config.neurons.carry
    tables = (*tables, _sets_table(result, sets), *_sparsity_tables(result, int(sets["layer"].iloc[0])))
    figure = gate_figure(curve, sets, carry, unit)
    return Section(name, title, did, found, tables, figure, _set_in_brief(sets, unit))


def _search_table(search: pd.DataFrame) -> Table:
    missed = "missed mediators, estimate"
    rows = [
        (
            step.step,
            *(str(value) for value in (step.sites, step.pairs, step.kept, step.followed)),
            "" if np.isnan(step.missed) else f"{number(step.missed)}, at most {number(step.missed_high)}",
        )
        for step in search.itertuples()
    ]
    sampled = search["missed"].notna().any()
    why = "from the mediators in a random sample of the others; the most by its 95% Wilson interval" if sampled else ""
    header = ("step of the search", "neurons or windows", "pairs", "may mediate", "followed", missed)
    return Table(header, rows, tuple(notes_on(missed, [why])))


def _screen_tables(result: Result) -> tuple[Table, ...]:
    """How well the estimates that ranked the neurons agree with what was measured."""
    table = result.tables.get("screen.csv")
    if table is None or table.empty:
        return ()
    rows = [
        (
            f"{SCREEN_NAMES[row.screen]}, {row.component}",
            row.quantity.upper(),
            f"{number(row.spearman_first)} ({row.first})",
            f"{number(row.spearman_random)} ({row.random})",
            percent(row.recall),
        )
        for row in table.itertuples()
    ]
    first, random = "rank correlation, first ranks (of)", "random others (of)"
    header = ("screen against exact effects", "effect", first, random, "recall of mediators, estimate")
    why = "mediators among the first ranks, of these and what the random sample lets expect among all others"
    return (Table(header, rows, tuple(notes_on(header[-1], [why]))),)


def _cut_short(search: pd.DataFrame) -> str:
    cut = search[search["followed"] < search["kept"]]
    if cut.empty:
        return "The search followed every lead that it had."
    left = int((cut["kept"] - cut["followed"]).sum())
    return f"The search was cut short by the study's limit: {count(left, 'lead')} were not followed."


def _set_in_words(result: Result, sets: pd.DataFrame, curve: pd.DataFrame) -> str:
    gates, whole = (sets[sets["set"] == name].iloc[0] for name in ("gates", "mlp"))
    carry, sign = result.study.config.neurons.carry, result.summary.total.sign
    reached = curve.loc[curve["size"] == gates["size"], "discovery"]
    if len(reached) and reached.iloc[0] < carry:
        size = f"No set that was tried carries {carry:.0%} of its MLP's NIE; the largest has"
    else:
        size = "The gate set has"
    text = f"{size} {gates['size']} of {whole['size']} neurons of layer {gates['layer']}, at '{gates['position']}'."
    if np.isnan(gates["nie_low"]) or np.isnan(gates["tie_low"]):
        return f"{text} The held-out pairs cannot test it: {gates['reason'] or 'there is no interval'}."
    return " ".join(filter(None, (text, _heldout_in_words(gates, sign), _against_random(sets, sign))))


def _heldout_in_words(gates: pd.Series, sign: int) -> str:
    """Which of the gates' effects are clear of 0, and which are not."""
    shown = {"nie": "NIE (sufficient)", "tie": "TIE (necessary)"}
    clear = [words for name, words in shown.items() if min(sign * gates[f"{name}_{end}"] for end in ENDS) > 0]
    unclear = [words for words in shown.values() if words not in clear]
    said = []
    if clear:
        said.append(f"Held out its {' and its '.join(clear)} lie clear of 0 in the direction of TE.")
    if unclear:
        said.append(f"Held out its {' and its '.join(unclear)} are not shown to differ from 0 in that direction.")
    return " ".join(said)


def _set_in_brief(sets: pd.DataFrame, unit: str) -> str:
    gates, whole = (sets[sets["set"] == name].iloc[0] for name in ("gates", "mlp"))
    effects = [f"{name.upper()} {interval(*(gates[f'{name}{end}'] for end in ('', '_low', '_high')))}" for name in BOTH]
    size = f"{gates['size']} of {whole['size']} neurons of layer {gates['layer']}"
    return f"{size}; held out {' and '.join(effects)} {unit}"


def _against_random(sets: pd.DataFrame, sign: int) -> str:
    drawn = int((sets["set"] == "random").sum())
    if not drawn:
        return ""
    reach = {name: random_sets_reaching(sets, name, sign) for name in BOTH}
    by = " and ".join(
        f"{reached} reach its {name.upper()}{_told_as_p(reached, drawn)}" for name, reached in reach.items()
    )
    return f"Of {drawn} random sets of its size in the same layer {by}."


def _told_as_p(reached: int, drawn: int) -> str:
    """Where none reaches it the p is at its floor, and their count says all."""
    return f" (p = {number((1 + reached) / (1 + drawn))})" if reached else ""


_SETS = {"gates": "gates", "mlp": "whole MLP", "earlier": "best set of an earlier layer"}


_MOST_LAYERS = 3
"""Layers whose sparsity is shown."""


def _sets_table(result: Result, sets: pd.DataFrame) -> Table:
    unit, total = result.study.outcome.unit, result.summary.heldout
    shares, why = ("NIE / TE", "TIE / TE"), why_no_share(total)
    drawn = sets["set"] == "random"
    chosen = sets[~drawn].sort_values("set", key=lambda names: names.map([*_SETS].index))
    rows = [_set_row(row, not why) for row in chosen.itertuples()]
    if drawn.any():
        rows.append(_random_row(sets[drawn], not why))
    pairs = f"{count(total.n_pairs, 'held-out pair')} in {count(total.n_clusters, 'cluster')}"
    spans = f"of the held-out pairs, {why}" if why else ""
    notes = [*notes_on("", [pairs, *chosen["reason"]]), *notes_on(shares[0], [spans])]
    effects = (f"NIE [95% interval], {unit}", f"TIE [95% interval], {unit}")
    return Table(("held-out set", "layer", "neurons", *effects, *shares), rows, tuple(notes))


def _set_row(row: Any, defined: bool) -> tuple[str, ...]:
    """One set that was chosen. defined: whether there are shares of TE."""
    return (
        _SETS[row.set],
        str(row.layer),
        str(row.size),
        interval(row.nie, row.nie_low, row.nie_high),
        interval(row.tie, row.tie_low, row.tie_high),
        *(percent(share if defined else np.nan) for share in (row.nie_share, row.tie_share)),
    )


def _random_row(random: pd.DataFrame, defined: bool) -> tuple[str, ...]:
    """All random sets, which are of one size and layer."""
    effects = [interval(*random[name].quantile([0.5, 0.025, 0.975])) for name in BOTH]
    shares = [percent(random[f"{name}_share"].median() if defined else np.nan) for name in BOTH]
    layer, size = (str(random[column].iloc[0]) for column in ("layer", "size"))
    return (f"{len(random)} random sets: median [95% range]", layer, size, *effects, *shares)


def _sparsity_tables(result: Result, gated: int) -> tuple[Table, ...]:
    """How few neurons hold the NIE of the strongest layers."""
    table = result.tables.get("sparsity.csv")
    if table is None or table.empty:
        return ()
    known = set(table["layer"])
    layers = [layer for layer in (gated, *_strongest_layers(result), *table["layer"]) if layer in known]
    shown = table.set_index("layer").loc[list(dict.fromkeys(layers))[:_MOST_LAYERS]]
    rows = [
        (str(row.Index), number(row.gini), f"{row.fewest} of {row.of}", percent(row.negative_share), row.by)
        for row in shown.itertuples()
    ]
    estimated = any(row[-1] != "measured" for row in rows)
    article = "an" if (table["by"] == SCREEN_NAMES["ig"]).any() else "a first-order"
    why = f"{article} estimate by gradients, not measured: it ranks neurons, and may misjudge their sizes"
    header = ("strongest layers", "Gini", "fewest neurons for 80% of NIE", "works the other way", "single neurons' NIE")
    return (Table(header, rows, tuple(notes_on(header[-1], [why] if estimated else []))),)


def _strongest_layers(result: Result) -> list[int]:
    """Layers by the effect of their whole MLP, where that was measured."""
    whole = of_whole_mlps(result.effects, result.study.config.positions.neurons[0])
    return [int(layer) for layer, _, _ in strengths(whole).index] if len(whole) else []


def _units(result: Result, sites: pd.DataFrame) -> Figure | None:
    share = result.study.config.statistics.min_share
    heldout = result.effects[(result.effects["split"] == "heldout") & (result.effects["analysis"] == UNITS)]
    if heldout.empty or "mediators.csv" not in result.tables:
        return None
    total = float(heldout.drop_duplicates("pair_id")["te"].mean())
    return units_figure(sites, result.tables["mediators.csv"], share * total, share)


def _with_mediators(result: Result, section: Section) -> Section:
    """With the neurons chosen on the discovery split, as the held-out split sees them, before the others."""
    by, found = result.study.config.statistics, result.tables.get("mediators.csv")
    if found is None:
        return section
    chosen = f"{by.min_share:.0%} of TE by NIE and by TIE on the discovery pairs"
    if found.empty:
        return section._replace(finding=f"No neuron reaches {chosen}. {section.finding}")
    kept = f"{found['mediates'].sum()} of them also do on the held-out pairs, with q ≤ {by.alpha:g}"
    said = f"{count(len(found), 'neuron')} reached {chosen}; {kept}."
    table = _mediators_table(found, result.study.outcome.unit)
    return section._replace(finding=f"{said} {section.finding}", tables=(table, *section.tables), brief=said)


def _mediators_table(found: pd.DataFrame, unit: str) -> Table:
    shown = f"the first {_MOST_MEDIATORS} of {len(found)}; `mediators.csv` has all"
    notes = notes_on("", ["held-out pairs", shown if len(found) > _MOST_MEDIATORS else ""])
    rows = [
        (
            f"{neuron.layer}.{neuron.unit} at '{neuron.position}'",
            *map(number, (neuron.nie, neuron.tie)),
            *map(percent, (neuron.nie_share, neuron.tie_share)),
            q_value(neuron.q),
            "yes" if neuron.mediates else "no",
        )
        for neuron in found.head(_MOST_MEDIATORS).itertuples()
    ]
    header = ("layer.neuron", f"NIE, {unit}", f"TIE, {unit}", "NIE / TE", "TIE / TE", "q", "mediates")
    return Table(header, rows, tuple(notes))
