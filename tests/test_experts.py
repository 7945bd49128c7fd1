"""The parts of a mixture of experts against experts written out by hand: routing, each expert, the shared one."""

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from types import MappingProxyType

import numpy as np
import pytest
import torch
from mixture_oracle import MixtureOracle, mlp_of
from oracle import LOGIT_DIFF, RESPONSE_LOGPROB, TOLERANCE, Subject, token_pair
from test_families import MIXTURES, POSITIONS, READ
from test_samples import PAIRS, sampled
from test_tasks import run, setting

from remote_mediation.engine.rows import Constant, Row, Scale, Write, swap, swap_all
from remote_mediation.engine.samples import Manner
from remote_mediation.engine.tasks import Reading, direct_task, read_task
from remote_mediation.errors import SiteError
from remote_mediation.outcomes import Outcome
from remote_mediation.sites import FAMILIES, Component, Site, check_site
from remote_mediation.subspaces import Basis, Subspace
from remote_mediation.tokens import TokenPair

Subjects = Callable[[str], Subject]
WITH_SHARED = tuple(name for name in MIXTURES if "shared_expert_output" in FAMILIES[name].components)
UNITS: dict[Component, tuple[tuple[int, ...], ...]] = {
    "router": ((), (1,), (0, 2)),
    "expert_output": ((), (0,), (1,), (2,), (3,), (1, 2)),
    "shared_expert_output": ((),),
}


def parts_of(model: Subject) -> dict[Component, tuple[tuple[int, ...], ...]]:
    """The units of `UNITS` that a family has."""
    return {name: units for name, units in UNITS.items() if name in FAMILIES[model.info.family].components}


def grid(pair: TokenPair, model: Subject, component: Component) -> list[Row]:
    """All units of a component at every position, in both directions; the layer changes from site to site."""
    rows = []
    for number, (units, position) in enumerate(product(parts_of(model)[component], POSITIONS)):
        layers = [layer for layer in model.info.routed if position in READ or layer + 1 < model.info.layers]
        site = Site(component, layers[number % len(layers)], position, units)
        rows += [swap(pair, site, base, model.info) for base in (0, 1)]
    return rows


@pytest.mark.parametrize("edits", [(2, 2), (2, 4)], ids=["equal", "unequal"])
@pytest.mark.parametrize(
    ("outcome", "answers"), [(LOGIT_DIFF, (0, 0)), (RESPONSE_LOGPROB, (4, 1))], ids=["logit_diff", "response_logprob"]
)
@pytest.mark.parametrize("family", MIXTURES)
def test_every_part_is_measured_as_by_hand(
    subject: Subjects, family: str, outcome: Outcome, answers: tuple[int, int], edits: tuple[int, int]
) -> None:
    model, pair = subject(family), token_pair("pair", edits=edits, answers=answers)
    for component in parts_of(model):
        measured = model.compare([pair], grid(pair, model, component), outcome, MixtureOracle)
        largest = np.abs(measured.effects).max()
        assert largest >= 0.1, component
        assert measured.deviation < TOLERANCE * largest, component


@pytest.mark.parametrize("family", MIXTURES)
def test_a_part_moved_by_one_expert_or_one_layer_is_noticed(subject: Subjects, family: str) -> None:
    model, pair = subject(family), token_pair("pair", edits=(2, 4))
    first, second = model.info.routed[:2]
    moves = [(Site(name, first, "all"), Site(name, second, "all")) for name in parts_of(model)]
    moves += [
        (Site(name, first, "all", (number,)), Site(name, first, "all", ((number + 1) % 4,)))
        for name in ("router", "expert_output")
        for number in range(4)
    ]
    for right, moved in moves:
        rows, others = ([swap(pair, site, base, model.info) for base in (0, 1)] for site in (right, moved))
        measured = model.compare([pair], rows, LOGIT_DIFF, MixtureOracle)
        largest = np.abs(measured.effects).max()
        assert measured.deviation < TOLERANCE * max(largest, 1)
        wrong = np.abs(model.measure([pair], others, LOGIT_DIFF) - measured.oracle).max()
        assert wrong > 100 * TOLERANCE * largest, (right, moved)


@pytest.mark.parametrize("family", WITH_SHARED)
def test_a_shared_expert_without_its_gate_or_layer_is_noticed(
    subject: Subjects, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, pair, row = subject(family), token_pair("pair"), FAMILIES[family]
    assert row.mixture is not None
    gates = {
        "qwen2_moe": "",
        "deepseek_v2": "input_layernorm",
        "deepseek_v3": "input_layernorm",
        "qwen3_next": "",
        "qwen3_5_moe_text": "",
        "qwen3_5_moe": "",
    }
    rows = [swap(pair, Site("shared_expert_output", 2, "last"), base, model.info) for base in (0, 1)]
    right = model.compare([pair], rows, LOGIT_DIFF, MixtureOracle)
    monkeypatch.setitem(FAMILIES, family, replace(row, mixture=row.mixture._replace(shared_gate=gates[family])))
    wrong = model.compare([pair], rows, LOGIT_DIFF, MixtureOracle)
    largest = np.abs(right.effects).max()
    assert right.deviation < TOLERANCE * largest
    assert wrong.deviation > 100 * TOLERANCE * largest


@pytest.mark.parametrize("family", MIXTURES)
def test_other_values_and_several_parts_at_once(subject: Subjects, family: str) -> None:
    """Scales, constants, subspaces; and parts beside the routing that they run with, in one row and over layers."""
    model, rng = subject(family), np.random.default_rng(3)
    pairs = [token_pair("equal", answers=(3, 2)), token_pair("unequal", edits=(3, 1), answers=(3, 2))]
    first, last = model.info.routed[0], model.info.routed[-1]
    basis = Basis.random(2, model.info.d_model, rng)
    vector, weights = (Constant(tuple(map(float, rng.normal(size=size)))) for size in (model.info.d_model, 4))
    single = [
        Write("expert_output", first, (5, 6), (1, 2), Scale(-2.0)),
        Write("expert_output", first, (7,), (0,), vector),
        Write("router", first, (6, 7), (), weights),
        Write("router", first, (5, 7), (0, 3), Scale(0.0)),
    ]
    sets = [
        [Site("router", first, "edit"), Site("expert_output", first, "last", (1,))],
        [Site("router", first, "all"), Site("expert_output", first, "all", (0,))],
        [Site("expert_output", first, "all", (0, 2)), Site("expert_output", first, "all", (3,))],
        [Site("expert_output", last, "all", (1,)), Site("mlp_output", first, "edit")],
        [Subspace("expert_output", first, "all", (0, 1), basis=basis)],
    ]
    if "shared_expert_output" in parts_of(model):
        single += [Write("shared_expert_output", first, (5, 6), (), Scale(3.0))]
        sets += [[Site("shared_expert_output", layer, "all") for layer in model.info.routed]]
    rows = [Row(pair.id, base, (write,)) for pair in pairs for base in (0, 1) for write in single]
    rows += [swap_all(pair, sites, base, model.info) for pair in pairs for base in (0, 1) for sites in sets]
    measured = model.compare(pairs, rows, RESPONSE_LOGPROB, MixtureOracle)
    assert measured.deviation < TOLERANCE * np.abs(measured.effects).max()
    assert measured.felt() > 0.6  # an expert that is not chosen does nothing


@pytest.mark.parametrize("family", MIXTURES)
def test_experts_and_the_shared_one_add_up_to_the_mlp(subject: Subjects, family: str) -> None:
    model, ids = subject(family), (7, 8, 9, 10, 11, 12)
    shared: list[tuple[Component, tuple[int, ...]]] = [("shared_expert_output", ())]
    kinds: list[tuple[Component, tuple[int, ...]]] = [("expert_output", (number,)) for number in range(4)]
    kinds += [*(shared if "shared_expert_output" in parts_of(model) else []), ("router", ()), ("mlp_output", ())]
    oracle = MixtureOracle(model.plain, replace(token_pair("pair"), x0=ids))
    for place, layer in enumerate(model.info.routed, 3):
        readings = [Reading(component, layer, (place,), units) for component, units in kinds]
        tasks = [read_task("a", ids, [one], setting(model)) for one in readings]
        together = read_task("a", ids, readings, setting(model))
        *found, at_once = run(model, [*tasks, together])
        *added, routing, whole = found
        np.testing.assert_allclose(sum(added), whole, atol=1e-5 * np.abs(whole).max())
        assert len(at_once) == sum(map(len, found))
        idle = [number for number in range(4) if routing[number] == 0]
        assert len(idle) == 4 - model.info.chosen
        assert all((added[number] == 0).all() for number in idle)
        by_hand = oracle._recorded[0, 0]["parts", layer]
        np.testing.assert_allclose(routing, by_hand.routing[place], atol=1e-5)
        np.testing.assert_allclose(added[:4], by_hand.routed[place], atol=1e-5)


@pytest.mark.parametrize("family", MIXTURES)
def test_all_parts_together_are_the_mlp(subject: Subjects, family: str) -> None:
    model, pair = subject(family), token_pair("pair", edits=(2, 4))
    layer = model.info.routed[1]
    parts = [Site("expert_output", layer, "all", (number,)) for number in range(4)]
    parts += [Site("shared_expert_output", layer, "all")] if "shared_expert_output" in parts_of(model) else []
    sets = [parts, [Site("mlp_output", layer, "all")]]
    rows = [swap_all(pair, sites, base, model.info) for sites in sets for base in (0, 1)]
    found = model.measure([pair], [Row(pair.id, 0), Row(pair.id, 1), *rows], LOGIT_DIFF)
    np.testing.assert_allclose(found[2:4], found[4:6], atol=TOLERANCE)
    assert np.abs(found[4:6] - found[:2]).max() > 100 * TOLERANCE


@pytest.mark.parametrize("family", MIXTURES)
def test_an_expert_that_neither_prompt_is_routed_to_does_nothing(subject: Subjects, family: str) -> None:
    model, pair = subject(family), token_pair("pair")
    oracle = MixtureOracle(model.plain, pair)
    layer, last = model.info.routed[-1], len(pair.x0) - 1
    weights = [oracle._recorded[side, 0]["parts", layer].routing[last] for side in (0, 1)]
    chosen = {int(number) for one in weights for number in torch.nonzero(one)}
    for number in range(4):
        rows = [swap(pair, Site("expert_output", layer, "last", (number,)), base, model.info) for base in (0, 1)]
        found = model.measure([pair], [Row(pair.id, 0), Row(pair.id, 1), *rows], LOGIT_DIFF)
        change = np.abs(found[2:] - found[:2]).max()
        assert (change > 100 * TOLERANCE) == (number in chosen)
        assert number in chosen or change < 1e-6


REFUSED: MappingProxyType[str, tuple[str, Site, str]] = MappingProxyType(
    {
        "dense family": ("llama", Site("expert_output", 1, "last", (0,)), "llama is no mixture of experts"),
        "dense layer": ("deepseek_v3", Site("router", 0, "last"), "it has one MLP; layers that have it are 1, 2"),
        "no softmax attention": (
            "lfm2",
            Site("attention_heads", 1, "last", (0,)),
            "it has no softmax attention; layers that have it are 0, 2",
        ),
        "nothing shared": ("mixtral", Site("shared_expert_output", 1, "last"), "no expert that always runs"),
    }
)


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_there_is_refused_by_name(subject: Subjects, case: str) -> None:
    family, site, reason = REFUSED[case]
    model = subject(family)
    for ask in (lambda: check_site(site, model.info), lambda: swap(token_pair("pair"), site, 0, model.info)):
        with pytest.raises(SiteError, match=reason):
            ask()


def test_sets_that_cannot_be_are_refused_by_name(subject: Subjects) -> None:
    model, pair = subject("qwen2_moe"), token_pair("pair")
    both = [Site("expert_output", 1, "all", (0, 1)), Site("expert_output", 1, "last", (1, 2))]
    covered = [Site("mlp_output", 1, "all"), Site("shared_expert_output", 1, "last")]
    for sites, reason in ((both, "share expert 1"), (covered, "wholly covered")):
        with pytest.raises(SiteError, match=reason):
            swap_all(pair, sites, 0, model.info)
    with pytest.raises(SiteError, match="direct effects are of attention_output and mlp_output"):
        direct_task(pair, [both[:1]], setting(model))
    apart = [Site("expert_output", 1, "all", (0, 1)), Site("expert_output", 1, "all", (2,))]
    assert len(swap_all(pair, apart, 0, model.info).writes) == 2


def test_layers_with_experts_are_those_of_the_classes(subject: Subjects) -> None:
    for family in MIXTURES:
        model = subject(family)
        layers = range(model.info.layers)
        there = [layer for layer in layers if hasattr(mlp_of(model.plain, layer), "experts")]
        assert list(model.info.routed) == there
        assert model.info.experts == len(mlp_of(model.plain, there[0]).experts.down_proj)


@pytest.mark.parametrize("held", [False, True], ids=["at the prompt", "at every token"])
@pytest.mark.parametrize("family", ["granitemoe", "qwen2_moe", "deepseek_v3"])
def test_sampled_answers_behind_all_parts_are_those_behind_the_mlp(subject: Subjects, family: str, held: bool) -> None:
    """`mlp_output` is held against a decoding loop by hand in test_samples.py."""
    model, pair, manner = subject(family), PAIRS[0], Manner(2, 5, 0.0, held)
    layers = model.info.routed[:2]
    parts = [Site("expert_output", layer, "all", units) for layer in layers for units in ((0, 3), (1,), (2,))]
    parts += [
        Site("shared_expert_output", layer, "all") for layer in layers if "shared_expert_output" in parts_of(model)
    ]
    sets = [parts, [Site("mlp_output", layer, "all") for layer in layers], [Site("router", layers[0], "all")]]
    rows = [swap_all(pair, sites, base, model.info) for sites in sets for base in (0, 1)]
    rows += [Row(pair.id, 0), Row(pair.id, 1)]
    found = sampled(model, rows, manner)
    ids, logits = (np.array([one[number] for one in found]) for number in (0, 1))
    np.testing.assert_array_equal(ids[:2], ids[2:4])
    np.testing.assert_allclose(logits[:2], logits[2:4], rtol=0, atol=TOLERANCE)
    assert np.abs(logits[:6] - np.tile(logits[6:], (3, 1, 1))).max(axis=(1, 2)).min() > 100 * TOLERANCE


def test_sites_of_a_mixture_lie_at_its_modules() -> None:
    family = FAMILIES["qwen2_moe"]
    paths = {name: family.module(name) for name in family.components}
    assert paths["router"] == paths["expert_output"] == "mlp.experts"
    assert paths["shared_expert_output"] == "mlp.shared_expert"
    assert (paths["mlp_output"], paths["layer_output"]) == ("mlp", "")
