"""Planted cases do what they are said to do: measured with plain runs of the models, none of the package's own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from remote_mediation.pairs import PromptPair
from remote_mediation.placebo import components
from remote_mediation.planted.cases import CASES, LATE, PAIRS, Specimen, build
from remote_mediation.planted.words import nouns_of


@torch.no_grad()
def outcomes(specimen: Specimen, side: str) -> Tensor:
    """logit(plus) - logit(minus) after each pair's prompt of a side: (pair,)."""
    batch = specimen.tokenizer.apply_chat_template(
        [[{"role": "user", "content": getattr(pair, side)}] for pair in specimen.pairs],
        add_generation_prompt=True,
        padding=True,
        return_tensors="pt",
        return_dict=True,
    )
    plus, minus = specimen.tokenizer.convert_tokens_to_ids([specimen.plus, specimen.minus])
    logits = specimen.model(**batch, use_cache=False, logits_to_keep=1).logits[:, -1].double()
    return logits[:, plus] - logits[:, minus]


@pytest.fixture(scope="module", params=CASES)
def planted(request: pytest.FixtureRequest) -> tuple[str, Specimen]:
    return request.param, build(CASES[request.param], 5)


def test_harm_and_nothing_else_moves_the_answer(planted: tuple[str, Specimen]) -> None:
    name, specimen = planted
    harmful, harmless, placebo = (outcomes(specimen, side) for side in ("harmful", "harmless", "placebo"))
    effect, other = harmful - harmless, placebo - harmless
    if name == "nothing":
        assert abs(effect.mean()) < 1
        return
    assert effect.mean() > 4
    assert (effect > 0).double().mean() > 0.9
    assert (other.mean() > 4) == (name == "placebo")
    if name != "placebo":
        assert abs(other.mean()) < 1


def test_pairs_are_components_of_one_token_edits(planted: tuple[str, Specimen]) -> None:
    _, specimen = planted
    pairs = specimen.pairs
    assert len(set(components([PromptPair(**pair._asdict()) for pair in pairs]))) == len(pairs) == PAIRS
    for pair in pairs:
        prompts = [specimen.tokenizer(text)["input_ids"] for text in (pair.harmful, pair.harmless, pair.placebo)]
        assert all(specimen.tokenizer.unk_token_id not in tokens for tokens in prompts)
        assert [len(set(tokens)) for tokens in zip(*prompts, strict=True)].count(3) == 1
        assert len({*nouns_of(pair)}) == 3


def test_cutting_the_gates_stops_harm(planted: tuple[str, Specimen]) -> None:
    name, specimen = planted
    if not specimen.gates or name in ("nothing", "crowd-behind"):
        assert name in (
            "nothing",
            "crowd-behind",
            "late-head",
            "early-gate",
            "early-crowd",
            "many",
            "late-crowd",
            "re-embedded",
        )
        return
    assert {layer for layer, _ in specimen.gates} <= set(LATE)
    before = (outcomes(specimen, "harmful") - outcomes(specimen, "harmless")).mean()
    with torch.no_grad():
        for layer, unit in specimen.gates:
            specimen.model.model.layers[layer].mlp.down_proj.weight[:, unit] = 0
    after = (outcomes(specimen, "harmful") - outcomes(specimen, "harmless")).mean()
    assert abs(after) < 0.15 * before


def test_a_backup_takes_over_where_the_gate_is_shut() -> None:
    specimen = build(CASES["backup"], 5)
    first = min(layer for layer, _ in specimen.gates)
    before = (outcomes(specimen, "harmful") - outcomes(specimen, "harmless")).mean()
    with torch.no_grad():
        for layer, unit in specimen.gates:
            if layer == first:
                specimen.model.model.layers[layer].mlp.down_proj.weight[:, unit] = 0
    after = (outcomes(specimen, "harmful") - outcomes(specimen, "harmless")).mean()
    assert 0.6 * before < after < 0.95 * before


@pytest.mark.parametrize(("name", "told"), [("words", True), ("gate", False), ("two-words", False)])
def test_embeddings_tell_harm_only_where_it_is_a_word(name: str, told: bool) -> None:
    """A line fitted to half of the pairs, on the nouns of the other half."""
    specimen = build(CASES[name], 5)
    ids = [specimen.tokenizer.convert_tokens_to_ids(list(nouns_of(pair)[:2])) for pair in specimen.pairs]
    nouns = specimen.model.model.embed_tokens.weight.detach().double()[torch.tensor(ids)]  # (pair, side, d_model)
    known, asked = nouns[: PAIRS // 2], nouns[PAIRS // 2 :]
    line = (known[:, 0] - known[:, 1]).mean(0)
    right = ((asked[:, 0] - asked[:, 1]) @ line > 0).double().mean()
    assert (right > 0.95) if told else (right < 0.85)


def test_the_seed_decides_everything() -> None:
    torch.manual_seed(1)
    first = build(CASES["gate"], 3)
    torch.manual_seed(2)
    again, other = build(CASES["gate"], 3), build(CASES["gate"], 4)
    assert first.pairs == again.pairs != other.pairs
    assert first.gates == again.gates
    same = again.model.state_dict()
    assert all(torch.equal(weight, same[name]) for name, weight in first.model.state_dict().items())
