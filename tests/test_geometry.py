"""Directions of harm and refusal by layer: cosines, lengths and silhouettes against plain loops and plain hooks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from oracle import LOGIT_DIFF, TOLERANCE, Subject, token_pair

from remote_mediation.analyses.claims.samples import Sample
from remote_mediation.analyses.rivals import show
from remote_mediation.analyses.rivals.geometry import (
    GEOMETRY_COLUMNS,
    Streams,
    cosine,
    geometry_table,
    measure_geometry,
    places_of,
    silhouette,
)
from remote_mediation.analyses.rivals.rulings import CLAIM_COLUMNS, SET_COLUMNS
from remote_mediation.config import StudyConfig
from remote_mediation.lab import Lab, Study
from remote_mediation.show.section import Section
from remote_mediation.store import Store

Subjects = Callable[[str], Subject]


def streams(pairs: int = 6, layers: int = 3, width: int = 8) -> Streams:
    rng = np.random.default_rng(0)
    values = rng.normal(size=(pairs, 2, layers, 2, width))
    values[:, 1, :, 0] += 3 * np.eye(width)[0]  # harm lies along the first axis, refusal along the second
    values[:, 1, 1:, 1] += 5 * np.eye(width)[1]
    return Streams(values, np.arange(pairs) % 2.0)


def by_loop(one: np.ndarray, other: np.ndarray) -> float:
    """From its definition, point by point."""
    scores = []
    for group, rest in ((one, other), (other, one)):
        for at, point in enumerate(group):
            own = np.mean([np.linalg.norm(point - group[i]) for i in range(len(group)) if i != at])
            far = np.mean([np.linalg.norm(point - each) for each in rest])
            scores.append((far - own) / max(far, own))
    return float(np.mean(scores))


def test_silhouettes_are_those_of_the_definition() -> None:
    rng = np.random.default_rng(1)
    one, other = rng.normal(size=(5, 4)), rng.normal(size=(7, 4)) + 1.5
    assert silhouette(one, other) == pytest.approx(by_loop(one, other))
    assert 0.1 < silhouette(one, other) < 0.9
    assert silhouette(one + 1e3, other + 1e3) == pytest.approx(by_loop(one, other), abs=1e-6)
    assert np.isnan(silhouette(one[:1], other))
    assert np.isnan(silhouette(np.ones((3, 4)), np.ones((3, 4))))
    assert silhouette(np.zeros((3, 2)), np.ones((3, 2))) == pytest.approx(1)


def test_cosines_and_lengths_are_those_of_differences_of_means() -> None:
    given = streams()
    table = geometry_table(given).set_index("layer")
    assert list(table.reset_index()) == list(GEOMETRY_COLUMNS)
    for layer in range(3):
        change = given.values[:, 1, layer] - given.values[:, 0, layer]
        harm, refusal = change.mean(axis=0)
        row = table.loc[layer]
        assert row["cosine"] == pytest.approx(harm @ refusal / np.sqrt((harm @ harm) * (refusal @ refusal)))
        assert row["length_harm"] == pytest.approx(np.sqrt((harm**2).sum()))
        assert row["length_refusal"] == pytest.approx(np.sqrt((refusal**2).sum()))
        even, odd = change[0::2].mean(axis=0), change[1::2].mean(axis=0)
        for at, name in enumerate(("harm", "refusal")):
            expected = even[at] @ odd[at] / np.linalg.norm(even[at]) / np.linalg.norm(odd[at])
            assert row[f"cosine_{name}"] == pytest.approx(expected)
            sides = given.values[:, 1, layer, at], given.values[:, 0, layer, at]
            assert row[f"silhouette_{name}"] == pytest.approx(by_loop(*sides))
    assert table["cosine_refusal"].iloc[0] < 0.7 < table["cosine_refusal"].iloc[1:].min()
    assert set(table["n"]) == {6}


def test_what_is_not_defined_is_not_said() -> None:
    assert np.isnan(cosine(np.zeros(3), np.ones(3)))
    one_cluster = streams()._replace(half=np.zeros(6))
    assert geometry_table(one_cluster)[["cosine_harm", "cosine_refusal"]].isna().all().all()


def test_harm_is_read_where_the_user_s_text_ends_and_refusal_where_the_answer_begins() -> None:
    pair = token_pair("a", before=3, edits=(2, 4), post=3)
    assert [ids[0] for ids in places_of(pair, 1)] == [len(pair.x1) - 4, len(pair.x1) - 1]
    assert [ids[0] for ids in places_of(pair, 0)] == [len(pair.x0) - 4, len(pair.x0) - 1]
    bare = replace(pair, aligned=False)
    assert places_of(bare, 0) == places_of(pair, 0)


@pytest.fixture
def lab(subject: Subjects, tmp_path: Path) -> Lab:
    pairs = tuple(token_pair(name, before, (2, 3), post=2) for name, before in zip("abcdef", range(1, 7), strict=True))
    model = subject("llama")
    return Lab(
        Study(StudyConfig(model=model.info.name), model.info, LOGIT_DIFF, pairs, ()), Store(tmp_path), model.backend
    )


def test_streams_are_those_of_plain_hooks(subject: Subjects, lab: Lab) -> None:
    sample, plain = Sample.of(lab, "discovery"), subject("llama").plain
    found = Streams.of(sample)
    caught: list[torch.Tensor] = []
    handle = plain.model.layers[1].register_forward_hook(lambda *call: caught.append(call[-1]))
    for pair, values in zip(sample.pairs, found.values, strict=True):
        for side, ids in enumerate(pair.prompts):
            with torch.no_grad():
                plain(input_ids=torch.tensor([ids]))
            last = caught.pop()[0]
            np.testing.assert_allclose(values[side, 1, 0], last[-3], rtol=0, atol=TOLERANCE)
            np.testing.assert_allclose(values[side, 1, 1], last[-1], rtol=0, atol=TOLERANCE)
    handle.remove()
    assert sorted(found.half) == [0, 0, 1] or sorted(found.half) == [0, 1, 1]


def test_a_run_of_before_has_no_geometry_and_all_else(lab: Lab, tmp_path: Path) -> None:
    sample = Sample.of(lab, "discovery")
    rebuilt = Lab(lab.study, Store(tmp_path / "older"))
    assert measure_geometry(rebuilt, Sample.of(rebuilt, "discovery")) == {}
    assert list(measure_geometry(lab, sample)) == ["geometry.csv"]


def shown(tables: dict[str, pd.DataFrame]) -> list[Section]:
    """Of a run with these tables, in which the rival claim was not tested."""
    claims, sets = pd.DataFrame(columns=list(CLAIM_COLUMNS)), pd.DataFrame(columns=list(SET_COLUMNS))
    beside = {"direction.csv": claims, "direction_sets.csv": sets}
    return show._geometry(SimpleNamespace(tables={**tables, **beside}))  # type: ignore[arg-type]


def test_it_is_said_and_drawn() -> None:
    table = geometry_table(streams())
    (section,) = shown({"geometry.csv": table})
    assert section.figure is not None
    cosines, silhouettes, lengths = section.figure.axes
    np.testing.assert_array_equal(cosines.lines[0].get_ydata(), table["cosine"])
    np.testing.assert_array_equal(cosines.lines[1].get_ydata(), table["cosine_harm"])
    np.testing.assert_array_equal(silhouettes.lines[1].get_ydata(), table["silhouette_refusal"])
    np.testing.assert_array_equal(lengths.lines[0].get_ydata(), table["length_harm"])
    assert "on two halves" in section.finding
    best = table["silhouette_refusal"].idxmax()
    assert f"best after layer {best} at the token of refusal (" in section.finding
    (mixed,) = shown({"geometry.csv": table.assign(silhouette_harm=-table["silhouette_refusal"].abs())})
    assert "apart nowhere at the token of harm (at most -" in mixed.finding
    (empty,) = shown({"geometry.csv": table.assign(silhouette_harm=np.nan, silhouette_refusal=np.nan)})
    assert "told apart nowhere at the token of harm and nowhere at the token of refusal." in empty.finding
    assert shown({}) == []
