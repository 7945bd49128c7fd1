"""What the page says of a run: its total effect, the claims with what is behind them, maps, and sizes of sets.

Each view is made from a table of the run folder; one whose table is not there is left out, and one whose table cannot
be used says why.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import NamedTuple

import pandas as pd

from remote_mediation.analyses.claims.ask import CLAIM_COLUMNS, SET_COLUMNS
from remote_mediation.analyses.claims.show import CLAIMS, measures_table, verdicts_of
from remote_mediation.analyses.claims.sparse import GATE_SET_COLUMNS
from remote_mediation.errors import StoreError
from remote_mediation.models import load_tokenizer
from remote_mediation.outcomes import OUTCOMES
from remote_mediation.printed import Printed, Tokens, tokens_at
from remote_mediation.report import TOLERANCE
from remote_mediation.show.charts import behind_chart, size_chart
from remote_mediation.show.embed import Charts
from remote_mediation.show.map_chart import MOST_LINES, map_chart
from remote_mediation.show.maps import SiteMap, maps_of
from remote_mediation.show.markup import cells_html, paragraph, table_html, verdict_html
from remote_mediation.show.tables import Table, count, estimate

_TITLES = {
    "layers": "Residual stream after each layer, at one position",
    "modules": "What MLP and attention add, layer by layer",
    "tokens": "Residual stream after each layer, at one token",
    "heads": "Single attention heads",
    "experts": "Single experts of a mixture, and its routing",
    "neurons": "Windows of MLP neurons",
}


class _View(NamedTuple):
    """A part of a run's section."""

    title: str
    body: str


def side_by_side(runs: Sequence[Printed]) -> str:
    """Models, TE and verdicts, a column per run."""
    rows = [
        ("model", [escape(str(run.model["name"])) for run in runs]),
        ("layers", [str(run.model["layers"]) for run in runs]),
        ("outcome", [escape(run.config.outcome) for run in runs]),
        ("pairs, clusters", [f"{run.total.n_pairs}, {run.total.n_clusters}" for run in runs]),
        ("TE", [escape(f"{estimate(run.total)} {run.unit}") for run in runs]),
        *_verdict_rows(runs),
    ]
    header = "".join(f"<th>{escape(run.name)}</th>" for run in runs)
    body = "".join(
        f"<tr><th>{escape(name)}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>" for name, cells in rows
    )
    note = "Runs are not tested against each other; TE is in the unit of its own run."
    return f"<table><tr><th></th>{header}</tr>{body}</table>{paragraph(note, 'note')}"


def _verdict_rows(runs: Sequence[Printed]) -> list[tuple[str, list[str]]]:
    """A claim a row."""
    said = [_said(run) for run in runs]
    return [
        (f"{number}. {words}", [verdict_html(one.get(number, "not tested")) for one in said])
        for number, words in CLAIMS.items()
    ]


def _said(run: Printed) -> dict[int, str]:
    """Verdicts by claim; none where claims were not tested."""
    claims = run.tables.get("claims.csv")
    if claims is None or not {"number", "said"} <= set(claims):
        return {}
    return {int(number): str(said) for number, said in zip(claims["number"], claims["said"], strict=True)}


def run_section(run: Printed, place: int, charts: Charts, show_text: bool) -> str:
    """One run: what was measured, then its views; a view whose table cannot be used says why.

    Raises:
        StoreError, ModelError: its texts are to be shown and cannot be had.
    """
    texts = _texts(run) if show_text else {}
    views: list[_View] = []
    makers: list[Callable[[], list[_View]]] = [
        lambda: _claims(run, charts),
        lambda: _maps(run, charts, texts),
        lambda: _sizes(run, charts),
    ]
    for make in makers:
        try:
            views += make()
        except StoreError as error:
            views.append(_View("Left out", paragraph(f"{error}.", "note")))
    body = "".join(f"<h3>{escape(view.title)}</h3>{view.body}" for view in views)
    return f'<section id="run-{place}"><h2>{escape(run.name)}</h2>{_measured(run)}{body}</section>'


def _measured(run: Printed) -> str:
    """What was measured, and before it whatever makes it doubtful."""
    model, total = run.model, run.total
    change = {1: "raise", -1: "lower", 0: "do not clearly change"}[total.sign]
    lines = [
        *(paragraph(text, "doubt") for text in _doubts(run)),
        paragraph(
            f"{model['name']}, {model['layers']} layers, {run.config.dtype}. The harmful prompts {change} the outcome "
            f"({run.config.outcome}): the total effect (TE) is {estimate(total)} {run.unit}, over "
            f"{count(total.n_pairs, 'pair')} in {count(total.n_clusters, 'cluster')}."
        ),
        paragraph(f"The outcome: {OUTCOMES[run.config.outcome].meaning}.", "note"),
    ]
    return "".join(lines)


def _doubts(run: Printed) -> list[str]:
    """What makes a run's numbers doubtful, each in a sentence."""
    broken = run.config.dtype == "float32" and any(one.largest > TOLERANCE for one in run.identities)
    doubts = {
        "Do not trust these numbers: an identity that holds by construction is violated.": broken,
        "This run is not finished: what follows is what has been measured so far.": not run.finished,
        f"TE is to be read with care: {run.total.reason}.": bool(run.total.reason),
    }
    return [text for text, holds in doubts.items() if holds]


def _claims(run: Printed, charts: Charts) -> list[_View]:
    """The table of claims, and behind each claim its reason and numbers."""
    claims, sets = run.table("claims.csv", CLAIM_COLUMNS), run.table("sets.csv", SET_COLUMNS)
    if claims is None or sets is None:
        return []
    rows = []
    for verdict, claim in zip(verdicts_of(claims, sets), claims.itertuples(), strict=True):
        cells = cells_html((verdict.claim, verdict.harm, verdict.placebo))
        own = sets[sets["number"] == claim.number]
        rows.append(f"<tr>{cells}<td>{verdict_html(verdict.said)}</td></tr>{_behind(str(claim.why), own, charts)}")
    header = "".join(f"<th>{name}</th>" for name in ("claim", "harm", "placebo", "verdict"))
    note = (
        "Shares of TE with 95% intervals on held-out pairs, NIE then TIE; of claim 4 a gain in accuracy, of "
        "claim 5 their mean. β: slope of the effect on TE over pairs. In the charts what decides is filled, and "
        "placebos are shares of the TE of harm."
    )
    return [_View("Claims", f'<table class="claims"><tr>{header}</tr>{"".join(rows)}</table>{paragraph(note, "note")}')]


def _behind(why: str, rows: pd.DataFrame, charts: Charts) -> str:
    """What a verdict rests on, folded."""
    chart = behind_chart(rows)
    drawn = charts.place(chart, "The numbers behind the claim with their intervals, harm and placebo") if chart else ""
    summary = f"why, and {count(len(rows), 'row')} behind it"
    body = f"{paragraph(why)}{drawn}{table_html(_without_number(measures_table(rows)))}"
    return f'<tr class="behind"><td colspan="4"><details><summary>{summary}</summary>{body}</details></td></tr>'


def _without_number(table: Table) -> Table:
    """Without the claim, which is that of the row above."""
    return table.only(*(name for name in table.header if name != "claim"))


def _maps(run: Printed, charts: Charts, texts: Mapping[tuple[str, str], Tokens]) -> list[_View]:
    """A map for every analysis of single sites."""
    return [
        _View(_TITLES.get(one.analysis, one.analysis), f"{charts.place(map_chart(one), _described(one))}{_read(one)}")
        for one in maps_of(run, texts)
    ]


def _described(drawn: SiteMap) -> str:
    return f"{_TITLES.get(drawn.analysis, drawn.analysis)}: a map of layer by position, NIE and TIE"


def _read(drawn: SiteMap) -> str:
    """How the map is read."""
    text = (
        f"Colour: effect in {drawn.unit}, mean over all pairs or of the pair chosen; dot: q ≤ {drawn.alpha:g}; grey: "
        "not measured. Effects of single sites lie on the same paths and are not added up."
    )
    if len(drawn.columns) <= MOST_LINES:
        text += " Lines: the same by layer, with the 95% interval of the mean; dashed: TE."
    if "harmful" in drawn.rows:
        text += " Choose a pair to see its tokens below the map."
    if drawn.left_out:
        text += f" {count(drawn.left_out, 'pair')} more in effects.csv."
    return paragraph(text, "note")


def _texts(run: Printed) -> dict[tuple[str, str], Tokens]:
    """Tokens by pair and position.

    Raises:
        StoreError: the folder has no pairs.
    """
    if not run.pairs:
        raise StoreError(f"{run.name} was shared without its pairs.jsonl, so its tokens cannot be shown")
    tokenizer = load_tokenizer(str(run.model["name"]), str(run.model["revision"]))
    positions = dict.fromkeys(run.tables["effects.csv"]["position"])
    return tokens_at(run.pairs, positions, tokenizer)


def _sizes(run: Printed, charts: Charts) -> list[_View]:
    """What the first late neurons carry, by how many they are."""
    sets = run.table("gate_sets.csv", GATE_SET_COLUMNS)
    if sets is None:
        return []
    note = (
        "Late neurons, ranked on the discovery pairs, swapped together, the first ones first: joint effect on the "
        "held-out pairs with its 95% interval; dashed: the direct effect at the last token alone. Click a name in the "
        "legend to see it alone."
    )
    chosen = sets[sets["chosen"].astype(bool)]
    said = f" Dotted: the first {chosen.iloc[0]['size']}, chosen on the discovery pairs." if len(chosen) else ""
    description = "Effect of the first late neurons together, by how many they are"
    return [
        _View("How few late neurons", f"{charts.place(size_chart(sets), description)}{paragraph(note + said, 'note')}")
    ]
