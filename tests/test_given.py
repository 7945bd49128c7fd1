"""Directions from files: one of another run is measured beside the one that is found, and what is none is refused."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from fakes import Counting, placebo_study
from oracle import Subject

from remote_mediation import cli, cost
from remote_mediation.analyses.rivals import directions, show
from remote_mediation.config import StudyConfig, load_config
from remote_mediation.cost import estimate
from remote_mediation.errors import SettingsError, SiteError, StoreError
from remote_mediation.export import export
from remote_mediation.report import write_report
from remote_mediation.result import Result
from remote_mediation.store import Store
from remote_mediation.study import prepared_lab, reread, run_study
from remote_mediation.subspaces import Basis, Direction, Subspace

Subjects = Callable[[str], Subject]
WIDTH = 32  # of the tiny model's stream


@pytest.fixture
def study(tmp_path: Path, subject: Subjects) -> StudyConfig:
    return placebo_study(tmp_path, subject("llama_chat").info.name, analyses=["directions"])


def with_file(study: StudyConfig, path: Path) -> StudyConfig:
    return StudyConfig(**{**study.model_dump(), "directions": {"basis": str(path)}})


def saved(folder: Path, vectors: np.ndarray, **about: Any) -> Path:
    path = folder / "saved.safetensors"
    path.write_bytes(Direction(Basis.spanning(vectors), **about).safetensors())
    return path


def run(study: StudyConfig, subject: Subjects, folder: Path) -> tuple[Result, Store, Counting]:
    backend, store = Counting(subject("llama_chat").backend), Store.create(folder, study.identity())
    return run_study(study, backend, store), store, backend


def slopes(result: Result, name: str) -> list[float]:
    """Of NIE and TIE of a set on TE; shares of it are not defined on three pairs."""
    table = result.tables["direction_sets.csv"]
    found: list[float] = table.loc[table["measure"].str.startswith(name), "beta_harm"].tolist()
    return found


def told(result: Result) -> Result:
    """The same run had there been an effect, of which each set carries a quarter."""
    claims, sets = (result.tables[name] for name in ("direction.csv", "direction_sets.csv"))
    tables = {"direction.csv": claims.assign(gate="", said="undecided"), "direction_sets.csv": sets.assign(harm=0.25)}
    return replace(result, tables={**result.tables, **tables})


def test_what_one_run_saves_another_one_measures(study: StudyConfig, subject: Subjects, tmp_path: Path) -> None:
    first, store, _ = run(study, subject, tmp_path / "first")
    write_report(store, first)
    again, other, _ = run(with_file(study, store.folder / directions.FILE), subject, tmp_path / "second")
    own, given = (slopes(again, f"{name}layer") for name in ("the direction of ", f"{directions.GIVEN}, "))
    assert len(given) == 2
    np.testing.assert_allclose(given, own, atol=1e-4)
    everywhere = [slopes(again, f"{name} after all layers") for name in ("the same direction", directions.GIVEN)]
    np.testing.assert_allclose(*everywhere, atol=1e-4)
    table = again.tables["directions.csv"]
    np.testing.assert_allclose(table["cosine_given"], table["cosine_chosen"], atol=1e-5)
    assert first.tables["directions.csv"]["cosine_given"].isna().all()
    pd.testing.assert_frame_equal(again.tables["direction.csv"], first.tables["direction.csv"])  # it decides nothing
    section, _ = show.directions(told(again))
    assert "The direction of the file direction.safetensors (layer " in section.finding
    assert "its cosine with the chosen one is 1." in section.finding
    assert "carries NIE 25% [-], TIE 25% [-] of TE" in section.finding
    assert "of the file" not in show.directions(told(first))[0].finding

    (store.folder / directions.FILE).unlink()
    for name, found in reread(other).tables.items():  # a report needs no file
        pd.testing.assert_frame_equal(found, again.tables[name])


def test_a_basis_is_swapped_where_its_file_says(study: StudyConfig, subject: Subjects, tmp_path: Path) -> None:
    vectors = np.random.default_rng(0).normal(size=(2, WIDTH))
    path = saved(tmp_path, vectors, layer=2, position="last")
    config = with_file(study, path)
    result, store, backend = run(config, subject, tmp_path / "run")
    lab = prepared_lab(config, backend, store)
    site = Subspace("layer_output", 2, "last", basis=Basis.spanning(vectors))
    effects = lab.joint([[site]], lab.pairs("heldout"))
    expected = [table[0] @ effects.te / (effects.te @ effects.te) for table in (effects.nie, effects.tie)]
    assert slopes(result, f"{directions.GIVEN}, layer 2 at 'last'") == pytest.approx(expected, abs=1e-4)
    assert np.abs(expected).min() > 0.01
    sets = result.tables["direction_sets.csv"].set_index("measure")["values"]
    assert set(sets[f"{directions.GIVEN}, layer 2 at 'last'"]) == {2}
    assert set(sets[f"{directions.GIVEN} after all layers"]) == {6}


def test_without_a_place_it_is_swapped_where_the_found_one_lies(
    study: StudyConfig, subject: Subjects, tmp_path: Path
) -> None:
    np.save(tmp_path / "one.npy", np.random.default_rng(1).normal(size=WIDTH))
    result, _, _ = run(with_file(study, tmp_path / "one.npy"), subject, tmp_path / "run")
    best = result.tables["directions.csv"].query("chosen").iloc[0]
    assert len(slopes(result, f"{directions.GIVEN}, layer {best['layer']} at '{best['position']}'")) == 2


def test_it_costs_no_more_than_planned(
    study: StudyConfig, subject: Subjects, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost, "matmul_rate", lambda *_: 1e10)
    plain = estimate(study)
    config = with_file(study, saved(tmp_path, np.ones(WIDTH)))
    _, _, backend = run(config, subject, tmp_path / "run")
    planned = estimate(config)
    assert planned.flops > plain.flops
    assert backend.rows <= planned.rows + planned.later["directions"].rows
    assert backend.flops <= planned.flops


REFUSED = {
    "another width": ({"vectors": np.ones(8)}, "directions of 8 numbers, and the stream of .* is 32 wide"),
    "another depth": ({"layer": 30, "position": "last"}, "is of layer 30, and .* has layers 0 to 2"),
    "another template": ({"layer": 1, "position": "post_instruction[-9]"}, "which 12 of 12 pairs do not have"),
    "no position": ({"layer": 1, "position": "end"}, "unknown position 'end'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_of_another_model_is_refused_before_anything_is_measured(
    study: StudyConfig, subject: Subjects, tmp_path: Path, name: str
) -> None:
    about, said = REFUSED[name]
    path = saved(tmp_path, **{"vectors": np.ones(WIDTH), **about})
    backend = Counting(subject("llama_chat").backend)
    for ask in (
        lambda: prepared_lab(with_file(study, path), backend, Store.create(tmp_path / "run", study.identity())),
        lambda: estimate(with_file(study, path)),
    ):
        with pytest.raises(SiteError, match=said) as caught:
            ask()
        assert "\n" not in str(caught.value)
    assert backend.flops == 0


def test_a_basis_that_nothing_measures_is_refused(study: StudyConfig) -> None:
    with pytest.raises(SettingsError, match="add it to `analyses`"):
        load_config(None, {"model": study.model, "directions": {"basis": "some.npy"}})


def test_a_file_that_has_changed_is_another_study(study: StudyConfig, subject: Subjects, tmp_path: Path) -> None:
    config = with_file(study, saved(tmp_path, np.ones(WIDTH)))
    run(config, subject, tmp_path / "run")
    saved(tmp_path, np.arange(WIDTH))
    with pytest.raises(StoreError, match=r"holds a run with another directions\.basis"):
        run(config, subject, tmp_path / "run")


def test_what_is_exported_has_the_direction(study: StudyConfig, subject: Subjects, tmp_path: Path) -> None:
    result, store, _ = run(study, subject, tmp_path / "run")
    report = write_report(store, result)
    assert f"`{directions.FILE}`, `figures/`" in report.read_text("utf-8")
    (tmp_path / "run" / directions.FILE).unlink()  # it is made from what was measured
    files = {path.name: path for path in export(store, tmp_path / "shared")}
    found = Direction.load(files[directions.FILE])
    best = result.tables["directions.csv"].query("chosen").iloc[0]
    assert (found.layer, found.position) == (best["layer"], best["position"])


def test_the_flag_is_the_setting(
    study: StudyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    logits = '[logit_diff]\nplus = ["sure"]\nminus = ["no"]\n'
    text = (
        f'model = "{study.model}"\npairs = "pairs.jsonl"\noutcome = "logit_diff"\nanalyses = ["directions"]\n{logits}'
    )
    (tmp_path / "study.toml").write_text(text, "utf-8")
    saved(tmp_path, np.ones(8))

    def called(*words: str) -> Sequence[str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["remote-mediation", *words])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == 2
        return capsys.readouterr().err.splitlines()

    for command in ("plan", "run"):
        (line,) = called(command, "study.toml", "--basis", "saved.safetensors")
        assert "saved.safetensors holds directions of 8 numbers" in line
        (line,) = called(command, "study.toml", "--basis", "absent.npy")
        assert "no basis can be read from absent.npy" in line
