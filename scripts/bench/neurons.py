"""All MLP neurons of a pair, one by one: how long it takes, the last layer's closed form, screening's recall."""

from __future__ import annotations

import time
from typing import NamedTuple

import nnsight
import numpy as np
import pandas as pd
import torch

from bench import report
from bench.grid import MINUS, MODEL, PLUS, equal_pairs
from bench.machine import Load, facts, load_average
from remote_mediation.engine.budget import Budget, Setting
from remote_mediation.engine.jobs import Keys, plan_jobs
from remote_mediation.engine.local import LocalBackend
from remote_mediation.engine.rows import Row, swap
from remote_mediation.engine.tasks import plan_tasks, screen_tasks
from remote_mediation.outcomes import Outcome, logit_diff
from remote_mediation.sites import Site
from remote_mediation.tokens import TokenPair

SAMPLE = 24
TOP = 0.01
BUDGETS = (1, 2, 4, 8)
BUDGET = Budget(lambda: 2e13, 1e9)
TOLERANCE = 1e-3
VARIANTS = ("AtP", "AtP with GradDrop")


class Exact(NamedTuple):
    """Effects `[side, layer, unit]`: NIE, then TIE."""

    effects: np.ndarray
    seconds: float


def main() -> None:
    """Measure, compare, write the report."""
    backend = LocalBackend.load(MODEL)
    outcome = logit_diff([PLUS], [MINUS], backend.tokenizer)
    setting = Setting(backend.info, "float32", outcome)
    (pair,) = equal_pairs(backend.tokenizer, 1)
    average, load = load_average(), Load()
    exact = measure_all(backend, pair, setting)
    others = load.others()
    print(f"{exact.effects.size:,} outcomes in {exact.seconds:.0f} s", flush=True)
    traced = one_trace_each(backend, pair, outcome, exact.effects)
    closed = float(np.abs(closed_form(backend, pair, outcome) - exact.effects[:, -1]).max())
    screened, screening = screen(backend, pair, setting)
    recalls = recall_table(exact.effects, screened)
    report.save_neurons(
        recalls,
        {
            **facts(),
            "load_average": average,
            "others": others,
            "model": MODEL,
            "outcomes": exact.effects.size,
            "seconds": exact.seconds,
            "traced": traced,
            "sample": SAMPLE,
            "closed_form_deviation": closed,
            "screening_seconds": screening,
            "top": TOP,
        },
    )
    report.write()
    if closed > TOLERANCE:
        raise SystemExit(f"the closed form of the last layer is off by {closed:.1e} logits")


def measure_all(backend: LocalBackend, pair: TokenPair, setting: Setting) -> Exact:
    """Every neuron of every layer at the last token, in both directions; everything is timed, planning included."""
    start = time.perf_counter()
    info = setting.info
    sites = [Site("mlp_neurons", layer, "last", (unit,)) for layer in range(info.layers) for unit in range(info.d_ff)]
    rows = [swap(pair, site, base, info) for base in (0, 1) for site in sites]
    keys = Keys(setting, [pair])
    values: dict[str, np.ndarray] = {}
    for job in plan_jobs(rows, {pair.id: pair}, setting, BUDGET, keys):
        readout = backend.collect(backend.submit(job))
        values.update(zip(job.keys, readout.values, strict=True))
    y0, y1 = (setting.outcome.value(pair, values[keys(Row(pair.id, base))]) for base in (0, 1))
    found = np.array([setting.outcome.value(pair, values[keys(row)]) for row in rows])
    found = found.reshape(2, info.layers, info.d_ff)
    return Exact(np.stack([found[0] - y0, y1 - found[1]]), time.perf_counter() - start)


def one_trace_each(backend: LocalBackend, pair: TokenPair, outcome: Outcome, exact: np.ndarray) -> float:
    """Seconds of a plain nnsight trace per neuron, on a sample; its effects must be those measured.

    The activations that are written are taken beforehand and not timed.
    """
    model, rng, info = backend._model, np.random.default_rng(0), backend.info
    cases = [
        (int(rng.integers(2)), int(rng.integers(info.layers)), int(rng.integers(info.d_ff))) for _ in range(SAMPLE)
    ]
    ids = [torch.tensor([prompt]) for prompt in pair.prompts]
    plus, minus = outcome.plus[0], outcome.minus[0]
    bases, sources = [], []
    with torch.no_grad():
        for side in (0, 1):
            with model.trace(input_ids=ids[side]):
                read = [model.model.layers[layer].mlp.down_proj.input[0, -1] for layer in range(info.layers)]
                kept = nnsight.save(read)
                logits = model.output.logits[0, -1].save()
            sources.append(kept)
            bases.append(float(logits[plus] - logits[minus]))
        start, found = time.perf_counter(), []
        for base, layer, unit in cases:
            value = sources[1 - base][layer][unit]
            with model.trace(input_ids=ids[base]):
                model.model.layers[layer].mlp.down_proj.input[0, -1, unit] = value
                logits = model.output.logits[0, -1].save()
            y = float(logits[plus] - logits[minus])
            found.append(y - bases[0] if base == 0 else bases[1] - y)
        seconds = (time.perf_counter() - start) / SAMPLE
    worst = max(abs(one - exact[case]) for one, case in zip(found, cases, strict=True))
    if worst > TOLERANCE:
        raise SystemExit(f"traces and engine differ by {worst:.1e} logits")
    return seconds


def closed_form(backend: LocalBackend, pair: TokenPair, outcome: Outcome) -> np.ndarray:
    """Effects `[side, unit]` of the last layer's neurons without a run: final norm and two rows of the unembedding."""
    model = backend._model
    plain, layer = model._module, backend.info.layers - 1
    states, neurons = [], []
    with torch.no_grad():
        for prompt in pair.prompts:
            with model.trace(input_ids=torch.tensor([prompt])):
                neurons.append(model.model.layers[layer].mlp.down_proj.input[0, -1].save())
                states.append(model.model.layers[layer].output[0, -1].save())
        down = plain.model.layers[layer].mlp.down_proj.weight
        rows = plain.lm_head.weight[[outcome.plus[0], outcome.minus[0]]]
        effects = []
        for base in (0, 1):
            change = neurons[1 - base] - neurons[base]
            moved = states[base] + change[:, None] * down.T
            logits, plain_logits = (plain.model.norm(state) @ rows.T for state in (moved, states[base][None]))
            difference = (logits[:, 0] - logits[:, 1]) - (plain_logits[:, 0] - plain_logits[:, 1])
            effects.append(difference if base == 0 else -difference)
    return torch.stack(effects).numpy()


def screen(backend: LocalBackend, pair: TokenPair, setting: Setting) -> tuple[np.ndarray, float]:
    """Scores `[side, variant, layer, unit]`, and the seconds they took."""
    start = time.perf_counter()
    (job,) = plan_tasks(screen_tasks([pair], "mlp_neurons", "last", setting, dropping=True), setting, BUDGET)
    (values,) = backend.collect(backend.submit(job)).values
    shape = (2, len(VARIANTS), setting.info.layers, setting.info.d_ff)
    return values.reshape(shape), time.perf_counter() - start


def recall_table(exact: np.ndarray, screened: np.ndarray) -> pd.DataFrame:
    """Share of the exact top 1%, by size, among the first ranks of a screening."""
    count = round(TOP * exact[0].size)
    rows = []
    for side, quantity in enumerate(("NIE", "TIE")):
        truth = set(np.argsort(-np.abs(exact[side]).ravel())[:count].tolist())
        for number, variant in enumerate(VARIANTS):
            order = np.argsort(-np.abs(screened[side, number]).ravel())
            recalls = {
                f"recall_{budget}": len(truth & set(order[: budget * count].tolist())) / count for budget in BUDGETS
            }
            rows.append({"quantity": quantity, "variant": variant, **recalls})
    return pd.DataFrame(rows)


if __name__ == "__main__":
    main()
