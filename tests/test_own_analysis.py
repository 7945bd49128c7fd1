"""An analysis from outside the package: its rows, CSV, section, figure, cost and claim, in a run and ever after."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from fakes import Counting, records, write_pairs
from matplotlib.figure import Figure
from oracle import Subject

import remote_mediation as rm
from remote_mediation.cost import estimate
from remote_mediation.later import Later, of_rows, pairs_of
from remote_mediation.result import Finding, Findings, Result
from remote_mediation.show.section import Section, Verdict

SITE = rm.Site("mlp_output", 1, "last")
BAND = rm.band("mlp_output", [0, 1], "last")


def sites(config: rm.StudyConfig, info: object, pair: object) -> list[rm.Site]:
    return [SITE]


def analyse(lab: object, before: Findings) -> Finding:
    found = lab.joint([BAND], lab.pairs("heldout"))  # type: ignore[attr-defined]
    return Finding({"mine.csv": pd.DataFrame({"nie": found.nie[0], "unused": 1.0})}, {"mine": tuple(BAND)})


def cost(study: object) -> Later:
    return of_rows(study, pairs_of(study, "heldout"), SITE)  # type: ignore[arg-type]


def sections(result: Result) -> list[Section]:
    table = result.tables.get("mine.csv")
    figure = Figure()
    figure.subplots().plot([0, 1])
    found = "nothing yet" if table is None else f"mean NIE {table['nie'].mean():.6f}"
    return [Section("mine", "My section", "Two MLPs were swapped together.", found, figure=figure)]


def verdicts(result: Result) -> list[Verdict]:
    return [Verdict("my claim", "two MLPs are enough", "1", "", "supported")] if "mine.csv" in result.tables else []


MINE = rm.Analysis("mine", sites, analyse, {"mine.csv": {"nie": "joint NIE"}}, cost, sections, verdicts)


@pytest.fixture
def model(subject: Callable[[str], Subject]) -> Subject:
    return subject("llama_chat")


@pytest.fixture
def study(tmp_path: Path, model: Subject) -> rm.StudyConfig:
    pairs = write_pairs(tmp_path / "pairs.jsonl", records())
    openings = {"compliant": ["sure", "yes"], "refusing": ["sorry", "no"]}
    return rm.StudyConfig(
        model=model.info.name, pairs=str(pairs), refusal=openings, statistics={"resamples": 100}, analyses=["layers"]
    )


def test_it_has_all_that_an_analysis_of_the_package_has(
    study: rm.StudyConfig, model: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with rm.open_lab(study, out=tmp_path / "run", backend=model.backend, analyses=["layers", MINE]) as lab:
        result = lab.run()
        report = lab.report().read_text("utf-8")
        expected = lab.joint(BAND, "heldout")["nie"]
    assert set(result.effects["analysis"]) == {"checks", "layers", "mine"}
    written = pd.read_csv(tmp_path / "run/mine.csv")
    assert list(written.columns) == ["nie"]
    np.testing.assert_allclose(written["nie"], expected)
    assert written["nie"].abs().max() > 0.01
    assert f"## My section\n\nmean NIE {expected.mean():.6f}\n\nTwo MLPs were swapped together." in report
    assert "(figures/mine.png)" in report
    assert "| two MLPs are enough | 1 |  | supported |" in report
    assert (tmp_path / "run/figures/mine.png").is_file()

    monkeypatch.setattr("remote_mediation.cost.matmul_rate", lambda _: 1e10)
    asked = study.model_copy(update={"analyses": ["layers", "mine"]})
    planned, without = estimate(asked, [MINE]), estimate(study)
    assert planned.later["mine"].rows == 2 * len(expected)
    assert planned.rows - without.rows == 2 * len(records())
    assert planned.flops > without.flops


def test_it_is_resumed_and_reported_again(study: rm.StudyConfig, model: Subject, tmp_path: Path) -> None:
    with rm.open_lab(study, out=tmp_path / "run", backend=model.backend, analyses=["layers", MINE]) as lab:
        lab.run()
    counting = Counting(model.backend)
    with rm.open_lab(study, out=tmp_path / "run", backend=counting, analyses=["layers", MINE]) as again:
        again.run()
        report = again.report().read_text("utf-8")
    assert counting.rows == 0
    text = rm.open_run(tmp_path / "run", analyses=[MINE]).report().read_text("utf-8")
    assert text.split("## Provenance")[0] == report.split("## Provenance")[0]


def test_without_it_the_report_says_that_it_is_not_known(study: rm.StudyConfig, model: Subject, tmp_path: Path) -> None:
    with rm.open_lab(study, out=tmp_path / "run", backend=model.backend, analyses=["layers", MINE]) as lab:
        lab.run()
    report = rm.open_run(tmp_path / "run").report().read_text("utf-8")
    assert "## mine\n\nThis analysis is not part of the package; `open_run(folder, analyses=[mine])`" in report
    assert "## Layers" in report


def test_a_name_that_nobody_knows_is_refused_before_a_model_is_loaded(study: rm.StudyConfig, tmp_path: Path) -> None:
    asked = study.model_copy(update={"analyses": ["layers", "mine"], "model": "nowhere/to-be-found"})
    with pytest.raises(rm.MediationError, match="unknown analysis 'mine'; known: claims, directions"):
        rm.open_lab(asked, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
