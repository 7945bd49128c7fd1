"""Rows that the window search needs on planted models of growing width, and whether it finds what was planted."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from bench import report
from bench.machine import facts
from remote_mediation.config import LogitSettings, NeuronSettings, StudyConfig
from remote_mediation.engine.local import LocalBackend
from remote_mediation.planted.gate import planted_gate, save
from remote_mediation.store import Store
from remote_mediation.study import run_study

WIDTHS = (512, 1024, 2048, 4096, 8192, 16384)
SEED, PAIRS = 0, 24


def main() -> None:
    """Search every model, draw, write the report."""
    table = pd.DataFrame([_searched(width) for width in WIDTHS])
    report.save_search(table, facts())
    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.subplots()
    axes.plot(table["d_ff"], table["windows"], "o-", color="#0072b2", label="windows and neurons measured")
    axes.plot(table["d_ff"], table["d_ff"] * table["layers"], "--", color="#999999", label="all neurons")
    axes.set(xscale="log", yscale="log", xlabel="neurons per layer", ylabel="sites measured on each pair")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(report.OUT / "search.png", dpi=120)
    report.write()


def _searched(width: int) -> dict[str, object]:
    organism = planted_gate(SEED, d_ff=width)
    gate = {(organism.truth.gate.layer, unit) for unit in organism.truth.gate.units}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        save(organism, folder / "model")
        (folder / "pairs.jsonl").write_text("\n".join(json.dumps(pair._asdict()) for pair in organism.pairs), "utf-8")
        config = StudyConfig(
            model=str(folder / "model"),
            pairs=str(folder / "pairs.jsonl"),
            max_pairs=PAIRS,
            analyses=["neurons"],
            outcome="logit_diff",
            logit_diff=LogitSettings(plus=[organism.plus_token], minus=[organism.minus_token]),
            neurons=NeuronSettings(search=["windows"], random_sets=1),
            seed=SEED,
        )
        store = Store.create(folder / "run", config.identity())
        result = run_study(config, LocalBackend.load(config.model), store)
    found = result.tables["mediators.csv"].query("mediates")
    late = {(int(one.layer), int(one.unit)) for one in found.itertuples() if one.layer >= organism.truth.gate.layer}
    steps = result.tables["search.csv"]
    row = {
        "d_ff": width,
        "layers": result.study.info.layers,
        "windows": int(steps["sites"].sum()),
        "steps": len(steps),
        "planted": len(gate),
        "found": len(gate & late),
        "others": len(late - gate),
    }
    print(row, flush=True)
    return row


if __name__ == "__main__":
    main()
