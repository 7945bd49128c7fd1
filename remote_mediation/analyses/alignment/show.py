"""What training changed of the outcome, and which mediators undo the change or bring it."""

from __future__ import annotations

import numpy as np
import pandas as pd

from remote_mediation.analyses.alignment.ask import PROMPTS
from remote_mediation.result import Result
from remote_mediation.show.section import Section
from remote_mediation.show.tables import Table, interval, notes_on
from remote_mediation.show.words import UNMEASURED, pairs_notes, share_of

_WAYS = ("undone", "brought")
ROUNDING = 1e-4
"""Largest change of the outcome that is one of rounding."""


def sections(result: Result) -> list[Section]:
    """One section."""
    title, table = "What training changed", result.tables.get("alignment.csv")
    base = result.study.config.alignment.base
    did = (
        f"The study's model beside `{base}`, the checkpoint before its training, on the same prompts. Sets of "
        "mediators took the values that they have in the other model, at all tokens of the prompt: *undone* is what "
        "the model then loses of the change, *brought* is what the base then gains of it. Sets lie on the same paths, "
        "shares do not add up."
    )
    if table is None:
        return [Section("alignment", title, did, UNMEASURED)]
    words = [_change_in_words(result, table, prompts) for prompts in reversed(PROMPTS)]
    tables = tuple(_table(result, table, prompts) for prompts in reversed(PROMPTS))
    return [Section("alignment", title, did, " ".join(words), tables, brief=words[0])]


def _change(table: pd.DataFrame, prompts: str) -> pd.Series:
    return table[(table["prompts"] == prompts) & (table["quantity"] == "change")].iloc[0]


def _changed(change: pd.Series) -> bool:
    return bool(change["mean_low"] > 0 or change["mean_high"] < 0)


def _change_in_words(result: Result, table: pd.DataFrame, prompts: str) -> str:
    """The change, and the modules that do most of it in both directions."""
    change, unit = _change(table, prompts), result.study.outcome.unit
    size = interval(change["mean"], change["mean_low"], change["mean_high"])
    said = f"On {prompts} prompts training changed the outcome by {size} {unit}"
    if not _changed(change):
        return f"{said}, which is not told apart from 0: there is no place of it to find."
    modules = (table["mediators"] != "") & ~table["mediators"].str.startswith("stream")
    part = table[(table["prompts"] == prompts) & modules]
    by = part.pivot(index="mediators", columns="quantity", values="share")
    name = str(by.min(axis=1).idxmax())
    own = part[part["mediators"] == name].set_index("quantity")
    undone, brought = (share_of(own.loc[quantity], "share") for quantity in _WAYS)
    most = f"of all modules the {name} do most in both directions"
    return f"{said}; {most}: the base's values undo {undone} of it, the model's bring {brought}."


def _table(result: Result, table: pd.DataFrame, prompts: str) -> Table:
    part = table[(table["prompts"] == prompts) & (table["mediators"] != "")]
    largest = part.groupby("mediators", sort=False)["mean"].apply(lambda means: means.abs().max())
    idle = list(largest.index[largest <= ROUNDING])
    acting = part[~part["mediators"].isin(idle)].groupby("mediators", sort=False)
    rows = [(str(name), *_both_ways(both.set_index("quantity"))) for name, both in acting]
    unit = result.study.outcome.unit
    header = (f"on {prompts} prompts", f"undone, {unit}", "share of the change", f"brought, {unit}", "share")
    reasons = [str(reason) for reason in part["reason"] if reason]
    nothing = f"{', '.join(idle)}: 0 in both directions" if idle else ""
    return Table(header, rows, (*notes_on("", [nothing]), *pairs_notes(part, "pair"), *notes_on("", reasons)))


def _both_ways(by: pd.DataFrame) -> list[str]:
    """What a set undoes and what it brings, each with its share. by: its rows, by quantity."""
    return [cell for way in _WAYS for cell in (_mean(by.loc[way]), share_of(by.loc[way], "share"))]


def _mean(row: pd.Series) -> str:
    return interval(row["mean"], row["mean_low"], row["mean_high"]) if not np.isnan(row["mean"]) else ""
