"""Refusals before and after, false refusals, and what else a direction out of the stream changes."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from remote_mediation.analyses.ablation.ask import ABLATED, ADDED, SIDES, beside
from remote_mediation.judges import BUILTIN
from remote_mediation.result import Result
from remote_mediation.show.figures import COLOURS, DPI, WIDTH
from remote_mediation.show.section import Section
from remote_mediation.show.tables import Note, Table, interval, notes_on, number, percent
from remote_mediation.show.words import UNMEASURED, share_of

_ASKED = {ABLATED: ("harmful", -1), ADDED: ("harmless", 1)}
"""Prompts whose refusals should change, and which way."""
_CHANGES = {ABLATED: "taking it out removes refusals", ADDED: "adding it brings refusals about"}


def sections(result: Result) -> list[Section]:
    """One section."""
    name, title, table = "ablation", "A direction out of the stream, and into it", result.tables.get("ablation.csv")
    did = _did(result)
    if table is None:
        asked = "directions" in result.study.config.analyses
        absent = "There is no direction: the analysis `directions`, which finds it, was not part of this study."
        return [Section(name, title, did, UNMEASURED if asked else absent)]
    words = [_in_words(table, direction) for direction in _directions(table)]
    return [Section(name, title, did, " ".join(words), (_table(result, table),), _figure(table), brief=words[0])]


def _did(result: Result) -> str:
    settings = result.study.config.ablation
    return (
        f"The model answered held-out prompts greedily, {settings.tokens} tokens each, while a direction was "
        "*ablated*, taken out of all that enters the residual stream at every layer and token of prompt and answer, "
        "or *added*, as long as the difference of means (harmful minus harmless), after its layer at every token, as "
        "in arXiv 2406.11717. *Refused* is an answer that does not comply, says the judge "
        f"`{settings.judge}`. Divergences are of next-token distributions, from the plain model's, on harmless prompts."
    )


def _directions(table: pd.DataFrame) -> list[str]:
    """Names of directions, without those at random."""
    names = table.loc[table["done"] == ABLATED, "direction"].unique()
    return [name for name in names if beside(name) in set(names)]


def _row(table: pd.DataFrame, direction: str, done: str, prompts: str) -> pd.Series | None:
    found = table[(table["direction"] == direction) & (table["done"] == done) & (table["prompts"] == prompts)]
    return None if found.empty else found.iloc[0]


def _in_words(table: pd.DataFrame, direction: str) -> str:
    """Where it lies, and what comes of it in refusals and divergence, beside a random one."""
    first = table[table["direction"] == direction].iloc[0]
    said = [_refusals(table, direction, done) for done in _ASKED]
    drift = [_row(table, name, ABLATED, "harmless") for name in (direction, beside(direction))]
    own, other = (
        interval(row["kl_first"], row["kl_first_low"], row["kl_first_high"]) for row in drift if row is not None
    )
    lies = f"{direction} (layer {first['layer']:.0f} at '{first['position']}', length {number(first['length'])})"
    return (
        f"{lies[0].upper()}{lies[1:]}: {'; '.join(filter(None, said))}. On harmless prompts its ablation moves the "
        f"distribution of the first token by {own} nats, that of a random one by {other}."
    )


def _refusals(table: pd.DataFrame, direction: str, done: str) -> str:
    """Refused before and after, and whether that is more than a random direction does; empty where it was not done."""
    prompts, sign = _ASKED[done]
    plain = _row(table, "", "", prompts)
    own, other = (_row(table, name, done, prompts) for name in (direction, beside(direction)))
    if own is None or other is None or plain is None:
        return ""
    rates = f"{share_of(plain, 'refused')} → {share_of(own, 'refused')}, at random {share_of(other, 'refused')}"
    return f"{prompts} prompts refused, {done}: {rates}, {_verdict(own, other, done, sign)}"


def _verdict(own: pd.Series, other: pd.Series, done: str, sign: int) -> str:
    """By the intervals of the changes."""
    if not _clear(own, sign):
        return "no such change is shown"
    if _clear(other, sign):
        return f"{_CHANGES[done]}, and so does one at random"
    return f"{_CHANGES[done]}, and for one at random that is not shown"


def _clear(row: pd.Series, sign: int) -> bool:
    """Whether a change has a sign, by its interval."""
    return bool(row["change_low"] > 0) if sign > 0 else bool(row["change_high"] < 0)


def _table(result: Result, table: pd.DataFrame) -> Table:
    refused, true = "refused, says the judge", "judge's errors allowed for"
    header = ("done", "prompts", refused, true, "change", "KL, first token", "KL, along the answer")
    rows = [_cells(row) for _, row in table.iterrows()]
    size = (
        f"{table['n'].max()} pairs in {table['clusters'].max()} clusters; divergences in nats, per token along answers"
    )
    return Table(header, rows, (Note("", size), *_judge_notes(result, refused), *notes_on("", table["reason"])))


def _cells(row: pd.Series) -> tuple[str, ...]:
    """What was done on which prompts, and what came of it."""
    return (
        f"{row['direction']} {row['done']}" if row["done"] else "nothing",
        row["prompts"],
        *(share_of(row, name) for name in ("refused", "corrected", "change")),
        *(interval(row[name], row[f"{name}_low"], row[f"{name}_high"]) for name in ("kl_first", "kl_next")),
    )


def _judge_notes(result: Result, column: str) -> list[Note]:
    """How good the judge is, and where that was measured."""
    quality = result.tables["ablation_judge.csv"]
    shown = [
        f"{row.measure} {interval(row.value, row.low, row.high, number if row.measure == 'kappa' else percent)}"
        for row in quality.itertuples()
    ]
    labelled = result.study.config.ablation.labelled
    where = "labelled answers of the package's own, no sample of this model's" if labelled == BUILTIN else labelled
    return [Note(column, f"the judge's {', '.join(shown)} ({where})")]


def _figure(table: pd.DataFrame) -> Figure:
    """Refused answers by what is done, harmful prompts left and harmless ones right."""
    figure = Figure((WIDTH, 1.6 + 0.34 * len(table)), DPI, layout="constrained")
    axes = figure.subplots(1, 2, sharex=True)
    for axis, prompts in zip(axes, reversed(SIDES), strict=True):
        _panel(axis, table[table["prompts"] == prompts])
        axis.set_title(f"{prompts} prompts", fontsize=10, loc="left")
    figure.suptitle(f"Answers refused, 95% intervals ({table['n'].max()} held-out pairs)", fontsize=11)
    return figure


def _panel(axis: Axes, part: pd.DataFrame) -> None:
    for place, (_, row) in enumerate(part.iterrows()):
        colour = _colour(row)
        axis.plot([row["refused_low"], row["refused_high"]], [place, place], color=colour, linewidth=2)
        axis.plot(row["refused"], place, "o", color=colour)
    labels = [f"{row['direction']}\n{row['done']}" if row["done"] else "nothing" for _, row in part.iterrows()]
    axis.set_yticks(range(len(part)), labels, fontsize=8)
    axis.invert_yaxis()
    axis.set(xlim=(-0.04, 1.04), xlabel="share of answers")
    axis.xaxis.set_major_formatter(PercentFormatter(1.0))


def _colour(row: pd.Series) -> str:
    """Of the plain model, of a direction, or of a random one."""
    if not row["done"]:
        return COLOURS[0]
    return COLOURS[2] if row["direction"].startswith(beside("")) else COLOURS[1]
