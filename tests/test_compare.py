"""Runs side by side, on run folders whose values are known because a backend of planted shares made them."""

from __future__ import annotations

import dataclasses
import io
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from fakes import INFO, CannedBackend, Watcher, records, write_pairs
from rich.console import Console

from remote_mediation.analyses.claims.ask import CLAIM_COLUMNS, SET_COLUMNS
from remote_mediation.compare import (
    RUN_COLUMNS,
    VERDICT_COLUMNS,
    Compared,
    agreement,
    compared,
    comparison_data,
    comparison_figure,
    read_runs,
    runs_table,
    verdicts_table,
    write_comparison,
)
from remote_mediation.config import StudyConfig
from remote_mediation.engine.jobs import Context, Readout
from remote_mediation.engine.rows import Row
from remote_mediation.errors import SettingsError, StoreError
from remote_mediation.export import export
from remote_mediation.printed import read_printed
from remote_mediation.report import csv_tables
from remote_mediation.store import Store
from remote_mediation.study import run_study

REPORTS = Path(__file__).parents[1] / "reports"

LATE, EARLY = (0.1, 0.2, 0.3, 1.0), (0.6, 1.0)
"""Share of TE that the residual stream carries after each layer, at one position; at all it carries everything."""


class Planted(CannedBackend):
    """Y is 0 on a harmless prompt and TE on a harmful one; the stream's NIE and TIE are its planted share of TE."""

    def __init__(self, name: str, shares: tuple[float, ...], te: Callable[[int], float]) -> None:
        super().__init__({}, info=dataclasses.replace(INFO, name=name, layers=len(shares)))
        self._shares, self._te = shares, te

    def collect(self, ticket: str) -> Readout:
        job = self._shelf[ticket]
        return Readout(
            [np.array(y, np.float32) for context in job.contexts for y in self._values(context)], seconds=1.0
        )

    def _values(self, context: Context) -> list[list[float]]:
        return [[self._y(row)] + [0.0] * (len(context.payload["stacks"][0]["queries"]) - 1) for row in context.rows]

    def _y(self, row: Row) -> float:
        te = self._te([record["id"] for record in records()].index(row.pair))
        share = sum(1.0 if len(write.places) > 4 else self._share(write.layer) for write in row.writes)
        return te * (1 - share) if row.base else te * share

    def _share(self, layer: int) -> float:
        return self._shares[layer]


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

    def run(name: str, shares: tuple[float, ...], te: Callable[[int], float] = strong, **settings: Any) -> Path:
        config = StudyConfig(
            **{
                **{"model": name, "pairs": str(pairs), "analyses": ["layers"], "outcome": "logit_diff"},
                **{"logit_diff": {"plus": ["sure"], "minus": ["no"]}, "statistics": {"resamples": 100}},
                **settings,
            }
        )
        store = Store.create(tmp_path / name, config.identity())
        measured(store, config, Planted(name, shares, te))
        return store.folder

    return run


def measured(store: Store, config: StudyConfig, backend: Planted) -> None:
    """Run a study and write its tables, as its report does."""
    result = run_study(config, backend, store, Watcher())
    for name, table in csv_tables(result).items():
        store.write(name, table.to_csv(index=False))


def by_name(runs: list[Compared]) -> dict[str, Compared]:
    return {Path(run.name).name: run for run in runs}


def claimed(run: Path, said: str, harm: float, number: int = 1, ways: tuple[str, str] = ("nie", "tie")) -> Compared:
    """A run with a table of claims by hand: what was said of a claim, and its two deciding numbers."""
    rows = [(ways[0], harm, True), (ways[1], harm / 2, True), ("nie", 9.0, False)]
    sets = pd.DataFrame(
        [
            {
                **{"number": number, "measure": "it", "direction": way, "decides": decides, "n": 3, "clusters": 2},
                **{"harm": x, "harm_low": x - 0.1, "harm_high": x + 0.1},
            }
            for way, x, decides in rows
        ],
        columns=list(SET_COLUMNS),
    )
    claims = pd.DataFrame(
        [{"number": number, "claim": "in words", "said": said, "why": "because"}], columns=list(CLAIM_COLUMNS)
    )
    for name, table in {"claims.csv": claims, "sets.csv": sets}.items():
        table.to_csv(run / name, index=False)
    return compared(read_printed(run))


def test_models_of_different_depth_on_relative_depth(make: Callable[..., Path]) -> None:
    runs = by_name(read_runs([make("late", LATE), make("early", EARLY)]))
    for name, planted in (("late", LATE), ("early", EARLY)):
        profile = runs[name].profile
        assert set(profile["position"]) == {"edit", "last"}
        for _, line in profile.groupby("position"):
            ordered = line.sort_values("depth")
            assert ordered["depth"].to_list() == pytest.approx([n / (len(planted) - 1) for n in range(len(planted))])
            assert ordered["share"].to_list() == pytest.approx(planted, abs=1e-6)
    assert runs["late"].run.total.value == pytest.approx(2.25)


def test_verdicts_and_the_numbers_that_decide_them_stand_side_by_side(make: Callable[..., Path]) -> None:
    runs = [
        claimed(make("late", LATE), "supported", 0.9),
        claimed(make("early", EARLY), "not supported", 0.2),
        claimed(make("other", EARLY), "undecided", 0.5, number=2),
    ]
    rows = {row[0]: row[1:] for row in verdicts_table(runs).rows}
    assert rows == {
        "1. late layers": (
            "supported\nNIE 90% [80%, 100%]\nTIE 45% [35%, 55%]",
            "not supported\nNIE 20% [10%, 30%]\nTIE 10% [0%, 20%]",
            "-",
        ),
        "2. MLPs over attention": ("-", "-", "undecided\nNIE 50% [40%, 60%]\nTIE 25% [15%, 35%]"),
    }
    against = [str(note) for note in verdicts_table(runs).notes if "not supported" in note.text]
    assert against == ["early: 1. late layers, not supported: because"]
    found = comparison_data(runs)["verdicts"]
    assert list(found.columns) == list(VERDICT_COLUMNS)
    assert found["run"].to_list() == ["late"] * 2 + ["early"] * 2 + ["other"] * 2
    assert found["said"].to_list() == ["supported"] * 2 + ["not supported"] * 2 + ["undecided"] * 2
    assert found["harm_low"].to_list() == pytest.approx([0.8, 0.35, 0.1, 0.0, 0.4, 0.15])
    assert set(found["pairs"]) == {3}


def test_a_number_of_neither_direction_has_none(make: Callable[..., Path]) -> None:
    """As the gain in accuracy of claim 4 has, whose cell is empty."""
    run = claimed(make("late", LATE), "undecided", 0.2, number=4, ways=("", "both"))
    assert comparison_data([run])["verdicts"]["direction"].to_list() == ["", "both"]


def test_what_was_swapped_is_named_where_runs_differ_in_it(make: Callable[..., Path]) -> None:
    late, early = make("late", LATE), make("early", EARLY)
    runs = [claimed(late, "supported", 0.9), claimed(early, "supported", 0.8)]
    assert "\nit\n" not in verdicts_table(runs).rows[0][1]
    sets = pd.read_csv(early / "sets.csv").assign(measure="first 64 neurons")
    sets.to_csv(early / "sets.csv", index=False)
    _, first, second = verdicts_table([runs[0], compared(read_printed(early))]).rows[0]
    assert first.splitlines()[:2] == ["supported", "it"]
    assert second.splitlines()[:2] == ["supported", "first 64 neurons"]


def test_what_all_some_and_no_runs_support_is_said_first(make: Callable[..., Path], tmp_path: Path) -> None:
    late, early = make("late", LATE), make("early", EARLY)
    runs = [claimed(late, "supported, of any edit", 0.9), claimed(early, "not supported", 0.2)]
    assert agreement(runs) == (
        "**Supported, of the runs that tested it, in 1 of 2: late layers.** "
        "More for harm than for another edit of the same words: none of them."
    )
    assert write_comparison(runs, tmp_path / "out").read_text("utf-8").split("\n\n")[1] == agreement(runs)
    both = [claimed(late, "supported", 0.9), claimed(early, "not tested", math.nan)]
    assert agreement(both) == (
        "**Supported, of the runs that tested it, in 1 of 1: late layers.** "
        "More for harm than for another edit of the same words: late layers in late."
    )
    taken = [
        claimed(late, "supported, as the control", 0.9),
        claimed(early, "supported, of any edit, as the control", 0.9),
    ]
    assert agreement(taken) == (
        "**Supported, of the runs that tested it, in 2 of 2: late layers (as the control in 2).** "
        "More for harm than for another edit of the same words: late layers in late."
    )
    assert agreement([claimed(late, "undecided", 0.5)]).startswith(
        "**Supported, of the runs that tested it, in 0 of 1: "
    )
    assert agreement([claimed(late, "not tested", 0.5)]) == "**No run tested a claim.**"


def test_where_the_effect_crosses_over_is_told_by_relative_depth(make: Callable[..., Path]) -> None:
    """The stand-in carries as much at one position as at the other; here the edit loses what `last` gains."""
    (one, *_) = read_runs([make("late", LATE), make("early", EARLY)])
    edit = one.profile["position"] == "edit"
    shares = np.array([0.1, 0.2, 0.6, 1.0])
    profile = one.profile.copy()
    profile.loc[~edit, "share"], profile.loc[edit, "share"] = shares, 1 - shares
    passing = dataclasses.replace(one, profile=profile)
    assert passing.crossing == pytest.approx(2 / 3)
    assert passing.arrived == pytest.approx(2 / 3)
    (axis,) = comparison_figure([passing]).axes
    assert [line.get_xdata()[0] for line in axis.lines if line.get_linestyle() == ":"] == pytest.approx([2 / 3])
    assert comparison_figure([passing]).get_suptitle() == (
        "The effect passes from the changed words to the answer at 67% of the depth"
    )
    assert comparison_data([passing])["runs"].loc[0, "crossing"] == pytest.approx(2 / 3)
    assert math.isnan(one.crossing)  # as much at both is not more


def test_what_was_exported_is_compared_as_the_run_is(make: Callable[..., Path], tmp_path: Path) -> None:
    """It has neither prompts nor readouts."""
    late, early = make("late", LATE), make("early", EARLY)
    export(Store.open(late), tmp_path / "shared" / "late")
    own, shared = (comparison_data(read_runs([folder, early])) for folder in (late, tmp_path / "shared/late"))
    for name, table in own.items():
        pd.testing.assert_frame_equal(table, shared[name])


@pytest.mark.slow
def test_the_shipped_comparison_is_that_of_the_shipped_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make it anew by the command that its last line names."""
    shipped = (REPORTS / "compare/report.md").read_text("utf-8")
    named = re.findall(r"`remote-mediation compare (.*) --out (\S+)`", shipped)
    assert named
    monkeypatch.chdir(REPORTS.parent)
    runs = read_runs([Path(folder) for folder in named[0][0].split()])
    report = write_comparison(runs, tmp_path / "out")
    assert report.read_text("utf-8").replace(str(tmp_path / "out"), named[0][1]) == shipped
    for name in ("runs.csv", "verdicts.csv"):
        assert (REPORTS / "compare" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_a_drop_is_compared_like_a_rise(make: Callable[..., Path]) -> None:
    runs = by_name(read_runs([make("rise", LATE), make("drop", LATE, lambda pair: -strong(pair))]))
    assert runs["drop"].run.total.value == pytest.approx(-2.25)
    pd.testing.assert_frame_equal(
        runs["drop"].profile.drop(columns="run"), runs["rise"].profile.drop(columns="run"), atol=1e-6
    )


def test_where_te_spans_zero_no_share_is_given(make: Callable[..., Path], tmp_path: Path) -> None:
    runs = read_runs([make("late", LATE), make("none", LATE, absent)])
    none = by_name(runs)["none"]
    assert none.run.total.low < 0 < none.run.total.high
    assert none.profile.empty
    report = write_comparison(runs, tmp_path / "out").read_text("utf-8")
    assert f"Left out of the figure:\n\n- {none.name}: TE spans 0, " in report
    assert f"{none.name}: TE spans 0" in " ".join(map(str, runs_table(runs).notes))


def test_no_figure_without_shares(make: Callable[..., Path], tmp_path: Path) -> None:
    runs = read_runs([make("one", LATE, absent), make("two", EARLY, absent)])
    report = write_comparison(runs, tmp_path / "out").read_text("utf-8")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"runs.csv", "verdicts.csv", "report.md"}
    assert "crossings.png" not in report


def test_runs_without_layers_or_claims_say_so(make: Callable[..., Path]) -> None:
    runs = by_name(read_runs([make("late", LATE), make("parts", LATE, analyses=["modules"])]))
    assert "the claims analysis was not part of this study" in runs["late"].notes
    assert any(note.startswith("the layers analysis") for note in runs["parts"].notes)
    assert not any(note.startswith("the layers analysis") for note in runs["late"].notes)
    assert runs["parts"].profile.empty


def test_the_csv_has_a_row_per_run_and_every_documented_column(make: Callable[..., Path], tmp_path: Path) -> None:
    runs = read_runs([make("late", LATE), make("early", EARLY)])
    write_comparison(runs, tmp_path / "out")
    found = pd.read_csv(tmp_path / "out/runs.csv")
    assert list(found.columns) == list(RUN_COLUMNS)
    assert found["model"].to_list() == ["late", "early"]
    assert found["layers"].to_list() == [4, 2]
    assert found["measured_in"].to_list() == ["logits", "logits"]
    assert found["te"].to_list() == pytest.approx([run.run.total.value for run in runs])
    again = write_comparison(runs, tmp_path / "out").parent
    assert {path.name for path in again.iterdir()} == {"figures", "report.md", "runs.csv", "verdicts.csv"}
    assert (again / "figures/crossings.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_has_a_column_per_run(make: Callable[..., Path]) -> None:
    runs = read_runs([make("late", LATE), make("early", EARLY)])
    table = runs_table(runs)
    assert table.header == ("", "late", "early")
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["model"] == ("late", "early")
    assert rows["layers"] == ("4", "2")
    assert rows["precision, where"] == ("float32, local", "float32, local")
    assert rows["pairs, clusters"] == ("6, 3", "6, 3")
    assert rows["held-out pairs"] in {("2", "2"), ("4", "4")}
    assert rows["half of TE has arrived at the answer from"] == ("100% of the depth", "0% of the depth")
    assert rows["TE, in the outcome's unit"][0].startswith("2.2 [")
    assert rows["TE, in the outcome's unit"][0].endswith("] logits")


def test_a_run_s_own_report_is_not_written_over(make: Callable[..., Path]) -> None:
    late, early = make("late", LATE), make("early", EARLY)
    with pytest.raises(StoreError, match="late is a run folder, whose report would be lost; choose another --out"):
        write_comparison(read_runs([late, early]), late)
    assert not (late / "report.md").exists()


def test_unfinished_and_violated_runs_are_marked(make: Callable[..., Path]) -> None:
    late, early = make("late", LATE), make("early", EARLY)
    store = Store.open(late)
    record = store.record()
    store.save_record({key: value for key, value in record.items() if key != "finished"})
    runs = by_name(read_runs([late, early]))
    assert "this run is not finished" in runs["late"].notes
    assert "this run is not finished" not in runs["early"].notes
    assert not any("do not trust" in note for note in runs["early"].notes)

    class Wrong(Planted):
        def _share(self, layer: int) -> float:
            return 0.9

    config = StudyConfig(**{**record["config"], "model": "wrong"})
    store = Store.create(late.parent / "wrong", config.identity())
    measured(store, config, Wrong("wrong", LATE, strong))
    wrong = by_name(read_runs([store.folder, early]))["wrong"]
    assert any(note.startswith("do not trust this run") for note in wrong.notes)


@pytest.mark.parametrize(
    ("saved", "said"),
    [
        (lambda table, path: table.drop(columns="nie").to_csv(path, index=False), "no column 'nie'"),
        (lambda table, path: table.rename(columns=str.upper).to_csv(path, index=False), "no column 'pair_id'"),
        (lambda table, path: table.to_csv(path, index=False, sep=";", decimal=","), "no column 'pair_id'"),
        (lambda table, path: table.to_csv(path, index=False, quoting=1, decimal=","), "no numbers under 'y_base'"),
        (lambda table, path: table.astype({"te": object}).assign(te="n/a").to_csv(path), "no numbers under 'te'"),
        (lambda table, path: path.write_text(path.read_text() + "p9"), "empty cells under 'cluster'"),
    ],
    ids=["without a column", "capitals", "semicolons", "decimal commas", "texts", "cut"],
)
def test_tables_that_another_program_saved_are_refused(
    make: Callable[..., Path], saved: Callable[[pd.DataFrame, Path], None], said: str
) -> None:
    late, early = make("late", LATE), make("early", EARLY)
    saved(pd.read_csv(late / "effects.csv"), late / "effects.csv")
    with pytest.raises(StoreError, match=rf"effects.csv has {said}.*; write it anew with `remote-mediation report "):
        read_runs([late, early])


def test_a_table_of_another_kind_in_the_folder_is_named_in_one_line(make: Callable[..., Path]) -> None:
    """What pandas says of it ends in a line break, which cut the way out off."""
    late, early = make("late", LATE), make("early", EARLY)
    (late / "mine.csv").write_text("notes\none\none,two,three,four\n")
    with pytest.raises(StoreError, match=r"cannot read .*mine.csv: Error .* saw 4; write it anew .* take it out of"):
        read_runs([late, early])


def test_a_run_without_tables_says_how_to_write_them(make: Callable[..., Path]) -> None:
    late, early = make("late", LATE), make("early", EARLY)
    (late / "effects.csv").unlink()
    with pytest.raises(StoreError, match=r"has no effects.csv with rows; write it with `remote-mediation report "):
        read_runs([late, early])


def test_the_terminal_shows_long_names_in_full(make: Callable[..., Path]) -> None:
    runs = read_runs(
        [make("organisation/a-very-long-model-name-of-seventy-letters-7B-Instruct", LATE), make("b[red]", EARLY)]
    )
    console = Console(width=60, file=io.StringIO())
    console.print(runs_table(runs).rich("both"))
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
    (axis,) = comparison_figure(runs).axes
    lines = {line.get_label(): line for line in axis.lines}
    late, early = (run.name for run in runs)
    assert [label for label in lines if not label.startswith("_")] == [
        *(f"{late}, at 'last'", f"{late}, at 'edit'"),
        *(f"{early}, at 'last'", f"{early}, at 'edit'"),
    ]
    solid, dashed, other = (lines[f"{run}, at '{at}'"] for run, at in ((late, "last"), (late, "edit"), (early, "last")))
    assert (solid.get_linestyle(), dashed.get_linestyle()) == ("-", "--")
    assert solid.get_color() == dashed.get_color()
    assert solid.get_color() != other.get_color()
    assert list(solid.get_xdata()) == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert list(solid.get_ydata()) == pytest.approx(LATE, abs=1e-6)
    assert list(other.get_ydata()) == pytest.approx(EARLY, abs=1e-6)
    shaded = axis.patches[0].get_extents().transformed(axis.transData.inverted())
    assert (shaded.x0, shaded.x1) == pytest.approx((2 / 3, 1))
