"""Sites that each analysis asks for, written down by hand for a model of six layers, two heads and twelve neurons."""

from typing import Any

import pytest
from fakes import INFO, token_pair

from remote_mediation.analyses import EVERY, chosen
from remote_mediation.analyses.checks import CHECKS
from remote_mediation.config import StudyConfig
from remote_mediation.errors import SettingsError, SiteError
from remote_mediation.sites import Site, check_site

PAIR = token_pair()  # one token of edit, one of text after it, one of template


def sites(name: str, **settings: Any) -> list[Site]:
    analysis = {one.name: one for one in (*EVERY, CHECKS)}[name]
    return analysis.sites(StudyConfig(model="m", **settings), INFO, PAIR)


def test_analyses_run_checks_first_and_each_after_those_it_builds_on() -> None:
    ran = [one.name for one in chosen([one.name for one in reversed(EVERY)])]
    assert ran[:3] == ["checks", "total", "claims"]
    assert all(ran.index(needed) < ran.index(one.name) for one in EVERY for needed in one.needs)
    assert [one.name for one in chosen(["paths", "layers"])] == ["checks", "total", "layers", "paths"]


def test_an_unknown_analysis_is_refused_with_those_there_are() -> None:
    with pytest.raises(SettingsError, match=r"unknown analysis 'layer'; known: claims, directions, ablation"):
        chosen(["layers", "layer"])


def test_no_two_analyses_write_the_same_table() -> None:
    names = [name for one in EVERY for name in one.columns]
    assert len(names) == len(set(names))


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


def test_key_and_value_heads() -> None:
    heads = {"components": ["value_heads", "key_heads"]}
    assert sites("heads", heads=heads, positions={"heads": ["edit"]}) == [
        Site(component, layer, "edit", (0,)) for component in ("value_heads", "key_heads") for layer in range(6)
    ]


def test_tokens() -> None:
    assert sites("tokens") == [
        Site("layer_output", layer, token)
        for token in ("edit[-1]", "after_edit[0]", "post_instruction[0]")
        for layer in range(6)
    ]


def test_neurons() -> None:
    whole = tuple(range(12))
    assert sites("neurons", neurons={"layers": [1, 4]}, positions={"neurons": ["last", "edit"]}) == [
        Site("mlp_neurons", layer, position, whole) for position in ("last", "edit") for layer in (1, 4)
    ]
    assert [site.layer for site in sites("neurons")] == list(range(6))


@pytest.mark.parametrize("name", ["layers", "modules", "heads", "neurons"])
def test_positions_that_a_pair_lacks_are_left_out(name: str) -> None:
    assert {site.position for site in sites(name, positions={name: ["edit[-2]", "last"]})} == {"last"}


@pytest.mark.parametrize("name", ["layers", "modules", "heads", "neurons"])
def test_unknown_positions(name: str) -> None:
    with pytest.raises(SiteError, match="unknown position 'middle'"):
        sites(name, positions={name: ["middle"]})


@pytest.mark.parametrize(
    ("layer", "message"),
    [(6, r"layer 6 is out of range: tiny has layers 0 to 5"), (-1, r"layer -1 is out of range")],
)
def test_neurons_of_layers_that_are_not_there(layer: int, message: str) -> None:
    with pytest.raises(SiteError, match=message):
        sites("neurons", neurons={"layers": [layer]})


@pytest.mark.parametrize(
    ("site", "message"),
    [
        (Site("mlp", 0, "all"), r"unknown component 'mlp'; use one of layer_output, attention_output"),
        (Site("mlp_output", 6, "all"), r"layer 6 is out of range"),
        (Site("mlp_neurons", 0, "all", (12,)), r"unit 12 of mlp_neurons is out of range: tiny has 0 to 11"),
        (Site("attention_heads", 0, "all", (0, 2)), r"unit 2 of attention_heads is out of range: tiny has 0 to 1"),
        (Site("key_heads", 0, "all", (1,)), r"unit 1 of key_heads is out of range: tiny has 0 to 0"),
        (Site("layer_output", 0, "all", (8,)), r"unit 8 of layer_output is out of range: tiny has 0 to 7"),
    ],
)
def test_sites_that_are_not_there(site: Site, message: str) -> None:
    with pytest.raises(SiteError, match=message):
        check_site(site, INFO)
