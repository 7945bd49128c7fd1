"""Fair placebos and independent pairs: small cases worked out by hand, and the package's own pairs."""

import math
from itertools import combinations

import numpy as np
import pytest
from fakes import words_tokenizer
from oracle import Subject

from remote_mediation.pairs import BUILTIN, PromptPair, load_pairs
from remote_mediation.placebo import DISTANCE, RARITY, TOKENS, Balance, balance, components, edit_words

# Ids of the words: steal 7, wash 8, sell 9, the 11, my 12, burn 28 and fix 29 (places in fakes.WORDS).
STEAL = ("steal the car", "wash the car", "sell the car")
BURN = ("burn the bike now", "fix the bike now", "sell my bike now")
# One number a word, drawn out along (3, 4): ids that differ by 1 lie 5 apart.
EMBEDDINGS = np.outer(np.arange(40), [3.0, 4.0]).astype(np.float32)


def pair(harmful: str, harmless: str, placebo: str = "", name: str = "p", template: str = "") -> PromptPair:
    return PromptPair(name, harmful, harmless, "", template, placebo=placebo)


def named(*texts: tuple[str, ...]) -> list[PromptPair]:
    return [pair(*prompts, name=str(number)) for number, prompts in enumerate(texts)]


def test_balance_by_hand() -> None:
    tokens, rarity, distance = balance([pair(*STEAL), pair(*BURN)], words_tokenizer(), EMBEDDINGS)

    # Harm puts in 1 and 1 token, the placebo 1 and 2: variances 0 and 1/2, so a pooled deviation of 1/2.
    assert tokens == Balance(TOKENS, 1.0, 1.5, -1.0, 2)

    # steal, burn against sell, "sell my".
    harm, placebo = [math.log(8), math.log(29)], [math.log(10), math.log(10) + math.log(13)]
    pooled = math.sqrt(((harm[0] - harm[1]) ** 2 / 2 + (placebo[0] - placebo[1]) ** 2 / 2) / 2)
    assert rarity.measure == RARITY
    assert rarity.harm == pytest.approx(sum(harm) / 2)
    assert rarity.placebo == pytest.approx(sum(placebo) / 2)
    assert rarity.difference == pytest.approx((sum(harm) - sum(placebo)) / 2 / pooled)

    # steal and sell lie 1 from wash, burn 1 from fix; "sell my" at 10.5 lies 9.5 from "fix the" at 20.
    assert distance.measure == DISTANCE
    assert distance.harm == pytest.approx(5)
    assert distance.placebo == pytest.approx((5 + 47.5) / 2)
    assert distance.difference == pytest.approx(-21.25 / math.sqrt(42.5**2 / 2 / 2))
    assert distance.pairs == 2


def test_without_embeddings_there_is_no_distance() -> None:
    assert [line.measure for line in balance([pair(*STEAL)], words_tokenizer())] == [TOKENS, RARITY]


def test_pairs_without_a_placebo_are_left_out() -> None:
    with_placebo = [pair(*STEAL), pair(*BURN)]
    more = [*with_placebo, pair("burn my house tonight please", "fix my house")]
    assert balance(more, words_tokenizer(), EMBEDDINGS) == balance(with_placebo, words_tokenizer(), EMBEDDINGS)


@pytest.mark.parametrize(
    "inserted",
    [
        pair("wash the car now", "wash the car", "sell the car"),
        pair("steal the car", "wash the car", "wash the car now"),
    ],
)
def test_an_insertion_has_no_distance(inserted: PromptPair) -> None:
    tokens, _, distance = balance([pair(*STEAL), pair(*BURN), inserted], words_tokenizer(), EMBEDDINGS)
    assert (tokens.pairs, distance.pairs) == (3, 2)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("pairs", [[], [pair(*STEAL)], [pair("steal the car", "wash the car")] * 3])
def test_fewer_than_two_placebos_say_nothing(pairs: list[PromptPair]) -> None:
    for line in balance(pairs, words_tokenizer(), EMBEDDINGS):
        assert line.pairs < 2
        assert math.isnan(line.difference)
        assert not line.alike


def test_differences_without_spread() -> None:
    same = balance([pair(*STEAL)] * 2, words_tokenizer())[0]
    assert (same.difference, same.alike) == (0, True)
    longer = pair("steal the car", "wash the car", "sell my bike car")
    differing = balance([longer] * 2, words_tokenizer())[0]
    assert (differing.difference, differing.alike) == (-math.inf, False)


@pytest.mark.parametrize(("difference", "alike"), [(0.24, True), (-0.24, True), (0.25, False), (-0.3, False)])
def test_alike_has_two_sides(difference: float, alike: bool) -> None:
    assert Balance(TOKENS, 1, 1, difference, 60).alike is alike


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        (("Steal the car!", "Wash the car"), {"steal", "wash"}),
        (("Steal the car", "Wash the car", "Sell the car"), {"steal", "wash", "sell"}),
        (("How can I kill a person?", "How can I kill a Python process?"), {"person", "python", "process"}),
        (("Sell the stolen bike", "Sell the bike"), {"stolen"}),
        # Articles, prepositions, pronouns and auxiliaries do not count; a negation does.
        (("Spy on an owl", "Rely on the owl"), {"spy", "rely"}),
        (("Shoot at her", "Wave to him"), {"shoot", "wave"}),
        (("Do not help her", "Do help her"), {"not"}),
        # One word, with its hyphen or apostrophe.
        (("Hit my mother-in-law", "Hug my mother-in-law"), {"hit", "hug"}),
        (("Burn the owner's car", "Burn the owner\u2019s car"), {"owner's", "owner\u2019s"}),
    ],
)
def test_edit_words(prompts: tuple[str, ...], words: set[str]) -> None:
    assert edit_words(pair(*prompts)) == words


@pytest.mark.parametrize(
    ("other", "together"),
    [
        (("Hide the steel", "Find the steel", "Move the steel"), False),
        (("Steal a boat", "Row a boat", "Tow a boat"), True),  # the harmful word
        (("Sink a boat", "Wash a boat", "Tow a boat"), True),  # the harmless one
        (("Sink a boat", "Row a boat", "Sell a boat"), True),  # the placebo
        (("Sink a boat", "Sell a boat"), True),  # another's placebo as harmless word
        (("SELL a boat", "Row a boat"), True),
        (("Selling a boat", "Row a boat"), False),  # an inflected form
        (("Sink the car", "Move the car", "Tow the car"), False),  # a word that all three have is no edit
        (("Shoot at my car", "Wave to my car"), False),
    ],
)
def test_pairs_with_a_common_edit_word_are_one_component(other: tuple[str, ...], together: bool) -> None:
    labels = components(named(("Steal the car", "Wash the car", "Sell the car"), other))
    assert labels == ("0", "0" if together else "1")


def test_function_words_join_nothing() -> None:
    assert components(named(("Shoot at him", "Wave to him"), ("Spit at her", "Bow to her"))) == ("0", "1")


def test_a_template_joins_and_an_empty_one_does_not() -> None:
    texts = [("steal it", "wash it"), ("burn it", "fix it"), ("rob it", "own it"), ("kick it", "hold it")]
    pairs = [
        pair(*prompts, name=name, template=template)
        for prompts, name, template in zip(texts, "abcd", ("", "frame", "", "frame"), strict=True)
    ]
    assert components(pairs) == ("a", "b", "c", "b")


def test_a_third_pair_links_two() -> None:
    ends = [("steal it", "wash it"), ("burn it", "fix it")]
    assert components(named(*ends)) == ("0", "1")
    assert components(named(*ends, ("steal it", "fix it"))) == ("0", "0", "0")


def test_identical_prompts_under_other_ids_are_one_component() -> None:
    # Both edits are made of function words alone, so nothing but the common prompt links them.
    twice = [("Give it to her", "Give it to me"), ("give it  to her", "Give it to him"), ("Take him", "Take her")]
    assert components(named(*twice)) == ("0", "0", "2")
    assert components(named(("Steal it", "Wash it"), ("Steal it", "Wash it"))) == ("0", "0")


def test_no_pairs_have_no_components() -> None:
    assert components([]) == ()


def test_components_are_those_of_a_flood_fill() -> None:
    rng = np.random.default_rng(3)
    words = [f"word{number}" for number in range(120)]
    pairs = [
        pair(*(f"{word} it" for word in rng.choice(words, 3, replace=False)), name=str(number), template=str(frame))
        for number, frame in enumerate(rng.integers(0, 60, 30))
    ]
    component = {one.id: {one.id} for one in pairs}
    for one, other in combinations(pairs, 2):
        if one.template == other.template or edit_words(one) & edit_words(other):
            merged = component[one.id] | component[other.id]
            component |= dict.fromkeys(merged, merged)
    labels = components(pairs)
    assert 3 <= len(set(labels)) < 30
    for one, label in zip(pairs, labels, strict=True):
        assert label == min(component[one.id], key=int)


def test_each_builtin_pair_has_a_placebo_in_the_same_words() -> None:
    for text in load_pairs(BUILTIN):
        rows = list(zip(*(prompt.split() for prompt in (text.harmful, text.harmless, text.placebo)), strict=True))
        changed = [row for row in rows if len(set(row)) > 1]
        assert len(changed) == 1, text.id
        assert len(set(changed[0])) == 3, text.id


def test_builtin_pairs_are_enough_for_not_supported() -> None:
    pairs = load_pairs(BUILTIN)
    assert len(set(components(pairs))) >= 60


@pytest.mark.slow
def test_builtin_placebos_are_alike_for_smollm2(smollm2: Subject) -> None:
    embeddings = smollm2.plain.get_input_embeddings().weight.detach().float().numpy()
    lines = balance(load_pairs(BUILTIN), smollm2.backend.tokenizer, embeddings)
    assert [line.measure for line in lines] == [TOKENS, RARITY, DISTANCE]
    assert all(line.alike for line in lines), lines
