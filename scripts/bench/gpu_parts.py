"""The parts of `gpu`: what each measures, as records that are kept as soon as they are made."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
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
BATCHES = {"batches of 1 GB, the default": 1e9, "batches of 8 GB": 8e9}
# Times the engine runs each workload; the fastest counts, as of the matrix product.
REPEATS = 3
PRODUCT_REPEATS = 10
# Sites of the grid on which the loops of single passes are timed.
SITES = 24
# Peak of an H100 (dense, bfloat16), and the share of it that the yardstick of overhead assumes.
_H100_FLOPS, _SHARE = 989e12, 0.4
ROWS, TOKENS = 256, 32
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
    quantity: str
    value: float | str
    unit: str


Emit = Callable[[Record], None]


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
    outcomes = [_outcome_of(case) for case in cases]
    for name in ("passed", "failed", "skipped"):
        emit(Record("tiny random models", "", f"tests {name}", outcomes.count(name), "tests"))
    for case in cases:
        for found in case.iter("property"):
            emit(Record(case.get("name", ""), "", found.get("name", ""), float(found.get("value", "nan")), "share"))
    failed = [case.get("name", "") for case, found in zip(cases, outcomes, strict=True) if found == "failed"]
    if failed:
        raise RuntimeError(f"{len(failed)} tests failed: {', '.join(failed)}")
    if "passed" not in outcomes and not place.tiny:
        raise RuntimeError("no test ran, though there should be a GPU")


def speed(shape: Shape, dtype: str, place: Place, emit: Emit) -> None:
    """The engine beside single passes on one model, and its peak of memory beside what was planned."""
    tell = partial(_tell, emit, shape.name, dtype)
    rate = product_rate(dtype, place)
    tell("one large matrix product", rate / 1e12, "TFLOP/s")
    start = time.perf_counter()
    backend = gpu_models.backend(shape, dtype, place.device)
    _wait(place)
    tell("building the model", time.perf_counter() - start, "s")
    _grid_against_single_passes(backend, shape, dtype, rate, place, tell)
    _long_rows(backend, shape, dtype, rate, place, tell)
    _memory(backend, shape, dtype, place, tell)


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


def _tell(emit: Emit, model: str, dtype: str, quantity: str, value: float | str, unit: str) -> None:
    emit(Record(model, dtype, quantity, value, unit))


def _first(place: Place, share: float) -> int:
    """Token in which the prompts differ, so far into them."""
    return int(gpu_models.LENGTH * (0.9 if place.tiny else share))


def _grid_against_single_passes(
    backend: LocalBackend, shape: Shape, dtype: str, rate: float, place: Place, tell: Callable[..., None]
) -> None:
    """Every single token from the edit on at three components of every layer, both ways."""
    pair, setting = gpu_models.pair(_first(place, 0.6), shape), Setting(backend.info, dtype, gpu_models.outcome())
    cases = grid(pair, backend.info)
    rows = [swap(pair, case.site, case.base, backend.info) for case in cases]
    engine(backend, setting, pair, rows[:8], 1e9)
    per_row = {}
    for name, batch_bytes in BATCHES.items():
        timed = _fastest(backend, setting, pair, rows, batch_bytes, place)
        _tell_speed(f"grid of single tokens, {name}", timed, rows, pair, setting, rate, tell)
        per_row[name] = timed.seconds / len(rows)
    values = dict(zip(cases, timed.result.values, strict=True))
    chosen = sample(cases, 6 if place.tiny else SITES, gpu_models.SEED)
    model = backend.model
    for contender in (Hooks(model._module, pair, setting.outcome), Traces(model, pair, setting.outcome)):
        contender.measure(chosen[:2])
        alone = _timed(partial(contender.measure, chosen), place)
        seconds = alone.seconds / len(chosen)
        tell(f"{contender.title}", seconds * 1e3, "ms/row")
        for name, own in per_row.items():
            tell(f"{contender.title}, times the engine's time in {name}", seconds / own, "x")
        deviation = max(abs(value - values[case]) for case, value in zip(chosen, alone.result, strict=True))
        tell(f"{contender.title}, largest deviation from the engine", deviation, "logits")
    tell("largest effect in the grid", _largest_effect(values), "logits")


def _largest_effect(values: dict[Case, float]) -> float:
    """Half of what the outcomes of one prompt span: the prompt as it is lies among them."""
    spans = []
    for base in (0, 1):
        own = [value for case, value in values.items() if case.base == base]
        spans.append((max(own) - min(own)) / 2)
    return max(spans)


def _long_rows(
    backend: LocalBackend, shape: Shape, dtype: str, rate: float, place: Place, tell: Callable[..., None]
) -> None:
    """Every contribution of every layer at all tokens from the edit on, both ways."""
    pair, setting = gpu_models.pair(_first(place, 0.2), shape), Setting(backend.info, dtype, gpu_models.outcome())
    rows = whole_rows(pair, setting)
    for name, batch_bytes in BATCHES.items():
        timed = _fastest(backend, setting, pair, rows, batch_bytes, place)
        _tell_speed(f"rows of {len(pair.x0) - pair.first} tokens, {name}", timed, rows, pair, setting, rate, tell)


def whole_rows(pair: TokenPair, setting: Setting) -> list[Row]:
    """Rows that swap one contribution at all tokens from the edit on, lowest layers first."""
    info = setting.info
    components: tuple[Component, ...] = ("attention_output", "mlp_output")
    return [
        swap(pair, Site(component, layer, "all"), base, info)
        for layer in range(info.layers)
        for component in components
        for base in (0, 1)
    ]


def _fastest(
    backend: LocalBackend, setting: Setting, pair: TokenPair, rows: list[Row], batch_bytes: float, place: Place
) -> _Timed:
    work = partial(engine, backend, setting, pair, rows, batch_bytes)
    return min((_timed(work, place) for _ in range(_repeats(place))), key=lambda timed: timed.seconds)


def _tell_speed(
    name: str, timed: _Timed, rows: list[Row], pair: TokenPair, setting: Setting, rate: float, tell: Callable[..., None]
) -> None:
    """Rates of one workload. Operations are those of the plan: whole layers from each row's first write on."""
    measured: Measured = timed.result
    flops = sum(job.flops for job in measured.jobs)
    tokens = sum(len(pair.prompts[row.base]) + pair.fed - row.start for row in rows)
    tell(f"{name}: rows", len(rows), "rows")
    tell(f"{name}: batches", sum(len(part.payload["batches"]) for job in measured.jobs for part in job.parts), "")
    tell(f"{name}: time", timed.seconds, "s")
    tell(f"{name}: rows a second", len(rows) / timed.seconds, "rows/s")
    tell(f"{name}: tokens a second, each in the layers from its row's write on", tokens / timed.seconds, "tokens/s")
    tell(f"{name}: operations", flops / timed.seconds / 1e12, "TFLOP/s")
    tell(f"{name}: share of the matrix product's rate", flops / timed.seconds / rate, "share")


def _memory(backend: LocalBackend, shape: Shape, dtype: str, place: Place, tell: Callable[..., None]) -> None:
    """Peak of the GPU's memory beside weights and largest batch as `plan` has them, for both kinds of outcome."""
    for normalise in (False, True):
        pair = gpu_models.pair(_first(place, 0.2), shape, answer=3 if normalise else 0)
        setting = Setting(backend.info, dtype, gpu_models.outcome(normalise))
        kind = "log-probabilities of answers" if normalise else "two logits"
        for name, batch_bytes in BATCHES.items():
            _peak(backend, setting, pair, batch_bytes, place, partial(_about, tell, f"memory, {kind}, {name}"))


def _about(tell: Callable[..., None], name: str, quantity: str, value: float, unit: str) -> None:
    tell(f"{name}: {quantity}", value, unit)


def _peak(
    backend: LocalBackend,
    setting: Setting,
    pair: TokenPair,
    batch_bytes: float,
    place: Place,
    tell: Callable[..., None],
) -> None:
    if place.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    measured = engine(backend, setting, pair, whole_rows(pair, setting), batch_bytes)
    weights = weight_bytes(setting.info, setting.dtype)
    batch = max(size for job in measured.jobs for size in batch_sizes(job, {pair.id: pair}, setting))
    tell("planned, weights", weights / 1e9, "GB")
    tell("planned, largest batch", batch / 1e9, "GB")
    if place.device == "cuda":
        peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        tell("peak", peak / 1e9, "GB")
        tell("peak, with what torch holds in reserve", reserved / 1e9, "GB")
        tell("peak beside the weights, of the largest batch as planned", (peak - weights) / batch, "share")


def _overhead_of(shape: Shape, rows_wanted: int, place: Place, emit: Emit) -> None:
    """One batch of so many rows of 32 tokens: planning, the job, of it the base runs; and one plain pass as large."""
    tell = partial(_tell, emit, shape.name, "float32")
    backend = gpu_models.backend(shape, "float32", place.device)
    pair = gpu_models.pair(1, shape, TOKENS + 1)
    setting = Setting(backend.info, "float32", gpu_models.outcome())
    rows = _repeated(pair, setting, rows_wanted)
    engine(backend, setting, pair, rows, 1e12)
    whole = _median(partial(engine, backend, setting, pair, rows, 1e12), place)
    one = _median(partial(engine, backend, setting, pair, rows[:1], 1e12), place)
    plain = _median(partial(_plain_pass, backend, pair, len(rows)), place)
    large = Setting(gpu_models.info(gpu_models.SEVENTY_B), "bfloat16", setting.outcome)
    flops = sum(row_flops(row, pair, large) for row in rows)
    name = f"{len(rows)} rows of {TOKENS} tokens"
    tell(f"{name}: planned, run and read", whole * 1e3, "ms")
    tell(f"{name}: of it one row alone, with the base runs", one * 1e3, "ms")
    tell(f"{name}: one plain pass over as many tokens", plain * 1e3, "ms")
    if shape.settings["num_hidden_layers"] == gpu_models.SEVENTY_B.settings["num_hidden_layers"]:
        tell(f"{name}: share of a 70B model's arithmetic at 40% of an H100", whole * _H100_FLOPS * _SHARE / flops, "")


def _repeated(pair: TokenPair, setting: Setting, count: int) -> list[Row]:
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


def _plain_pass(backend: LocalBackend, pair: TokenPair, rows: int) -> None:
    """One forward pass of transformers over as many rows and tokens."""
    ids = torch.tensor([pair.x0[pair.first :]], device=backend.model._module.device).expand(rows, -1)
    with torch.no_grad():
        backend.model._module(input_ids=ids, use_cache=True, logits_to_keep=1)


def _outcome_of(case: ElementTree.Element) -> str:
    found = {child.tag for child in case}
    if found & {"failure", "error"}:
        return "failed"
    return "skipped" if "skipped" in found else "passed"
