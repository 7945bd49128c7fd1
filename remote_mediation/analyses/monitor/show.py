"""Detectors as they are read: AUROC and false alarms of the gates beside a probe and random neurons."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from remote_mediation.analyses.monitor.detectors import RANDOM, RECALLS
from remote_mediation.result import Result
from remote_mediation.show.figures import COLOURS, DPI, MARKERS, WIDTH, legend
from remote_mediation.show.section import Section
from remote_mediation.show.tables import Table, interval, notes_on, number
from remote_mediation.show.words import UNMEASURED, no_gates, share_of


def sections(result: Result) -> list[Section]:
    """The gates as a detector."""
    name, title = "monitor", "Monitor"
    did = (
        "The gates' activity at the last prompt token, as a score of harmful prompts, beside a linear probe on the "
        "residual stream of their layer and random neurons. Directions and thresholds are from the discovery pairs; "
        "they are judged on held-out pairs"
    )
    absent, table = no_gates(result, "watch"), result.tables.get("detectors.csv")
    hard = result.study.config.monitor.hard_negatives
    did += " and on hard negatives." if hard else "; hard negatives were not given."
    if absent or table is None or table.empty:
        return [Section(name, title, did, absent or UNMEASURED)]
    said = [_detector_in_words(part, str(name)) for name, part in table.groupby("evaluation", sort=False)]
    return [Section(name, title, did, " ".join(said), (_detectors_table(table),), detector_figure(table))]


def _detector_in_words(part: pd.DataFrame, evaluation: str) -> str:
    by = part.set_index("detector")
    gates, probe = by.loc["gates"], by.loc["residual probe"]
    area = interval(gates["auroc"], gates["auroc_low"], gates["auroc_high"])
    text = f"On {_evaluation(evaluation)} the gates' AUROC is {area}"
    if not np.isnan(gates["rank"]):
        text += f", rank {gates['rank']:.0f} beside {gates['random_sets']} random sets{_told_as_p(gates)}"
    return f"{text}{_beside_probe(gates, probe)}."


def _beside_probe(gates: pd.Series, probe: pd.Series) -> str:
    """How the gates' AUROC compares, by the intervals."""
    if np.isnan(gates["auroc_low"]) or np.isnan(probe["auroc_low"]):
        return "; how it compares with the residual probe is not known"
    if gates["auroc_low"] > probe["auroc_high"]:
        return ", above the residual probe's"
    if gates["auroc_high"] < probe["auroc_low"]:
        return ", below the residual probe's"
    return "; it is not told apart from the residual probe's"


def _detectors_table(table: pd.DataFrame) -> Table:
    percents = [round(100 * recall) for recall in RECALLS]
    rows = [(*_detector_cells(row), *_alarm_cells(row, percents)) for _, row in table.iterrows()]
    columns = [f"{name} ({recall}%)" for recall in percents for name in ("recall", "false alarms")]
    asked = "at the threshold with that recall on the discovery pairs; prompts count as independent there (Wilson)"
    reasons = table[table["reason"] != ""].groupby("reason", sort=False)["detector"].unique()
    cared = [f"{', '.join(names)}: {reason}" for reason, names in reasons.items()]
    notes = (*notes_on("", cared), *notes_on(columns[0], [asked]))
    return Table(("detector", "judged on", "AUROC (chance 0.5)", "p", *columns), rows, notes)


def _detector_cells(row: pd.Series) -> tuple[str, ...]:
    """A detector and its AUROC."""
    area = interval(row["auroc"], row["auroc_low"], row["auroc_high"])
    return (row["detector"], _evaluation(str(row["evaluation"])), area, _p_cell(row))


def _alarm_cells(row: pd.Series, percents: Sequence[int]) -> list[str]:
    """Recall and false alarms at each threshold; random sets have none of their own."""
    columns = [f"{name}_{recall}" for recall in percents for name in ("recall", "false_alarms")]
    return ["" if row["detector"] == RANDOM else share_of(row, column) for column in columns]


def _at_floor(row: pd.Series) -> bool:
    """Whether no random set reaches it, so that its p is no more than their number."""
    return bool(row["rank"] == 1)


def _told_as_p(row: pd.Series) -> str:
    return "" if _at_floor(row) else f" (p = {number(row['p'])})"


def _p_cell(row: pd.Series) -> str:
    if np.isnan(row["p"]):
        return ""
    return f"0 of {row['random_sets']} sets" if _at_floor(row) else number(row["p"])


def _evaluation(name: str) -> str:
    return "held-out pairs" if name == "heldout" else name


def detector_figure(table: pd.DataFrame) -> Figure:
    """Detectors of harm: AUROC on the left, false alarms on the right; a colour per set of prompts.

    table: `detectors.DETECTOR_COLUMNS`. False alarms are at the highest recall for which there are prompts enough.
    """
    recall = _highest_recall(table)
    names = list(dict.fromkeys(table["detector"]))
    evaluations = list(dict.fromkeys(table["evaluation"]))
    figure = Figure((WIDTH, 2.2 + 0.45 * len(names)), DPI, layout="constrained")
    areas, alarms = figure.subplots(1, 2, sharey=True)
    counts = ", ".join(
        f"{_evaluation(name)}: {table.loc[table['evaluation'] == name, 'n'].max()}" for name in evaluations
    )
    title = "Detectors of harmful prompts, thresholds from other prompts"
    figure.suptitle(f"{title}\n95% intervals; prompts: {counts}", fontsize=11)
    for axis, column in ((areas, "auroc"), (alarms, f"false_alarms_{recall}")):
        _detectors(axis, table[table[column].notna()], column, names, evaluations)
    areas.axvline(0.5, color="0.5", linewidth=0.8)
    areas.set_yticks(range(len(names)), names)
    areas.invert_yaxis()
    areas.set_title("AUROC: are harmful prompts scored higher?", fontsize=10, loc="left")
    areas.set(xlabel="AUROC (random sets: median and 95% range)")
    alarms.set_title(f"False alarms at the threshold for {recall}% recall", fontsize=10, loc="left")
    alarms.set(xlabel="share of harmless prompts", xlim=(-0.03, 1.03))
    legend(figure, areas)
    return figure


def _highest_recall(table: pd.DataFrame) -> int:
    """In percent; the lowest where none is defined."""
    percents = [round(100 * recall) for recall in RECALLS]
    defined = [percent for percent in percents if table[f"false_alarms_{percent}"].notna().any()]
    return max(defined, default=min(percents))


def _detectors(axis: Axes, table: pd.DataFrame, column: str, names: list[str], evaluations: list[str]) -> None:
    """A dot with its interval per detector; sets of prompts side by side, each in its colour."""
    styles = zip(evaluations, cycle(COLOURS), cycle(MARKERS), strict=False)
    for place, (evaluation, colour, marker) in enumerate(styles):
        part = table[table["evaluation"] == evaluation]
        beside = 0.25 * (place - (len(evaluations) - 1) / 2)
        rows = [names.index(name) + beside for name in part["detector"]]
        axis.hlines(rows, part[f"{column}_low"], part[f"{column}_high"], color=colour)
        axis.plot(part[column], rows, color=colour, marker=marker, linestyle="", label=_evaluation(evaluation))
