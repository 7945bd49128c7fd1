"""The summary in a terminal of 80 columns and 24 lines, of the claims of reports that are shipped."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from remote_mediation.analyses import chosen
from remote_mediation.config import StudyConfig
from remote_mediation.lab import Study
from remote_mediation.outcomes import RefusalOutcome
from remote_mediation.result import Result
from remote_mediation.show.section import Section
from remote_mediation.sites import ModelInfo
from remote_mediation.stats import Estimate
from remote_mediation.summary import Summary
from remote_mediation.terminal import claims_table, terminal_summary

REPORTS = Path(__file__).parents[1] / "reports"
CLAIMS, RIVALS = ("claims.csv", "sets.csv"), ("direction.csv", "direction_sets.csv", "rivals.csv", "rival_sets.csv")
NAMES = {
    "quickstart": ["total", "claims", "gate-curve", "layers", "specification"],
    "qwen2.5-coder-1.5b": [
        *("total", "claims", "gate-curve", "directions", "rivals", "one-axis", "layers", "specification"),
    ],
}
"""Sections of the runs."""


def shipped(report: str) -> Result:
    """A run as its shipped tables have it."""
    folder = REPORTS / report
    read = {name: pd.read_csv(folder / name) for name in (*CLAIMS, *RIVALS) if (folder / name).exists()}
    tables = {name: table.assign(paper="2406.11717") if "paper" in table else table for name, table in read.items()}
    analyses = ["claims", *(["directions", "rivals"] if "rivals.csv" in tables else [])]
    name = "Qwen/Qwen2.5-Coder-1.5B-Instruct"
    config = StudyConfig(model=name, dtype="bfloat16", analyses=analyses)
    info = ModelInfo(name, "", "qwen2", 28, 8, 16, 2, 2, 4, 50, True, True, (), None)
    total = Estimate(48, 48, -4.62, -5.45, -3.77, "", 0.0001)
    study = Study(config, info, RefusalOutcome(), (), ())
    return Result(study, pd.DataFrame(), tables, Summary(pd.DataFrame(), total, (), total, {}), chosen(analyses))


def printed(found: object) -> list[str]:
    """Lines as an 80-column terminal shows them."""
    console = Console(width=80, file=io.StringIO())
    console.print(found)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize("report", NAMES)
def test_the_claims_fit_80_columns_and_24_lines(report: str) -> None:
    parts = [Section(name, name, "", "") for name in NAMES[report]]
    lines = printed(terminal_summary(shipped(report), Path("runs") / report / "report.md", parts))
    assert len(lines) <= 23  # and a line for the next command
    assert max(map(len, lines)) <= 80
    assert any("show runs/" in line for line in lines)


def test_every_claim_and_rival_is_one_line_with_its_numbers_and_verdict() -> None:
    result = shipped("qwen2.5-coder-1.5b")
    verdicts = result.verdicts()
    lines = printed(claims_table(verdicts))
    assert len(verdicts) == 10
    for verdict in verdicts:
        (line,) = [line for line in lines if line.startswith(verdict.row)]
        assert line.rstrip().endswith(verdict.said)
    sets = pd.read_csv(REPORTS / "qwen2.5-coder-1.5b/sets.csv")
    late = sets[(sets["number"] == 1) & sets["decides"]]
    shares = (100 * late[["harm", "harm_low", "harm_high"]].to_numpy()).round().astype(int)
    (line,) = [line for line in lines if line.startswith("1. late layers")]
    assert all(f"{value} [{low}, {high}]" in line for value, low, high in shares)


def test_shares_that_are_not_known_are_dashes_and_none_is_minus_0() -> None:
    result = shipped("quickstart")
    sets = result.tables["sets.csv"]
    first = sets["number"] == 1
    sets.loc[first & (sets["direction"] == "nie"), ["harm", "harm_low", "harm_high"]] = np.nan
    sets.loc[first & (sets["direction"] == "tie"), ["harm", "harm_low", "harm_high"]] = (-0.001, -0.004, 0.002)
    (line,) = [line for line in printed(claims_table(result.verdicts())) if line.startswith("1. late layers")]
    assert line.split()[3:7] == ["-", "0", "[0,", "0]"]
