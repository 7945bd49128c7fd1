"""What a run found, for a terminal of 80 columns and 24 lines: the claims with the numbers that decide them.

All else is one command away, and the last lines name it (`show RUN SECTION`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from remote_mediation.report import doubts, effect_in_words, headline, sections
from remote_mediation.result import Result
from remote_mediation.show.section import Section, Verdict
from remote_mediation.show.tables import NONE, STYLES, Table, count
from remote_mediation.stats import Interval


def terminal_summary(result: Result, report: Path, parts: Sequence[Section] | None = None) -> Group:
    """The effect, the claims or else the findings, and where the rest is.

    report: path of `report.md`, named in the last line. parts: the run's sections, made by default.
    """
    found = sections(result) if parts is None else parts
    verdicts, info = result.verdicts(), result.study.info
    said = effect_in_words(result) if verdicts else f"{headline(result)} {effect_in_words(result)}"
    named = ", ".join(section.name for section in found)
    lines: list[RenderableType] = [
        Text(f"{info.name}, {result.study.config.dtype}", "bold"),
        *(Text(_plain(line), "bold red") for line in doubts(result)),
        Text(_plain(said)),
        "",
        claims_table(verdicts) if verdicts else overview(found).rich("Sections"),
        "",
        Text(f"remote-mediation show {report.parent} NAME shows a section: {named}", overflow="fold"),
        Text(f"Report: {report}", overflow="fold"),
    ]
    return Group(*lines)


def claims_table(verdicts: Sequence[Verdict]) -> RichTable:
    """A claim a line: what decides it, in percent, and the verdict."""
    pairs = max((share.harm.n_pairs for one in verdicts for share in one.shares), default=0)
    of = f"% of TE on {count(pairs, 'held-out pair')}, 95% intervals; of claim 4 a gain in accuracy"
    table = RichTable(box=None, padding=(0, 1, 0, 0), pad_edge=False, caption=Text(of), caption_justify="left")
    for name in ("claim", "NIE", "TIE", "verdict"):
        table.add_column(Text(name), overflow="fold", header_style="bold")
    for one in verdicts:
        first, second, *_ = (*(_cell(share.harm) for share in one.shares), "", "")
        table.add_row(Text(one.row), Text(first), Text(second), Text(one.said, STYLES.get(one.said, "")))
    return table


def overview(parts: Sequence[Section]) -> Table:
    """Findings in a line each."""
    rows = [(section.name, section.line) for section in parts if not section.appendix]
    return Table(("section", "finding"), rows)


def _cell(found: Interval) -> str:
    """A share in whole percent; what rounds to 0 has no minus."""
    if np.isnan(found.value):
        return NONE
    value, low, high = (f"{100 * end:z.0f}" for end in (found.value, found.low, found.high))
    return value if np.isnan(found.low) else f"{value} [{low}, {high}]"


def _plain(text: str) -> str:
    """Without the marks of Markdown."""
    return text.replace("**", "").replace("`", "")


def summary_data(result: Result, report: Path, parts: Sequence[Section]) -> dict[str, object]:
    """The same as data (`forms.RUN`)."""
    config, outcome = result.study.config, result.study.outcome
    return {
        **{"model": config.model, "dtype": config.dtype, "backend": config.backend},
        **{"outcome": outcome.name, "unit": outcome.unit, "total": result.summary.total},
        "verdicts": result.verdicts(),
        "sections": [{"name": part.name, "title": part.title, "finding": part.line} for part in parts],
        "identities": result.summary.identities,
        "report": report,
    }


def section_data(section: Section) -> dict[str, object]:
    """A section as data (`forms.FORMS`)."""
    tables = [
        {"header": table.header, "rows": table.rows, "notes": [str(note) for note in table.notes]}
        for table in section.tables
    ]
    return {
        **{"name": section.name, "title": section.title, "finding": section.line},
        **{"did": section.did, "details": section.finding, "tables": tables},
    }
