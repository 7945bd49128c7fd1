"""Verdicts on planted models of many seeds: how often each is the truth, and every one that is not."""

from __future__ import annotations

import argparse
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from bench.machine import facts
from bench.report import OUT
from remote_mediation.planted.cases import CASES
from remote_mediation.planted.selfcheck import SelfCheck, run_selfcheck
from remote_mediation.runner import Unwatched

COLUMNS = ("case", "seed", "claim", "truth", "said", "right", "missed", "why")
"""A row for every verdict; missed: gate neurons that are not in the set of claim 3."""
CLAIMS = range(1, 6)


def main() -> None:
    """Run what is not in the table yet, row by row, and write the page."""
    options = _options()
    OUT.mkdir(parents=True, exist_ok=True)
    path = OUT / "planted.csv"
    if not path.exists():
        pd.DataFrame(columns=list(COLUMNS)).to_csv(path, index=False)
    done = set(pd.read_csv(path)[["case", "seed"]].itertuples(index=False, name=None))
    seeds = range(options.first, options.first + options.seeds)
    wanted = [(name, seed) for seed in seeds for name in options.case or CASES if (name, seed) not in done]
    for found in _checked(wanted, options.workers):
        pd.DataFrame(_rows(found), columns=list(COLUMNS)).to_csv(path, mode="a", header=False, index=False)
        print(found.line(), flush=True)
    _write(_ordered(pd.read_csv(path)), OUT / "planted.md")


def _checked(wanted: list[tuple[str, int]], workers: int) -> Iterator[SelfCheck]:
    """Every planted model's check, as it is ready; a process of one thread for each core, as the models are tiny."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, torch.set_num_threads, (1,)) as pool:
        for ready in as_completed([pool.submit(run_selfcheck, name, seed, Unwatched()) for name, seed in wanted]):
            yield ready.result()


def _ordered(table: pd.DataFrame) -> pd.DataFrame:
    """By case as they are listed, then by seed: models are ready in any order."""
    place = table["case"].map(list(CASES).index)
    return table.assign(place=place).sort_values(["place", "seed", "claim"], kind="stable").drop(columns="place")


def _rows(found: SelfCheck) -> Iterator[dict[str, Any]]:
    for claim, right in zip(CLAIMS, found.right, strict=False):  # rivals, where there are, come behind
        yield {
            "case": found.case,
            "seed": found.seed,
            "claim": claim,
            "truth": found.truth[claim - 1],
            "said": found.said[claim - 1],
            "right": right,
            "missed": len(found.missed) if claim == 3 else 0,
            "why": found.why[claim - 1],
        }


def _write(table: pd.DataFrame, page: Path) -> None:
    models, failing = table.groupby(["case", "seed"]), table[~table["right"].astype(bool) | (table["missed"] > 0)]
    whole = int((models["right"].all() & (models["missed"].sum() == 0)).sum())
    here = facts()
    lines = [
        "# Planted mechanisms, on unseen seeds",
        "",
        f"Made by `scripts/bench/planted`: {table['case'].nunique()} of the {len(CASES)} cases of `selfcheck --all` on "
        f"seeds {table['seed'].min()} to {table['seed'].max()}, with which no constant was chosen, each a model and "
        f"pairs of its own. {whole} of {models.ngroups} models have all five verdicts right and no gate neuron missed; "
        f"{int(table['right'].sum())} of {len(table)} verdicts are right.",
        "",
        f"- {here['date']}, {here['processor']}",
        f"- {here['versions']}",
        "",
        f"| planted | {' | '.join(f'claim {claim}: truth, right' for claim in CLAIMS)} | gates missed |",
        "| --- | " + " | ".join("---" for _ in CLAIMS) + " | --- |",
        *(_case_line(name, part) for name, part in table.groupby("case", sort=False)),
        "",
        "## What was wrong",
        "",
        *(_failure(row) for row in failing.itertuples()),
    ]
    if failing.empty:
        lines.append("Nothing.")
    page.write_text("\n".join(lines) + "\n", "utf-8")
    print(page.relative_to(OUT.parents[1]))


def _case_line(name: Any, part: pd.DataFrame) -> str:
    cells = []
    for _, of_claim in part.groupby("claim"):
        right, ran = int(of_claim["right"].sum()), of_claim["seed"].nunique()
        cells.append(f"{of_claim['truth'].iloc[0]}, {right} of {ran}")
    return f"| {name} | {' | '.join(cells)} | {int(part['missed'].sum())} |"


def _failure(row: Any) -> str:
    missed = f", {row.missed} gate neurons missed" if row.missed else ""
    return f"- {row.case}, seed {row.seed}, claim {row.claim}: {row.said}, in truth {row.truth}{missed} ({row.why})"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--first", type=int, default=1000, help="first seed")
    parser.add_argument("--seeds", type=int, default=20, help="how many")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="models at a time")
    parser.add_argument("--case", action="append", choices=list(CASES), help="one case; again for another")
    return parser.parse_args()


if __name__ == "__main__":
    main()
