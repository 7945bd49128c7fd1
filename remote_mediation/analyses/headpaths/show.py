"""Head paths as they are read: what was said of each sender, its ways in a figure and a table, and who receives."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from remote_mediation.analyses.claims.verdicts import DIRECTIONS, HALF
from remote_mediation.analyses.headpaths.ask import ENOUGH, HEADS, MLPS, RARE, WHOLE, named
from remote_mediation.analyses.rivals import rulings
from remote_mediation.result import Result
from remote_mediation.show.figures import DPI, WIDTH, dot_rows, legend, share_axis
from remote_mediation.show.section import Section
from remote_mediation.show.tables import Note, Table, notes_on, percent
from remote_mediation.show.words import UNMEASURED, no_effect, share_of

NO_HEADS = "There are no heads to follow: the analysis `rivals`, which finds them, was not part of this study."
_MOST_RECEIVERS = 6
_HOW_TO_READ = (
    Note(
        f"{MLPS}, {HEADS}",
        "all of them at once, each as the sender alone makes it, so that none hears another. Behind the amplifiers all "
        "runs as it will, so that these few can pass on more",
    ),
    Note("other heads", "sets of other heads of these layers that do as much by this way, in either direction"),
)


def sections(result: Result) -> list[Section]:
    """Which way heads act."""
    name, title = "headpaths", "Head paths"
    did = (
        "The few heads that `rivals` found on the discovery pairs, and of several the one of which most goes by way of "
        "later modules, were set as on the other prompt while all else that layers add was held. Later MLPs and heads "
        "then took what they became by that, and what stands behind them ran as it will (path patching, arXiv "
        f"2211.00593). Those that pass on {ENOUGH:.0%} of the effect on a few discovery pairs are amplifiers. After "
        f"arXiv 2604.04385, by a rule of ours, heads are a gate where amplifiers pass on clearly more than {HALF:.0%} "
        f"of what they do on held-out pairs, in both directions, and at most {RARE:.0%} of sets of other heads of "
        "their layers do as much by the same amplifiers. Of an amplifier that is a head, its query, its keys and its "
        "values then took apart what they became; keys and values that it shares with other heads passed it on by this "
        "head alone. It hears by those that pass on clearly more than half of what goes by the head, in both "
        "directions; being multiplied, the three do not add up."
    )
    steps = result.tables.get("two_step.csv")
    if steps is None:
        absent = UNMEASURED if "rivals" in result.study.config.analyses else NO_HEADS
        return [Section(name, title, did, absent)]
    if absent := no_effect(result):
        return [Section(name, title, did, absent)]
    paths, receivers = result.tables["head_paths.csv"], result.tables["receivers.csv"]
    finding = " ".join(map(_said, steps.to_dict("records")))
    tables = [_paths_table(part) for _, part in paths.groupby("sender", sort=False)]
    figure = paths_figure(paths) if paths["part"].notna().any() else None
    brief = f"{_brief(steps)} {_carried(result)}"
    return [Section(name, title, did, finding, (*tables, _receivers_table(receivers)), figure, brief=brief)]


def _said(step: dict[str, str]) -> str:
    """What was said of one sender."""
    by = f" Amplifiers: {step['amplifiers']}." if step["amplifiers"] else " No later MLP or head is an amplifier."
    inputs = f" Heard by input: {step['inputs']}." if step["inputs"] else ""
    return f"{_named(step).capitalize()}: {step['said']} ({step['why']}).{by}{inputs}"


def _named(step: dict[str, str]) -> str:
    name = step["sender"]
    return name if name.startswith("head ") else f"{name} ({step['heads']})"


def _brief(steps: pd.DataFrame) -> str:
    said = [f"{_named(step)}: {step['said']}" for step in steps.to_dict("records")]
    return f"By the way they act, {'; '.join(said)}."


def _carried(result: Result) -> str:
    """What is said of how much these heads carry, which no way decides: the rival claim has the same name."""
    rivals = result.tables["rivals.csv"]
    said = rivals.loc[rivals["rival"] == rulings.HEADS.name, "said"].item()
    return f"Whether they carry half of TE is another question, that of the rival claim: {said}."


def _paths_table(paths: pd.DataFrame) -> Table:
    """Ways of one sender."""
    header = (
        f"{paths['sender'].iloc[0]}, by way of",
        *(f"{direction.upper()} / its own" for direction in DIRECTIONS),
        *(f"{direction.upper()} / TE" for direction in DIRECTIONS),
        *(f"placebo, {direction.upper()}" for direction in DIRECTIONS),
        "other heads",
    )
    rows = [(str(way), *_way_cells(part), _beside(part)) for way, part in paths.groupby("path", sort=False)]
    return Table(header, rows, (*_HOW_TO_READ, *notes_on("", paths["reason"].dropna())))


def _way_cells(part: pd.DataFrame) -> list[str]:
    """Shares of one way, NIE then TIE of each."""
    both = [part[part["direction"] == direction].iloc[0] for direction in DIRECTIONS]
    return [share_of(row, share) for share in ("part", "harm", "placebo") for row in both]


def _beside(part: pd.DataFrame) -> str:
    """NIE, then TIE; nothing where none were measured."""
    if part["drawn"].isna().any():
        return ""
    return ", ".join(f"{row.reached:.0f} of {row.drawn:.0f}" for row in part.itertuples())


def _receivers_table(receivers: pd.DataFrame) -> Table:
    """The strongest receivers of each sender on discovery pairs."""
    rows = []
    for sender, part in receivers.groupby("sender", sort=False):
        shown = part.sort_values("part", ascending=False, kind="stable").head(_MOST_RECEIVERS)
        for row in shown.itertuples():
            shares = (percent(share) for share in (row.nie, row.tie))
            rows.append((str(sender), _receiver(row), *shares, "yes" if row.chosen else ""))
    header = ("sender", "receiver alone", "NIE / the sender's", "TIE / the sender's", "amplifier")
    return Table(header, rows, (Note("", f"the strongest on {receivers['n'].max()} discovery pairs"),))


def _receiver(row: Any) -> str:
    """A receiver in words."""
    return named(row.component, row.layer, None if pd.isna(row.head) else int(row.head))


def paths_figure(paths: pd.DataFrame) -> Figure:
    """Part of each sender's effect by way, a panel per sender. paths: `PATH_COLUMNS`."""
    senders = list(dict.fromkeys(paths["sender"]))
    most = max(paths[paths["sender"] == sender]["path"].nunique() for sender in senders) - 1
    figure = Figure((WIDTH, 1.9 + 0.4 * most), DPI, layout="constrained")
    axes = figure.subplots(1, len(senders), squeeze=False)[0]
    for axis, sender in zip(axes, senders, strict=True):
        _ways(axis, paths[(paths["sender"] == sender) & (paths["path"] != WHOLE)])
        axis.set_title(f"{sender}, by way of", fontsize=10, loc="left")
    counts = f"held-out pairs: {paths['n'].max()}, clusters: {paths['clusters'].max()}"
    figure.suptitle(f"Which way heads act\n95% intervals; {counts}", fontsize=11)
    legend(figure, axes[0])
    return figure


def _ways(axis: Axes, part: pd.DataFrame) -> None:
    """A row for every way of one sender, NIE beside TIE."""
    names = list(dict.fromkeys(part["path"]))
    series = [(way.upper(), part[part["direction"] == way], "part", "path") for way in DIRECTIONS]
    dot_rows(axis, series, names)
    share_axis(axis, "part of its own effect")
