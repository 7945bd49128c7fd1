"""Outcomes on the prompts as they are, and how much of what is said there the openings of `refusal` cover, in words."""

from __future__ import annotations

import pandas as pd

from remote_mediation.analyses.total.ask import ASKED, PROMPTS, SIDES, Coverage
from remote_mediation.result import Result
from remote_mediation.show.section import Section
from remote_mediation.show.tables import Note, Table, estimate, literal, number, p_value, percent

_MOST_OPENINGS = 6
"""Openings of a side that are shown."""


def covered(result: Result) -> list[Coverage]:
    """Mean coverage by prompts and side; nothing where the outcome has no openings, or none was measured yet."""
    return list(result.values.get("total", ()))


def coverage_words(found: list[Coverage]) -> str:
    """What the asked sides cover, and what follows where that is little."""
    asked = [one for one in found if ASKED[one.prompts] == one.side]
    if not asked:
        return ""
    said = [f"the {one.side} openings hold {estimate(one.found, percent)} after {one.prompts} prompts" for one in asked]
    wanting = [f"after {one.prompts} prompts" for one in asked if one.wanting]
    little = f" Under half {' and '.join(wanting)}: there the outcome does not see most of what is said."
    return f"Of the probability of all that may be said, {' and '.join(said)}.{little if wanting else ''}"


def hardly_defined(found: list[Coverage]) -> str:
    """The warning where a side covers next to nothing; empty where none does."""
    hardly = [one for one in found if one.hardly]
    said = " and ".join(f"{one.side} openings {percent(one.found.value)} after {one.prompts} prompts" for one in hardly)
    return f"**The outcome is hardly defined**: of what may be said, {said}." if hardly else ""


def coverage_table(found: list[Coverage]) -> Table:
    """Both sides after both kinds of prompts."""
    by = {(one.prompts, one.side): one.found for one in found}
    rows = [(prompts, *(estimate(by[prompts, side], percent) for side in SIDES)) for prompts in reversed(PROMPTS)]
    return Table(("prompts", *(f"probability of {side} openings" for side in SIDES)), rows)


def openings_table(table: pd.DataFrame) -> Table:
    """The openings of each side, those first that are said most."""
    rows = []
    for side in SIDES:
        part = table[table["side"] == side]
        order = part[list(PROMPTS)].max(axis=1).sort_values(ascending=False, kind="stable").index
        rows += [
            (side, literal(repr(one.opening)), percent(one.harmful), percent(one.harmless))
            for one in part.loc[order[:_MOST_OPENINGS]].itertuples()
        ]
    left = len(table) - len(rows)
    notes = (Note("opening", f"{left} more in `openings.csv`"),) if left else ()
    return Table(("side", "opening", "after harmful prompts", "after harmless prompts"), rows, notes)


def sections(result: Result) -> list[Section]:
    """TE, and of an outcome of openings what they are and what they cover."""
    found, texts = covered(result), result.tables.get("openings.csv")
    tables = [total_table(result)]
    if found:
        tables.append(coverage_table(found))
    if texts is not None:
        tables.append(openings_table(texts))
    outcome = result.study.outcome
    did = f"Y is {outcome.name}, in {outcome.unit}: {outcome.meaning}."
    return [Section("total", "Total effect", did, coverage_words(found), tuple(tables), brief=_in_brief(result))]


def _in_brief(result: Result) -> str:
    total, unit = result.summary.total, result.study.outcome.unit
    harmful, harmless = _outcomes(result)
    return (
        f"Harmful prompts change the outcome by {estimate(total)} {unit}, "
        f"from {number(harmless)} after harmless ones to {number(harmful)}."
    )


def _outcomes(result: Result) -> tuple[float, float]:
    """Mean outcome after harmful and after harmless prompts."""
    bases = result.effects.drop_duplicates("pair_id")[["y_source", "y_base"]].mean()
    return float(bases["y_source"]), float(bases["y_base"])


def total_table(result: Result) -> Table:
    """TE beside the two outcomes that it is the difference of."""
    total, unit = result.summary.total, result.study.outcome.unit
    row = (
        estimate(total),
        *map(number, _outcomes(result)),
        p_value(total.p, total.p_floor),
        str(total.n_pairs),
        str(total.n_clusters),
    )
    notes = (Note("", total.reason),) if total.reason else ()
    effect = f"mean TE [95% interval], {unit}"
    return Table((effect, "Y(x1), harmful", "Y(x0), harmless", "p", "pairs", "clusters"), [row], notes)
