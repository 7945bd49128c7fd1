"""gpu.json, gpu.csv and gpu.md: what `gpu` measured, and a report that is made of nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from bench.gpu_parts import Record

COLUMNS = ("part", "model", "dtype", "quantity", "value", "unit")


def save(
    folder: Path, facts: dict[str, Any], statuses: Sequence[dict[str, Any]], records: Iterable[tuple[str, Record]]
) -> None:
    """Write the three files anew. records: each with the name of its part."""
    table = pd.DataFrame([(part, *record) for part, record in records], columns=list(COLUMNS))
    table.to_csv(folder / "gpu.csv", index=False, float_format="%.6g")
    (folder / "gpu.json").write_text(json.dumps({**facts, "parts": list(statuses)}, indent=2) + "\n", "utf-8")
    (folder / "gpu.md").write_text("\n".join(_lines(facts, statuses, table)) + "\n", "utf-8")


def _lines(facts: dict[str, Any], statuses: Sequence[dict[str, Any]], table: pd.DataFrame) -> list[str]:
    lines = ["# On a GPU", "", "Made by `scripts/bench/gpu`.", ""]
    if facts["dry_run"]:
        lines += [
            "**A dry run on the CPU with tiny shapes: it shows that the script works. No figure means more.**",
            "",
        ]
    lines += [f"- {name}: {value}" for name, value in facts.items() if name != "dry_run"]
    lines += ["", "| part | | seconds |", "| --- | --- | ---: |"]
    lines += [f"| {one['part']} | {one['state']} | {one['seconds']:.0f} |" for one in statuses]
    for status in statuses:
        lines += _section(status, table[table["part"] == status["part"]])
    return lines


def _section(status: dict[str, Any], table: pd.DataFrame) -> list[str]:
    """A part's figures by model, and what it said where it did not end well."""
    lines = ["", f"## {status['part']}", ""]
    if status["state"] != "done":
        lines += [f"**{status['state']}**. It said last:", "", "```", status["said"], "```", ""]
    for (model, dtype), group in table.groupby(["model", "dtype"], sort=False):
        lines += [f"{model}{', ' if dtype else ''}{dtype}", "", "| | | |", "| --- | ---: | --- |"]
        lines += [f"| {row.quantity} | {_shown(row.value, row.unit)} | {row.unit} |" for row in group.itertuples()]
        lines.append("")
    return lines


def _shown(value: Any, unit: str) -> str:
    number = float(value)
    if unit in ("rows", "tests", ""):
        return f"{number:,.3g}" if number % 1 else f"{int(number):,}"
    if abs(number) >= 100:
        return f"{number:,.0f}"
    return f"{number:.3g}" if abs(number) < 0.01 else f"{number:.2f}"
