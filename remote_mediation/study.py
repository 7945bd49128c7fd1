"""The study, from settings to effects; reads like the method section.

    1. load the prompt pairs, tokenise and align them, refuse what cannot be aligned
    2. fix the outcome, and take the answers it compares from the file or from the model
    3. let every analysis name its sites, compile them to rows, measure what is not yet in the run folder
    4. let analyses refine, measure again
    5. subtract

Steps 3 to 5 run again from the run folder alone when a report is rebuilt; nothing is measured then.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import pandas as pd

from remote_mediation.analyses import ANALYSES
from remote_mediation.config import StudyConfig
from remote_mediation.effects import Request, Values, effects_table
from remote_mediation.errors import JobError, LostJobError, PairsError, SiteError, StoreError
from remote_mediation.fetch import source_of
from remote_mediation.outcomes import Outcome, logit_diff
from remote_mediation.plan import Backend, Budget, Job, Keys, Readout, Setting, plan_jobs
from remote_mediation.prompts import (
    Prepared,
    PromptPair,
    Refusal,
    TokenPair,
    encode_response,
    load_pairs,
    tokenise,
    with_answers,
)
from remote_mediation.provenance import now, provenance
from remote_mediation.rows import Row
from remote_mediation.sites import ModelInfo
from remote_mediation.stats import split_clusters
from remote_mediation.store import Store, Submitted
from remote_mediation.summary import CHECKS, Summary, summarise

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# First guess of a backend's speed, operations per second; jobs are cut anew once it is measured.
FIRST_RATE = 2e10
# So often a job is handed over before its loss ends the study; what is measured is kept.
MOST_TRIES = 4


class Watch(Protocol):
    """Sees how far a study is."""

    def total(self, rows: int) -> None:
        """So many rows are to be measured from here on."""
        ...

    def advance(self, rows: int) -> None:
        """So many more are done."""
        ...


class _Unwatched:
    """Nobody watches."""

    def total(self, rows: int) -> None:
        pass

    def advance(self, rows: int) -> None:
        pass


_UNWATCHED = _Unwatched()


@dataclass(frozen=True)
class Study:
    """Everything that is fixed before the first row runs."""

    config: StudyConfig
    """Settings."""
    info: ModelInfo
    """Shape of the model."""
    outcome: Outcome
    """What Y is."""
    pairs: tuple[TokenPair, ...]
    """Pairs that can be run, with their answers."""
    refusals: tuple[Refusal, ...]
    """Pairs that cannot, and why."""

    @property
    def setting(self) -> Setting:
        """What all rows share."""
        return Setting(self.info, self.config.dtype, self.outcome)

    def keys(self) -> Keys:
        """How rows are named."""
        return Keys(self.setting, self.pairs)

    def splits(self) -> dict[str, str]:
        """Discovery or heldout, by pair id; whole clusters."""
        clusters = np.array([pair.cluster for pair in self.pairs])
        split = split_clusters(clusters, np.random.default_rng(self.config.seed))
        return dict(zip((pair.id for pair in self.pairs), map(str, split), strict=True))


class Result(NamedTuple):
    """A measured study."""

    study: Study
    effects: pd.DataFrame
    """`EFFECT_COLUMNS`."""
    summary: Summary


def run_study(config: StudyConfig, backend: Backend, store: Store, watch: Watch = _UNWATCHED) -> Result:
    """Measure a study, going on from what its run folder holds.

    Raises:
        PairsError: fewer than two pairs can be run.
        SiteError: the study names a layer, unit or position that the model does not have.
        BackendError: a job could not be run.
        StoreError: the run folder cannot be written, or holds a run on other pairs.
    """
    started = time.monotonic()
    begun = store.record()
    texts = texts_digest(config)
    if begun.get("texts", texts) != texts:
        raise StoreError(f"{store.folder} holds a run on other pairs, {config.pairs} has changed; choose another --out")
    prepared = store.prepared() or prepare(config, backend)
    study = Study(config, backend.info, outcome_of(config, backend.tokenizer), prepared.pairs, prepared.refusals)
    requests = first_requests(study)
    study.splits()  # refuses pairs that cannot be split, before anything is written
    record = begun or {**_described(study), **provenance(), "texts": texts, "seconds": 0.0}
    store.save_record(record)
    store.save_prepared(prepared)
    values = store.values()
    effects = effects_of(study, requests, values, lambda rows: measure(study, rows, values, backend, store, watch))
    spent = record["seconds"] + time.monotonic() - started
    store.save_record({**record, "finished": now(), "seconds": round(spent, 1)})
    return _result(study, effects)


def reread(store: Store) -> Result:
    """A study as its run folder has it, finished or not; no model is needed."""
    record, prepared = store.record(), store.prepared() or Prepared((), ())
    config = StudyConfig(**record["config"])
    info = ModelInfo(**{**record["model"], "sliding": tuple(record["model"]["sliding"])})
    outcome = Outcome(config.outcome, *(tuple(record["outcome"][name]) for name in ("plus", "minus")))
    study = Study(config, info, outcome, prepared.pairs, prepared.refusals)
    return _result(study, effects_of(study, first_requests(study), store.values(), lambda rows: None))


def prepare(config: StudyConfig, backend: Backend) -> Prepared:
    """Steps 1 and 2: aligned pairs, with answers where the outcome compares answers.

    Raises:
        PairsError: fewer than two pairs are left.
    """
    texts = select(load_pairs(config.pairs), config.max_pairs)
    prepared = tokenise(texts, backend.tokenizer)
    if config.outcome == "response_logprob":
        prepared = _answered(prepared, {pair.id: pair for pair in texts}, backend, config.response_logprob.tokens)
    check_enough(prepared)
    return prepared


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
    return hashlib.sha256(repr(select(load_pairs(config.pairs), config.max_pairs)).encode()).hexdigest()[:16]


def select(pairs: Sequence[PromptPair], most: int | None) -> tuple[PromptPair, ...]:
    """At most so many pairs, spread evenly over the file so that categories stay mixed."""
    if most is None or most >= len(pairs):
        return tuple(pairs)
    return tuple(pairs[i * len(pairs) // most] for i in range(most))


def outcome_of(config: StudyConfig, tokenizer: PreTrainedTokenizerBase) -> Outcome:
    """The outcome that the settings name."""
    if config.outcome == "logit_diff":
        return logit_diff(config.logit_diff.plus, config.logit_diff.minus, tokenizer)
    return Outcome(config.outcome)


def effects_of(
    study: Study, requests: list[Request], values: Values, measure_rows: Callable[[list[Row]], None]
) -> pd.DataFrame:
    """Steps 3 to 5. `measure_rows` adds to `values`; when it does nothing, the effects are those already measured."""
    keys, splits = study.keys(), study.splits()

    def measured(wave: list[Request]) -> pd.DataFrame:
        measure_rows([row for request in wave for row in request.rows(study.info)])
        return effects_table(wave, values, keys, study.outcome, study.info, splits)

    effects = measured(requests)
    refined = refined_requests(study, effects)
    return pd.concat([effects, measured(refined)], ignore_index=True) if refined else effects


def first_requests(study: Study) -> list[Request]:
    """All sites that every analysis asks for, on every pair.

    Raises:
        SiteError: a site that the model does not have, or no site at all.
    """
    requests = [
        Request(name, pair, site)
        for pair in study.pairs
        for name in (CHECKS, *study.config.granularity)
        for site in ANALYSES[name].sites(study.config, study.info, pair)
    ]
    idle = set(study.config.granularity) - {request.granularity for request in requests}
    if study.pairs and idle:
        raise SiteError(f"no pair has tokens at the positions of {min(idle)!r}; give it others under [positions]")
    return requests


def refined_requests(study: Study, effects: pd.DataFrame) -> list[Request]:
    """What analyses ask for once their first effects are there."""
    requests: list[Request] = []
    for name in study.config.granularity:
        refine = ANALYSES[name].refine
        sites = refine(study.config, study.info, effects[effects["granularity"] == name]) if refine else []
        requests += [Request(f"{name}:units", pair, site) for pair in study.pairs for site in sites]
    return requests


def measure(
    study: Study,
    rows: list[Row],
    values: dict[str, npt.NDArray[np.float32]],
    backend: Backend,
    store: Store,
    watch: Watch,
) -> None:
    """Run the rows that are not in the run folder yet, job by job, and keep each job's values as it ends."""
    _collect_submitted(values, backend, store)
    keys, pairs = study.keys(), {pair.id: pair for pair in study.pairs}
    failed = store.failures()
    wanted = (row for row in dict.fromkeys(rows) if row.writes and row.pair not in failed)
    missing = [row for row in wanted if keys(row) not in values]
    watch.total(len(missing))
    rate = FIRST_RATE
    budget = Budget(lambda: study.config.seconds_per_job * rate, study.config.batch_gb * 1e9)
    for job in plan_jobs(missing, pairs, study.setting, budget, keys):
        seconds = _run(job, values, backend, store)
        rate = job.flops / seconds if seconds else rate
        watch.advance(job.rows)


def _run(
    job: Job, values: dict[str, npt.NDArray[np.float32]], backend: Backend, store: Store, tries: int = MOST_TRIES
) -> float:
    """Run one job and keep its values; where it fails, find out which pairs do. Returns the seconds it took."""
    ticket = backend.submit(job)
    store.save_ticket(ticket, job)
    try:
        readout = backend.collect(ticket)
    except LostJobError:
        store.forget(job.id)
        if tries == 1:
            raise
        return _run(job, values, backend, store, tries - 1)
    except JobError as error:
        store.forget(job.id)
        if len(job.parts) == 1:
            store.save_failure(job.parts[0].pair, str(error))
            return 0.0
        return sum(_run(part, values, backend, store) for part in job.split())
    _keep(job, readout, values, store)
    return readout.seconds


def _collect_submitted(values: dict[str, npt.NDArray[np.float32]], backend: Backend, store: Store) -> None:
    """Fetch what an earlier process handed over and did not live to see; what is lost will be planned anew."""
    for job in store.submitted():
        try:
            readout = backend.collect(job.ticket)
        except (JobError, LostJobError):
            store.forget(job.id)
            continue
        _keep(job, readout, values, store)


def _keep(job: Job | Submitted, readout: Readout, values: dict[str, npt.NDArray[np.float32]], store: Store) -> None:
    """A job's values, first in the run folder, then at hand."""
    store.save_readout(job, readout)
    values.update(zip(job.keys, readout.values, strict=True))


def _result(study: Study, effects: pd.DataFrame) -> Result:
    equal_length = {pair.id for pair in study.pairs if len(pair.x0) == len(pair.x1)}
    config = study.config
    return Result(study, effects, summarise(effects, equal_length, study.info.layers, config.seed, config.statistics))


def _described(study: Study) -> dict[str, Any]:
    """The study in `run.json`: what identifies it, and all that `reread` needs."""
    return {
        "study": study.config.identity(),
        "config": study.config.model_dump(mode="json"),
        "model": asdict(study.info),
        "weights": source_of(study.info.name),
        "outcome": asdict(study.outcome),
    }


def _answered(prepared: Prepared, texts: dict[str, PromptPair], backend: Backend, tokens: int) -> Prepared:
    """Add both answers to every pair: the file's responses, or the model's own where the file has none."""
    own = iter(backend.answer([ids for pair in prepared.pairs for ids in _unanswered(pair, texts[pair.id])], tokens))
    done: list[TokenPair] = []
    refused = list(prepared.refusals)
    for pair in prepared.pairs:
        given = (texts[pair.id].harmful_response, texts[pair.id].harmless_response)
        harmful, harmless = (
            encode_response(text, pair.id, backend.tokenizer, tokens) if text else next(own) for text in given
        )
        outcome = with_answers(pair, (harmful, harmless))
        (done if isinstance(outcome, TokenPair) else refused).append(outcome)  # type: ignore[arg-type]
    return Prepared(tuple(done), tuple(refused))


def _unanswered(pair: TokenPair, text: PromptPair) -> list[tuple[int, ...]]:
    """The prompts of a pair for which the file gives no response, treatment first."""
    return [ids for ids, given in ((pair.x1, text.harmful_response), (pair.x0, text.harmless_response)) if not given]
