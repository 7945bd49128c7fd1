"""Paths as they are read: what is gone of the early site's effect with later modules frozen."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from remote_mediation.analyses.paths.ask import ATTENTION, early_layer
from remote_mediation.result import Result
from remote_mediation.show.figures import DPI, WIDTH, dot_rows, legend, share_axis
from remote_mediation.show.section import Section
from remote_mediation.show.tables import Note, Table, interval, notes_on
from remote_mediation.show.words import UNMEASURED, no_effect, pairs_notes, share_cell, share_of


def sections(result: Result) -> list[Section]:
    """What the way of harm needs."""
    name, title, table = "paths", "Paths", result.tables.get("paths.csv")
    split = "held-out" if "gates.csv" in result.tables else "all"
    early = early_layer(result.study.info.layers)
    did = (
        f"The residual stream at the differing tokens after layer {early} was swapped while later modules of a kind "
        f"stayed as they were, on {split} pairs. What is gone of its effect then needs these modules."
    )
    absent = no_effect(result)
    if absent or table is None or table.empty:
        return [Section(name, title, did, absent or UNMEASURED)]
    frozen = table[(table["frozen"] != "nothing") & (table["quantity"] == "nie")]
    known = frozen[frozen["share_low"].notna()]
    words = _taken_away(known)
    more = "Shares near 100% may stand side by side: each says what the way needs, they are no parts of a whole."
    figure = path_figure(table) if len(known) else None
    return [Section(name, title, did, f"{words} {more}", (_paths_table(result, table),), figure, words)]


def _taken_away(known: pd.DataFrame) -> str:
    """What frozen modules take away. known: rows of NIE with a share that has an interval."""
    if known.empty:
        return "No share of its NIE is known."
    said = [f"{row.frozen} {share_cell(row, 'share')}" for row in known.itertuples() if row.frozen != ATTENTION]
    return f"Of its NIE, frozen modules take away: {'; '.join(said)}."


def _paths_table(result: Result, table: pd.DataFrame) -> Table:
    unit = result.study.outcome.unit
    by = table.set_index(["frozen", "quantity"])
    rows = []
    for name in dict.fromkeys(table["frozen"]):
        nie, tie = (by.loc[(name, quantity)] for quantity in ("nie", "tie"))
        rows.append((str(name), *_left_and_gone(nie, str(name)), *_left_and_gone(tie, str(name))))
    kept = table[table["frozen"] != "nothing"]
    moved = Note(ATTENTION, "no finding: nothing else reads other tokens, so frozen it lets nothing reach the answer")
    header = ("frozen", f"NIE left, {unit}", "NIE gone", f"TIE left, {unit}", "TIE gone")
    return Table(header, rows, (*pairs_notes(table, "pair"), moved, *notes_on("", kept["reason"])))


def _left_and_gone(row: pd.Series, frozen: str) -> tuple[str, str]:
    left = interval(row["mean"], row["ci_low"], row["ci_high"])
    return left, "" if frozen == "nothing" else share_of(row, "share")


def path_figure(paths: pd.DataFrame) -> Figure:
    """The share of the early site's NIE and TIE that needs what was frozen.

    paths: `paths.PATH_COLUMNS`.
    """
    part = paths[paths["frozen"] != "nothing"]
    names = list(dict.fromkeys(part["frozen"]))
    figure = Figure((WIDTH * 0.8, 1.9 + 0.45 * len(names)), DPI, layout="constrained")
    axis = figure.subplots()
    shares = {label: part[part["quantity"] == name] for name, label in (("nie", "NIE"), ("tie", "TIE"))}
    dot_rows(axis, [(label, one, "share", "frozen") for label, one in shares.items()], names)
    share_axis(axis, "gone when it is frozen, share of the early site's effect")
    counts = f"pairs: {part['n'].max()}, clusters: {part['clusters'].max()}"
    title = f"What the effect of layer {part['layer'].iloc[0]} at the differing tokens needs later"
    figure.suptitle(f"{title}\n95% intervals; {counts}", fontsize=11)
    legend(figure, axis)
    return figure
