"""A continuation has the tokens that it has behind its prompt, not those it has alone."""

import pytest
import tokenizers
from fakes import words_tokenizer
from transformers import PreTrainedTokenizerFast

from remote_mediation.errors import PairsError, SettingsError
from remote_mediation.openings import given_openings
from remote_mediation.outcomes import logit_diff
from remote_mediation.prompts import encode_after


def sentencepiece() -> PreTrainedTokenizerFast:
    """One token per word, with SentencePiece's blank before every first one; brackets are words of their own."""
    vocabulary = {word: index for index, word in enumerate(["<unk>", "]", "Sure", "▁Sure", "▁hello", "▁[x]", "Surely"])}
    model = tokenizers.models.WordLevel(vocabulary, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first"),
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"\]"), "isolated"),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def test_the_blank_of_sentencepiece_is_not_read() -> None:
    tokenizer = sentencepiece()
    assert tokenizer("Sure", add_special_tokens=False)["input_ids"] == [3]
    assert encode_after(["hello]"], "Sure", tokenizer) == (2,)
    assert encode_after(["hello]"], " Sure", tokenizer) == (3,)


def test_outcomes_read_what_follows_the_prompt() -> None:
    tokenizer = sentencepiece()
    assert logit_diff(["Sure"], ["hello"], tokenizer, ["hello]"]).plus == (2,)
    assert given_openings(["Sure"], [" hello"], tokenizer, ["hello]"]).compliant == ((2,),)
    with pytest.raises(SettingsError, match="the opening ' ' cannot be read: '' has no tokens"):
        given_openings([" "], ["hello"], tokenizer, ["hello]"])


def test_a_word_behind_a_word_takes_a_blank() -> None:
    tokenizer = words_tokenizer()
    ids = tokenizer("car sure")["input_ids"]
    assert encode_after(["steal the car"], "sure", tokenizer) == (ids[1],)
    assert encode_after(["steal the car", "a bike"], "sure", tokenizer) == (ids[1],)


def merging() -> PreTrainedTokenizerFast:
    """A token per letter, and one of an e with the blank after it."""
    vocabulary = {word: index for index, word in enumerate(["<unk>", *"Surexth ", "e "])}
    model = tokenizers.models.BPE(vocabulary, [("e", " ")], unk_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(model), unk_token="<unk>")


def test_a_continuation_that_changes_a_prompt_is_refused() -> None:
    assert encode_after(["x"], "Sur", merging()) == (8, 1, 2, 3)
    with pytest.raises(PairsError, match="'Sur' merges with the end of a prompt"):
        encode_after(["x", "re"], "Sur", merging())


def test_openings_are_beginnings_of_what_they_open() -> None:
    assert given_openings(["Sur"], ["x"], merging(), ["."]).compliant == ((1, 2, 3),)
    with pytest.raises(SettingsError, match="the opening 'Sure' has other tokens once it goes on; end it"):
        given_openings(["Sure"], ["x"], merging(), ["."])


def byte_level(pattern: str) -> PreTrainedTokenizerFast:
    """A token per letter and one for two line breaks, cut as GPT-2 or as Qwen cuts before it merges."""
    vocabulary = {word: index for index, word in enumerate(["Ċ", "ĊĊ", "Ġ", *"Sure:>17"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [("Ċ", "Ċ")]))
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    inner = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, inner])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


GPT2 = r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@pytest.mark.parametrize("pattern", [GPT2, QWEN])
@pytest.mark.parametrize("end", ["\n", "\n\n", "\n\n\n", " ", "  "])
@pytest.mark.parametrize("text", ["Sure", "17"])
def test_behind_a_blank_no_other_is_put(pattern: str, end: str, text: str) -> None:
    tokenizer = byte_level(pattern)
    ids = encode_after([f"ure:>{end}"], text, tokenizer)
    assert tokenizer.decode(ids) == text


def test_a_blank_of_the_continuation_takes_no_other_before_it() -> None:
    with pytest.raises(PairsError, match="merges with the end of a prompt"):
        encode_after(["ure\n"], "\nSure", byte_level(QWEN))
    with pytest.raises(PairsError, match="merges with the end of a prompt"):
        encode_after(["r"], " e", _gluing())


def _gluing() -> PreTrainedTokenizerFast:
    """A token per letter, and one of an r with the blank after it."""
    model = tokenizers.models.BPE({"r": 0, "e": 1, " ": 2, "r ": 3}, [("r", " ")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(model))


@pytest.mark.parametrize("text", ["", " ", "\n"])
def test_a_continuation_without_tokens_is_refused(text: str) -> None:
    with pytest.raises(PairsError, match="has no tokens behind the prompt"):
        encode_after(["hello]"], text, sentencepiece())
