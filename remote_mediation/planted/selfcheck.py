"""`selfcheck`: does the pipeline find what was planted? A planted-gate model goes through a whole study, as any would.

Nothing is told to the pipeline but model, pairs and outcome. What it reports, the neurons of the last third of the
layers that mediate on held-out pairs and the module with the largest effect, is compared with what was written into
the weights.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from rich.table import Table

from remote_mediation.config import LogitSettings, NeuronSettings, Search, StudyConfig
from remote_mediation.engine.local import LocalBackend
from remote_mediation.planted.gate import Organism, planted_gate, save
from remote_mediation.result import Result
from remote_mediation.runner import Watch
from remote_mediation.store import Store
from remote_mediation.study import run_study

Neuron = tuple[int, int]


@dataclass(frozen=True)
class SelfCheck:
    """What was planted, and what was found."""

    seed: int
    """Of the planted model and of the study."""
    planted: tuple[Neuron, ...]
    """Gate neurons as (layer, unit)."""
    found: tuple[Neuron, ...]
    """Neurons of the last third of the layers that mediate on held-out pairs."""
    module: tuple[str, int]
    """Component and layer of the module with the largest mean NIE."""
    gate_layer: int
    """Layer of the planted gate."""

    @property
    def precision(self) -> float:
        """Share of what was found that was planted; NaN if nothing was found."""
        return self._hits / len(self.found) if self.found else float("nan")

    @property
    def recall(self) -> float:
        """Share of what was planted that was found."""
        return self._hits / len(self.planted)

    @property
    def passed(self) -> bool:
        """Exactly the gates, and the gate's MLP first among modules."""
        return set(self.planted) == set(self.found) and self.module == ("mlp_output", self.gate_layer)

    @property
    def _hits(self) -> int:
        return len(set(self.planted) & set(self.found))

    def as_data(self) -> dict[str, Any]:
        """JSON data."""
        return {**asdict(self), "precision": self.precision, "recall": self.recall, "passed": self.passed}

    def table(self) -> Table:
        """For the terminal."""
        table = Table("", "planted", "found", title=f"planted-gate model, seed {self.seed}")
        component, layer = self.module
        table.add_row("gate neurons", _listed(self.planted), _listed(self.found))
        table.add_row("first module", f"mlp_output {self.gate_layer}", f"{component} {layer}")
        table.add_row("precision, recall", "1.00, 1.00", f"{self.precision:.2f}, {self.recall:.2f}")
        table.add_row("", "", "[green]passed[/]" if self.passed else "[red]failed[/]")
        return table


def run_selfcheck(
    seed: int, watch: Watch, *, layers: int = 10, d_ff: int = 256, search: Search = "gradient"
) -> SelfCheck:
    """Plant a model, study it, compare.

    Raises:
        MediationError: the study could not be run.
    """
    organism = planted_gate(seed, layers=layers, d_ff=d_ff)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        save(organism, folder / "model")
        records = [json.dumps(pair._asdict()) for pair in organism.pairs]
        (folder / "pairs.jsonl").write_text("\n".join(records), "utf-8")
        config = _config(organism, folder, seed, search)
        store = Store.create(folder / "run", config.identity())
        result = run_study(config, LocalBackend.load(config.model), store, watch)
    return _compared(seed, organism, result)


def _config(organism: Organism, folder: Path, seed: int, search: Search) -> StudyConfig:
    return StudyConfig(
        model=str(folder / "model"),
        pairs=str(folder / "pairs.jsonl"),
        analyses=["modules", "neurons"],
        outcome="logit_diff",
        logit_diff=LogitSettings(plus=[organism.plus_token], minus=[organism.minus_token]),
        neurons=NeuronSettings(search=[search]),
        seed=seed,
    )


def _compared(seed: int, organism: Organism, result: Result) -> SelfCheck:
    gate, layers = organism.truth.gate, result.study.info.layers
    found = result.tables["mediators.csv"]
    late = found[found["mediates"] & (found["layer"] >= 2 * layers / 3)]
    return SelfCheck(
        seed=seed,
        planted=tuple((gate.layer, unit) for unit in gate.units),
        found=tuple(sorted((int(layer), int(unit)) for layer, unit in zip(late["layer"], late["unit"], strict=True))),
        module=_first_module(result.effects),
        gate_layer=gate.layer,
    )


def _first_module(effects: pd.DataFrame) -> tuple[str, int]:
    means = effects[effects["analysis"] == "modules"].groupby(["component", "layer"])["nie"].mean()
    component, layer = means.idxmax()
    return str(component), int(layer)


def _listed(neurons: tuple[Neuron, ...]) -> str:
    return ", ".join(f"{layer}.{unit}" for layer, unit in neurons) or "none"
