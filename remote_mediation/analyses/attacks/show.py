"""Circumvention as it is read: what the gates carry under each attack."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from remote_mediation.analyses.attacks.ask import NONE
from remote_mediation.analyses.intervene.show import doubt, judge_notes, no_variation
from remote_mediation.result import Result
from remote_mediation.show.figures import DPI, WIDTH, dot_rows, legend, share_axis
from remote_mediation.show.section import Section
from remote_mediation.show.tables import Table, count, interval, notes_on, number, percent
from remote_mediation.show.words import UNMEASURED, no_gates, refusal_in_words, share_cell


def sections(result: Result) -> list[Section]:
    """The gate set under attack."""
    name, title = "attacks", "Circumvention"
    did = (
        "The held-out prompts were rewrapped in generic texts around the same request, or another checkpoint was run, "
        "and the same gate set was swapped and held at the same mean as before."
    )
    absent, table = no_gates(result, "hold"), result.tables.get("attacks.csv")
    if absent or table is None or table.empty:
        return [Section(name, title, did, absent or UNMEASURED)]
    undone = "TE undone by holding"
    words = (refusal_in_words(result), _attacks_in_words(table), _attack_rates(result, table))
    tables = (_attack_table(result, table, undone), _rank_table(result, table))
    figure = attack_figure(table, undone)
    return [Section(name, title, did, " ".join(filter(None, words)), tables, figure, words[1])]


def _attacks_in_words(table: pd.DataFrame) -> str:
    """Under how many attacks the set still carries TE and holding it still undoes some, by the intervals."""
    attacked = table[table["attack"] != NONE]
    if attacked.empty:
        return "No attack could be run."
    carries = int(((attacked["nie_share_low"] > 0) & (attacked["tie_share_low"] > 0)).sum())
    undoes, adds = int((attacked["repair_low"] > 0).sum()), int((attacked["repair_high"] < 0).sum())
    of = f"of {count(len(attacked), 'attack')}"
    lowest = attacked.loc[attacked["repair"].idxmin()] if attacked["repair"].notna().any() else None
    least = "" if lowest is None else (
        f", least under {lowest['attack']}: "
        f"{interval(lowest['repair'], lowest['repair_low'], lowest['repair_high'], percent)}"
    )  # fmt: skip
    against = f", under {adds} it moves them further in its direction" if adds else ""
    return (
        f"Under {carries} {of} the gates' shares of TE are above 0 by NIE and by TIE, and under {undoes} holding them "
        f"undoes some of TE on harmful prompts{against}, as far as the intervals tell{least}."
    )


def _attack_rates(result: Result, table: pd.DataFrame) -> str:
    rates = pd.concat([table["complied"], table["complied_held"]]).dropna()
    if rates.empty:
        return "No answer was judged."
    return no_variation(rates) if set(rates) in ({0.0}, {1.0}) else doubt(result)


def _attack_table(result: Result, table: pd.DataFrame, undone: str) -> Table:
    rows = [
        (
            row.attack,
            str(row.n),
            interval(row.te, row.te_low, row.te_high),
            *(share_cell(row, name) for name in ("nie_share", "tie_share", "repair")),
        )
        for row in table.itertuples()
    ]
    spans = [
        f"under {row.attack} TE, {number(row.te_low)} to {number(row.te_high)}, spans 0: there are no shares of it"
        for row in table.itertuples()
        if row.te_low <= 0 <= row.te_high
    ]
    header = ("attack", "pairs", f"TE [95% interval], {result.study.outcome.unit}", "NIE / TE", "TIE / TE", undone)
    return Table(header, rows, (*notes_on("", table["reason"]), *notes_on("NIE / TE", spans)))


def _rank_table(result: Result, table: pd.DataFrame) -> Table:
    rank, rate = "rank correlation of single neurons", "answers that comply, says the judge"
    overlap = "gates among the strongest"
    rows = [
        (
            row.attack,
            *(("", "") if row.attack == NONE else (
                interval(row.spearman, row.spearman_low, row.spearman_high), share_cell(row, "overlap")
            )),
            share_cell(row, "complied"),
            share_cell(row, "complied_held"),
        )
        for row in table.itertuples()
    ]  # fmt: skip
    same = table[(table["attack"] != NONE) & (table["overlap_low"] == table["overlap_high"])]
    agree = "an interval of one point, where all resamples agree, is no certainty" if len(same) else ""
    notes = (*notes_on(overlap, [agree]), *judge_notes(result, rate))
    return Table(("attack", rank, overlap, rate, "with the gates held"), rows, notes)


def attack_figure(attacks: pd.DataFrame, undone: str) -> Figure:
    """What the gates carry under every attack, and how much of TE holding them undoes.

    attacks: `attacks.ATTACK_COLUMNS`. undone: what the right panel shows, in a few words.
    """
    names = list(attacks["attack"])
    figure = Figure((WIDTH, 1.9 + 0.45 * len(names)), DPI, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    counts = f"held-out pairs: {attacks['n'].max()}, clusters: {attacks['clusters'].max()}"
    figure.suptitle(f"The gate set under attack\n95% intervals; {counts}", fontsize=11)
    series = [(f"{label} / TE", attacks, f"{name}_share", "attack") for name, label in (("nie", "NIE"), ("tie", "TIE"))]
    dot_rows(left, series, names)
    dot_rows(right, [("held", attacks, "repair", "attack")], names, first=2)
    share_axis(left, "share of TE")
    share_axis(right, "share of TE")
    left.set_title("What the gates carry", fontsize=10, loc="left")
    right.set_title(undone, fontsize=10, loc="left")
    legend(figure, left)
    return figure
