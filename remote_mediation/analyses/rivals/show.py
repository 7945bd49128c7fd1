"""The rival claims as they are read: rows of the table of claims, the map of directions, and all mediators on one axis.

Tables of `directions.analyse` and `sets.analyse` in, tables of text and figures out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd

from remote_mediation.analyses.claims.verdicts import DIRECTIONS, HALF, LATE_MLPS, MOST_ALLOWED, first_neurons
from remote_mediation.analyses.rivals.directions import DEPTH, GIVEN, eligible
from remote_mediation.analyses.rivals.figures import AXIS, LATE_GATE, axis_figure, geometry_figure, map_figure
from remote_mediation.analyses.rivals.geometry import PLACES
from remote_mediation.analyses.rivals.rulings import DIRECTION, TWO
from remote_mediation.result import Result
from remote_mediation.show.section import Section, Verdict
from remote_mediation.show.tables import NONE, Note, Table, count, interval, literal, number, percent
from remote_mediation.show.words import UNMEASURED, decided, in_groups, pairs_notes, reason_notes, share_of
from remote_mediation.sites import thirds

CLAIM_FILES = {
    "directions": ("direction.csv", "direction_sets.csv"),
    "rivals": ("rivals.csv", "rival_sets.csv"),
}
"""Verdicts on rivals, and the numbers behind them, by analysis."""
_NOTHING = "no effect"
"""The gate's word where no share is defined."""
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
        "At every layer and template token behind the user's text the mean difference of the "
        "residual stream, harmful minus harmless, was taken on the discovery pairs, and the "
        "projection onto it swapped on some of them. The best one below 80% of the depth was then "
        "swapped on the held-out pairs, there and after all layers, beside random directions along "
        "which the same change was made."
    )
    table = result.tables.get("directions.csv")
    if table is None:
        return [Section(name, title, did, UNMEASURED)]
    claims, sets = (result.tables[file] for file in CLAIM_FILES[name])
    claim = claims.iloc[0]
    own, sets = claims[:1], sets[sets["rival"] == claim["rival"]]
    heldout = f"Held out: {claim['why']} ({claim['said']})."
    if claim["gate"] == _NOTHING:
        return [Section(name, title, did, heldout, (_measures(sets),))]
    finding = " ".join(filter(None, (_chosen(table), heldout, _given(result, table, sets))))
    tables, figure = (_reasons(own), _measures(sets), _map_table(table)), map_figure(table, claim["said"])
    one = Section(name, title, did, finding, tables, figure, brief=heldout)
    return [one, *_bases(result), *_geometry(result)]


def _geometry(result: Result) -> list[Section]:
    """How far the directions of harm and refusal are apart."""
    table = result.tables.get("geometry.csv")
    if table is None:
        return []
    did = (
        "On the discovery pairs the mean difference of the stream, harmful minus harmless, was taken after every layer "
        "at the last token of the user's text (*harm*) and at the last prompt token (*refusal*), after arXiv "
        "2507.11878. A cosine is to be read against those of the same direction on two halves of the pairs, and a "
        "silhouette, from -1 to 1, says how well the two kinds of prompts are told apart by the stream."
    )
    said, tables = _two_directions(result)
    apart = f"By their silhouettes, harmful and harmless prompts are told apart {' and '.join(_told_apart(table))}."
    finding = f"{_cosines_in_words(table)} {apart}{said}"
    return [Section("geometry", "Harm and refusal in the stream", did, finding, tables, geometry_figure(table))]


def _cosines_in_words(table: pd.DataFrame) -> str:
    """How far apart the two directions point, over the layers that may be chosen and at the middle one of these."""
    depth = eligible(len(table))
    middle, shown = table.iloc[depth // 2], table.iloc[:depth]["cosine"]
    return (
        f"Below {DEPTH:.0%} of the depth the cosine of the two lies between {number(shown.min())} and "
        f"{number(shown.max())}; after layer {middle['layer']:.0f} it is {number(middle['cosine'])}, and on two halves "
        f"{number(middle['cosine_harm'])} for harm, {number(middle['cosine_refusal'])} for refusal."
    )


def _told_apart(table: pd.DataFrame) -> Iterator[str]:
    """By token, the layer of the largest silhouette; where that is not above 0, none tells the prompts apart."""
    for name in PLACES:
        silhouettes = table.set_index("layer")[f"silhouette_{name}"].dropna()
        if (silhouettes > 0).any():
            yield f"best after layer {silhouettes.idxmax()} at the token of {name} ({number(silhouettes.max())})"
        else:
            at_most = f" (at most {number(silhouettes.max())})" if len(silhouettes) else ""
            yield f"nowhere at the token of {name}{at_most}"


def _two_directions(result: Result) -> tuple[str, tuple[Table, ...]]:
    """Whether they are two directions that both act, and the numbers behind that; nothing where it was not tested."""
    claims, sets = (result.tables[file] for file in CLAIM_FILES["directions"])
    claim, own = claims[claims["rival"] == TWO.name], sets[sets["rival"] == TWO.name]
    if claim.empty:
        return "", ()
    said = f" Two directions that both act, held out: {claim.iloc[0]['why']} ({claim.iloc[0]['said']})."
    return said, () if own.empty else (_reasons(claim), _measures(own))


def _chosen(table: pd.DataFrame) -> str:
    """What the discovery pairs say of the direction that was chosen on them."""
    best = table[table["chosen"]].iloc[0]
    cosines = {"layer below": best["cosine_below"], "token before": best["cosine_before"]}
    near = [f"{number(cosine)} with the {of}" for of, cosine in cosines.items() if not pd.isna(cosine)]
    return (
        f"Chosen: layer {best['layer']} at '{best['position']}', which carries "
        f"{percent(best['nie'])} of TE by NIE and {percent(best['tie'])} by TIE on {best['n']} "
        f"discovery pairs; its cosine is {', '.join(near) or 'with no neighbour'}. "
        "The direction itself is in the run folder, `direction.safetensors`."
    )


def _given(result: Result, table: pd.DataFrame, sets: pd.DataFrame) -> str:
    """What a direction from a file carries; nothing where none was given."""
    name = Path(result.study.config.directions.basis).name
    own = sets[sets["measure"].str.startswith(f"{GIVEN}, ")].set_index("direction")
    if own.empty:
        return ""
    best = table[table["chosen"]].iloc[0]
    shares = ", ".join(f"{way.upper()} {share_of(own.loc[way], 'harm')}" for way in DIRECTIONS)
    return (
        f"The direction of the file {literal(name)} ({own['measure'].iloc[0].removeprefix(f'{GIVEN}, ')}) carries "
        f"{shares} of TE; its cosine with the chosen one is {number(best['cosine_given'])}."
    )


def _bases(result: Result) -> list[Section]:
    """The bases that were made where the chosen direction lies; nothing where none were."""
    made = result.tables.get("bases.csv")
    if made is None:
        return []
    chosen = made.iloc[0]
    did = (
        f"At the site of the chosen direction, layer {chosen['layer']} at '{chosen['position']}', other bases were "
        f"made from {chosen['n']} discovery pairs, and the projection onto each was swapped on these and on the "
        "held-out pairs. Gradients find a learnt basis so that it carries Y (DAS, arXiv 2303.02536). Beside it stands "
        "the same training with shuffled labels: on half of the components, the swap should move Y as far the other "
        "way, so that what it fits of them is memory. What a basis carries is what it carries held out."
    )
    held = _held_out(result, chosen["basis"])
    rows = [(one, held[one["basis"]]) for _, one in made.iterrows()]
    return [Section("bases", "Other bases at its site", did, _bases_in_words(rows), (_basis_table(rows),))]


def _bases_in_words(rows: Sequence[tuple[pd.Series, pd.DataFrame]]) -> str:
    """What each carries held out, and which carry clearly less there than on their own pairs. rows: `_basis_table`."""
    said = [f"{one['basis']} {' and '.join(share_of(own.loc[way], 'harm') for way in DIRECTIONS)}" for one, own in rows]
    finding = f"NIE and TIE held out, as shares of TE: {'; '.join(said)}."
    less = [one["basis"] for one, own in rows if any(own.loc[way, "harm_high"] < one[way] for way in DIRECTIONS)]
    return f"{finding} Clearly less than on its own pairs, so that it overfits: {'; '.join(less)}." if less else finding


def _held_out(result: Result, chosen: str) -> dict[str, pd.DataFrame]:
    """By basis its rows of `direction_sets.csv`, by direction. chosen: name of the one on which the verdict rests."""
    sets = result.tables["direction_sets.csv"]
    sets = sets[sets["rival"] == DIRECTION.name]
    found = {str(name): rows.set_index("direction") for name, rows in sets.groupby("measure")}
    return {**found, chosen: sets[sets["decides"]].set_index("direction")}


def _basis_table(rows: Sequence[tuple[pd.Series, pd.DataFrame]]) -> Table:
    """Each basis on its own pairs (of `bases.csv`) and held out (of `direction_sets.csv`, by direction)."""
    header = (
        "basis",
        "values",
        "NIE on its pairs",
        "NIE held out",
        "TIE on its pairs",
        "TIE held out",
        "cosine with the chosen",
        "miss",
    )
    cells = []
    for made, held in rows:
        shares = [text for way in DIRECTIONS for text in (percent(made[way]), share_of(held.loc[way], "harm"))]
        miss = NONE if pd.isna(made["loss"]) else f"{number(made['loss_before'])} to {number(made['loss'])}"
        cells.append((made["basis"], str(made["values"]), *shares, number(made["cosine_chosen"]), miss))
    notes = (
        Note("", "on its pairs, what has shuffled labels counts in the way that it was taught"),
        Note("miss", "mean squared miss of Y on its pairs, before and after training; 1 where nothing is swapped"),
    )
    return Table(header, cells, notes)


def rivals(result: Result) -> list[Section]:
    """The rivals that name sets, and every mediator that was measured on one axis."""
    name, title = "rivals", "Rival claims"
    did = (
        "What others say carries the effect was swapped together on the held-out pairs and on their "
        "placebos; what had to be chosen or ranked was so on the discovery pairs. Each rule says who "
        "set it. The early third is without the MLP of layer 0: at the changed words it embeds them "
        "anew, which no set is credited with."
    )
    if "rivals.csv" not in result.tables:
        return [Section(name, title, did, UNMEASURED)]
    claims, sets = (result.tables[file] for file in CLAIM_FILES[name])
    finding = f"{in_groups(verdicts_of(claims, sets))}."
    tables = (_reasons(claims), _measures(sets))
    return [Section(name, title, did, finding, tables), *_one_axis(result)]


def _one_axis(result: Result) -> list[Section]:
    """All mediators by the numbers that they swap; nothing where no share is defined."""
    every = carriers(result)
    if every["harm"].isna().all() or (every["said"] == _NOTHING).any():
        return []
    did = (
        "Share of TE that each mediator carries, against the numbers that it swaps at each token. "
        "Filled: what a verdict rests on. Hollow: what was measured beside it."
    )
    title, found = "All mediators on one axis", _fewest(every)
    return [Section("one-axis", title, did, found, figure=axis_figure(every, _axis_title(every)))]


def carriers(result: Result) -> pd.DataFrame:
    """Every set with joint effects on the held-out pairs, and what is said of its claim (`AXIS`)."""
    tables = result.tables
    parts = []
    for claims, sets in CLAIM_FILES.values():
        if sets in tables:
            parts.append(tables[sets].merge(tables[claims][["rival", "said"]], on="rival"))
    if "gate_sets.csv" in tables:
        parts += _of_claim_3(result)
    return pd.concat([part[list(AXIS)] for part in parts], ignore_index=True)


def _of_claim_3(result: Result) -> list[pd.DataFrame]:
    """Late neurons by rank, and all late MLPs (`AXIS`)."""
    tables, info = result.tables, result.study.info
    claims, bands, curve = (tables[name] for name in ("claims.csv", "sets.csv", "gate_sets.csv"))
    said = claims.loc[claims["number"] == 3, "said"].item()
    whole = bands[(bands["number"] == 3) & (bands["measure"] == LATE_MLPS)]
    values = len(thirds(info.layers).late) * info.d_model
    parts = [whole.assign(values=values, decides=False)]
    deciding = bands.loc[(bands["number"] == 3) & bands["decides"], "measure"].str.removesuffix(MOST_ALLOWED)
    for way in DIRECTIONS:
        ends = {way: "harm", f"{way}_low": "harm_low", f"{way}_high": "harm_high"}
        part = curve.rename(columns={"size": "values", **ends})
        decides = curve["size"].map(first_neurons).isin(deciding)
        parts.append(part.assign(measure="late neurons by rank", direction=way, decides=decides))
    return [part.assign(rival=LATE_GATE, said=said) for part in parts]


def _verdicts(result: Result, analysis: str) -> list[Verdict]:
    claims, sets = (result.tables.get(file) for file in CLAIM_FILES[analysis])
    return [] if claims is None or sets is None else verdicts_of(claims, sets)


def verdicts_of(claims: pd.DataFrame, sets: pd.DataFrame) -> list[Verdict]:
    """A rival a row: harm, placebo, verdict. claims, sets: as of `rivals.csv` and `rival_sets.csv`."""
    return [
        decided(
            claim,
            sets[sets["rival"] == claim.rival],
            label=f"rival '{claim.rival}'",
            text=f"rival: {claim.claim} ({claim.paper})",
            short=claim.rival,
        )
        for claim in claims.itertuples()
    ]


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
            share_of(row, "harm"),
            share_of(row, "placebo"),
            interval(row["excess"], row["excess_low"], row["excess_high"]),
            share_of(row, "common"),
            _random(row),
        )
        for _, row in sets.iterrows()
    ]
    notes = (
        Note("values", "numbers that are swapped at each token"),
        Note(
            "random sets",
            "those that do as much, and the mean size of their change over that of the set",
        ),
        *pairs_notes(sets, "held-out pair"),
        *reason_notes(sets),
    )
    return Table(header, rows, notes)


def _map_table(table: pd.DataFrame) -> Table:
    """The strongest directions on the discovery pairs."""
    strength = table[["nie", "tie"]].min(axis=1)
    best = table.loc[strength.sort_values(ascending=False, kind="stable").index[:_MOST]]
    header = (
        "layer",
        "position",
        "length",
        "NIE",
        "TIE",
        "cosine below",
        "token before",
        "with the chosen",
        "chosen",
    )
    rows = [_map_row(row) for _, row in best.iterrows()]
    note = Note(
        "",
        f"the {len(rows)} strongest on {table['n'].max()} discovery pairs, by the smaller of NIE and TIE",
    )
    return Table(header, rows, (note,))


def _map_row(row: pd.Series) -> tuple[str, ...]:
    return (
        str(row["layer"]),
        f"'{row['position']}'",
        number(row["norm"]),
        percent(row["nie"]),
        percent(row["tie"]),
        *(number(row[name]) for name in ("cosine_below", "cosine_before", "cosine_chosen")),
        "yes" if row["chosen"] else "" if row["eligible"] else "too late",
    )


def _fewest(every: pd.DataFrame) -> str:
    """The fewest numbers that carry half of TE in both directions, and what is said of their claim."""
    first = _fewest_set(every)
    if first is None:
        return f"No set is clear of {HALF:.0%} of TE in both directions."
    return (
        f"The fewest numbers that are clear of {HALF:.0%} of TE in both directions: "
        f"{first['values']}, {first['measure']} ({first['rival']}: {first['said']})."
    )


def _axis_title(every: pd.DataFrame) -> str:
    """The same for a figure."""
    first = _fewest_set(every)
    if first is None:
        return "No set of mediators is shown to carry half of the effect in both directions"
    numbers = count(int(first["values"]), "number")
    carry = "carries" if first["values"] == 1 else "carry"
    return f"{numbers} at each token {carry} half of the effect or more: {first['measure']}"


def _fewest_set(every: pd.DataFrame) -> pd.Series | None:
    """The smallest set that is clear of half of TE in both directions; None where none is. every: `AXIS`."""
    sets = every.groupby(["rival", "said", "measure", "values"], sort=False)
    low = sets["harm_low"].min().rename("low").reset_index()
    enough = low[low["low"] > HALF]
    return None if enough.empty else enough.sort_values("values", kind="stable").iloc[0]


def _random(row: pd.Series) -> str:
    if pd.isna(row["drawn"]):
        return ""
    return f"{row['reached']:.0f} of {row['drawn']:.0f}, {row['likeness']:.2f}"
