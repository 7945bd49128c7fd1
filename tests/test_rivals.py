"""The rival claims: rules on effects known by hand, directions against plain hooks, and models that say yes and no."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from fakes import Counting, placebo_study
from oracle import LOGIT_DIFF, TOLERANCE, Subject, token_pair
from safetensors.numpy import load_file

from remote_mediation import cost
from remote_mediation.analyses.claims import beside
from remote_mediation.analyses.claims.samples import Sample, activations
from remote_mediation.analyses.claims.verdicts import HALF, Bench, Beside, Both, Effect
from remote_mediation.analyses.rivals import DIRECTIONS, RIVALS, directions, harm, rulings, samples, sets, show
from remote_mediation.analyses.rivals.figures import AXIS, LATE_GATE, axis_figure
from remote_mediation.analyses.rivals.rulings import EARLY, NEURONS, Carrier
from remote_mediation.config import StudyConfig
from remote_mediation.cost import estimate
from remote_mediation.engine.local import LocalBackend
from remote_mediation.engine.rows import Row
from remote_mediation.lab import Lab, Study
from remote_mediation.planted.cases import CASES, build
from remote_mediation.planted.selfcheck import written
from remote_mediation.report import write_report
from remote_mediation.result import Result
from remote_mediation.sites import Site
from remote_mediation.store import Store
from remote_mediation.study import prepared_lab, reread, run_study
from remote_mediation.subspaces import Basis, Direction, Subspace

Subjects = Callable[[str], Subject]

# --- rules, on effects whose shares are known -------------------------------------------------------------------------

PAIRS = 24
TE = 6 + np.linspace(-0.5, 0.5, PAIRS)
NOISE = 0.02 * np.cos(np.arange(PAIRS))  # sums to nearly 0, and is not in step with TE


def bench(te: np.ndarray = TE, placebo: np.ndarray = 0.1 * TE, layers: int = 12, pairs: int = PAIRS) -> Bench:
    clusters = np.array([f"c{pair}" for pair in range(pairs)])
    return Bench(Both(te[:pairs], placebo[:pairs]), clusters, layers, seed=0, resamples=199)


def carrier(nie: float, tie: float, beside: Beside | None = None, on: Bench | None = None, name: str = "it") -> Carrier:
    """Shares of the TE of harm, and none of the placebo's."""
    te, _ = (on or bench()).total
    noise = NOISE[: len(te)]
    effect = Effect(*(Both(share * te + noise, noise) for share in (nie, tie)))
    return Carrier(name, 1, effect, beside)


@pytest.mark.parametrize(
    ("nie", "tie", "reached", "verdict"),
    [
        (0.8, 0.8, 0, "supported"),
        (0.8, 0.8, 2, "supported"),
        (0.8, 0.8, 3, "undecided"),
        (0.8, 0.5, 0, "undecided"),
        (0.5, 0.8, 0, "undecided"),
        (0.8, 0.3, 0, "not supported"),
        (0.3, 0.8, 0, "not supported"),
        (0.3, 0.3, 200, "not supported"),
    ],
)
def test_few_carry_half_as_no_random_ones_do(nie: float, tie: float, reached: int, verdict: str) -> None:
    found = rulings.few(bench(), carrier(nie, tie, Beside(reached, 200)))
    assert found.verdict == verdict
    assert f"NIE {nie:.0%}" in found.why
    assert (f"{reached} of 200 random sets" in found.why) == (min(nie, tie) > 0.5)


def test_without_random_sets_few_are_not_supported() -> None:
    assert rulings.few(bench(), carrier(0.8, 0.8)).verdict == "undecided"


@pytest.mark.parametrize(("likeness", "noted"), [(0.79, True), (0.81, False), (np.nan, True)])
def test_random_sets_that_are_smaller_are_noted(likeness: float, noted: bool) -> None:
    found = rulings.few(bench(), carrier(0.8, 0.8, Beside(0, 200, likeness)))
    assert found.verdict == "supported"
    assert ("not matched" in found.why) == noted


@pytest.mark.parametrize(
    ("own", "everywhere", "verdict"),
    [
        ((0.8, 0.8), (0.8, 0.8), "supported"),
        ((0.8, 0.8), (0.1, 0.1), "supported"),
        ((0.2, 0.2), (0.3, 0.3), "not supported"),
        ((0.2, 0.2), (0.8, 0.3), "not supported"),
        ((0.2, 0.2), (0.8, 0.8), "undecided"),
    ],
)
def test_one_direction_has_to_fail_at_all_layers_too(
    own: tuple[float, float], everywhere: tuple[float, float], verdict: str
) -> None:
    found = rulings.one_direction(bench(), carrier(*own, Beside(0, 200)), carrier(*everywhere, name="all over"))
    assert found.verdict == verdict
    assert ("all over" in found.why) == (verdict == "undecided")


@pytest.mark.parametrize(
    ("early", "late", "verdict"),
    [
        ((0.9, 0.9), (0.1, 0.1), "supported"),
        ((0.9, 0.9), (0.9, 0.9), "undecided"),
        ((0.9, 0.9), (0.5, 1.0), "undecided"),
        ((0.7, 0.7), (0.9, 0.9), "not supported"),
        ((0.9, 0.3), (0.1, 0.1), "not supported"),
        ((0.5, 0.9), (0.1, 0.1), "undecided"),
    ],
)
def test_early_layers(early: tuple[float, float], late: tuple[float, float], verdict: str) -> None:
    assert rulings.early_layers(bench(), carrier(*early), carrier(*late)).verdict == verdict


@pytest.mark.parametrize(
    ("own", "crossed", "verdict"),
    [
        (((0.4, 0.4), (0.8, 0.8)), ((0.1, 0.0), (0.2, 0.0)), "supported"),
        (((0.4, 0.4), (0.8, 0.8)), ((0.1, 0.0), (0.2, 0.8)), "undecided"),  # in one direction the same
        (((0.4, 0.4), (0.8, 0.8)), ((0.3, 0.3), (0.7, 0.7)), "not supported"),  # either does most of the other's work
        (((0.4, 0.4), (0.8, 0.8)), ((0.3, 0.3), (0.7, 0.1)), "supported"),
        (((0.4, 0.4), (0.8, 0.8)), ((0.4, 0.3), (0.7, 0.1)), "undecided"),
        (((0.01, 0.4), (0.8, 0.8)), ((0.0, 0.0), (0.0, 0.0)), "not supported"),  # harm does not act
        (((0.4, 0.4), (0.8, 0.01)), ((0.0, 0.0), (0.0, 0.0)), "not supported"),  # refusal does not
    ],
)
def test_two_directions_act_and_neither_does_the_other_s_work(
    own: Sequence[tuple[float, float]], crossed: Sequence[tuple[float, float]], verdict: str
) -> None:
    each = [carrier(*shares, name=name) for name, shares in zip(("harm", "refusal"), own, strict=True)]
    # What is left over must have a spread of its own, or every share is exact.
    others = [carrier(*shares, name="other")._replace(name="other") for shares in crossed]
    others = [one._replace(effect=one.effect.less(carrier(0, 0).effect.times(3.0))) for one in others]
    assert rulings.two_directions(bench(), each, others).verdict == verdict


def test_places_take_six_layers() -> None:
    shallow = bench(layers=5)
    assert rulings.early_layers(shallow, carrier(0.9, 0.9), carrier(0.1, 0.1)).verdict == "not tested"


@pytest.mark.parametrize(
    ("on", "share", "said", "about"),
    [
        (bench(), 0.8, "supported", "the harmful answer"),
        (bench(-TE, -0.1 * TE), 0.8, "supported", "the refusal"),
        (bench(), 0.2, "not supported", "the harmful answer"),
        (bench(pairs=14), 0.2, "undecided", "the harmful answer"),
        (bench(placebo=TE + 1), 0.8, "not about harm", "the harmful answer"),
        (bench(TE - TE.mean() + NOISE), 0.8, "no effect", "the outcome"),
        (bench(placebo=np.full(PAIRS, np.nan)), 0.8, "placebo not tested: supported", "the harmful answer"),
    ],
)
def test_the_gate_of_the_five_claims_holds_here_too(on: Bench, share: float, said: str, about: str) -> None:
    own, other = carrier(share, share, Beside(0, 200), on), carrier(0.9, 0.9, on=on, name="beside")
    found = rulings.judged(on, NEURONS, rulings.few(on, own), [own], [other])
    assert found.claim.said == said
    assert found.claim.name == f"0.1% of the neurons, over all layers, carry {about}"
    assert [measure.name for measure in found.claim.deciding] == ["it", "it"]
    assert [measure.name for measure in found.claim.beside] == ["beside", "beside"]


def test_what_any_edit_does_is_not_specific_to_harm() -> None:
    te, placebo = TE, 0.5 * TE
    through = Both(0.9 * te + NOISE, 0.9 * placebo + NOISE)
    own, on = Carrier("it", 1, Effect(through, through), Beside(0, 200)), bench(te, placebo)
    assert rulings.judged(on, NEURONS, rulings.few(on, own), [own], []).claim.said == "supported, of any edit"


def test_tables_hold_the_numbers_of_every_set() -> None:
    own, other = carrier(0.8, 0.7, Beside(1, 200, 0.9)), carrier(0.2, 0.3, name="beside")._replace(values=64)
    judged = rulings.judged(bench(), NEURONS, rulings.few(bench(), own), [own], [other])
    untested = rulings.untested(EARLY, "too few layers")
    claims, numbers = rulings.claim_table([judged, untested]), rulings.set_table([judged, untested])
    assert list(claims) == list(rulings.CLAIM_COLUMNS)
    assert list(numbers) == list(rulings.SET_COLUMNS)
    assert claims["said"].tolist() == ["supported", "not tested"]
    assert claims["why"].tolist()[1] == "too few layers"
    assert numbers["measure"].tolist() == ["it", "it", "beside", "beside"]
    assert numbers["direction"].tolist() == ["nie", "tie"] * 2
    assert numbers["decides"].tolist() == [True, True, False, False]
    assert numbers["harm"].to_numpy() == pytest.approx([0.8, 0.7, 0.2, 0.3], abs=0.01)
    assert numbers["common"].to_numpy() == pytest.approx([0] * 4, abs=0.01)
    assert numbers["values"].tolist() == [1, 1, 64, 64]
    assert numbers.loc[0, ["reached", "drawn", "likeness"]].tolist() == [1, 200, 0.9]
    assert numbers.loc[2:, ["reached", "drawn", "likeness"]].isna().all().all()


# --- what is chosen ---------------------------------------------------------------------------------------------------


def drawn_map(shares: np.ndarray, seed: int = 0) -> directions.Map:
    differences = np.random.default_rng(seed).normal(size=(*shares.shape[1:], 8))
    return directions.Map(["post_instruction[-2]", "last"], differences, shares, pairs=12)


def test_the_direction_is_chosen_below_four_fifths_by_its_weaker_side() -> None:
    shares = np.zeros((2, 5, 2))
    shares[:, 4, 1] = 1.0  # the last of five layers may not be chosen
    shares[:, 3, 1] = 0.9, 0.2
    shares[:, 2, 0] = 0.4, 0.3
    assert drawn_map(shares).chosen == (2, 0)
    assert directions.eligible(5) == 4
    assert directions.eligible(12) == 10
    assert directions.eligible(1) == 1
    shares[1, 3, 1] = 0.4
    assert drawn_map(shares).chosen == (3, 1)


def test_the_map_has_cosines_with_its_neighbours() -> None:
    shares = np.zeros((2, 3, 2))
    shares[:, 1, 1] = 0.5
    found = drawn_map(shares)
    table = directions.map_table(found).set_index(["layer", "position"])
    assert list(table.reset_index()) == list(directions.MAP_COLUMNS)

    def cosine(one: np.ndarray, other: np.ndarray) -> float:
        return float(one @ other / np.sqrt((one @ one) * (other @ other)))

    at = found.differences
    assert table.loc[(2, "last"), "cosine_below"] == pytest.approx(cosine(at[2, 1], at[1, 1]))
    assert table.loc[(2, "last"), "cosine_before"] == pytest.approx(cosine(at[2, 1], at[2, 0]))
    assert table.loc[(0, "post_instruction[-2]"), "cosine_chosen"] == pytest.approx(cosine(at[0, 0], at[1, 1]))
    assert table.loc[(0, "last"), "norm"] == pytest.approx(np.sqrt((at[0, 1] ** 2).sum()))
    assert table["cosine_below"].isna().tolist() == [True, True, False, False, False, False]
    assert table.index[table["chosen"]].tolist() == [(1, "last")]


def test_positions_are_the_template_tokens_of_all_pairs() -> None:
    pairs = [token_pair("a", post=3), token_pair("b", post=4)]
    assert directions.positions_of(pairs) == ["post_instruction[-3]", "post_instruction[-2]", "last"]
    assert directions.positions_of([token_pair("c", post=0)]) == ["last"]


def test_neurons_of_the_first_layer_stand_last() -> None:
    scores = np.array([[9.0, 8.0], [1.0, 3.0], [2.0, 0.0]])
    assert sets.ranked_neurons(scores) == [(1, 1), (2, 0), (1, 0), (2, 1), (0, 0), (0, 1)]
    assert sets.sizes_of(20_000) == {0.0001: 2, 0.001: 20, 0.01: 200, 0.05: 1000}
    assert sets.sizes_of(100) == {0.0001: 1, 0.001: 1, 0.01: 1, 0.05: 5}


def test_sizes_of_head_sets_have_all_and_what_counts_as_few() -> None:
    assert sets.head_sizes(12) == [1, 2, 3, 4, 6, 9, 12]
    assert sets.head_sizes(1) == [1]
    assert sets.few_of(12) == 1
    assert sets.few_of(400) == 20
    assert 20 in sets.head_sizes(400)


def test_bands_leave_out_the_mlp_that_embeds_anew() -> None:
    assert sets.third_band(range(2), "all") == [
        Site("attention_output", 0, "all"),
        Site("attention_output", 1, "all"),
        Site("mlp_output", 1, "all"),
    ]


def test_random_heads_are_others_of_about_the_size() -> None:
    sizes = np.random.default_rng(0).exponential(size=(12, 8))
    chosen, rng = [(3, 1), (7, 4), (11, 0)], np.random.default_rng(1)
    found = [sets.matched_heads(chosen, sizes, rng) for _ in range(20)]
    for one in found:
        assert len(set(one)) == 3
        assert not set(one) & set(chosen)
        assert sum(sizes[unit] for unit in one) == pytest.approx(sum(sizes[unit] for unit in chosen), rel=0.2)
    assert len(set(map(tuple, found))) > 10


def test_a_random_set_says_how_large_it_is() -> None:
    sizes = np.array([[1.0, 4.0, 9.0], [2.0, 0.0, 9.0]])

    def like(chosen: Any, sizes: np.ndarray, rng: np.random.Generator) -> list[tuple[int, int]]:
        return [(1, 0), (1, 1)]

    units, rng = sets.Units("mlp_neurons", "all", sizes, like), np.random.default_rng(0)
    drawn = units.drawn([(0, 0), (0, 1)], rng)
    assert drawn.sites == [Site("mlp_neurons", 1, "all", (0, 1))]
    assert drawn.likeness == pytest.approx(2 / 5)
    assert np.isnan(units.drawn([(1, 1)], rng).likeness)


def test_values_are_counted_by_what_is_swapped(subject: Subjects) -> None:
    info = subject("llama").info  # 32 wide, heads of 12, 40 neurons
    basis = Basis.random(3, 32, np.random.default_rng(0))
    of = {
        3: [Subspace("layer_output", 0, "last", basis=basis)],
        24: [Site("attention_heads", 0, "last", (0, 2))],
        2: [Site("mlp_neurons", 1, "all", (5,)), Site("mlp_neurons", 2, "all", (7,))],
        64: [Site("mlp_output", 0, "all"), Site("attention_output", 1, "all")],
    }
    assert {values: rulings.values_of(sites, info) for values, sites in of.items()} == {v: v for v in of}


# --- against plain hooks ----------------------------------------------------------------------------------------------


@pytest.fixture
def lab(subject: Subjects, tmp_path: Path) -> Lab:
    """Pairs of several lengths on a tiny model of random weights."""
    pairs = tuple(token_pair(f"p{before}", before=before, edits=(1, 1), post=3) for before in range(3, 15))
    model = subject("llama")
    config = StudyConfig(model=model.info.name, outcome="logit_diff", logit_diff={"plus": ["a"], "minus": ["b"]})
    return Lab(Study(config, model.info, LOGIT_DIFF, pairs, ()), Store(tmp_path), model.backend)


def recorded(model: Subject, ids: tuple[int, ...], module: str, of_input: bool = False) -> np.ndarray:
    """`[token, width]`, what goes into or comes out of a module on a plain run."""
    seen = []

    def look(_: Any, args: Any, output: Any) -> None:
        tensor = args[0] if of_input else output[0] if isinstance(output, tuple) else output
        seen.append(tensor.reshape(-1, tensor.shape[-1]).double().numpy())

    handle = model.plain.get_submodule(module).register_forward_hook(look)
    with torch.no_grad():
        model.plain(input_ids=torch.tensor([ids]), use_cache=False)
    handle.remove()
    return np.array(seen[0])


def test_directions_are_differences_of_means_by_plain_hooks(subject: Subjects, lab: Lab) -> None:
    model, discovery = subject("llama"), Sample.of(lab, "discovery")
    found = directions.measure_map(discovery, ["post_instruction[-3]", "post_instruction[-2]", "last"])
    assert found.differences.shape == (3, 3, 32)
    for layer in range(3):
        for number, offset in enumerate((-3, -2, -1)):
            harmful, harmless = (
                np.mean([recorded(model, ids, f"model.layers.{layer}")[offset] for ids in prompts], axis=0)
                for prompts in ([pair.x1 for pair in discovery.pairs], [pair.x0 for pair in discovery.pairs])
            )
            np.testing.assert_allclose(found.differences[layer, number], harmful - harmless, rtol=0, atol=1e-5)
    assert np.linalg.norm(found.differences, axis=-1).min() > 0.01


def swapped_along(
    model: Subject, base: tuple[int, ...], other: tuple[int, ...], layer: int, unit: np.ndarray, at: int = -1
) -> float:
    """Y of a prompt one of whose tokens takes over, after a layer, what the other prompt has along a direction."""
    target = recorded(model, other, f"model.layers.{layer}")[at] @ unit
    along = torch.tensor(unit, dtype=torch.float32)

    def change(_: Any, __: Any, output: Any) -> Any:
        stream = output[0] if isinstance(output, tuple) else output
        stream = stream.clone()
        stream[0, at] += (target - stream[0, at] @ along) * along
        return (stream, *output[1:]) if isinstance(output, tuple) else stream

    handle = model.plain.get_submodule(f"model.layers.{layer}").register_forward_hook(change)
    with torch.no_grad():
        logits = model.plain(input_ids=torch.tensor([base]), use_cache=False).logits[0, -1].double().numpy()
    handle.remove()
    return float(logits[list(LOGIT_DIFF.plus)].mean() - logits[list(LOGIT_DIFF.minus)].mean())


def test_shares_of_the_map_are_those_of_plain_hooks(subject: Subjects, lab: Lab) -> None:
    model, discovery, layer = subject("llama"), Sample.of(lab, "discovery"), 1
    found = directions.measure_map(discovery, ["post_instruction[-2]", "last"])
    direction = found.differences[layer, 1]
    unit, none = direction / np.linalg.norm(direction), np.zeros(32)
    assert found.pairs == len(discovery.pairs) <= samples.FEW_PAIRS
    rows = []
    for pair in discovery.pairs:
        y0, y1 = (swapped_along(model, ids, ids, layer, none) for ids in pair.prompts)
        nie = swapped_along(model, pair.x0, pair.x1, layer, unit) - y0
        tie = y1 - swapped_along(model, pair.x1, pair.x0, layer, unit)
        rows.append((nie, tie, y1 - y0))
    nie, tie, te = np.mean(rows, axis=0)
    assert found.shares[:, layer, 1] == pytest.approx([nie / te, tie / te], rel=1e-3, abs=TOLERANCE)
    assert np.abs(found.shares[:, layer, 1]).min() > 0.01


def test_two_directions_are_swapped_at_their_own_token_and_at_the_other_s(subject: Subjects, lab: Lab) -> None:
    model, discovery, heldout = subject("llama"), Sample.of(lab, "discovery"), Sample.of(lab, "heldout")
    found = directions.measure_map(discovery, ["post_instruction[-2]", "last"])
    refusal, end = found.best_last, -4  # three tokens of the template stand behind the user's text
    assert refusal.position == "last"
    judged = harm.measure_claim(discovery, heldout, refusal, 2)
    strongest = harm.harm(discovery, 2)
    change = [
        np.mean([recorded(model, ids, f"model.layers.{strongest.layer}")[end] for ids in prompts], axis=0)
        for prompts in zip(*(pair.prompts for pair in discovery.pairs), strict=True)
    ]
    unit = (change[1] - change[0]) / np.linalg.norm(change[1] - change[0])
    np.testing.assert_allclose(strongest.basis.vectors[0], unit, atol=1e-4)
    other = refusal.basis.vectors[0].astype(np.float64)
    places = [(strongest.layer, end, unit), (strongest.layer, end, other)]
    places += [(refusal.layer, -1, other), (refusal.layer, -1, unit)]
    by_name = {one.name: one.effect for one in judged.carriers}
    names = [f"harm at 'instruction_end', layer {strongest.layer}", "refusal in its place"]
    names += [f"refusal at 'last', layer {refusal.layer}", "harm in its place"]
    assert set(by_name) == set(names)
    for name, (layer, at, direction) in zip(names, places, strict=True):
        for number, pair in enumerate(heldout.pairs):
            (y0,) = lab.outcomes([Row(pair.id, 0)])
            swapped = swapped_along(model, pair.x0, pair.x1, layer, direction, at)
            assert by_name[name].nie.harm[number] == pytest.approx(swapped - y0, abs=TOLERANCE)
    assert [one.name for one in judged.claim.deciding[::2]] == names[::2]


def test_where_no_template_follows_the_text_both_tokens_are_one(subject: Subjects, lab: Lab) -> None:
    bare = lab.beside([replace(pair, post=0) for pair in lab.study.pairs])
    samples_of = [Sample.of(bare, split) for split in ("discovery", "heldout")]
    refusal = Direction(Basis.random(1, 32, np.random.default_rng(0)), 1, "last")
    assert harm.measure_claim(*samples_of, refusal, 2).claim.said == "not tested"


def test_changes_of_heads_and_neurons_are_those_of_plain_hooks(subject: Subjects, lab: Lab) -> None:
    model, discovery = subject("llama"), Sample.of(lab, "discovery")
    lengths = sets.head_changes(discovery, "last")
    at_last, over_all = sets.changes(discovery, "mlp_neurons", ["last", "all"])
    assert lengths.shape == (3, 4)
    for layer in range(3):
        heads, neurons = f"model.layers.{layer}.self_attn.o_proj", f"model.layers.{layer}.mlp.down_proj"
        expected = []
        for number, pair in enumerate(discovery.pairs):
            first, second = (recorded(model, ids, heads, of_input=True)[-1] for ids in pair.prompts)
            expected.append(np.linalg.norm((second - first).reshape(4, 12), axis=1))
            first, second = (recorded(model, ids, neurons, of_input=True) for ids in pair.prompts)
            np.testing.assert_allclose(at_last[number, layer], second[-1] - first[-1], rtol=0, atol=1e-4)
            change = second[pair.first :].mean(axis=0) - first[pair.first :].mean(axis=0)
            np.testing.assert_allclose(over_all[number, layer], change, rtol=0, atol=1e-4)
        np.testing.assert_allclose(lengths[layer], np.mean(expected, axis=0), rtol=1e-4)


def test_heads_are_ranked_by_their_own_effects_and_cut_where_half_is_carried(subject: Subjects, lab: Lab) -> None:
    discovery = Sample.of(lab, "discovery")
    ranked = sets.ranked_heads(discovery, "all")
    assert sorted(ranked) == [(layer, head) for layer in range(3) for head in range(4)]
    scores = []
    for layer, head in ranked:
        found = lab.joint([[Site("attention_heads", layer, "all", (head,))]], discovery.pairs)
        sign = np.sign(found.te.mean())
        scores.append(max(sign * found.nie.mean(), sign * found.tie.mean()))
    assert scores == sorted(scores, reverse=True)
    units = sets.Units("attention_heads", "all", np.ones((3, 4)), sets.matched_heads)
    shares = []
    for size in sets.head_sizes(12):
        found = lab.joint([units.sites(ranked[:size])], discovery.pairs)
        shares.append([float(table.mean() / found.te.mean()) for table in (found.nie, found.tie)])
    assert any((nie >= 0.5) != (tie >= 0.5) for nie, tie in shares)  # so that it matters which of the two decides
    first = [size for size, both in zip(sets.head_sizes(12), shares, strict=True) if min(both) >= 0.5]
    assert sets.fewest_heads(discovery, units, ranked) == (first[0] if first else None)


def test_the_first_size_that_carries_half() -> None:
    assert sets.reaching([1, 2, 4], np.array([0.1, 0.5, 0.9])) == 2
    assert sets.reaching([1, 2, 4], np.array([0.1, 0.4, 0.49])) is None


def test_random_sets_that_do_as_much_are_counted(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """A set beside itself always does as much, one that does nothing never does, and few are drawn where many do."""
    monkeypatch.setattr(beside, "RANDOM_SETS", (5, 15))
    heldout = Sample.of(lab, "heldout")
    whole, nothing = [Site("layer_output", 2, "last")], [Site("layer_output", 2, "post_instruction[-2]")]
    (effect,) = heldout.effects(lab.joint, [whole])  # by construction all of TE
    assert beside.beside_random(heldout, effect, lambda: beside.Drawn(whole, 0.5)) == Beside(5, 5, 0.5)
    assert beside.beside_random(heldout, effect, lambda: beside.Drawn(nothing)) == Beside(0, 20, 1.0)


def test_random_sets_are_drawn_only_where_a_rule_asks_for_them(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beside, "RANDOM_SETS", (5,))
    every, whole = Sample.of(lab, "all"), [Site("layer_output", 2, "last")]
    alike = [pair for pair, te in zip(every.pairs, every.bench().total.harm, strict=True) if te > 0.1]
    heldout = replace(every, pairs=tuple(alike))  # a TE that is clear of 0 has shares
    (effect,) = heldout.effects(lab.joint, [whole])  # by construction all of TE
    less = effect._replace(tie=effect.tie._replace(harm=0.4 * effect.tie.harm))
    assert beside.random_beside(heldout, effect, lambda: beside.Drawn(whole)) == Beside(5, 5)
    assert beside.random_beside(heldout, less, lambda: pytest.fail("drawn")) is None


def test_one_side_alone_is_as_much(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beside, "RANDOM_SETS", (5,))
    heldout = Sample.of(lab, "heldout")
    whole = [Site("layer_output", 2, "last")]
    (effect,) = heldout.effects(lab.joint, [whole])
    harder = Effect(effect.nie, Both(2 * effect.tie.harm, effect.tie.placebo))
    hardest = Effect(Both(2 * effect.nie.harm, effect.nie.placebo), harder.tie)
    assert beside.beside_random(heldout, harder, lambda: beside.Drawn(whole)).reached == 5
    assert beside.beside_random(heldout, hardest, lambda: beside.Drawn(whole)).reached == 0


# --- a whole study ----------------------------------------------------------------------------------------------------


@pytest.fixture
def study(tmp_path: Path, subject: Subjects) -> StudyConfig:
    return placebo_study(tmp_path, subject("llama_chat").info.name, analyses=["directions", "rivals"])


@pytest.fixture
def measured(study: StudyConfig, subject: Subjects, tmp_path: Path) -> tuple[Result, Store, Counting]:
    backend, store = Counting(subject("llama_chat").backend), Store.create(tmp_path / "run", study.identity())
    return run_study(study, backend, store), store, backend


Measured = tuple[Result, Store, Counting]


def test_tables_report_and_file(measured: Measured) -> None:
    result, store, _ = measured
    columns = {**DIRECTIONS.columns, **RIVALS.columns}
    assert columns.keys() - result.tables.keys() == {"bases.csv"}  # of studies that name some
    for name in columns.keys() & result.tables.keys():
        assert list(result.tables[name]) == list(columns[name])
    report = write_report(store, result).read_text("utf-8")
    table = report.split("## Claims")[1].split("##")[0]
    assert [line.split("|")[1].strip()[:28] for line in table.splitlines() if line.startswith("| rival")] == [
        "rival: one direction of the ",
        "rival: harm (end of the inst",
        "rival: 0.1% of the neurons, ",
        "rival: early layers carry th",
        "rival: a few attention heads",
    ]
    assert "## One direction" in report
    assert "## Rival claims" in report
    assert result.tables["rivals.csv"].set_index("rival")["verdict"]["early layers"] == "not tested"  # three layers

    chosen = result.tables["directions.csv"].query("chosen").iloc[0]
    (basis,) = load_file(store.folder / directions.FILE).values()
    assert basis.shape == (1, 32)
    saved = Direction.load(store.folder / directions.FILE)
    assert saved.basis == Basis(basis)
    assert (saved.layer, saved.position) == (chosen["layer"], chosen["position"])
    assert saved.length == pytest.approx(chosen["norm"])
    assert saved.model == result.study.info.name
    assert f"`{directions.FILE}`, `figures/`" in report
    assert chosen["cosine_chosen"] == pytest.approx(1)


def test_a_run_folder_gives_the_same_without_a_model(measured: Measured) -> None:
    result, store, _ = measured
    again = reread(store)
    for name, table in result.tables.items():
        pd.testing.assert_frame_equal(again.tables[name], table)


def test_it_costs_no_more_than_planned(measured: Measured, study: StudyConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "matmul_rate", lambda _: 1e10)
    _, _, backend = measured
    planned = estimate(study)
    more = sum(one.rows for one in planned.later.values())
    assert planned.later.keys() == {"directions", "rivals"}
    assert planned.rows <= backend.rows <= planned.rows + more
    assert planned.flops / 16 < backend.flops <= planned.flops  # it allows for random sets, and few are drawn here
    assert 4 * backend.numbers <= planned.down


# --- what is shown ----------------------------------------------------------------------------------------------------


def shown(measured: Measured, said: str, gate: str = "") -> Result:
    """The measured study, as if this had been said of every rival, with shares from 0 to 1."""

    def changed(name: str, table: pd.DataFrame) -> pd.DataFrame:
        if name in ("direction.csv", "rivals.csv"):
            return table.assign(said=said, gate=gate)
        if name in ("direction_sets.csv", "rival_sets.csv"):
            harm = np.linspace(0, 1, len(table))
            return table.assign(harm=harm, harm_low=harm - 0.1, harm_high=harm + 0.1)
        return table

    result = measured[0]
    return replace(result, tables={name: changed(name, table) for name, table in result.tables.items()})


def test_figures_say_what_was_ruled(measured: Measured) -> None:
    result = shown(measured, "not supported")
    one, _ = show.directions(result)
    assert one.figure is not None
    assert one.figure.get_suptitle().endswith("dot: chosen, held out: not supported")
    _, axis = show.rivals(result)
    assert axis.figure is not None
    (legend,) = axis.figure.legends
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels[0] == "one direction: not supported"
    assert all(label.endswith(": not supported") for label in labels)
    title = axis.figure.get_suptitle().splitlines()[0]
    assert title == show._axis_title(show.carriers(result))


def test_filled_dots_are_those_that_decide(measured: Measured) -> None:
    result = shown(measured, "undecided")
    every = show.carriers(result)
    _, axis = show.rivals(result)
    assert axis.figure is not None
    left = axis.figure.axes[0]
    dots = {
        (float(x), float(y)): line.get_markerfacecolor() != "white"
        for line in left.lines
        for x, y in zip(*line.get_data(), strict=True)
        if line.get_marker() != "None"
    }
    drawn = every[every["direction"] == "nie"].dropna(subset=["harm"])
    assert len(drawn) >= 8
    assert sorted(zip([y for _, y in dots], dots.values(), strict=True)) == sorted(
        zip(drawn["harm"], drawn["decides"], strict=True)
    )
    by_share = dict(zip(drawn["harm"], drawn["values"], strict=True))
    assert all(by_share[y] <= x < 2 * by_share[y] for x, y in dots)


def test_claims_that_swap_as_many_numbers_stand_side_by_side_in_their_own_colours() -> None:
    rows = pd.DataFrame(
        [
            (name, "supported", name, values, way, True, 0.7, 0.6, 0.8)
            for name, values in (("head gate", 1), ("one direction", 1), ("early layers", 50))
            for way in ("nie", "tie")
        ],
        columns=list(AXIS),
    )
    found = {}
    for names in (["one direction", "head gate", "early layers"], ["head gate", "one direction"]):
        axis = axis_figure(rows[rows["rival"].isin(names)], "").axes[0]
        drawn = [line for line in axis.lines if line.get_marker() != "None" and len(line.get_xdata())]
        assert len({float(line.get_xdata()[0]) for line in drawn}) == len(names)
        colours = {text.get_text().split(":")[0]: None for text in axis.figure.legends[0].get_texts()}
        handles = axis.figure.legends[0].legend_handles
        for name, handle in zip(colours, handles, strict=True):
            assert found.setdefault(name, handle.get_color()) == handle.get_color()
    assert len(set(found.values())) == 3


def test_intervals_are_drawn_to_their_ends_in_both_directions() -> None:
    ends = [("head gate", "supported", "a", 3, way, True, 1.6, 1.5, high) for way, high in (("nie", 1.7), ("tie", 1.9))]
    for axis in axis_figure(pd.DataFrame(ends, columns=list(AXIS)), "").axes:
        assert axis.get_ylim()[1] > 1.9


def test_the_longest_verdicts_are_not_cut_off_in_the_legend() -> None:
    names = ("one direction", "harm and refusal", "cross-layer neurons", "early layers", "head gate", LATE_GATE)
    said = "supported, of any edit"
    rows = [(name, said, name, 3, way, True, 0.7, 0.6, 0.8) for name in names for way in ("nie", "tie")]
    figure = axis_figure(pd.DataFrame(rows, columns=list(AXIS)), "")
    figure.draw_without_rendering()
    legend = figure.legends[0].get_window_extent()
    assert len(figure.legends[0].get_texts()) == len(names)
    assert figure.bbox.x0 <= legend.x0 < legend.x1 <= figure.bbox.x1


def test_nothing_is_drawn_where_there_is_nothing_to_carry(measured: Measured) -> None:
    result = shown(measured, "no effect", "no effect")
    sections = [*show.directions(result), *show.rivals(result)]
    assert [section.figure for section in sections] == [None, None]
    assert "no effect" in sections[0].finding


def test_shares_that_are_not_defined_are_not_drawn(measured: Measured) -> None:
    result = shown(measured, "undecided")
    names = ("direction_sets.csv", "rival_sets.csv")
    undefined = {name: result.tables[name].assign(harm=np.nan, harm_low=np.nan, harm_high=np.nan) for name in names}
    assert len(show.rivals(result)) == 2
    assert len(show.rivals(replace(result, tables={**result.tables, **undefined}))) == 1


def test_what_was_not_measured_has_no_rows(measured: Measured) -> None:
    bare = replace(measured[0], tables={})
    assert show.direction_verdicts(bare) == show.rival_verdicts(bare) == []
    assert [section.figure for section in (*show.directions(bare), *show.rivals(bare))] == [None, None]


@pytest.mark.parametrize(
    ("lows", "words"),
    [
        ([0.6, 0.7, 0.6, 0.9], "both directions: 3, few (small: undecided)."),
        ([0.6, 0.4, 0.6, 0.9], "both directions: 10, many (large: supported)."),
        ([0.6, 0.4, 0.6, 0.5], "No set is clear of 50%"),
        ([np.nan] * 4, "No set is clear of 50%"),
    ],
)
def test_the_fewest_that_carry_half_are_named_with_their_verdict(lows: list[float], words: str) -> None:
    every = pd.DataFrame(
        {
            "rival": ["small", "small", "large", "large"],
            "said": ["undecided", "undecided", "supported", "supported"],
            "measure": ["few", "few", "many", "many"],
            "values": [3, 3, 10, 10],
            "harm_low": lows,
        }
    )
    assert words in show._fewest(every)
    named = words.partition(": ")[2].partition(" (")[0]  # a number and what it is
    numbers, _, measure = named.partition(", ")
    title = f"{numbers} numbers at each token carry half of the effect or more: {measure}"
    assert show._axis_title(every) == (
        title if named else "No set of mediators is shown to carry half of the effect in both directions"
    )


# --- planted ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_takes_two_directions_is_not_one(tmp_path: Path) -> None:
    study = written(build(CASES["two-kinds"], 0), tmp_path, 0).model_copy(update={"analyses": ["directions"]})
    backend, store = LocalBackend.load(study.model), Store.create(tmp_path / "run", study.identity())
    result = run_study(study, backend, store)
    assert result.tables["direction.csv"]["said"].tolist()[0] == "not supported"

    lab, layer = prepared_lab(study, backend, store), 9
    discovery = Sample.of(lab, "discovery")
    found = activations(discovery, "layer_output", ["last"])[:, :, layer, 0]
    change = found[:, 1] - found[:, 0]
    words = np.array([int(pair.id.removeprefix("frame")[:2]) % 2 == 0 for pair in discovery.pairs])
    one, two = change.mean(axis=0), [change[words].mean(axis=0), change[~words].mean(axis=0)]
    asked = [Subspace("layer_output", layer, "last", basis=Basis.spanning(basis)) for basis in (one, two)]
    effects = lab.joint([[site] for site in asked], lab.pairs("heldout"))
    shares = np.array([effects.nie.mean(axis=1), effects.tie.mean(axis=1)]) / effects.te.mean()
    assert shares[:, 0].min() < 0.1  # half of either kind opens no gate
    assert shares[:, 1].min() > HALF
