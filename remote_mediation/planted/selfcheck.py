"""`selfcheck`: does the pipeline say what is true? Planted models go through a whole study, as any model would.

Nothing is told to the pipeline but model, pairs and outcome. What it says of the five claims, of the rival ones where
their truth is known, and, where a few late neurons gate harm, which neurons it names, is compared with what was written
into the weights (`cases`).
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from rich.table import Table

from remote_mediation.analyses.rivals.show import CLAIM_FILES
from remote_mediation.config import LogitSettings, StatisticsSettings, StudyConfig
from remote_mediation.engine.local import LocalBackend
from remote_mediation.planted.cases import CASES, OR, YES, Case, Neuron, Specimen, build
from remote_mediation.result import Result
from remote_mediation.runner import Watch
from remote_mediation.saving import save_model
from remote_mediation.store import Store
from remote_mediation.study import run_study

RESAMPLES = 999
PLAIN = "gate"
"""The case that is checked when none is named."""


@dataclass(frozen=True)
class SelfCheck:
    """What was planted, and what was found."""

    case: str
    """Its name."""
    about: str
    """What was planted."""
    seed: int
    """Of the planted model and of the study."""
    claims: tuple[str, ...]
    """Numbers of the five, then names of rivals, where their truth is known."""
    truth: tuple[str, ...]
    """What has to be said of each."""
    said: tuple[str, ...]
    """What was said: the gate's word, or else the verdict."""
    why: tuple[str, ...]
    """Why it was said."""
    gates: tuple[Neuron, ...]
    """Late neurons that gate harm, as (layer, unit); none where no few do."""
    missed: tuple[Neuron, ...]
    """Those of them that are not in the set that claim 3 chose."""

    @property
    def passed(self) -> bool:
        """All verdicts are true, and no gate was missed."""
        return all(self.right) and not self.missed

    @property
    def right(self) -> list[bool]:
        """By claim, whether what was said is true."""
        return [said in true.split(OR) for said, true in zip(self.said, self.truth, strict=True)]

    def line(self) -> str:
        """In one line, for the terminal."""
        verdicts = f"{sum(self.right)} of {len(self.right)} verdicts true"
        missed = f", {len(self.missed)} of {len(self.gates)} gate neurons missed" if self.missed else ""
        return f"{'passed' if self.passed else 'FAILED'}  {self.case}, seed {self.seed}: {verdicts}{missed}"

    def table(self) -> Table:
        """Claim by claim, for the terminal."""
        table = Table("claim", "truth", "said", "because", title=f"{self.case}, seed {self.seed}: {self.about}")
        for number, right in enumerate(self.right):
            colour = "green" if right else "red"
            said, why = self.said[number], self.why[number]
            table.add_row(self.claims[number], self.truth[number], f"[{colour}]{said}[/]", why)
        if self.gates:
            table.add_row("", f"gate {_listed(self.gates)}", f"missed {_listed(self.missed)}", "")
        return table


def run_selfcheck(name: str, seed: int, watch: Watch) -> SelfCheck:
    """Plant a case, study it, compare.

    Raises:
        MediationError: the study could not be run.
    """
    case = CASES[name]
    specimen = build(case, seed)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        config = written(specimen, folder, seed, ("claims", *(CLAIM_FILES if case.rivals else ())))
        store = Store.create(folder / "run", config.identity())
        result = run_study(config, LocalBackend.load(config.model), store, watch)
    return _compared(case, seed, specimen, result)


def written(specimen: Specimen, folder: Path, seed: int, analyses: Sequence[str] = ("claims",)) -> StudyConfig:
    """Put model and pairs into a folder; the study of them."""
    save_model(specimen.model, specimen.tokenizer, folder / "model")
    records = [json.dumps(pair._asdict()) for pair in specimen.pairs]
    (folder / "pairs.jsonl").write_text("\n".join(records), "utf-8")
    return StudyConfig(
        model=str(folder / "model"),
        pairs=str(folder / "pairs.jsonl"),
        analyses=list(analyses),
        outcome="logit_diff",
        logit_diff=LogitSettings(plus=[specimen.plus], minus=[specimen.minus]),
        statistics=StatisticsSettings(resamples=RESAMPLES),
        seed=seed,
    )


def _compared(case: Case, seed: int, specimen: Specimen, result: Result) -> SelfCheck:
    claims = _ruled(result)
    gates = specimen.gates if case.said[2] == YES else frozenset()
    return SelfCheck(
        case=case.name,
        about=case.about,
        seed=seed,
        claims=tuple(claims["claim"]),
        truth=case.said + specimen.rivals,
        said=tuple(gate or verdict for gate, verdict in zip(claims["gate"], claims["verdict"], strict=True)),
        why=tuple(claims["why"]),
        gates=tuple(sorted(gates)),
        missed=tuple(sorted(gates - _chosen(result.tables["gate_sets.csv"]))),
    )


def _ruled(result: Result) -> pd.DataFrame:
    """What was said of every claim and rival, and why."""
    five = result.tables["claims.csv"].assign(claim=list("12345"))
    others = [result.tables[claims] for claims, _ in CLAIM_FILES.values() if claims in result.tables]
    rivals = [table.assign(claim=table["rival"]) for table in others]
    return pd.concat([five, *rivals])[["claim", "gate", "verdict", "why"]]


def _chosen(curve: pd.DataFrame) -> set[Neuron]:
    """Neurons of the set that claim 3 is about (`sparse.GATE_SET_COLUMNS`)."""
    listed = " ".join(curve.loc[curve["chosen"].astype(bool), "neurons"]).split()
    return {(int(layer), int(unit)) for layer, unit in (name.split(".") for name in listed)}


def _listed(neurons: tuple[Neuron, ...]) -> str:
    return ", ".join(f"{layer}.{unit}" for layer, unit in neurons) or "none"
