"""The engine and the other libraries on the same grid, in turns, in one process; see README.md for what is timed."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd
import torch
from nnsight import TransformersModel

from bench import report
from bench.contenders import (
    Contender,
    Engine,
    NnsightInvokes,
    NnsightInvokesLast,
    NnsightTraces,
    NnsightTracesLast,
    Pyvene,
    TransformerLens,
)
from bench.floor import LAYERS_ROWS, floor_of, layers_rate, matmul_rate
from bench.grid import MINUS, MODEL, PLUS, Case, equal_pairs, grid, sample
from bench.machine import Load, facts, load_average
from remote_mediation.engine.local import LocalBackend
from remote_mediation.fetch import located
from remote_mediation.models import load_info
from remote_mediation.outcomes import logit_diff
from remote_mediation.sites import ModelInfo
from remote_mediation.tokens import TokenPair

SEED = 0
# What the values of two libraries may differ by, in logits.
TOLERANCE = 1e-3


class Timed(NamedTuple):
    """What a contender took for its cases."""

    contender: Contender
    seconds: float
    cpu_seconds: float
    """Of this process, all threads; unlike `seconds` it hardly depends on what else the machine does."""
    values: list[float]


def main() -> None:
    """Time all, one pair after the other; exit 1 if anyone's values differ."""
    options = _options()
    if options.threads:
        torch.set_num_threads(options.threads)
    contenders, info, tokenizer, layers = _contenders()
    pairs = equal_pairs(tokenizer, options.pairs)
    _warm_up(contenders, pairs[0], info)
    records, runs = [], []
    for number in range(options.pairs * options.rounds):
        pair = pairs[number % options.pairs]
        turn = contenders[number % len(contenders) :] + contenders[: number % len(contenders)]
        record, run = _run(number, pair, turn, info, options.sample)
        run["layers_rate"] = layers_rate(layers)
        records += record
        runs.append(run)
    report.save_speed(pd.DataFrame(records), pd.DataFrame(runs), _facts(options, contenders))
    report.write()
    worst = max(record["deviation"] for record in records)
    if worst >= TOLERANCE:
        raise SystemExit(f"values differ by {worst:.1e} logits: the timings compare different quantities")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/bench/speed", description=__doc__)
    parser.add_argument("--pairs", type=int, default=5, help="prompt pairs")
    parser.add_argument("--rounds", type=int, default=1, help="runs per pair")
    parser.add_argument("--sample", type=int, default=36, help="sites per run of the other libraries")
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0 leaves torch's own choice")
    return parser.parse_args()


def _contenders() -> tuple[list[Contender], ModelInfo, object, torch.nn.Module]:
    """Everyone, on one model; its layers as plain torch has them come last."""
    folder = located(MODEL)
    model = TransformersModel(folder, task="text-generation", dispatch=True, dtype=torch.float32, device="cpu")
    model.eval()
    info = load_info(MODEL)
    outcome = logit_diff([PLUS], [MINUS], model.tokenizer)
    contenders: list[Contender] = [
        Engine(LocalBackend(model, info), outcome),
        NnsightTraces(model, outcome),
        NnsightInvokes(model, outcome),
        NnsightTracesLast(model, outcome),
        NnsightInvokesLast(model, outcome),
        TransformerLens(folder, model.tokenizer, outcome),
        Pyvene(folder, outcome),
    ]
    return contenders, info, model.tokenizer, model._module.model.layers


def _warm_up(contenders: Sequence[Contender], pair: TokenPair, info: ModelInfo) -> None:
    few = sample(grid(pair, info), 6, SEED)
    for contender in contenders:
        contender.prepare(pair, few)
        contender.measure(few)


def _run(
    number: int, pair: TokenPair, turn: Sequence[Contender], info: ModelInfo, size: int
) -> tuple[list[dict[str, object]], dict[str, object]]:
    """One run: the machine's rate, then everyone in turn. Returns a record per contender, and one of the run."""
    cases = grid(pair, info)
    chosen = sample(cases, size, SEED + number)
    load, average = Load(), load_average()
    rates = [matmul_rate(info)]
    timed = []
    for contender in turn:
        timed.append(_timed(contender, pair, cases if contender.whole else chosen))
        if contender.whole:  # beside the engine, whose time is compared with it
            rates.append(matmul_rate(info))
    rate, floor = max(rates), floor_of(pair, cases, info)
    values = next(one.values for one in timed if one.contender.whole)
    expected = dict(zip(cases, values, strict=True))
    records = [
        {
            "run": number,
            "contender": one.contender.title,
            "measured": len(one.values),
            "seconds": one.seconds,
            "grid_seconds": one.seconds * len(cases) / len(one.values),
            "grid_cpu_seconds": one.cpu_seconds * len(cases) / len(one.values),
            "deviation": _deviation(cases if one.contender.whole else chosen, one.values, expected),
        }
        for one in timed
    ]
    run = {
        "run": number,
        "tokens": len(pair.x0),
        "positions": len(pair.tokens()),
        "outcomes": len(cases),
        "rate": rate[0],
        **{f"rate_{rows}": value for rows, value in rate[1]},
        "fewest_flops": floor.fewest,
        "whole_layers_flops": floor.whole_layers,
        "span": min(_span(expected, base) for base in (0, 1)),
        "load_average": average,
        "others": load.others(),
    }
    _print(records, run)
    return records, run


def _timed(contender: Contender, pair: TokenPair, cases: list[Case]) -> Timed:
    contender.prepare(pair, cases)
    start, start_cpu = time.perf_counter(), time.process_time()
    found = contender.measure(cases)
    return Timed(contender, time.perf_counter() - start, time.process_time() - start_cpu, found)


def _deviation(cases: list[Case], found: list[float], expected: dict[Case, float]) -> float:
    return max(abs(value - expected[case]) for case, value in zip(cases, found, strict=True))


def _span(values: dict[Case, float], base: int) -> float:
    """How far apart the outcomes of one prompt lie: what a deviation is to be compared with."""
    own = [value for case, value in values.items() if case.base == base]
    return max(own) - min(own)


def _print(records: list[dict[str, object]], run: dict[str, object]) -> None:
    print(
        f"run {run['run']}: {run['outcomes']} outcomes, load average {run['load_average']:.1f}, others use "
        f"{run['others']:.2f} cores, {run['rate'] / 1e9:.0f} GFLOP/s"
    )
    own = next(record["grid_seconds"] for record in records if record["contender"] == Engine.title)
    for record in records:
        print(
            f"  {record['grid_seconds']:8.1f} s  {record['grid_seconds'] / own:6.1f}x  {record['deviation']:.1e}  "
            f"{record['contender']}"
        )
    print(f"  {run['fewest_flops'] / run['rate']:8.1f} s  floor", flush=True)


def _facts(options: argparse.Namespace, contenders: Sequence[Contender]) -> dict[str, object]:
    return {
        **facts(),
        "model": MODEL,
        "outcome": f'logit("{PLUS}") - logit("{MINUS}")',
        "pairs": options.pairs,
        "rounds": options.rounds,
        "sample": options.sample,
        "seed": SEED,
        "threads": torch.get_num_threads(),
        "layers_rows": LAYERS_ROWS,
        "goals": {contender.title: contender.goal for contender in contenders if not contender.whole},
        "engine": next(contender.title for contender in contenders if contender.whole),
    }


if __name__ == "__main__":
    main()
