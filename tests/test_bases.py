"""Other bases at the site of the direction: what they find where one is planted, and what they do not where none is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
from fakes import Counting, placebo_study
from oracle import Subject, token_pair

from remote_mediation import cost
from remote_mediation.analyses.claims.samples import Sample, activations
from remote_mediation.analyses.rivals import bases, show
from remote_mediation.config import StudyConfig, load_config
from remote_mediation.cost import estimate
from remote_mediation.engine.local import LocalBackend
from remote_mediation.errors import SettingsError
from remote_mediation.lab import Lab
from remote_mediation.planted.cases import CASES, Bed, build
from remote_mediation.planted.selfcheck import written
from remote_mediation.report import write_report
from remote_mediation.result import Result
from remote_mediation.store import Store
from remote_mediation.study import prepared_lab, reread, run_study
from remote_mediation.subspaces import Basis, Direction, Subspace

Subjects = Callable[[str], Subject]
ALL = ["probe", "components", "learnt"]

# --- from activations that are known ----------------------------------------------------------------------------------


def streams_along(directions: np.ndarray, lengths: np.ndarray, noise: float) -> np.ndarray:
    """`[pair, side, width]`: pairs differ by so much of each direction (`lengths`, `[pair, direction]`)."""
    rng = np.random.default_rng(0)
    harmless = rng.normal(size=(len(lengths), directions.shape[1]))
    return np.stack([harmless, harmless + lengths @ directions + noise * rng.normal(size=harmless.shape)], axis=1)


def test_components_span_the_directions_of_the_differences() -> None:
    truth = Basis.random(2, 64, np.random.default_rng(1))
    lengths = np.random.default_rng(2).normal((5.0, 0.0), size=(24, 2))
    streams = streams_along(4 * truth.vectors, lengths, 0.3)
    (first,) = bases.by_components(streams, 1).vectors
    assert abs(first @ truth.vectors[0]) > 0.98
    both = bases.by_components(streams, 2)
    assert all(both.cosine(one) > 0.98 for one in truth.vectors)


def test_probe_weights_say_how_harm_rises_with_a_number_in_its_own_unit() -> None:
    truth = np.eye(64)[[3]] + np.eye(64)[[5]]
    streams = streams_along(truth, np.full((200, 1), 4.0), 0.3)
    streams[..., 3] *= 100
    weights = bases.by_probe(streams).vectors[0]
    assert weights[5] > 0.9
    assert weights[3] == pytest.approx(weights[5] / 100, rel=0.2)


def test_labels_are_shuffled_by_halves_of_components() -> None:
    pairs = [replace(token_pair(f"p{number}"), cluster=f"c{number // 2}") for number in range(20)]
    drawn = [bases.half_flipped(pairs, np.random.default_rng(seed)) for seed in range(20)]
    assert {signs.sum() for signs in drawn} == {0.0}
    assert all((signs[::2] == signs[1::2]).all() for signs in drawn)
    assert len({tuple(signs) for signs in drawn}) > 10


# --- one planted direction --------------------------------------------------------------------------------------------

LAYER = 6


class Planted(NamedTuple):
    """A model in which one direction carries harm from a head to a gate."""

    lab: Lab
    moved: np.ndarray
    """That direction, as it was planted."""
    found: bases.Bases
    """Made where all of it passes by."""
    idle: bases.Bases
    """Made where nobody reads it: at another token."""


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    folder, streams = tmp_path_factory.mktemp("planted"), []

    def plant(bed: Bed) -> None:
        streams.append(bed.stream)
        bed.head(3, "word", {"moved": 1.0})
        bed.gate(10, 3, {"moved": 1.0, "const": 0.5}, {"answer": 1.0})

    study = written(build(replace(CASES["heads-to-gate"], plant=plant), 0), folder, 0)
    study = StudyConfig(**{**study.model_dump(), "analyses": ["directions"], "directions": {"bases": ALL}})
    lab = prepared_lab(study, LocalBackend.load(study.model), Store.create(folder / "run", study.identity()))
    positions = ["post_instruction[-2]", "last"]
    discovery = Sample.of(lab, "discovery")
    change = activations(discovery, "layer_output", positions)
    mean = (change[:, 1] - change[:, 0]).mean(axis=0)[LAYER]
    sites = [Subspace("layer_output", LAYER, at, basis=Basis.spanning(mean[n])) for n, at in enumerate(positions)]
    idle, found = (bases.make_bases(discovery, site, positions) for site in sites)
    return Planted(lab, streams[0].directions["moved"].numpy(), found, idle)


def shares(lab: Lab, sites: Sequence[Subspace], split: str) -> np.ndarray:
    """`[site, direction]` of TE."""
    effects = lab.joint([[site] for site in sites], lab.pairs(split))
    return np.stack([effects.nie.mean(axis=1), effects.tie.mean(axis=1)], axis=1) / effects.te.mean()


@pytest.mark.slow
def test_every_basis_finds_the_planted_direction(planted: Planted) -> None:
    chosen, probe, top, learnt, _ = (one.site for one in planted.found.every)
    cosines = {name: site.basis.cosine(planted.moved) for name, site in zip(ALL, (probe, top, learnt), strict=True)}
    assert chosen.basis.cosine(planted.moved) > 0.95
    assert cosines["components"] > 0.95
    assert cosines["probe"] > 0.7
    assert cosines["learnt"] > 0.7
    held = shares(planted.lab, [chosen, top, learnt], "heldout")
    assert held.min() > 0.8
    assert held.max() < 1.2


def test_what_was_learnt_of_shuffled_labels_carries_nothing_held_out(planted: Planted) -> None:
    *_, learnt, shuffled = planted.found.every
    assert shuffled.name == f"{learnt.name}, {bases.SHUFFLED}"
    own, control = shares(planted.lab, [learnt.site, shuffled.site], "heldout")
    assert own.min() > 0.8
    assert np.abs(control).max() < 0.2
    assert learnt.losses[-1] < 0.1
    assert shuffled.losses[-1] > 0.5


def test_where_nothing_passes_by_nothing_is_learnt(planted: Planted) -> None:
    *_, learnt, _ = planted.idle.every
    assert np.abs(shares(planted.lab, [learnt.site], "heldout")).max() < 0.1


def test_the_table_has_what_each_carries_on_its_own_pairs(planted: Planted) -> None:
    table = bases.measure_bases(planted.lab, planted.found)["bases.csv"]
    assert list(table) == list(bases.BASIS_COLUMNS)
    assert table["basis"].tolist() == [one.name for one in planted.found.every]
    effects = planted.lab.joint([[one.site] for one in planted.found.every], planted.found.pairs)
    signs = planted.found.every[-1].signs
    assert sorted(set(signs)) == [-1, 1]
    nie = np.vstack([effects.nie[:-1], signs * effects.nie[-1]]).mean(axis=1)
    assert table["nie"].to_numpy() == pytest.approx(nie / effects.te.mean())
    assert table["loss"].isna().tolist() == [True, True, True, False, False]
    assert table["cosine_chosen"].iloc[0] == pytest.approx(1)
    assert (table["cosine_chosen"] >= 0).all()
    # A loss is the mean squared miss, in mean squared TE; half of the rows run x0.
    miss = [effects.nie[3] - effects.te, effects.tie[3] - effects.te]
    assert table["loss"].iloc[3] == pytest.approx(np.mean(np.square(miss)) / np.mean(effects.te**2), abs=1e-4)


# --- a whole study ----------------------------------------------------------------------------------------------------


@pytest.fixture
def study(tmp_path: Path, subject: Subjects) -> StudyConfig:
    return placebo_study(
        tmp_path, subject("llama_chat").info.name, analyses=["directions"], directions={"bases": ALL, "rank": 2}
    )


def with_settings(study: StudyConfig, **changes: object) -> StudyConfig:
    settings = {**study.directions.model_dump(), **changes}
    return StudyConfig(**{**study.model_dump(), "directions": settings})


def run(study: StudyConfig, subject: Subjects, folder: Path) -> tuple[Result, Store, Counting]:
    backend, store = Counting(subject("llama_chat").backend), Store.create(folder, study.identity())
    return run_study(study, backend, store), store, backend


NAMES = ["probe weights", "top 2 components of the differences", "learnt basis of 2"]
NAMES.append(f"{NAMES[-1]}, {bases.SHUFFLED}")


def test_bases_stand_beside_the_direction_and_are_left_as_files(
    study: StudyConfig, subject: Subjects, tmp_path: Path
) -> None:
    result, store, _ = run(study, subject, tmp_path / "run")
    plain, _, _ = run(with_settings(study, bases=[]), subject, tmp_path / "plain")
    sets, before = result.tables["direction_sets.csv"], plain.tables["direction_sets.csv"]
    own = sets[sets["measure"].isin(NAMES)]
    assert own["measure"].tolist() == [name for name in NAMES for _ in range(2)]
    assert own["values"].tolist() == [1, 1, 2, 2, 2, 2, 2, 2]
    assert not own["decides"].any()
    pd.testing.assert_frame_equal(sets.drop(own.index).reset_index(drop=True), before)
    assert "bases.csv" not in plain.tables
    write_report(store, result)
    best = result.tables["directions.csv"].query("chosen").iloc[0]
    table = result.tables["bases.csv"].set_index("basis")
    for kind, name in zip(ALL, NAMES, strict=False):
        saved = Direction.load(store.folder / f"{kind}.safetensors")
        assert (saved.layer, saved.position, saved.basis.size) == (
            best["layer"],
            best["position"],
            table.loc[name, "values"],
        )
    probe = Direction.load(store.folder / "probe.safetensors")
    assert probe.length == pytest.approx(best["norm"] * table.loc["probe weights", "cosine_chosen"], rel=1e-4)
    for name, again in reread(store).tables.items():  # without a model
        pd.testing.assert_frame_equal(again, result.tables[name])


def test_it_costs_no_more_than_planned(
    study: StudyConfig, subject: Subjects, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost, "matmul_rate", lambda *_: 1e10)
    _, _, backend = run(study, subject, tmp_path / "run")
    planned, plain = estimate(study), estimate(with_settings(study, bases=[]))
    assert planned.flops > plain.flops
    assert backend.rows <= planned.rows + planned.later["directions"].rows
    assert backend.flops <= planned.flops
    assert 4 * backend.numbers <= planned.down


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"backend": "ndif"}, "names 'learnt', and learning takes dozens of gradient steps, .* learnt.safetensors"),
        ({"directions": {"bases": ["components"], "rank": 4}}, "rank is 4, and bases are made from 2 discovery pairs"),
    ],
    ids=["a server", "too many directions"],
)
def test_what_cannot_be_made_is_refused_before_anything_is_measured(
    study: StudyConfig, changes: dict[str, object], said: str
) -> None:
    with pytest.raises(SettingsError, match=said) as caught:
        estimate(StudyConfig(**{**study.model_dump(), **changes}))
    assert "\n" not in str(caught.value)


def test_bases_that_nothing_measures_are_refused(study: StudyConfig) -> None:
    with pytest.raises(SettingsError, match="add it to `analyses`"):
        load_config(None, {"model": study.model, "directions": {"bases": ["probe"]}})


def told(result: Result, harm: float, high: float, nie: float) -> Result:
    """The same run had each set carried so much held out, with so high an end, and as much NIE on its own pairs."""
    claims, sets, made = (result.tables[name] for name in ("direction.csv", "direction_sets.csv", "bases.csv"))
    tables = {
        "direction.csv": claims.assign(gate="", said="undecided"),
        "direction_sets.csv": sets.assign(harm=harm, harm_low=harm, harm_high=high),
        "bases.csv": made.assign(nie=nie, tie=harm),
    }
    return replace(result, tables={**result.tables, **tables})


def test_a_basis_that_overfits_is_shown_as_such(study: StudyConfig, subject: Subjects, tmp_path: Path) -> None:
    result, _, _ = run(study, subject, tmp_path / "run")
    _, section, _ = show.directions(told(result, harm=0.25, high=0.5, nie=0.4))
    assert section.title == "Other bases at its site"
    assert "learnt basis of 2 25% [25%, 50%] and 25% [25%, 50%]" in section.finding
    assert "overfits" not in section.finding
    (table,) = section.tables
    assert [row[0] for row in table.rows] == [bases.MEAN, *NAMES]
    assert [row[2] for row in table.rows] == ["40%"] * 5
    assert [row[-1] != "-" for row in table.rows] == [False, False, False, True, True]
    _, section, _ = show.directions(told(result, harm=0.25, high=0.3, nie=0.4))
    assert f"so that it overfits: {bases.MEAN}; {'; '.join(NAMES)}." in section.finding
