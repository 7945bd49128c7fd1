"""Hybrids: sequences taken apart, what layers lack, and whole analyses on a model of convolutions and attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fakes import Counting, records, write_pairs
from oracle import REFUSAL, RESPONSE_LOGPROB, TOLERANCE, Subject, random_rows, token_pair
from transformers import AutoConfig

import remote_mediation as rm
from remote_mediation.cost import estimate
from remote_mediation.engine.budget import Setting, base_flops, row_flops
from remote_mediation.engine.rows import swap
from remote_mediation.engine.unfold import sequences, tokens_run, unfolding
from remote_mediation.errors import SiteError
from remote_mediation.models import info_of
from remote_mediation.sites import HEAD_COMPONENTS, Site, check_site
from remote_mediation.tokens import TokenPair, trie

Subjects = Callable[[str], Subject]
NAMES = ("lfm2", "lfm2_moe", "qwen3_5_text", "qwen3_5_moe_text", "qwen3_next")


def test_answers_are_taken_apart() -> None:
    # A prompt of 10 tokens; of answers of 4 and 2 tokens, 3 and 1 are fed.
    pair = token_pair("pair", answers=(4, 2))
    prompt = tuple(range(10))
    assert sequences(pair, 0) == ((*prompt, 10, 11, 12), (*prompt, 13, 13, 13))
    assert sequences(token_pair("pair"), 0) == (prompt,)
    assert sequences(token_pair("pair", answers=(4, 1)), 0) == ((*prompt, 10, 11, 12),)


def test_openings_are_taken_apart_by_their_ends() -> None:
    pair = replace(token_pair("pair"), openings=REFUSAL.openings)
    begun = [tuple(pair_tokens(pair, path)[10:]) for path in sequences(pair, 0)]
    whole = {opening[:-1] for opening in REFUSAL.openings if len(opening) > 1}
    ends = {one for one in whole if not any(other[: len(one)] == one and other != one for other in whole)}
    assert {tuple(ids[: len(end)]) for ids in begun for end in ends if ids[: len(end)] == end} == ends
    assert len(begun) == len(ends)


def pair_tokens(pair: TokenPair, path: tuple[int, ...]) -> list[int]:
    """Tokens of one sequence."""
    packed = [*pair.x0, *(node.token for node in trie(pair.openings).values())]
    return [packed[index] for index in path]


@pytest.mark.parametrize("name", NAMES)
def test_each_packed_token_is_found_again(subject: Subjects, name: str) -> None:
    pair = replace(token_pair("pair"), openings=REFUSAL.openings)
    found = unfolding(pair, 0, subject(name).info)
    for index, (number, place) in enumerate(zip(*found["folds"], strict=True)):
        assert found["paths"][number][place] == index
    assert index + 1 == len(pair.x0) + pair.fed
    assert unfolding(pair, 0, subject("llama").info) == {}


@pytest.mark.parametrize("name", NAMES)
def test_what_is_run_is_what_is_counted(subject: Subjects, name: str) -> None:
    """No row begins behind the prompt's first token, and every sequence of it is run."""
    model, pair = subject(name), token_pair("pair", answers=(4, 2))
    setting = Setting(model.info, "float32", RESPONSE_LOGPROB)
    assert tokens_run(pair, 0, model.info) == 2 * 13
    rows = [swap(pair, rm.Site("mlp_output", 1, position), 0, model.info) for position in ("all", "last")]
    assert row_flops(rows[0], pair, setting) == row_flops(rows[1], pair, setting)
    packed = setting._replace(info=replace(model.info, recurrent=()))
    assert row_flops(rows[0], pair, setting) > row_flops(rows[0], pair, packed)
    assert base_flops(pair, setting) > base_flops(pair, packed)


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_several_pairs_and_openings(subject: Subjects, name: str) -> None:
    model, rng = subject(name), np.random.default_rng(11)
    pairs = [token_pair(f"pair{before}", before, (2, 3), 7 - before) for before in (2, 5)]
    pairs = [replace(pair, openings=REFUSAL.openings) for pair in pairs]
    rows = [row for pair in pairs for row in random_rows(pair, model.info, rng, 8)]
    measured = model.compare(pairs, rows, REFUSAL)
    assert measured.deviation < TOLERANCE * np.abs(measured.effects).max()
    assert np.abs(measured.effects).max() >= 0.1


def test_layers_are_read_from_the_configuration() -> None:
    config = AutoConfig.for_model("lfm2", num_hidden_layers=3, layer_types=["conv", "full_attention", "conv"])
    info = info_of(config, "some/lfm2")
    assert info.recurrent == (0, 2)
    for component in HEAD_COMPONENTS:
        assert info.layers_with(component) == (1,)
        with pytest.raises(SiteError, match=f"layer 0 of some/lfm2 has no {component}: it has no softmax attention"):
            check_site(Site(component, 0, "last", (0,)), info)
    assert info.layers_with("attention_output") == (0, 1, 2)
    with pytest.raises(SiteError, match="conv_bias = True and cannot be studied: its convolutions carry"):
        info_of(AutoConfig.for_model("lfm2", conv_bias=True), "some/lfm2")


def test_whole_analyses(subject: Subjects, tmp_path: Path) -> None:
    """Heads of the layers that have some, the rivals of them, modules of all layers; the cost is an upper bound."""
    model = subject("lfm2_chat")
    config = rm.StudyConfig(
        model=model.info.name,
        pairs=str(write_pairs(tmp_path / "pairs.jsonl", records())),
        refusal={"compliant": ["sure", "yes"], "refusing": ["sorry", "no"]},
        statistics={"resamples": 100},
        analyses=["modules", "heads", "rivals"],
        heads={"components": ["attention_heads", "value_heads"]},
    )
    planned, counting = estimate(config), Counting(model.backend)
    with rm.open_lab(config, out=tmp_path / "run", backend=counting) as lab:
        effects = lab.run().effects
    layers = {name: set(part["layer"]) for name, part in effects.groupby("analysis")}
    assert layers["heads"] == {0, 2}
    units = effects[effects["analysis"] == "heads"].groupby("component")["unit_start"].max()
    assert units.to_dict() == {"attention_heads": 3, "value_heads": 1}
    assert layers["modules"] == {0, 1, 2}
    assert counting.flops <= planned.flops
