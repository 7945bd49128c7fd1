"""Several runs side by side: other models, or checkpoints of one, measured by the same kind of study.

Models differ in depth and outcomes in unit, so nothing is compared across runs but what has neither: a layer is its
relative depth, 0 (first) to 1 (last), and an effect is a share of its own run's total effect. Where that total effect
is not told apart from 0 there are no shares of it, and the run is listed with the reason and left out of the figure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from remote_mediation.analyses.neurons import UNITS
from remote_mediation.errors import SettingsError
from remote_mediation.lab import Study
from remote_mediation.report import TOLERANCE
from remote_mediation.show import figures
from remote_mediation.show.tables import Note, Table, estimate, number, percent
from remote_mediation.stats import Estimate, Interval, ratio_of_means
from remote_mediation.store import Store
from remote_mediation.study import Result, reread
from remote_mediation.summary import pivot

MEASURES: dict[str, str] = {
    "mlp_centre": "MLP NIE: centre of mass, depth 0 to 1",
    "mlp_last_third": "MLP NIE: share in the last third of layers",
    "attention_centre": "attention NIE: centre of mass, depth 0 to 1",
    "attention_last_third": "attention NIE: share in the last third of layers",
    "difference": "MLP - attention: NIE summed over layers / TE",
}
"""What is compared, and how it is named; all but the centres are shown as percentages."""
COMPARISON_COLUMNS: dict[str, str] = {
    "run": "name of the run",
    "model": "hub id or folder",
    "revision": "hub revision; empty for the default one",
    "layers": "decoder layers",
    "outcome": "what Y is",
    "unit": "unit of te",
    "finished": "whether the run is finished",
    "pairs": "pairs that te is the mean of",
    "clusters": "clusters of these pairs",
    **{"te": "mean total effect, in `unit`", "te_low": "lower end of its 95% interval", "te_high": "upper end"},
    **{
        f"{name}{end}": f"{text}{note}"
        for name, text in MEASURES.items()
        for end, note in (("", ""), ("_low", "; lower end of its 95% interval"), ("_high", "; upper end"))
    },
    "chosen": "neurons chosen on the discovery split; empty where none were measured",
    "mediators": "of these, neurons that mediate on the held-out split",
    "notes": "why a number is missing, or why to read it with care",
}
PROFILE_COLUMNS: dict[str, str] = {
    "run": "name of the run",
    "component": "mlp_output or attention_output",
    "depth": "relative depth of the layer, 0 to 1",
    "share": "mean NIE / mean TE",
}
_NO_MODULES = "the modules analysis was not part of this study"
_NO_NEURONS = "no single neurons were measured in this study"
_READING = (
    "**TE**, total effect: how much the harmful prompt changes the outcome. It is in the unit of its own run and not "
    "compared; everything else has no unit.",
    "**NIE**, natural indirect effect: the harmless prompt, with one layer's MLP or attention as on the harmful one.",
    "Intervals are 95%, from a bootstrap over clusters of pairs, each run's its own. Runs are not tested against each "
    "other: where two intervals overlap, their runs may still differ.",
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
    measures: dict[str, Interval]
    """`MEASURES`; NaN with the reason where there is no effect to speak of."""
    chosen: int | None
    """Neurons chosen on the discovery split; None where no single neurons were measured."""
    mediators: int | None
    """Of these, neurons that mediate on the held-out split."""
    profile: pd.DataFrame
    """`PROFILE_COLUMNS`; without rows where no share of TE can be given."""
    warnings: tuple[str, ...]
    """What makes the whole run doubtful."""
    finished: bool

    def notes(self) -> list[str]:
        """Why numbers are missing or to be read with care, each said once."""
        known = self.total.reason if not math.isnan(self.total.low) else ""  # else the measures say it
        reasons = [*self.warnings, known, *(found.reason for found in self.measures.values())]
        return list(dict.fromkeys(filter(None, [*reasons, _NO_NEURONS if self.chosen is None else ""])))


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
    summary, total = result.summary, result.summary.total
    modules = _modules(result)
    problem = _no_effect(total) or ("" if len(modules) else _NO_MODULES)
    units = bool((result.effects["analysis"] == UNITS).any())
    return Compared(
        name=name,
        study=result.study,
        total=total,
        measures=dict.fromkeys(MEASURES, _missing(problem)) if problem else _measures(result, modules),
        chosen=len(summary.mediators) if units else None,
        mediators=int(summary.mediators["mediates"].sum()) if units else None,
        profile=_profile(name, modules.iloc[:0] if problem else modules, result.study.info.layers),
        warnings=_warnings(result, finished),
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
            text: [estimate(run.measures[name], number if name.endswith("centre") else percent) for run in runs]
            for name, text in MEASURES.items()
        },
        "neurons that mediate, held out": [
            "n/a" if run.chosen is None else f"{run.mediators} of {run.chosen} chosen" for run in runs
        ],
    }
    notes = tuple(Note(run.name, text) for run in runs for text in run.notes())
    names = [run.name for run in runs]
    return Table(("", *names), [(what, *cells) for what, cells in rows.items()], notes)


def comparison_csv(runs: Sequence[Compared]) -> pd.DataFrame:
    """What programs read: a row per run (`COMPARISON_COLUMNS`)."""
    return pd.DataFrame([_record(run) for run in runs], columns=list(COMPARISON_COLUMNS))


def write_comparison(runs: Sequence[Compared], folder: Path) -> Path:
    """Write `comparison.csv`, `comparison.md` and, where a run has shares of TE, `comparison.png`. Returns the second.

    Raises:
        StoreError: the folder cannot be written.
    """
    store = Store(folder)
    drawn = [run for run in runs if len(run.profile)]
    store.write("comparison.csv", comparison_csv(runs).to_csv(index=False, lineterminator="\n"))
    if drawn:
        store.write("comparison.png", figures.png(figures.comparison(pd.concat(run.profile for run in drawn))))
    parts = (
        f"# {len(runs)} runs compared",
        comparison_table(runs).markdown(),
        "![NIE / TE of MLP and attention by relative depth](comparison.png)" if drawn else "",
        _left_out(runs),
        "## How to read the numbers",
        "\n".join(f"- {line}" for line in _READING),
    )
    store.write("comparison.md", "\n\n".join(filter(None, parts)) + "\n")
    return folder / "comparison.md"


def _left_out(runs: Sequence[Compared]) -> str:
    lines = [f"- {run.name}: {run.measures['difference'].reason}" for run in runs if run.profile.empty]
    return "\n".join(["Left out of the figure:", "", *lines]) if lines else ""


def _modules(result: Result) -> pd.DataFrame:
    """Effects of single layers' MLP and attention at the first position measured, the one of the depth profiles."""
    modules = result.effects[result.effects["analysis"] == "modules"]
    return modules[modules["position"] == modules["position"].iloc[0]] if len(modules) else modules


def _no_effect(total: Estimate) -> str:
    """Why there are no shares of the total effect; empty where there are."""
    if total.sign:
        return ""
    if not total.n_pairs:
        return "it has no values: nothing was measured yet, or another version of this package measured it"
    if math.isnan(total.low):
        return f"TE has no interval: {total.reason}"
    return f"TE spans 0, {estimate(total)}: there is no effect to take shares of"


def _missing(reason: str) -> Interval:
    return Interval(0, 0, math.nan, math.nan, math.nan, reason)


def _measures(result: Result, modules: pd.DataFrame) -> dict[str, Interval]:
    summary, config = result.summary, result.study.config
    assert summary.mlp is not None
    assert summary.attention is not None
    nie, clusters = pivot(modules, "nie", ["component", "layer"])
    te, _ = pivot(modules, "te", ["component", "layer"])
    mlp, attention = (nie[name].to_numpy().sum(axis=1) for name in ("mlp_output", "attention_output"))
    rng = np.random.default_rng(config.seed)
    return {
        "mlp_centre": summary.mlp.centre_of_mass,
        "mlp_last_third": summary.mlp.last_third_share,
        "attention_centre": summary.attention.centre_of_mass,
        "attention_last_third": summary.attention.last_third_share,
        "difference": ratio_of_means(mlp - attention, te.mean(axis=1), clusters, rng, config.statistics.resamples),
    }


def _profile(name: str, modules: pd.DataFrame, layers: int) -> pd.DataFrame:
    """Mean NIE / mean TE of every layer's MLP and attention, over the same pairs."""
    means = modules.groupby(["component", "layer"], as_index=False)[["nie", "te"]].mean()
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
    return {
        **{"run": run.name, "model": info.name, "revision": info.revision, "layers": info.layers},
        **{"outcome": outcome.name, "unit": outcome.unit, "finished": run.finished},
        **{"pairs": total.n_pairs, "clusters": total.n_clusters},
        **total.columns("te"),
        **{key: value for name, found in run.measures.items() for key, value in found.columns(name).items()},
        **{"chosen": run.chosen, "mediators": run.mediators, "notes": "; ".join(run.notes())},
    }
