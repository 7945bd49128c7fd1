"""Screens against exact effects: how well AtP, RelP and integrated gradients rank units and modules, and their time.

On a few built-in pairs, at the last prompt token, both directions, Y the logit of one token minus that of another.
Modules: every layer's contributions and stream, each whole, so that an estimate is the sum over its units. Neurons: a
random sample of all layers, and the first ranks of every screen, so that what one screen ranks first and another
misses is measured too.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, get_args

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr

from bench.grid import MINUS, PLUS
from bench.machine import Load
from remote_mediation.config import Screen
from remote_mediation.engine.budget import Budget, Setting
from remote_mediation.engine.jobs import Keys, plan_jobs
from remote_mediation.engine.local import LocalBackend
from remote_mediation.engine.rows import Row, swap
from remote_mediation.engine.tasks import plan_tasks, screen_tasks
from remote_mediation.outcomes import logit_diff
from remote_mediation.pairs import load_pairs
from remote_mediation.sites import Component, Site
from remote_mediation.tokens import TokenPair, tokenise

MODELS = ("HuggingFaceTB/SmolLM2-135M-Instruct", "Qwen/Qwen2.5-Coder-0.5B-Instruct")
MODULES: tuple[Component, ...] = ("mlp_output", "attention_output", "layer_output")
SCREENS: tuple[Screen, ...] = get_args(Screen)
WHOLE = "relp_whole"
NAMES = {"atp": "AtP", "relp": "RelP", "ig": "IG", WHOLE: "RelP, products not halved"}
PAIRS = 6
RANDOM, FIRST, TOP = 256, 64, 32
"""Neurons of a pair that are drawn at random, or measured as a screen's first; exact ones that should be among them."""
TOP_MODULES = 0.2
"""Share of a pair's modules of one component that count as its strongest."""
REPEATS = 3
BUDGET = Budget(lambda: 2e13, 1e9)
OUT = Path(__file__).parents[2] / "reports" / "benchmark"

Floats = NDArray[np.float64]


class Case(NamedTuple):
    """A model that is at hand."""

    backend: LocalBackend
    setting: Setting
    pairs: list[TokenPair]


class Seconds(NamedTuple):
    """Time of one thing."""

    wall: float
    cpu: float
    """Of all threads."""


def main() -> None:
    """Measure every model, write the CSVs and the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=PAIRS, help="pairs of each model")
    asked = parser.parse_args()
    begun, load = time.perf_counter(), Load()
    agreements, times = [], []
    for name in MODELS:
        case = load_case(name, asked.pairs)
        agreements += agreement(name, case)
        times += durations(name, case)
    quality, speed = pd.DataFrame(agreements), pd.DataFrame(times)
    quality.to_csv(OUT / "screens.csv", index=False, float_format="%.4f")
    speed.to_csv(OUT / "screens_time.csv", index=False, float_format="%.4f")
    page = as_markdown(quality, speed, asked.pairs, load.others())
    (OUT / "screens.md").write_text(page, "utf-8")
    print(f"{time.perf_counter() - begun:.0f} s")


def load_case(name: str, count: int) -> Case:
    """A model, and built-in pairs spread evenly over the file."""
    backend = LocalBackend.load(name)
    outcome = logit_diff([PLUS], [MINUS], backend.tokenizer)
    pairs = tokenise(load_pairs("builtin"), backend.tokenizer).pairs
    chosen = [pairs[number * len(pairs) // count] for number in range(count)]
    return Case(backend, Setting(backend.info, "float32", outcome), chosen)


def agreement(name: str, case: Case) -> list[dict[str, object]]:
    """One row for each component and screen."""
    rows = []
    for component in (*MODULES, "mlp_neurons"):
        scores: dict[str, Floats] = {screen: screened(case, component, screen) for screen in SCREENS}
        if component in MODULES:
            scores[WHOLE] = screened(ungated(case), component, "relp")
        found = of_neurons(case, scores) if component == "mlp_neurons" else of_modules(case, component, scores)
        for screen, row in found.items():
            rows.append({"model": name, "component": component, "screen": screen, **row})
            print(rows[-1], flush=True)
    return rows


def screened(case: Case, component: Component, screen: Screen) -> Floats:
    """Estimates `[pair, direction, layer, unit]`."""
    tasks = [task for pair in case.pairs for task in screen_tasks([pair], component, "last", case.setting, screen)]
    values = {}
    for job in plan_tasks(tasks, case.setting, BUDGET):
        readout = case.backend.collect(case.backend.submit(job))
        values.update(zip(job.keys, readout.values, strict=True))
    found = [values[task.keys[0]] for task in tasks]
    return np.array(found, dtype=np.float64).reshape(len(tasks), 2, case.setting.info.layers, -1)


def ungated(case: Case) -> Case:
    """The same model, taken for one whose MLPs have no product."""
    return case._replace(setting=case.setting._replace(info=replace(case.setting.info, gated=False)))


def effects(case: Case, pair: TokenPair, sites: Sequence[Site]) -> Floats:
    """Exact NIE, then TIE, of sites: `[direction, site]`."""
    setting = case.setting
    rows = [swap(pair, site, base, setting.info) for base in (0, 1) for site in sites]
    keys, values = Keys(setting, [pair]), {}
    for job in plan_jobs(rows, {pair.id: pair}, setting, BUDGET, keys):
        readout = case.backend.collect(case.backend.submit(job))
        values.update(zip(job.keys, readout.values, strict=True))
    y0, y1 = (setting.outcome.value(pair, values[keys(Row(pair.id, base))]) for base in (0, 1))
    found = np.array([setting.outcome.value(pair, values[keys(row)]) for row in rows]).reshape(2, -1)
    return np.stack([found[0] - y0, y1 - found[1]])


def of_modules(case: Case, component: Component, scores: dict[str, Floats]) -> dict[str, dict[str, float]]:
    """Agreement over all layers, pairs and directions; recall within each pair and direction."""
    sites = [Site(component, layer, "last") for layer in range(case.setting.info.layers)]
    exact = np.stack([effects(case, pair, sites) for pair in case.pairs])
    top = max(1, round(TOP_MODULES * len(sites)))
    found = {}
    for screen, score in scores.items():
        estimates = score.sum(-1)
        cells = zip(exact.reshape(-1, len(sites)), estimates.reshape(-1, len(sites)), strict=True)
        recalls = [len(first(one, top) & first(other, top)) / top for one, other in cells]
        found[screen] = {**correlations(exact, estimates), "recall": float(np.mean(recalls)), "sites": exact.size}
    return found


def of_neurons(case: Case, scores: dict[str, Floats]) -> dict[str, dict[str, float]]:
    """Agreement over the random sample; recall of the strongest of all that was measured, in each screen's first."""
    rng, layers, width = np.random.default_rng(0), case.setting.info.layers, case.setting.info.d_ff
    flat = {screen: score.reshape(len(case.pairs), 2, -1) for screen, score in scores.items()}
    exact, estimates = [], {screen: [] for screen in scores}
    recalls: dict[str, list[float]] = {screen: [] for screen in scores}
    for number, pair in enumerate(case.pairs):
        drawn = rng.choice(layers * width, RANDOM, replace=False)
        firsts = {(screen, side): first(flat[screen][number, side], FIRST) for screen in scores for side in (0, 1)}
        every = sorted({*drawn.tolist()}.union(*firsts.values()))
        sites = [Site("mlp_neurons", unit // width, "last", (unit % width,)) for unit in every]
        measured = effects(case, pair, sites)
        at = np.searchsorted(every, drawn)
        exact.append(measured[:, at])
        for screen in scores:
            estimates[screen].append(flat[screen][number][:, drawn])
            for side in (0, 1):
                strongest = {every[place] for place in first(measured[side], TOP)}
                recalls[screen].append(len(strongest & firsts[screen, side]) / TOP)
    return {
        screen: {
            **correlations(np.array(exact), np.array(estimates[screen])),
            "recall": float(np.mean(recalls[screen])),
            "sites": np.array(exact).size,
        }
        for screen in scores
    }


def first(values: Floats, count: int) -> set[int]:
    """Places of the largest values by size."""
    return set(np.argsort(-np.abs(values), kind="stable")[:count].tolist())


def correlations(exact: Floats, estimates: Floats) -> dict[str, float]:
    """Of estimates with what they estimate."""
    one, other = exact.ravel(), estimates.ravel()
    return {"pearson": float(np.corrcoef(one, other)[0, 1]), "spearman": float(spearmanr(one, other).statistic)}


def durations(name: str, case: Case) -> list[dict[str, object]]:
    """Seconds for a pair of every screen of all neurons and of a plain pass, the quickest of a few in turn."""
    pair = case.pairs[0]
    alone = case._replace(pairs=[pair])
    things: dict[str, Callable[[], object]] = {"pass": lambda: plain_pass(case, pair)}
    for screen in SCREENS:
        things[screen] = lambda screen=screen: screened(alone, "mlp_neurons", screen)  # type: ignore[misc]
    taken: dict[str, list[Seconds]] = {thing: [] for thing in things}
    for _ in range(REPEATS):
        for thing, run in things.items():
            taken[thing].append(timed(run))
    rows = []
    for thing, some in taken.items():
        row = {"wall": min(one.wall for one in some), "cpu": min(one.cpu for one in some)}
        rows.append({"model": name, "what": thing, **row})
        print(rows[-1], flush=True)
    return rows


def plain_pass(case: Case, pair: TokenPair) -> None:
    """transformers' own forward and backward pass over both prompts, from the embeddings to Y."""
    model, outcome = case.backend.model._module, case.setting.outcome
    for prompt in pair.prompts:
        embedded = model.get_input_embeddings()(torch.tensor([prompt])).detach().requires_grad_()
        logits = model(inputs_embeds=embedded, logits_to_keep=1, use_cache=False).logits[0, -1]
        torch.autograd.grad(logits[list(outcome.plus)].mean() - logits[list(outcome.minus)].mean(), embedded)


def timed(run: Callable[[], object]) -> Seconds:
    """How long it takes."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return Seconds(time.perf_counter() - wall, time.process_time() - cpu)


def as_markdown(quality: pd.DataFrame, speed: pd.DataFrame, pairs: int, others: float) -> str:
    """The page."""
    return "\n".join([*_head(pairs), *_agreement_table(quality), *_finding(quality), *_time_table(speed, others), ""])


def _head(pairs: int) -> list[str]:
    return [
        "# Screens",
        "",
        "Made by `scripts/bench/screens`. AtP: attribution patching (arXiv 2403.00745), the gradient times the change.",
        "RelP: relevance patching (arXiv 2508.21258), the same of the model with linear norms, activations and",
        "attention, and halved products. IG: integrated gradients (arXiv 1703.01365) of each layer's component alone,",
        f"5 points. Each is compared with exact effects on {pairs} built-in pairs, which is few: at `last`, NIE and",
        f"TIE, in float32; Y is the logit of '{PLUS}' minus that of '{MINUS}'.",
        "",
        "Modules: the sum over the units of each layer's module, which for IG is the effect itself but for the error",
        "of 5 points: its figures there are a check and no finding. Recall: of the strongest "
        f"{TOP_MODULES:.0%} of the layers by size,",
        "those among as many by the estimate, the mean over pairs and directions. Neurons: correlations over "
        f"{RANDOM} of each pair,",
        f"drawn at random from all layers; recall: of the strongest {TOP} of all that were measured (these, and the "
        f"first {FIRST}",
        "of each screen), those among the screen's own first ones.",
        "",
    ]


def _agreement_table(quality: pd.DataFrame) -> list[str]:
    lines = [
        "| model | component | screen | Pearson | Spearman | recall | measured |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in quality.itertuples():
        numbers = f"{row.pearson:.3f} | {row.spearman:.3f} | {row.recall:.0%} | {row.sites:,}"
        lines.append(f"| {short(row.model)} | {row.component} | {NAMES[row.screen]} | {numbers} |")
    return lines


def _finding(quality: pd.DataFrame) -> list[str]:
    """What the table says of the published figures, and of the default."""
    told = []
    for model, rows in quality.groupby("model", sort=False):
        of = rows.set_index(["component", "screen"])["pearson"]
        relp, whole, atp = (of["mlp_output", screen] for screen in ("relp", WHOLE, "atp"))
        told.append(f"{short(str(model))} RelP {relp:.3f} ({whole:.3f} where products are not halved), AtP {atp:.3f}")
    return [
        "",
        "Published for MLP outputs of GPT-2 small, which has no gated product: RelP .992, AtP .195 (Pearson; arXiv",
        f"2508.21258). Here: {'; '.join(told)}. The default, `neurons.screen`, is AtP.",
    ]


def _time_table(speed: pd.DataFrame, others: float) -> list[str]:
    lines = [
        "",
        "## Time",
        "",
        "All neurons of one pair, both directions, against transformers' own forward and backward pass over its two "
        f"prompts; the quickest of {REPEATS}",
        f"in turn. Torch threads: {torch.get_num_threads()}; other processes used {others:.1f} cores "
        "meanwhile, so go by the processor's time. Goals: AtP 2, RelP 3.",
        "",
        "| model | screen | seconds | times one pass | by processor time |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for model, rows in speed.groupby("model", sort=False):
        times = rows.set_index("what")
        for screen in SCREENS:
            ratios = times.loc[screen, ["wall", "cpu"]] / times.loc["pass", ["wall", "cpu"]]
            wall, cpu = (float(one) for one in ratios)
            seconds = float(times.loc[screen, "wall"])
            lines.append(f"| {short(str(model))} | {NAMES[screen]} | {seconds:.2f} | {wall:.1f} | {cpu:.1f} |")
    return lines


def short(model: str) -> str:
    """A model's name without its owner."""
    return model.rpartition("/")[2]


if __name__ == "__main__":
    main()
