"""Pieces of HTML for the page, each escaping what it is given."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from remote_mediation.show.tables import Table

STYLE = """
body { margin: 0; font: 15px/1.5 system-ui, sans-serif; color: #1b1b1b; background: #fff; }
main { max-width: 1240px; margin: 0 auto; padding: 1.5rem; }
h1 { font-size: 1.5rem; margin: 0 0 1rem; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; border-bottom: 2px solid #1b1b1b; overflow-wrap: anywhere; }
h3 { font-size: 1.05rem; margin: 2rem 0 .5rem; }
p { max-width: 62rem; margin: .4rem 0; }
.note { color: #555; font-size: .9rem; }
.doubt { font-weight: 600; color: #8a3000; }
table { border-collapse: collapse; margin: .6rem 0; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .35rem .7rem; border-bottom: 1px solid #ddd; }
th { font-weight: 600; }
.claims { table-layout: fixed; width: 100%; }
.claims > tbody > tr > th:nth-child(1) { width: 30%; }
.claims > tbody > tr > th:nth-child(3) { width: 17%; }
.claims > tbody > tr > th:nth-child(4) { width: 10.5rem; }
.wide { overflow-x: auto; }
.wide table { font-size: .85rem; }
.claims > tbody > tr:not(.behind) > td { border-bottom: 0; padding-bottom: 0; }
.claims > tbody > tr > td:last-child { white-space: nowrap; }
.behind > td { padding-top: 0; white-space: normal; }
summary { cursor: pointer; color: #555; font-size: .9rem; }
.said { padding: .05rem .5rem; border-radius: .7rem; background: #eee; border: 1px solid #bbb; white-space: nowrap; }
.said.supported { background: #d9ecf7; border-color: #0072b2; }
.said.not-supported { background: #fbe3d4; border-color: #d55e00; }
.chart { margin: .5rem 0; overflow-x: auto; }
.chart.vega-embed { display: flex; flex-direction: column; align-items: flex-start; }
.vega-bindings { order: -1; margin: 0 0 .5rem; }
.vega-bindings select { font: inherit; max-width: 30rem; }
"""
_COLOURED = {"supported", "not supported"}


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph. kind: `note`, `doubt`, or none."""
    mark = f' class="{kind}"' if kind else ""
    return f"<p{mark}>{escape(text)}</p>"


def verdict_html(said: str) -> str:
    """A verdict, in a colour beside its words."""
    kind = said.replace(" ", "-") if said in _COLOURED else ""
    return f'<span class="said {kind}">{escape(said)}</span>'


def table_html(table: Table) -> str:
    """A table with its notes."""
    header = "".join(f"<th>{escape(name)}</th>" for name in table.header)
    rows = "".join(f"<tr>{cells_html(row)}</tr>" for row in table.rows)
    notes = "".join(paragraph(str(note), "note") for note in table.notes)
    return f'<div class="wide"><table><tr>{header}</tr>{rows}</table></div>{notes}'


def cells_html(texts: Iterable[str]) -> str:
    """Cells of a row."""
    return "".join(f"<td>{escape(text)}</td>" for text in texts)
