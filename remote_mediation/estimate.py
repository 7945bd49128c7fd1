"""What a study would cost, before any weights are loaded: rows, jobs, operations, bytes, memory and time.

The rows are the real ones: the pairs are tokenised and every analysis names its sites. Only two things must be guessed,
the answers (taken to be as long as the study allows) and what the neuron search will measure (taken to be as much as it
may, in the middle of the network).
"""

from __future__ import annotations

import math
import pickle
import time
import zlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from remote_mediation.analyses.neurons import BRANCHES
from remote_mediation.config import StudyConfig
from remote_mediation.lab import FIRST_RATE, Study
from remote_mediation.models import load_info, load_tokenizer
from remote_mediation.plan import (
    LIBRARIES,
    Budget,
    Job,
    Keys,
    batch_budget,
    batch_sizes,
    plan_jobs,
    row_flops,
    weight_bytes,
)
from remote_mediation.prompts import load_pairs, tokenise
from remote_mediation.rows import swap
from remote_mediation.sites import Site
from remote_mediation.study import check_enough, first_requests, outcome_of, select

# Sustained share of a data-centre GPU's peak that small batches reach, and that peak (A100, bfloat16, dense).
_GPU_FLOPS = 0.3 * 312e12
# Bytes of the program's source in every payload, and of the file around a tensor that comes back (tests/ndif).
_PROGRAM_BYTES = 6_000
_TENSOR_BYTES = 700
# Sets beside the random ones that gates are compared with: their MLP, the gates themselves, an earlier layer's best.
_OTHER_SETS = 3
# Peak of a client process over NDIF, mostly Python and its libraries (tests/ndif measures it).
CLIENT_MEMORY = 0.7e9


@dataclass(frozen=True)
class Estimate:
    """The cost of a study."""

    pairs: int
    """Pairs that can be run."""
    refused: int
    """Pairs that cannot."""
    rows: int
    """Forward runs with a mediator overwritten, of the first wave."""
    unit_rows: int
    """At most so many more for single neurons and the gate set."""
    jobs: int
    """Jobs of the first wave, at the speed assumed."""
    flops: float
    """Operations of both waves."""
    weights: float
    """Bytes of the model's weights."""
    batch: float
    """Bytes of the largest batch's activations."""
    seconds: float
    """Time on this machine, at the speed of its matrix products."""
    up: float
    """Bytes of the first wave's payloads, as a server would be sent them."""
    down: float
    """Bytes of the numbers that come back from it."""

    @property
    def memory(self) -> float:
        """Peak bytes of a process that runs the study with the model on the CPU."""
        return LIBRARIES + self.weights + self.batch

    def described(self) -> list[tuple[str, str]]:
        """Names and values for a table."""
        more = f" (+ at most {self.unit_rows:,} for single neurons)" if self.unit_rows else ""
        return [
            ("pairs", f"{self.pairs} ({self.refused} refused)"),
            ("rows", f"{self.rows:,}{more}"),
            ("jobs", f"{self.jobs:,}"),
            ("operations", f"{self.flops / 1e12:,.2f} TFLOP"),
            ("weights", f"{self.weights / 1e9:,.2f} GB"),
            ("largest batch", f"{self.batch / 1e9:,.2f} GB"),
            ("memory here", f"about {self.memory / 1e9:,.2f} GB at most, where the model runs on this machine's CPU"),
            ("time here", f"about {self.seconds / 60:,.1f} min at this machine's matmul speed"),
            ("time on one GPU", f"about {self.flops / _GPU_FLOPS / 3600:,.3f} GPU-hours (30% of an A100's peak)"),
            ("over NDIF", f"{self.up / 1e6:,.2f} MB up, {self.down / 1e6:,.2f} MB down (without the single neurons)"),
            ("client memory", f"about {CLIENT_MEMORY / 1e9:.1f} GB over NDIF for a model of any size"),
        ]


def estimate(config: StudyConfig) -> Estimate:
    """The cost of a study from its configuration, pairs and tokenizer.

    Raises:
        ModelError: configuration or tokenizer cannot be loaded.
        PairsError: the pairs cannot be used, or not be split where neurons are searched.
        SiteError: the study names something that the model does not have.
    """
    info, tokenizer = load_info(config.model, config.revision), load_tokenizer(config.model, config.revision)
    prepared = tokenise(select(load_pairs(config.pairs), config.max_pairs), tokenizer)
    check_enough(prepared)
    answers = ((0,) * config.response_logprob.tokens, (1,) * config.response_logprob.tokens)
    pairs = prepared.pairs
    if config.outcome == "response_logprob":
        pairs = tuple(replace(pair, answers=answers) for pair in pairs)
    outcome = outcome_of(config, tokenizer)
    study = Study(config, info, outcome, pairs, prepared.refusals)
    rows = [row for request in first_requests(study) for row in request.rows(info)]
    by_id = {pair.id: pair for pair in pairs}
    room = batch_budget(study.setting, config.max_memory, config.backend == "local")
    budget = Budget(lambda: config.seconds_per_job * FIRST_RATE, room)
    jobs = list(plan_jobs(rows, by_id, study.setting, budget, Keys(study.setting, pairs)))
    unit_rows, unit_flops = _units(study)
    flops = sum(job.flops for job in jobs) + unit_flops
    measured = sum(job.rows for job in jobs)
    return Estimate(
        pairs=len(pairs),
        refused=len(prepared.refusals),
        rows=measured,
        unit_rows=unit_rows,
        jobs=len(jobs),
        flops=flops,
        weights=weight_bytes(info, config.dtype),
        batch=max(size for job in jobs for size in batch_sizes(job, by_id, study.setting)),
        seconds=flops / matmul_rate(),
        up=sum(_PROGRAM_BYTES + _packed(job.payload) for job in jobs),
        down=sum(_values_bytes(job) for job in jobs),
    )


def _packed(payload: dict[str, Any]) -> int:
    """Bytes of a payload as it is sent, but for the compressor: nnsight uses zstd, which does no worse than this."""
    return len(zlib.compress(pickle.dumps(payload), 1))


def _values_bytes(job: Job) -> int:
    """Float32 numbers of every row and base prompt, and the file around each context's tensor."""
    numbers = sum(len(part.keys) * len(part.payload["stacks"][0]["queries"]) for part in job.parts)
    return 4 * numbers + _TENSOR_BYTES * (1 + len(job.parts))


def matmul_rate(size: int = 1024, repeats: int = 5) -> float:
    """Floating-point operations per second of this machine's single-precision matrix product (best of `repeats`)."""
    rng = np.random.default_rng(0)
    left, right = (rng.standard_normal((size, size), dtype=np.float32) for _ in range(2))
    best = np.inf
    for _ in range(repeats):
        start = time.perf_counter()
        left @ right
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best


def _units(study: Study) -> tuple[int, float]:
    """Rows and operations of the search for single neurons and of its gate set, at most, as if in the middle layer."""
    if "neurons" not in study.config.granularity:
        return 0, 0.0
    splits, everywhere = study.splits(), _neurons_measured(study) + _curve_sizes(study)
    count = {"discovery": everywhere, "heldout": everywhere + study.config.neurons.random_sets + _OTHER_SETS}
    site = Site("mlp_neurons", study.info.layers // 2, study.config.positions.neurons[0], (0,))
    sample = [(swap(pair, site, side, study.info), pair) for pair in study.pairs for side in (0, 1)]
    rows = sum(count[splits[pair.id]] for row, pair in sample if row.writes)
    return rows, sum(count[splits[pair.id]] * row_flops(row, pair, study.setting) for row, pair in sample if row.writes)


def _neurons_measured(study: Study) -> int:
    """Single neurons or windows that the search measures on every pair, at most, whichever way it goes."""
    settings, width = study.config.neurons, study.info.d_ff
    searched = len(settings.layers or range(study.info.layers)) * width
    ways = {
        "windows": BRANCHES * settings.max_windows * math.ceil(math.log(width, BRANCHES)),
        "all": searched,
        "gradient": min(2 * settings.exact, searched),
    }
    return max(ways[way] for way in settings.search)


def _curve_sizes(study: Study) -> int:
    """Sizes at which the gate set is tried, at most: powers of two and all neurons, then a bisection between two."""
    return 2 * study.info.d_ff.bit_length()
