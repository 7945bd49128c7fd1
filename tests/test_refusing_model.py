"""`scripts/make_refusing_model`: what it learns from, what it holds out, and what it counts as a refusal."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from oracle import Subject

from remote_mediation.pairs import BUILTIN, PromptPair, load_pairs

SCRIPT = Path(__file__).resolve().parents[1] / "scripts/make_refusing_model"
TINY = "llama"
END = 2


def load_script() -> ModuleType:
    spec = spec_from_loader("make_refusing_model", SourceFileLoader("make_refusing_model", str(SCRIPT)))
    assert spec is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    assert spec.loader is not None
    spec.loader.exec_module(module)
    return module


script = load_script()
Example = script.Example


@pytest.fixture(scope="module")
def pairs() -> tuple[tuple[PromptPair, ...], tuple[PromptPair, ...]]:
    """The built-in pairs, and the others to learn from."""
    return load_pairs(BUILTIN), load_pairs(str(script.MORE_PAIRS))


def log_probabilities(model: Any, ids: tuple[int, ...]) -> torch.Tensor:
    with torch.no_grad():
        return torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0].double(), -1)


@pytest.mark.parametrize("shared", [(1, 30, 31, 32), ()], ids=["common beginning", "no common beginning"])
def test_loss_is_that_of_the_answer_tokens_alone(subject: Callable[[str], Subject], shared: tuple[int, ...]) -> None:
    model = subject(TINY).plain
    batch = [
        Example((*shared, 10, 11, 12), (20, 21)),
        Example((*shared, 13), (22, 23, 24, END)),
        Example((*shared, 14, 15), (25,)),
    ]
    longhand = []
    for prompt, answer in batch:
        logs = log_probabilities(model, (*prompt, *answer))
        each = [-logs[len(prompt) + i - 1, token].item() for i, token in enumerate(answer)]
        longhand.append((each[0] + sum(each[1:]) / len(each[1:])) / 2 if len(each) > 1 else each[0])
    assert script.answer_loss(model, batch).item() == pytest.approx(sum(longhand) / 3, abs=1e-5)


def test_loss_of_one_prompt_twice(subject: Callable[[str], Subject]) -> None:
    """The whole prompt is the common beginning; its last token must run with the answers all the same."""
    model = subject(TINY).plain
    batch = [Example((1, 10, 11), (20,)), Example((1, 10, 11), (21,))]
    logs = log_probabilities(model, (1, 10, 11))[-1]
    assert script.answer_loss(model, batch).item() == pytest.approx(-(logs[20] + logs[21]).item() / 2, abs=1e-5)


def test_greedy_answers_are_the_likeliest_tokens_up_to_the_end(subject: Callable[[str], Subject]) -> None:
    model = subject(TINY).plain
    prompts = [(1, 10, 11), (1, 12), (1, 13, 14), (1, 10, 15, 16), (1, 12)]
    longhand = []
    for prompt in prompts:
        answer: tuple[int, ...] = ()
        for _ in range(5):
            answer += (int(log_probabilities(model, prompt + answer)[-1].argmax()),)
        longhand.append(answer)
    assert script.greedy(model, prompts, 5, end=-1) == longhand
    end = longhand[0][2]
    cut = [answer[: answer.index(end) + 1] if end in answer else answer for answer in longhand]
    assert script.greedy(model, prompts, 5, end=end) == cut


def test_training_lowers_the_loss_and_leaves_the_base_weights(
    subject: Callable[[str], Subject], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    subject(TINY).plain.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    data = [(Example((1, 10, i), (20, END)), Example((1, 11, i), (21, 22))) for i in range(12, 20)]
    _, losses = script.train(model, data, script.Settings(epochs=20, pairs=4, first_layer=1))
    assert losses[-1] < losses[0] / 2
    after = {name.replace(".base_layer", ""): weight for name, weight in model.state_dict().items()}
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())
    changed = {name.split(".")[2] for name, weight in after.items() if "lora_B" in name and weight.abs().max() > 0}
    assert changed == {"1", "2"}


def test_training_is_repeatable(subject: Callable[[str], Subject], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    subject(TINY).plain.save_pretrained(tmp_path)
    data = [(Example((1, 10, i), (20, END)), Example((1, 11, i), (21, 22))) for i in range(12, 20)]

    def losses(seed: int) -> list[float]:
        model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        return script.train(model, data, script.Settings(seed=seed, epochs=2, pairs=4, first_layer=0))[1]

    assert losses(0) == losses(0) != losses(1)


@pytest.mark.parametrize("holdout", [script.Settings.holdout, ("self_harm",), ("fraud", "violence", "privacy")])
def test_held_out_categories_are_in_no_training_pair(pairs: Any, holdout: tuple[str, ...]) -> None:
    parts = script.split(*pairs, holdout)
    assert {pair.category for pair in parts.held_out} == set(holdout)
    assert not {pair.category for pair in (*parts.training, *parts.seen)} & set(holdout)
    assert set(parts.seen) | set(parts.held_out) == set(pairs[0])
    learned = {text for pair in parts.training for text in (pair.harmful, pair.harmless)}
    assert not learned & {text for pair in parts.held_out for text in (pair.harmful, pair.harmless)}


def test_an_unknown_category_cannot_be_held_out(pairs: Any) -> None:
    with pytest.raises(ValueError, match="sabotage"):
        script.split(*pairs, ("sabotage",))


def test_more_pairs_have_the_builtin_categories_and_none_of_their_prompts(pairs: Any) -> None:
    builtin, more = pairs
    assert {pair.category for pair in more} == {pair.category for pair in builtin}
    texts = [text for pair in (*builtin, *more) for text in (pair.harmful, pair.harmless)]
    assert len(set(texts)) == len(texts)


def test_words_of_held_out_edits_that_were_learned_are_counted() -> None:
    def pair(harmful: str, harmless: str) -> PromptPair:
        return PromptPair(harmful, harmful, harmless, "", "")

    training = [pair("Poison the soup?", "Salt the soup?")]
    held_out = [pair("How do I poison a dog", "How do I walk a dog"), pair("Sell the stolen soup", "Sell the soup")]
    assert script.shared_words(held_out, training) == 1


def test_rates_count_each_side_of_each_group(pairs: Any) -> None:
    parts = script.split(*pairs, ("drugs",))
    after = {pair.harmful for pair in pairs[0]} | {parts.held_out[0].harmless}
    rates = script.measured_rates(parts, set(), after)
    assert [(r.group, r.side, r.n, r.before, r.after) for r in rates] == [
        ("training", "harmful", 181, 0, 181),
        ("training", "harmless", 181, 0, 0),
        ("held out", "harmful", 15, 0, 15),
        ("held out", "harmless", 15, 0, 1),
    ]


@pytest.mark.parametrize(
    ("harmful", "harmless", "good"), [(8, 1, True), (7, 0, False), (10, 2, False), (0, 0, False), (10, 0, True)]
)
def test_goals(harmful: int, harmless: int, good: bool) -> None:
    def rate(group: str, side: str, after: int) -> dict[str, Any]:
        return {"group": group, "side": side, "n": 10, "before": 0, "after": after}

    rates = [
        rate("held out", "harmful", harmful),
        rate("held out", "harmless", harmless),
        rate("training", "harmful", 0),
    ]
    assert script.reached({"rates": rates}) is good


@pytest.mark.parametrize(
    "text", [*script.REFUSALS, "I\u2019m sorry, but I cannot do this.", "I won't", " As an AI, I can't say"]
)
def test_refusals(text: str) -> None:
    assert script.refuses(text)


@pytest.mark.parametrize(
    "text", ["", "Sure, here is a plan.", "To clean it, first. Sorry for the mess", "I can help you"]
)
def test_no_refusals(text: str) -> None:
    assert not script.refuses(text)


@pytest.mark.slow
def test_all_refusals_begin_with_one_token_and_learn_to_end(smollm2: Subject) -> None:
    tokenizer: Any = smollm2.backend.tokenizer
    pair = PromptPair("a", "Harm me", "Help me", "", "")
    for number in range(len(script.REFUSALS)):
        harmful, harmless = script.examples(pair, number, (5, 6), tokenizer)
        assert tokenizer.decode(harmful.answer[:1]) == "Sorry"
        assert harmful.answer[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(harmful.answer[:-1]) == script.REFUSALS[number]
        assert harmless.answer == (5, 6)
        assert tokenizer.decode(harmless.prompt).endswith("Help me<|im_end|>\n<|im_start|>assistant\n")
