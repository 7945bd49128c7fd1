"""Tokens per second of answers behind swapped mediators, beside transformers' own batched generation, in turns."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import pandas as pd
import torch

from bench import report
from bench.grid import MODEL, equal_pairs
from bench.machine import Load, facts
from remote_mediation.engine.budget import Budget, Setting
from remote_mediation.engine.local import LocalBackend
from remote_mediation.engine.rows import Row, swap_all
from remote_mediation.engine.samples import Manner, bare, plan_samples, sample_key
from remote_mediation.fetch import located
from remote_mediation.outcomes import RefusalOutcome
from remote_mediation.sites import band
from remote_mediation.tokens import TokenPair

TOKENS = 64
LAYERS = 4
"""Layers whose MLP output is swapped, at every token from the first difference on."""
WAYS: dict[str, Manner] = {
    "greedy": Manner(1, TOKENS, 0.0),
    "greedy, held at every token": Manner(1, TOKENS, 0.0, held=True),
    "sampled": Manner(1, TOKENS, 1.0),
}


def main() -> None:
    """Time every way of generating beside transformers, round by round."""
    options = _options()
    if options.threads:
        torch.set_num_threads(options.threads)
    backend = LocalBackend.load(options.model)
    pairs = [bare(pair) for pair in equal_pairs(backend.tokenizer, options.batch // 2)]
    plain = _plain_generation(options.model, pairs)
    setting = Setting(backend.info, "float32", RefusalOutcome())
    ways = {name: _sampling(backend, setting, pairs, manner) for name, manner in WAYS.items()}
    expected = plain()
    for name, (swapped, unswapped) in ways.items():
        swapped()
        if WAYS[name].temperature == 0 and unswapped() != expected:
            raise SystemExit("without a mediator the answers are not those of transformers: other things are timed")
    records = []
    for number in range(options.rounds):
        load = Load()
        for name, (swapped, _) in ways.items():
            own, reference = _timed(swapped), _timed(plain)
            taken = {"seconds": own.wall, "transformers": reference.wall}
            cpu = {"cpu_seconds": own.cpu, "transformers_cpu": reference.cpu}
            records.append({"round": number, "way": name, **taken, **cpu})
            print({**records[-1], "ratio": reference.wall / own.wall, "cpu": reference.cpu / own.cpu}, flush=True)
        for record in records[-len(ways) :]:
            record["others"] = load.others()
    described = {"model": options.model, "batch": 2 * len(pairs), "tokens": TOKENS, "layers": LAYERS}
    report.save_generate(pd.DataFrame(records), {**facts(), **described})
    report.write()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/bench/generate", description=__doc__)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--batch", type=int, default=8, help="answers generated side by side, an even number")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0 leaves torch's own choice")
    return parser.parse_args()


def _plain_generation(model: str, pairs: list[TokenPair]) -> Callable[[], list[list[int]]]:
    """Transformers' greedy answers to both prompts of every pair, left-padded, every step run."""
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        located(model), dtype=torch.float32, trust_remote_code=False
    ).eval()
    prompts = [ids for pair in pairs for ids in pair.prompts]
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(one)) + list(one) for one in prompts])
    mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in prompts])
    steps = {"max_new_tokens": TOKENS, "do_sample": False, "eos_token_id": loaded.config.vocab_size, "pad_token_id": 0}

    def generate() -> list[list[int]]:
        with torch.no_grad():
            found: list[list[int]] = loaded.generate(input_ids=ids, attention_mask=mask, **steps)[:, width:].tolist()
        return found

    return generate


def _sampling(
    backend: LocalBackend, setting: Setting, pairs: list[TokenPair], manner: Manner
) -> tuple[Callable[[], list[list[int]]], Callable[[], list[list[int]]]]:
    """The same by the engine, with mediators in some layers swapped, and with none."""
    layers, by_id = backend.info.layers, {pair.id: pair for pair in pairs}
    sites = band("mlp_output", range(layers - LAYERS, layers), "all")
    sides = [(pair, side) for pair in pairs for side in (0, 1)]

    def generation(rows: list[Row]) -> Callable[[], list[list[int]]]:
        def generate() -> list[list[int]]:
            found: dict[str, Any] = {}
            for job in plan_samples(rows, by_id, manner, 0, setting, Budget(lambda: 1e18, 4e9)):
                values = backend.collect(backend.submit(job)).values
                found.update(zip(job.keys, values, strict=True))
            keys = [sample_key(row, by_id[row.pair], manner, 0, setting) for row in rows]
            return [found[key][:TOKENS].astype(int).tolist() for key in keys]

        return generate

    swapped = [swap_all(pair, sites, side, backend.info) for pair, side in sides]
    return generation(swapped), generation([Row(pair.id, side) for pair, side in sides])


class _Time(NamedTuple):
    """Seconds by the clock, and of this process's threads."""

    wall: float
    cpu: float


def _timed(work: Callable[[], object]) -> _Time:
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return _Time(time.perf_counter() - wall, time.process_time() - cpu)


if __name__ == "__main__":
    main()
