"""What a study would cost, before any weights are loaded: rows, jobs, operations, bytes, memory and time.

What is measured at once is planned with the real rows: the pairs are tokenised and every analysis names its sites.
Only the answers are guessed, as long as the study allows. What analyses go on to ask hangs on what was found: it is
taken to be as much as it may be, with gates in the middle of the network.
"""

from __future__ import annotations

import math
import pickle
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from remote_mediation.analyses import chosen
from remote_mediation.config import StudyConfig
from remote_mediation.engine.budget import LIBRARIES, Budget, batch_budget, running_bytes, weight_bytes
from remote_mediation.engine.jobs import Job, Keys, batch_sizes, plan_jobs
from remote_mediation.engine.rows import Row
from remote_mediation.lab import Study
from remote_mediation.later import Later, of_answers, pairs_of
from remote_mediation.models import load_info, load_tokenizer
from remote_mediation.openings import COMPLIANT, JUDGED_TOKENS, REFUSING, given_openings, listed_openings
from remote_mediation.outcomes import RefusalOutcome, ResponseOutcome
from remote_mediation.pairs import GivenOpenings, PromptPair
from remote_mediation.result import Analysis
from remote_mediation.runner import FIRST_RATE
from remote_mediation.sites import ModelInfo
from remote_mediation.study import (
    chosen_texts,
    outcome_of,
    prepare,
    prepare_placebos,
    prompts_of,
    requests_of,
    unanswered,
)
from remote_mediation.tokens import TokenPair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Sustained share of a data-centre GPU's peak that small batches reach, and that peak (A100, bfloat16, dense).
_GPU_FLOPS = 0.3 * 312e12
# What is less is told as that.
_LEAST_HOURS = 1e-3
# Bytes of the program's source in every payload, and of the file around a tensor that comes back (tests/ndif).
_PROGRAM_BYTES = 6_000
_TENSOR_BYTES = 700
# Resident bytes of a pair, as text and as tokens, and of a row: itself, its key, its values and its line of the effects
# (measured with 50 tokens to a prompt and 16 openings: 5,400 and 2,200).
_PAIR_BYTES = 6_000
_ROW_BYTES = 2_200
# Of more pairs only so many are counted.
COUNTED = 500
# Peak of a client process over NDIF, mostly Python and its libraries (tests/ndif measures it).
CLIENT_MEMORY = 0.7e9


@dataclass(frozen=True)
class Estimate:
    """The cost of a study."""

    counted: int
    """Pairs that were counted, the others being taken to be like them."""
    pairs: int
    """Pairs that can be run."""
    refused: int
    """Pairs that cannot."""
    rows: int
    """Forward runs with a mediator overwritten, of the first wave."""
    later: dict[str, Later]
    """What follows it, by analysis."""
    jobs: int
    """Jobs of the first wave, at the speed assumed."""
    flops: float
    """Operations, of all that follows too."""
    weights: float
    """Bytes of the model's weights."""
    running: float
    """Bytes of those that run for a token; fewer in a mixture of experts."""
    batch: float
    """Bytes of the largest batch's activations."""
    held: float
    """Bytes of what is kept of pairs and rows, of those that follow too."""
    seconds: float
    """Time on this machine, at the speed of its matrix products in `dtype`."""
    dtype: str
    """Precision of the study."""
    up: float
    """Bytes of the first wave's payloads, as a server would be sent them."""
    down: float
    """Bytes of the numbers that come back from it, of all that follows too."""

    @property
    def memory(self) -> float:
        """Peak bytes of a process that runs the study with the model on the CPU."""
        return LIBRARIES + self.weights + self.batch + self.held

    def _running_in_words(self) -> str:
        return f", of which {self.running / 1e9:,.2f} GB run for a token" if self.running < self.weights else ""

    def _gpu_hours_in_words(self) -> str:
        hours = self.flops / _GPU_FLOPS / 3600
        return "under 0.001 GPU-hours" if hours < _LEAST_HOURS else f"about {hours:,.3f} GPU-hours"

    def as_data(self) -> dict[str, Any]:
        """All of it, and what follows the first wave as records."""
        later = [
            {"analysis": name, "rows": one.rows, "flops": one.flops, "down": one.down}
            for name, one in self.later.items()
        ]
        return {**vars(self), "memory": self.memory, "later": later}

    def described(self) -> list[tuple[str, str]]:
        """Names and values for a table."""
        return [
            ("pairs", f"{self.pairs:,} ({self.refused:,} refused)"),
            *([("counted on", f"{self.counted:,} of them, and carried on to all")] if self._partly else []),
            ("rows", f"{self.rows:,}"),
            *(
                (f"then {name}", f"at most {one.rows:,} rows, {one.flops / 1e12:,.2f} TFLOP, {one.down / 1e6:,.2f} MB")
                for name, one in self.later.items()
            ),
            ("jobs", f"{self.jobs:,}"),
            ("operations", f"{self.flops / 1e12:,.2f} TFLOP"),
            ("weights", f"{self.weights / 1e9:,.2f} GB" + self._running_in_words()),
            ("largest batch", f"{self.batch / 1e9:,.2f} GB"),
            ("pairs and rows", f"{self.held / 1e9:,.2f} GB"),
            ("memory here", f"about {self.memory / 1e9:,.2f} GB at most, where the model runs on this machine's CPU"),
            ("time here", f"about {self.seconds / 60:,.1f} min at this machine's {self.dtype} matrix products"),
            ("time on one GPU", f"{self._gpu_hours_in_words()} (30% of an A100's peak)"),
            ("over NDIF", f"{self.up / 1e6:,.2f} MB up (for the rows above), {self.down / 1e6:,.2f} MB down"),
            ("client memory", f"about {(CLIENT_MEMORY + self.held) / 1e9:.1f} GB over NDIF for a model of any size"),
        ]

    @property
    def _partly(self) -> bool:
        return self.counted < self.pairs + self.refused


def estimate(config: StudyConfig, more: Sequence[Analysis] = ()) -> Estimate:
    """The cost of a study from its configuration, pairs and tokenizer. more: analyses from outside the package.

    Of more than `COUNTED` pairs as many are counted, and half of these: what grows with pairs is carried on in a
    straight line, and what does not, such as answers to a fixed number of pairs, stays.

    Raises:
        ModelError: configuration or tokenizer cannot be loaded.
        PairsError: the pairs cannot be used, or not be split where neurons are searched.
        SiteError: the study names something that the model does not have, or a basis that is none of it.
    """
    info, tokenizer = load_info(config.model, config.revision), load_tokenizer(config.model, config.revision)
    analyses, texts = chosen(config.analyses, more), chosen_texts(config)
    flops_per_second = matmul_rate(config.dtype)

    def counted(count: int) -> Estimate:
        taken = [texts[place * len(texts) // count] for place in range(count)]
        return _counted(config, analyses, info, tokenizer, taken, flops_per_second)

    if len(texts) <= COUNTED:
        return counted(len(texts))
    half = COUNTED // 2
    return _carried_on(counted(half), counted(COUNTED), (len(texts) - half) / (COUNTED - half))


def _counted(
    config: StudyConfig,
    analyses: Sequence[Analysis],
    info: ModelInfo,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[PromptPair],
    flops_per_second: float,
) -> Estimate:
    """The cost of a study on these pairs."""
    asked = _asked(config, analyses, info, tokenizer, texts)
    study = _guessed(asked, tokenizer, texts)
    by_id = {pair.id: pair for pair in study.pairs}
    jobs = _jobs(study, analyses, by_id)
    later = {one.name: one.cost(study) for one in analyses if one.cost}
    beyond = _answers(asked).plus(*later.values())
    flops = sum(job.flops for job in jobs) + beyond.flops
    measured = sum(job.rows for job in jobs)
    return Estimate(
        counted=len(texts),
        pairs=len(study.pairs),
        refused=len(study.refusals),
        rows=measured,
        later=later,
        jobs=len(jobs),
        flops=flops,
        weights=weight_bytes(info, config.dtype, config.load.quantization),
        running=running_bytes(info, config.dtype, config.load.quantization),
        batch=max(size for job in jobs for size in batch_sizes(job, by_id, study.setting)),
        held=_PAIR_BYTES * len(texts) + _ROW_BYTES * (measured + beyond.rows),
        seconds=flops / flops_per_second,
        dtype=config.dtype,
        up=sum(_PROGRAM_BYTES + _packed(job.payload) for job in jobs),
        down=sum(_values_bytes(job) for job in jobs) + beyond.down,
    )


def _asked(
    config: StudyConfig,
    analyses: Sequence[Analysis],
    info: ModelInfo,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[PromptPair],
) -> Study:
    """The study on these pairs before its model has said anything. Raises: as an analysis' `check`."""
    prepared = prepare(config, tokenizer, info, texts)
    placebos = prepare_placebos(config, prepared.pairs, tokenizer, info, texts).pairs
    study = Study(config, info, outcome_of(config, tokenizer, texts), *prepared, placebos)
    for one in analyses:
        if one.check:
            one.check(study)
    return study


def _jobs(study: Study, analyses: Sequence[Analysis], pairs: Mapping[str, TokenPair]) -> list[Job]:
    """The jobs of the sites that analyses name. pairs: the study's, by id."""
    settings, setting = study.config, study.setting
    room = batch_budget(setting, settings.max_memory, settings.backend == "local")
    budget = Budget(lambda: settings.seconds_per_job * FIRST_RATE, room)
    keys = Keys(setting, study.pairs)
    return [job for rows in _waves(study, analyses) for job in plan_jobs(rows, pairs, setting, budget, keys)]


def _carried_on(small: Estimate, large: Estimate, factor: float) -> Estimate:
    """What two estimates grow by, so many times, on top of the smaller one."""

    def on(name: str) -> float:
        before, after = float(getattr(small, name)), float(getattr(large, name))
        return before + factor * (after - before)

    later = {
        name: small.later[name].plus(one.plus(small.later[name].times(-1)).times(factor))
        for name, one in large.later.items()
    }
    grown: dict[str, Any] = {name: on(name) for name in ("flops", "held", "seconds", "up", "down")}
    grown |= {name: round(on(name)) for name in ("pairs", "refused", "rows", "jobs")}
    return replace(large, later=later, **grown)


def _waves(study: Study, analyses: Sequence[Analysis]) -> list[list[Row]]:
    """The rows of each analysis' sites, those left out that an analysis before it measures."""
    seen: set[Row] = set()
    waves = []
    for one in analyses:
        rows = [row for request in requests_of(study, one) for row in request.rows(study.info) if row not in seen]
        seen.update(rows)
        waves.append(rows)
    return waves


def _packed(payload: dict[str, Any]) -> int:
    """Bytes of a payload as it is sent, but for the compressor: nnsight uses zstd, which does no worse than this."""
    return len(zlib.compress(pickle.dumps(payload), 1))


def _values_bytes(job: Job) -> int:
    """Float32 numbers of every row and base prompt, and the file around each context's tensor."""
    numbers = sum(len(context.keys) * len(context.payload["stacks"][0]["queries"]) for context in job.contexts)
    return 4 * numbers + _TENSOR_BYTES * (1 + len(job.contexts))


def matmul_rate(dtype: str, size: int = 1024, repeats: int = 5) -> float:
    """Floating-point operations per second of this machine's matrix product in a precision (best of `repeats`).

    A processor with bfloat16 units multiplies bfloat16 two to three times as fast as float32, one without them slower.
    """
    import torch  # takes seconds, which a command that plans nothing need not wait

    left, right = (torch.ones((size, size), dtype=getattr(torch, dtype)) for _ in range(2))
    best = math.inf
    for _ in range(repeats):
        start = time.perf_counter()
        left @ right
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best


def _guessed(study: Study, tokenizer: PreTrainedTokenizerBase, texts: Sequence[PromptPair]) -> Study:
    """The study with what its outcome compares: answers as long as may be, openings as many as the package lists."""
    settings = study.config
    match study.outcome:
        case RefusalOutcome():
            listed = listed_openings(settings) or GivenOpenings(COMPLIANT, REFUSING)
            return study.with_openings(given_openings(*listed, tokenizer, prompts_of(settings, tokenizer, texts)))
        case ResponseOutcome():
            longest = settings.response_logprob.tokens
            return replace(study, pairs=tuple(_longest_answers(pair, longest) for pair in study.pairs))
    return study


def _longest_answers(pair: TokenPair, tokens: int) -> TokenPair:
    """A pair with answers of so many tokens where it has none."""
    harmful, harmless = pair.answers
    return replace(pair, answers=(harmful or (0,) * tokens, harmless or (1,) * tokens))


def _answers(study: Study) -> Later:
    """The model's own answers, or those of which its openings are cut, before anything is measured."""
    match study.outcome:
        case RefusalOutcome() if listed_openings(study.config) is None:
            asked = [ids for pair in pairs_of(study, "discovery") for ids in pair.prompts]
            return of_answers(study, asked, JUDGED_TOKENS)
        case ResponseOutcome():
            prompts = [ids for pair in study.pairs for ids in unanswered(pair)]
            return of_answers(study, prompts, study.config.response_logprob.tokens)
    return Later()
