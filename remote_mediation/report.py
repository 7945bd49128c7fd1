"""From a measured study to what people read: `report.md`, figures and CSV files in the run folder.

Nothing is estimated here: `summary` and the analyses have. Numbers have three significant digits (`markdown`); the CSV
files have all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from remote_mediation.analyses.total.show import covered, hardly_defined
from remote_mediation.config import StudyConfig
from remote_mediation.effects import EFFECT_COLUMNS
from remote_mediation.errors import SettingsError
from remote_mediation.judges import JudgeQuality
from remote_mediation.lab import Study
from remote_mediation.pairs import BUILTIN, load_pairs
from remote_mediation.rendering import BARE, THOUGHTS
from remote_mediation.result import Result
from remote_mediation.shares import ANY_EDIT
from remote_mediation.show import figures
from remote_mediation.show.made import UNKNOWN, command, differing, made_in_words
from remote_mediation.show.section import Section, Verdict
from remote_mediation.show.sites import site_section
from remote_mediation.show.tables import (
    Note,
    Table,
    bullets,
    count,
    csv_text,
    estimate,
    literal,
    markdown_table,
    number,
    paragraphs,
    percent,
)
from remote_mediation.show.words import in_groups
from remote_mediation.stats import Estimate
from remote_mediation.store import Store
from remote_mediation.study import PLACEBOS
from remote_mediation.summary import SUMMARY_COLUMNS, Identity
from remote_mediation.tokens import Refusal, TokenPair

TOLERANCE = 1e-4
"""Largest deviation from an identity that float32 explains, in the outcome's unit."""

_PROVENANCE = ("model", "config", "outcome", "versions", "git", "host", "started", "finished", "seconds")
"""Keys of `run.json` that every report shows, recorded or not."""
_SIGNS = {
    1: "The harmful prompts raise the outcome: the total effect (TE) is {size}.",
    0: "The total effect (TE) is {size}, not told apart from 0: without an effect there is no place of it to find.",
    -1: "The harmful prompts lower the outcome: the total effect (TE) is {size}. What is found below carries this "
    "drop, not harmful text.",
}
"""What the sign of TE means for everything else."""
_EMPTY = {"model.revision": "the default one", "model.window": "none"}
"""What an empty value says in the table of provenance, where it is not that something is unknown."""
_OTHER_NUMBERS = {"claim 4": "a gain in accuracy, in percentage points", "claim 5": "the mean of NIE and TIE"}
"""What the numbers of a claim are that are not NIE and TIE."""
_IN_GENERAL = (
    "it is not shown to carry more of TE for harm than for placebos: the difference of the slopes β (of effect on TE, "
    "over pairs) is not clear of 0. Nor is the opposite shown: where placebos hardly move the outcome, their slope "
    "says little"
)
_EXAMPLES = 3
"""Pairs that are shown."""

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


def write_report(
    store: Store,
    result: Result,
    texts: Sequence[PairText] = (),
    *,
    parts: Sequence[Section] | None = None,
    shared: Path | None = None,
) -> Path:
    """Write tables, figures and `report.md` into the run folder; the same bytes for the same run. Returns the report.

    texts: pairs to show as text; without them the report has no prompt and no generated answer, and with them nobody
    but its owner can read it. parts: the run's sections, made by default. shared: another folder to write all of it
    into, for others; the tables are then without the further columns of the pairs file, in which anything may stand.

    Provenance is all of `store.record()` but `study`, which `config` contains. Of `model`, `config`, `outcome`,
    `versions`, `git`, `host`, `started`, `finished` and `seconds`, what is missing is reported as not recorded, and a
    run without `finished` as unfinished. Pairs in `store.failures()` are reported as failed.

    Raises:
        StoreError: the run folder cannot be written.
    """
    target = Store(shared) if shared else store
    for name, table in csv_tables(result, notes=not shared).items():
        target.write(name, csv_text(table))
    for name, content in result.files.items():
        target.write(name, content)
    parts = sections(result) if parts is None else parts
    for section in parts:
        if section.figure:
            target.write(section.figure_path, figures.png(section.figure))
    target.write("report.md", _report(result, parts, store, texts), private=bool(texts))
    return target.folder / "report.md"


def _with_notes(effects: pd.DataFrame, pairs: Sequence[TokenPair]) -> pd.DataFrame:
    """Effects with the other columns of the pairs file, behind their own; a name of theirs is marked with `pairs.`."""
    notes = {pair.id: dict(pair.notes) for pair in pairs}
    names = list(dict.fromkeys(name for of_pair in notes.values() for name in of_pair))
    added = {
        f"pairs.{name}" if name in effects else name: [notes.get(pair, {}).get(name, "") for pair in effects["pair_id"]]
        for name in names
    }
    return effects.assign(**added) if added else effects


def sections(result: Result) -> list[Section]:
    """What the report says, analysis by analysis; of one that has no sections of its own its strongest sites."""
    found: list[Section] = []
    for one in result.analyses:
        if one.sections:
            found += one.sections(result)
        elif one.sites and (section := site_section(result, one.name, one.name, "its sites", lambda sites: None)):
            found.append(section)
    return found


def section_named(result: Result, name: str) -> Section:
    """One section of the report.

    Raises:
        SettingsError: the run has no such section.
    """
    known = {section.name: section for section in sections(result)}
    if name not in known:
        raise SettingsError(f"this run has no section {name!r}; it has {', '.join(known) or 'none'}")
    return known[name]


def _report(result: Result, parts: Sequence[Section], store: Store, texts: Sequence[PairText]) -> str:
    """`report.md`."""
    study, summary, record = result.study, result.summary, store.record()
    verdicts = result.verdicts()
    examples = "" if texts else _examples(study)
    every = {
        f"# Causal mediation of harmful text in {study.info.name}": _opening(result, record),
        **({"## Claims": _verdict_table(verdicts).markdown()} if verdicts else {}),
        **{f"## In a picture: {part.title.lower()}": f"{part.drawn()}\n\n{part.lead}" for part in parts if part.lead},
        "## What was measured": paragraphs(
            _setting_table(result, record).markdown(), _left_out(_refusals(study, store), store.failures())
        ),
        **({"## Example pairs": examples} if examples else {}),
        **{f"## {section.title}": section.markdown() for section in parts if not section.appendix},
        "## Identities": _identities_table(study, summary.identities).markdown(),
        "## How to read the numbers": bullets(_READING),
        "## Limits": bullets(_limits(study, summary.total)),
        "## Prompts and answers": _shown(texts, result.files),
        **{f"## Appendix: {section.title}": section.markdown() for section in parts if section.appendix},
        "## Provenance": _folded("how this run was made", _provenance_table(study.config, record).markdown()),
    }
    return paragraphs(*(part for section in every.items() for part in section)) + "\n"


def _verdict_table(verdicts: Sequence[Verdict]) -> Table:
    notes = (
        Note("harm", "shares of TE with 95% intervals on held-out pairs, NIE then TIE"),
        *(Note(one.row, _OTHER_NUMBERS[one.label]) for one in verdicts if one.label in _OTHER_NUMBERS),
        Note("placebo", "where its TE spans 0 there is no share of it, and the slope β of effect on TE stands alone"),
        *([Note(ANY_EDIT, _IN_GENERAL)] if any(one.general for one in verdicts) else []),
        *(Note(f"{one.row}, not supported", one.why) for one in verdicts if one.said == "not supported"),
    )
    rows = [(one.claim, one.harm, one.placebo, one.said) for one in verdicts]
    return Table(("claim", "harm", "placebo", "verdict"), rows, notes)


def csv_tables(result: Result, *, notes: bool = True) -> dict[str, pd.DataFrame]:
    """What analyses found, by file name, with the documented columns. notes: with those of the pairs file too."""
    columns, effects = result.columns(), result.effects[list(EFFECT_COLUMNS)]
    return {
        "effects.csv": _with_notes(effects, result.study.pairs) if notes else effects,
        "summary.csv": result.summary.sites[list(SUMMARY_COLUMNS)],
        **{name: table[list(columns.get(name, table.columns))] for name, table in result.tables.items()},
    }


def _opening(result: Result, record: Mapping[str, Any]) -> str:
    """The answer, and before it whatever makes it doubtful."""
    unfinished = (
        ""
        if record.get("finished")
        else ("**This run is not finished**: what follows is what has been measured so far.")
    )
    lost = (
        f"**{result.lost} values of this run are gone** with files of its `readouts/`: what rests on them is missing "
        "below. The command below measures them anew."
        if result.lost
        else ""
    )
    made = f"Made by\n\n    {command(result.study.config)}\n\n{made_in_words(record)}"
    return paragraphs(*doubts(result), unfinished, lost, f"{headline(result)} {effect_in_words(result)}", made)


def doubts(result: Result) -> list[str]:
    """What makes the numbers doubtful, each in a sentence."""
    violated = [
        f"**Do not trust these numbers: an identity that holds by construction is violated** ({identity.name}: "
        f"off by {number(identity.largest)} {result.study.outcome.unit})."
        for identity in result.summary.identities
        if _holds(identity, result.study) == "violated"
    ]
    return [*violated, *filter(None, [hardly_defined(covered(result))])]


def effect_in_words(result: Result) -> str:
    """The total effect, and what its sign means for everything else."""
    total, unit = result.summary.total, result.study.outcome.unit
    size = f"{estimate(total)} {unit}"
    care = f" To be read with care: {total.reason}." if total.reason else ""
    return f"{_SIGNS[total.sign].format(size=size)}{care}"


def headline(result: Result) -> str:
    """The verdicts in at most 40 words; where TE < 0 the claims are worded about the refusal (METHOD, section 2).

    What was not tested says nothing of where, and stands in the table below.
    """
    name, sign = result.study.info.name, result.summary.total.sign
    decided = "the refusal" if sign < 0 else "harmful text"
    if sign == 0:
        return f"**This run cannot say where in {name} harmful text is decided.**"
    verdicts = result.verdicts()
    if not verdicts:
        return f"**This run maps where {decided} acts in {name}; it tests no claim.**"
    tested = [verdict for verdict in verdicts if verdict.said != "not tested"]
    return f"**What decides {decided}? {in_groups(tested or verdicts)}.**"


def _setting_table(result: Result, record: Mapping[str, Any]) -> Table:
    """record: of the run; of its prompts it has what `rendering.described` makes."""
    study, config = result.study, result.study.config
    info, by = study.info, config.statistics
    used = result.effects.drop_duplicates("pair_id")
    shape = f"{count(info.layers, 'layer')}, {info.d_ff} MLP neurons and {count(info.heads, 'head')} per layer"
    rows = [
        ("model", f"{info.name}, revision {info.revision or 'default'}, {config.dtype}; {shape}"),
        *([("weights", str(record["weights"]))] if record.get("weights") else []),
        *_loaded(config, record.get("served", {})),
        ("pairs", f"{config.source}: {_split_size(used)}, of {len(study.pairs)} that can be run"),
        ("prompts", _prompts(config, record.get("prompts", {}))),
        ("discovery split", _split_size(used[used["split"] == "discovery"])),
        ("held-out split", f"{_split_size(used[used['split'] == 'heldout'])}{_heldout(result)}"),
        ("refused", count(len(study.refusals), "pair")),
        ("outcome", f"{study.outcome.name}, in {study.outcome.unit}: {study.outcome.meaning}"),
        ("seed", f"{config.seed}, of the split, the bootstrap and the sign flips ({by.resamples} resamples)"),
        ("thresholds", f"q ≤ {by.alpha:g}; a neuron mediates from {by.min_share:.0%} of TE by NIE and by TIE"),
    ]
    return Table(("what", "value"), rows)


def _heldout(result: Result) -> str:
    """The total effect that shares of held-out effects are taken of."""
    total = result.summary.heldout
    return f"; TE there, which shares are of: {estimate(total)} {result.study.outcome.unit}" if total.sign else ""


def _loaded(config: StudyConfig, served: Mapping[str, str]) -> list[tuple[str, str]]:
    """How the weights are held, where that is not plainly. served: as the run records it."""
    if config.backend != "local":
        return []
    parts = []
    if held := served.get("quantization"):
        way = "" if config.load.quantization else ", as its checkpoint has them"
        parts.append(f"weights of linear layers in {held}{way}, all else in {config.dtype}")
    if attention := served.get("attention"):
        parts.append(f"attention {attention}")
    if device := served.get("device"):
        parts.append(device)
    return [("loaded", "; ".join(parts))] if parts else []


def _prompts(config: StudyConfig, recorded: Mapping[str, Any]) -> str:
    """What stands around the user's text, and what of it is to be read with care."""
    settings = config.prompt
    own = f"**{BARE}**" if recorded.get("bare") else "the model's own template, if any"
    parts = [{"": own, "none": "the bare text"}.get(settings.template, settings.template)]
    parts += [f"{name} = {value!r}" for name, value in settings.template_arguments.items()]
    parts += [f"{name} {literal(text)}" for name in ("system", "prefill") if (text := getattr(settings, name))]
    if settings.think:
        parts.append(
            {"before": "read before a think block", "after": "read after an empty think block"}[settings.think]
        )
    if thought := recorded.get("think"):
        parts.append(f"**{THOUGHTS[thought]}**")
    if settings.control_tokens == "allow":
        parts.append("control tokens in the user's text are measured")
    if "date" in recorded:
        parts.append(f"the template is told that today is {recorded['date']}")
    if repeats := recorded.get("repeats"):
        parts.append(f"{count(repeats, 'pair')} repeat another's prompts and share its cluster")
    return "; ".join(parts)


def _split_size(pairs: pd.DataFrame) -> str:
    return f"{count(len(pairs), 'pair')} in {count(pairs['cluster'].nunique(), 'cluster')}"


def _refusals(study: Study, store: Store) -> list[Refusal]:
    """Pairs that were refused, then those of harmless prompts and their placebos."""
    placebos = store.prepared(PLACEBOS)
    return [*study.refusals, *(placebos.refusals if placebos else ())]


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
        *study.outcome.limits,
    ]


def _shown(texts: Sequence[PairText], files: Iterable[str]) -> str:
    """files: names of what analyses left beside tables."""
    if not texts:
        kept = "".join(f"`{name}`, " for name in files)
        return paragraphs(
            "Prompts and generated answers are hidden: some are harmful. "
            "`remote-mediation report FOLDER --show-text` writes this report again with them.",
            f"To share: this report, the CSV files, {kept}`figures/` and `run.json`. Not to share, as they have "
            "prompts and answers, most of them as numbers of tokens: `*.jsonl`, `readouts/`, `notes/`, `submitted/` "
            "and `failures.json`. Only their owner can read them.",
        )
    header = ("pair", "harmful prompt", "answer", "harmless prompt", "answer")
    order = [(text.id, text.harmful, text.harmful_answer, text.harmless, text.harmless_answer) for text in texts]
    shown = markdown_table(header, [tuple(map(literal, row)) for row in order])
    return paragraphs("This report has prompts and answers, some of them harmful: it is not to be shared.", shown)


def _folded(summary: str, text: str) -> str:
    """Text that opens on a click."""
    return f"<details><summary>{summary}</summary>\n\n{text}\n\n</details>"


def _provenance_table(config: StudyConfig, record: Mapping[str, Any]) -> Table:
    further = sorted(set(record) - {*_PROVENANCE, "study"})
    told = {**record, "config": differing(config)}
    rows = [row for name in (*_PROVENANCE, *further) for row in _flat(name, told.get(name))]
    note = Note("", "of the settings (config) those that are not the defaults; `run.json` has all of them")
    return Table(("what", "value"), rows, (note,))


def _flat(name: str, value: Any) -> list[tuple[str, str]]:
    """Nested settings as rows with dotted names."""
    if isinstance(value, dict) and value:
        return [row for key, inner in value.items() for row in _flat(f"{name}.{key}", inner)]
    if value in (None, ""):
        return [(name, _EMPTY.get(name, UNKNOWN))]
    return [(name, str(value) if value or isinstance(value, bool | int | float) else "none")]


def _examples(study: Study) -> str:
    """Harmless prompts of a few pairs beside their placebos; of the package's own pairs only, which are public."""
    if study.config.source != BUILTIN:
        return ""
    texts = {text.id: text for text in load_pairs(BUILTIN)}
    known = [texts[pair.id] for pair in study.pairs if pair.id in texts and texts[pair.id].placebo]
    shown = known[:: max(1, len(known) // _EXAMPLES)][:_EXAMPLES]
    rows = [(one.id, _marked(one.harmless, one.placebo), _marked(one.placebo, one.harmless)) for one in shown]
    words = (
        "The harmful prompt of a pair differs from the harmless one in the same words as its placebo does; it is not "
        "shown here (`--show-text` does)."
    )
    return paragraphs(words, markdown_table(("pair", "harmless prompt", "placebo"), rows)) if rows else ""


def _marked(text: str, other: str) -> str:
    """A prompt with the words in bold in which it differs from another."""
    own, theirs = text.split(), other.split()
    start = _shared(own, theirs)
    end = _shared(own[start:][::-1], theirs[start:][::-1])
    parts = (own[:start], own[start : len(own) - end], own[len(own) - end :])
    before, changed, after = (literal(" ".join(part)) for part in parts)
    return " ".join(filter(None, (before, f"**{changed}**" if changed else "", after)))


def _shared(words: Sequence[str], others: Sequence[str]) -> int:
    """With how many of the same words both begin."""
    return sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(words, others, strict=False)))


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
