"""Subspaces as mediators against plain hooks: one direction, a few, all of them, and directions written elsewhere."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from oracle import LOGIT_DIFF, REFUSAL, RESPONSE_LOGPROB, TOLERANCE, Subject, token_pair
from safetensors.numpy import load, save_file

from remote_mediation.engine.budget import Setting
from remote_mediation.engine.rows import Row, swap, swap_all
from remote_mediation.engine.tasks import direct_task
from remote_mediation.errors import SiteError
from remote_mediation.sites import Component, Site
from remote_mediation.subspaces import Basis, Direction, DirectionRecord, Subspace
from remote_mediation.tokens import TokenPair

Subjects = Callable[[str], Subject]
STREAM: tuple[Component, ...] = ("layer_output", "attention_output", "mlp_output")
FAMILIES = ("llama", "gemma2", "gpt2", "gpt_neox", "granite")


def pairs_of(openings: bool = False) -> list[TokenPair]:
    answers = (0, 0) if openings else (3, 2)
    pairs = [token_pair("equal", answers=answers), token_pair("unequal", edits=(3, 1), answers=answers)]
    return [replace(pair, openings=REFUSAL.openings) for pair in pairs] if openings else pairs


def subspaces(model: Subject, sizes: tuple[int, ...] = (1, 4)) -> list[Subspace]:
    rng, width = np.random.default_rng(0), model.info.d_model
    return [
        Subspace(component, layer, position, basis=Basis.random(size, width, rng))
        for component in STREAM
        for layer, position in ((0, "edit"), (1, "all"), (2, "last"))
        for size in sizes
    ]


@pytest.mark.parametrize("openings", [False, True], ids=["responses", "openings"])
@pytest.mark.parametrize("name", FAMILIES)
def test_projections_of_the_stream_and_of_contributions(subject: Subjects, name: str, openings: bool) -> None:
    model, pairs = subject(name), pairs_of(openings)
    rows = [swap(pair, site, base, model.info) for pair in pairs for site in subspaces(model) for base in (0, 1)]
    measured = model.compare(pairs, rows, REFUSAL if openings else RESPONSE_LOGPROB)
    assert measured.deviation < TOLERANCE
    assert np.abs(measured.effects).max() > 0.1
    assert measured.felt() > 0.75


@pytest.mark.parametrize("name", FAMILIES)
def test_a_full_basis_is_the_whole_swap_and_half_of_one_is_not(subject: Subjects, name: str) -> None:
    model, pairs = subject(name), pairs_of()
    full, half = (Basis.random(size, model.info.d_model, np.random.default_rng(1)) for size in (32, 16))
    for component in STREAM:
        site = Site(component, 1, "all")
        sites = [site, *(Subspace(component, 1, "all", basis=basis) for basis in (full, half))]
        rows = [swap(pair, one, base, model.info) for one in sites for pair in pairs for base in (0, 1)]
        bases = [Row(pair.id, base) for pair in pairs for base in (0, 1)]
        base, whole, of_full, of_half = model.measure(pairs, [*bases, *rows], RESPONSE_LOGPROB).reshape(4, -1)
        assert np.abs(whole - base).max() > 0.1
        np.testing.assert_allclose(of_full, whole, rtol=0, atol=TOLERANCE)
        assert np.abs(of_half - whole).max() > 100 * TOLERANCE


@pytest.mark.parametrize("name", FAMILIES)
def test_a_control_writes_the_same_change_along_other_directions(subject: Subjects, name: str) -> None:
    model, pairs, rng = subject(name), pairs_of(), np.random.default_rng(2)
    sites = [
        replace(site, along=Basis.random(site.basis.size, model.info.d_model, rng)) for site in subspaces(model, (1, 3))
    ]
    rows = [swap(pair, site, base, model.info) for pair in pairs for site in sites for base in (0, 1)]
    measured = model.compare(pairs, rows, RESPONSE_LOGPROB)
    assert measured.deviation < TOLERANCE
    assert measured.felt() > 0.75


def test_units_of_a_site_have_bases_of_their_own_width(subject: Subjects) -> None:
    model, pairs, rng = subject("llama"), pairs_of(), np.random.default_rng(3)
    sites = [
        Subspace("attention_heads", 1, "all", (0, 2), basis=Basis.random(2, 2 * model.info.d_head, rng)),
        Subspace("mlp_neurons", 1, "all", (1, 5, 6), basis=Basis.random(1, 3, rng)),
        Subspace("mlp_neurons", 2, "last", basis=Basis.random(5, model.info.d_ff, rng)),
    ]
    rows = [swap(pair, site, base, model.info) for pair in pairs for site in sites for base in (0, 1)]
    measured = model.compare(pairs, rows, RESPONSE_LOGPROB)
    assert measured.deviation < TOLERANCE
    assert measured.felt() > 0.75


@pytest.mark.parametrize("name", FAMILIES)
def test_one_direction_at_every_layer(subject: Subjects, name: str) -> None:
    model, pairs = subject(name), pairs_of()
    basis = Basis.random(1, model.info.d_model, np.random.default_rng(4))
    sites = [Subspace("layer_output", layer, "all", basis=basis) for layer in range(model.info.layers)]
    rows = [swap_all(pair, sites, base, model.info) for pair in pairs for base in (0, 1)]
    measured = model.compare(pairs, rows, LOGIT_DIFF)
    assert measured.deviation < TOLERANCE
    assert measured.felt() == 1


def test_rows_are_known_by_the_numbers_of_their_basis(subject: Subjects) -> None:
    model, (pair, _), rng = subject("llama"), pairs_of(), np.random.default_rng(5)
    one, other = (Basis.random(1, model.info.d_model, rng) for _ in range(2))
    site = Subspace("layer_output", 1, "last", basis=one)
    sites = [Site("layer_output", 1, "last"), site, replace(site, basis=other), replace(site, along=other)]
    keys = [model.keys([pair], LOGIT_DIFF)(swap(pair, found, 0, model.info)) for found in sites]
    assert len(set(keys)) == len(sites)
    again = replace(site, basis=Basis(one.vectors.copy()))
    assert model.keys([pair], LOGIT_DIFF)(swap(pair, again, 0, model.info)) == keys[1]


def test_a_subspace_lies_within_its_site_and_covers_nothing(subject: Subjects) -> None:
    model, (pair, _) = subject("llama"), pairs_of()
    part = Subspace("layer_output", 1, "last", basis=Basis.random(1, model.info.d_model, np.random.default_rng(6)))
    swap_all(pair, [part, Site("mlp_output", 1, "last")], 0, model.info)
    with pytest.raises(SiteError, match="wholly covered by"):
        swap_all(pair, [part, Site("layer_output", 1, "all")], 0, model.info)


@pytest.mark.parametrize(
    ("vectors", "said"),
    [
        (np.zeros((0, 4), np.float32), r"1 to width directions, not float32 \[0, 4\]"),
        (np.eye(4, dtype=np.float32)[0], r"not float32 \[4\]"),
        (np.eye(4), r"not float64"),
        (2 * np.eye(4, dtype=np.float32)[:1], "not orthonormal: B B\\^T is 3 off the identity"),
        (np.float32([[1, 0, 0], [0.6, 0.8, 0]]), "not orthonormal"),
        (np.float32([[np.nan, 0]]), "not orthonormal"),
    ],
)
def test_what_is_no_orthonormal_basis_is_refused_by_name(vectors: np.ndarray, said: str) -> None:
    with pytest.raises(SiteError, match=said):
        Basis(vectors)


@pytest.mark.parametrize("directions", [[0.0, 0.0], [[1, 2], [2, 4]], [np.nan, 1]])
def test_what_spans_nothing_is_refused(directions: list[float]) -> None:
    with pytest.raises(SiteError, match="span no subspace"):
        Basis.spanning(directions)


def test_a_basis_spans_its_directions_and_keeps_the_sign_of_the_first() -> None:
    basis = Basis.spanning([[0, -3, 0], [1, 1, 0]])
    np.testing.assert_allclose(basis.vectors, [[0, -1, 0], [1, 0, 0]], atol=1e-7)


def test_another_width_and_a_direct_effect_are_refused_by_name(subject: Subjects) -> None:
    model, (pair, _), basis = subject("llama"), pairs_of(), Basis.spanning([1.0, 0, 0])
    narrow = Subspace("mlp_output", 1, "last", basis=basis)
    with pytest.raises(SiteError, match=r"Basis\(1 of 3, \w+\) is no basis of mlp_output, which is 32 wide"):
        swap(pair, narrow, 0, model.info)
    with pytest.raises(SiteError, match="not of Basis"):
        direct_task([pair], [[narrow]], Setting(model.info, "float32", LOGIT_DIFF))
    with pytest.raises(SiteError, match="differ in shape"):
        replace(narrow, along=Basis.spanning([1.0, 0]))


def test_a_saved_direction_is_read_as_it_was_written(tmp_path: Path) -> None:
    basis = Basis.random(1, 5, np.random.default_rng(7))
    saved = Direction(basis, 3, "post_instruction[-2]", 12.5, "some/model")
    np.testing.assert_array_equal(load(saved.safetensors())["basis"], basis.vectors)
    (tmp_path / "b.safetensors").write_bytes(saved.safetensors())
    again = Direction.load(tmp_path / "b.safetensors")
    np.testing.assert_allclose(again.basis.vectors, basis.vectors, atol=1e-6)
    assert replace(again, basis=basis) == saved
    kept = json.dumps(asdict(saved.record()))
    assert Direction.of_record(DirectionRecord(**json.loads(kept))) == saved
    np.testing.assert_allclose(again.vector, 12.5 * basis.vectors[0], atol=1e-5)


def test_directions_from_elsewhere_may_say_nothing_of_themselves(tmp_path: Path) -> None:
    basis = Basis.random(2, 5, np.random.default_rng(7))
    np.save(tmp_path / "one.npy", 3 * basis.vectors[0])
    one = Direction.load(tmp_path / "one.npy")
    np.testing.assert_allclose(one.basis.vectors, basis.vectors[:1], atol=1e-6)
    assert (one.layer, one.position, one.model) == (None, "", "")
    assert one.length == pytest.approx(3)
    save_file({"any": np.ascontiguousarray(2 * basis.vectors, np.float16)}, tmp_path / "two.safetensors")
    two = Direction.load(tmp_path / "two.safetensors")
    np.testing.assert_allclose(two.basis.vectors @ basis.vectors.T, np.eye(2), atol=1e-2)
    assert np.isnan(two.length)


def test_what_is_no_direction_is_refused_in_one_line(tmp_path: Path) -> None:
    rows = np.random.default_rng(8).normal(size=(2, 5))
    files = {
        "two.safetensors": ({"a": rows, "b": rows}, {}, "holds 2 tensors"),
        "layer.safetensors": ({"a": rows}, {"layer": "late"}, "say what is no number: .*'late'"),
        "nan.npy": (np.where(np.eye(2, 5), np.nan, rows), {}, "not finite"),
        "zero.npy": (rows * [[1], [0]], {}, "a direction that is 0"),
        "same.npy": (rows[[0, 0]], {}, "span no subspace of 2 dimensions"),
        "cube.npy": (np.ones((1, 1, 5)), {}, r"holds float64 \[1, 1, 5\]; a basis is"),
        "words.npy": (np.array(["a", "b"]), {}, "a basis is"),
        "empty.npy": (np.zeros((0, 5)), {}, "a basis is"),
        "objects.npy": (np.array([None]), {}, "no basis can be read from"),
    }
    for name, (content, about, said) in files.items():
        if isinstance(content, dict):
            save_file(content, tmp_path / name, about)
        else:
            np.save(tmp_path / name, content, allow_pickle=True)
        with pytest.raises(SiteError, match=f"{said}") as caught:
            Direction.load(tmp_path / name)
        assert "\n" not in str(caught.value)
    (tmp_path / "bad.safetensors").write_bytes(b"no tensors")
    (tmp_path / "bad.npy").write_bytes(b"")
    for name in ("bad.safetensors", "bad.npy", "absent.npy", "absent.safetensors"):
        with pytest.raises(SiteError, match=f"no basis can be read from .*{name}"):
            Direction.load(tmp_path / name)


def test_cosines_with_one_direction_have_a_sign_and_with_several_none() -> None:
    one, two = Basis.spanning([0, -2.0, 0]), Basis.spanning([[0, 1.0, 0], [1.0, 0, 0]])
    assert one.cosine([3, 4, 0]) == pytest.approx(-0.8)
    assert two.cosine([3, 4, 12]) == pytest.approx(5 / 13)
    assert np.isnan(one.cosine([0, 0, 0]))
