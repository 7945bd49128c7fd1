"""One HTML page of one run or several, to be explored: claims with the numbers behind them, maps, sizes of sets.

The page is a file that needs nothing else: charts are Vega-Lite, made by altair, and Vega itself is embedded. Its
content policy forbids every connection. What comes from a run, its ids and names included, enters as escaped text or as
JSON; never as markup or code. Prompts and tokens are left out unless asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from remote_mediation.printed import Printed, read_several
from remote_mediation.show.embed import START, Charts, library
from remote_mediation.show.markup import STYLE
from remote_mediation.store import Store

PAGE = "view.html"
_POLICY = "default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'; img-src data:"


def write_page(folders: Sequence[Path], out: Path | None = None, show_text: bool = False) -> Path:
    """Write the page of some runs and return its file; no model is needed.

    out: its file; `view.html` in the folder of the first run by default. show_text: show each pair's tokens below the
    maps, which takes the model's tokenizer.

    Raises:
        SettingsError: a run is named twice, or altair is not installed.
        StoreError: a folder is no run folder or has no tables, or the file cannot be written.
        ModelError: the tokenizer cannot be loaded.
    """
    runs = read_several(folders)
    target = out or folders[0] / PAGE
    Store(target.parent).write(target.name, page(runs, show_text))
    return target


def page(runs: Sequence[Printed], show_text: bool = False) -> str:
    """The page as HTML."""
    script = library()  # says what to install before altair is imported
    from remote_mediation.show.views import run_section, side_by_side

    charts = Charts()
    beside = [f"<section><h2>Runs side by side</h2>{side_by_side(runs)}</section>"] if len(runs) > 1 else []
    sections = [run_section(run, place, charts, show_text) for place, run in enumerate(runs)]
    title = runs[0].model["name"] if len(runs) == 1 else f"{len(runs)} runs"
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width">',
            f"<title>Causal mediation: {escape(title)}</title><style>{STYLE}</style></head><body><main>",
            f"<h1>Causal mediation of harmful text: {escape(title)}</h1>",
            *beside,
            *sections,
            "</main>",
            *charts.specs,
            f"<script>{script}</script><script>{START}</script></body></html>\n",
        ]
    )
