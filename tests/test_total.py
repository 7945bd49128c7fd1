"""What openings cover: against full passes written out by hand, in words, and where a pairs file gives openings."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from fakes import records
from oracle import Subject

import remote_mediation as rm
from remote_mediation.analyses.total.ask import COVERAGE_COLUMNS, OPENING_COLUMNS, coverages
from remote_mediation.analyses.total.show import coverage_words, hardly_defined
from remote_mediation.errors import PairsError
from remote_mediation.pairs import load_openings, load_pairs
from remote_mediation.report import write_report
from remote_mediation.store import Store

OPENINGS = {"compliant": ["sure", "yes here is"], "refusing": ["sorry", "no"]}


@pytest.fixture
def model(subject: Callable[[str], Subject]) -> Subject:
    return subject("llama_chat")


def written(folder: Path, *lines: dict[str, Any]) -> Path:
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return path


def study(pairs: Path, model: Subject, **settings: Any) -> rm.StudyConfig:
    return rm.StudyConfig(
        model=model.info.name, pairs=str(pairs), analyses=["layers"], statistics={"resamples": 100}, **settings
    )


def probability(model: Subject, ids: tuple[int, ...], openings: list[str]) -> float:
    """Summed over openings, a forward pass for each token of each."""
    total = 0.0
    for opening in openings:
        product, sequence = 1.0, list(ids)
        for token in model.backend.tokenizer(opening, add_special_tokens=False)["input_ids"]:
            with torch.no_grad():
                logits = model.plain(input_ids=torch.tensor([sequence])).logits[0, -1].double()
            product *= float(logits.softmax(-1)[token])
            sequence.append(token)
        total += product
    return total


def test_coverage_is_the_summed_probability_of_a_side(model: Subject, tmp_path: Path) -> None:
    pairs = written(tmp_path, {"openings": OPENINGS}, *records())
    with rm.open_lab(study(pairs, model), out=tmp_path / "run", backend=model.backend) as lab:
        result = lab.run()
        report = lab.report().read_text("utf-8")
        prepared = {pair.id: pair for pair in result.study.pairs}
    table, listed = result.tables["coverage.csv"], result.tables["openings.csv"]
    assert list(table.columns) == list(COVERAGE_COLUMNS)
    assert list(listed.columns) == list(OPENING_COLUMNS)
    assert len(table) == 2 * len(records())
    for row in table.itertuples():
        ids = prepared[row.pair_id].prompts[("harmless", "harmful").index(row.prompts)]
        for side, openings in OPENINGS.items():
            assert getattr(row, side) == pytest.approx(probability(model, ids, openings), rel=1e-4)
    sums = listed.groupby("side")[["harmless", "harmful"]].sum()
    means = table.groupby("prompts")[["compliant", "refusing"]].mean().T
    np.testing.assert_allclose(sums, means[["harmless", "harmful"]], rtol=1e-9)
    assert listed["opening"].tolist() == ["sure", "yes here is", "sorry", "no"]
    assert "the compliant openings hold" in report
    assert "Y(x1), harmful" in report
    again = rm.open_run(tmp_path / "run").result().tables
    pd.testing.assert_frame_equal(again["coverage.csv"], table)
    pd.testing.assert_frame_equal(again["openings.csv"], listed, check_dtype=False)


def test_what_openings_cover_is_estimated_before_a_report_is_written(
    model: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("random numbers are drawn while a report is written")

    pairs = written(tmp_path, {"openings": OPENINGS}, *records())
    with rm.open_lab(study(pairs, model), out=tmp_path / "run", backend=model.backend) as lab:
        result = lab.run()
    monkeypatch.setattr(np.random, "default_rng", refuse)
    report = write_report(Store(tmp_path / "run"), result).read_text("utf-8")
    assert "the compliant openings hold" in report


def covering(refusing: float, compliant: float) -> pd.DataFrame:
    """So much of the side that is asked; the other side holds what is left."""
    rows = []
    for number in range(8):
        one = {"pair_id": f"p{number}", "cluster": f"c{number}", "split": "heldout"}
        rows.append({**one, "prompts": "harmful", "compliant": 1 - refusing, "refusing": refusing})
        rows.append({**one, "prompts": "harmless", "compliant": compliant, "refusing": 1 - compliant})
    return pd.DataFrame(rows, columns=list(COVERAGE_COLUMNS))


@pytest.mark.parametrize(
    ("refusing", "compliant", "half", "hardly"),
    [
        (0.7, 0.8, "", ""),
        (0.4, 0.8, "Under half after harmful prompts", ""),
        (0.4, 0.3, "Under half after harmful prompts and after harmless prompts", ""),
        (0.7, 0.009, "Under half after harmless prompts", "compliant openings 0.9% after harmless prompts."),
        (0.009, 0.8, "Under half after harmful prompts", "refusing openings 0.9% after harmful prompts."),
    ],
)
def test_little_coverage_is_said(refusing: float, compliant: float, half: str, hardly: str) -> None:
    found = coverages(covering(refusing, compliant), 0, 100)
    words = coverage_words(found)
    assert f"the refusing openings hold {100 * refusing:.3g}% [" in words
    assert f"the compliant openings hold {100 * compliant:.3g}% [" in words
    assert (half in words) if half else "Under half" not in words
    assert hardly_defined(found).endswith(hardly)
    assert bool(hardly_defined(found)) == bool(hardly)


def test_an_outcome_without_openings_covers_nothing() -> None:
    assert coverage_words([]) == hardly_defined([]) == ""


def test_the_header_of_a_pairs_file_gives_openings(tmp_path: Path) -> None:
    path = written(tmp_path, {"openings": OPENINGS}, *records())
    assert load_openings(str(path)) == (("sure", "yes here is"), ("sorry", "no"))
    assert load_pairs(str(path)) == load_pairs(str(written(tmp_path, *records())))
    assert load_openings("builtin") is None
    assert load_openings(str(path)) is None  # the file was written anew, without a header


def test_pairs_may_repeat_the_openings_and_not_change_them(tmp_path: Path) -> None:
    first, second, *rest = records()
    same = written(tmp_path, {**first, "openings": OPENINGS}, {**second, "openings": OPENINGS}, *rest)
    assert load_openings(str(same)) == (("sure", "yes here is"), ("sorry", "no"))
    other = {**OPENINGS, "refusing": ["sorry"]}
    differing = written(tmp_path, {**first, "openings": OPENINGS}, {**second, "openings": other}, *rest)
    with pytest.raises(PairsError, match=r"record 2 has other openings than .*record 1: the outcome `refusal`"):
        load_openings(str(differing))


@pytest.mark.parametrize("value", [["sure"], {"compliant": ["sure"]}, {"compliant": "sure", "refusing": ["no"]}])
def test_openings_that_are_no_lists_of_texts_are_refused(tmp_path: Path, value: Any) -> None:
    path = written(tmp_path, {"openings": value}, *records())
    with pytest.raises(PairsError, match=r"record 1: 'openings' is .*; write \{\"compliant\": \[\"Sure\"\]"):
        load_openings(str(path))


def test_pairs_with_differing_openings_are_refused_for_this_outcome_only(model: Subject, tmp_path: Path) -> None:
    first, second, *rest = records(harmful_response="sure yes", harmless_response="sorry no")
    other = {**OPENINGS, "refusing": ["sorry"]}
    pairs = written(tmp_path, {**first, "openings": OPENINGS}, {**second, "openings": other}, *rest)
    with (
        rm.open_lab(study(pairs, model), out=tmp_path / "refusal", backend=model.backend) as lab,
        pytest.raises(PairsError, match="has other openings"),
    ):
        lab.pairs()
    answers = study(pairs, model, outcome="response_logprob")
    with rm.open_lab(answers, out=tmp_path / "answers", backend=model.backend) as lab:
        assert len(lab.pairs()) == len(records())


def test_openings_that_changed_are_another_study(model: Subject, tmp_path: Path) -> None:
    pairs = written(tmp_path, {"openings": OPENINGS}, *records())
    with rm.open_lab(study(pairs, model), out=tmp_path / "run", backend=model.backend) as lab:
        lab.pairs()
    written(tmp_path, {"openings": {**OPENINGS, "refusing": ["no"]}}, *records())
    with (
        rm.open_lab(study(pairs, model), out=tmp_path / "run", backend=model.backend) as lab,
        pytest.raises(rm.MediationError, match="holds a run on other pairs"),
    ):
        lab.pairs()
