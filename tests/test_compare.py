"""Runs side by side, on run folders whose values are known because a backend of planted shares made them."""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from fakes import INFO, CannedBackend, Watcher, records, write_pairs
from rich.console import Console

from remote_mediation.compare import (
    COMPARISON_COLUMNS,
    Compared,
    comparison_csv,
    comparison_table,
    read_runs,
    write_comparison,
)
from remote_mediation.config import StudyConfig
from remote_mediation.engine.jobs import Part, Readout
from remote_mediation.engine.rows import Row
from remote_mediation.errors import SettingsError, StoreError
from remote_mediation.show import figures
from remote_mediation.store import Store
from remote_mediation.study import run_study

LATE, EARLY = (
    {"mlp": (0.1, 0.2, 0.3, 0.6), "attention": (0.3, 0.1, 0.0, 0.0)},
    {"mlp": (0.5, 0.0), "attention": (0.1, 0.3)},
)
"""Share of TE that each layer's MLP and attention carry."""


class Planted(CannedBackend):
    """Y is 0 on a harmless prompt and TE on a harmful one; a module's NIE and TIE are its planted share of TE."""

    def __init__(self, name: str, shares: dict[str, tuple[float, ...]], te: Callable[[int], float]) -> None:
        super().__init__({}, info=dataclasses.replace(INFO, name=name, layers=len(shares["mlp"])))
        self._shares, self._te = shares, te

    def collect(self, ticket: str) -> Readout:
        job = self._shelf[ticket]
        return Readout([np.array(y, np.float32) for part in job.parts for y in self._values(part)], seconds=1.0)

    def _values(self, part: Part) -> list[list[float]]:
        return [[self._y(row)] + [0.0] * (len(part.payload["stacks"][0]["queries"]) - 1) for row in part.rows]

    def _y(self, row: Row) -> float:
        te = self._te([record["id"] for record in records()].index(row.pair))
        share = sum(self._share(write.component, write.layer) for write in row.writes)
        return te * (1 - share) if row.base else te * share

    def _share(self, component: str, layer: int) -> float:
        kind = component.removesuffix("_output")
        return self._shares[kind][layer] if kind in self._shares else 1.0


def strong(pair: int) -> float:
    """TE between 2 and 2.5."""
    return 2 + 0.1 * pair


def absent(pair: int) -> float:
    """TE above and below 0; templates follow each other in the order of pairs."""
    return (1.0, -1.1, 0.2)[pair % 3]


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Path]:
    """A finished run folder of planted shares."""
    pairs = write_pairs(tmp_path / "pairs.jsonl", records())

    def run(
        name: str, shares: dict[str, tuple[float, ...]], te: Callable[[int], float] = strong, **settings: Any
    ) -> Path:
        config = StudyConfig(
            **{
                **{"model": name, "pairs": str(pairs), "analyses": ["modules"], "outcome": "logit_diff"},
                **{"logit_diff": {"plus": ["sure"], "minus": ["no"]}, "statistics": {"resamples": 100}},
                **settings,
            }
        )
        store = Store.create(tmp_path / name, config.identity())
        run_study(config, Planted(name, shares, te), store, Watcher())
        return store.folder

    return run


def by_name(runs: list[Compared]) -> dict[str, Compared]:
    return {Path(run.name).name: run for run in runs}


def test_models_of_different_depth_on_relative_depth(make: Callable[..., Path]) -> None:
    runs = by_name(read_runs([make("late", LATE), make("early", EARLY)]))
    for name, planted in (("late", LATE), ("early", EARLY)):
        profile = runs[name].profile
        for kind, shares in planted.items():
            line = profile[profile["component"] == f"{kind}_output"].sort_values("depth")
            assert line["depth"].to_list() == pytest.approx([n / (len(shares) - 1) for n in range(len(shares))])
            assert line["share"].to_list() == pytest.approx(shares, abs=1e-6)
    late = runs["late"].measures
    assert late["mlp_centre"].value == pytest.approx((0.2 / 3 + 0.3 * 2 / 3 + 0.6) / 1.2)
    assert late["mlp_last_third"].value == pytest.approx((0.3 / 3 + 0.6) / 1.2)  # a third of layer 2, all of layer 3
    assert late["attention_centre"].value == pytest.approx((0.1 / 3) / 0.4, abs=1e-6)
    assert late["difference"].value == pytest.approx(1.2 - 0.4)
    assert runs["early"].measures["difference"].value == pytest.approx(0.5 - 0.4)
    assert runs["early"].measures["mlp_last_third"].value == pytest.approx(0, abs=1e-6)
    assert runs["late"].total.value == pytest.approx(2.25)


def test_a_drop_is_compared_like_a_rise(make: Callable[..., Path]) -> None:
    runs = by_name(read_runs([make("rise", LATE), make("drop", LATE, lambda pair: -strong(pair))]))
    assert runs["drop"].total.value == pytest.approx(-2.25)
    for name, found in runs["rise"].measures.items():
        assert runs["drop"].measures[name].value == pytest.approx(found.value)
    pd.testing.assert_frame_equal(
        runs["drop"].profile.drop(columns="run"), runs["rise"].profile.drop(columns="run"), atol=1e-6
    )


def test_where_te_spans_zero_no_share_is_given(make: Callable[..., Path], tmp_path: Path) -> None:
    runs = read_runs([make("late", LATE), make("none", LATE, absent)])
    none = by_name(runs)["none"]
    assert none.total.low < 0 < none.total.high
    assert none.profile.empty
    assert all(math.isnan(found.value) for found in none.measures.values())
    report = write_comparison(runs, tmp_path / "out").read_text("utf-8")
    assert f"Left out of the figure:\n\n- {none.name}: TE spans 0, " in report
    assert f"{none.name}: TE spans 0" in " ".join(map(str, comparison_table(runs).notes))


def test_no_figure_without_shares(make: Callable[..., Path], tmp_path: Path) -> None:
    runs = read_runs([make("one", LATE, absent), make("two", EARLY, absent)])
    report = write_comparison(runs, tmp_path / "out").read_text("utf-8")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"comparison.csv", "comparison.md"}
    assert "comparison.png" not in report


def test_runs_without_modules_or_neurons_say_so(make: Callable[..., Path]) -> None:
    neurons = {"analyses": ["neurons"], "neurons": {"search": ["windows"], "random_sets": 5}}
    runs = by_name(read_runs([make("late", LATE), make("cells", LATE, **neurons)]))
    assert (runs["late"].chosen, runs["late"].mediators) == (None, None)
    assert "no single neurons were measured in this study" in runs["late"].notes()
    assert "the modules analysis was not part of this study" in runs["cells"].notes()
    assert runs["cells"].profile.empty
    found = comparison_csv(list(runs.values())).set_index("model")
    cells = runs["cells"]
    assert cells.chosen is not None
    assert cells.chosen > 0  # in this backend every neuron carries all of TE
    assert (found.loc["cells", "chosen"], found.loc["cells", "mediators"]) == (cells.chosen, cells.mediators)
    assert math.isnan(found.loc["late", "chosen"])


def test_the_csv_has_a_row_per_run_and_every_documented_column(make: Callable[..., Path], tmp_path: Path) -> None:
    runs = read_runs([make("late", LATE), make("early", EARLY)])
    write_comparison(runs, tmp_path / "out")
    found = pd.read_csv(tmp_path / "out/comparison.csv")
    assert list(found.columns) == list(COMPARISON_COLUMNS)
    assert found["model"].to_list() == ["late", "early"]
    assert found["layers"].to_list() == [4, 2]
    assert found["unit"].to_list() == ["logits", "logits"]
    assert found["te"].to_list() == pytest.approx([run.total.value for run in runs])
    for name in ("mlp_centre", "mlp_last_third", "attention_centre", "attention_last_third", "difference"):
        ends = [(run.measures[name].value, run.measures[name].low, run.measures[name].high) for run in runs]
        shown = found[[name, f"{name}_low", f"{name}_high"]].to_numpy()
        np.testing.assert_allclose(shown, ends)
    again = write_comparison(runs, tmp_path / "again").parent
    for path in (tmp_path / "out").iterdir():
        assert (again / path.name).read_bytes() == path.read_bytes()


def test_the_table_has_a_column_per_run(make: Callable[..., Path]) -> None:
    runs = read_runs([make("late", LATE), make("early", EARLY)])
    table = comparison_table(runs)
    assert table.header == ("", *(run.name for run in runs))
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["model"] == ("late", "early")
    assert rows["layers"] == ("4", "2")
    assert rows["pairs, clusters"] == ("6, 3", "6, 3")
    assert [cell.split()[0] for cell in rows["MLP - attention: NIE summed over layers / TE"]] == ["80%", "10%"]
    assert rows["MLP NIE: centre of mass, depth 0 to 1"][0].startswith("0.722 [")
    assert rows["TE, in the outcome's unit"][0].startswith("2.25 [")
    assert rows["TE, in the outcome's unit"][0].endswith("] logits")
    assert rows["neurons that mediate, held out"] == ("n/a", "n/a")


def test_unfinished_and_violated_runs_are_marked(make: Callable[..., Path]) -> None:
    late, early = make("late", LATE), make("early", EARLY)
    store = Store.open(late)
    record = store.record()
    store.save_record({key: value for key, value in record.items() if key != "finished"})
    runs = by_name(read_runs([late, early]))
    assert "this run is not finished" in runs["late"].notes()
    assert "this run is not finished" not in runs["early"].notes()
    assert not any("do not trust" in note for note in runs["early"].notes())

    class Wrong(Planted):
        def _share(self, component: str, layer: int) -> float:
            return 0.9 if component == "layer_output" else super()._share(component, layer)

    config = StudyConfig(**{**record["config"], "model": "wrong"})
    store = Store.create(late.parent / "wrong", config.identity())
    run_study(config, Wrong("wrong", LATE, strong), store, Watcher())
    wrong = by_name(read_runs([store.folder, early]))["wrong"]
    assert any(note.startswith("do not trust this run") for note in wrong.notes())


def test_a_run_without_values_is_listed(make: Callable[..., Path]) -> None:
    late, early = make("late", LATE), make("early", EARLY)
    for path in late.glob("readouts/*"):
        path.unlink()
    runs = by_name(read_runs([late, early]))
    (reason,) = {found.reason for found in runs["late"].measures.values()}
    assert reason.startswith("it has no values: nothing was measured yet")
    assert runs["late"].notes()[0] == reason
    assert len(runs["early"].profile)


def test_the_terminal_shows_long_names_in_full(make: Callable[..., Path]) -> None:
    runs = read_runs(
        [make("organisation/a-very-long-model-name-of-seventy-letters-7B-Instruct", LATE), make("b[red]", EARLY)]
    )
    console = Console(width=60, file=io.StringIO())
    console.print(comparison_table(runs).rich("both"))
    assert isinstance(console.file, io.StringIO)
    printed = console.file.getvalue()
    assert "…" not in printed
    assert "[red]" in printed


def test_what_is_refused(make: Callable[..., Path], tmp_path: Path) -> None:
    late = make("late", LATE)
    for folders in ([], [late]):
        with pytest.raises(SettingsError, match=f"two run folders or more, got {len(folders)}; name another"):
            read_runs(folders)
    with pytest.raises(SettingsError, match="is named twice; name different run folders"):
        read_runs([late, tmp_path / "x" / ".." / "late"])
    with pytest.raises(StoreError, match="nowhere is no run folder"):
        read_runs([late, tmp_path / "nowhere"])


def test_the_figure_draws_a_solid_and_a_dashed_line_per_run(make: Callable[..., Path]) -> None:
    runs = read_runs([make("late", LATE), make("early", EARLY)])
    (axis,) = figures.comparison(pd.concat(run.profile for run in runs)).axes
    lines = {line.get_label(): line for line in axis.lines}
    late, early = (run.name for run in runs)
    assert [label for label in lines if not label.startswith("_")] == [
        *(f"{late}, MLP", f"{late}, attention"),
        *(f"{early}, MLP", f"{early}, attention"),
    ]
    assert lines[f"{late}, MLP"].get_linestyle() == "-"
    assert lines[f"{late}, attention"].get_linestyle() == "--"
    assert lines[f"{late}, MLP"].get_color() == lines[f"{late}, attention"].get_color()
    assert lines[f"{late}, MLP"].get_color() != lines[f"{early}, MLP"].get_color()
    assert list(lines[f"{late}, MLP"].get_xdata()) == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert list(lines[f"{late}, MLP"].get_ydata()) == pytest.approx(LATE["mlp"], abs=1e-6)
    assert list(lines[f"{early}, attention"].get_ydata()) == pytest.approx(EARLY["attention"], abs=1e-6)
    shaded = axis.patches[0].get_extents().transformed(axis.transData.inverted())
    assert (shaded.x0, shaded.x1) == pytest.approx((2 / 3, 1))
