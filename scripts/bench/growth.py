"""How the engine's time and peak memory grow: one new process per point, so that each has a peak of its own.

This process imports nothing large before its children are done: what a process weighs when it starts another counts in
the other's peak.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

from bench.growth_point import AXES, SIZES

REPEATS = 2


def main() -> None:
    """Measure all points, draw one figure per axis, write the report."""
    parser = argparse.ArgumentParser(prog="scripts/bench/growth", description=__doc__)
    parser.add_argument("--repeats", type=int, default=REPEATS, help="times each point is measured")
    options = parser.parse_args()
    points = [_point(axis, size, options.repeats) for axis, sizes in SIZES.items() for size in sizes]
    _publish(points, options.repeats)


def _point(axis: str, size: int, repeats: int) -> dict[str, object]:
    command = [sys.executable, "-m", "bench.growth_point", axis, str(size), str(repeats)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    point = json.loads(done.stdout.splitlines()[-1])
    print(
        f"{axis} {size}: {point['outcomes']} outcomes, {point['seconds']:.2f} s, {point['peak_mb']:.0f} MB, others use "
        f"{point['others']:.2f} cores",
        flush=True,
    )
    return point


def _publish(points: list[dict[str, object]], repeats: int) -> None:
    import pandas as pd

    from bench import report
    from bench.machine import facts

    table = pd.DataFrame(points)
    report.save_growth(table, {**facts(), "repeats": repeats, "axes": AXES})
    for axis, part in table.groupby("axis", sort=False):
        _draw(str(axis), part)
    report.write()


def _draw(axis, part) -> None:  # type: ignore[no-untyped-def]
    """Time and peak memory against size, both from 0, so that a straight line through 0 is proportional growth."""
    from matplotlib.figure import Figure

    from bench.report import OUT

    figure = Figure(figsize=(7, 2.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(part["size"], part["seconds"], "o-", color="#0072b2")
    right.plot(part["size"], part["peak_mb"], "o-", color="#d55e00", label="peak")
    right.plot(part["size"], part["loaded_mb"], "o--", color="#999999", label="one row")
    right.legend(frameon=False)
    for axes, label in ((left, "seconds"), (right, "resident memory, MB")):
        axes.set(xlabel=axis, ylabel=label)
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(OUT / f"growth_{axis}.png", dpi=120)


if __name__ == "__main__":
    main()
