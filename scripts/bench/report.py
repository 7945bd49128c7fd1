"""reports/benchmark: what was measured as CSV, and a report that is made of nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

OUT = Path(__file__).resolve().parents[2] / "reports/benchmark"
# The share of the floor that the engine is meant to reach.
FLOOR_GOAL = 0.7


def save_speed(timings: pd.DataFrame, runs: pd.DataFrame, facts: dict[str, Any]) -> None:
    """Keep what `speed` measured."""
    _save("speed", timings, facts)
    runs.to_csv(OUT / "speed_runs.csv", index=False, float_format="%.6g")


def save_growth(points: pd.DataFrame, facts: dict[str, Any]) -> None:
    """Keep what `growth` measured."""
    _save("growth", points, facts)


def save_neurons(recalls: pd.DataFrame, facts: dict[str, Any]) -> None:
    """Keep what `neurons` measured."""
    _save("neurons", recalls, facts)


def save_search(table: pd.DataFrame, facts: dict[str, Any]) -> None:
    """Keep what `search` measured."""
    _save("search", table, facts)


def save_memory(table: pd.DataFrame, facts: dict[str, Any]) -> None:
    """Keep what `memory` measured."""
    _save("memory", table, facts)


def save_generate(table: pd.DataFrame, facts: dict[str, Any]) -> None:
    """Keep what `generate` measured."""
    _save("generate", table, facts)


def save_verdict(table: pd.DataFrame, facts: dict[str, Any]) -> None:
    """Keep what `verdict` measured."""
    _save("verdict", table, facts)


def write() -> Path:
    """Write report.md from what is there."""
    lines = [
        "# Benchmark",
        "",
        "Made by `scripts/bench/run`; [what is timed and how](../../scripts/bench/README.md).",
        "",
    ]
    if (OUT / "speed.json").exists():
        lines += _speed_section()
    for name, section in _SECTIONS.items():
        if (OUT / f"{name}.json").exists():
            lines += section()
    path = OUT / "report.md"
    path.write_text("\n".join(lines).rstrip() + "\n", "utf-8")
    print(path.relative_to(OUT.parents[1]))
    return path


def _save(name: str, table: pd.DataFrame, facts: dict[str, Any]) -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    table.to_csv(OUT / f"{name}.csv", index=False, float_format="%.6g")
    (OUT / f"{name}.json").write_text(json.dumps(facts, indent=1) + "\n", "utf-8")


def _speed_section() -> list[str]:
    facts = json.loads((OUT / "speed.json").read_text("utf-8"))
    timings, runs = pd.read_csv(OUT / "speed.csv"), pd.read_csv(OUT / "speed_runs.csv").set_index("run")
    engine = timings[timings["contender"] == facts["engine"]].set_index("run")
    own, outcomes = engine["seconds"], runs["outcomes"]
    return [
        "## Speed",
        "",
        f"{facts['model']}, float32, `logit_diff` {facts['outcome']} at the last prompt token. The grid of a pair: "
        "layer_output, attention_output and mlp_output of every layer, at every single token from the first difference "
        f"on, both directions: {outcomes.min():,} to {outcomes.max():,} outcomes of {runs['tokens'].min()} to "
        f"{runs['tokens'].max()} tokens. {len(runs)} interleaved runs in one process, over {facts['pairs']} pairs.",
        "",
        *_machine_lines(facts),
        f"- load average before each run: {_each(runs['load_average'], '.1f')}; cores used by other processes during "
        f"it: {_each(runs['others'], '.2f')}; torch threads: {facts['threads']}",
        "",
        "The engine is timed on the whole grid of every pair. The others take the same time for every site, so each is "
        f"timed on {facts['sample']} sites of the same pair, as many of each component and direction, drawn at random, "
        "and **scaled to the grid by the number of sites**. Ratios are taken within a run; the table has medians.",
        "",
        *_table(
            (
                "",
                "grid of a pair, s",
                "ms per outcome",
                "engine is faster by",
                "least and most",
                "by CPU time",
                "largest deviation, logits",
            ),
            [_contender_row(timings, name, engine, outcomes) for name in dict.fromkeys(timings["contender"])],
        ),
        "",
        f"The largest deviation of any value from the engine's is {timings['deviation'].max():.1e} logits; at 1e-3 the "
        f"benchmark fails. Outcomes of one prompt span at least {runs['span'].min():.2f} logits.",
        "",
        "### The floor",
        "",
        "The fewest operations that the outcomes need, over the rate of the machine's own matrix products in the same "
        "run (formula in `scripts/bench/floor.py`):",
        "",
        *_table(("run", "outcomes", "TFLOP", "GFLOP/s", "floor, s", "engine, s", "share"), _floor_rows(runs, own)),
        "",
        _rates(runs),
        "",
        "That product has its weights in the cache. The model's own layers, one after the other, take theirs from "
        f"memory and reach {_median(runs['layers_rate']) / 1e9:.0f} GFLOP/s at {facts['layers_rows']:,} rows; at that "
        f"rate the engine is at {_median(runs['fewest_flops'] / runs['layers_rate'] / own):.0%} of the floor.",
        "",
        "Counted by whole layers, which is every layer above the write and every token from the written one on (though "
        "in the first of these layers only one token has changed, and in the last only the last token is read), the "
        f"floor is {_median(runs['whole_layers_flops'] / runs['fewest_flops']):.2f} times as high and the engine's "
        f"share of it {_median(_share(runs, own, 'whole_layers_flops')):.0%}.",
        "",
        "### Goals",
        "",
        *_table(("goal", "wanted", "measured", ""), _goal_rows(timings, runs, own, facts)),
        "",
    ]


def _contender_row(timings: pd.DataFrame, name: str, engine: pd.DataFrame, outcomes: pd.Series) -> tuple[str, ...]:
    part = timings[timings["contender"] == name].set_index("run")
    times = (name, f"{_median(part['grid_seconds']):.1f}", f"{_median(1e3 * part['grid_seconds'] / outcomes):.2f}")
    if part.equals(engine):
        return (*times, "", "", "", "")
    ratio = part["grid_seconds"] / engine["grid_seconds"]
    return (
        *times,
        f"{_median(ratio):.1f}x",
        f"{ratio.min():.1f} to {ratio.max():.1f}",
        f"{_median(part['grid_cpu_seconds'] / engine['grid_cpu_seconds']):.1f}x",
        f"{part['deviation'].max():.1e}",
    )


def _floor_rows(runs: pd.DataFrame, own: pd.Series) -> Iterable[tuple[str, ...]]:
    for number, run in runs.iterrows():
        floor = run["fewest_flops"] / run["rate"]
        yield (
            str(number),
            f"{run['outcomes']:,.0f}",
            f"{run['fewest_flops'] / 1e12:.3f}",
            f"{run['rate'] / 1e9:.0f}",
            f"{floor:.2f}",
            f"{own[number]:.2f}",
            f"{floor / own[number]:.0%}",
        )


def _rates(runs: pd.DataFrame) -> str:
    columns = [name for name in runs.columns if name.startswith("rate_")]
    found = ", ".join(f"{name.removeprefix('rate_')} rows {_median(runs[name]) / 1e9:.0f}" for name in columns)
    return f"GFLOP/s of the MLP's two products by rows, medians: {found}; the best of each run is its rate."


def _share(runs: pd.DataFrame, own: pd.Series, count: str) -> pd.Series:
    return runs[count] / runs["rate"] / own


def _goal_rows(
    timings: pd.DataFrame, runs: pd.DataFrame, own: pd.Series, facts: dict[str, Any]
) -> Iterable[tuple[str, ...]]:
    for name, goal in facts["goals"].items():
        if goal:
            ratio = _median(timings[timings["contender"] == name].set_index("run")["grid_seconds"] / own)
            yield f"against {name}", f"{goal:.0f}x", f"{ratio:.1f}x", _verdict(ratio, goal)
    for title, count in (("fewest operations", "fewest_flops"), ("whole layers", "whole_layers_flops")):
        share = _median(_share(runs, own, count))
        yield f"of the floor, {title}", f"{FLOOR_GOAL:.0%}", f"{share:.0%}", _verdict(share, FLOOR_GOAL)


def _verdict(found: float, goal: float) -> str:
    return "reached" if found >= goal else "**missed**"


def _neurons_section() -> list[str]:
    facts, recalls = json.loads((OUT / "neurons.json").read_text("utf-8")), pd.read_csv(OUT / "neurons.csv")
    each = facts["seconds"] / facts["outcomes"]
    budgets = [name for name in recalls if name.startswith("recall_")]
    return [
        "## All neurons",
        "",
        f"Every MLP neuron of every layer of {facts['model']} at the last token, in both directions, one pair: "
        f"{facts['outcomes']:,} outcomes in {facts['seconds']:.0f} s, {1e3 * each:.2f} ms each, planning included.",
        "",
        *_machine_lines(facts),
        f"- load average {facts['load_average']:.1f}; cores used by other processes: {facts['others']:.2f}",
        "",
        f"One nnsight trace per neuron takes {1e3 * facts['traced']:.0f} ms ({facts['sample']} timed, their effects "
        f"equal to 1e-3 logits): the engine is **{facts['traced'] / each:.0f}x** as fast (goal: 100x). The last "
        "layer's neurons have a closed form, the final norm and two rows of the unembedding; what was run differs from "
        f"it by {facts['closed_form_deviation']:.1e} logits at most. It would save one layer of many, so the engine "
        "does not use it.",
        "",
        "### Screening",
        "",
        f"Attribution patching ranks them in {facts['screening_seconds']:.1f} s, both directions and variants. Share "
        f"of the exact top {facts['top']:.0%}, by size, among the first ranks (1x: as many ranks as there are in it):",
        "",
        *_table(
            ("effect", "variant", *(f"{name.removeprefix('recall_')}x" for name in budgets)),
            (
                (one.quantity, one.variant, *(f"{getattr(one, name):.0%}" for name in budgets))
                for one in recalls.itertuples()
            ),
        ),
        "",
        "AtP*'s other part, the QK fix, corrects the effect of queries and keys; no site here is one.",
        "",
    ]


def _search_section() -> list[str]:
    facts, table = json.loads((OUT / "search.json").read_text("utf-8")), pd.read_csv(OUT / "search.csv")
    first, last = table.iloc[0], table.iloc[-1]
    return [
        "## Search by windows",
        "",
        "Planted models of growing width: sites that `neurons.search = windows` measures on each pair until it is left "
        f"with single neurons. From {first['d_ff']:,} to {last['d_ff']:,} neurons per layer "
        f"({last['d_ff'] / first['d_ff']:.0f}x) they are {table['windows'].min()} to {table['windows'].max()}, with "
        f"{table['planted'].min()} to {table['planted'].max()} planted gates.",
        "",
        *_machine_lines(facts),
        "",
        "![Sites measured by width](search.png)",
        "",
        *_table(
            (
                "neurons per layer",
                "all neurons",
                "sites measured",
                "steps",
                "planted gates",
                "found",
                "late neurons beside",
            ),
            (
                (
                    f"{one.d_ff:,}",
                    f"{one.d_ff * one.layers:,}",
                    f"{one.windows}",
                    f"{one.steps}",
                    f"{one.planted}",
                    f"{one.found}",
                    f"{one.others}",
                )
                for one in table.itertuples()
            ),
        ),
        "",
    ]


def _memory_section() -> list[str]:
    facts, table = json.loads((OUT / "memory.json").read_text("utf-8")), pd.read_csv(OUT / "memory.csv")
    off = (table["planned_gb"] / table["peak_gb"] - 1).abs().max()
    kept = bool((table["peak_gb"] <= table["limit_gb"].fillna(float("inf"))).all())
    return [
        "## Memory",
        "",
        "Whole studies on SmolLM2-135M-Instruct, float32, each a process of its own. What `plan` states is off by "
        f"{off:.0%} at most (goal: 25%); `--max-memory` is {'kept' if kept else '**not kept**'}.",
        "",
        *_machine_lines(facts),
        "",
        *_table(
            ("outcome", "--max-memory, GB", "planned, GB", "peak, GB"),
            (
                (
                    one.outcome,
                    "none" if pd.isna(one.limit_gb) else f"{one.limit_gb:g}",
                    f"{one.planned_gb:.2f}",
                    f"{one.peak_gb:.2f}",
                )
                for one in table.itertuples()
            ),
        ),
        "",
    ]


def _generate_section() -> list[str]:
    """Tokens per second of the engine's answers and of transformers', and their ratio round by round."""
    facts, table = json.loads((OUT / "generate.json").read_text("utf-8")), pd.read_csv(OUT / "generate.csv")
    produced, goal = facts["batch"] * facts["tokens"], 0.8
    table["ratio"] = table["transformers"] / table["seconds"]
    table["cpu_ratio"] = table["transformers_cpu"] / table["cpu_seconds"]
    rows = [
        (
            str(way),
            f"{produced / _median(part['seconds']):.0f}",
            f"{produced / _median(part['transformers']):.0f}",
            _each(part["ratio"], ".2f"),
            f"{_median(part['cpu_ratio']):.2f}",
            _verdict(_median(part["ratio"]), goal),
        )
        for way, part in table.groupby("way", sort=False)
    ]
    head = ("answers", "tokens/s", "transformers' tokens/s", "ratio, round by round", "of CPU times", f"goal: {goal}")
    return [
        "## Answers behind swapped mediators",
        "",
        f"{facts['model']}, float32: {facts['batch']} answers of {facts['tokens']} tokens side by side. The MLP output "
        f"of the last {facts['layers']} layers is swapped at every token from the first difference on; the plain runs "
        "that the values come from are included. Transformers' own greedy generation of the same prompts runs in turn.",
        "",
        *_machine_lines(facts),
        f"Other processes used {_median(table['others']):.1f} cores (median).",
        "",
        *_table(head, rows),
        "",
    ]


def _verdict_section() -> list[str]:
    """How long the verdicts take, in plain forward passes and beside maps of single sites."""
    facts, table = json.loads((OUT / "verdict.json").read_text("utf-8")), pd.read_csv(OUT / "verdict.csv")
    seconds, passes = (table.set_index("what")[column] for column in ("seconds", "passes_per_pair"))
    share = seconds["all five"] / seconds["maps"]
    with_heads = seconds["all five"] / (seconds["maps"] + seconds["maps of heads"])
    rows = [
        (one.what, f"{one.seconds:.1f}", f"{one.passes_per_pair:.1f}") if one.seconds else (one.what, "none drawn", "")
        for one in table.itertuples()
    ]
    goals = [
        ("claims 1 and 2, passes a pair", "5", f"{passes['claims 1 and 2']:.1f}", passes["claims 1 and 2"] <= 5),
        ("all five, passes a pair", "40", f"{passes['all five']:.1f}", passes["all five"] <= 40),
        ("all five, of the maps' time", "50%", f"{share:.0%}", share <= 0.5),
    ]
    return [
        "## Time to the verdicts",
        "",
        f"{facts['model']}, {facts['dtype']}, {facts['pairs']} pairs with their placebos, half of them held out. The "
        "maps are those of single sites: every layer at three positions, attention and MLP of every layer. A plain "
        f"forward pass of one prompt, without an answer behind it, takes {1000 * facts['pass']:.0f} ms.",
        "",
        *_machine_lines(facts),
        f"Other processes used {facts['others']:.1f} cores (mean).",
        "",
        *_table(("what", "seconds", "plain passes a pair"), rows),
        "",
        *_table(
            ("goal", "at most", "measured", ""),
            ((goal, most, found, "reached" if kept else "**missed**") for goal, most, found, kept in goals),
        ),
        "",
        f"Of the time of all three maps, every head at `last` among them, all five claims take {with_heads:.0%}.",
        "",
    ]


def _growth_section() -> list[str]:
    facts = json.loads((OUT / "growth.json").read_text("utf-8"))
    points = pd.read_csv(OUT / "growth.csv")
    lines = [
        "## Growth",
        "",
        "Each point is one new process that measures a grid with the engine: seconds without loading, the least of "
        f"{facts['repeats']}, and the peak of its resident memory, loading included. Float32, `logit_diff`.",
        "",
        *_machine_lines(facts),
        f"- load average: {points['load_average'].min():.1f} to {points['load_average'].max():.1f}; cores used by "
        f"other processes: {_median(points['others']):.2f} in the median, {points['others'].max():.2f} at most",
        "",
    ]
    for axis, part in points.groupby("axis", sort=False):
        lines += [
            f"### {str(axis).capitalize()}",
            "",
            f"{facts['axes'][axis]} {_growth_words(part)}",
            "",
            f"![Time and peak memory by {axis}](growth_{axis}.png)",
            "",
            *_table(
                (str(axis), "outcomes", "s", "ms per outcome", "peak of one row, MB", "peak, MB"), _growth_rows(part)
            ),
            "",
        ]
    return lines


def _growth_rows(part: pd.DataFrame) -> Iterable[tuple[str, ...]]:
    for point in part.itertuples():
        yield (
            f"{point.size:,}",
            f"{point.outcomes:,}",
            f"{point.seconds:.2f}",
            f"{1e3 * point.seconds / point.outcomes:.2f}",
            f"{point.loaded_mb:,.0f}",
            f"{point.peak_mb:,.0f}",
        )


def _growth_words(part: pd.DataFrame) -> str:
    first, last = part.iloc[0], part.iloc[-1]
    return (
        f"From {first['size']:,} to {last['size']:,} ({last['size'] / first['size']:.1f}x): outcomes "
        f"{last['outcomes'] / first['outcomes']:.1f}x, time {last['seconds'] / first['seconds']:.1f}x, peak memory "
        f"{last['peak_mb'] / first['peak_mb']:.2f}x."
    )


def _machine_lines(facts: dict[str, Any]) -> list[str]:
    return [f"- {facts['date']}, {facts['processor']}", f"- {facts['versions']}"]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    ruler = ["---", *["---:"] * (len(head) - 1)]
    return [f"| {' | '.join(cells)} |" for cells in (head, ruler, *rows)]


def _each(column: pd.Series, form: str) -> str:
    return ", ".join(format(value, form) for value in column)


def _median(column: pd.Series) -> float:
    return float(column.median())


_SECTIONS = {
    "verdict": _verdict_section,
    "neurons": _neurons_section,
    "search": _search_section,
    "memory": _memory_section,
    "generate": _generate_section,
    "growth": _growth_section,
}
