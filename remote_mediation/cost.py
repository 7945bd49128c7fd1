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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from remote_mediation.analyses import attacks, intervene, paths
from remote_mediation.analyses.claims import handed, sparse
from remote_mediation.analyses.claims.ask import layer_sets
from remote_mediation.analyses.claims.verdicts import FEWEST_LAYERS
from remote_mediation.analyses.detect import POSITIONS
from remote_mediation.analyses.neurons import BRANCHES
from remote_mediation.config import StudyConfig
from remote_mediation.engine.budget import LIBRARIES, Budget, base_flops, batch_budget, row_flops, weight_bytes
from remote_mediation.engine.jobs import Job, Keys, batch_sizes, plan_jobs
from remote_mediation.engine.rows import swap
from remote_mediation.engine.tasks import (
    Task,
    columns_task,
    direct_task,
    drift_task,
    generate_task,
    read_task,
    screen_tasks,
)
from remote_mediation.lab import FIRST_RATE, Study, placebo_id
from remote_mediation.models import load_info, load_tokenizer
from remote_mediation.openings import COMPLIANT, JUDGED_TOKENS, REFUSING, given_openings
from remote_mediation.pairs import load_pairs
from remote_mediation.sites import Site, band, thirds
from remote_mediation.study import first_requests, outcome_of, prepare, prepare_placebos, unanswered
from remote_mediation.tokens import TokenPair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Sustained share of a data-centre GPU's peak that small batches reach, and that peak (A100, bfloat16, dense).
_GPU_FLOPS = 0.3 * 312e12
# Bytes of the program's source in every payload, and of the file around a tensor that comes back (tests/ndif).
_PROGRAM_BYTES = 6_000
_TENSOR_BYTES = 700
# Sets beside the random ones that gates are compared with: their MLP, the gates themselves, an earlier layer's best.
_OTHER_SETS = 3
# Peak of a client process over NDIF, mostly Python and its libraries (tests/ndif measures it).
CLIENT_MEMORY = 0.7e9


class Later(NamedTuple):
    """What an analysis goes on to ask once the first wave is measured, at most."""

    rows: int = 0
    """Forward runs with a mediator overwritten."""
    flops: float = 0.0
    """Operations, those of prompts read, screened or continued included."""
    down: float = 0.0
    """Bytes of the numbers that come back."""

    def plus(self, *others: Later) -> Later:
        """All together."""
        return Later(*(sum(values) for values in zip(self, *others, strict=True)))

    def times(self, count: float) -> Later:
        """So many of it."""
        return Later(round(count * self.rows), count * self.flops, count * self.down)


@dataclass(frozen=True)
class Estimate:
    """The cost of a study."""

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
    batch: float
    """Bytes of the largest batch's activations."""
    seconds: float
    """Time on this machine, at the speed of its matrix products."""
    up: float
    """Bytes of the first wave's payloads, as a server would be sent them."""
    down: float
    """Bytes of the numbers that come back from it, of all that follows too."""

    @property
    def memory(self) -> float:
        """Peak bytes of a process that runs the study with the model on the CPU."""
        return LIBRARIES + self.weights + self.batch

    def described(self) -> list[tuple[str, str]]:
        """Names and values for a table."""
        return [
            ("pairs", f"{self.pairs} ({self.refused} refused)"),
            ("rows", f"{self.rows:,}"),
            *(
                (f"then {name}", f"at most {one.rows:,} rows, {one.flops / 1e12:,.2f} TFLOP, {one.down / 1e6:,.2f} MB")
                for name, one in self.later.items()
            ),
            ("jobs", f"{self.jobs:,}"),
            ("operations", f"{self.flops / 1e12:,.2f} TFLOP"),
            ("weights", f"{self.weights / 1e9:,.2f} GB"),
            ("largest batch", f"{self.batch / 1e9:,.2f} GB"),
            ("memory here", f"about {self.memory / 1e9:,.2f} GB at most, where the model runs on this machine's CPU"),
            ("time here", f"about {self.seconds / 60:,.1f} min at this machine's matmul speed"),
            ("time on one GPU", f"about {self.flops / _GPU_FLOPS / 3600:,.3f} GPU-hours (30% of an A100's peak)"),
            ("over NDIF", f"{self.up / 1e6:,.2f} MB up (for the rows above), {self.down / 1e6:,.2f} MB down"),
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
    prepared = prepare(config, tokenizer)
    placebos = prepare_placebos(config, prepared.pairs, tokenizer).pairs
    asked = Study(config, info, outcome_of(config, tokenizer), *prepared, placebos)
    study = _guessed(asked, tokenizer)
    pairs = study.pairs
    rows = [row for request in first_requests(study) for row in request.rows(info)]
    by_id = {pair.id: pair for pair in pairs}
    room = batch_budget(study.setting, config.max_memory, config.backend == "local")
    budget = Budget(lambda: config.seconds_per_job * FIRST_RATE, room)
    jobs = list(plan_jobs(rows, by_id, study.setting, budget, Keys(study.setting, pairs)))
    later: dict[str, Later] = {name: cost(study) for name, cost in _LATER.items() if name in config.analyses}
    more = _answers(asked).plus(*later.values())
    flops = sum(job.flops for job in jobs) + more.flops
    measured = sum(job.rows for job in jobs)
    return Estimate(
        pairs=len(pairs),
        refused=len(prepared.refusals),
        rows=measured,
        later=later,
        jobs=len(jobs),
        flops=flops,
        weights=weight_bytes(info, config.dtype),
        batch=max(size for job in jobs for size in batch_sizes(job, by_id, study.setting)),
        seconds=flops / matmul_rate(),
        up=sum(_PROGRAM_BYTES + _packed(job.payload) for job in jobs),
        down=sum(_values_bytes(job) for job in jobs) + more.down,
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


def _guessed(study: Study, tokenizer: PreTrainedTokenizerBase) -> Study:
    """The study with what its outcome compares: answers as long as may be, openings as many as the package lists."""
    settings = study.config
    if study.outcome.name == "refusal":
        compliant, refusing = settings.refusal.compliant or COMPLIANT, settings.refusal.refusing or REFUSING
        return study.with_outcome(given_openings(compliant, refusing, tokenizer))
    if study.outcome.name != "response_logprob":
        return study
    tokens, pairs = settings.response_logprob.tokens, []
    for pair in study.pairs:
        harmful, harmless = pair.answers
        pairs.append(replace(pair, answers=(harmful or (0,) * tokens, harmless or (1,) * tokens)))
    return replace(study, pairs=tuple(pairs))


def _answers(study: Study) -> Later:
    """The model's own answers, or those of which its openings are cut, before anything is measured."""
    settings = study.config.refusal
    if study.outcome.name == "refusal" and settings.openings == "own" and not settings.compliant:
        asked = [ids for pair in _pairs(study, "discovery") for ids in pair.prompts]
        return _continued(study, asked, JUDGED_TOKENS)
    if study.outcome.name != "response_logprob":
        return Later()
    prompts = [ids for pair in study.pairs for ids in unanswered(pair)]
    return _continued(study, prompts, study.config.response_logprob.tokens)


def _neurons(study: Study) -> Later:
    """The search for single neurons and its gate set."""
    everywhere = _neurons_measured(study) + _curve_sizes(study)
    heldout = everywhere + study.config.neurons.random_sets + _OTHER_SETS
    steps = 2 + study.info.d_ff.bit_length()  # of a search by windows, or of the search for the smallest set
    found = _bases(study, _pairs(study)).times(2 * steps)
    found = found.plus(_gate_rows(study, "discovery").times(everywhere), _gate_rows(study, "heldout").times(heldout))
    if "gradient" not in study.config.neurons.search:
        return found
    position = study.config.positions.neurons[0]
    pairs = [pair for pair in _pairs(study, "discovery") if pair.places(position).x0]
    tasks = screen_tasks(pairs, "mlp_neurons", position, study.setting)
    return found.plus(_tasks(tasks, 4 * study.info.layers * study.info.d_ff))


def _detect(study: Study) -> Later:
    return _read(study, _pairs(study), study.info.layers * len(POSITIONS) * study.info.d_model)


def _paths(study: Study) -> Later:
    gated = "neurons" in study.config.analyses
    site = Site("layer_output", paths.early_layer(study.info.layers), "edit")
    count = 3 + (1 + paths.RANDOM_SETS if gated else 0)  # nothing frozen, MLPs, attention, gates, random sets
    pairs = _pairs(study, "heldout" if gated else "all")
    return _bases(study, pairs).plus(_rows(study, pairs, site).times(count))


def _intervene(study: Study) -> Later:
    pairs, settings = _pairs(study, "heldout"), study.config.intervene
    held = 2 + len(settings.factors)  # gates at their mean or times a factor, the whole MLP
    prompts = [ids for pair in pairs for ids in pair.prompts]
    drifts = [drift_task("", pair.x0, (0,) * settings.tokens, (), study.setting) for pair in pairs]
    said = _continued(study, prompts, settings.tokens).plus(_tasks(drifts, 3 * settings.tokens))
    return _bases(study, pairs).plus(
        _gate_rows(study, "heldout").times(held + intervene.RANDOM_SETS),
        _read(study, _pairs(study, "discovery"), study.info.d_ff),
        said.times(held + 2),  # and with nothing held, and with a random set
    )


def _attacks(study: Study) -> Later:
    """Rewrapped prompts are taken to be as long as the plain ones: no more than a row's tokens behind the edit run."""
    pairs, variants = _pairs(study, "heldout"), len(attacks.WRAPPERS) + len(study.config.attacks.checkpoints)
    units = _neurons_measured(study) + study.config.neurons.exact
    said = _continued(study, [pair.x1 for pair in pairs], study.config.intervene.tokens)
    return (
        _gate_rows(study, "heldout")
        .times(variants * (units + 2) + 2)
        .plus(_bases(study, pairs).plus(said).times(2 * (variants + 1)))
    )


def _monitor(study: Study) -> Later:
    hard = study.config.monitor.hard_negatives
    more = len(load_pairs(hard)) / len(study.pairs) if hard else 0.0
    return _read(study, _pairs(study), study.info.d_ff + study.info.d_model).times(1 + more)


def _claims(study: Study) -> Later:
    """Direct effects of every pair; where there are thirds, the joint ones of all five claims."""
    discovery, heldout, info = _pairs(study, "discovery"), _pairs(study, "heldout"), study.info
    beside = {pair.id: pair for pair in study.placebos}
    ids = map(placebo_id, (pair.id for pair in study.pairs))
    every = [*study.pairs, *(beside[name] for name in ids if name in beside)]
    both = [*heldout, *(beside[name] for pair in heldout if (name := placebo_id(pair.id)) in beside)]
    sets = [band("mlp_output", range(info.layers), "last")] * (2 * len(layer_sets(info.layers)) + 1)
    direct = _tasks([direct_task(pair, sets, study.setting) for pair in every], 2 * len(sets) * _reads(study))
    bands = _rows(study, both, _late_site(study, "all")).times(2)
    found = _bases(study, every).times(2).plus(direct, bands)
    return found if info.layers < FEWEST_LAYERS else found.plus(_claims_of_place(study, discovery, both, heldout))


def _claims_of_place(
    study: Study, discovery: Sequence[TokenPair], both: Sequence[TokenPair], heldout: Sequence[TokenPair]
) -> Later:
    """both: held-out pairs and their placebos."""
    info = study.info
    sizes = len(sparse.grid(len(thirds(info.layers).late) * info.d_ff))
    late = _late_site(study, "all")
    stream = [Site("layer_output", layer, "last") for layer in range(info.layers)]
    frozen = 1 + 1 + 2 + handed.RANDOM_SETS  # the early site alone, twice named; middle and late MLPs; others
    screened = screen_tasks(discovery, "mlp_neurons", "all", study.setting)
    return (
        _bases(study, [*discovery, *both])
        .times(8)
        .plus(
            *(_rows(study, pairs, site) for pairs in (discovery, both) for site in stream),
            _rows(study, discovery, late).times(1 + sizes),
            _rows(study, both, late).times(3),
            _rows(study, heldout, late).times(sizes + sum(sparse.RANDOM_SETS)),
            _rows(study, heldout, Site("mlp_output", 0, "last")).times(sizes),
            _rows(study, both, handed.early_site(info.layers)).times(frozen),
            _tasks(screened, 4 * info.layers * info.d_ff),
            _tasks([columns_task("mlp_neurons", study.setting)], info.layers * info.d_ff),
            _read(study, discovery, info.layers * info.d_ff),
            _read(study, [*discovery, *both], (1 + info.layers) * info.d_model).times(2),
        )
    )


def _late_site(study: Study, position: str) -> Site:
    """The first module of the late third; of a model without one, of its last layer."""
    late = thirds(study.info.layers).late
    return Site("mlp_output", min(late.start, study.info.layers - 1), position)


def _reads(study: Study) -> int:
    return max(len(study.outcome.reads(pair)) for pair in study.pairs)


_LATER: dict[str, Callable[[Study], Later]] = {
    "neurons": _neurons,
    "detect": _detect,
    "paths": _paths,
    "intervene": _intervene,
    "attacks": _attacks,
    "monitor": _monitor,
    "claims": _claims,
}


def _pairs(study: Study, split: str = "all") -> list[TokenPair]:
    splits = study.splits() if split != "all" else {}
    return [pair for pair in study.pairs if split in ("all", splits.get(pair.id))]


def _rows(study: Study, pairs: Sequence[TokenPair], site: Site) -> Later:
    """One row on each prompt, as if it overwrote this site."""
    rows = [(swap(pair, site, side, study.info), pair) for pair in pairs for side in (0, 1)]
    written = [(row, pair) for row, pair in rows if row.writes]
    flops = sum(row_flops(row, pair, study.setting) for row, pair in written)
    return Later(len(written), flops, 4.0 * sum(len(study.outcome.reads(pair)) for _, pair in written))


def _gate_rows(study: Study, split: str) -> Later:
    site = Site("mlp_neurons", study.info.layers // 2, study.config.positions.neurons[0], (0,))
    return _rows(study, _pairs(study, split), site)


def _bases(study: Study, pairs: Sequence[TokenPair]) -> Later:
    """The prompts as they are, which every wave of rows begins with."""
    return Later(0, sum(base_flops(pair, study.setting) for pair in pairs))


def _tasks(tasks: Sequence[Task], numbers: int) -> Later:
    """So many numbers come back from each."""
    return Later(0, sum(task.flops for task in tasks), 4.0 * numbers * len(tasks))


def _read(study: Study, pairs: Sequence[TokenPair], numbers: int) -> Later:
    return _tasks([read_task("", ids, (), study.setting) for pair in pairs for ids in pair.prompts], numbers)


def _continued(study: Study, prompts: Sequence[tuple[int, ...]], tokens: int) -> Later:
    return _tasks([generate_task(prompts, tokens, (), study.setting)], len(prompts) * tokens)


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
