"""The study, from settings to effects; reads like the method section.

    1. load the prompt pairs, tokenise and align them, refuse what cannot be aligned
    2. fix the outcome, and take the answers it compares from the file or from the model
    3. let an analysis name its sites, compile them to rows, measure what is not yet in the run folder, subtract
    4. let it go on from there (search, probe, freeze paths, hold neurons); then the next one
    5. summarise

Steps 3 to 5 run again from the run folder alone when a report is rebuilt; nothing is measured then.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import pandas as pd
from pydantic import Field, TypeAdapter

from remote_mediation.analyses import EVERY, chosen, stranger
from remote_mediation.config import StudyConfig
from remote_mediation.contents import as_begun, unchanged_files
from remote_mediation.effects import Request
from remote_mediation.engine.answers import NOT_FINITE_LOGITS, changes
from remote_mediation.engine.backend import Backend
from remote_mediation.engine.budget import row_flops
from remote_mediation.errors import PairsError, SettingsError, SiteError, StoreError
from remote_mediation.fetch import source_of
from remote_mediation.judges import REFUSAL_OPENINGS, load_judge
from remote_mediation.judges.exchanges import exchanges
from remote_mediation.lab import Lab, Study, UnmeasuredError
from remote_mediation.loading import PLAIN
from remote_mediation.openings import JUDGED_TOKENS, given_openings, listed_openings, longest_answer, openings_of
from remote_mediation.outcomes import (
    OUTCOMES,
    Openings,
    Outcome,
    RefusalOutcome,
    ResponseOutcome,
    logit_diff,
    outcome_from,
    refusal,
)
from remote_mediation.pairs import PromptPair, load_openings, placebo_id
from remote_mediation.placebo import components
from remote_mediation.prompts import encode_after, refuse_control, render
from remote_mediation.provenance import continued, now, peak_memory, provenance
from remote_mediation.rendering import described
from remote_mediation.result import Analysis, Finding, Result
from remote_mediation.runfiles import digest_of
from remote_mediation.runner import Watch
from remote_mediation.sites import ModelInfo
from remote_mediation.stats import spread
from remote_mediation.store import Store
from remote_mediation.summary import Summary, summarise
from remote_mediation.texts import load_texts
from remote_mediation.tokens import Prepared, Refusal, TokenPair, fitting, tokenise, with_answers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# Sites that are also measured in float32 when a study runs in another precision.
PRECISION_SAMPLE = 32
COST_SAMPLE = 500
# Characters at the end of a prompt that may merge with what follows.
_END = 24
# Name of the placebo pairs in the run folder.
PLACEBOS = "placebos"


def run_study(
    config: StudyConfig,
    backend: Backend,
    store: Store,
    watch: Watch | None = None,
    variants: Mapping[str, Backend] | None = None,
    more: Sequence[Analysis] = (),
) -> Result:
    """Measure a study, going on from what its run folder holds.

    variants: backends of the other checkpoints that it names. more: analyses from outside the package that it names.

    Raises:
        PairsError: fewer than two pairs can be run.
        SiteError: the study names a layer, unit or position that the model does not have.
        BackendError: a job could not be run.
        SettingsError: the backend runs another model, revision or precision, or a checkpoint has no backend.
        StoreError: the run folder cannot be written, or holds a run on other pairs or another model.
    """
    started = time.monotonic()
    for setting, names in config.checkpoints.items():
        missing = set(names) - set(variants or {})
        if missing:
            raise SettingsError(f"{setting} names {min(missing)!r}, and no backend of it is among the variants")
    lab = prepared_lab(config, backend, store, watch, variants, more)
    try:
        result = analysed(lab, chosen(config.analyses, more))
    finally:  # what a run took is known of one that was stopped, too
        _note_cost(store, time.monotonic() - started)
    store.save_record({**store.record(), "finished": now(), "values": lab.known})
    return result


def _note_cost(store: Store, seconds: float) -> None:
    """Add a sitting to what the run has taken: seconds of all of them, and the most memory of any, in GB.

    Raises:
        StoreError: the folder is no longer there, or can no longer be written.
    """
    record = store.record()
    if not record:
        raise StoreError(
            f"{store.folder} has no run.json any more: it was moved or deleted while the study ran; put it back, or "
            "name its new place with --out, and give the same command again"
        )
    known = [most for most in (record.get("memory"), peak_memory()) if most]
    spent = {"seconds": round(record["seconds"] + seconds, 1), "memory": max(known, default=None)}
    store.save_record({**record, **spent})


def prepared_lab(
    config: StudyConfig,
    backend: Backend,
    store: Store,
    watch: Watch | None = None,
    variants: Mapping[str, Backend] | None = None,
    more: Sequence[Analysis] = (),
) -> Lab:
    """Steps 1 and 2, noted in the run folder: a lab that can be asked. Raises: as `run_study`."""
    check_backend(config, backend)
    begun = store.record()
    info = as_begun(backend.info, begun, store.folder)
    known = _known(config, backend, begun, store.folder)
    prepared = store.prepared() or prepare(config, backend.tokenizer, info)
    placebos = store.prepared(PLACEBOS) or prepare_placebos(config, prepared.pairs, backend.tokenizer, info)
    outcome = outcome_of(config, backend.tokenizer)
    study = Study(config, info, outcome, *prepared, placebos.pairs)
    # Refuses sites that are not there, and the lab pairs that cannot be split.
    first_requests(study, chosen(config.analyses, more))
    lab = Lab(study, store, backend, watch, variants)
    made = provenance()
    begun = {**made, "seconds": 0.0, **begun, **continued(begun, made)}
    record = {**begun, **_described(study), **known}
    store.save_record(record)
    store.save_prepared(prepared)
    if config.harmful:
        store.save_note("matching", [asdict(pair) for pair in chosen_texts(config)])
    study = completed(lab)
    store.save_prepared(Prepared(study.pairs, study.refusals))
    store.save_prepared(Prepared(study.placebos, placebos.refusals), PLACEBOS)
    store.save_record({**record, **_described(study)})
    return Lab(study, store, backend, watch, variants)


def _known(config: StudyConfig, backend: Backend, begun: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What the values of a run depend on beside its settings, for its record. begun: the record so far.

    Raises:
        StoreError: it is not what it was when the run was begun.
    """
    files = unchanged_files(config, begun, folder)
    prompts = described(chosen_texts(config), backend.tokenizer, config.prompt.form())
    known = {
        "texts": texts_digest(config),
        "content": backend.info.weights,
        "files": files,
        "prompts": prompts,
        "origin": begun.get("origin") or _origin(config, backend, files),
    }
    held, other = f"{folder} holds a run", "choose another --out"
    if begun.get("texts", known["texts"]) != known["texts"]:
        raise StoreError(f"{held} on other pairs, {config.source} has changed; {other}")
    if changed := changes(begun.get("served", {}), backend.served):
        raise StoreError(f"{held} made by other means ({changed}); {other}")
    if begun.get("prompts", prompts)["rendered"] != prompts["rendered"]:
        raise StoreError(f"{held} whose prompts are rendered otherwise: the chat template has changed since; {other}")
    return {**known, "served": dict(backend.served)} if backend.served else known


def _origin(config: StudyConfig, backend: Backend, files: Mapping[str, str]) -> str:
    """Hash of a study and of the weights that it begins on, as far as they are shown; its readouts carry it."""
    weights = [backend.info.weights, backend.served.get("weights", "")]
    hub = {name: digest for name, digest in files.items() if name.endswith(f" of {config.model!r}")}
    return digest_of(repr((sorted(config.identity().items()), weights, sorted(hub.items()))).encode())[:16]


def check_backend(config: StudyConfig, backend: Backend) -> None:
    """Refuse a backend that does not run what the study says.

    Raises:
        SettingsError: another model, revision or precision, with both; or one that was loaded in another way.
    """
    asked = {"model": config.model, "revision": config.revision, "dtype": config.dtype}
    given = {"model": backend.info.name, "revision": backend.info.revision, "dtype": backend.dtype}
    for name, value in asked.items():
        if given[name] != value:
            raise SettingsError(
                f"the study's {name} is {value!r}, the backend's is {given[name]!r}; make them the same"
            )
    loaded = getattr(backend, "loading", PLAIN)  # one that says nothing of it has no other way
    if config.load.loading() != loaded:
        raise SettingsError(
            f"the study's [load] is {config.load.loading()}, the backend's is {loaded}; make them the same, by "
            "`LocalBackend.load(..., loading=config.load.loading())`"
        )


def completed(lab: Lab) -> Study:
    """Step 2: the study with what its outcome compares, where that takes the model: its answers or its openings.

    Raises:
        PairsError: fewer than two pairs are left.
    """
    study = lab.study
    match study.outcome:
        case ResponseOutcome() if any(map(unanswered, study.pairs)):
            prepared = answered(lab)
            return replace(study, pairs=prepared.pairs, refusals=prepared.refusals)
        case RefusalOutcome():
            return study.with_openings(chosen_openings(lab))
    return study


def chosen_openings(lab: Lab) -> RefusalOutcome:
    """The `refusal` outcome of the openings that are listed, or of the model's own on the discovery split."""

    def chosen(tokenizer: PreTrainedTokenizerBase) -> tuple[Openings, Openings]:
        listed = listed_openings(lab.study.config)
        if listed:
            outcome = given_openings(*listed, tokenizer, prompts_of(lab.study.config, tokenizer))
        else:
            outcome = _own_openings(lab, tokenizer)
        return outcome.compliant, outcome.refusing

    token = Annotated[int, Field(ge=0, lt=lab.study.info.vocab)]
    kind: TypeAdapter[tuple[Openings, Openings]] = TypeAdapter(
        tuple[tuple[tuple[token, ...], ...], tuple[tuple[token, ...], ...]]
    )
    return refusal(*lab.noted("openings", chosen, kind))


def _own_openings(lab: Lab, tokenizer: PreTrainedTokenizerBase) -> RefusalOutcome:
    """How the model's answers to the discovery pairs begin, those that comply and those that do not."""
    config = lab.study.config
    every = [ids for pair in lab.pairs("discovery") for ids in pair.prompts]
    found = zip(every, lab.generate_where_finite(every, JUDGED_TOKENS), strict=True)
    # A pair without finite logits fails alone, later, when its outcomes are measured.
    prompts, answers = zip(*((ids, answer) for ids, answer in found if answer is not None), strict=True)
    asked, said = exchanges(prompts, answers, tokenizer, config.prompt.form())
    complied = load_judge(REFUSAL_OPENINGS)(asked, said)
    return openings_of(answers, [not yes for yes in complied], tokenizer, prompts_of(config, tokenizer))


def prepare_placebos(
    config: StudyConfig,
    pairs: Sequence[TokenPair],
    tokenizer: PreTrainedTokenizerBase,
    info: ModelInfo,
    texts: Sequence[PromptPair] | None = None,
) -> Prepared:
    """The placebo pairs of a study's pairs, in their clusters; those that cannot be aligned are refused.

    texts: of these pairs, read anew by default.
    """
    clusters = {placebo_id(pair.id): pair.cluster for pair in pairs}
    placebos = [
        text.of_placebo(placebo_id(text.id))
        for text in (chosen_texts(config) if texts is None else texts)
        if text.placebo and placebo_id(text.id) in clusters
    ]
    prepared = fitting(tokenise(placebos, tokenizer, config.prompt.form()), info, longest_answer(config))
    return Prepared(tuple(replace(pair, cluster=clusters[pair.id]) for pair in prepared.pairs), prepared.refusals)


def reread(store: Store, more: Sequence[Analysis] = ()) -> Result:
    """A study as its run folder has it, finished or not; no model is needed.

    more: analyses from outside the package; one that is named and not given has a section that says so.

    Raises:
        StoreError: `run.json` or the pairs are not as the run wrote them, or all values of a finished run are gone.
    """
    study = _reread_study(store)
    names = study.config.analyses
    known = {one.name for one in (*EVERY, *more)}
    strangers = [stranger(name) for name in names if name not in known]
    lab = Lab(study, store)
    lost = max(0, store.record().get("values", 0) - lab.known)
    if lost and not lab.known:  # a report of nothing would take the place of the one that is there
        raise StoreError(
            f"{store.folder} has none of the {lost:,} values that it measured; put its readouts back, or run the "
            "study again, which measures them anew"
        )
    return replace(analysed(lab, chosen(names, [*more, *strangers])), lost=lost)


def _reread_study(store: Store) -> Study:
    if store.missing():
        name = store.missing()[0]
        raise StoreError(f"{store.folder / name} is gone; run the study again, which makes it anew")
    record, prepared = store.record(), store.prepared() or Prepared((), ())
    placebos = store.prepared(PLACEBOS) or Prepared((), ())
    config = store.config()
    try:
        info, outcome = ModelInfo.from_record(record["model"]), outcome_from(record["outcome"])
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise StoreError(f"{store.folder} holds a run of another version ({error}); run the study anew") from error
    return Study(config, info, outcome, *prepared, placebos.pairs)


def measure_precision(
    store: Store, reference: Backend, watch: Watch | None = None, more: Sequence[Analysis] = ()
) -> None:
    """Note in `run.json` how far a sample of a run's outcomes lies from what float32 gives. reference: in float32."""
    record, study = store.record(), _reread_study(store)
    requests = first_requests(study, chosen(study.config.analyses, more))
    sample = requests[:: -(-len(requests) // PRECISION_SAMPLE)]
    rows = [row for request in sample for row in request.rows(study.info)]
    found = Lab(study, store).outcomes(rows)
    here = study.config.model_copy(update={"dtype": "float32", "backend": "local"})
    exact = Lab(replace(study, config=here), store, reference, watch)
    deviation = np.abs(found - exact.outcomes(rows))
    summary = {"outcomes": len(rows), "largest": float(np.nanmax(deviation)), "mean": float(np.nanmean(deviation))}
    quantization = study.config.load.quantization
    held = {"weights": f"{quantization} in both"} if quantization else {}
    store.save_record({**record, "deviation_from_float32": {**summary, "unit": study.outcome.unit, **held}})


def prepare(
    config: StudyConfig,
    tokenizer: PreTrainedTokenizerBase,
    info: ModelInfo,
    texts: Sequence[PromptPair] | None = None,
) -> Prepared:
    """Step 1: aligned pairs, with the answers that the file gives where the outcome compares answers.

    texts: those of the study by default.

    Raises:
        PairsError: they cannot be read, or fewer than two can be run.
    """
    texts = chosen_texts(config) if texts is None else texts
    prepared = fitting(tokenise(texts, tokenizer, config.prompt.form()), info, longest_answer(config))
    if config.outcome == "response_logprob":
        given = {text.id: text for text in texts}
        answered = [_given(config, pair, given[pair.id], tokenizer) for pair in prepared.pairs]
        prepared = _sorted_out(answered, prepared.refusals)
    check_enough(prepared)
    return prepared


def answered(lab: Lab) -> Prepared:
    """Step 2: the same with the model's own answers where the file has none.

    Raises:
        PairsError: fewer than two pairs are left.
    """
    study = lab.study
    prompts = [ids for pair in study.pairs for ids in unanswered(pair)]
    own = iter(lab.generate_where_finite(prompts, study.config.response_logprob.tokens))
    found: list[TokenPair | Refusal] = []
    for pair in study.pairs:
        harmful, harmless = (given or next(own) for given in pair.answers)
        if harmful is None or harmless is None:
            found.append(Refusal(pair.id, f"an answer of the model is {NOT_FINITE_LOGITS}"))
        else:
            found.append(with_answers(pair, (harmful, harmless)))
    prepared = _sorted_out(found, study.refusals)
    check_enough(prepared)
    return prepared


def unanswered(pair: TokenPair) -> list[tuple[int, ...]]:
    """The prompts of a pair without an answer, treatment first."""
    return [ids for ids, answer in zip((pair.x1, pair.x0), pair.answers, strict=True) if not answer]


def _given(
    config: StudyConfig, pair: TokenPair, text: PromptPair, tokenizer: PreTrainedTokenizerBase
) -> TokenPair | Refusal:
    """A pair with the answers that its file gives, behind their own prompts; empty where it gives none."""
    asked = ((text.harmful, text.before("harmful")), (text.harmless, text.before("harmless")))
    responses = (text.harmful_response, text.harmless_response)
    form, tokens = config.prompt.form(), config.response_logprob.tokens
    try:
        for given in filter(None, responses):
            refuse_control(given, tokenizer, form)
        harmful, harmless = (
            encode_after([render(request, tokenizer, form, turns).text], given, tokenizer)[:tokens] if given else ()
            for (request, turns), given in zip(asked, responses, strict=True)
        )
    except PairsError as error:
        return Refusal(pair.id, f"its response: {error}")
    if harmful and harmless:
        return with_answers(pair, (harmful, harmless))
    return replace(pair, answers=(harmful, harmless))


def _sorted_out(found: Iterable[TokenPair | Refusal], refusals: Iterable[Refusal]) -> Prepared:
    """Pairs, and what was refused before or now."""
    pairs, refused = [], list(refusals)
    for one in found:
        if isinstance(one, TokenPair):
            pairs.append(one)
        else:
            refused.append(one)
    return Prepared(tuple(pairs), tuple(refused))


def check_enough(prepared: Prepared) -> None:
    """Refuse a study of fewer than two pairs.

    Raises:
        PairsError: with the reasons why the others were refused.
    """
    if len(prepared.pairs) < 2:
        reasons = "; ".join(sorted({refusal.reason for refusal in prepared.refusals})) or "none was refused"
        count = len(prepared.pairs) + len(prepared.refusals)
        raise PairsError(f"{len(prepared.pairs)} of {count} pairs can be run, a study needs two ({reasons}); add pairs")


def texts_digest(config: StudyConfig) -> str:
    """Hash of the pairs as text: what a path alone does not tell when a run is continued."""
    pairs = chosen_texts(config)
    texts = repr(pairs) + "".join(repr(pair.turns) for pair in pairs if pair.turns)
    openings = load_openings(config.pairs) if config.outcome == "refusal" else None
    return hashlib.sha256(f"{texts}{openings or ''}".encode()).hexdigest()[:16]


def select(pairs: Sequence[PromptPair], most: int | None) -> tuple[PromptPair, ...]:
    """At most so many pairs, one of each component first, spread evenly over the file."""
    if most is None or most >= len(pairs):
        return tuple(pairs)
    return tuple(pairs[i] for i in spread(components(pairs), most))


def chosen_texts(config: StudyConfig) -> tuple[PromptPair, ...]:
    """The pairs that a study runs on, as text. Raises: as `load_texts`."""
    return select(load_texts(config), config.max_pairs)


def outcome_of(
    config: StudyConfig, tokenizer: PreTrainedTokenizerBase, texts: Sequence[PromptPair] | None = None
) -> Outcome:
    """The outcome that the settings name; of `refusal` the openings are chosen later (`completed`).

    texts: those of the study by default.
    """
    if config.outcome == "logit_diff":
        behind = prompts_of(config, tokenizer, texts)
        return logit_diff(config.logit_diff.plus, config.logit_diff.minus, tokenizer, behind)
    return OUTCOMES[config.outcome]()


def prompts_of(
    config: StudyConfig, tokenizer: PreTrainedTokenizerBase, texts: Sequence[PromptPair] | None = None
) -> list[str]:
    """Rendered prompts that stand for all of a study's, or of these texts': one of each end that they have."""
    found: dict[str, str] = {}
    form = config.prompt.form()
    for pair in chosen_texts(config) if texts is None else texts:
        prompts = (("harmless", pair.harmless), ("harmful", pair.harmful), ("placebo", pair.placebo))
        for name, request in prompts:
            with contextlib.suppress(PairsError):  # its pair is refused
                text = render(request, tokenizer, form, pair.before(name)).text if request else ""
                found.setdefault(text[-_END:], text)
    return [text for text in found.values() if text]


def analysed(lab: Lab, analyses: tuple[Analysis, ...]) -> Result:
    """Steps 3 to 5: analysis by analysis its sites, and what it goes on to ask; then all are summarised."""
    study = lab.study
    findings: dict[str, Finding] = {}
    # The report of an unfinished run shows what is there; while measuring, nothing may be missing.
    unfinished = () if lab.can_measure else (UnmeasuredError,)
    asked = [requests_of(study, one) for one in analyses]
    steps = [_operations(study, *each) for each in zip(analyses, asked, strict=True)] if lab.can_measure else []
    for place, (one, requests) in enumerate(zip(analyses, asked, strict=True)):
        lab.tell_ahead(sum(steps[place:]))
        with contextlib.suppress(*unfinished):
            lab.measure(requests)
            if one.analyse:
                findings[one.name] = one.analyse(lab, findings)
    return _result(lab, analyses, findings)


def _result(lab: Lab, analyses: tuple[Analysis, ...], findings: Mapping[str, Finding]) -> Result:
    """Step 5: the effects and all that analyses left, together."""
    tables = {name: table for found in findings.values() for name, table in found.tables.items()}
    files = {name: content for found in findings.values() for name, content in found.files.items()}
    values = {name: found.value for name, found in findings.items() if found.value is not None}
    return Result(lab.study, lab.effects, tables, _summary(lab.study, lab.effects), analyses, files, values)


def _operations(study: Study, analysis: Analysis, requests: Sequence[Request]) -> float:
    """What an analysis takes, at most: that of its sites, from a sample of them, and of all that it goes on to ask."""
    pairs = {pair.id: pair for pair in study.pairs}
    sample = requests[:: -(-len(requests) // COST_SAMPLE) or 1]
    rows = [row for request in sample for row in request.rows(study.info) if row.writes]
    of_sites = sum(row_flops(row, pairs[row.pair], study.setting) for row in rows)
    beyond = analysis.cost(study).flops if analysis.cost else 0.0
    return of_sites * len(requests) / max(len(sample), 1) + beyond


def first_requests(study: Study, analyses: Sequence[Analysis]) -> list[Request]:
    """All sites that analyses name, on every pair. Raises: as `requests_of`, or as an analysis' `check`."""
    for one in analyses:
        if one.check:
            one.check(study)
    return [request for one in analyses for request in requests_of(study, one)]


def requests_of(study: Study, analysis: Analysis) -> list[Request]:
    """The sites that an analysis names, on every pair.

    Raises:
        SiteError: a site that the model does not have, or no site at all.
    """
    if not analysis.sites:
        return []
    requests = [
        Request(analysis.name, pair, site)
        for pair in study.pairs
        for site in analysis.sites(study.config, study.info, pair)
    ]
    if study.pairs and not requests:
        raise SiteError(f"no pair has tokens at the positions of {analysis.name!r}; give it others under [positions]")
    return requests


def _summary(study: Study, effects: pd.DataFrame) -> Summary:
    equal_length = {pair.id for pair in study.pairs if len(pair.x0) == len(pair.x1)}
    config = study.config
    return summarise(effects, equal_length, study.info.layers, config.seed, config.statistics)


def _described(study: Study) -> dict[str, Any]:
    """The study in `run.json`: what identifies it, and all that `reread` needs."""
    return {
        "study": study.config.identity(),
        "config": study.config.model_dump(mode="json", exclude={"out"}),  # the folder itself, whose path is nobody's
        "model": asdict(study.info),
        "weights": source_of(study.info.name),
        "outcome": study.outcome.record(),
    }
