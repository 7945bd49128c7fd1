"""Verdicts on made-up effects, where what holds is known because we wrote it down."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import pytest

from remote_mediation.analyses.neurons.ask import mediators
from remote_mediation.config import StatisticsSettings
from remote_mediation.effects import EFFECT_COLUMNS
from remote_mediation.summary import SUMMARY_COLUMNS, UNITS, Summary, summarise, total_effect

LAYERS, PAIRS = 6, 16
BY = StatisticsSettings(resamples=200)
NONE, EARLY, LATE = (0.0,) * 6, (0.7, 0.3, 0.0, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 0.0, 0.3, 0.7)


class Made:
    """Effects of `PAIRS` pairs, each its own cluster unless there are fewer, every other one held out."""

    def __init__(self, te: float = 4.0, spread: float = 0.2, clusters: int = PAIRS) -> None:
        self._noise = np.random.default_rng(0)
        self._spread, self._clusters = spread, clusters
        self.te = self._noisy(te)
        self._rows: list[dict[str, object]] = []

    def _noisy(self, mean: float) -> np.ndarray:
        return mean + self._spread * self._noise.normal(size=PAIRS)

    def add(
        self,
        analysis: str,
        component: str,
        layer: int,
        share: float,
        heldout: float | None = None,
        *,
        position: str = "last",
        unit: int | None = None,
    ) -> None:
        """A site whose NIE and TIE are this share of TE, and on held-out pairs perhaps another."""
        for pair in range(PAIRS):
            split = ("discovery", "heldout")[pair % 2]
            part = share if heldout is None or split == "discovery" else heldout
            nie, tie = (part * self.te[pair] + 0.05 * self._noise.normal() for _ in range(2))
            te, cluster = self.te[pair], f"c{pair % self._clusters}"
            self._rows.append(
                {
                    **{"pair_id": f"p{pair}", "cluster": cluster, "split": split, "analysis": analysis},
                    **{"component": component, "layer": layer, "position": position, "unit_start": unit},
                    **{"unit_stop": None if unit is None else unit + 1, "y_base": 0.0, "y_source": te},
                    **{"y_base_patched": nie, "y_source_patched": te - tie, "te": te, "nie": nie, "nde": te - tie},
                    **{"tie": tie, "int": tie - nie, "outcome": "logit_diff", "unit": "logits"},
                }
            )

    def modules(self, mlp: Sequence[float], attention: Sequence[float]) -> "Made":
        for layer in range(LAYERS):
            self.add("modules", "mlp_output", layer, mlp[layer], position="all")
            self.add("modules", "attention_output", layer, attention[layer], position="all")
        return self

    def neurons(self, shares: Mapping[tuple[int, int], tuple[float, float]]) -> "Made":
        """shares: by layer and unit, on the discovery and on the held-out split."""
        for (layer, unit), (discovery, heldout) in shares.items():
            self.add(UNITS, "mlp_neurons", layer, discovery, heldout, unit=unit)
        return self

    def table(self) -> pd.DataFrame:
        table = pd.DataFrame(self._rows, columns=list(EFFECT_COLUMNS))
        return table.astype({"unit_start": "Int64", "unit_stop": "Int64"})

    def summary(self, seed: int = 0) -> Summary:
        return summarise(self.table(), {f"p{pair}" for pair in range(PAIRS)}, LAYERS, seed, BY)


def mediating(table: pd.DataFrame) -> pd.DataFrame:
    return mediators(table, total_effect(table, 0, BY), lambda: np.random.default_rng(0), BY)


def test_nothing_mediates_where_there_is_no_total_effect() -> None:
    made = Made(te=0.0, spread=1.0).neurons({(5, 1): (0.9, 0.9)})
    table = made.table()
    assert total_effect(table, 0, BY).sign == 0
    assert not mediating(table)["mediates"].any()


def test_mediators_are_chosen_on_the_discovery_split_only() -> None:
    shares = {(5, 1): (0.5, 0.5), (5, 2): (0.4, 0.0), (5, 3): (0.0, 0.9), (4, 1): (0.3, 0.3), (1, 7): (0.02, 0.9)}
    found = mediating(Made().neurons(shares).table())
    assert list(zip(found["layer"], found["unit"], found["mediates"], strict=True)) == [
        (5, 1, True),
        (5, 2, False),  # did not hold up
        (4, 1, True),
    ]


def test_mediators_are_reported_on_the_heldout_split() -> None:
    made = Made().neurons({(5, 1): (0.5, 0.25)})
    (found,) = mediating(made.table()).to_dict("records")
    heldout = made.table().query("split == 'heldout'")
    assert found["nie"] == pytest.approx(heldout["nie"].mean())
    assert found["tie"] == pytest.approx(heldout["tie"].mean())
    assert found["nie_share"] == pytest.approx(heldout["nie"].mean() / heldout["te"].mean())
    assert found["tie_share"] == pytest.approx(heldout["tie"].mean() / heldout["te"].mean())


def test_a_share_that_chance_explains_makes_no_mediator() -> None:
    table = Made().neurons({(5, 1): (0.5, 0.5), (5, 2): (0.4, 0.4)}).table()
    unsteady = (table["split"] == "heldout") & (table["unit_start"] == 2)
    table.loc[unsteady, ["nie", "tie"]] = np.tile([[3.0], [-2.0]], (PAIRS // 4, 2))
    found = mediating(table).set_index("unit")
    assert found.loc[2, ["nie_share", "tie_share"]].min() > BY.min_share
    assert found["mediates"].to_dict() == {1: True, 2: False}


def test_a_mediator_is_sufficient_and_necessary() -> None:
    made = Made().neurons({(5, 1): (0.5, 0.5)})
    for effect in ("nie", "tie"):
        table = made.table().assign(**{effect: 0.0})
        assert mediating(table).empty


def test_identities_look_at_the_whole_stream_of_equal_pairs() -> None:
    made = Made()
    made.add("checks", "layer_output", 2, 1.0, position="all")
    made.add("layers", "layer_output", 2, 0.3, position="all")
    made.add("layers", "layer_output", 2, 0.3, position="last")
    table = made.modules(LATE, EARLY).table()
    whole = table["analysis"] == "checks"
    table.loc[whole, ["nie", "nde"]] = np.stack([table.loc[whole, "te"], np.zeros(PAIRS)], axis=1)
    table.loc[whole & (table["pair_id"] == "p3"), "nie"] += 0.5
    table.loc[whole & (table["pair_id"] == "p4"), "nde"] = -0.25
    table.loc[whole & (table["pair_id"] == "p5"), ["nie", "nde"]] = 99.0
    equal = {f"p{pair}" for pair in range(PAIRS)} - {"p5"}
    nie, nde, *last = summarise(table, equal, LAYERS, 0, BY).identities
    assert (nie.n, nde.n) == (PAIRS - 1, PAIRS - 1)
    assert (nie.largest, nde.largest) == (pytest.approx(0.5), pytest.approx(0.25))
    for nothing in (*last, summarise(table, set(), LAYERS, 0, BY).identities[0]):
        assert nothing.n == 0
        assert np.isnan(nothing.largest)


def test_identities_of_the_last_layer_hold_for_all_pairs() -> None:
    made = Made()
    made.add("checks", "layer_output", LAYERS - 1, 0.5, position="last")
    table = made.table()
    table.loc[table["pair_id"] == "p5", ["nie", "nde"]] = 99.0
    nie, nde = summarise(table, set(), LAYERS, 0, BY).identities[2:]
    assert (nie.n, nde.n) == (PAIRS, PAIRS)
    assert (nie.largest, nde.largest) == (pytest.approx(99 - made.te[5]), pytest.approx(99.0))


def test_estimates_of_sites() -> None:
    made = Made().modules(LATE, EARLY)
    summary, table = made.summary(), made.table()
    sites = summary.sites
    assert list(sites.columns) == list(SUMMARY_COLUMNS)
    assert set(sites.groupby("split")["quantity"].unique().map(set).map(frozenset)) == {
        frozenset({"nie", "tie", "nde", "int"}),
        frozenset({"nie", "tie"}),
    }
    for row in sites.itertuples():
        part = table[(table["component"] == row.component) & (table["layer"] == row.layer)]
        part = part if row.split == "all" else part[part["split"] == row.split]
        assert row.mean == pytest.approx(part[row.quantity].mean())
        assert (row.n, row.clusters, row.unit) == (len(part), len(part), "logits")
        assert row.ci_low < row.mean < row.ci_high
        assert row.q >= row.p
    assert summary.total.value == pytest.approx(made.te.mean())
    assert summary.total.n_pairs == PAIRS


def test_no_answer_depends_on_which_other_questions_were_asked() -> None:
    alone = Made().modules(LATE, EARLY)
    both = Made().modules(LATE, EARLY).neurons({(5, 1): (0.5, 0.5)})
    first, second = alone.summary(), both.summary()
    modules = second.sites[second.sites["analysis"] == "modules"].reset_index(drop=True)
    pd.testing.assert_frame_equal(first.sites, modules)


def test_the_same_seed_gives_the_same_numbers() -> None:
    made = Made().modules(LATE, EARLY)
    pd.testing.assert_frame_equal(made.summary().sites, made.summary().sites)
    assert not made.summary(seed=1).sites["ci_low"].equals(made.summary().sites["ci_low"])
