"""The rival claims as they are read: rows of the table of claims, the map of directions, and all mediators on one axis.

Tables of `directions.analyse` and `sets.analyse` in, tables of text and figures out.
"""

from __future__ import annotations

import pandas as pd

from remote_mediation.analyses.rivals.figures import axis_figure, map_figure
from remote_mediation.result import Result
from remote_mediation.show.section import Section, Verdict
from remote_mediation.show.tables import NONE, Note, Table, interval, notes_on, number, percent
from remote_mediation.show.words import UNMEASURED
from remote_mediation.sites import thirds

_CLAIMS = {"directions": ("direction.csv", "direction_sets.csv"), "rivals": ("rivals.csv", "rival_sets.csv")}
_MOST = 10
"""Directions in the table."""


def direction_verdicts(result: Result) -> list[Verdict]:
    """The rival's row of the table of claims."""
    return _verdicts(result, "directions")


def rival_verdicts(result: Result) -> list[Verdict]:
    """The rivals' rows of the table of claims."""
    return _verdicts(result, "rivals")


def directions(result: Result) -> list[Section]:
    """The map of directions, and the best one held out."""
    name, title = "directions", "One direction"
    did = (
        "At every layer and template token behind the user's text the mean difference of the residual stream, harmful "
        "minus harmless, was taken on the discovery pairs, and the projection onto it swapped on some of them. The "
        "best one below 80% of the depth was then swapped on the held-out pairs, there and after all layers, beside "
        "random directions along which the same change was made."
    )
    table = result.tables.get("directions.csv")
    if table is None:
        return [Section(name, title, did, UNMEASURED)]
    claims, sets = (result.tables[file] for file in _CLAIMS[name])
    best = table[table["chosen"]].iloc[0]
    near = ", ".join(
        f"{number(best[column])} with the {text}"
        for column, text in (("cosine_below", "layer below"), ("cosine_before", "token before"))
        if not pd.isna(best[column])
    )
    finding = (
        f"Chosen: layer {best['layer']} at '{best['position']}', which carries {percent(best['nie'])} of TE by NIE and "
        f"{percent(best['tie'])} by TIE on {best['n']} discovery pairs; its cosine is {near or 'with no neighbour'}. "
        f"Held out: {claims['why'].iloc[0]} ({claims['said'].iloc[0]}). "
        "The direction itself is in the run folder, `direction.safetensors`."
    )
    tables = (_measures(sets), _map_table(table))
    return [Section(name, title, did, finding, tables, map_figure(table), claims["why"].iloc[0])]


def rivals(result: Result) -> list[Section]:
    """The rivals that name sets, and every mediator that was measured on one axis."""
    name, title = "rivals", "Rival claims"
    did = (
        "What others say carries the effect was swapped together on the held-out pairs and on their placebos; what had "
        "to be chosen or ranked was so on the discovery pairs. Each rule says who set it."
    )
    if "rivals.csv" not in result.tables:
        return [Section(name, title, did, UNMEASURED)]
    claims, sets = (result.tables[file] for file in _CLAIMS[name])
    finding = "; ".join(f"{row.claim} ({row.paper}): {row.said}" for row in claims.itertuples())
    every = carriers(result)
    tables = (_reasons(claims), _measures(sets))
    lead = "Share of TE that each mediator carries, against the numbers that it swaps at each token."
    axis = Section("one-axis", "All mediators on one axis", lead, _in_words(every), figure=axis_figure(every))
    return [Section(name, title, did, f"{finding[0].upper()}{finding[1:]}.", tables), axis]


def carriers(result: Result) -> pd.DataFrame:
    """All sets with joint effects on held-out pairs: rival, measure, values, direction, harm with its ends."""
    tables, info = result.tables, result.study.info
    parts = [tables[file] for _, file in _CLAIMS.values() if file in tables]
    if "gate_sets.csv" in tables:
        curve = tables["gate_sets.csv"]
        for way in ("nie", "tie"):
            renamed = {"size": "values", way: "harm", f"{way}_low": "harm_low", f"{way}_high": "harm_high"}
            part = curve[list(renamed)].rename(columns=renamed)
            parts.append(part.assign(rival="late neurons by rank", measure="late neurons", direction=way))
    if "sets.csv" in tables:
        bands = tables["sets.csv"]
        late = bands[(bands["number"] == 3) & (bands["measure"] == "late MLPs together")]
        parts.append(late.assign(rival="late MLPs", values=len(thirds(info.layers).late) * info.d_model))
    columns = ["rival", "measure", "values", "direction", "harm", "harm_low", "harm_high"]
    return pd.concat([part[columns] for part in parts], ignore_index=True)


def _verdicts(result: Result, analysis: str) -> list[Verdict]:
    claims, sets = (result.tables.get(file) for file in _CLAIMS[analysis])
    if claims is None or sets is None:
        return []
    rows = []
    for claim in claims.itertuples():
        own = sets[(sets["rival"] == claim.rival) & sets["decides"]]
        harm, placebo = ("; ".join(_with_slope(row, side) for _, row in own.iterrows()) for side in ("harm", "placebo"))
        rows.append(
            Verdict(f"rival: {claim.rival}", f"rival: {claim.claim} ({claim.paper})", harm, placebo, claim.said)
        )
    return rows


def _with_slope(row: pd.Series, side: str) -> str:
    """A share, and the slope on TE."""
    share = [] if pd.isna(row[side]) else [_cell(row, side)]
    slope = [] if pd.isna(row[f"beta_{side}"]) else [f"β {number(row[f'beta_{side}'])}"]
    return ", ".join([*share, *slope]) or NONE


def _reasons(claims: pd.DataFrame) -> Table:
    rows = [(f"{row.claim} ({row.paper})", row.said, row.why, row.rule) for row in claims.itertuples()]
    return Table(("rival claim", "verdict", "why", "rule, and who set it"), rows)


def _measures(sets: pd.DataFrame) -> Table:
    """Every number behind the verdicts."""
    header = (
        "swapped",
        "values",
        "effect",
        "harm",
        "placebo",
        "β harm - β placebo",
        "placebo / TE of harm",
        "random sets",
    )
    rows = [
        (
            row["measure"],
            str(row["values"]),
            str(row["direction"]).upper(),
            _cell(row, "harm"),
            _cell(row, "placebo"),
            interval(row["excess"], row["excess_low"], row["excess_high"]),
            _cell(row, "common"),
            _random(row),
        )
        for _, row in sets.iterrows()
    ]
    notes = (
        Note("values", "numbers that are swapped at each token"),
        Note("random sets", "those that do as much, and the mean size of their change over that of the set"),
        *notes_on("", sets["reason"].dropna()),
    )
    return Table(header, rows, notes)


def _map_table(table: pd.DataFrame) -> Table:
    """The strongest directions on the discovery pairs."""
    strength = table[["nie", "tie"]].min(axis=1)
    best = table.loc[strength.sort_values(ascending=False, kind="stable").index[:_MOST]]
    header = ("layer", "position", "length", "NIE", "TIE", "cosine below", "token before", "with the chosen", "chosen")
    rows = [
        (
            str(row["layer"]),
            f"'{row['position']}'",
            number(row["norm"]),
            percent(row["nie"]),
            percent(row["tie"]),
            *(number(row[name]) for name in ("cosine_below", "cosine_before", "cosine_chosen")),
            "yes" if row["chosen"] else "" if row["eligible"] else "too late",
        )
        for _, row in best.iterrows()
    ]
    note = Note("", f"the {len(rows)} strongest on {table['n'].max()} discovery pairs, by the smaller of NIE and TIE")
    return Table(header, rows, (note,))


def _in_words(every: pd.DataFrame) -> str:
    """The fewest numbers that carry half of TE in both directions."""
    by_set = every.groupby(["measure", "values"], sort=False)["harm_low"].min()
    enough = by_set[by_set > 0.5]
    if enough.empty:
        return "No set is clear of half of TE in both directions."
    measure, values = min(enough.index, key=lambda key: key[1])
    return f"The fewest numbers that are clear of half of TE in both directions: {values} ({measure})."


def _random(row: pd.Series) -> str:
    if pd.isna(row["drawn"]):
        return ""
    return f"{row['reached']:.0f} of {row['drawn']:.0f}, {row['likeness']:.2f}"


def _cell(row: pd.Series, name: str) -> str:
    return interval(row[name], row[f"{name}_low"], row[f"{name}_high"], percent)
