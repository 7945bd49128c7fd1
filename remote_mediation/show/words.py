"""Words and cells that several sections share: what is missing and why, shares, and what a sign of TE means."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd

from remote_mediation.result import Result
from remote_mediation.show.section import Share, Verdict
from remote_mediation.show.tables import NONE, Note, count, estimate, interval, notes_on, number, percent, rounded
from remote_mediation.stats import Estimate, Interval

UNMEASURED = "Not measured yet: run the study again, and it goes on where this run ended."
ENDS = ("low", "high")
_UNDEFINED = "undefined: "
"""How the reason of a share begins that is not defined (`shares`)."""


def share_cell(row: Any, name: str) -> str:
    """A share with its interval, from the columns of that name."""
    return share_of(row._asdict(), name)


def share_of(row: Any, name: str) -> str:
    """The same from a row of a table."""
    value, low, high = (row[column] for column in (name, f"{name}_low", f"{name}_high"))
    return interval(value, low, high, percent)


def of_what(row: Any, name: str) -> str:
    """The same of a row that says of what: a share of TE, or a gain of accuracy, which is a difference of such."""
    if row["of"] == "TE":
        return share_of(row, name)
    return _points(*(row[column] for column in (name, f"{name}_low", f"{name}_high")))


def _points(value: float, low: float, high: float) -> str:
    found = interval(100 * value, 100 * low, 100 * high)
    return found if found == NONE else f"{found} points"


def shares_from(sets: pd.DataFrame) -> tuple[Share, ...]:
    """Numbers behind a verdict, from rows with the columns of `sets.csv` or `rival_sets.csv`."""
    return tuple(_share(row) for _, row in sets.iterrows())


def _share(row: pd.Series) -> Share:
    pairs, clusters = (0 if pd.isna(row[name]) else int(row[name]) for name in ("n", "clusters"))
    direction, reason = ("" if pd.isna(row[name]) else str(row[name]) for name in ("direction", "reason"))

    def side(name: str) -> Interval:
        value, low, high = (float(row[f"{name}{end}"]) for end in ("", "_low", "_high"))
        return Interval(pairs, clusters, value, low, high, reason)

    return Share(
        measure=str(row["measure"]),
        direction=direction,
        of=str(row.get("of", "TE")),
        harm=side("harm"),
        placebo=side("placebo"),
        beta_harm=float(row["beta_harm"]),
        beta_placebo=float(row["beta_placebo"]),
    )


def decided(claim: Any, sets: pd.DataFrame, *, label: str, text: str, short: str) -> Verdict:
    """What a run says of a claim, with the numbers that decide it.

    claim: a row of `claims.csv` or `rivals.csv`, as `itertuples` gives it. sets: its own rows of `sets.csv` or
    `rival_sets.csv`. label, text, short: as of `Verdict`.
    """
    shares = shares_from(sets[sets["decides"]])
    return Verdict(
        label=label,
        claim=text,
        harm=told(shares, "harm"),
        placebo=told(shares, "placebo"),
        said=claim.said,
        short=short,
        shares=shares,
        why=claim.why,
    )


def told(shares: Sequence[Share], side: Literal["harm", "placebo"]) -> str:
    """Shares of a side and their slopes on TE, one after the other, named where they are of several sets.

    An accuracy has no slope.
    """
    several = len({one.measure for one in shares}) > 1
    said, before = [], ""
    for one in shares:
        named = f"{one.measure}: " if several and one.measure != before else ""
        said.append(f"{named}{_with_slope(one, side)}")
        before = one.measure
    return "; ".join(said)


def _with_slope(one: Share, side: str) -> str:
    harm = side == "harm"
    found, slope = (one.harm, one.beta_harm) if harm else (one.placebo, one.beta_placebo)
    if one.of != "TE":
        return _points(found.value, found.low, found.high)
    parts = [] if np.isnan(found.value) else [estimate(found, percent)]
    if not np.isnan(slope):
        parts.append(f"β {rounded(slope)}")
    return ", ".join(parts) or NONE


def in_groups(verdicts: Sequence[Verdict]) -> str:
    """What is said of which claims: `Supported: late layers, sparse gate; undecided: early understanding`.

    What a control takes from a claim stands behind it in brackets.
    """
    by_said: dict[str, list[str]] = {}
    for verdict in verdicts:
        taken = verdict.control
        name = f"{verdict.name} ({taken})" if taken else verdict.name
        by_said.setdefault(verdict.said.removesuffix(f", {taken}"), []).append(name)
    said = "; ".join(f"{said}: {', '.join(names)}" for said, names in by_said.items())
    return f"{said[:1].upper()}{said[1:]}"


def pairs_notes(table: pd.DataFrame, which: str) -> list[Note]:
    """On how many pairs a table rests. which: their kind, in the singular. table: with `n` and `clusters`."""
    sizes = table[["n", "clusters"]].dropna().drop_duplicates().to_numpy()
    return [Note("", f"{count(int(n), which)} in {count(int(clusters), 'cluster')}") for n, clusters in sizes]


def reason_notes(table: pd.DataFrame) -> list[Note]:
    """Why numbers are missing, or to be read with care.

    table: with `harm`, and with `reason`, that of harm or, where harm has none, of the placebo. Where the share of harm
    is known, one that is undefined is the placebo's.
    """
    reasons = table["reason"].dropna().astype(str)
    placebo = reasons.str.startswith(_UNDEFINED) & table.loc[reasons.index, "harm"].notna()
    return [*notes_on("placebo", reasons[placebo]), *notes_on("", reasons[~placebo])]


def no_effect(result: Result) -> str:
    """Why there is nothing to carry; empty where there is."""
    total = result.summary.total
    if total.sign:
        return ""
    if np.isnan(total.low):
        return f"Whether there is a total effect to mediate is not known: {total.reason or 'it has no interval'}."
    return f"There is no total effect to mediate: {estimate(total)} {result.study.outcome.unit} spans 0."


def why_no_share(total: Estimate) -> str:
    """Why there are no shares of it; empty where there are."""
    if total.sign:
        return ""
    if np.isnan(total.low):
        return f"TE has no interval: {total.reason}"
    return f"TE, {number(total.low)} to {number(total.high)}, spans 0"


def defined(result: Result, share: float) -> float:
    """A share of the held-out pairs' TE; NaN where that spans 0."""
    return np.nan if why_no_share(result.summary.heldout) else share


def refusal_in_words(result: Result) -> str:
    """What the gates carry where the harmful prompts lower the outcome."""
    if result.summary.total.sign >= 0:
        return ""
    return (
        "Here the harmful prompts lower the outcome, so the gates carry what turns the model away from the harmful "
        "answer, that is, refusal. Holding them at their harmless mean works against it, as circumventing safety "
        "training does, and does not make the model any safer. Whether fewer answers refuse, only judged answers say."
    )


def no_gates(result: Result, use: str) -> str:
    """Why there is no gate set to use; empty where there is one."""
    absent, tables = no_effect(result), result.tables
    if absent or ("gates.csv" in tables and len(tables["gates.csv"])):
        return absent
    if "search.csv" in tables:
        return f"The search found no gate set, so there is none to {use}."
    if "neurons" in result.study.config.analyses:
        return f"No gate set has been measured yet, so there is none to {use}."
    return f"There is no gate set to {use}: the analysis `neurons`, which finds it, was not part of this study."
