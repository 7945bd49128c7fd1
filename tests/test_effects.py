"""Effects from four potential outcomes, by hand; each is moved alone to see that only what it defines moves."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
import pytest
from fakes import INFO, token_pair

from remote_mediation.effects import EFFECT_COLUMNS, QUANTITIES, Request, effects_table
from remote_mediation.engine.budget import Setting
from remote_mediation.engine.jobs import Keys
from remote_mediation.engine.rows import Row, Source, Write
from remote_mediation.outcomes import LogitOutcome
from remote_mediation.sites import Site

OUTCOME = LogitOutcome(plus=(5,), minus=(7,))
PAIR = token_pair("a", cluster="frame")
SITE = Site("mlp_neurons", 3, "edit", (4, 5, 6))
KEYS = Keys(Setting(INFO, "float32", OUTCOME), [PAIR])
REQUEST = Request("neurons", PAIR, SITE)
# Y(x0, M(x0)), Y(x1, M(x1)), Y(x0, M(x1)), Y(x1, M(x0))
BY_HAND = {"base": -1.0, "source": 5.0, "base_patched": 0.5, "source_patched": 2.0}


def table(y: Mapping[str, float], request: Request = REQUEST) -> pd.DataFrame:
    rows = dict(zip(BY_HAND, (Row("a", 0), Row("a", 1), *request.rows(INFO)), strict=True))
    # Y is the first value minus the second.
    values = {KEYS(rows[name]): np.array([value + 0.25, 0.25], np.float32) for name, value in y.items()}
    return effects_table([request], values, KEYS, OUTCOME, INFO, {"a": "heldout"})


def test_a_request_asks_for_both_swaps() -> None:
    columns = (4, 5, 6)
    assert REQUEST.rows(INFO) == (
        Row("a", 0, (Write("mlp_neurons", 3, (2,), columns, Source(1, (2,))),)),
        Row("a", 1, (Write("mlp_neurons", 3, (2,), columns, Source(0, (2,))),)),
    )
    heads = Request("heads", PAIR, Site("attention_heads", 0, "last", (1,))).rows(INFO)
    assert heads[0].writes[0].columns == (4, 5, 6, 7)


def test_effects_by_hand() -> None:
    (row,) = table(BY_HAND).to_dict("records")
    assert row == {
        "pair_id": "a",
        "cluster": "frame",
        "split": "heldout",
        "analysis": "neurons",
        "component": "mlp_neurons",
        "layer": 3,
        "position": "edit",
        "unit_start": 4,
        "unit_stop": 7,
        "y_base": -1.0,
        "y_source": 5.0,
        "y_base_patched": 0.5,
        "y_source_patched": 2.0,
        "te": 6.0,
        "nie": 1.5,
        "nde": 3.0,
        "tie": 3.0,
        "int": 1.5,
        "outcome": "logit_diff",
        "unit": "logits",
    }
    assert list(row) == list(EFFECT_COLUMNS)


@pytest.mark.parametrize(
    ("moved", "by_one"),
    [
        ("base", {"te": -1, "nie": -1, "nde": -1, "tie": 0, "int": 1}),
        ("source", {"te": 1, "nie": 0, "nde": 0, "tie": 1, "int": 1}),
        ("base_patched", {"te": 0, "nie": 1, "nde": 0, "tie": 0, "int": -1}),
        ("source_patched", {"te": 0, "nie": 0, "nde": 1, "tie": -1, "int": -1}),
    ],
)
def test_each_outcome_moves_only_what_it_defines(moved: str, by_one: dict[str, int]) -> None:
    before, after = table(BY_HAND), table({**BY_HAND, moved: BY_HAND[moved] + 1})
    assert {name: after[name][0] - before[name][0] for name in QUANTITIES} == by_one


def test_total_effect_is_measured() -> None:
    # Outcomes in which no sum of NDE and NIE is TE.
    (row,) = table({"base": 0.0, "source": 1.0, "base_patched": 7.0, "source_patched": -3.0}).to_dict("records")
    assert (row["te"], row["nie"], row["nde"], row["int"]) == (1.0, 7.0, -3.0, -3.0)


@pytest.mark.parametrize("missing", BY_HAND)
def test_a_site_without_all_four_outcomes_is_left_out(missing: str) -> None:
    found = table({name: value for name, value in BY_HAND.items() if name != missing})
    assert found.empty
    assert list(found.columns) == list(EFFECT_COLUMNS)


def test_whole_tensors_have_no_units() -> None:
    found = table(BY_HAND, Request("modules", PAIR, Site("mlp_output", 3, "edit")))
    assert found[["unit_start", "unit_stop"]].isna().all(axis=None)
    assert found["unit_start"].dtype == "Int64"
