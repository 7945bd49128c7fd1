"""Identities that hold for any weights (METHOD.md, "Right by construction"), through the engine and the effects table.

Which are exact in floating point, and which only to rounding, was found by measuring all tiny models:

- exactly 0.0, because both sides are the same operations on the same numbers: TE of a prompt paired with itself, and
  the change of sign when x0 and x1 trade places (NIE becomes -TIE);
- to rounding (largest seen 3e-6), because a row and the base run it is compared with do the same sums in tensors of
  other shapes: effects of a prompt paired with itself, NIE = TE and NDE = 0 of the whole stream, and writes before the
  first difference. Whole stream of the last layer at `last` came out exactly 0.0 on every tiny model, but only as long
  as the matrix product of one row equals that of many, so it too is asserted to rounding.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product

import numpy as np
import pandas as pd
import pytest
from oracle import LOGIT_DIFF, RESPONSE_LOGPROB, WINDOWED, Subject, token_pair

from remote_mediation.effects import Request, effects_table
from remote_mediation.engine.rows import Row, Scale, Source, Write
from remote_mediation.outcomes import Outcome
from remote_mediation.sites import FAMILIES, Site
from remote_mediation.tokens import SPANS, TokenPair

Subjects = Callable[[str], Subject]

ROUNDING = 1e-5
CLEAR = 0.01  # an effect that no rounding explains

every_model = pytest.mark.parametrize(
    ("name", "outcome", "answers"),
    [*((name, LOGIT_DIFF, (0, 0)) for name in FAMILIES), *((name, RESPONSE_LOGPROB, (4, 2)) for name in WINDOWED)],
    ids=[*FAMILIES, *WINDOWED],
)


def effects(model: Subject, pair: TokenPair, sites: Sequence[Site], outcome: Outcome) -> pd.DataFrame:
    """The effects of sites on one pair, as a study gets them."""
    requests = [Request("test", pair, site) for site in sites]
    rows = [row for request in requests for row in request.rows(model.info)]
    values = model.run(model.plan([pair], rows, outcome))
    return effects_table(requests, values, model.keys([pair], outcome), outcome, model.info, {pair.id: "heldout"})


def sites_of(model: Subject) -> list[Site]:
    """Every component, layer and span."""
    hooks = FAMILIES[model.info.family].hooks
    places = [(component, layer) for component in hooks for layer in model.info.layers_with(component)]
    return [Site(*place, span) for place, span in product(places, SPANS)]


@every_model
def test_a_prompt_patched_into_itself(subject: Subjects, name: str, outcome: Outcome, answers: tuple[int, int]) -> None:
    model, pair = subject(name), token_pair("pair", answers=answers)
    table = effects(model, replace(pair, x1=pair.x0), sites_of(model), outcome)
    # The sum inside an expert depends on which tokens it is given together, so prompts side by side may differ there.
    assert table["te"].abs().max() <= (0.0 if FAMILIES[model.info.family].mixture is None else ROUNDING)
    assert table[["nie", "nde", "tie", "int"]].abs().to_numpy().max() < ROUNDING
    assert effects(model, pair, sites_of(model), outcome)["nie"].abs().quantile(0.75) > CLEAR


@every_model
def test_the_whole_stream_carries_everything(
    subject: Subjects, name: str, outcome: Outcome, answers: tuple[int, int]
) -> None:
    model, pair = subject(name), token_pair("pair", answers=answers)
    top = model.info.layers - 1
    sites = [Site("layer_output", layer, "all") for layer in range(top + 1)] + [Site("layer_output", top, "last")]
    table = effects(model, pair, sites, outcome)
    assert table["te"].abs().min() > CLEAR
    assert (table["nie"] - table["te"]).abs().max() < ROUNDING
    assert table["nde"].abs().max() < ROUNDING


@every_model
def test_trading_places_changes_signs(subject: Subjects, name: str, outcome: Outcome, answers: tuple[int, int]) -> None:
    model, pair = subject(name), token_pair("pair", edits=(2, 4), answers=answers)
    here = effects(model, pair, sites_of(model), outcome)
    there = effects(model, replace(pair, x0=pair.x1, x1=pair.x0), sites_of(model), outcome)
    assert (there["te"] == -here["te"]).all()
    assert (there["nie"] == -here["tie"]).all()
    assert (there["tie"] == -here["nie"]).all()
    assert (here["nie"] - here["tie"]).abs().quantile(0.75) > CLEAR


@every_model
def test_before_the_first_difference_there_is_nothing_to_carry(
    subject: Subjects, name: str, outcome: Outcome, answers: tuple[int, int]
) -> None:
    model, pair = subject(name), token_pair("pair", edits=(2, 4), answers=answers)
    places, components = tuple(range(pair.first)), FAMILIES[model.info.family].hooks

    def rows(value_of: Callable[[int], Source | Scale]) -> list[Row]:
        return [
            Row("pair", base, (Write(component, 0, places, (), value_of(base)),))
            for component in components
            for base in (0, 1)
        ]

    swaps, ablations = rows(lambda base: Source(1 - base, places)), rows(lambda _: Scale(0.0))
    y = model.measure([pair], [Row("pair", 0), Row("pair", 1), *swaps, *ablations], outcome)
    swapped, ablated = np.abs(y[2:] - np.tile(y[:2], 2 * len(components))).reshape(2, -1)
    assert swapped.max() < ROUNDING
    assert np.median(ablated) > CLEAR  # writes there do act
