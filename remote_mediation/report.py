"""From a measured study to what people read: `report.md`, figures and CSV files in the run folder, and the terminal.

Nothing is estimated here that `summary` has not estimated, but for the share of the total effect of the few sites that
are shown. Numbers have three significant digits (`markdown`); the CSV files have all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from rich.console import Group
from rich.markdown import Markdown
from rich.panel import Panel
from rich.text import Text

from remote_mediation.analyses.neurons import LAYERS, SAMPLE, UNITS, WINDOWS
from remote_mediation.effects import EFFECT_COLUMNS, SITE_COLUMNS
from remote_mediation.judges import JudgeQuality
from remote_mediation.lab import Study
from remote_mediation.outcomes import MEANINGS, OutcomeName
from remote_mediation.show import figures
from remote_mediation.show.coverage import coverage_section, coverage_words, covered, hardly_defined, total_table
from remote_mediation.show.sections import Part, csv_tables, overview, sections
from remote_mediation.show.tables import (
    Note,
    Table,
    bullets,
    count,
    estimate,
    interval,
    literal,
    markdown_table,
    notes_on,
    number,
    paragraphs,
    percent,
)
from remote_mediation.stats import Estimate, Interval, ratio_of_means
from remote_mediation.store import Store
from remote_mediation.study import Result
from remote_mediation.summary import CHECKS, SUMMARY_COLUMNS, Identity, pivot
from remote_mediation.tokens import Refusal

TOLERANCE = 1e-4
"""Largest deviation from an identity that float32 explains, in the outcome's unit."""

_BOTH = ["nie", "tie"]
"""What a mediator must show: it is sufficient and necessary."""
_NOUNS = {
    "layer_output": "residual stream",
    "attention_output": "attention",
    "mlp_output": "MLP",
    "mlp_neurons": "neuron",
    "attention_heads": "head",
}
_MOST_SITES = 5
_MOST_SITES_TERMINAL = 3
_MOST_MEDIATORS = 20
_UNRECORDED = "not recorded"
_PROVENANCE = ("model", "config", "outcome", "versions", "git", "host", "started", "finished", "seconds")
"""Keys of `run.json` that every report shows, recorded or not."""
_SIGNS = {
    1: "The harmful prompts raise the outcome: the total effect (TE) is {size}.",
    0: "The total effect (TE) is {size}, not told apart from 0: without an effect there is no place of it to find.",
    -1: "They lower the outcome: the total effect (TE) is {size}. The sites below carry this drop, not harmful text.",
}
"""What the sign of TE means for everything else."""
_OUTCOME_LIMITS: dict[OutcomeName, tuple[str, ...]] = {
    "response_logprob": (
        "The answers compared are those of the pairs file or, where it has none, the model's own. Its own answer to a "
        "harmful prompt may be a refusal: a positive outcome then means refusing. `--show-text` shows the answers.",
    ),
}
"""What to know before an outcome is read as harm."""

_READING = (
    "**TE**, total effect: how much the harmful prompt changes the outcome, compared with the harmless one.",
    "**NIE**, natural indirect effect: the harmless prompt, with the site as on the harmful one. Is it sufficient?",
    "**NDE**, natural direct effect: what the harmful prompt still changes with the site as on the harmless one.",
    "**TIE**, total indirect effect, TE - NDE: what the harmful prompt loses by that. Is the site necessary?",
    "**INT**, interaction, TE - NDE - NIE: does the site's effect depend on the rest?",
    "Intervals (95%, bootstrap) and p (sign flips) take clusters of pairs as the unit; q is Benjamini-Hochberg's false "
    "discovery rate over all sites of a section.",
)


class PairText(NamedTuple):
    """A pair as text, for readers who asked to see it."""

    id: str
    harmful: str
    harmless: str
    harmful_answer: str
    """Answer to the harmful prompt, as the outcome reads it."""
    harmless_answer: str
    """Answer to the harmless prompt, as the outcome reads it."""


def write_report(store: Store, result: Result, texts: Sequence[PairText] = ()) -> Path:
    """Write tables, figures and `report.md` into the run folder; the same bytes for the same run. Returns the report.

    texts: pairs to show as text; without them the report has no prompt and no generated answer.

    Provenance is all of `store.record()` but `study`, which `config` contains. Of `model`, `config`, `outcome`,
    `versions`, `git`, `host`, `started`, `finished` and `seconds`, what is missing is reported as not recorded, and a
    run without `finished` as unfinished. Pairs in `store.failures()` are reported as failed.

    Raises:
        StoreError: the run folder cannot be written.
    """
    for name, table in _csv_tables(result).items():
        store.write(name, table.to_csv(index=False, lineterminator="\n"))
    drawn, parts = _figures(result), sections(result)
    drawn |= {name: part.figure for name, part in parts.items() if part.figure}
    for name, figure in drawn.items():
        store.write(_figure_path(name), figures.png(figure))
    store.write("report.md", _report(result, parts, store, set(drawn), texts))
    return store.folder / "report.md"


def terminal_summary(result: Result, report: Path) -> Group:
    """What a run found, for the terminal. report: path of `report.md`, named in the last line."""
    study, summary = result.study, result.summary
    parts = sections(result)
    columns = ("site", "effect", _mean_header(study), "q", "held-out mean", "held-out q")
    return Group(
        Panel(Markdown(paragraphs(hardly_defined(covered(result)), _answer(result))), title=Text(study.info.name)),
        total_table(result).rich("Total effect"),
        *(Text(line) for line in [coverage_words(covered(result))] if line),
        *([parts["claims"].tables[0].rich(parts["claims"].title)] if "claims.csv" in result.tables else []),
        *(
            _sites_table(result, name, _MOST_SITES_TERMINAL).only(*columns).rich(_kind(name).title)
            for name in _informative_analyses(result)
        ),
        *([overview(parts.values()).rich("Gates and further analyses")] if parts else []),
        _identities_table(study, summary.identities).rich("Identities"),
        Text(f"Report: {report}", overflow="fold"),
    )


def _report(result: Result, parts: Mapping[str, Part], store: Store, drawn: set[str], texts: Sequence[PairText]) -> str:
    """`report.md`. parts: sections of analyses beyond single sites. drawn: names of figures."""
    study, summary, record = result.study, result.summary, store.record()
    every = {
        f"# Causal mediation of harmful text in {study.info.name}": _opening(result, record),
        **_shown_parts(parts, {"claims"}),
        "## What was measured": paragraphs(
            _setting_table(result).markdown(), _left_out(study.refusals, store.failures())
        ),
        "## Total effect": paragraphs(total_table(result).markdown(), coverage_section(result)),
        **{f"## {_kind(name).title}": _section(result, name, name in drawn) for name in _analyses(result)},
        **_shown_parts(parts, set(parts) - {"claims"}),
        "## Identities": _identities_table(study, summary.identities).markdown(),
        "## How to read the numbers": bullets(_READING),
        "## Limits": bullets(_limits(study, summary.total)),
        "## Prompts and answers": _shown(texts),
        "## Provenance": _provenance_table(record).markdown(),
    }
    return paragraphs(*(part for section in every.items() for part in section)) + "\n"


def _shown_parts(parts: Mapping[str, Part], names: set[str]) -> dict[str, str]:
    return {f"## {part.title}": part.markdown(_figure_path(name)) for name, part in parts.items() if name in names}


def _csv_tables(result: Result) -> dict[str, pd.DataFrame]:
    summary = result.summary
    tables = {
        "effects.csv": result.effects[list(EFFECT_COLUMNS)],
        "summary.csv": summary.sites[list(SUMMARY_COLUMNS)],
        **csv_tables(result),
    }
    if UNITS in _analyses(result):
        tables["mediators.csv"] = summary.mediators
    return tables


def _analyses(result: Result) -> list[str]:
    """Those with a section of sites; checks have another, and steps of the search are on the discovery pairs alone."""
    found = dict.fromkeys(result.effects["analysis"])
    return [name for name in found if name not in (CHECKS, WINDOWS, SAMPLE)]


def _informative_analyses(result: Result) -> list[str]:
    informative = set(_informative_sites(result)["analysis"])
    return [name for name in _analyses(result) if name in informative]


def _informative_sites(result: Result) -> pd.DataFrame:
    """Estimates, without the residual stream at all positions, where NIE = TE whatever the model does."""
    sites = result.summary.sites
    return sites[(sites["component"] != "layer_output") | (sites["position"] != "all")]


def _mean_header(study: Study) -> str:
    return f"mean [95% interval], {study.outcome.unit}"


def _opening(result: Result, record: Mapping[str, Any]) -> str:
    """The answer, and before it whatever makes it doubtful."""
    warnings = [
        f"**Do not trust these numbers: an identity that holds by construction is violated** ({identity.name}: "
        f"off by {number(identity.largest)} {result.study.outcome.unit})."
        for identity in result.summary.identities
        if _holds(identity, result.study) == "violated"
    ]
    if not record.get("finished"):
        warnings.append("**This run is not finished**: what follows is what has been measured so far.")
    return paragraphs(*warnings, hardly_defined(covered(result)), _answer(result))


def _answer(result: Result) -> str:
    """Where in this model harmful text is decided, as far as this run can say."""
    total, unit = result.summary.total, result.study.outcome.unit
    size = f"{estimate(total)} {unit}"
    care = f" To be read with care: {total.reason}." if total.reason else ""
    return f"{_headline(result)} {_SIGNS[total.sign].format(size=size)}{care}"


def _headline(result: Result) -> str:
    """The verdicts in a sentence; where TE < 0 the claims are worded about the refusal (METHOD, section 2)."""
    name, sign = result.study.info.name, result.summary.total.sign
    decided = "the refusal" if sign < 0 else "harmful text"
    if sign == 0:
        return f"**This run cannot say where in {name} harmful text is decided.**"
    if "claims.csv" not in result.tables:
        return f"**This run maps where {decided} acts in {name}; it tests no claim.**"
    said = result.tables["claims.csv"].groupby("said", sort=False)["number"].agg(list)
    verdicts = "; ".join(f"{_listed(numbers)} {verdict}" for verdict, numbers in said.items())
    return f"**Where in {name} is {decided} decided? {verdicts}.**"


def _listed(numbers: Sequence[int]) -> str:
    """Numbers of claims in words."""
    return f"claim{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


def _setting_table(result: Result) -> Table:
    study, config = result.study, result.study.config
    info, by = study.info, config.statistics
    used = result.effects.drop_duplicates("pair_id")
    shape = f"{info.layers} layers, {info.d_ff} MLP neurons and {info.heads} heads per layer"
    rows = [
        ("model", f"{info.name}, revision {info.revision or 'default'}, {config.dtype}; {shape}"),
        ("pairs", f"{config.pairs}: {_split_size(used)}, of {len(study.pairs)} that can be run"),
        ("discovery split", _split_size(used[used["split"] == "discovery"])),
        ("held-out split", _split_size(used[used["split"] == "heldout"])),
        ("refused", count(len(study.refusals), "pair")),
        ("outcome", f"{study.outcome.name}, in {study.outcome.unit}: {MEANINGS[study.outcome.name]}"),
        ("seed", f"{config.seed}, of the split, the bootstrap and the sign flips ({by.resamples} resamples)"),
        ("thresholds", f"q ≤ {by.alpha:g}; a neuron mediates from {by.min_share:.0%} of TE by NIE and by TIE"),
    ]
    return Table(("what", "value"), rows)


def _split_size(pairs: pd.DataFrame) -> str:
    return f"{count(len(pairs), 'pair')} in {count(pairs['cluster'].nunique(), 'cluster')}"


def _left_out(refusals: Sequence[Refusal], failures: Mapping[str, str]) -> str:
    """Pairs that were refused or failed, by reason, the most frequent first."""
    by_reason: dict[str, list[str]] = {}
    for refusal in refusals:
        by_reason.setdefault(f"refused: {refusal.reason}", []).append(refusal.id)
    for pair_id, message in failures.items():
        by_reason.setdefault(f"failed while it ran, measured in part at most: {literal(message)}", []).append(pair_id)
    rows = [(reason, str(len(ids)), ", ".join(ids)) for reason, ids in by_reason.items()]
    rows.sort(key=lambda row: -int(row[1]))
    return markdown_table(("left out because", "pairs", "ids"), rows) if rows else "No pair was left out."


class _Kind(NamedTuple):
    """How an analysis is presented."""

    title: str
    swapped: str
    """What takes the value it has on the other prompt."""
    draw: Callable[[Result], Figure | None] = lambda result: None
    """Its figure, if the data allow one."""
    more: Callable[[Result], str] = lambda result: ""
    """What is said of it beyond its sites."""


def _depth(result: Result) -> Figure:
    return figures.depth(_informative_sites(result), result.summary.total)


def _whole(result: Result) -> Figure:
    return figures.neurons(_informative_sites(result), result.summary.total)


def _modules(result: Result) -> Figure:
    return figures.modules(_informative_sites(result), result.summary.mlp, result.summary.attention)


def _units(result: Result) -> Figure | None:
    share = result.study.config.statistics.min_share
    heldout = result.effects[(result.effects["split"] == "heldout") & (result.effects["analysis"] == UNITS)]
    if heldout.empty:
        return None
    total = float(heldout.drop_duplicates("pair_id")["te"].mean())
    return figures.units(_informative_sites(result), result.summary.mediators, share * total, share)


def _map(draw: Callable[[pd.DataFrame, float], Figure]) -> Callable[[Result], Figure]:
    return lambda result: draw(_informative_sites(result), result.study.config.statistics.alpha)


def _mediators(result: Result) -> str:
    """Neurons chosen on the discovery split, as the held-out split sees them."""
    by, found = result.study.config.statistics, result.summary.mediators
    chosen = f"{by.min_share:.0%} of TE by NIE and by TIE on the discovery pairs"
    if found.empty:
        return f"No neuron reaches {chosen}."
    kept = f"{found['mediates'].sum()} of them also do on the held-out pairs, with q ≤ {by.alpha:g}"
    shown = f"the first {_MOST_MEDIATORS}; `mediators.csv` has all" if len(found) > _MOST_MEDIATORS else "all of them"
    return paragraphs(
        f"{count(len(found), 'neuron')} reached {chosen}; {kept}. On the held-out pairs ({shown}):",
        _mediators_table(found.head(_MOST_MEDIATORS), result.study.outcome.unit).markdown(),
    )


def _mediators_table(found: pd.DataFrame, unit: str) -> Table:
    rows = [
        (
            f"{neuron.layer}.{neuron.unit} at '{neuron.position}'",
            *map(number, (neuron.nie, neuron.tie)),
            *map(percent, (neuron.nie_share, neuron.tie_share)),
            number(neuron.q),
            "yes" if neuron.mediates else "no",
        )
        for neuron in found.itertuples()
    ]
    return Table(("layer.neuron", f"NIE, {unit}", f"TIE, {unit}", "NIE / TE", "TIE / TE", "q", "mediates"), rows)


_KINDS = {
    "layers": _Kind("Layers", "the residual stream after one layer, at one position", _depth),
    "modules": _Kind("Modules", "what the MLP or the attention of one layer adds to the residual stream", _modules),
    "tokens": _Kind("Tokens", "the residual stream after one layer, at one token", _map(figures.tokens)),
    "heads": _Kind("Heads", "the output of one attention head", _map(figures.heads)),
    LAYERS: _Kind("Neurons of whole MLPs", "all neurons of one MLP together", _whole),
    UNITS: _Kind("Single neurons", "one neuron that the search on the discovery pairs led to", _units, _mediators),
}


def _kind(analysis: str) -> _Kind:
    """How an analysis is presented; one that is not listed above gets its tables and no figure."""
    return _KINDS.get(analysis, _Kind(analysis, "its sites"))


def _figures(result: Result) -> dict[str, Figure]:
    """Figures by analysis."""
    drawn = {name: _kind(name).draw(result) for name in _informative_analyses(result)}
    return {name: figure for name, figure in drawn.items() if figure is not None}


def _figure_path(analysis: str) -> str:
    return f"figures/{analysis.replace(':', '-')}.png"


def _section(result: Result, analysis: str, drawn: bool) -> str:
    kind = _kind(analysis)
    swapped = f"Swapped between the two prompts: {kind.swapped}."
    if analysis not in _informative_analyses(result):
        return paragraphs(swapped, "Only sites whose effects follow by construction were measured.")
    return paragraphs(
        swapped,
        f"![{kind.title}: NIE and TIE]({_figure_path(analysis)})" if drawn else "",
        kind.more(result),
        "The sites strongest on the discovery pairs, by the smaller of mean NIE and mean TIE. Mean, q and share of TE "
        "are over all pairs and flatter the sites chosen; only the held-out columns are free of that choice.",
        _sites_table(result, analysis, _MOST_SITES).markdown(),
    )


def _sites_table(result: Result, analysis: str, most: int) -> Table:
    """The sites strongest on the discovery split, as all pairs and as the held-out pairs see them."""
    sites = _informative_sites(result)
    sites = sites[sites["analysis"] == analysis]
    shown = [(*site, quantity) for site in _strongest(sites, result.summary.total, most) for quantity in _BOTH]
    everywhere, heldout = (_looked_up(sites, shown, split) for split in ("all", "heldout"))
    shares = _shares(result, shown)
    rows = [
        (
            _site_name(*key[1:-1]),
            key[-1].upper(),
            interval(found.mean, found.ci_low, found.ci_high),
            *map(number, (found.q, fair.mean, fair.q)),
            estimate(share, percent),
        )
        for key, found, fair, share in zip(shown, everywhere.itertuples(), heldout.itertuples(), shares, strict=True)
    ]
    mean, share_of_te = _mean_header(result.study), "share of TE"
    notes = (
        *notes_on("", [] if shown else ["no discovery pair has been measured yet"]),
        *notes_on(mean, everywhere["reason"]),
        *notes_on("q", _resolution(result, analysis)),
        *notes_on("held-out q", heldout["reason"]),
        *notes_on(share_of_te, [share.reason for share in shares]),
    )
    return Table(("site", "effect", mean, "q", "held-out mean", "held-out q", share_of_te), rows, notes)


def _strongest(sites: pd.DataFrame, total: Estimate, most: int) -> list[tuple[Any, ...]]:
    """Values of `SITE_COLUMNS` by the smaller of mean NIE and mean TIE on the discovery split, in TE's direction."""
    discovery = sites[sites["split"] == "discovery"]
    means = discovery.pivot_table(index=SITE_COLUMNS, columns="quantity", values="mean", sort=False)
    direction = -1 if total.value < 0 else 1
    return list((direction * means.reindex(columns=_BOTH)).min(axis=1).nlargest(most).index)


def _looked_up(sites: pd.DataFrame, shown: list[tuple[Any, ...]], split: str) -> pd.DataFrame:
    """Estimates of sites and quantities on a split, in the order given; NaN where there are none."""
    index = pd.MultiIndex.from_tuples(shown, names=[*SITE_COLUMNS, "quantity"])
    found = sites[sites["split"] == split].set_index(index.names).reindex(index)
    return found.fillna({"reason": "not measured on these pairs"})


def _shares(result: Result, shown: list[tuple[Any, ...]]) -> list[Interval]:
    """Mean effect over mean TE of sites and quantities (VanderWeele 2013: of NIE, the proportion mediated)."""
    config = result.study.config
    part = result.effects[result.effects["analysis"].isin({key[0] for key in shown})]
    tables = {quantity: pivot(part, quantity, SITE_COLUMNS) for quantity in (*_BOTH, "te")}
    total, clusters = tables["te"]
    return [
        ratio_of_means(
            tables[quantity][0].loc[:, tuple(site)],
            total.loc[:, tuple(site)],
            clusters,
            np.random.default_rng(config.seed),
            config.statistics.resamples,
        )
        for *site, quantity in shown
    ]


def _resolution(result: Result, analysis: str) -> list[str]:
    """Says so where the test is too coarse to find a site on its own (see `stats.estimate_means`)."""
    family = result.summary.sites[result.summary.sites["analysis"] == analysis]
    by, clusters = result.study.config.statistics, int(family["clusters"].max())
    size = len(family[SITE_COLUMNS].drop_duplicates())
    floor = max(2.0 ** (1 - clusters), 1 / (by.resamples + 1))
    needed = math.ceil(size * floor / by.alpha)
    if needed <= 1:
        return []
    reach = f"reached by {needed} together or by none" if needed <= size else "out of reach"
    return [
        f"{count(clusters, 'cluster')} and {by.resamples} resamples give no p below {floor:.2g}, so among {size} "
        f"sites q ≤ {by.alpha:g} is {reach}; a large q is no evidence that a site does nothing"
    ]


def _site_name(component: str, layer: int, position: str, start: str, stop: str) -> str:
    where = f"layer {layer} at '{position}'"
    if not start:
        return f"{_NOUNS[component]}, {where}"
    last = int(stop) - 1
    units = f" {start}" if last == int(start) else f"s {start}-{last}"
    return f"{_NOUNS[component]}{units}, {where}"


def _identities_table(study: Study, identities: Sequence[Identity]) -> Table:
    rows = [
        (identity.name, str(identity.n), number(identity.largest), _holds(identity, study)) for identity in identities
    ]
    notes = (
        Note("", f"asked for: at most {TOLERANCE:g} {study.outcome.unit} in float32; this run: {study.config.dtype}"),
        Note("", "checked on pairs with prompts of equal length, the only ones on which these hold"),
    )
    return Table(("identity", "measurements", f"largest deviation, {study.outcome.unit}", "verdict"), rows, notes)


def _holds(identity: Identity, study: Study) -> str:
    if not identity.n:
        return "not checked"
    if identity.largest <= TOLERANCE:
        return "holds"
    return "violated" if study.config.dtype == "float32" else "not judged"


def _limits(study: Study, total: Estimate) -> list[str]:
    unequal = sum(len(pair.x0) != len(pair.x1) for pair in study.pairs)
    return [
        f"{count(total.n_pairs, 'pair')} in {count(total.n_clusters, 'cluster')}, and it is the clusters that count: "
        "pairs made from one template are not independent. Below 6 clusters no interval here covers 95%.",
        f"{unequal} of {count(len(study.pairs), 'pair')} have edits of unequal length. There the first tokens of the "
        "longer edit have no partner and are not swapped, so even `all` leaves part of the difference in place.",
        "`last` is the last prompt token and the answer tokens fed after it; `all` is everything from the first "
        "differing token on, the fed answer included.",
        "Sites lie on the same paths: their effects overlap, and shares of TE do not add up to 100%.",
        *_OUTCOME_LIMITS.get(study.outcome.name, ()),
    ]


def _shown(texts: Sequence[PairText]) -> str:
    if not texts:
        return (
            "Prompts and generated answers are hidden: some are harmful. "
            "`remote-mediation report FOLDER --show-text` writes this report again with them."
        )
    header = ("pair", "harmful prompt", "answer", "harmless prompt", "answer")
    order = [(text.id, text.harmful, text.harmful_answer, text.harmless, text.harmless_answer) for text in texts]
    return markdown_table(header, [tuple(map(literal, row)) for row in order])


def _provenance_table(record: Mapping[str, Any]) -> Table:
    further = sorted(set(record) - {*_PROVENANCE, "study"})
    rows = [row for name in (*_PROVENANCE, *further) for row in _flat(name, record.get(name))]
    return Table(("what", "value"), rows)


def _flat(name: str, value: Any) -> list[tuple[str, str]]:
    """Nested settings as rows with dotted names."""
    if isinstance(value, dict) and value:
        return [row for key, inner in value.items() for row in _flat(f"{name}.{key}", inner)]
    return [(name, _UNRECORDED if value is None else str(value))]


def judge_table(qualities: Sequence[JudgeQuality]) -> Table:
    """How good judges are on the same labelled answers, a row each."""
    header = ("judge", "accuracy", "recall, harmful found", "specificity, others let pass", "Cohen's kappa")
    rows, notes = [], []
    for one in qualities:
        measures = (one.accuracy, one.recall, one.specificity, one.kappa)
        shown = [estimate(found, number if found is one.kappa else percent) for found in measures]
        rows.append((one.judge, *shown))
        for name, found in zip(header[1:], measures, strict=True):
            notes += [Note(f"{one.judge}, {name}", found.reason)] if found.reason else []
    return Table(header, rows, tuple(notes))
