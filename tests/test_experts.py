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

from remote_mediation.engine.local import LocalBackend
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
    """The units of `UNITS` that a family has, and single neurons, some of several experts, all of one, and all."""
    here = {name: units for name, units in UNITS.items() if name in FAMILIES[model.info.family].components}
    size = model.info.expert_ff
    some = (0, 3, size - 1, 2 * size, 2 * size + 5, 4 * size - 1)
    return {**here, "expert_neurons": ((), (2,), some, neurons_of(model, 1), neurons_of(model, 3)[2:-2])}


def neurons_of(model: Subject, expert: int) -> tuple[int, ...]:
    """All neurons of an expert."""
    return tuple(range(expert * model.info.expert_ff, (expert + 1) * model.info.expert_ff))


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
def test_effects_of_neurons_in_bfloat16_are_those_of_float32(subject: Subjects, family: str) -> None:
    model, pair = subject(family), token_pair("pair", edits=(2, 4), answers=(4, 1))
    low = Subject(LocalBackend.load(model.info.name, dtype="bfloat16"), model.plain, "bfloat16")
    # Of the last layer: below it, rounding can send a token to another expert of a later layer.
    sites = [
        Site("expert_neurons", model.info.routed[-1], position, units)
        for units in parts_of(model)["expert_neurons"]
        for position in READ
    ]
    rows = [swap(pair, site, base, model.info) for site in sites for base in (0, 1)]
    measured = low.compare([pair], [Row("pair", 0), Row("pair", 1), *rows], RESPONSE_LOGPROB, MixtureOracle)
    effects = measured.engine[2:] - measured.engine[[row.base for row in rows]]
    assert np.corrcoef(effects, measured.effects[2:])[0, 1] > 0.9


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
    moves += [
        tuple(Site("expert_neurons", first, "all", neurons_of(model, one)) for one in (number, (number + 1) % 4))
        for number in range(4)
    ]
    for right, moved in moves:
        rows, others = ([swap(pair, site, base, model.info) for base in (0, 1)] for site in (right, moved))
        measured = model.compare([pair], rows, LOGIT_DIFF, MixtureOracle)
        largest = np.abs(measured.effects).max()
        assert measured.deviation < TOLERANCE * max(largest, 1)
        wrong = np.abs(model.measure([pair], others, LOGIT_DIFF) - measured.oracle).max()
        assert wrong > 100 * TOLERANCE * largest, (right, moved)


@pytest.mark.parametrize("family", MIXTURES)
def test_a_neuron_moved_by_one_is_noticed(subject: Subjects, family: str) -> None:
    model, pair, layer = subject(family), token_pair("pair", edits=(2, 4)), subject(family).info.routed[0]
    units = (0, 5, 2 * model.info.expert_ff + 1)
    for right, moved in zip(units, (1, 4, 2 * model.info.expert_ff), strict=True):
        rows, others = (
            [
                Row(pair.id, base, (Write("expert_neurons", layer, (4, 5), (unit,), Constant((5.0,))),))
                for base in (0, 1)
            ]
            for unit in (right, moved)
        )
        measured = model.compare([pair], rows, LOGIT_DIFF, MixtureOracle)
        largest = np.abs(measured.effects).max()
        assert measured.deviation < TOLERANCE * max(largest, 1)
        wrong = np.abs(model.measure([pair], others, LOGIT_DIFF) - measured.oracle).max()
        assert wrong > 100 * TOLERANCE * largest


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
    basis, some = Basis.random(2, model.info.d_model, rng), neurons_of(model, 1)[4:] + neurons_of(model, 3)
    vector, weights = (Constant(tuple(map(float, rng.normal(size=size)))) for size in (model.info.d_model, 4))
    single = [
        Write("expert_output", first, (5, 6), (1, 2), Scale(-2.0)),
        Write("expert_output", first, (7,), (0,), vector),
        Write("expert_neurons", first, (5, 6), some, Scale(-3.0)),
        Write("expert_neurons", first, (6, 7), some, Constant(tuple(map(float, rng.normal(size=len(some)))))),
        Write("router", first, (6, 7), (), weights),
        Write("router", first, (5, 7), (0, 3), Scale(0.0)),
    ]
    sets = [
        [Site("router", first, "edit"), Site("expert_output", first, "last", (1,))],
        [Site("router", first, "all"), Site("expert_output", first, "all", (0,))],
        [Site("expert_output", first, "all", (0, 2)), Site("expert_output", first, "all", (3,))],
        [Site("expert_output", last, "all", (1,)), Site("mlp_output", first, "edit")],
        [Subspace("expert_output", first, "all", (0, 1), basis=basis)],
        [Subspace("expert_neurons", first, "all", some, basis=Basis.random(3, len(some), rng))],
        [Site("expert_neurons", layer, "all", some) for layer in model.info.routed],
        [Site("router", first, "edit"), Site("expert_neurons", first, "all", some[:9])],
        [Site("expert_neurons", first, "all", some), Site("expert_output", first, "last", (0, 2))],
        [Site("expert_neurons", first, "all", some[:9]), Site("expert_neurons", first, "last", some[9:])],
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
def test_neurons_of_an_expert_are_what_it_adds_but_for_a_bias(subject: Subjects, family: str) -> None:
    """As read: weighted activations times the columns of the weights; gpt_oss adds a bias times the routing weight."""
    model, ids = subject(family), (7, 8, 9, 10, 11, 12)
    oracle, experts = MixtureOracle(model.plain, replace(token_pair("pair"), x0=ids)), 0
    for place, layer in enumerate(model.info.routed, 3):
        columns = oracle.columns(layer).detach().numpy()
        whole = read_task("a", ids, [Reading("expert_neurons", layer, (place,))], setting(model))
        kinds: tuple[Component, ...] = ("router", "expert_neurons", "expert_output")
        for number in range(4):
            units = neurons_of(model, number)
            asked = [Reading(name, layer, (place,), units if "neurons" in name else (number,)) for name in kinds]
            weight, active, added, everywhere = run(
                model, [*(read_task("a", ids, [one], setting(model)) for one in asked), whole]
            )
            bias = 0.0
            if family == "gpt_oss":
                bias = mlp_of(model.plain, layer).experts.down_proj_bias[number].detach().numpy()
            np.testing.assert_allclose(active @ columns[list(units)] + weight * bias, added, atol=1e-5)
            np.testing.assert_array_equal(active, everywhere[list(units)])
            by_hand = oracle._recorded[0, 0]["parts", layer].active[place, list(units)]
            np.testing.assert_allclose(active, by_hand, atol=1e-5 * max(1.0, np.abs(active).max()))
            experts += bool(active.any())
    assert experts == model.info.chosen * len(model.info.routed)


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
        whole = Site("expert_output", layer, "last", (number,))
        for site in (whole, Site("expert_neurons", layer, "last", neurons_of(model, number))):
            rows = [swap(pair, site, base, model.info) for base in (0, 1)]
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
        "dense family's neurons": ("llama", Site("expert_neurons", 1, "last", (0,)), "llama is no mixture of experts"),
        "dense layer's neurons": ("deepseek_v3", Site("expert_neurons", 0, "last", (0,)), "it has one MLP"),
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
    some = Site("expert_neurons", 1, "all", (3, 30, 50))  # of experts of 24 neurons
    refused = [
        (both, "share expert 1"),
        ([Site("expert_output", 1, "last"), both[0]], "share expert 0"),
        (covered, "wholly covered"),
        ([some, Site("expert_output", 1, "last", (0, 2))], "share expert 0"),
        ([some, Site("expert_neurons", 1, "last", (30, 31))], "share neuron 30"),
        ([some, Site("expert_neurons", 1, "last")], "share neuron 3"),
        ([some, Site("expert_neurons", 1, "all")], "wholly covered"),
        ([some, Site("expert_output", 1, "all")], "wholly covered"),
        ([some, Site("mlp_output", 1, "all")], "wholly covered"),
        ([some, Site("layer_output", 1, "all")], "wholly covered"),
    ]
    for sites, reason in refused:
        with pytest.raises(SiteError, match=reason):
            swap_all(pair, sites, 0, model.info)
    with pytest.raises(SiteError, match=r"unit 96 of expert_neurons is out of range: .* has 0 to 95"):
        check_site(Site("expert_neurons", 1, "all", (96,)), model.info)
    with pytest.raises(SiteError, match=r"not of Site.component='expert_neurons'"):
        direct_task([pair], [[some]], setting(model))
    with pytest.raises(SiteError, match="direct effects are of attention_output and mlp_output"):
        direct_task([pair], [both[:1]], setting(model))
    apart = [Site("expert_output", 1, "all", (0, 1)), Site("expert_output", 1, "all", (2,))]
    apart += [Site("expert_neurons", 1, "all", (73, 90)), Site("expert_neurons", 1, "last", (72, 91))]
    apart += [Site("expert_neurons", 2, "all", (3, 30, 50))]
    assert len(swap_all(pair, apart, 0, model.info).writes) == 5


def test_layers_with_experts_are_those_of_the_classes(subject: Subjects) -> None:
    for family in MIXTURES:
        model = subject(family)
        layers = range(model.info.layers)
        there = [layer for layer in layers if hasattr(mlp_of(model.plain, layer), "experts")]
        assert list(model.info.routed) == there
        assert model.info.experts == len(mlp_of(model.plain, there[0]).experts.down_proj)
        assert model.info.expert_ff in mlp_of(model.plain, there[0]).experts.down_proj.shape[1:]


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
    neurons = [Site("expert_neurons", layer, "all", neurons_of(model, 1)) for layer in layers]
    parts = [site for site in parts if site.units != (1,)] + neurons
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
    assert paths["router"] == paths["expert_output"] == paths["expert_neurons"] == "mlp.experts"
    assert paths["shared_expert_output"] == "mlp.shared_expert"
    assert (paths["mlp_output"], paths["layer_output"]) == ("mlp", "")
