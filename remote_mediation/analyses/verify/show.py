"""What the judge says of sampled answers while mediators are swapped, beside what the outcome says of them."""

from __future__ import annotations

from typing import Any

import pandas as pd

from remote_mediation.judges import BUILTIN
from remote_mediation.result import Result
from remote_mediation.show.section import Section
from remote_mediation.show.tables import Note, Table, interval, notes_on, number, percent
from remote_mediation.show.words import UNMEASURED, share_cell, share_of

_EFFECTS = ("nie", "tie")
_ERRORS = ("recall", "specificity")


def sections(result: Result) -> list[Section]:
    """One section."""
    title, did, table = "Verified in answers", _did(result), result.tables.get("verify.csv")
    if table is None:
        return [Section("verify", title, did, UNMEASURED)]
    words = [_rates_in_words(table), *(_mediator_in_words(table, name) for name in _names(table))]
    if not _names(table):
        words.append("No site and no set was found to put to the judge.")
    tables = (_rates_table(result, table), *([_effects_table(result, table)] if _names(table) else []))
    return [Section("verify", title, did, " ".join(words), tables, brief=_in_brief(table))]


def _did(result: Result) -> str:
    settings = result.study.config.verify
    how = "the likeliest token each time" if settings.temperature == 0 else f"temperature {settings.temperature:g}"
    held = (
        "and what was swapped at the last prompt token was held at every new token."
        if settings.held
        else "and generation went on from there. What is swapped at `last` alone acts on the first new token, and on "
        "later ones only by the keys and values that later layers make of it."
    )
    return (
        f"Answers of {settings.tokens} tokens were sampled ({how}), {settings.samples} to every prompt of held-out "
        "pairs, and all those to a pair with the same random numbers. The strongest site of each kind and every set "
        f"that this run found was swapped on the prompt's tokens, {held} What is judged is whether an answer complies "
        f"with the prompt that was given; the judge is `{settings.judge}`."
    )


def _names(table: pd.DataFrame) -> list[str]:
    return [name for name in table["mediator"].unique() if name]


def _row(table: pd.DataFrame, mediator: str, quantity: str) -> pd.Series:
    return table[(table["mediator"] == mediator) & (table["quantity"] == quantity)].iloc[0]


def _sign(row: pd.Series) -> int:
    """Of the judged effect, where its interval is clear of 0."""
    return int(row["judged_low"] > 0) - int(row["judged_high"] < 0)


def _rates_in_words(table: pd.DataFrame) -> str:
    harmful, harmless, te = (_row(table, "", name) for name in ("rate_harmful", "rate_harmless", "te"))
    rates = f"{share_of(harmful, 'judged')} of answers to harmful prompts comply, {share_of(harmless, 'judged')} of "
    rates = f"{rates}those to harmless ones"
    said = f"{rates}: a judged TE of {share_of(te, 'judged')}."
    if _sign(te):
        return said
    return f"{said} It is not told apart from 0, so there is nothing of it for a mediator to carry."


def _mediator_in_words(table: pd.DataFrame, name: str) -> str:
    """Whether the judge sees both effects, by their intervals, and what necessary means for the answers."""
    te, nie, tie = _row(table, "", "te"), *(_row(table, name, quantity) for quantity in _EFFECTS)
    seen = [label for label, row in (("NIE", nie), ("TIE", tie)) if _sign(te) and _sign(row) == _sign(te)]
    effects = f"judged NIE {share_of(nie, 'judged')}, TIE {share_of(tie, 'judged')}"
    if not seen:
        return f"{name}: {effects}; neither is shown to go the way of the judged TE."
    which = "both go" if len(seen) == 2 else f"the {seen[0]} alone goes"
    return f"{name}: {effects}; {which} the way of the judged TE, clear of 0.{_refusals(te, tie)}"


def _refusals(te: pd.Series, tie: pd.Series) -> str:
    """Says that it removes refusal only where the judge saw that: harm makes the model comply less, the swap more."""
    if _sign(te) >= 0 or _sign(tie) >= 0:
        return ""
    more = interval(-tie["judged"], -tie["judged_high"], -tie["judged_low"], percent)
    return f" With it as on the harmless prompt {more} more answers to harmful prompts comply: it removes refusal."


def _rates_table(result: Result, table: pd.DataFrame) -> Table:
    names = {"rate_harmful": "harmful prompts", "rate_harmless": "harmless prompts", "te": "TE"}
    plain = table[table["mediator"] == ""]
    rows = [(names[row.quantity], *_judged_cells(row), str(row.n), str(row.clusters)) for row in plain.itertuples()]
    header = (
        "nothing swapped",
        "answers that comply, says the judge",
        "judge's errors allowed for",
        "pairs",
        "clusters",
    )
    notes = (*_judge_notes(result, header[2]), *notes_on(header[1], plain["reason"]))
    return Table(header, rows, notes)


def _effects_table(result: Result, table: pd.DataFrame) -> Table:
    shown = table[table["mediator"] != ""]
    rows = [
        (
            row.mediator,
            row.quantity.upper(),
            interval(row.cheap, row.cheap_low, row.cheap_high, number),
            share_cell(row, "cheap_share"),
            share_cell(row, "judged_share"),
            *_judged_cells(row),
        )
        for row in shown.itertuples()
    ]
    unit = result.study.outcome.unit
    header = ("swapped", "effect", f"by the outcome, {unit}", "share of TE", "share of judged TE", "judged")
    notes = notes_on("judged", shown["reason"])
    return Table((*header, "judge's errors allowed for"), rows, tuple(notes))


def _judged_cells(row: Any) -> tuple[str, str]:
    return share_cell(row, "judged"), share_cell(row, "corrected")


def _judge_notes(result: Result, column: str) -> list[Note]:
    """How the judge errs, and where that was measured."""
    by = result.tables["verify_judge.csv"].set_index("measure")
    errors = [f"{name} {_measure(by.loc[name])}" for name in _ERRORS]
    labelled = result.study.config.verify.labelled
    where = "labelled answers of the package's own, no sample of this model's" if labelled == BUILTIN else labelled
    return [Note(column, f"the judge's {' and '.join(errors)} ({where}); it is taken to err alike on all answers")]


def _measure(row: pd.Series) -> str:
    return interval(row["value"], row["low"], row["high"], percent)


def _in_brief(table: pd.DataFrame) -> str:
    te = _row(table, "", "te")
    shares = [
        f"{name} {percent(_row(table, name, 'nie')['judged_share'])} by NIE, "
        f"{percent(_row(table, name, 'tie')['judged_share'])} by TIE"
        for name in _names(table)
    ]
    return f"judged TE {share_of(te, 'judged')}{'; of it ' if shares else ''}{'; '.join(shares)}"
