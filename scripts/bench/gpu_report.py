"""gpu.json, gpu.csv and gpu.md: what `gpu` measured, and a report that is made of nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from bench.gpu_parts import Record

COLUMNS = ("part", *Record._fields)


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
        lines += [f"{model}{', ' if dtype else ''}{dtype}", ""]
        for quantities, alike in _alike(group):
            lines += [f"| | {' | '.join(quantities)} |", f"| --- |{' ---: |' * len(quantities)}"]
            for workload, own in alike.groupby("workload", sort=False):
                values = [_shown(value, unit) for value, unit in zip(own["value"], own["unit"], strict=True)]
                lines.append(f"| {workload} | {' | '.join(values)} |")
            lines.append("")
    return lines


def _alike(group: pd.DataFrame) -> list[tuple[tuple[str, ...], pd.DataFrame]]:
    """Workloads of which the same quantities are known, together: they make one table."""
    known = group.groupby("workload", sort=False)["quantity"].agg(tuple)
    return [
        (quantities, group[group["workload"].isin(known.index[[other == quantities for other in known]])])
        for quantities in dict.fromkeys(known)
    ]


def _shown(value: float, unit: str) -> str:
    if value % 1 == 0:
        number = f"{int(value):,}"
    elif abs(value) >= 100:
        number = f"{value:,.0f}"
    else:
        number = f"{value:.3g}"
    return f"{number} {unit}".rstrip()
