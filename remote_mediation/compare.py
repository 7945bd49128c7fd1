"""Several runs side by side: other models, or checkpoints of one, measured by the same kind of study.

It reads the tables that lie in their folders (`printed`), so it takes run folders and what `export` wrote of them.
Models differ in depth and outcomes in unit, so nothing is compared across runs but what has neither: a layer is its
relative depth, 0 (first) to 1 (last), and an effect is a share of its own run's total effect. Where that total effect
is not told apart from 0 there are no shares of it, and the run is listed with the reason and left out of the figure.
"""

from __future__ import annotations

import math
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from remote_mediation.analyses.claims.ask import CLAIM_COLUMNS, SET_COLUMNS
from remote_mediation.analyses.claims.show import verdicts_of as claims_of
from remote_mediation.analyses.maps.show import PASSED, passed
from remote_mediation.analyses.rivals.rulings import CLAIM_COLUMNS as RIVAL_COLUMNS
from remote_mediation.analyses.rivals.rulings import SET_COLUMNS as RIVAL_SET_COLUMNS
from remote_mediation.analyses.rivals.show import CLAIM_FILES
from remote_mediation.analyses.rivals.show import verdicts_of as rivals_of
from remote_mediation.analyses.total.ask import ASKED, COVERAGE_COLUMNS, Coverage, coverages
from remote_mediation.errors import SettingsError, StoreError
from remote_mediation.printed import Printed, read_several
from remote_mediation.report import TOLERANCE
from remote_mediation.show import figures
from remote_mediation.show.section import Share, Verdict
from remote_mediation.show.tables import NONE, Note, Table, bullets, count, csv_text, estimate, paragraphs, percent
from remote_mediation.store import Store

HALF = 0.5
"""Of TE: where so much has arrived is told."""
RUN_COLUMNS: dict[str, str] = {
    "run": "name of the run",
    "model": "hub id or folder",
    "revision": "hub revision; empty for the default one",
    "weights": "where they are from, if not from the hub as they are",
    "layers": "decoder layers",
    "dtype": "precision",
    "backend": "local or ndif",
    "outcome": "what Y is",
    "measured_in": "unit of te",
    "finished": "whether the run is finished",
    "pairs": "pairs that te is the mean of",
    "clusters": "clusters of these pairs",
    "heldout": "of these pairs, held out: those that verdicts rest on",
    **{"te": "mean total effect", "te_low": "lower end of its 95% interval", "te_high": "upper end"},
    "crossing": "relative depth from which on the stream carries more of TE at `last` than at `edit`",
    "arrived": "relative depth from which on half of TE has arrived at `last`",
    "notes": "why a number is missing, or why to read it with care",
}
VERDICT_COLUMNS: dict[str, str] = {
    "run": "name of the run",
    "label": "how the claim is called",
    "claim": "in words",
    "said": "the verdict, with what qualifies it",
    "why": "the reason",
    "measure": "what decides; a row for each number that does",
    "direction": "nie, tie, both, or empty",
    **{"harm": "share of TE", "harm_low": "lower end of its 95% interval", "harm_high": "upper end"},
    **{"placebo": "the same of the placebo", "placebo_low": "lower end", "placebo_high": "upper end"},
    "beta_harm": "slope of the effect on TE over pairs",
    "beta_placebo": "the same of the placebo",
    "pairs": "held-out pairs",
    "clusters": "clusters of these pairs",
    "reason": "why a number is missing, or why to read it with care",
}
PROFILE_COLUMNS: dict[str, str] = {
    "run": "name of the run",
    "position": "edit or last",
    "layer": "of the model, from 0",
    "depth": "relative depth of the layer, 0 to 1",
    "share": "mean NIE of the residual stream / mean TE",
}
_FIGURE = "figures/crossings.png"
_NO_CLAIMS = "the claims analysis was not part of this study"
_NO_LAYERS = "the layers analysis, whose figure this is, was not part of this study"
_READING = (
    "**TE**, total effect: how much the harmful prompt changes the outcome. It is in the unit of its own run and not "
    "compared; everything else has no unit.",
    "**NIE**, natural indirect effect: the harmless prompt, with a mediator as on the harmful one. **TIE**: the loss "
    "when the harmful prompt has it as on the harmless one. Both are shares of TE, on held-out pairs.",
    "*Undecided* is no *no*: the intervals allow both. A supported claim that reads *of any edit* is not shown to do "
    "more for harm than for a placebo, another harmless prompt that differs in the same words.",
    "Intervals are 95%, over clusters of pairs, each run's its own. Runs are not tested against each other: where two "
    "intervals overlap, their runs may still differ. Models, pairs, precision and openings differ between runs, as the "
    "table above says; where they share pairs or a family of models, that they agree is no second confirmation.",
)


@dataclass(frozen=True)
class Compared:
    """One run, as the comparison sees it."""

    run: Printed
    """What its folder has."""
    verdicts: tuple[Verdict, ...]
    """Claims, then rivals; none where they were not tested."""
    profile: pd.DataFrame
    """`PROFILE_COLUMNS`; without rows where no share of TE can be given."""
    coverage: tuple[Coverage, ...]
    """How much of what is said the openings hold; none where the outcome has no openings."""
    notes: tuple[str, ...]
    """Why numbers are missing or to be read with care, each said once."""

    @property
    def name(self) -> str:
        """Of the run."""
        return self.run.name

    @property
    def heldout(self) -> int:
        """Pairs that verdicts rest on."""
        effects = self.run.tables["effects.csv"]
        return int(effects.loc[effects["split"] == "heldout", "pair_id"].nunique())

    @property
    def crossing(self) -> float:
        """Relative depth from which on the stream carries more at `last` than at `edit`; NaN where it never does."""
        by = self.profile.pivot(index="depth", columns="position", values="share").sort_index()
        if not {"edit", "last"} <= set(by):
            return math.nan
        behind = by.index[~(by["last"] > by["edit"])]
        after = by.index[by.index > behind[-1]] if len(behind) else by.index
        return float(after[0]) if len(after) else math.nan

    @property
    def arrived(self) -> float:
        """Relative depth from which on half of TE has arrived at `last`; NaN where it never has."""
        at = self.profile[self.profile["position"] == "last"].set_index("layer")
        layer = passed(at["share"].sort_index(), "last")[PASSED.index(HALF)] if len(at) else None
        return math.nan if layer is None else float(at.loc[layer, "depth"])


def read_runs(folders: Sequence[Path]) -> list[Compared]:
    """Two runs or more from their folders, as the run or `export` wrote them; no model is needed.

    Raises:
        SettingsError: fewer than two runs, or one of them twice.
        StoreError: a folder is no run folder, or has no tables.
    """
    if len(folders) < 2:
        raise SettingsError(f"a comparison needs two run folders or more, got {len(folders)}; name another run")
    return [compared(run) for run in read_several(folders)]


def compared(run: Printed) -> Compared:
    """One run's share of the comparison."""
    total, verdicts = run.total, _verdicts(run)
    stream = _stream(run)
    problem = _no_effect(run)
    missing = ["" if len(stream) else _NO_LAYERS, "" if verdicts else _NO_CLAIMS]
    known = total.reason if not math.isnan(total.low) else ""  # else the problem says it
    return Compared(
        run=run,
        verdicts=verdicts,
        profile=_profile(run, stream.iloc[:0] if problem else stream),
        coverage=_coverage(run),
        notes=tuple(dict.fromkeys(filter(None, (*_warnings(run), problem, known, *missing)))),
    )


def runs_table(runs: Sequence[Compared]) -> Table:
    """What was measured, a column per run."""
    rows: dict[str, list[str]] = {
        "model": [str(one.run.model["name"]) for one in runs],
        "layers": [str(one.run.model["layers"]) for one in runs],
        "precision, where": [f"{one.run.config.dtype}, {one.run.config.backend}" for one in runs],
        "outcome": [one.run.config.outcome for one in runs],
        "openings hold, of what is said": [_covered(one.coverage) for one in runs],
        "pairs, clusters": [f"{one.run.total.n_pairs}, {one.run.total.n_clusters}" for one in runs],
        "held-out pairs": [str(one.heldout) for one in runs],
        "TE, in the outcome's unit": [f"{estimate(one.run.total)} {one.run.unit}" for one in runs],
        "more at the answer than at the edit from": [_depth(one.crossing) for one in runs],
        "half of TE has arrived at the answer from": [_depth(one.arrived) for one in runs],
    }
    sources = [Note(one.name, f"weights: {one.run.source}") for one in runs if one.run.source]
    notes = (*sources, *(Note(one.name, text) for one in runs for text in one.notes))
    return Table(("", *(one.name for one in runs)), [(what, *cells) for what, cells in rows.items()], notes)


def verdicts_table(runs: Sequence[Compared]) -> Table:
    """A claim or rival a row, a run a column: the verdict, and what decides it."""
    by_run = [{verdict.label: verdict for verdict in one.verdicts} for one in runs]
    named = {label: verdict.row for verdicts in by_run for label, verdict in verdicts.items()}
    rows = []
    for label, row in sorted(named.items(), key=lambda item: not item[0].startswith("claim")):
        found = [verdicts.get(label) for verdicts in by_run]
        swapped = {share.measure for verdict in found if verdict for share in verdict.shares}
        rows.append((row, *(_told(verdict, len(swapped) > 1) for verdict in found)))
    what = f"shares of TE with 95% intervals on held-out pairs; of claim 4 a gain in accuracy; {NONE}: not asked"
    return Table(("", *(one.name for one in runs)), rows, (Note("", what), *_against(runs)))


def _against(runs: Sequence[Compared]) -> list[Note]:
    """Why what is not supported is not."""
    return [
        Note(one.name, f"{verdict.row}, not supported: {verdict.why}")
        for one in runs
        for verdict in one.verdicts
        if verdict.said == "not supported"
    ]


def comparison_data(runs: Sequence[Compared]) -> dict[str, pd.DataFrame]:
    """What programs read: `runs`, a row per run (`RUN_COLUMNS`), and `verdicts` (`VERDICT_COLUMNS`)."""
    verdicts = [_row(one, verdict, share) for one in runs for verdict in one.verdicts for share in verdict.shares]
    return {
        "runs": pd.DataFrame(map(_record, runs), columns=list(RUN_COLUMNS)),
        "verdicts": pd.DataFrame(verdicts, columns=list(VERDICT_COLUMNS)),
    }


def agreement(runs: Sequence[Compared]) -> str:
    """In how many of the runs that tested it each claim and rival is supported, and where for harm in particular."""
    groups: dict[tuple[float, int], list[str]] = {}
    for name, verdicts in _tested(runs).items():
        supported = sum(verdict.supported for verdict in verdicts)
        groups.setdefault((supported / len(verdicts), len(verdicts)), []).append(_qualified(name, verdicts))
    if not groups:
        return "**No run tested a claim.**"
    said = "; ".join(
        f"in {round(part * many)} of {many}: {', '.join(names)}"
        for (part, many), names in sorted(groups.items(), reverse=True)
    )
    specific = _specific(runs)
    harm = f"More for harm than for another edit of the same words: {', '.join(specific) or 'none of them'}."
    return f"**Supported, of the runs that tested it, {said}.** {harm}"


def _tested(runs: Sequence[Compared]) -> dict[str, list[Verdict]]:
    """By name of the claim or rival what is said of it, where it was tested."""
    tested: dict[str, list[Verdict]] = {}
    for one in runs:
        for verdict in one.verdicts:
            if verdict.said != "not tested":
                tested.setdefault(verdict.name, []).append(verdict)
    return tested


def _specific(runs: Sequence[Compared]) -> list[str]:
    """What is supported for harm in particular, and in which run."""
    return [
        f"{verdict.name} in {one.name}"
        for one in runs
        for verdict in one.verdicts
        if verdict.supported and not verdict.general
    ]


def _qualified(name: str, verdicts: Sequence[Verdict]) -> str:
    """A claim with how many runs leave it undecided, and what controls take from it in how many."""
    undecided = sum(verdict.said.endswith("undecided") for verdict in verdicts)
    taken = Counter(verdict.control for verdict in verdicts if verdict.control)
    more = [f"undecided in {undecided}"] if undecided else []
    more += [f"{control} in {times}" for control, times in taken.items()]
    return f"{name} ({', '.join(more)})" if more else name


def comparison_figure(runs: Sequence[Compared]) -> Figure:
    """Where the effect leaves the changed words (dashed) and arrives at the answer (solid), a colour per run.

    runs: those with shares of TE, in the order of the legend.
    """
    figure = Figure((figures.WIDTH, 5.0), figures.DPI, layout="constrained")
    axis = figure.subplots()
    for one, colour, marker in zip(runs, cycle(figures.COLOURS), cycle(figures.MARKERS), strict=False):
        _draw_run(axis, one, colour, marker)
    axis.axhline(0, color="0.5", linewidth=0.8)
    axis.axvspan(2 / 3, 1, color="0.92", zorder=0)
    axis.set(xlabel="relative depth (0 first layer, 1 last; shaded: last third)", ylabel="mean NIE / mean TE")
    axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    figure.suptitle(crossings(runs), fontsize=11)
    figure.legend(loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    return figure


def _draw_run(axis: Axes, one: Compared, colour: str, marker: str) -> None:
    """Both positions by depth, and an upright where they cross."""
    for position, dashes in (("last", "-"), ("edit", "--")):
        line = one.profile[one.profile["position"] == position].sort_values("depth")
        label = f"{one.name}, at '{position}'"
        axis.plot(line["depth"], line["share"], dashes, color=colour, marker=marker, markersize=3.5, label=label)
    if not math.isnan(one.crossing):
        axis.axvline(one.crossing, color=colour, linestyle=":", linewidth=1.2)


def crossings(runs: Sequence[Compared]) -> str:
    """Where the effect passes from the changed words to the answer, in a line."""
    found = sorted(one.crossing for one in runs if not math.isnan(one.crossing))
    if not found:
        return "What the residual stream carries of each run's own total effect, layer by layer"
    where = " to ".join(dict.fromkeys(f"{depth:.0%}" for depth in (found[0], found[-1])))
    return f"The effect passes from the changed words to the answer at {where} of the depth"


def write_comparison(runs: Sequence[Compared], folder: Path) -> Path:
    """Write `report.md`, `runs.csv`, `verdicts.csv` and, where a run has shares of TE, a figure. Returns the first.

    Raises:
        StoreError: the folder is a run's own, or cannot be written.
    """
    if (folder / "run.json").exists():
        raise StoreError(f"{folder} is a run folder, whose report would be lost; choose another --out")
    store = Store(folder)
    drawn = [one for one in runs if len(one.profile)]
    for name, table in comparison_data(runs).items():
        store.write(f"{name}.csv", csv_text(table))
    if drawn:
        store.write(_FIGURE, figures.png(comparison_figure(drawn)))
    named = shlex.join(["remote-mediation", "compare", *(str(one.run.folder) for one in runs), "--out", str(folder)])
    parts = (
        f"# {count(len(runs), 'run')} compared",
        agreement(runs),
        "## Claims and rivals",
        verdicts_table(runs).markdown(),
        "## From the changed words to the answer",
        f"{crossings(drawn)}." if drawn else "No run has shares of TE by layer.",
        _drawn(drawn) if drawn else "",
        _left_out(runs),
        "## What was measured",
        runs_table(runs).markdown(),
        "## How to read the numbers",
        bullets(_READING),
        f"Made by `{named}`.",
    )
    store.write("report.md", paragraphs(*parts) + "\n")
    return folder / "report.md"


def _drawn(runs: Sequence[Compared]) -> str:
    """The figure as Markdown, with what it shows."""
    where = ", ".join(f"{one.name} {one.crossing:.0%}" for one in runs if not math.isnan(one.crossing))
    said = "Share of the total effect that the residual stream carries at the changed words and at the answer, by depth"
    return (
        f"![{said}{'; they cross at ' if where else ''}{where}]({_FIGURE})\n\n"
        "Solid: at the answer's token; dashed: at the changed words; dotted: from there on the answer's token carries "
        "more. Means over all pairs, one site at a time: a description, not a test."
    )


def _left_out(runs: Sequence[Compared]) -> str:
    lines = [f"{one.name}: {'; '.join(one.notes)}" for one in runs if one.profile.empty]
    return paragraphs("Left out of the figure:", bullets(lines)) if lines else ""


def _verdicts(run: Printed) -> tuple[Verdict, ...]:
    """What a run says of claims and rivals."""
    claims, sets = run.table("claims.csv", CLAIM_COLUMNS), run.table("sets.csv", SET_COLUMNS)
    found = [] if claims is None or sets is None else claims_of(claims, sets)
    for claim_file, set_file in CLAIM_FILES.values():
        claims, sets = run.table(claim_file, RIVAL_COLUMNS), run.table(set_file, RIVAL_SET_COLUMNS)
        if claims is not None and sets is not None:
            found += rivals_of(claims, sets)
    return tuple(found)


def _told(verdict: Verdict | None, named: bool) -> str:
    """The verdict, and below it what decides. named: say what was swapped, too."""
    if verdict is None:
        return NONE
    swapped = dict.fromkeys(share.measure for share in verdict.shares) if named else ()
    return "\n".join([verdict.said, *swapped, *map(_share, verdict.shares)])


def _share(one: Share) -> str:
    way = one.direction.upper() if one.direction in ("nie", "tie") else ""
    return f"{way} {estimate(one.harm, percent)}".strip()


def _coverage(run: Printed) -> tuple[Coverage, ...]:
    """Mean coverage of both sides after both kinds of prompts.

    Raises:
        StoreError: the table lacks columns.
    """
    table = run.table("coverage.csv", COVERAGE_COLUMNS)
    return () if table is None else tuple(coverages(table, run.config.seed, run.config.statistics.resamples))


def _covered(coverage: Sequence[Coverage]) -> str:
    """How much of what is said the openings of either side cover after the prompts that ask for it."""
    asked = [one for one in coverage if ASKED[one.prompts] == one.side]
    return "; ".join(f"{one.side} {percent(one.found.value)} after {one.prompts} prompts" for one in asked) or NONE


def _depth(depth: float) -> str:
    return NONE if math.isnan(depth) else f"{depth:.0%} of the depth"


def _stream(run: Printed) -> pd.DataFrame:
    """Effects of the residual stream where the prompts differ and where the answer is read."""
    effects = run.tables["effects.csv"]
    return effects[(effects["analysis"] == "layers") & effects["position"].isin(["edit", "last"])]


def _no_effect(run: Printed) -> str:
    """Why there are no shares of the total effect; empty where there are."""
    total = run.total
    if total.sign:
        return ""
    if math.isnan(total.low):
        return f"TE has no interval: {total.reason}"
    return f"TE spans 0, {estimate(total)}: there is no effect to take shares of"


def _profile(run: Printed, effects: pd.DataFrame) -> pd.DataFrame:
    """Mean NIE / mean TE of the residual stream by position and layer, over the same pairs."""
    means = effects.groupby(["position", "layer"], as_index=False)[["nie", "te"]].mean()
    depth, share = means["layer"] / max(int(run.model["layers"]) - 1, 1), means["nie"] / means["te"]
    return means.assign(run=run.name, depth=depth, share=share)[list(PROFILE_COLUMNS)]


def _warnings(run: Printed) -> tuple[str, ...]:
    """What a run's own report opens with."""
    exact = run.config.dtype == "float32"
    violated = exact and any(identity.largest > TOLERANCE for identity in run.identities)
    said = {
        "do not trust this run: an identity that holds by construction is violated": violated,
        "this run is not finished": not run.finished,
    }
    return tuple(text for text, holds in said.items() if holds)


def _record(one: Compared) -> Mapping[str, object]:
    run, total = one.run, one.run.total
    return {
        **{"run": one.name, "model": run.model["name"], "revision": run.model["revision"], "weights": run.source},
        **{"layers": run.model["layers"], "dtype": run.config.dtype, "backend": run.config.backend},
        **{"outcome": run.config.outcome, "measured_in": run.unit, "finished": run.finished},
        **{"pairs": total.n_pairs, "clusters": total.n_clusters, "heldout": one.heldout},
        **total.columns("te"),
        **{"crossing": one.crossing, "arrived": one.arrived, "notes": "; ".join(one.notes)},
    }


def _row(one: Compared, verdict: Verdict, share: Share) -> Mapping[str, object]:
    return {
        **{"run": one.name, "label": verdict.label, "claim": verdict.claim, "said": verdict.said, "why": verdict.why},
        **{"measure": share.measure, "direction": share.direction},
        **share.harm.columns("harm"),
        **share.placebo.columns("placebo"),
        **{"beta_harm": share.beta_harm, "beta_placebo": share.beta_placebo},
        **{"pairs": share.harm.n_pairs, "clusters": share.harm.n_clusters, "reason": share.harm.reason},
    }
