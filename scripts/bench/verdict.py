"""Time to the verdicts of the quickstart's study, beside maps of single sites on the same pairs, in one process.

The unit is one plain forward pass of a prompt, without answers behind it, as transformers runs it.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pandas as pd
import torch

from bench import report
from bench.machine import Load, facts
from remote_mediation.analyses import chosen
from remote_mediation.analyses.claims import ask, beside
from remote_mediation.analyses.claims.samples import Sample
from remote_mediation.config import StudyConfig, load_config
from remote_mediation.engine.local import LocalBackend
from remote_mediation.lab import Lab
from remote_mediation.store import Store
from remote_mediation.study import first_requests, prepared_lab

STUDY = Path(__file__).resolve().parents[2] / "reports/quickstart/study.toml"
MAPS = {"maps": ["layers", "modules"], "maps of heads": ["heads"]}
POSITIONS = {"layers": ["edit", "post_instruction", "last"], "modules": ["all"], "heads": ["last"]}
"""Those of a study that says nothing of them."""


def main() -> None:
    """Time claims 1 and 2, all five, their random sets, and the maps; write the report."""
    options = _options()
    config = load_config(STUDY, {"max_pairs": options.pairs, "analyses": ["claims"]})
    backend = LocalBackend.load(config.model, dtype=config.dtype)
    load = Load()
    with tempfile.TemporaryDirectory() as scratch:
        lab = _lab(config, backend, Path(scratch) / "claims")
        passes = _passes(backend, lab)
        seconds = _claims(lab)
        for name, analyses in MAPS.items():
            seconds[name] = _maps(config, backend, Path(scratch) / name, analyses)
    table = pd.DataFrame({"what": list(seconds), "seconds": list(seconds.values())})
    table["passes_per_pair"] = table["seconds"] / passes / len(lab.study.pairs)
    print(table.to_string(index=False), flush=True)
    here = {"model": config.model, "dtype": config.dtype, "pairs": len(lab.study.pairs), "pass": passes}
    report.save_verdict(table, {**facts(), **here, "others": load.others()})
    report.write()


def _lab(config: StudyConfig, backend: LocalBackend, folder: Path) -> Lab:
    return prepared_lab(config, backend, Store.create(folder, config.identity()))


def _passes(backend: LocalBackend, lab: Lab) -> float:
    """Seconds of a plain forward pass, the mean over all prompts, once warm."""
    model = backend.model._module  # what nnsight wraps
    prompts = [torch.tensor([ids]) for pair in lab.study.pairs for ids in pair.prompts]

    def run() -> None:
        with torch.no_grad():
            for ids in prompts:
                model(ids, logits_to_keep=1)

    run()
    return _timed(run) / len(prompts)


def _claims(lab: Lab) -> dict[str, float]:
    """Seconds of claims 1 and 2, of what the other three take beside them, and of the random sets."""
    samples = [Sample.of(lab, split) for split in ("discovery", "heldout")]
    direct = _timed(lambda: list(map(ask.measure_direct, samples)))
    at_random: list[float] = []
    draw_sets = beside.beside_random

    def timed_sets(*arguments: Any) -> Any:
        start = time.perf_counter()
        found = draw_sets(*arguments)
        at_random.append(time.perf_counter() - start)
        return found

    with mock.patch.object(beside, "beside_random", timed_sets):
        rest = _timed(lambda: ask.measure_claims(lab))
    return {"claims 1 and 2": direct, "all five": direct + rest - sum(at_random), "their random sets": sum(at_random)}


def _maps(config: StudyConfig, backend: LocalBackend, folder: Path, analyses: list[str]) -> float:
    """Seconds of maps of single sites."""
    positions = config.positions.model_copy(update=POSITIONS)
    lab = _lab(config.model_copy(update={"analyses": analyses, "positions": positions}), backend, folder)
    return _timed(lambda: lab.measure(first_requests(lab.study, chosen(analyses, ()))))


def _timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=24, help="pairs of the study")
    return parser.parse_args()


if __name__ == "__main__":
    main()
