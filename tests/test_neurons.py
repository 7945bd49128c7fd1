"""The search for neurons and gate sets, where neurons add up and what is found follows by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
from fakes import INFO, AdditiveBackend, token_pair

from remote_mediation.analyses import chosen
from remote_mediation.analyses.neurons.ask import analyse, sites
from remote_mediation.analyses.neurons.search import SAMPLE, strengths
from remote_mediation.config import StudyConfig
from remote_mediation.errors import SiteError
from remote_mediation.lab import Lab, Study
from remote_mediation.outcomes import LogitOutcome
from remote_mediation.sites import ModelInfo
from remote_mediation.store import Store
from remote_mediation.study import first_requests
from remote_mediation.summary import UNITS

Weights = dict[tuple[int, int], float]
LAYERS, PAIRS, TE = 6, 16, 10.0
HELD_OUT = "heldout"
GATES: Weights = {(4, 6): 4.0, (4, 45): 2.0, (2, 44): 3.0}
SEARCHES = ["gradient", "windows", "all"]
SMALL = {"random_sets": 20, "exact": 8}


class Searched(NamedTuple):
    lab: Lab
    backend: AdditiveBackend
    tables: dict[str, pd.DataFrame]

    @property
    def search(self) -> pd.DataFrame:
        return self.tables["search.csv"]

    def units(self, analysis: str = UNITS) -> set[tuple[int, int]]:
        found = self.lab.effects.query("analysis == @analysis")
        return {(int(layer), int(unit)) for layer, unit in zip(found["layer"], found["unit_start"], strict=True)}

    def set(self, name: str) -> list[tuple[int, list[int]]]:
        found = self.tables["gates.csv"].query("set == @name")
        return [(row.layer, [int(unit) for unit in row.units.split()]) for row in found.itertuples()]


Search = Callable[..., Searched]


@pytest.fixture
def searched(tmp_path: Path) -> Search:
    """A search in a model whose neurons have these weights, each pair with its own strength."""

    def run(
        planted: Weights,
        search: str | Sequence[str] = "windows",
        *,
        d_ff: int = 64,
        sign: float = 1.0,
        te: float = TE,
        held_out: Callable[[np.ndarray], np.ndarray] | None = None,
        pairs: Sequence[Any] | None = None,
        position: str = "last",
        unseen: Weights | None = None,
        refuses_tasks: Sequence[str] = (),
        **settings: Any,
    ) -> Searched:
        info = replace(INFO, layers=LAYERS, d_ff=d_ff)
        pairs = pairs or [token_pair(f"p{i}", x1=(1, 2, 10 + i, 4, 5)) for i in range(PAIRS)]
        ways = [search] if isinstance(search, str) else list(search)
        config = StudyConfig(
            model="tiny",
            analyses=["neurons"],
            positions={"neurons": [position]},
            neurons={"search": ways, **SMALL, **settings},
            statistics={"resamples": 200},
        )
        study = Study(config, info, LogitOutcome((5,), (6,)), tuple(pairs), ())
        strength = dict(zip((pair.id for pair in pairs), np.linspace(0.8, 1.2, len(pairs)), strict=True))
        weights = {name: sign * by * made(planted, info) for name, by in strength.items()}
        for name, split in study.splits().items():
            if held_out and split == HELD_OUT:
                weights[name] = held_out(weights[name])
        total = {name: sign * by * te for name, by in strength.items()}
        hidden = made(unseen, info) if unseen else None
        backend = AdditiveBackend(weights, total, info, hidden, refuses_tasks=refuses_tasks)
        lab = Lab(study, Store(tmp_path / f"run{len(list(tmp_path.iterdir()))}"), backend)
        lab.measure(first_requests(study, chosen(study.config.analyses)))
        return Searched(lab, backend, analyse(lab, {}).tables)

    return run


def made(planted: Weights, info: ModelInfo) -> np.ndarray:
    weights = np.zeros((info.layers, info.d_ff))
    for (layer, unit), weight in planted.items():
        weights[layer, unit] = weight
    return weights


@pytest.mark.slow
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("search", SEARCHES)
def test_exactly_the_planted_neurons_are_found(searched: Search, search: str, sign: float) -> None:
    found = searched(GATES, search, sign=sign)
    strong = strengths(found.lab.effects.query("analysis == @UNITS"))
    assert {(layer, unit) for layer, unit, _ in strong[strong > 0.05 * TE].index} == set(GATES)
    assert [(layer, unit) for layer, unit, _ in strong.index[:3]] == [(4, 6), (2, 44), (4, 45)]
    assert strong.iloc[0] == pytest.approx(4.0, rel=0.1)
    assert found.set("gates") == [(4, [6, 45])]
    earlier = found.set("earlier")  # windows leave but one neuron of layer 2, fewer than the gate set has
    assert [(layer, len(units), 44 in units) for layer, units in earlier] == [(2, 2, True)] * (search != "windows")


def test_windows_measure_only_where_something_may_be(searched: Search) -> None:
    found = searched(GATES)
    assert found.units() == set(GATES)
    first, *others = found.search.to_dict("records")
    assert (first["sites"], first["pairs"], first["kept"]) == (LAYERS, PAIRS // 2, 2)
    assert [step["kept"] for step in others] == [3, 3, 3]
    assert [step["sites"] for step in others] == [8, 12, 12]


def test_rows_grow_with_the_logarithm_of_the_width(searched: Search) -> None:
    rows = []
    for d_ff in (64, 256, 1024, 4096):
        wide = {(layer, unit * d_ff // 64): weight for (layer, unit), weight in GATES.items()}
        found = searched(wide, d_ff=d_ff, random_sets=1)
        assert found.units() == set(wide)
        rows.append(sum(job.rows for job in found.backend.collected))
    # Four times the width is one more step: 3 windows in 4 parts, 2 directions, the discovery half of the pairs.
    assert np.diff(rows).tolist() == [3 * 4 * 2 * PAIRS // 2] * 3


@pytest.mark.slow
@pytest.mark.parametrize("search", SEARCHES)
def test_heldout_pairs_choose_nothing(searched: Search, search: str) -> None:
    plain = searched(GATES, search)
    other = searched(GATES, search, held_out=lambda weights: 7 - 3 * np.roll(weights, 9, axis=(0, 1)))
    columns = ["step", "sites", "kept", "followed", "missed", "missed_high"]
    pd.testing.assert_frame_equal(plain.search[columns], other.search[columns])
    assert plain.units() == other.units()
    pd.testing.assert_frame_equal(plain.tables["sparsity.csv"], other.tables["sparsity.csv"])
    chosen = ["set", "layer", "position", "size", "units"]
    gates, others = plain.tables["gates.csv"], other.tables["gates.csv"]
    pd.testing.assert_frame_equal(gates[chosen], others[chosen])
    assert not np.allclose(gates["nie"], others["nie"])
    curve = ["size", "discovery"]
    pd.testing.assert_frame_equal(plain.tables["gate_curve.csv"][curve], other.tables["gate_curve.csv"][curve])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("carry", "size"), [(0.2, 1), (0.4, 2), (0.55, 3), (0.65, 4), (0.79, 5), (0.84, 6), (0.89, 7), (0.94, 8), (0.97, 9)]
)
def test_the_smallest_set_that_carries_enough(searched: Search, carry: float, size: int) -> None:
    shares = [5.0, 4.0, 3.0, 2.1, 1.9, 1.3, 1.1, 0.9, 0.7]  # of 20
    places = [(5, 7 * i + 1) for i in range(9)]
    found = searched(dict(zip(places, shares, strict=True)), "all", carry=carry, te=20.0)
    assert found.set("gates") == [(5, sorted(unit for _, unit in places[:size]))]
    assert found.set("mlp") == [(5, list(range(64)))]
    table = found.tables["gates.csv"].set_index("set")
    assert table.loc["gates", "nie_share"] == pytest.approx(sum(shares[:size]) / 20)
    assert table.loc["gates", "tie_share"] == pytest.approx(sum(shares[:size]) / 20)
    assert table.loc["gates", "nie_low"] < table.loc["gates", "nie"] < table.loc["gates", "nie_high"]
    curve = found.tables["gate_curve.csv"].set_index("size")
    expected = [sum(shares[:n]) / 20 for n in curve.index]
    assert curve["discovery"].tolist() == pytest.approx(expected)
    assert curve["heldout"].tolist() == pytest.approx(expected)
    assert len(curve) <= 7 + 3  # powers of two, and a bisection


def test_where_too_little_is_found_all_of_it_is_the_gate_set(searched: Search) -> None:
    many = {(5, unit): 0.1 for unit in range(32, 62)}  # each too weak to mediate, together half of the MLP
    found = searched({(5, 3): 3.0, **many}, te=6.0)
    assert found.units() == {(5, 3)}
    assert found.set("gates") == [(5, [3])]
    assert found.tables["gate_curve.csv"]["discovery"].tolist() == pytest.approx([0.5])


def test_random_sets_are_of_the_gate_sets_size_and_layer_and_differ(searched: Search) -> None:
    found = searched(GATES, "all", random_sets=30)
    sets = found.set("random")
    assert len(sets) == 30
    assert all(layer == 4 and len(set(units)) == 2 and set(units) <= set(range(64)) for layer, units in sets)
    assert len({tuple(units) for _, units in sets}) > 25
    weights = made(GATES, found.backend.info)
    table = found.tables["gates.csv"].query("set == 'random'")
    by = found.tables["gates.csv"].set_index("set").loc["gates", "nie"] / 6
    assert table["nie"].tolist() == pytest.approx([by * weights[4, units].sum() for _, units in sets])


@pytest.mark.slow
def test_an_mlp_that_moves_nothing_has_no_gate_set(searched: Search) -> None:
    found = searched({}, "all")
    assert set(found.tables) == {"search.csv", "sparsity.csv", "mediators.csv"}
    assert set(searched({(4, 6): -4.0}, "all").tables) == {"search.csv", "sparsity.csv", "mediators.csv"}


def test_a_search_cut_short_says_so(searched: Search) -> None:
    strong = {(5, 8 * i + 3): 2.0 + i for i in range(6)}
    found = searched(strong, max_windows=2, te=30.0)
    assert (found.search["kept"] > found.search["followed"]).any()
    assert found.units() < set(strong)
    assert (5, 43) in found.units()  # the strongest windows are followed
    everything = searched(strong, max_windows=6, te=30.0)
    assert everything.search["kept"].tolist() == everything.search["followed"].tolist()
    assert everything.units() == set(strong)


def test_neurons_that_cancel_in_a_window_are_missed_but_not_by_measuring_all(searched: Search) -> None:
    cancel = {**GATES, (1, 8): 2.0, (1, 9): -2.0}
    assert searched(cancel).units() == set(GATES)
    found = searched(cancel, "all")
    assert found.search["kept"].tolist() == [4]
    assert found.units() == {(layer, unit) for layer in range(LAYERS) for unit in range(64)}


@pytest.mark.slow
def test_the_profile_of_measured_neurons(searched: Search) -> None:
    found = searched({(4, 6): 3.0, (4, 45): 1.0, (4, 50): -1.0}, "all").tables["sparsity.csv"].set_index("layer")
    assert found["by"].unique().tolist() == ["measured"]
    assert found.loc[4, ["fewest", "of"]].tolist() == [2, 64]
    assert found.loc[4, "negative_share"] == pytest.approx(0.2)
    # Of 64 values, 62 nothing, 1/4 and 3/4: twice the area between the Lorenz curve and the diagonal.
    assert found.loc[4, "gini"] == pytest.approx((61 * 0.25 + 63 * 0.75) / 64)
    assert np.isnan(found.loc[3, "gini"])


def test_gradients_rank_and_exact_rows_confirm(searched: Search) -> None:
    found = searched(GATES, "gradient")
    screened, first, others = found.search.to_dict("records")
    assert (screened["sites"], screened["kept"]) == (LAYERS * 64, 8)
    assert (first["sites"], first["pairs"], first["kept"]) == (8, PAIRS, 3)
    assert (others["sites"], others["pairs"], others["kept"], others["missed"]) == (8, PAIRS // 2, 0, 0.0)
    assert 0 < others["missed_high"] < LAYERS * 64
    assert set(GATES) < found.units()
    assert found.units().isdisjoint(found.units(SAMPLE))
    assert {(layer, unit) for layer, unit in found.units(SAMPLE)} <= {(a, b) for a in range(6) for b in range(64)}
    splits = found.lab.effects.groupby("analysis")["split"].unique().map(set)
    assert splits[UNITS] == {"discovery", HELD_OUT}
    assert splits[SAMPLE] == {"discovery"}
    assert sum(job.task == "screen" for job in found.backend.collected) == 1
    profile = found.tables["sparsity.csv"].set_index("layer")
    assert profile["by"].unique().tolist() == ["attribution patching"]
    assert profile.loc[4, "fewest"] == 2


@pytest.mark.parametrize("screen", ["atp", "relp", "ig"])
def test_every_screen_ranks_and_is_held_against_what_was_measured(searched: Search, screen: str) -> None:
    found = searched(GATES, "gradient", screen=screen)
    assert set(GATES) < found.units()
    sent = [context.payload for job in found.backend.collected if job.task == "screen" for context in job.contexts]
    assert [("relp" in one, "line" in one) for one in sent] == [(screen == "relp", screen == "ig")]
    agreed = found.tables["screen.csv"].set_index("quantity")
    assert agreed[["component", "screen"]].drop_duplicates().to_numpy().tolist() == [["mlp_neurons", screen]]
    assert agreed["first"].tolist() == agreed["random"].tolist() == [8, 8]
    assert agreed["spearman_first"].tolist() == pytest.approx([1.0, 1.0])
    assert agreed["spearman_random"].isna().all()  # none of the others does anything
    assert agreed["recall"].tolist() == [1.0, 1.0]


def test_a_screen_without_a_rule_for_the_model_is_refused_at_once() -> None:
    info, pair = replace(INFO, recurrent=(0,)), token_pair("p0")
    config = StudyConfig(model="tiny", analyses=["neurons"], neurons={"screen": "relp"})
    with pytest.raises(SiteError, match="no rule for the layers without softmax attention"):
        sites(config, info, pair)
    assert sites(config.model_copy(update={"neurons": config.neurons.model_copy(update={"screen": "ig"})}), info, pair)


def test_a_screen_that_misses_mediators_is_told(searched: Search) -> None:
    found = searched(GATES, "gradient", d_ff=12 * 4, unseen={(4, 6): 1.0, (4, 45): 1.0}, exact=144)
    agreed = found.tables["screen.csv"].set_index("quantity").loc["nie"]
    assert agreed["recall"] == pytest.approx(1 / 3)  # one of three is among the first
    assert np.isnan(agreed["spearman_random"])  # the estimates of the others are all 0


def test_what_gradients_do_not_see_is_estimated_from_a_sample(searched: Search) -> None:
    found = searched(GATES, "gradient", d_ff=12 * 4, unseen={(4, 6): 1.0, (4, 45): 1.0}, exact=144)
    last = found.search.iloc[-1]
    assert (last["sites"], last["kept"]) == (144, 2)  # all the others
    assert last["missed"] == pytest.approx(2.0)
    assert 2 < last["missed_high"] < 10


def test_only_the_layers_asked_for_are_searched(searched: Search) -> None:
    for search in SEARCHES:
        found = searched(GATES, search, layers=[2, 3], exact=80)
        assert {layer for layer, _ in found.units() | found.units(SAMPLE)} <= {2, 3}
        assert found.set("gates") == [(2, [44])]


def test_where_gradients_are_refused_the_next_way_is_gone(searched: Search) -> None:
    found = searched(GATES, ["gradient", "windows"], refuses_tasks=["screen"])
    pd.testing.assert_frame_equal(found.search, searched(GATES, "windows").search)
    assert found.units() == set(GATES)


def test_where_no_way_is_left_each_refusal_is_named(searched: Search) -> None:
    with pytest.raises(
        SiteError, match=r"could not be searched \(gradient: screen is not allowed\); allow another way"
    ):
        searched(GATES, "gradient", refuses_tasks=["screen"])


@pytest.mark.parametrize("search", SEARCHES)
def test_pairs_that_lack_the_position_count_for_nothing(searched: Search, search: str) -> None:
    short = [token_pair(f"p{i}", x1=(1, 2, 10 + i, 4, 5)) for i in range(PAIRS)]
    long = [token_pair(f"q{i}", x0=(1, 2, 3, 6, 4, 5), x1=(1, 2, 10 + i, 6, 4, 5), after=3) for i in range(PAIRS)]
    found = searched(GATES, search, pairs=[*short, *long], position="after_edit[1]")
    effects = found.lab.effects.query("analysis != 'checks'")
    assert set(effects["pair_id"]) == {pair.id for pair in long}
    assert found.search["pairs"].max() <= PAIRS
    gates = found.tables["gates.csv"].set_index("set").loc["gates"]
    assert gates["nie_share"] == pytest.approx(0.6)
    assert found.set("gates") == [(4, [6, 45])]
