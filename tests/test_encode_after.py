"""A continuation has the tokens that it has behind its prompt, not those it has alone."""

import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

from remote_mediation.errors import PairsError
from remote_mediation.tokens import encode_after


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
    assert encode_after("hello]", "Sure", tokenizer) == (2,)
    assert encode_after("hello]", " Sure", tokenizer) == (3,)


def test_a_continuation_that_changes_the_prompt_is_refused() -> None:
    with pytest.raises(PairsError, match="'ly' merges with the end of the prompt"):
        encode_after("hello]Sure", "ly", sentencepiece())


def test_a_continuation_without_tokens_is_refused() -> None:
    with pytest.raises(PairsError, match="'' has no tokens behind the prompt"):
        encode_after("hello]", "", sentencepiece())
