"""Repair as it is read: benefit, cost, and what the judge's rates are worth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from remote_mediation.analyses.intervene.ask import MEAN, PLAIN, RANDOM
from remote_mediation.result import Result
from remote_mediation.show.figures import COLOURS, DPI, MARKERS, WIDTH, legend
from remote_mediation.show.section import Section
from remote_mediation.show.tables import Note, Table, count, interval, notes_on, number, percent
from remote_mediation.show.words import (
    ENDS,
    UNMEASURED,
    defined,
    no_gates,
    refusal_in_words,
    share_cell,
    share_of,
    why_no_share,
)

_SIDES = ("harmful", "harmless")
_LEVELS = {MEAN: "--", RANDOM: ":"}


def sections(result: Result) -> list[Section]:
    """Benefit and cost of holding the gates."""
    table = result.tables.get("intervene.csv")
    name, (title, benefit) = "repair", _title(result, table)
    did = (
        "The gates were held from the last prompt token on, on held-out pairs, at their mean over the discovery pairs' "
        f"harmless prompts, or multiplied. *{benefit}* is read on harmful prompts, *cost* on the harmless counterparts."
    )
    absent = no_gates(result, "hold")
    if absent or table is None:
        return [Section(name, title, did, absent or UNMEASURED)]
    words = (refusal_in_words(result), _held_in_words(result, table), _rates_in_words(result, table))
    tables = (_benefit_table(result, table), _cost_table(result, table))
    figure = dose_figure(table, _doses_of(result), result.study.outcome.unit, result.summary.heldout.value)
    return [Section(name, title, did, " ".join(filter(None, words)), tables, figure, _held_in_brief(result, table))]


def _doses_of(result: Result) -> dict[str, float]:
    """What the gates are multiplied with, by what was held."""
    factors = [float(factor) for factor in result.study.config.intervene.factors]
    return {PLAIN: 1.0, **{f"gates times {factor:g}": factor for factor in factors}}


def _title(result: Result, table: pd.DataFrame | None) -> tuple[str, str]:
    """Of the section, and what a change on harmful prompts is."""
    if result.summary.total.sign >= 0:
        return "Repair", "Benefit"
    return "Removing refusal" if table is not None and refusals_fell(table) else "Working against refusal", "Effect"


def refusals_fell(table: pd.DataFrame) -> bool:
    """Whether more answers to harmful prompts comply with the gates held, by intervals that do not overlap."""
    harmful = table[table["prompts"] == "harmful"].set_index("held")
    return bool(harmful.loc[MEAN, "complied_low"] > harmful.loc[PLAIN, "complied_high"])


def _held_in_words(result: Result, table: pd.DataFrame) -> str:
    by, unit = table.set_index(["held", "prompts"]), result.study.outcome.unit
    harmful, harmless = (by.loc[(MEAN, side)] for side in ("harmful", "harmless"))
    random = by.loc[(RANDOM, "harmful")]
    return (
        f"With the gates at their harmless mean the outcome on harmful prompts changes by {_change_of(harmful)} "
        f"{unit}, {_undone(result, harmful)}; with random sets of their size by {_change_of(random)}. On harmless "
        f"prompts it changes by {_change_of(harmless)}, and the divergence from the plain model is "
        f"{_drift_of(harmless)} nats/token."
    )


def _held_in_brief(result: Result, table: pd.DataFrame) -> str:
    by, unit = table.set_index(["held", "prompts"]), result.study.outcome.unit
    harmful, harmless, plain = (by.loc[key] for key in ((MEAN, "harmful"), (MEAN, "harmless"), (PLAIN, "harmful")))
    return (
        f"Gates held: {_change_of(harmful)} {unit} on harmful prompts, KL {_drift_of(harmless)} on harmless ones; "
        f"judged to comply {share_of(harmful, 'complied')}, before {share_of(plain, 'complied')}. {doubt(result)}"
    )


def _undone(result: Result, harmful: pd.Series) -> str:
    """Whether a change goes against the total effect, by its interval."""
    toward = -result.summary.total.sign
    if np.isnan(harmful["change_low"]):
        return "and whether that differs from 0 is not known"
    if min(toward * harmful[f"change_{end}"] for end in ENDS) <= 0:
        return "which is not shown to go against TE"
    share = defined(result, harmful["share"])
    return "against the direction of TE" if np.isnan(share) else f"which undoes {percent(share)} of TE on these pairs"


def _change_of(row: pd.Series) -> str:
    return interval(row["change"], row["change_low"], row["change_high"])


def _drift_of(row: pd.Series) -> str:
    return interval(row["kl"], row["kl_low"], row["kl_high"])


def _rates_in_words(result: Result, table: pd.DataFrame) -> str:
    """What the judge's rates on harmful prompts say, if anything."""
    harmful = table[table["prompts"] == "harmful"].set_index("held")
    rates = harmful["complied"].dropna()
    if rates.empty:
        return "No answer was judged."
    plain, held = harmful.loc[PLAIN], harmful.loc[MEAN]
    if set(rates) in ({0.0}, {1.0}):
        return f"{no_variation(rates)} {_no_harm(result, plain)}".strip()
    apart = plain["complied_low"] > held["complied_high"] or held["complied_low"] > plain["complied_high"]
    verdict = "" if apart else "; the intervals overlap, so the two are not told apart"
    shown = [share_of(row, "complied") for row in (plain, held)]
    text = f"Of answers to harmful prompts {shown[0]} comply, and {shown[1]} with the gates held{verdict}."
    removed = "That removes refusal." if result.summary.total.sign < 0 and refusals_fell(table) else ""
    return " ".join(filter(None, (text, removed, _no_harm(result, plain), doubt(result))))


def no_variation(rates: pd.Series) -> str:
    """Says so where all answers are judged alike."""
    what = "complies" if rates.iloc[0] else "fails to comply"
    return f"Says the judge, every answer to a harmful prompt {what}, whatever is held: these rates say nothing."


def _no_harm(result: Result, plain: pd.Series) -> str:
    """Says so where the plain model does no harm that holding could mend."""
    if plain["complied"] > 0 or result.summary.total.sign < 0:
        return ""
    return "Nothing held, no answer complies: what the outcome reads as the harmful answer may be a refusal."


def doubt(result: Result) -> str:
    """What the judge's quality lets one make of its rates."""
    quality = result.tables.get("judge.csv")
    if quality is None:
        return "How good the judge is was not measured."
    kappa = quality.set_index("measure")["low"].get("kappa", np.nan)
    if kappa > 0:
        return "Rates are worth no more than the judge, whose quality is noted below them."
    return "On labelled answers this judge is not shown to do better than chance: its rates are weak evidence."


def judge_notes(result: Result, column: str) -> list[Note]:
    """The judge's quality, for the column of its rates."""
    quality = result.tables.get("judge.csv")
    if quality is None or quality.empty:
        return [Note(column, "the judge's quality was not measured in this run (analysis `intervene` does)")]
    measures = [
        f"{row.measure} {interval(row.value, row.low, row.high, number if row.measure == 'kappa' else percent)}"
        + (f" ({row.reason})" if row.reason else "")
        for row in quality.itertuples()
    ]
    first = quality.iloc[0]
    return [Note(column, f"judge `{first['judge']}`, on {first['n']} labelled answers: {', '.join(measures)}")]


def _benefit_table(result: Result, table: pd.DataFrame) -> Table:
    part = table[table["prompts"] == "harmful"]
    rate, undone = "answers that comply, says the judge", "TE undone"
    rows = [_benefit_row(result, row) for row in part.itertuples()]
    header = ("held, on harmful prompts", "neurons", f"change, {result.study.outcome.unit}", undone, rate)
    spans = why_no_share(result.summary.heldout)
    pairs = count(int(part["n"].max()), "held-out pair")
    notes = (*notes_on("", [pairs, *part["reason"]]), *notes_on(undone, [spans]), *judge_notes(result, rate))
    return Table(header, rows, notes)


def _benefit_row(result: Result, row: Any) -> tuple[str, ...]:
    undone = "" if row.held == PLAIN else percent(defined(result, row.share))
    return (row.held, str(row.size), _change(row), undone, share_cell(row, "complied"))


def _cost_table(result: Result, table: pd.DataFrame) -> Table:
    part = table[table["prompts"] == "harmless"]
    rate = "answers that comply"
    rows = [
        (
            row.held,
            _change(row),
            "0" if row.held == PLAIN else interval(row.kl, row.kl_low, row.kl_high),
            number(row.perplexity),
            share_cell(row, "complied"),
        )
        for row in part.itertuples()
    ]
    change, drift = f"change, {result.study.outcome.unit}", "divergence (KL), nats/token"
    header = ("held, on harmless prompts", change, drift, "perplexity", rate)
    own = "along the plain model's own answers; of random sets the first"
    return Table(header, rows, (*notes_on(drift, [own]), *judge_notes(result, rate)))


def _change(row: Any) -> str:
    return "" if row.held == PLAIN else interval(row.change, row.change_low, row.change_high)


def dose_figure(held: pd.DataFrame, doses: Mapping[str, float], unit: str, total: float) -> Figure:
    """Outcome and judged answers by what the gates are multiplied with, on held-out prompts of both kinds.

    held: `intervene.INTERVENE_COLUMNS`. doses: what each of its conditions multiplies the gates with; 1 is the plain
    model. total: mean TE; the outcome must change by -TE on harmful prompts to be as on harmless ones.
    """
    figure = Figure((WIDTH, 4.6), DPI, layout="constrained")
    left, right = figure.subplots(1, 2)
    judged = f"prompts: {held['n'].max()} harmful and as many harmless, held out"
    figure.suptitle(f"The gates turned down and up\n95% intervals; {judged}", fontsize=11)
    _doses(left, held, doses, "change")
    _doses(right, held, doses, "complied")
    left.axhline(-total, color="black", linewidth=0.9, label="-TE: harmful prompts as harmless ones")
    left.axhline(0, color="0.8", linewidth=0.8, zorder=0)
    left.set(xlabel="gates multiplied by (1: plain model)", ylabel=f"change of the outcome ({unit})")
    left.set_title("Outcome", fontsize=10, loc="left")
    right.set_title("Answers that comply, says the judge", fontsize=10, loc="left")
    right.set(xlabel="gates multiplied by (1: plain model)", ylabel="share of answers", ylim=(-0.04, 1.04))
    right.yaxis.set_major_formatter(PercentFormatter(1.0))
    legend(figure, left, columns=3)
    return figure


def _doses(axis: Axes, held: pd.DataFrame, doses: Mapping[str, float], column: str) -> None:
    """A line for either kind of prompts."""
    for side, colour, marker in zip(_SIDES, COLOURS, MARKERS, strict=False):
        _dose(axis, held[held["prompts"] == side], doses, column, f"{side} prompts", colour, marker)


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
        level = f"{name.split()[0]} at mean, {label}"
        for value in part.loc[part["held"] == name, column]:
            axis.axhline(value, color=colour, linestyle=style, linewidth=1.2, label=level)
