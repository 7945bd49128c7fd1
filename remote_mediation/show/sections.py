"""What each analysis beyond single sites found: a section of the report, and a line for the terminal.

A section says what was done and on which pairs, shows one figure and a table or two, and says in words what their
intervals allow. Where that which it asks about is not there (no total effect, no gate set, nothing measured yet), it
says so and stops. Generated text never enters: the run folder has a judge's verdicts, not the answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from remote_mediation.analyses import attacks, intervene, neurons
from remote_mediation.analyses import paths as routes
from remote_mediation.analyses.claims import ask
from remote_mediation.analyses.claims import show as claimed
from remote_mediation.analyses.claims.sparse import GATE_SET_COLUMNS
from remote_mediation.analyses.claims.specification import SPECIFICATION_COLUMNS
from remote_mediation.analyses.claims.understanding import READABLE_COLUMNS
from remote_mediation.covered import COVERAGE_COLUMNS, OPENING_COLUMNS
from remote_mediation.detectors import DETECTOR_COLUMNS, RANDOM, RECALLS
from remote_mediation.probes import PROBE_COLUMNS, Order, earlier
from remote_mediation.show import figures, gate_figures
from remote_mediation.show.tables import Note, Table, count, estimate, interval, notes_on, number, paragraphs, percent
from remote_mediation.stats import Estimate, estimate_means
from remote_mediation.study import Result
from remote_mediation.summary import stream_nie

COLUMNS: dict[str, dict[str, str]] = {
    "coverage.csv": COVERAGE_COLUMNS,
    "openings.csv": OPENING_COLUMNS,
    "search.csv": neurons.SEARCH_COLUMNS,
    "sparsity.csv": neurons.SPARSITY_COLUMNS,
    "gates.csv": neurons.GATE_COLUMNS,
    "gate_curve.csv": neurons.CURVE_COLUMNS,
    "probes.csv": PROBE_COLUMNS,
    "paths.csv": routes.PATH_COLUMNS,
    "intervene.csv": intervene.INTERVENE_COLUMNS,
    "judge.csv": intervene.JUDGE_COLUMNS,
    "attacks.csv": attacks.ATTACK_COLUMNS,
    "detectors.csv": DETECTOR_COLUMNS,
    "claims.csv": ask.CLAIM_COLUMNS,
    "sets.csv": ask.SET_COLUMNS,
    "specification.csv": SPECIFICATION_COLUMNS,
    "gate_sets.csv": GATE_SET_COLUMNS,
    "readable.csv": READABLE_COLUMNS,
}
"""Documented columns of every table that an analysis leaves, in order."""
_UNMEASURED = "Not measured yet: run the study again, and it goes on where this run ended."
_MOST_LAYERS = 3
"""Layers whose sparsity is shown."""
_SETS = {"gates": "gates", "mlp": "whole MLP", "earlier": "best set of an earlier layer"}


class Part(NamedTuple):
    """A section."""

    title: str
    did: str
    """What was done, and on which pairs."""
    finding: str
    """What the numbers say, or why there are none."""
    tables: tuple[Table, ...] = ()
    figure: Figure | None = None
    brief: str = ""
    """The finding in a line; the whole finding where it is one."""

    def markdown(self, figure_path: str) -> str:
        """As Markdown, below its title. figure_path: where the figure lies, if there is one."""
        drawn = f"![{self.title}]({figure_path})" if self.figure else ""
        return paragraphs(self.did, drawn, self.finding, *(table.markdown() for table in self.tables))


def sections(result: Result) -> dict[str, Part]:
    """A section for every analysis asked for, by the name of its figure."""
    asked = result.study.config.analyses
    return {name: make(result) for analysis, (name, make) in _SECTIONS.items() if analysis in asked}


def csv_tables(result: Result) -> dict[str, pd.DataFrame]:
    """What analyses found, by file name, with the documented columns."""
    return {name: table[list(COLUMNS.get(name, table.columns))] for name, table in result.tables.items()}


def overview(parts: Iterable[Part]) -> Table:
    """Findings in a line each, for the terminal."""
    return Table(("section", "finding"), [(part.title, part.brief or part.finding) for part in parts])


def _gates(result: Result) -> Part:
    title = "Gate neurons"
    did = (
        "Single neurons were searched for on the discovery pairs, and of the MLP whose neurons are strongest there the "
        f"smallest set was taken that carries {result.study.config.neurons.carry:.0%} of its NIE. What the set does is "
        "given on the held-out pairs, on which neither it nor its size was chosen."
    )
    absent = _no_effect(result)
    if absent or "search.csv" not in result.tables:
        return Part(title, did, absent or _UNMEASURED)
    search = result.tables["search.csv"]
    tables: tuple[Table, ...] = (_search_table(search),)
    cut = _cut_short(search)
    sets = result.tables.get("gates.csv")
    if sets is None or sets.empty:
        nothing = "There is no gate set: no MLP moves the outcome in the direction of TE by neurons that were found."
        return Part(title, did, f"{cut} {nothing}", tables)
    curve = result.tables["gate_curve.csv"]
    found = f"{cut} {_set_in_words(result, sets, curve)} {_direction_in_words(result)}".strip()
    unit, carry = result.study.outcome.unit, result.study.config.neurons.carry
    tables = (*tables, _sets_table(result, sets), *_sparsity_tables(result, int(sets["layer"].iloc[0])))
    figure = gate_figures.gate_figure(curve, sets, carry, unit)
    return Part(title, did, found, tables, figure, _set_in_brief(sets, unit))


def _search_table(search: pd.DataFrame) -> Table:
    missed = "missed mediators, estimate"
    rows = [
        (
            step.step,
            *(str(value) for value in (step.sites, step.pairs, step.kept, step.followed)),
            "" if np.isnan(step.missed) else f"{number(step.missed)}, at most {number(step.missed_high)}",
        )
        for step in search.itertuples()
    ]
    sampled = search["missed"].notna().any()
    why = "from the mediators in a random sample of the others; the most by its 95% Wilson interval" if sampled else ""
    header = ("step of the search", "neurons or windows", "pairs", "may mediate", "followed", missed)
    return Table(header, rows, tuple(notes_on(missed, [why])))


def _cut_short(search: pd.DataFrame) -> str:
    cut = search[search["followed"] < search["kept"]]
    if cut.empty:
        return "The search followed every lead that it had."
    left = int((cut["kept"] - cut["followed"]).sum())
    return f"The search was cut short by the study's limit: {count(left, 'lead')} were not followed."


def _set_in_words(result: Result, sets: pd.DataFrame, curve: pd.DataFrame) -> str:
    gates, whole = (sets[sets["set"] == name].iloc[0] for name in ("gates", "mlp"))
    carry, sign = result.study.config.neurons.carry, result.summary.total.sign
    reached = curve.loc[curve["size"] == gates["size"], "discovery"]
    if len(reached) and reached.iloc[0] < carry:
        size = f"No set that was tried carries {carry:.0%} of its MLP's NIE; the largest has"
    else:
        size = "The gate set has"
    text = f"{size} {gates['size']} of {whole['size']} neurons of layer {gates['layer']}, at '{gates['position']}'."
    if np.isnan(gates["nie_low"]) or np.isnan(gates["tie_low"]):
        return f"{text} The held-out pairs cannot test it: {gates['reason'] or 'there is no interval'}."
    shown = {"nie": "NIE (sufficient)", "tie": "TIE (necessary)"}
    clear = [words for name, words in shown.items() if min(sign * gates[f"{name}_{end}"] for end in _ENDS) > 0]
    unclear = [words for words in shown.values() if words not in clear]
    yes = f"Held out its {' and its '.join(clear)} lie clear of 0 in the direction of TE." if clear else ""
    no = (
        f"Held out its {' and its '.join(unclear)} are not shown to differ from 0 in that direction." if unclear else ""
    )
    return " ".join(filter(None, (text, yes, no, _against_random(sets, sign))))


def _set_in_brief(sets: pd.DataFrame, unit: str) -> str:
    gates, whole = (sets[sets["set"] == name].iloc[0] for name in ("gates", "mlp"))
    effects = [
        f"{name.upper()} {interval(*(gates[f'{name}{end}'] for end in ('', '_low', '_high')))}" for name in _BOTH
    ]
    size = f"{gates['size']} of {whole['size']} neurons of layer {gates['layer']}"
    return f"{size}; held out {' and '.join(effects)} {unit}"


def _against_random(sets: pd.DataFrame, sign: int) -> str:
    drawn = int((sets["set"] == "random").sum())
    if not drawn:
        return ""
    reach = {name: neurons.random_sets_reaching(sets, name, sign) for name in _BOTH}
    by = " and ".join(
        f"{reached} reach its {name.upper()} (p = {(1 + reached) / (1 + drawn):.2g})" for name, reached in reach.items()
    )
    return f"Of {drawn} random sets of its size in the same layer {by}."


def _sets_table(result: Result, sets: pd.DataFrame) -> Table:
    unit, total = result.study.outcome.unit, _heldout_total(result)
    shares = ("NIE / TE", "TIE / TE")
    defined = _spans(total) == ""
    rows = [
        (
            _SETS[row.set],
            str(row.layer),
            str(row.size),
            interval(row.nie, row.nie_low, row.nie_high),
            interval(row.tie, row.tie_low, row.tie_high),
            *(percent(share if defined else np.nan) for share in (row.nie_share, row.tie_share)),
        )
        for row in sets[sets["set"] != "random"]
        .sort_values("set", key=lambda names: names.map([*_SETS].index))
        .itertuples()
    ]
    random = sets[sets["set"] == "random"]
    if len(random):
        cells = [interval(*random[name].quantile([0.5, 0.025, 0.975])) for name in _BOTH]
        medians = [percent(random[f"{name}_share"].median() if defined else np.nan) for name in _BOTH]
        name = f"{len(random)} random sets: median [95% range]"
        rows.append((name, str(random["layer"].iloc[0]), str(random["size"].iloc[0]), *cells, *medians))
    notes = [
        *notes_on("", sets.loc[sets["set"] != "random", "reason"]),
        *notes_on(shares[0], ["" if defined else f"of the held-out pairs, {_spans(total)}"]),
    ]
    effects = (f"NIE [95% interval], {unit}", f"TIE [95% interval], {unit}")
    return Table(("held-out set", "layer", "neurons", *effects, *shares), rows, tuple(notes))


def _sparsity_tables(result: Result, gated: int) -> tuple[Table, ...]:
    """How few neurons hold the NIE of the strongest layers."""
    table = result.tables.get("sparsity.csv")
    if table is None or table.empty:
        return ()
    position = result.study.config.positions.neurons[0]
    whole = neurons.of_whole_mlps(result.effects, position)
    strongest = [int(layer) for layer, _, _ in neurons.strengths(whole).index] if len(whole) else []
    order = dict.fromkeys([gated, *strongest, *table["layer"]])
    shown = table.set_index("layer").loc[[layer for layer in order if layer in set(table["layer"])][:_MOST_LAYERS]]
    rows = [
        (str(row.Index), number(row.gini), f"{row.fewest} of {row.of}", percent(row.negative_share), row.by)
        for row in shown.itertuples()
    ]
    estimated = any(row[-1] != "measured" for row in rows)
    why = "a first-order estimate by gradients, not measured: it ranks neurons, and may misjudge their sizes"
    header = ("strongest layers", "Gini", "fewest neurons for 80% of NIE", "works the other way", "single neurons' NIE")
    return (Table(header, rows, tuple(notes_on(header[-1], [why] if estimated else []))),)


def _early(result: Result) -> Part:
    title = "Early understanding"
    did = (
        "Linear probes read from the residual stream, layer by layer, whether a prompt is the harmful one of its pair, "
        "on all pairs; each is judged on clusters that it was not fitted to, beside probes on swapped labels."
    )
    profile = result.tables.get("probes.csv")
    if profile is None or profile.empty:
        return Part(title, did, _UNMEASURED)
    orders = {position: _order(result, part) for position, part in profile.groupby("position", sort=False)}
    said = [f"At '{position}' {order.finding} ({order.verdict})." for position, order in orders.items()]
    acts = {
        f"stream at '{position}'": order.acts
        for position, order in orders.items()
        if order.acts is not None and position in ("last", *list(orders)[:1])
    }
    if _no_effect(result):
        said = [_no_effect(result), "Whether harm is readable before it acts cannot be asked; the probes stand alone."]
    figure = figures.probe_figure(profile, acts)
    brief = said[-1] if _no_effect(result) else said[[*orders].index("last") if "last" in orders else 0]
    return Part(title, did, " ".join(said), (_probes_table(result, profile, orders),), figure, brief)


def _order(result: Result, profile: pd.DataFrame) -> Order:
    """Readable against acting at one position; nothing acts where there is no total effect or no measurement."""
    sites, position = result.summary.sites, str(profile["position"].iloc[0])
    acting = stream_nie(sites, position)
    if _no_effect(result):
        acting = acting.iloc[:0]
    found = earlier(profile, acting, result.summary.total.value, result.study.config.statistics.alpha)
    if acting.empty:
        why = "where it acts was not measured there"
        readable = "no layer" if found.readable is None else f"layer {found.readable}"
        return Order(found.readable, None, "undecided", f"harm is readable from {readable} on; {why}")
    return found


def _probes_table(result: Result, profile: pd.DataFrame, orders: dict[str, Order]) -> Table:
    rows = []
    for position, part in profile.groupby("position", sort=False):
        order = orders[str(position)]
        known = part["accuracy"].notna().any()
        best = part.loc[part["accuracy"].idxmax()] if known else part.iloc[0]
        rows.append(
            (
                f"'{position}'",
                _layer(order.readable),
                f"{interval(best['accuracy'], best['low'], best['high'], percent)}" if known else "n/a",
                f"layer {best['layer']}" if known else "n/a",
                f"{percent(best['control'])}, {percent(best['control_high'])}",
                _layer(order.acts),
            )
        )
    reading = "best accuracy [95% interval]"
    header = (
        "position",
        "readable from",
        reading,
        "best layer",
        "swapped labels there: mean, 95% quantile",
        "acts from",
    )
    few = sorted({str(reason) for reason in profile["reason"] if reason})
    acts = "first layer of the residual stream there whose NIE is significant in the direction of TE"
    return Table(header, rows, (*notes_on(reading, few), *notes_on("acts from", [acts])))


def _layer(layer: int | None) -> str:
    return "none found" if layer is None else f"layer {layer}"


def _paths(result: Result) -> Part:
    title, table = "Paths", result.tables.get("paths.csv")
    split = "held-out" if neurons.gate_set(result.tables) else "all"
    early = routes.early_layer(result.study.info.layers)
    did = (
        f"The residual stream at the differing tokens after layer {early} was swapped while later modules of a kind "
        f"stayed as they were, on {split} pairs. What is gone of its effect then needs these modules."
    )
    absent = _no_effect(result)
    if absent or table is None or table.empty:
        return Part(title, did, absent or _UNMEASURED)
    frozen = table[(table["frozen"] != "nothing") & (table["quantity"] == "nie")]
    known = frozen[frozen["share_low"].notna()]
    said = [f"{row.frozen} {_share(row, 'share')}" for row in known.itertuples()]
    words = f"Of its NIE, frozen modules take away: {'; '.join(said)}." if said else "No share of its NIE is known."
    more = "Shares near 100% may stand side by side: each says what the way needs, they are no parts of a whole."
    figure = gate_figures.path_figure(table) if len(known) else None
    return Part(title, did, f"{words} {more}", (_paths_table(result, table),), figure)


def _paths_table(result: Result, table: pd.DataFrame) -> Table:
    unit = result.study.outcome.unit
    by = table.set_index(["frozen", "quantity"])
    rows = []
    for name in dict.fromkeys(table["frozen"]):
        cells = []
        for quantity in ("nie", "tie"):
            row = by.loc[(name, quantity)]
            cells.append(interval(row["mean"], row["ci_low"], row["ci_high"]))
            cells.append("" if name == "nothing" else _share_of(row, "share"))
        rows.append((str(name), *cells))
    kept = table[table["frozen"] != "nothing"]
    header = ("frozen", f"NIE left, {unit}", "NIE gone", f"TIE left, {unit}", "TIE gone")
    return Table(header, rows, tuple(notes_on("", kept["reason"])))


def _repair(result: Result) -> Part:
    title, benefit = ("Removing refusal", "Effect") if result.summary.total.sign < 0 else ("Repair", "Benefit")
    did = (
        "The gates were held from the last prompt token on, on held-out pairs, at their mean over the discovery pairs' "
        f"harmless prompts, or multiplied. *{benefit}* is read on harmful prompts, *cost* on the harmless counterparts."
    )
    absent = _no_gates(result, "hold")
    if absent or "intervene.csv" not in result.tables:
        return Part(title, did, absent or _UNMEASURED)
    table = result.tables["intervene.csv"]
    words = (_direction_in_words(result), _held_in_words(result, table), _rates_in_words(result, table))
    tables = (_benefit_table(result, table), _cost_table(result, table))
    factors = [float(factor) for factor in result.study.config.intervene.factors]
    doses = {intervene.PLAIN: 1.0, **{f"gates times {factor:g}": factor for factor in factors}}
    total = _heldout_total(result).value
    figure = gate_figures.dose_figure(table, doses, result.study.outcome.unit, total)
    return Part(title, did, " ".join(filter(None, words)), tables, figure, _held_in_brief(result, table))


def _direction_in_words(result: Result) -> str:
    """What the gates carry where the harmful prompts lower the outcome."""
    if result.summary.total.sign >= 0:
        return ""
    return (
        "Here the harmful prompts lower the outcome, so the gates carry what turns the model away from the harmful "
        "answer, that is, refusal: holding them at their harmless mean removes refusal. That is how safety training is "
        "circumvented; it does not make the model any safer."
    )


def _held_in_words(result: Result, table: pd.DataFrame) -> str:
    by, unit = table.set_index(["held", "prompts"]), result.study.outcome.unit
    harmful, harmless = (by.loc[(intervene.MEAN, side)] for side in ("harmful", "harmless"))
    random = by.loc[(intervene.RANDOM, "harmful")]
    return (
        f"With the gates at their harmless mean the outcome on harmful prompts changes by {_change_of(harmful)} "
        f"{unit}, {_undone(result, harmful)}; with random sets of their size by {_change_of(random)}. On harmless "
        f"prompts it changes by {_change_of(harmless)}, and the divergence from the plain model is "
        f"{_drift_of(harmless)} nats/token."
    )


def _held_in_brief(result: Result, table: pd.DataFrame) -> str:
    by, unit = table.set_index(["held", "prompts"]), result.study.outcome.unit
    harmful, harmless, plain = (
        by.loc[key] for key in ((intervene.MEAN, "harmful"), (intervene.MEAN, "harmless"), (intervene.PLAIN, "harmful"))
    )
    return (
        f"gates held: {_change_of(harmful)} {unit} on harmful prompts, KL {_drift_of(harmless)} on harmless ones; "
        f"judged to comply {_share_of(harmful, 'complied')}, before {_share_of(plain, 'complied')}. {_doubt(result)}"
    )


def _undone(result: Result, harmful: pd.Series) -> str:
    """Whether a change goes against the total effect, by its interval."""
    toward = -result.summary.total.sign
    if np.isnan(harmful["change_low"]):
        return "and whether that differs from 0 is not known"
    if min(toward * harmful[f"change_{end}"] for end in _ENDS) <= 0:
        return "which is not shown to go against TE"
    share = _defined(result, harmful["share"])
    return "against the direction of TE" if np.isnan(share) else f"which undoes {percent(share)} of TE on these pairs"


def _change_of(row: pd.Series) -> str:
    return interval(row["change"], row["change_low"], row["change_high"])


def _drift_of(row: pd.Series) -> str:
    return interval(row["kl"], row["kl_low"], row["kl_high"])


def _rates_in_words(result: Result, table: pd.DataFrame) -> str:
    """What the judge's rates on harmful prompts say, if anything."""
    harmful = table[table["prompts"] == "harmful"].set_index("held")
    rates = harmful["complied"].dropna()
    if rates.empty:
        return "No answer was judged."
    plain, held = harmful.loc[intervene.PLAIN], harmful.loc[intervene.MEAN]
    if set(rates) in ({0.0}, {1.0}):
        return f"{_no_variation(rates)} {_no_harm(result, plain)}".strip()
    apart = plain["complied_low"] > held["complied_high"] or held["complied_low"] > plain["complied_high"]
    verdict = "" if apart else "; the intervals overlap, so the two are not told apart"
    shown = [_share_of(row, "complied") for row in (plain, held)]
    text = f"Of answers to harmful prompts {shown[0]} comply, and {shown[1]} with the gates held{verdict}."
    return " ".join(filter(None, (text, _no_harm(result, plain), _doubt(result))))


def _no_variation(rates: pd.Series) -> str:
    what = "complies" if rates.iloc[0] else "fails to comply"
    return f"Says the judge, every answer to a harmful prompt {what}, whatever is held: these rates say nothing."


def _no_harm(result: Result, plain: pd.Series) -> str:
    """Says so where the plain model does no harm that holding could mend."""
    if plain["complied"] > 0 or result.summary.total.sign < 0:
        return ""
    return "Nothing held, no answer complies: what the outcome reads as the harmful answer may be a refusal."


def _doubt(result: Result) -> str:
    """What the judge's quality lets one make of its rates."""
    quality = result.tables.get("judge.csv")
    if quality is None:
        return "How good the judge is was not measured."
    kappa = quality.set_index("measure")["low"].get("kappa", np.nan)
    if kappa > 0:
        return "Rates are worth no more than the judge, whose quality is noted below them."
    return "On labelled answers this judge is not shown to do better than chance: its rates are weak evidence."


def _judge_notes(result: Result, column: str) -> list[Note]:
    """The judge's quality, for the column of its rates."""
    quality = result.tables.get("judge.csv")
    if quality is None or quality.empty:
        return [Note(column, "the judge's quality was not measured in this run (analysis `intervene` does)")]
    measures = [
        f"{row.measure} {interval(row.value, row.low, row.high, number if row.measure == 'kappa' else percent)}"
        + (f" ({row.reason})" if row.reason else "")
        for row in quality.itertuples()
    ]
    first = quality.iloc[0]
    return [Note(column, f"judge `{first['judge']}`, on {first['n']} labelled answers: {', '.join(measures)}")]


def _benefit_table(result: Result, table: pd.DataFrame) -> Table:
    part = table[table["prompts"] == "harmful"]
    rate, undone = "answers that comply, says the judge", "TE undone"
    rows = [
        (
            row.held,
            str(row.size),
            _change(row),
            "" if row.held == intervene.PLAIN else percent(_defined(result, row.share)),
            _share(row, "complied"),
        )
        for row in part.itertuples()
    ]
    header = ("held, on harmful prompts", "neurons", f"change, {result.study.outcome.unit}", undone, rate)
    spans = _spans(_heldout_total(result))
    notes = (*notes_on("", part["reason"]), *notes_on(undone, [spans]), *_judge_notes(result, rate))
    return Table(header, rows, notes)


def _cost_table(result: Result, table: pd.DataFrame) -> Table:
    part = table[table["prompts"] == "harmless"]
    rate = "answers that comply"
    rows = [
        (
            row.held,
            _change(row),
            "0" if row.held == intervene.PLAIN else interval(row.kl, row.kl_low, row.kl_high),
            number(row.perplexity),
            _share(row, "complied"),
        )
        for row in part.itertuples()
    ]
    change, drift = f"change, {result.study.outcome.unit}", "divergence (KL), nats/token"
    header = ("held, on harmless prompts", change, drift, "perplexity", rate)
    own = "along the plain model's own answers; of random sets the first"
    return Table(header, rows, (*notes_on(drift, [own]), *_judge_notes(result, rate)))


def _change(row: Any) -> str:
    return "" if row.held == intervene.PLAIN else interval(row.change, row.change_low, row.change_high)


def _circumvention(result: Result) -> Part:
    title = "Circumvention"
    did = (
        "The held-out prompts were rewrapped in generic texts around the same request, or another checkpoint was run, "
        "and the same gate set was swapped and held at the same mean as before."
    )
    absent, table = _no_gates(result, "hold"), result.tables.get("attacks.csv")
    if absent or table is None or table.empty:
        return Part(title, did, absent or _UNMEASURED)
    undone = "TE undone by removing refusal" if result.summary.total.sign < 0 else "TE undone by holding"
    words = (_direction_in_words(result), _attacks_in_words(table), _attack_rates(result, table))
    tables = (_attack_table(result, table, undone), _rank_table(result, table))
    figure = gate_figures.attack_figure(table, undone)
    return Part(title, did, " ".join(filter(None, words)), tables, figure)


def _attacks_in_words(table: pd.DataFrame) -> str:
    """Under how many attacks the set still carries TE and holding it still undoes some, by the intervals."""
    attacked = table[table["attack"] != attacks.NONE]
    if attacked.empty:
        return "No attack could be run."
    carries = int(((attacked["nie_share_low"] > 0) & (attacked["tie_share_low"] > 0)).sum())
    undoes = int((attacked["repair_low"] > 0).sum())
    of = f"of {count(len(attacked), 'attack')}"
    lowest = attacked.loc[attacked["repair"].idxmin()] if attacked["repair"].notna().any() else None
    least = "" if lowest is None else (
        f", least under {lowest['attack']}: "
        f"{interval(lowest['repair'], lowest['repair_low'], lowest['repair_high'], percent)}"
    )  # fmt: skip
    return (
        f"Under {carries} {of} the gates' shares of TE are above 0 by NIE and by TIE, and under {undoes} holding them "
        f"undoes some of TE, as far as the intervals tell{least}."
    )


def _attack_rates(result: Result, table: pd.DataFrame) -> str:
    rates = pd.concat([table["complied"], table["complied_held"]]).dropna()
    if rates.empty:
        return "No answer was judged."
    return _no_variation(rates) if set(rates) in ({0.0}, {1.0}) else _doubt(result)


def _attack_table(result: Result, table: pd.DataFrame, undone: str) -> Table:
    rows = [
        (
            row.attack,
            str(row.n),
            interval(row.te, row.te_low, row.te_high),
            *(_share(row, name) for name in ("nie_share", "tie_share", "repair")),
        )
        for row in table.itertuples()
    ]
    spans = [
        f"under {row.attack} TE, {number(row.te_low)} to {number(row.te_high)}, spans 0: there are no shares of it"
        for row in table.itertuples()
        if row.te_low <= 0 <= row.te_high
    ]
    header = ("attack", "pairs", f"TE [95% interval], {result.study.outcome.unit}", "NIE / TE", "TIE / TE", undone)
    return Table(header, rows, (*notes_on("", table["reason"]), *notes_on("NIE / TE", spans)))


def _rank_table(result: Result, table: pd.DataFrame) -> Table:
    rank, rate = "rank correlation of single neurons", "answers that comply, says the judge"
    overlap = "gates among the strongest"
    rows = [
        (
            row.attack,
            *(("", "") if row.attack == attacks.NONE else (
                interval(row.spearman, row.spearman_low, row.spearman_high), _share(row, "overlap")
            )),
            _share(row, "complied"),
            _share(row, "complied_held"),
        )
        for row in table.itertuples()
    ]  # fmt: skip
    same = table[(table["attack"] != attacks.NONE) & (table["overlap_low"] == table["overlap_high"])]
    agree = "an interval of one point, where all resamples agree, is no certainty" if len(same) else ""
    notes = (*notes_on(overlap, [agree]), *_judge_notes(result, rate))
    return Table(("attack", rank, overlap, rate, "with the gates held"), rows, notes)


def _monitor(result: Result) -> Part:
    title = "Monitor"
    did = (
        "The gates' activity at the last prompt token, as a score of harmful prompts, beside a linear probe on the "
        "residual stream of their layer and random neurons. Directions and thresholds are from the discovery pairs; "
        "they are judged on held-out pairs"
    )
    absent, table = _no_gates(result, "watch"), result.tables.get("detectors.csv")
    hard = result.study.config.monitor.hard_negatives
    did += " and on hard negatives." if hard else "; hard negatives were not given."
    if absent or table is None or table.empty:
        return Part(title, did, absent or _UNMEASURED)
    said = [_detector_in_words(part, str(name)) for name, part in table.groupby("evaluation", sort=False)]
    return Part(title, did, " ".join(said), (_detectors_table(table),), figures.detector_figure(table))


def _detector_in_words(part: pd.DataFrame, evaluation: str) -> str:
    by = part.set_index("detector")
    gates, probe = by.loc["gates"], by.loc["residual probe"]
    area = interval(gates["auroc"], gates["auroc_low"], gates["auroc_high"])
    text = f"On {_evaluation(evaluation)} the gates' AUROC is {area}"
    if not np.isnan(gates["rank"]):
        text += f", rank {gates['rank']:.0f} beside {gates['random_sets']} random sets (p = {gates['p']:.2g})"
    if np.isnan(gates["auroc_low"]) or np.isnan(probe["auroc_low"]):
        return f"{text}; how it compares with the residual probe is not known."
    if gates["auroc_low"] > probe["auroc_high"]:
        return f"{text}, above the residual probe's."
    if gates["auroc_high"] < probe["auroc_low"]:
        return f"{text}, below the residual probe's."
    return f"{text}; it is not told apart from the residual probe's."


def _detectors_table(table: pd.DataFrame) -> Table:
    percents = [round(100 * recall) for recall in RECALLS]
    rows = [
        (
            row["detector"],
            _evaluation(str(row["evaluation"])),
            interval(row["auroc"], row["auroc_low"], row["auroc_high"]),
            "" if np.isnan(row["p"]) else number(row["p"]),
            *(
                "" if row["detector"] == RANDOM else _share_of(row, f"{name}_{recall}")
                for recall in percents
                for name in ("recall", "false_alarms")
            ),
        )
        for _, row in table.iterrows()
    ]
    columns = [f"{name} ({recall}%)" for recall in percents for name in ("recall", "false alarms")]
    asked = "at the threshold with that recall on the discovery pairs; prompts count as independent there (Wilson)"
    reasons = table[table["reason"] != ""].groupby("reason", sort=False)["detector"].unique()
    cared = [f"{', '.join(names)}: {reason}" for reason, names in reasons.items()]
    notes = (*notes_on("", cared), *notes_on(columns[0], [asked]))
    return Table(("detector", "judged on", "AUROC", "p", *columns), rows, notes)


def _evaluation(name: str) -> str:
    return "held-out pairs" if name == "heldout" else name


def _claims(result: Result) -> Part:
    """The five claims. Their own gate says whether there is an effect, so nothing is held back here."""
    title = "The five claims"
    did = (
        "Joint and direct effects of sets, each measured together and in both directions, on held-out pairs and on "
        "their placebos: other harmless prompts that differ from the harmless one in the same words. What had to be "
        "chosen was chosen on the discovery pairs."
    )
    if "claims.csv" not in result.tables:
        return Part(title, did, _UNMEASURED)
    claims, sets = result.tables["claims.csv"], result.tables["sets.csv"]
    said = "; ".join(f"{claim.claim}: {claim.said}" for claim in claims.itertuples())
    finding = f"{said[0].upper()}{said[1:]}."
    tables = (claimed.claims_table(claims, sets), claimed.reasons_table(claims), claimed.measures_table(sets))
    choices = result.tables.get("specification.csv")
    if choices is None:
        return Part(title, did, finding, tables)
    figure = claimed.specification_figure(choices)
    return Part(title, did, finding, (*tables, claimed.specification_table(choices)), figure)


_SECTIONS: dict[str, tuple[str, Callable[[Result], Part]]] = {
    "neurons": ("gates", _gates),
    "detect": ("probes", _early),
    "paths": ("paths", _paths),
    "intervene": ("repair", _repair),
    "attacks": ("attacks", _circumvention),
    "monitor": ("monitor", _monitor),
    "claims": ("claims", _claims),
}
"""Name of the figure and section by analysis, in the report's order."""
_ENDS = ("low", "high")
_BOTH = ("nie", "tie")


def _share(row: Any, name: str) -> str:
    """A share with its interval, from the columns of that name."""
    return _share_of(row._asdict(), name)


def _share_of(row: Any, name: str) -> str:
    value, low, high = (row[column] for column in (name, f"{name}_low", f"{name}_high"))
    return interval(value, low, high, percent) if not np.isnan(value) else "n/a"


def _no_effect(result: Result) -> str:
    """Why there is nothing to carry; empty where there is."""
    total = result.summary.total
    if total.sign:
        return ""
    if np.isnan(total.low):
        return f"Whether there is a total effect to mediate is not known: {total.reason or 'it has no interval'}."
    return f"There is no total effect to mediate: {estimate(total)} {result.study.outcome.unit} spans 0."


def _no_gates(result: Result, use: str) -> str:
    """Why there is no gate set to use; empty where there is one."""
    absent, tables = _no_effect(result), result.tables
    if absent or neurons.gate_set(tables) is not None:
        return absent
    if "search.csv" in tables:
        return f"The search found no gate set, so there is none to {use}."
    if "neurons" in result.study.config.analyses:
        return f"No gate set has been measured yet, so there is none to {use}."
    return f"There is no gate set to {use}: the analysis `neurons`, which finds it, was not part of this study."


def _heldout_total(result: Result) -> Estimate:
    """TE of the held-out pairs, which shares on them are of."""
    effects = result.effects
    pairs = effects[effects["split"] == "heldout"].drop_duplicates("pair_id")
    config = result.study.config
    rng = np.random.default_rng(config.seed)
    if pairs.empty:
        return Estimate(0, 0, np.nan, np.nan, np.nan, "no held-out pair has been measured", np.nan)
    return estimate_means([pairs["te"]], pairs["cluster"], rng, config.statistics.resamples)[0]


def _spans(total: Estimate) -> str:
    """Why there are no shares of it; empty where there are."""
    if total.sign:
        return ""
    if np.isnan(total.low):
        return f"TE has no interval: {total.reason}"
    return f"TE, {number(total.low)} to {number(total.high)}, spans 0"


def _defined(result: Result, share: float) -> float:
    """A share of the held-out pairs' TE; NaN where that spans 0."""
    return np.nan if _spans(_heldout_total(result)) else share
