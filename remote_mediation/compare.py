"""Several runs side by side: other models, or checkpoints of one, measured by the same kind of study.

Models differ in depth and outcomes in unit, so nothing is compared across runs but what has neither: a layer is its
relative depth, 0 (first) to 1 (last), and an effect is a share of its own run's total effect. Where that total effect
is not told apart from 0 there are no shares of it, and the run is listed with the reason and left out of the figure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from remote_mediation.errors import SettingsError
from remote_mediation.lab import Study
from remote_mediation.report import TOLERANCE
from remote_mediation.result import Result
from remote_mediation.show import figures
from remote_mediation.show.tables import NONE, Note, Table, estimate, interval, percent
from remote_mediation.stats import Estimate
from remote_mediation.store import Store
from remote_mediation.study import reread

CLAIMS = {
    1: "late layers",
    2: "MLP, not attention",
    3: "a sparse gate",
    4: "early understanding",
    5: "handed on through MLPs",
}
"""The claims in a few words."""
MEASURES: dict[str, tuple[int, str, str]] = {
    "late_nie": (1, "nie", "direct effect of the late third / TE, NIE"),
    "late_tie": (1, "tie", "the same, TIE"),
    "mlp_nie": (2, "nie", "direct effect of MLPs minus attention / TE, NIE"),
    "mlp_tie": (2, "tie", "the same, TIE"),
    "gate_nie": (3, "nie", "joint effect of the late neurons chosen / TE, NIE"),
    "gate_tie": (3, "tie", "the same, TIE"),
    "gain": (4, "", "held-out accuracy of the early probe minus that of the embeddings"),
    "handed": (5, "both", "through the middle MLPs / TE"),
}
"""The numbers that decide a claim, by column: claim, direction, meaning."""
COMPARISON_COLUMNS: dict[str, str] = {
    "run": "name of the run",
    "model": "hub id or folder",
    "revision": "hub revision; empty for the default one",
    "layers": "decoder layers",
    "outcome": "what Y is",
    "measured_in": "unit of te",
    "finished": "whether the run is finished",
    "pairs": "pairs that te is the mean of",
    "clusters": "clusters of these pairs",
    **{"te": "mean total effect", "te_low": "lower end of its 95% interval", "te_high": "upper end"},
    **{f"claim_{number}": f"verdict on claim {number}, {words}" for number, words in CLAIMS.items()},
    **{
        f"{name}{end}": f"{text}{note}"
        for name, (_, _, text) in MEASURES.items()
        for end, note in (("", ""), ("_low", "; lower end of its 95% interval"), ("_high", "; upper end"))
    },
    "notes": "why a number is missing, or why to read it with care",
}
PROFILE_COLUMNS: dict[str, str] = {
    "run": "name of the run",
    "position": "edit or last",
    "depth": "relative depth of the layer, 0 to 1",
    "share": "mean NIE of the residual stream / mean TE",
}
_NO_CLAIMS = "the claims analysis was not part of this study"
_NO_LAYERS = "the layers analysis, whose figure this is, was not part of this study"
_READING = (
    "**TE**, total effect: how much the harmful prompt changes the outcome. It is in the unit of its own run and not "
    "compared; everything else has no unit.",
    "**NIE**, natural indirect effect: the harmless prompt, with a mediator as on the harmful one. **TIE**: the loss "
    "when the harmful prompt has it as on the harmless one.",
    "Intervals are 95%, over clusters of pairs, each run's its own. Runs are not tested against each other: where two "
    "intervals overlap, their runs may still differ.",
)


@dataclass(frozen=True)
class Compared:
    """One run, as the comparison sees it."""

    name: str
    """Its folder."""
    study: Study
    """What was measured."""
    total: Estimate
    """TE, in the outcome's unit."""
    verdicts: Mapping[int, str]
    """By claim; empty where claims were not tested."""
    measures: Mapping[str, tuple[float, float, float]]
    """`MEASURES` with their intervals on the held-out pairs; those that were measured."""
    profile: pd.DataFrame
    """`PROFILE_COLUMNS`; without rows where no share of TE can be given."""
    notes: tuple[str, ...]
    """Why numbers are missing or to be read with care, each said once."""
    finished: bool


def read_runs(folders: Sequence[Path]) -> list[Compared]:
    """Two runs or more from their run folders; no model is needed.

    Raises:
        SettingsError: fewer than two runs, or one of them twice.
        StoreError: a folder is no run folder.
    """
    if len(folders) < 2:
        raise SettingsError(f"a comparison needs two run folders or more, got {len(folders)}; name another run")
    seen = [folder.resolve() for folder in folders]
    for folder in folders:
        if seen.count(folder.resolve()) > 1:
            raise SettingsError(f"{folder} is named twice; name different run folders")
    stores = [Store.open(folder) for folder in folders]
    return [compared(str(store.folder), reread(store), bool(store.record().get("finished"))) for store in stores]


def compared(name: str, result: Result, finished: bool = True) -> Compared:
    """One run's share of the comparison."""
    total, layers = result.summary.total, _stream(result)
    problem = _no_effect(total)
    profile = layers.iloc[:0] if problem else layers
    missing = ["" if len(layers) else _NO_LAYERS, "" if "claims.csv" in result.tables else _NO_CLAIMS]
    known = total.reason if not math.isnan(total.low) else ""  # else the problem says it
    return Compared(
        name=name,
        study=result.study,
        total=total,
        verdicts=_verdicts(result),
        measures=_measures(result),
        profile=_profile(name, profile, result.study.info.layers),
        notes=tuple(dict.fromkeys(filter(None, (*_warnings(result, finished), problem, known, *missing)))),
        finished=finished,
    )


def comparison_table(runs: Sequence[Compared]) -> Table:
    """What people read: a column per run."""
    rows: dict[str, list[str]] = {
        "model": [run.study.info.name for run in runs],
        "layers": [str(run.study.info.layers) for run in runs],
        "outcome": [run.study.outcome.name for run in runs],
        "pairs, clusters": [f"{run.total.n_pairs}, {run.total.n_clusters}" for run in runs],
        "TE, in the outcome's unit": [f"{estimate(run.total)} {run.study.outcome.unit}" for run in runs],
        **{
            f"{number}. {words}": [run.verdicts.get(number, "not tested") for run in runs]
            for number, words in CLAIMS.items()
        },
        **{
            f"{number}: {text}": [
                interval(*run.measures[name], percent) if name in run.measures else NONE for run in runs
            ]
            for name, (number, _, text) in MEASURES.items()
        },
    }
    notes = tuple(Note(run.name, text) for run in runs for text in run.notes)
    names = [run.name for run in runs]
    return Table(("", *names), [(what, *cells) for what, cells in rows.items()], notes)


def comparison_csv(runs: Sequence[Compared]) -> pd.DataFrame:
    """What programs read: a row per run (`COMPARISON_COLUMNS`)."""
    return pd.DataFrame([_record(run) for run in runs], columns=list(COMPARISON_COLUMNS))


def comparison_figure(profiles: pd.DataFrame) -> Figure:
    """Where the effect leaves the changed words (dashed) and arrives at the answer (solid), a colour per run.

    profiles: `PROFILE_COLUMNS` of one run or more, in the order of the legend.
    """
    figure = Figure((figures.WIDTH, 5.0), figures.DPI, layout="constrained")
    axis = figure.subplots()
    styles = zip(profiles.groupby("run", sort=False), cycle(figures.COLOURS), cycle(figures.MARKERS), strict=False)
    for (run, part), colour, marker in styles:
        for position, dashes in (("last", "-"), ("edit", "--")):
            line = part[part["position"] == position].sort_values("depth")
            label = f"{run}, at '{position}'"
            axis.plot(line["depth"], line["share"], dashes, color=colour, marker=marker, markersize=3.5, label=label)
    axis.axhline(0, color="0.5", linewidth=0.8)
    axis.axvspan(2 / 3, 1, color="0.92", zorder=0)
    axis.set(xlabel="relative depth (0 first layer, 1 last; shaded: last third)", ylabel="mean NIE / mean TE")
    axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    figure.suptitle("What the residual stream carries of each run's own total effect, layer by layer", fontsize=11)
    figure.legend(loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    return figure


def write_comparison(runs: Sequence[Compared], folder: Path) -> Path:
    """Write `comparison.csv`, `comparison.md` and, where a run has shares of TE, `comparison.png`. Returns the second.

    Raises:
        StoreError: the folder cannot be written.
    """
    store = Store(folder)
    drawn = [run for run in runs if len(run.profile)]
    store.write("comparison.csv", comparison_csv(runs).to_csv(index=False, lineterminator="\n"))
    if drawn:
        store.write("comparison.png", figures.png(comparison_figure(pd.concat(run.profile for run in drawn))))
    parts = (
        f"# {len(runs)} runs compared",
        comparison_table(runs).markdown(),
        "![NIE / TE of the residual stream by relative depth](comparison.png)" if drawn else "",
        _left_out(runs),
        "## How to read the numbers",
        "\n".join(f"- {line}" for line in _READING),
    )
    store.write("comparison.md", "\n\n".join(filter(None, parts)) + "\n")
    return folder / "comparison.md"


def _left_out(runs: Sequence[Compared]) -> str:
    lines = [f"- {run.name}: {'; '.join(run.notes)}" for run in runs if run.profile.empty]
    return "\n".join(["Left out of the figure:", "", *lines]) if lines else ""


def _stream(result: Result) -> pd.DataFrame:
    """Effects of the residual stream where the prompts differ and where the answer is read."""
    effects = result.effects
    return effects[(effects["analysis"] == "layers") & effects["position"].isin(["edit", "last"])]


def _no_effect(total: Estimate) -> str:
    """Why there are no shares of the total effect; empty where there are."""
    if total.sign:
        return ""
    if not total.n_pairs:
        return "it has no values: nothing was measured yet, or another version of this package measured it"
    if math.isnan(total.low):
        return f"TE has no interval: {total.reason}"
    return f"TE spans 0, {estimate(total)}: there is no effect to take shares of"


def _verdicts(result: Result) -> dict[int, str]:
    claims = result.tables.get("claims.csv")
    return {} if claims is None else {int(claim.number): str(claim.said) for claim in claims.itertuples()}


def _measures(result: Result) -> dict[str, tuple[float, float, float]]:
    """The numbers that decide, as the claims' own table has them."""
    sets = result.tables.get("sets.csv")
    if sets is None:
        return {}
    deciding = sets[sets["decides"]]
    found = {}
    for name, (number, direction, _) in MEASURES.items():
        rows = deciding[(deciding["number"] == number) & (deciding["direction"] == direction)]
        if len(rows):
            row = rows.iloc[0]
            found[name] = (float(row["harm"]), float(row["harm_low"]), float(row["harm_high"]))
    return found


def _profile(name: str, effects: pd.DataFrame, layers: int) -> pd.DataFrame:
    """Mean NIE / mean TE of the residual stream by position and layer, over the same pairs."""
    means = effects.groupby(["position", "layer"], as_index=False)[["nie", "te"]].mean()
    depth, share = means["layer"] / max(layers - 1, 1), means["nie"] / means["te"]
    return means.assign(run=name, depth=depth, share=share)[list(PROFILE_COLUMNS)]


def _warnings(result: Result, finished: bool) -> tuple[str, ...]:
    """What a run's own report opens with."""
    exact = result.study.config.dtype == "float32"
    violated = exact and any(identity.largest > TOLERANCE for identity in result.summary.identities)
    said = {"do not trust this run: an identity that holds by construction is violated": violated}
    return tuple(text for text, holds in {**said, "this run is not finished": not finished}.items() if holds)


def _record(run: Compared) -> dict[str, object]:
    info, outcome, total = run.study.info, run.study.outcome, run.total
    shares = {
        f"{name}{end}": value
        for name, found in run.measures.items()
        for end, value in zip(("", "_low", "_high"), found, strict=True)
    }
    return {
        **{"run": run.name, "model": info.name, "revision": info.revision, "layers": info.layers},
        **{"outcome": outcome.name, "measured_in": outcome.unit, "finished": run.finished},
        **{"pairs": total.n_pairs, "clusters": total.n_clusters},
        **total.columns("te"),
        **{f"claim_{number}": said for number, said in run.verdicts.items()},
        **shares,
        "notes": "; ".join(run.notes),
    }
