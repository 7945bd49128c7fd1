"""What nobody sees and a tokenizer reads: pairs whose edit would reach as far as that are refused."""

import unicodedata
from typing import Any

import pytest
import tokenizers
from test_rendering import CHATML, byte_level, only, reason

from remote_mediation.pairs import PromptPair, folded
from remote_mediation.placebo import components
from remote_mediation.prompts import PromptForm, Turn
from remote_mediation.tokens import tokenise
from remote_mediation.unseen import first_otherwise, respelled, visible

KIND = "please bake a kind café cake at home today"
RUDE = KIND.replace("kind", "rude")
# What is written in place of something of the rude prompt, and what of both is told.
MARKS = [
    ("at home", "at\u00a0home", r"' ' in the harmless one is '\xa0' in the other"),
    ("home", "ho\u00adme", r"'home' in the harmless one is 'ho\xadme' in the other"),
    ("home", "\u200bhome", r"'home' in the harmless one is '\u200bhome' in the other"),
    ("home", "\u202ehome\u202c", r"'home' in the harmless one is '\u202ehome\u202c' in the other"),
    ("café", unicodedata.normalize("NFD", "café"), r"'caf\xe9' in the harmless one is 'cafe\u0301' in the other"),
    ("please", "\ufeffplease", r"'please' in the harmless one is '\ufeffplease' in the other"),
    ("home", "home\ufe0f", r"'home' in the harmless one is 'home\ufe0f' in the other"),
    ("home", "ho\u034fme", r"'home' in the harmless one is 'ho\u034fme' in the other"),
    ("home", "ho\x07me", r"'home' in the harmless one is 'ho\x07me' in the other"),
    ("bake a", "bake  a", r"' ' in the harmless one is '  ' in the other"),
    ("at home", "at \u200b home", r"' ' in the harmless one is ' \u200b ' in the other"),
    ("today", "today ", r"'' in the harmless one is ' ' in the other"),
    ("a rude", "a\u2009rude", r"' ' in the harmless one is '\u2009' in the other"),
]


@pytest.mark.parametrize(("seen", "mark", "told"), MARKS)
def test_unseen_marks_beside_the_edit_are_refused(seen: str, mark: str, told: str) -> None:
    """In silence the edit reached from the word that was meant to the mark."""
    found = reason(RUDE.replace(seen, mark), KIND, byte_level())
    assert found == f"beside the edit the prompts differ in what cannot be seen: {told}; spell both alike"


def test_the_mark_may_be_in_either_prompt() -> None:
    found = reason(RUDE, KIND.replace("home", "ho\u00adme"), byte_level())
    assert r"'ho\xadme' in the harmless one is 'home' in the other" in found


@pytest.mark.parametrize(
    ("harmful", "harmless"),
    [
        ("bake a ru\u00adde cake", "bake a kind cake"),
        ("bake a cake\n\nsay it rudely\n\nat home", "bake a cake at home"),
        ("bake a cake\n\nand be rude", "bake a cake\n\nand be kind"),
        ("bake a\u00a0rude cake", "bake a\u00a0kind cake"),
        ("bake a rude\nbig cake", "bake a kind big cake"),
    ],
)
def test_what_stands_in_the_edit_or_can_be_seen_is_an_edit(harmful: str, harmless: str) -> None:
    assert not any("cannot be seen" in one.reason for one in tokenise_one(harmful, harmless).refusals)


def tokenise_one(harmful: str, harmless: str, tokenizer: Any = None, **fields: Any) -> Any:
    return tokenise([PromptPair("p", harmful, harmless, "", "", **fields)], tokenizer or byte_level(), PromptForm())


def test_what_a_tokenizer_or_a_template_takes_away_is_no_difference() -> None:
    """Llama 3's template trims a text, and SentencePiece with NFKC reads a wide blank as a blank."""
    trims = byte_level(CHATML.replace("m['content']", "m['content'] | trim"))
    plain = only(PromptPair("p", RUDE, KIND, "", ""), trims)
    assert tokenise_one(RUDE + " \n", KIND, trims).pairs == (plain,)
    folds = byte_level()
    folds.backend_tokenizer.normalizer = tokenizers.normalizers.NFKC()
    assert tokenise_one(RUDE.replace("at home", "at\u00a0home"), KIND, folds).refusals == ()


def test_unseen_marks_in_earlier_messages_are_refused() -> None:
    before = (("harmful", Turn("system", "be\u00a0brief")), ("harmless", Turn("system", "be brief")))
    (refusal,) = tokenise_one(RUDE, KIND, turns=before).refusals
    assert r"' ' in the harmless one is '\xa0' in the other" in refusal.reason


def test_prompts_that_are_not_aligned_may_have_them() -> None:
    assert tokenise_one(RUDE + " ", KIND, aligned=False).refusals == ()


def test_placebos_are_pairs_too() -> None:
    pair = PromptPair("p", RUDE, KIND, "", "", placebo=KIND.replace("kind", "loud").replace("at ", "at\u00a0"))
    assert "cannot be seen" in tokenise([pair.of_placebo("x")], byte_level()).refusals[0].reason


@pytest.mark.parametrize(
    ("text", "other", "expected"),
    [
        ("a b c", "a x c", "a b c"),
        ("a\u00a0b  c ", " a x c", " a b c"),
        ("a  b", "a b c", "a b"),
        ("c\u200bd", "a cd", "cd"),
        ("", " ", " "),
        ("\u200b", "", ""),
        ("a\nb c", "a b d", "a\nb c"),
    ],
)
def test_respelled_by_hand(text: str, other: str, expected: str) -> None:
    assert respelled(text, other) == expected


def test_the_first_difference_is_told() -> None:
    assert first_otherwise("a b\u00a0c", "a b c") == ("\u00a0", " ")


def test_repeats_are_known_whatever_nobody_sees() -> None:
    """The same prompt from two systems was two clusters, which could lie on both sides of a split."""
    again = unicodedata.normalize("NFD", KIND).replace("home", "ho\u00adme")
    assert visible(again) == KIND
    assert folded(again.upper()) == folded(KIND)
    pairs = [
        PromptPair("a", "steal the fence", KIND, "", ""),
        PromptPair("b", "paint the door", again, "", ""),
        PromptPair("c", "sou\u00adr apple", "ripe apple", "", ""),
        PromptPair("d", "sour milk", "fresh milk", "", ""),
    ]
    assert components(pairs)[:2] == ("a", "a")
    assert components(pairs)[2] == components(pairs)[3]
