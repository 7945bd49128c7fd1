"""Sites that each analysis asks for, written down by hand for a model of six layers, two heads and twelve neurons."""

from collections.abc import Sequence
from typing import Any

import pandas as pd
import pytest
from fakes import INFO, token_pair

from remote_mediation.analyses import ANALYSES, neurons
from remote_mediation.config import Granularity, StudyConfig
from remote_mediation.errors import SiteError
from remote_mediation.sites import Site, check_site

PAIR = token_pair()  # one token of edit, one of text after it, one of template


def sites(name: str, **settings: Any) -> list[Site]:
    return ANALYSES[name].sites(StudyConfig(model="m", **settings), INFO, PAIR)


def test_every_granularity_has_an_analysis() -> None:
    assert set(ANALYSES) == {"checks", *Granularity.__args__}
    assert [name for name, analysis in ANALYSES.items() if analysis.refine] == ["neurons"]


def test_layers() -> None:
    assert sites("layers", positions={"layers": ["edit", "last"]}) == [
        *(Site("layer_output", layer, "edit") for layer in range(6)),
        *(Site("layer_output", layer, "last") for layer in range(6)),
    ]


def test_checks() -> None:
    whole = [Site("layer_output", layer, "all") for layer in (0, 3, 5)]
    assert sites("checks") == [*whole, Site("layer_output", 5, "last")]


def test_modules() -> None:
    assert sites("modules") == [
        Site(component, layer, "all") for layer in range(6) for component in ("attention_output", "mlp_output")
    ]


def test_heads() -> None:
    assert sites("heads") == [Site("attention_heads", layer, "last", (head,)) for layer in range(6) for head in (0, 1)]


def test_tokens() -> None:
    assert sites("tokens") == [
        Site("layer_output", layer, token)
        for token in ("edit[-1]", "after_edit[0]", "post_instruction[0]")
        for layer in range(6)
    ]


def test_windows() -> None:
    assert sites("neurons", neurons={"window": 5, "layers": [1, 4]}) == [
        Site("mlp_neurons", layer, "last", units)
        for layer in (1, 4)
        for units in ((0, 1, 2, 3, 4), (5, 6, 7, 8, 9), (10, 11))
    ]
    assert {site.layer for site in sites("neurons", neurons={"window": 12})} == set(range(6))


@pytest.mark.parametrize("name", ["layers", "modules", "heads", "neurons"])
def test_positions_that_a_pair_lacks_are_left_out(name: str) -> None:
    settings = {"positions": {name: ["edit[-2]", "last"]}, "neurons": {"window": 12}}
    assert {site.position for site in sites(name, **settings)} == {"last"}


@pytest.mark.parametrize("name", ["layers", "modules", "heads", "neurons"])
def test_unknown_positions(name: str) -> None:
    with pytest.raises(SiteError, match="unknown position 'middle'"):
        sites(name, positions={name: ["middle"]}, neurons={"window": 12})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 13}, r"neurons.window 13 is wider than the 12 neurons of tiny"),
        ({"window": 4, "layers": [6]}, r"layer 6 is out of range: tiny has layers 0 to 5"),
        ({"window": 4, "layers": [-1]}, r"layer -1 is out of range"),
    ],
)
def test_neurons_that_are_not_there(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SiteError, match=message):
        sites("neurons", neurons=settings)


@pytest.mark.parametrize(
    ("site", "message"),
    [
        (Site("mlp", 0, "all"), r"unknown component 'mlp'; use one of layer_output, attention_output"),
        (Site("mlp_output", 6, "all"), r"layer 6 is out of range"),
        (Site("mlp_neurons", 0, "all", (12,)), r"unit 12 of mlp_neurons is out of range: tiny has 0 to 11"),
        (Site("attention_heads", 0, "all", (0, 2)), r"unit 2 of attention_heads is out of range: tiny has 0 to 1"),
        (Site("layer_output", 0, "all", (8,)), r"unit 8 of layer_output is out of range: tiny has 0 to 7"),
    ],
)
def test_sites_that_are_not_there(site: Site, message: str) -> None:
    with pytest.raises(SiteError, match=message):
        check_site(site, INFO)


def windows(*rows: tuple[str, int, int, float, float]) -> pd.DataFrame:
    names = ["split", "layer", "unit_start", "nie", "tie"]
    frame = pd.DataFrame(rows, columns=names).assign(position="last", te=4.0)
    return frame.assign(unit_stop=frame["unit_start"] + 4).astype({"unit_start": "Int64", "unit_stop": "Int64"})


def units(effects: pd.DataFrame, most: int) -> list[Site]:
    return neurons.units(StudyConfig(model="m", neurons={"window": 4, "max_windows": most}), INFO, effects)


def resolved(*windows: Sequence[int]) -> list[Site]:
    return [Site("mlp_neurons", layer, "last", (unit,)) for layer, start in windows for unit in range(start, start + 4)]


def test_the_strongest_windows_are_resolved_into_neurons() -> None:
    effects = windows(
        ("discovery", 1, 0, 3.0, 1.0),  # sufficient, hardly necessary
        ("discovery", 2, 4, 2.0, 2.5),  # both
        ("discovery", 3, 8, 1.5, 9.0),
        ("discovery", 4, 0, -9.0, 9.0),
    )
    assert units(effects, 2) == resolved((2, 4), (3, 8))
    assert units(effects, 9) == resolved((2, 4), (3, 8), (1, 0))  # never one that works the other way


def test_windows_are_chosen_by_their_mean() -> None:
    effects = windows(("discovery", 1, 0, 5.0, 5.0), ("discovery", 1, 0, -3.0, -3.0), ("discovery", 2, 0, 2.0, 2.0))
    assert units(effects, 1) == resolved((2, 0))


def test_windows_work_in_the_direction_of_the_total_effect() -> None:
    effects = windows(("discovery", 1, 0, -3.0, -3.0), ("discovery", 2, 0, 2.0, 2.0))
    assert units(effects.assign(te=-4.0), 2) == resolved((1, 0))
    assert units(effects, 2) == resolved((2, 0))


def test_nothing_measured_nothing_resolved() -> None:
    assert units(windows(), 2) == []


def test_heldout_pairs_choose_nothing() -> None:
    discovery = (("discovery", 1, 0, 1.0, 1.0), ("discovery", 2, 0, 0.5, 0.5))
    heldout = (("heldout", 1, 0, -9.0, -9.0), ("heldout", 2, 0, 9.0, 9.0), ("heldout", 3, 0, 9.0, 9.0))
    assert units(windows(*discovery, *heldout), 1) == units(windows(*discovery), 1) == resolved((1, 0))
    assert units(windows(*heldout), 1) == []
