"""Sets of sites and direct effects against plain hooks, and direct effects against runs that hold everything else."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from oracle import (
    KINDS,
    LOGIT_DIFF,
    OTHERS,
    REFUSAL,
    RESPONSE_LOGPROB,
    TOLERANCE,
    WINDOWED,
    Subject,
    random_rows,
    token_pair,
)

from remote_mediation.config import StudyConfig
from remote_mediation.engine.rows import Row, direct_row, swap, swap_all
from remote_mediation.engine.tasks import direct_task, sharing_x0
from remote_mediation.errors import SiteError
from remote_mediation.lab import Lab, Study
from remote_mediation.outcomes import Outcome
from remote_mediation.sites import FAMILIES, SHARED_HEADS, Component, Site
from remote_mediation.store import Store
from remote_mediation.tokens import TokenPair

Subjects = Callable[[str], Subject]
CONTRIBUTIONS: tuple[Component, ...] = ("attention_output", "mlp_output")


def lab(folder: Path, model: Subject, pairs: list[TokenPair], outcome: Outcome) -> Lab:
    config = StudyConfig(model=model.info.name, analyses=["layers"])
    another = replace(pairs[0], id="another", cluster="another")  # a study is split over two clusters or more
    return Lab(Study(config, model.info, outcome, (*pairs, another), ()), Store(folder), model.backend)


def opened(pair: TokenPair) -> TokenPair:
    """The pair with the openings of `REFUSAL` behind its prompts."""
    return replace(pair, openings=REFUSAL.openings)


def every_contribution(layers: range, position: str = "last") -> list[Site]:
    return [Site(component, layer, position) for layer in layers for component in CONTRIBUTIONS]


@pytest.mark.parametrize("name", [*FAMILIES, *WINDOWED, *OTHERS])
def test_openings_are_summed_as_separate_passes_say(subject: Subjects, name: str) -> None:
    model, rng = subject(name), np.random.default_rng(2)
    pairs = [opened(token_pair("equal")), opened(token_pair("unequal", edits=(3, 1)))]
    rows = [row for pair in pairs for row in random_rows(pair, model.info, rng, 8)]
    measured = model.compare(pairs, [*rows, *(Row(pair.id, side) for pair in pairs for side in (0, 1))], REFUSAL)
    assert measured.deviation < TOLERANCE
    assert np.abs(measured.effects).max() > 0.1


@pytest.mark.parametrize("name", KINDS)
def test_sets_are_swapped_together(subject: Subjects, name: str) -> None:
    model, pair = subject(name), opened(token_pair("pair", edits=(3, 2)))
    layers = range(model.info.layers)
    sets = [
        [Site("mlp_output", layer, "all") for layer in layers],
        [*every_contribution(range(1, 2), "all"), Site("layer_output", 0, "edit")],
        [Site("mlp_neurons", layer, "last", (1, 5, 7)) for layer in layers] + [Site("attention_heads", 2, "all", (1,))],
    ]
    rows = [swap_all(pair, sites, side, model.info) for sites in sets for side in (0, 1)]
    measured = model.compare([pair], rows, REFUSAL)
    assert measured.deviation < TOLERANCE
    assert np.abs(measured.effects).min() > 10 * TOLERANCE
    single = swap(pair, sets[0][0], 0, model.info)
    assert swap_all(pair, sets[0][:1], 0, model.info) == single


@pytest.mark.parametrize("name", [*FAMILIES, *WINDOWED, *OTHERS])
@pytest.mark.parametrize("outcome", [REFUSAL, LOGIT_DIFF, RESPONSE_LOGPROB], ids=lambda one: one.name)
def test_direct_effects_are_those_of_runs_that_hold_the_rest(
    subject: Subjects, name: str, outcome: Outcome, tmp_path: Path
) -> None:
    model = subject(name)
    answers = (3, 2) if outcome is RESPONSE_LOGPROB else (0, 0)
    pairs = [token_pair("equal", answers=answers), token_pair("unequal", edits=(3, 1), answers=answers)]
    pairs = [opened(pair) for pair in pairs] if outcome is REFUSAL else pairs
    sets = [
        [Site("mlp_output", 1, "last")],
        [Site("attention_output", layer, "last") for layer in range(model.info.layers)],
        every_contribution(range(model.info.layers)),
    ]
    here = lab(tmp_path, model, pairs, outcome)
    found = here.direct(sets, pairs)
    for number, sites in enumerate(sets):
        for place, pair in enumerate(pairs):
            rows = [direct_row(pair, sites, side, model.info) for side in (0, 1)]
            measured = model.compare([pair], rows, outcome)
            assert measured.deviation < TOLERANCE
            assert abs(measured.effects[0] - found.nie[number, place]) < TOLERANCE
            assert abs(measured.effects[1] + found.tie[number, place]) < TOLERANCE
    assert np.abs(found.nie).max() > 0.1
    # Where the answer is read outside the edit, what layers add is all that differs; but for learnt positions, which
    # differ at `last` where the prompts' lengths do.
    whole = slice(0, 1) if model.info.family == "gpt2" else slice(None)
    np.testing.assert_allclose(found.nie[-1, whole], found.te[whole], atol=TOLERANCE)
    np.testing.assert_allclose(found.tie[-1, whole], found.te[whole], atol=TOLERANCE)


@pytest.mark.parametrize("name", KINDS)
def test_pairs_that_share_a_harmless_prompt_run_it_once(subject: Subjects, name: str, tmp_path: Path) -> None:
    """As a pair and its placebo do; what is found is what each of them alone says, whose bases are rows."""
    model = subject(name)
    pair, apart = opened(token_pair("pair")), opened(token_pair("apart", edits=(3, 1)))
    placebo = replace(pair, id="placebo", x1=apart.x1)
    sets = [[Site("mlp_output", 1, "last")], every_contribution(range(1, model.info.layers))]
    every = [pair, apart, placebo]
    here = lab(tmp_path / "together", model, every, REFUSAL)
    found = here.direct(sets, every)
    tasks = [direct_task(group, sets, here.study.setting) for group in sharing_x0(every)]
    assert [(task.pairs, len(task.payload["stacks"])) for task in tasks] == [
        (("pair", "placebo"), 3),
        (("apart",), 2),
    ]
    alone = [lab(tmp_path / one.id, model, [one], REFUSAL) for one in every]
    single = [one.direct(sets, [pair]) for one, pair in zip(alone, every, strict=True)]
    for quantity in ("nie", "tie"):
        expected = np.concatenate([getattr(one, quantity) for one in single], axis=1)
        np.testing.assert_allclose(getattr(found, quantity), expected, atol=TOLERANCE)
    np.testing.assert_allclose(found.te, here.joint(sets, every).te, atol=TOLERANCE)
    assert np.abs(found.te[0] - found.te[2]) > 0.1
    assert tasks[0].flops < sum(direct_task([one], sets, here.study.setting).flops for one in (pair, placebo))


@pytest.mark.parametrize("name", KINDS)
def test_direct_effects_of_neurons_hold_all_others(subject: Subjects, name: str, tmp_path: Path) -> None:
    """All neurons of a layer are its MLP; some of them are what a run says in which the others are held."""
    model, pair = subject(name), opened(token_pair("pair"))
    here = lab(tmp_path, model, [pair], REFUSAL)
    everything = here.direct([[Site("mlp_neurons", 1, "last", tuple(range(model.info.d_ff)))]], [pair])
    whole = here.direct([[Site("mlp_output", 1, "last")]], [pair])
    np.testing.assert_allclose(everything.nie, whole.nie, atol=TOLERANCE)
    some = [Site("mlp_neurons", layer, "last", (0, 3, 4)) for layer in (0, 2)]
    measured = model.compare([pair], [direct_row(pair, some, side, model.info) for side in (0, 1)], REFUSAL)
    found = here.direct([some], [pair])
    assert measured.deviation < TOLERANCE
    np.testing.assert_allclose([found.nie[0, 0], -found.tie[0, 0]], measured.effects, atol=TOLERANCE)
    assert np.abs(measured.effects).min() > TOLERANCE


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_neox"])
def test_joint_of_all_contributions_is_the_whole_effect(subject: Subjects, name: str, tmp_path: Path) -> None:
    model, pair = subject(name), opened(token_pair("equal"))
    found = lab(tmp_path, model, [pair], REFUSAL).joint([every_contribution(range(model.info.layers), "all")], [pair])
    # The embeddings of the edit are the one other player, and nothing reads them where all contributions are held.
    np.testing.assert_allclose(found.nie[0], found.te, atol=TOLERANCE)
    assert np.abs(found.te).max() > 0.1


@pytest.mark.parametrize(
    "sites",
    [
        [Site("mlp_output", 1, "all"), Site("mlp_neurons", 1, "last", (3,))],
        [Site("layer_output", 1, "all"), Site("attention_output", 1, "edit")],
        [Site("attention_heads", 1, "last", (1,)), Site("attention_heads", 1, "last")],
        [Site("mlp_output", 1, "all"), Site("mlp_output", 1, "all")],
        [Site("layer_output", 1, "all"), Site("key_heads", 1, "edit")],
        [Site("value_heads", 1, "edit"), Site("attention_heads", 1, "all")],
        [Site("value_heads", 1, "edit"), Site("value_heads", 1, "edit", (1,))],
    ],
)
def test_a_covered_site_is_refused_by_name(subject: Subjects, sites: list[Site]) -> None:
    pair = token_pair("pair")
    with pytest.raises(SiteError, match=f"{sites[-1].component}|{sites[0].component}"):
        swap_all(pair, sites, 0, subject("llama").info)
    apart = [Site("layer_output", 1, "edit"), Site("attention_output", 1, "last")]
    assert len(swap_all(pair, apart, 0, subject("llama").info).writes) == 2


def test_keys_and_values_reach_the_tokens_behind_theirs(subject: Subjects) -> None:
    """Attention's own output at their tokens does not cover them."""
    model, pair = subject("llama"), token_pair("pair")
    for component in SHARED_HEADS:
        sites = [Site("attention_output", 1, "edit"), Site(component, 1, "edit")]
        rows = [swap_all(pair, sites, side, model.info) for side in (0, 1)]
        rows += [swap(pair, sites[0], side, model.info) for side in (0, 1)]
        measured = model.compare([pair], rows, LOGIT_DIFF)
        assert measured.deviation < TOLERANCE
        assert np.abs(measured.effects[:2] - measured.effects[2:]).min() > 10 * TOLERANCE
