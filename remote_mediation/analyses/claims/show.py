"""The claims as they are read: one small table, the numbers behind it, and how far claim 2 depends on choices.

Tables of `ask.analyse` in, tables of text out.
"""

from __future__ import annotations

import pandas as pd

from remote_mediation.analyses.claims.figures import SIGNS, SPLITS, claims_figure, curve_figure, specification_figure
from remote_mediation.analyses.claims.specification import RANDOM
from remote_mediation.analyses.claims.verdicts import DIRECTIONS, LATE_MLPS
from remote_mediation.result import Result
from remote_mediation.show.section import Section, Verdict
from remote_mediation.show.tables import Table, interval, notes_on, number, rounded
from remote_mediation.show.words import UNMEASURED, decided, in_groups, of_what, pairs_notes, reason_notes, share_of

CLAIMS = {
    1: "late layers",
    2: "MLPs over attention",
    3: "sparse gate",
    4: "early understanding",
    5: "handed on through MLPs",
}
"""The claims in a few words."""
_SHARES = "shares of TE with 95% intervals, NIE then TIE; of claim 4 a gain in accuracy, of claim 5 their mean"


def sections(result: Result) -> list[Section]:
    """The five claims. Their own gate says whether there is an effect, so nothing is held back here."""
    name, title = "claims", "The five claims"
    did = (
        "Joint and direct effects of sets, each measured together and in both directions, on held-out pairs and on "
        "their placebos: other harmless prompts that differ from the harmless one in the same words. What had to be "
        "chosen was chosen on the discovery pairs."
    )
    if "claims.csv" not in result.tables:
        return [Section(name, title, did, UNMEASURED)]
    claims, sets = result.tables["claims.csv"], result.tables["sets.csv"]
    finding = f"{in_groups(verdicts_of(claims, sets))}."
    tables = (reasons_table(claims), measures_table(sets))
    return [
        Section(name, title, did, finding, tables, claims_figure(sets, claims)),
        *_curve(result, sets),
        *_choices(result),
    ]


def _curve(result: Result, sets: pd.DataFrame) -> list[Section]:
    """How much the first late neurons carry together; nothing where they could not be ranked."""
    curve = result.tables.get("gate_sets.csv")
    if curve is None or curve.empty:
        return []
    did = (
        "Late neurons, ranked by a screen on the discovery pairs, were swapped together, the first ones first; what "
        "each set carries is given on the held-out pairs. Dashed: its direct effect at `last` alone."
    )
    chosen = curve[curve["chosen"]]
    finding = "No size does 80% of the late MLPs' work in both directions on the discovery pairs."
    if len(chosen):
        one = chosen.iloc[0]
        finding = (
            f"The first {one['size']} ({100 * one['part']:.2g}% of the late neurons) do the late MLPs' work on the "
            f"discovery pairs; held out they carry {share_of(one, 'nie')} of TE by NIE and "
            f"{share_of(one, 'tie')} by TIE."
        )
    finding += _overshoot(curve)
    bands = sets[(sets["number"] == 3) & (sets["measure"] == LATE_MLPS)]
    return [Section("gate-curve", "How few late neurons", did, finding, figure=curve_figure(curve, bands))]


def _overshoot(curve: pd.DataFrame) -> str:
    """That some of the late neurons do clearly more than all of them, where it is so."""
    whole = curve.loc[curve["size"].idxmax()]
    most = curve.loc[curve["nie"].idxmax()] if curve["nie"].notna().any() else whole
    if not most["nie_low"] > whole["nie_high"]:
        return ""
    few, all_of_them = (share_of(one, "nie") for one in (most, whole))
    return (
        f" The first {100 * most['part']:.2g}% carry {few} of TE by NIE, all of them together {all_of_them}: the "
        "others work against them."
    )


def _choices(result: Result) -> list[Section]:
    """How far claim 2 depends on layers, direction and pairs."""
    choices = result.tables.get("specification.csv")
    if choices is None:
        return []
    did = (
        "The direct effect of the MLPs minus that of attention, as a share of TE, over each set of layers, in both "
        "directions, on each split and on random halves of the pairs."
    )
    halves = choices[choices["pairs"] == RANDOM][list(SIGNS)].sum()
    counts = ", ".join(f"{number} {name}" for name, number in halves.items())
    finding = f"On random halves of the pairs, over all layer sets and both directions: {counts}."
    title, table, figure = (
        "How far claim 2 depends on choices",
        specification_table(choices),
        specification_figure(choices),
    )
    return [Section("specification", title, did, finding, (table,), figure, appendix=True)]


def verdicts(result: Result) -> list[Verdict]:
    """The five claims' rows of the report's first table."""
    tables = result.tables
    return verdicts_of(tables["claims.csv"], tables["sets.csv"]) if "claims.csv" in tables else []


def verdicts_of(claims: pd.DataFrame, sets: pd.DataFrame) -> list[Verdict]:
    """A claim a row: harm, placebo, verdict.

    claims: `ask.CLAIM_COLUMNS`. sets: `ask.SET_COLUMNS`.
    """
    return [
        decided(
            claim,
            sets[sets["number"] == claim.number],
            label=f"claim {claim.number}",
            text=f"{claim.number}. {claim.claim}",
            short=CLAIMS[claim.number],
        )
        for claim in claims.itertuples()
    ]


def reasons_table(claims: pd.DataFrame) -> Table:
    """Why each verdict is what it is. claims: `ask.CLAIM_COLUMNS`."""
    rows = [(f"{claim.number}. {claim.claim}", claim.said, claim.why) for claim in claims.itertuples()]
    return Table(("claim", "verdict", "why"), rows)


def measures_table(sets: pd.DataFrame) -> Table:
    """Every number behind the verdicts. sets: `ask.SET_COLUMNS`."""
    header = (
        "claim",
        "measure",
        "harm",
        "placebo",
        "β harm",
        "β placebo",
        "β harm - β placebo",
        "placebo / TE of harm",
    )
    rows = [
        (
            str(row["number"]),
            _label(row),
            *(of_what(row, side) for side in _SIDES),
            rounded(row["beta_harm"]),
            rounded(row["beta_placebo"]),
            interval(row["excess"], row["excess_low"], row["excess_high"]),
            of_what(row, "common"),
        )
        for _, row in sets.iterrows()
    ]
    notes = (*pairs_notes(sets, "held-out pair"), *reason_notes(sets))
    return Table(header, rows, notes)


def specification_table(specification: pd.DataFrame) -> Table:
    """Claim 2's number by layers, direction and pairs. specification: `specification.SPECIFICATION_COLUMNS`."""
    header = (
        "layers",
        "direction",
        "pairs",
        "components",
        "share of TE",
        "positive",
        "negative",
        "unclear",
    )
    rows = [
        (
            row["layers"],
            str(row["direction"]).upper(),
            SPLITS[row["pairs"]],
            number(row["components"]),
            share_of(row, "share"),
            *(str(row[name]) for name in ("positive", "negative", "unclear")),
        )
        for _, row in specification.iterrows()
    ]
    return Table(header, rows, tuple(notes_on("share of TE", specification["reason"].dropna())))


_SIDES = ("harm", "placebo")


def _label(row: pd.Series) -> str:
    direction = row["direction"]
    return f"{row['measure']}, {direction.upper()}" if direction in DIRECTIONS else str(row["measure"])
