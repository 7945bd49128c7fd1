"""What the claims are put to: sizes and random sets of neurons, the readable layer, held modules, choices, tables."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from remote_mediation.analyses.claims import ask, handed, show, sparse, understanding
from remote_mediation.analyses.claims.figures import SIGNS, claims_figure, specification_figure
from remote_mediation.analyses.claims.specification import (
    DIVISIONS,
    RANDOM,
    SPECIFICATION_COLUMNS,
    Compared,
    specification,
)
from remote_mediation.analyses.claims.verdicts import ALL_LAYERS, Both, Claim, Effect, Measure
from remote_mediation.intervals import Interval
from remote_mediation.sites import Site

PAIRS = 20
CLUSTERS = np.array([f"c{pair // 2}" for pair in range(PAIRS)])


def test_the_grid_has_powers_of_two_small_parts_and_all() -> None:
    assert sparse.grid(10_000) == sorted(
        {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 10, 100, 500, 10_000}
    )
    assert sparse.grid(5) == [1, 2, 4, 5]


SIZES = [1, 2, 4, 8, 16]


@pytest.mark.parametrize(
    ("nie", "tie", "size"),
    [
        ([0.1, 0.8, 0.9, 1.2, 1.0], [0.1, 0.8, 0.9, 1.2, 1.0], 2),
        ([0.1, 0.8, 0.9, 1.2, 1.0], [0.1, 0.7, 0.9, 1.2, 1.0], 4),  # both directions
        ([0.1, 0.9, 0.7, 1.2, 1.0], [0.1, 0.9, 0.9, 1.2, 1.0], 8),  # it has to stay there
        ([0.1, 0.9, 1.2, 0.5, 1.0], [0.1, 0.9, 1.2, 0.5, 1.0], 2),  # but only up to the peak
        ([0.1, 0.2, 0.3, 0.5, 0.7], [0.1, 0.2, 0.3, 0.5, 0.7], None),
        ([0.9, 0.9, 0.9, 0.9, 1.0], [0.9, 0.9, 0.9, 0.9, 1.0], 1),
    ],
)
def test_fewest(nie: list[float], tie: list[float], size: int | None) -> None:
    assert sparse.fewest(SIZES, np.array([nie, tie]).T) == size


def test_random_sets_match_layer_and_change() -> None:
    rng = np.random.default_rng(0)
    changes = rng.exponential(size=(3, 200))
    chosen = [(0, 5), (2, 7), (2, 9), (2, 11)]
    drawn = [sparse.matched(chosen, changes, rng) for _ in range(20)]
    for one in drawn:
        assert sorted(layer for layer, _ in one) == [0, 2, 2, 2]
        assert len(set(one)) == 4
        assert not set(one) & set(chosen)
        assert sum(changes[at] for at in one) == pytest.approx(sum(changes[at] for at in chosen), rel=0.2)
    assert len(set(map(tuple, drawn))) > 10


def test_the_nearest_of_the_drawn_half_is_taken() -> None:
    changes = np.array([[1.0, 1.1, 9.0, 9.1, 9.2, 9.3, 9.4, 9.5, 9.6]])
    found = [sparse.matched([(0, 0)], changes, np.random.default_rng(seed))[0] for seed in range(60)]
    assert 15 < found.count((0, 1)) < 45  # whenever it is in the half
    assert set(found) - {(0, 1)} <= {(0, 2), (0, 3), (0, 4), (0, 5), (0, 6)}


def test_neurons_of_a_layer_are_one_site() -> None:
    ranked = [(5, 3), (4, 9), (5, 1), (4, 2)]
    assert sparse.first(ranked, 3, "all") == [
        Site("mlp_neurons", 4, "all", (9,)),
        Site("mlp_neurons", 5, "all", (1, 3)),
    ]


def test_the_readable_layer_is_the_best_that_does_not_act() -> None:
    accuracies = np.array([0.7, 0.9, 0.9, 1.0])

    def chosen(*shares: tuple[float, float]) -> int:
        return understanding.choose(accuracies, [Interval(20, 10, value, -high, high, "") for value, high in shares])

    silent, maybe, acts = (0.0, 0.01), (0.04, 0.06), (0.5, 0.6)
    assert chosen(silent, silent, silent, acts) == 1
    assert chosen(silent, acts, silent, acts) == 2
    assert chosen(silent, maybe, maybe, acts) == 0
    assert chosen(maybe, acts, maybe, acts) == 2
    assert chosen(acts, acts, acts, acts) == 3
    assert chosen(*[(np.nan, np.nan)] * 4) == 3


def test_a_component_is_read_by_a_probe_that_has_not_seen_it() -> None:
    rng = np.random.default_rng(1)
    features = rng.normal(size=(PAIRS, 2, 3, 16))
    features[:, 1, 1] += 3  # harm is written in one direction at place 1
    signs = np.where(np.arange(PAIRS) // 2 % 2, 1.0, -1.0)  # and as a word of its component at place 2
    own = np.eye(16)[np.arange(PAIRS) // 2]
    features[:, :, 2] = own[:, None] * np.array([-1.0, 1.0])[None, :, None] * signs[:, None, None]
    found = understanding.leave_one_out(features, CLUSTERS)
    assert found[1] > 0.95
    assert abs(found[0] - 0.5) < 0.25
    assert found[2] <= 0.5  # what only its own component shows cannot be learnt from the others


def test_other_modules_are_attention_after_the_early_third() -> None:
    sets = handed.random_sets(12, 4, np.random.default_rng(0))
    assert len(sets) == handed.RANDOM_SETS
    for one in sets:
        assert len({(site.component, site.layer) for site in one}) == 4
        assert all(site.layer >= 4 for site in one)
        assert {site.component for site in one} == {"attention_output"}  # a gate among late MLPs would stop all
    assert len(set(map(tuple, sets))) > 1


def test_layer_sets_begin_after_each_part() -> None:
    assert ask.layer_sets(12) == {
        ALL_LAYERS: range(12),
        "layers 1 to 11": range(1, 12),
        "layers 4 to 11": range(4, 12),
        "layers 8 to 11": range(8, 12),
    }
    assert list(ask.layer_sets(2)) == [ALL_LAYERS, "layers 1 to 1"]


def _compared(share: float, spread: float = 0.0) -> Compared:
    te = -5 + np.linspace(-0.5, 0.5, PAIRS)
    noise = np.repeat(np.where(np.arange(PAIRS // 2) % 2, 1.0, -1.0), 2) * spread
    both = Both(share * te + noise + 0.01 * np.cos(np.arange(PAIRS)), np.full(PAIRS, np.nan))
    return Compared({ALL_LAYERS: Effect(both, both)}, te, CLUSTERS)


@pytest.mark.parametrize(
    ("share", "spread", "says"),
    [(0.5, 0.0, "positive"), (-0.5, 0.0, "negative"), (0.0, 3.0, "unclear")],
)
def test_choices_are_counted(share: float, spread: float, says: str) -> None:
    of = _compared(share, spread)
    table = specification({"heldout": of, "all": of}, lambda: np.random.default_rng(0), 199)
    assert list(table) == list(SPECIFICATION_COLUMNS)
    assert set(table["pairs"]) == {"heldout", "all", RANDOM}
    assert len(table) == 6
    once, often = table[table["pairs"] != RANDOM], table[table["pairs"] == RANDOM]
    assert (once[says] == 1).all()
    assert (often[says] > 1.8 * DIVISIONS).all()
    for counts, total in ((once, 1), (often, 2 * DIVISIONS)):
        assert (counts[["positive", "negative", "unclear"]].sum(axis=1) == total).all()
    assert often["share"].to_numpy() == pytest.approx(share, abs=0.15)


def _interval(value: float) -> Interval:
    return Interval(20, 10, value, value - 0.1, value + 0.1, "")


_NO_PAIRS = Both(np.array([]), np.array([]))


def _tables() -> tuple[pd.DataFrame, pd.DataFrame]:
    deciding = tuple(
        Measure("W", name, "TE", _interval(0.9), _interval(0.2), 0.9, 0.2, _interval(0.7), _interval(0.1), _NO_PAIRS)
        for name in ("nie", "tie")
    )
    beside = (
        Measure("A", "nie", "TE", _interval(0.5), _interval(0.4), 0.5, 0.4, _interval(0.1), _interval(0), _NO_PAIRS),
    )
    claim = Claim(1, "it is late", "", "supported", False, "because", deciding, beside)
    claims = pd.DataFrame([ask._claim_row(claim)])[list(ask.CLAIM_COLUMNS)]
    return claims, pd.DataFrame(ask._set_rows([claim]))[list(ask.SET_COLUMNS)]


def test_the_small_table_has_harm_beside_placebo() -> None:
    claims, sets = _tables()
    (row,) = show.verdicts_of(claims, sets)
    assert row[:5] == (
        "claim 1",
        "1. it is late",
        "90% [80%, 100%], β 0.9; 90% [80%, 100%], β 0.9",
        "20% [10%, 30%], β 0.2; 20% [10%, 30%], β 0.2",
        "supported, of any edit",
    )
    assert (row.short, row.why) == ("late layers", "because")
    assert show.reasons_table(claims).rows == [("1. it is late", "supported, of any edit", "because")]
    assert [line[1] for line in show.measures_table(sets).rows] == ["W, NIE", "W, TIE", "A, NIE"]
    assert show.measures_table(sets).rows[0][-2:] == ("0.7 [0.6, 0.8]", "10% [0%, 20%]")


def test_what_decides_is_drawn_with_the_placebo_hollow_and_grey_and_the_bar_of_the_claim() -> None:
    claims, sets = _tables()
    axis = claims_figure(sets, claims).axes[0]
    drawn = {line.get_label(): line for line in axis.lines}
    assert [text.get_text() for text in axis.get_yticklabels()] == ["1. W, NIE", "1. W, TIE"]  # `A` decides nothing
    assert drawn["harm"].get_xdata() == pytest.approx([0.9, 0.9])
    assert drawn["placebo's effect, over the TE of harm"].get_xdata() == pytest.approx([0.1, 0.1])  # of harm's TE
    assert drawn["harm has to lie above"].get_xdata() == pytest.approx([2 / 3, 2 / 3])
    assert not len(drawn["harm has to lie below"].get_xdata())
    assert drawn["placebo's effect, over the TE of harm"].get_markerfacecolor() == "white"
    assert (
        drawn["harm"].get_markerfacecolor()
        == drawn["harm"].get_color()
        != drawn["placebo's effect, over the TE of harm"].get_color()
    )


def test_what_is_read_and_must_not_act_yet_is_drawn_with_its_own_bar() -> None:
    claims, sets = _tables()
    sets = sets.assign(number=4)
    axis = claims_figure(sets, claims.assign(number=4)).axes[0]
    drawn = {line.get_label(): line for line in axis.lines}
    assert [text.get_text() for text in axis.get_yticklabels()] == ["4. W, NIE", "4. W, TIE", "4. A, NIE"]
    assert drawn["harm has to lie above"].get_xdata() == pytest.approx([0, 0])
    assert drawn["harm has to lie below"].get_xdata() == pytest.approx([0.05])


def test_a_number_on_which_no_verdict_rests_is_marked() -> None:
    claims, sets = _tables()
    axis = claims_figure(sets, claims.assign(verdict="not tested")).axes[0]
    assert [text.get_text() for text in axis.get_yticklabels()] == [
        "1. W, NIE (not tested)",
        "1. W, TIE (not tested)",
    ]


def test_shares_of_several_sets_are_named() -> None:
    claims, sets = _tables()
    two = pd.concat([sets[:2], sets[:2].assign(measure="V", harm=0.5, harm_low=0.4, harm_high=0.6)], ignore_index=True)
    (row,) = show.verdicts_of(claims, two)
    assert row.harm == (
        "W: 90% [80%, 100%], β 0.9; 90% [80%, 100%], β 0.9; V: 50% [40%, 60%], β 0.9; 50% [40%, 60%], β 0.9"
    )


def test_a_share_that_is_undefined_beside_that_of_harm_is_the_placebo_s() -> None:
    _, sets = _tables()
    why = "undefined: the interval of the total, -1 to 1, spans 0"
    notes = list(map(str, show.measures_table(sets.assign(placebo=np.nan, reason=why)).notes))
    assert notes[-1] == f"placebo: {why}"
    notes = list(map(str, show.measures_table(sets.assign(harm=np.nan, reason=why)).notes))
    assert notes[-1] == why
    assert list(map(str, show.measures_table(sets.assign(reason="no spread")).notes))[-1] == "no spread"


def test_choices_are_shown() -> None:
    of = _compared(0.5)
    found = specification({"discovery": of, "heldout": of, "all": of}, lambda: np.random.default_rng(0), 199)
    table = show.specification_table(found)
    assert len(table.rows) == 8
    assert table.rows[3][-3:] == (str(2 * DIVISIONS), "0", "0")
    figure = specification_figure(found)
    assert isinstance(figure, Figure)
    dots = [line for line in figure.axes[0].lines if line.get_label() == "held out"]
    assert dots[0].get_xdata() == pytest.approx([0.5], abs=0.01)
    own = {line.get_color() for axis in figure.axes[:2] for line in axis.lines if line.get_marker() != "None"}
    assert len(own) == 4
    assert not own & set(SIGNS.values())  # one colour does not mean two things
    assert sum(bar.get_width() for bar in figure.axes[2].patches) == pytest.approx(1)
