"""The parts of `gpu`: what each measures, as records that are kept as soon as they are made."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
import warnings
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from bench import gpu_models
from bench.gpu_contenders import Hooks, Measured, Traces, engine
from bench.gpu_models import Shape
from bench.grid import Case, grid, sample
from remote_mediation.engine.budget import Setting, row_flops, weight_bytes
from remote_mediation.engine.jobs import batch_sizes
from remote_mediation.engine.local import LocalBackend
from remote_mediation.engine.rows import Row, swap, swap_all
from remote_mediation.sites import Component, Site
from remote_mediation.tokens import TokenPair

ROOT = Path(__file__).resolve().parents[2]
BATCHES = {"batches of 1 GB": 1e9, "batches of 8 GB": 8e9}
# Times the engine runs each workload; the fastest counts, as of the matrix product.
REPEATS = 3
PRODUCT_REPEATS = 10
# Sites of the grid on which the loops of single passes are timed.
SITES = 24
# Peak of an H100 (dense, bfloat16), and the share of it that the yardstick of overhead assumes.
_H100_FLOPS, _SHARE = 989e12, 0.4
ROWS, TOKENS = 256, 32
# Values of two ways in float32, of the largest effect.
MOST_APART = 1e-3
# Places that are named of those at which the host waits.
MOST_WAITS = 8
_Result = TypeVar("_Result")


class Place(NamedTuple):
    """Where and how large."""

    device: str
    tiny: bool
    """A dry run: shapes that take no time."""


class Record(NamedTuple):
    """One number."""

    model: str
    dtype: str
    workload: str
    """What was run."""
    quantity: str
    value: float
    unit: str


Emit = Callable[[Record], None]


class Teller(NamedTuple):
    """Makes records of one model."""

    emit: Emit
    model: str
    dtype: str

    def __call__(self, workload: str, quantity: str, value: float, unit: str = "") -> None:
        """One record."""
        self.emit(Record(self.model, self.dtype, workload, quantity, float(value), unit))


def tests(place: Place, emit: Emit) -> None:
    """The tests marked `cuda`: their outcomes, and the figures that they state.

    Raises:
        RuntimeError: one failed, or none ran.
    """
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        arguments = ["-m", "cuda", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", "tests/test_cuda.py"]
        # An interpreter of its own: pytest's plugins have to be imported before nnsight is.
        subprocess.run([sys.executable, "-m", "pytest", *arguments], cwd=ROOT, check=False)
        cases = list(ElementTree.parse(report).iter("testcase"))
    tell, outcomes = Teller(emit, "tiny random models", ""), [_outcome_of(case) for case in cases]
    for name in ("passed", "failed", "skipped"):
        tell("all", name, outcomes.count(name))
    for case in cases:
        for found in case.iter("property"):
            tell(case.get("name", ""), found.get("name", ""), float(found.get("value", "nan")))
    failed = [case.get("name", "") for case, found in zip(cases, outcomes, strict=True) if found == "failed"]
    if failed:
        raise RuntimeError(f"{len(failed)} tests failed: {', '.join(failed)}")
    if "passed" not in outcomes and not place.tiny:
        raise RuntimeError("no test ran, though there should be a GPU")


def speed(shape: Shape, dtype: str, place: Place, emit: Emit) -> None:
    """The engine beside single passes on one model, and its peak of memory beside what was planned."""
    tell, rate = Teller(emit, shape.name, dtype), product_rate(dtype, place)
    tell("one large matrix product", "TFLOP/s", rate / 1e12)
    built = _timed(partial(gpu_models.backend, shape, dtype, place.device), place)
    tell("building the model", "s", built.seconds)
    bench = Bench(built.result, shape, rate, place, tell)
    single_tokens(bench)
    long_rows(bench)
    memory(bench)


def overhead(place: Place, emit: Emit) -> None:
    """Time of a batch on models so thin that arithmetic takes none, and its share of a 70B model's arithmetic."""
    layers = (2, 3) if place.tiny else (20, 40, 80)
    shapes = [gpu_models.thin(count) for count in layers]
    shapes.append(gpu_models.thin_mixture(layers[-1], 4 if place.tiny else 64))
    for shape in shapes:
        _overhead_of(shape, 16 if place.tiny else ROWS, place, emit)
    _overhead_of(shapes[-2], 4 if place.tiny else ROWS // 4, place, emit)


def product_rate(dtype: str, place: Place) -> float:
    """Operations per second of one large matrix product in the models' own precision; best of several."""
    size = 64 if place.tiny else 8192
    left, right = (torch.randn(size, size, dtype=getattr(torch, dtype), device=place.device) for _ in range(2))
    best = min(_timed(lambda: left @ right, place).seconds for _ in range(PRODUCT_REPEATS))
    return 2.0 * size**3 / best


class _Timed(NamedTuple):
    """What something gave, and how long it took."""

    seconds: float
    result: Any


def _timed(work: Callable[[], _Result], place: Place) -> _Timed:
    _wait(place)
    start = time.perf_counter()
    result = work()
    _wait(place)
    return _Timed(time.perf_counter() - start, result)


def _wait(place: Place) -> None:
    """For all that runs on the GPU."""
    if place.device == "cuda":
        torch.cuda.synchronize()


class Bench(NamedTuple):
    """A model and where its figures go."""

    backend: LocalBackend
    shape: Shape
    rate: float
    """Operations per second of one large matrix product."""
    place: Place
    tell: Teller

    def pair(self, share: float, answer: int = 0) -> TokenPair:
        """Prompts that differ in one token so far into them; a dry run has few tokens behind it."""
        first = int(gpu_models.LENGTH * (0.9 if self.place.tiny else share))
        return gpu_models.pair(first, self.shape, answer=answer)

    def setting(self, normalise: bool = False) -> Setting:
        """Of a study that reads two logits, or with `normalise` log-probabilities."""
        return Setting(self.backend.info, self.tell.dtype, gpu_models.outcome(normalise))

    def fastest(self, setting: Setting, pair: TokenPair, rows: list[Row], batch_bytes: float) -> _Timed:
        """The engine on these rows."""
        work = partial(engine, self.backend, setting, pair, rows, batch_bytes)
        return min((_timed(work, self.place) for _ in range(_repeats(self.place))), key=lambda timed: timed.seconds)


def single_tokens(bench: Bench) -> None:
    """Every single token from the edit on at three components of every layer, both ways; and single passes beside it.

    Raises:
        RuntimeError: the values of two ways differ in float32.
    """
    pair, setting = bench.pair(0.6), bench.setting()
    cases = grid(pair, bench.backend.info)
    rows = [swap(pair, case.site, case.base, bench.backend.info) for case in cases]
    engine(bench.backend, setting, pair, rows[:8], 1e9)
    own = {}
    for name, batch_bytes in BATCHES.items():
        timed = bench.fastest(setting, pair, rows, batch_bytes)
        _tell_speed(bench, f"single tokens, {name}", timed, rows, pair)
        own[name] = timed.seconds / len(rows)
    values = dict(zip(cases, timed.result.values, strict=True))
    largest = _largest_effect(values)
    bench.tell("single tokens", "largest effect", largest, "logits")
    chosen = sample(cases, 6 if bench.place.tiny else SITES, gpu_models.SEED)
    model = bench.backend.model
    for contender in (Hooks(model._module, pair, setting.outcome), Traces(model, pair, setting.outcome)):
        contender.measure(chosen[:2])
        alone = _timed(partial(contender.measure, chosen), bench.place)
        seconds = alone.seconds / len(chosen)
        bench.tell(contender.title, "ms a row", seconds * 1e3)
        for name in BATCHES:
            bench.tell(contender.title, f"times as long as the engine, {name}", seconds / own[name])
        apart = max(abs(value - values[case]) for case, value in zip(chosen, alone.result, strict=True))
        bench.tell(contender.title, "largest deviation from the engine, of the largest effect", apart / largest)
        if bench.tell.dtype == "float32" and apart > MOST_APART * largest:
            raise RuntimeError(f"{contender.title}: values are {apart:.1e} logits apart from the engine's")


def _largest_effect(values: dict[Case, float]) -> float:
    """Half of what the outcomes of one prompt span: the prompt as it is lies among them."""
    spans = []
    for base in (0, 1):
        own = [value for case, value in values.items() if case.base == base]
        spans.append((max(own) - min(own)) / 2)
    return max(spans)


def long_rows(bench: Bench) -> None:
    """Every contribution of every layer at all tokens from the edit on, both ways."""
    pair, setting = bench.pair(0.2), bench.setting()
    rows = whole_rows(pair, setting)
    for name, batch_bytes in BATCHES.items():
        timed = bench.fastest(setting, pair, rows, batch_bytes)
        _tell_speed(bench, f"rows of {len(pair.x0) - pair.first} tokens, {name}", timed, rows, pair)


def whole_rows(pair: TokenPair, setting: Setting) -> list[Row]:
    """Rows that swap one contribution at all tokens from the edit on, lowest layers first."""
    components: tuple[Component, ...] = ("attention_output", "mlp_output")
    return [
        swap(pair, Site(component, layer, "all"), base, setting.info)
        for layer in range(setting.info.layers)
        for component in components
        for base in (0, 1)
    ]


def _tell_speed(bench: Bench, workload: str, timed: _Timed, rows: list[Row], pair: TokenPair) -> None:
    """Rates of one workload. Operations are those of the plan: whole layers from each row's first write on."""
    measured: Measured = timed.result
    flops = sum(job.flops for job in measured.jobs)
    tokens = sum(len(pair.prompts[row.base]) + pair.fed - row.start for row in rows)
    bench.tell(workload, "rows", len(rows))
    contexts = [context for job in measured.jobs for context in job.contexts]
    bench.tell(workload, "batches", sum(len(context.payload["batches"]) for context in contexts))
    bench.tell(workload, "s", timed.seconds)
    bench.tell(workload, "rows/s", len(rows) / timed.seconds)
    bench.tell(workload, "tokens/s", tokens / timed.seconds)
    bench.tell(workload, "TFLOP/s", flops / timed.seconds / 1e12)
    bench.tell(workload, "share of the product's rate", flops / timed.seconds / bench.rate)


def memory(bench: Bench) -> None:
    """Peak of the GPU's memory beside weights and largest batch as `plan` has them, for both kinds of outcome."""
    for kind, normalise in (("two logits", False), ("log-probabilities", True)):
        pair, setting = bench.pair(0.2, answer=3 if normalise else 0), bench.setting(normalise)
        rows, weights = whole_rows(pair, setting), weight_bytes(setting.info, setting.dtype)
        for name, batch_bytes in BATCHES.items():
            _fresh_peak(bench.place)
            measured = engine(bench.backend, setting, pair, rows, batch_bytes)
            batch = max(size for job in measured.jobs for size in batch_sizes(job, {pair.id: pair}, setting))
            tell = partial(bench.tell, f"memory, {kind}, {name}")
            tell("weights as planned, GB", weights / 1e9)
            tell("largest batch as planned, GB", batch / 1e9)
            if bench.place.device == "cuda":
                peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
                tell("peak, GB", peak / 1e9)
                tell("peak with torch's reserve, GB", reserved / 1e9)
                tell("peak beside weights, of the largest batch as planned", (peak - weights) / batch)


def _fresh_peak(place: Place) -> None:
    if place.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _overhead_of(shape: Shape, rows_wanted: int, place: Place, emit: Emit) -> None:
    """One batch of so many rows of 32 tokens, of it one row and the base runs, and one plain pass as large."""
    backend, tell = gpu_models.backend(shape, "float32", place.device), Teller(emit, shape.name, "float32")
    pair = gpu_models.pair(1, shape, TOKENS + 1)
    setting = Setting(backend.info, "float32", gpu_models.outcome())
    rows = _different_rows(pair, setting, rows_wanted)
    work, alone = (partial(engine, backend, setting, pair, some, 1e12) for some in (rows, rows[:1]))
    work()
    whole = _median(work, place)
    name = f"{len(rows)} rows of {TOKENS} tokens"
    tell(name, "planned, run and read, ms", whole * 1e3)
    tell(name, "of it one row and the base runs, ms", _median(alone, place) * 1e3)
    tell(
        name, "one plain pass over as many tokens, ms", _median(partial(_plain_pass, backend, pair, rows), place) * 1e3
    )
    if shape.settings["num_hidden_layers"] == gpu_models.SEVENTY_B.settings["num_hidden_layers"]:
        large = Setting(gpu_models.info(gpu_models.SEVENTY_B), "bfloat16", setting.outcome)
        arithmetic = sum(row_flops(row, pair, large) for row in rows) / (_H100_FLOPS * _SHARE)
        tell(name, "of a 70B model's arithmetic at 40% of an H100's peak", whole / arithmetic)
    if place.device == "cuda":
        for where, times in _waits(work).most_common(MOST_WAITS):
            tell(name, f"times the host waits for the GPU in {where}", times)


def _waits(work: Callable[[], Any]) -> Counter[str]:
    """How often the host waits for the GPU, by file and line, as torch itself notices it."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return Counter(f"{Path(one.filename).name}:{one.lineno}" for one in caught if "synchroniz" in str(one.message))


def _different_rows(pair: TokenPair, setting: Setting, count: int) -> list[Row]:
    """So many different rows: single contributions, then sets of two, all from low layers on."""
    info, rows = setting.info, []
    sites: list[list[Site]] = [[Site("mlp_output", layer, "all")] for layer in range(info.layers)]
    sites += [
        [Site("mlp_output", low, "all"), Site("attention_output", high, "all")]
        for low in range(info.layers)
        for high in range(low + 1, info.layers)
    ]
    for number in range(count):
        chosen = sites[number // 2 % len(sites)]
        rows.append(swap_all(pair, chosen, number % 2, info))
    return list(dict.fromkeys(rows))


def _median(work: Callable[[], Any], place: Place) -> float:
    return statistics.median(_timed(work, place).seconds for _ in range(_repeats(place)))


def _repeats(place: Place) -> int:
    return 1 if place.tiny else REPEATS


def _plain_pass(backend: LocalBackend, pair: TokenPair, rows: list[Row]) -> None:
    """One forward pass of transformers over as many rows and tokens."""
    ids = torch.tensor([pair.x0[pair.first :]], device=backend.model._module.device).expand(len(rows), -1)
    with torch.no_grad():
        backend.model._module(input_ids=ids, use_cache=True, logits_to_keep=1)


def _outcome_of(case: ElementTree.Element) -> str:
    found = {child.tag for child in case}
    if found & {"failure", "error"}:
        return "failed"
    return "skipped" if "skipped" in found else "passed"
