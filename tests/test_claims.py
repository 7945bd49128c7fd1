"""The claims' rules, each both ways, on effects whose shares are known by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from remote_mediation.analyses.claims import verdicts
from remote_mediation.analyses.claims.verdicts import Bench, Beside, Both, Effect, Read, Sparse
from remote_mediation.sites import Site, band, thirds

PAIRS = 24
CLUSTERS = np.array([f"c{pair}" for pair in range(PAIRS)])
TE = 6 + np.linspace(-0.5, 0.5, PAIRS)
NOISE = 0.02 * np.cos(np.arange(PAIRS))  # sums to nearly 0, and is not in step with TE


def bench(te: np.ndarray = TE, placebo: np.ndarray | None = 0.1 * TE, layers: int = 12, pairs: int = PAIRS) -> Bench:
    none = np.full(PAIRS, np.nan)
    total = Both(te[:pairs], (none if placebo is None else placebo)[:pairs])
    return Bench(total, CLUSTERS[:pairs], layers, seed=0, resamples=199)


def both(harm: float, placebo: float = 0.0, on: Bench | None = None) -> Both:
    """Effects of these shares of TE, with a little noise."""
    total = (on or bench()).total
    return Both(*(share * te + NOISE[: len(te)] for share, te in zip((harm, placebo), total, strict=True)))


def effect(nie: float, tie: float, placebo: float = 0.0, on: Bench | None = None) -> Effect:
    return Effect(both(nie, placebo, on), both(tie, placebo, on))


def test_thirds_give_the_rest_to_the_earlier_ones() -> None:
    assert thirds(12) == (range(4), range(4, 8), range(8, 12))
    assert thirds(10) == (range(4), range(4, 7), range(7, 10))
    assert thirds(11) == (range(4), range(4, 8), range(8, 11))
    for layers in range(1, 40):
        early, middle, late = thirds(layers)
        assert [*early, *middle, *late] == list(range(layers))
        assert (early.stop, late.start) == (int(np.ceil(layers / 3)), int(np.ceil(2 * layers / 3)))


def test_a_band_is_one_component_of_several_layers() -> None:
    assert band("mlp_output", range(2, 4), "all") == [
        Site("mlp_output", 2, "all"),
        Site("mlp_output", 3, "all"),
    ]


@pytest.mark.parametrize(
    ("te", "placebo", "said"),
    [
        (TE, 0.1 * TE, "supported"),
        (TE, TE + NOISE, "not about harm"),
        (TE, 0.95 * TE, "supported"),
        (TE, TE + 1, "not about harm"),
        (TE - TE.mean() + NOISE, 0.1 * TE, "no effect"),
        (TE, None, "placebo not tested: supported"),
        (-TE, -0.1 * TE, "supported"),
        (-TE, -TE - 1, "not about harm"),
    ],
)
def test_the_gate_comes_first(te: np.ndarray, placebo: np.ndarray | None, said: str) -> None:
    on = bench(te, placebo)
    found = verdicts.late(on, effect(0.9, 0.9, on=on), effect(0.1, 0.1, on=on), reads_edit=False)
    assert found.said == said
    assert (found.verdict == "not tested") == (said in ("not about harm", "no effect"))
    assert len(found.measures) == 4  # the numbers stand there whatever the gate says


def test_a_placebo_with_another_outcome_is_not_compared() -> None:
    on = Bench(Both(TE, TE), CLUSTERS, 12, seed=0, resamples=999, comparable=False)
    found = verdicts.late(on, effect(0.9, 0.9, 0.9, on), effect(0.1, 0.1, on=on), reads_edit=False)
    assert found.said == "placebo not comparable: supported"


def test_claims_are_about_the_refusal_where_harm_makes_the_model_refuse() -> None:
    assert _late(0.9, 0.9).name == "the harmful answer is decided in late layers"
    on = bench(-TE, -0.1 * TE)
    refusing = verdicts.late(on, effect(0.9, 0.9, on=on), effect(0.1, 0.1, on=on), reads_edit=False)
    assert refusing.name == "the refusal is decided in late layers"
    nothing = bench(TE - TE.mean() + NOISE)
    found = verdicts.late(nothing, effect(0.9, 0.9), effect(0.1, 0.1), reads_edit=False)
    assert found.name == "the outcome is decided in late layers"


def _late(nie: float, tie: float, arrived: float = 0.1, placebo: float = 0.0, **of: int) -> verdicts.Claim:
    on = bench(**of)
    decided, before = effect(nie, tie, placebo, on), effect(arrived, arrived, on=on)
    return verdicts.late(on, decided, before, reads_edit=False)


@pytest.mark.parametrize(
    ("nie", "tie", "verdict"),
    [
        (0.9, 0.9, "supported"),
        (0.9, 0.6, "undecided"),
        (0.6, 0.9, "undecided"),
        (0.1, 0.1, "not supported"),
        (0.1, 0.4, "undecided"),
        (0.4, 0.1, "undecided"),
        (0.5, 0.5, "undecided"),
    ],
)
def test_late(nie: float, tie: float, verdict: str) -> None:
    found = _late(nie, tie)
    assert found.verdict == verdict
    assert [one.harm.value for one in found.measures[:2]] == pytest.approx([nie, tie], abs=0.01)


@pytest.mark.parametrize(
    ("arrived", "when"), [(0.1, "arrives late"), (0.9, "arrives earlier and acts late"), (0.5, "")]
)
def test_when_it_arrives_is_added(arrived: float, when: str) -> None:
    found = _late(0.9, 0.9, arrived)
    assert found.why.partition(": it ")[2] == when
    assert [one.harm.value for one in found.measures[2:]] == pytest.approx([1 - arrived] * 2, abs=0.01)


def test_what_any_edit_does_is_not_specific_to_harm() -> None:
    on = bench(placebo=0.5 * TE)

    def late(placebo: float) -> verdicts.Claim:
        return verdicts.late(on, effect(0.9, 0.9, placebo, on), effect(0.1, 0.1, on=on), reads_edit=False)

    assert late(0.0).said == "supported"
    assert late(0.9).said == "supported, of any edit"
    found = late(0.4).measures[0]
    assert late(0.4).said == "supported"  # more of harm goes this way
    assert (found.beta_harm, found.beta_placebo) == pytest.approx((0.9, 0.4), abs=0.05)
    assert found.excess.value == pytest.approx(0.5, abs=0.05)
    assert found.common.value == pytest.approx(0.2, abs=0.01)


def test_the_slope_of_a_placebo_that_does_nothing_is_that_of_noise() -> None:
    """All of it goes through the mediator: by the rule the claim is one of any edit, `common` shows otherwise."""
    nothing = 20 * NOISE
    on = bench(placebo=nothing)
    through = Both(0.9 * TE + NOISE, nothing)
    found = verdicts.late(on, Effect(through, through), effect(0.1, 0.1, on=on), reads_edit=False)
    assert found.measures[0].beta_placebo == pytest.approx(1)
    assert not found.measures[0].excess.low > 0
    assert found.said == "supported, of any edit"
    assert abs(found.measures[0].common.value) < 0.05


def test_no_takes_fifteen_components() -> None:
    assert _late(0.1, 0.1, pairs=15).verdict == "not supported"
    few = _late(0.1, 0.1, pairs=14)
    assert few.verdict == "undecided"
    assert "14 held-out components are too few to say no" in few.why
    assert _late(0.9, 0.9, pairs=14).verdict == "supported"


def test_places_take_six_layers_and_an_answer_outside_the_edit() -> None:
    assert _late(0.9, 0.9, layers=6).verdict == "supported"
    assert _late(0.9, 0.9, layers=5).said == "not tested"
    read = verdicts.late(bench(), effect(0.9, 0.9), effect(0.1, 0.1), reads_edit=True)
    assert read.said == "not tested"
    assert "token of the edit" in read.why


PARTS = ("layers 1-11", "layers 4-11", "layers 8-11")


def _mlp(whole: float, parts: Sequence[tuple[float, float]]) -> verdicts.Claim:
    differences: Mapping[str, Effect] = {
        verdicts.ALL_LAYERS: effect(whole, whole),
        **{name: effect(*part) for name, part in zip(PARTS, parts, strict=True)},
    }
    return verdicts.mlp_not_attention(bench(), differences, {"late MLPs, joint": effect(0.8, 0.8)}, False)


@pytest.mark.parametrize(
    ("whole", "parts", "verdict"),
    [
        (0.5, [(0.5, 0.5), (0.4, 0.4), (0.3, 0.3)], "supported"),
        (0.5, [(0.5, 0.5), (0.4, 0.4), (0.3, 0.0)], "supported"),
        (0.5, [(0.5, 0.5), (0.4, 0.4), (0.3, -0.3)], "undecided"),
        (0.5, [(0.5, -0.5), (0.4, 0.4), (0.3, 0.3)], "undecided"),
        (-0.5, [(-0.5, -0.5), (-0.4, -0.4), (-0.3, 0.0)], "not supported"),
        (-0.5, [(-0.5, -0.5), (-0.4, 0.4), (-0.3, 0.0)], "undecided"),
        (0.0, [(0.5, 0.5), (0.4, 0.4), (0.3, 0.3)], "undecided"),
    ],
)
def test_mlp_not_attention(whole: float, parts: list[tuple[float, float]], verdict: str) -> None:
    found = _mlp(whole, parts)
    assert found.verdict == verdict
    assert len(found.measures) == 10


def test_the_layers_that_disagree_are_named() -> None:
    assert "below 0 for MLPs minus attention, layers 8-11, TIE" in _mlp(0.5, [(0.5, 0.5), (0.4, 0.4), (0.3, -0.3)]).why


@pytest.mark.parametrize(("opposite", "trifle"), [(-0.03, True), (-0.3, False)])
def test_a_trifle_that_opposes_is_called_one(opposite: float, trifle: bool) -> None:
    found = _mlp(0.5, [(0.5, 0.5), (opposite, opposite), (0.3, 0.3)])
    assert found.verdict == "undecided"
    assert ("each less than 5% of TE" in found.why) == trifle


def _sparse(
    size: int | None,
    chosen: tuple[float, float],
    most: tuple[float, float],
    reaching: int = 0,
    drawn: bool = True,
    likeness: float = 0.9,
) -> verdicts.Claim:
    found = Sparse(
        neurons=1000,
        band=effect(0.9, 0.9),
        most=effect(*most),
        size=size,
        chosen=None if size is None else effect(*chosen),
        beside=Beside(reaching, 200, likeness) if drawn else None,
    )
    return verdicts.sparse_gate(bench(), found)


@pytest.mark.parametrize(
    ("size", "chosen", "most", "reaching", "verdict"),
    [
        (10, (0.8, 0.8), (0.8, 0.8), 0, "supported"),
        (10, (0.8, 0.8), (0.8, 0.8), 2, "supported"),
        (10, (0.8, 0.8), (0.8, 0.8), 3, "undecided"),
        (10, (0.8, 0.3), (0.8, 0.8), 0, "undecided"),
        (10, (0.3, 0.8), (0.8, 0.8), 0, "undecided"),
        (11, (0.8, 0.8), (0.8, 0.8), 0, "undecided"),
        (11, (0.8, 0.8), (0.8, 0.3), 0, "not supported"),
        (11, (0.8, 0.8), (0.3, 0.8), 0, "not supported"),
        (100, (0.8, 0.8), (0.6, 0.6), 0, "not supported"),
        (10, (0.8, 0.4), (0.6, 0.6), 0, "undecided"),
        (None, (0.0, 0.0), (0.6, 0.6), 0, "not supported"),
        (None, (0.0, 0.0), (0.1, 0.1), 0, "not supported"),
    ],
)
def test_sparse_gate(
    size: int | None,
    chosen: tuple[float, float],
    most: tuple[float, float],
    reaching: int,
    verdict: str,
) -> None:
    assert _sparse(size, chosen, most, reaching).verdict == verdict


@pytest.mark.parametrize(
    ("size", "most", "deciding", "why"),
    [
        (10, (0.8, 0.8), "first 10 neurons", "do as much"),
        (11, (0.3, 0.8), "first 10 neurons (1%)", "the first 1% stay below half of TE by NIE"),
        (11, (0.8, 0.3), "first 10 neurons (1%)", "the first 1% stay below half of TE by TIE"),
        (11, (0.3, 0.3), "first 10 neurons (1%)", "the first 1% stay below half of TE by NIE and TIE"),
        (100, (0.6, 0.6), "first 10 neurons (1%)", "the first 1% stay below 80% of it"),
        (11, (0.8, 0.8), "first 11 neurons", "neither rule is met"),
        (None, (0.8, 0.8), "first 10 neurons (1%)", "neither rule is met"),
    ],
)
def test_a_gate_s_verdict_rests_on_the_set_that_decides_it(
    size: int | None, most: tuple[float, float], deciding: str, why: str
) -> None:
    found = _sparse(size, (0.8, 0.8), most)
    assert [(one.name, one.direction) for one in found.deciding] == [(deciding, "nie"), (deciding, "tie")]
    assert found.why.endswith(why)
    names = [one.name for one in found.measures]
    others = {"first 10 neurons (1%)", verdicts.LATE_MLPS, *([f"first {size} neurons"] if size else [])}
    assert len(names) == 2 * len(set(names))
    assert set(names) == others


def test_without_random_sets_a_gate_is_not_supported() -> None:
    assert _sparse(10, (0.8, 0.8), (0.8, 0.8), drawn=False).verdict == "undecided"


def test_redundancy_and_overshoot_are_notes() -> None:
    assert "redundant: INT is -40%" in _sparse(10, (1.0, 0.6), (1.0, 0.6)).why
    assert "overshoots" in _sparse(10, (1.2, 1.1), (1.2, 1.1)).why
    assert "overshoots" not in _sparse(10, (1.0, 1.0), (1.0, 1.0)).why
    assert _sparse(10, (0.9, 0.8), (0.9, 0.8)).why.endswith(
        "0 of 200 random sets, whose change is 0.90 times as large, do as much"
    )


def test_unmatched_random_sets_are_noted() -> None:
    assert _sparse(10, (0.9, 0.8), (0.9, 0.8), likeness=0.79).why.endswith("are 80% as large")


def _read(by_layer: Sequence[float], embedding: float) -> Read:
    """Accuracies, errors spread evenly over the prompts."""
    prompts = np.arange(2 * PAIRS)

    def right(accuracy: float) -> np.ndarray:
        return (np.floor((prompts + 1) * accuracy) > np.floor(prompts * accuracy)).astype(float).reshape(PAIRS, 2)

    return Read(np.array([right(one) for one in by_layer]), right(embedding))


NOTHING = Read(np.full((4, PAIRS, 2), np.nan), np.full((PAIRS, 2), np.nan))


def _understood(by_layer: Sequence[float], embedding: float, acting: Sequence[float], layer: int = 1) -> verdicts.Claim:
    acts = [both(share) for share in acting]
    shares = [bench().share(one.harm, bench().total.harm) for one in acts]
    return verdicts.understood(bench(), layer, _read(by_layer, embedding), NOTHING, acts[layer], shares)


@pytest.mark.parametrize(
    ("by_layer", "embedding", "acting", "verdict"),
    [
        ([0.9, 1.0, 1.0, 1.0], 0.6, [0.0, 0.0, 0.5, 0.9], "supported"),
        ([0.9, 1.0, 1.0, 1.0], 1.0, [0.0, 0.0, 0.5, 0.9], "undecided"),
        ([0.9, 1.0, 1.0, 1.0], 0.6, [0.0, 0.2, 0.5, 0.9], "undecided"),
        ([0.5, 0.6, 0.5, 0.5], 0.6, [0.0, 0.0, 0.0, 0.9], "not supported"),
        ([0.5, 0.6, 0.9, 0.9], 0.6, [0.0, 0.0, 0.0, 0.9], "undecided"),
        ([0.5, 0.6, 0.9, 0.9], 0.6, [0.0, 0.0, 0.5, 0.9], "not supported"),
    ],
)
def test_understood(by_layer: list[float], embedding: float, acting: list[float], verdict: str) -> None:
    assert _understood(by_layer, embedding, acting).verdict == verdict


def test_words_that_give_it_away_are_named() -> None:
    assert "the words give it away" in _understood([1.0] * 4, 1.0, [0.0, 0.0, 0.5, 0.9]).why


def test_a_layer_acts_where_all_later_ones_do() -> None:
    def acting(*values: float) -> int | None:
        return verdicts.first_acting([bench().share(both(value).harm, TE) for value in values])

    assert acting(0.0, 0.5, 0.0, 0.5, 0.9) == 3
    assert acting(0.2, 0.5, 0.9) == 0
    assert acting(0.2, 0.5, 0.0) is None


@pytest.mark.parametrize(
    ("own", "handed", "middle", "verdict"),
    [
        ((0.9, 0.9), 0.5, 4, "supported"),
        ((0.9, 0.9), 0.1, 4, "not supported"),
        ((0.9, 0.9), 0.25, 4, "undecided"),
        ((0.9, 0.4), 0.5, 4, "not tested"),
        ((0.4, 0.9), 0.5, 4, "not tested"),
        ((0.9, 0.9), 0.5, 1, "not tested"),
    ],
)
def test_handed_on(own: tuple[float, float], handed: float, middle: int, verdict: str) -> None:
    through = verdicts.Handed(both(handed), both(0.3), both(0.2))
    found = verdicts.handed_on(bench(), effect(*own), through, middle)
    assert found.verdict == verdict
    shares = [handed, *own, 0.3, 0.2, handed - 0.2]
    assert [one.harm.value for one in found.measures] == pytest.approx(shares, abs=0.01)


@pytest.mark.parametrize(
    ("others", "said"),
    [
        (0.1, "supported"),
        (0.5, "supported, as much through attention"),
        (0.9, "supported, more through attention"),
    ],
)
def test_attention_that_hands_on_as_much_is_named(others: float, said: str) -> None:
    through = verdicts.Handed(both(0.5), both(0.3), both(others))
    found = verdicts.handed_on(bench(), effect(0.9, 0.9), through, 4)
    assert found.said == said
    assert f"through random attention modules {others:.0%}" in found.why


def test_a_control_takes_nothing_from_what_is_not_supported() -> None:
    through = verdicts.Handed(both(0.1), both(0.3), both(0.5))
    assert verdicts.handed_on(bench(), effect(0.9, 0.9), through, 4).said == "not supported"
