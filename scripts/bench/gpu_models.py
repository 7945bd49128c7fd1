"""What `gpu` measures on: random models of published shapes, built where they run, and one pair of prompts."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import tokenizers
import torch
from nnsight import TransformersModel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from remote_mediation.engine.local import LocalBackend
from remote_mediation.models import info_of
from remote_mediation.outcomes import LogitOutcome, Outcome, ResponseOutcome
from remote_mediation.sites import ModelInfo
from remote_mediation.tokens import TokenPair

SEED = 0
# Of every prompt; the last two belong to no edit.
LENGTH = 40
_WORDS = ("<unk>", "a", "b")


class Shape(NamedTuple):
    """A model by its configuration."""

    name: str
    """For the report."""
    family: str
    """`model_type`."""
    settings: dict[str, Any]
    """Of the configuration."""


def llama(name: str, width: int, ff: int, layers: int, heads: int, kv_heads: int, vocab: int, tied: bool) -> Shape:
    """A shape of the Llama 3 family."""
    settings = {
        "hidden_size": width,
        "intermediate_size": ff,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
    }
    return Shape(name, "llama", settings)


# As published (the models' config.json).
ONE_B = llama("1B (Llama 3.2)", 2048, 8192, 16, 32, 8, 128256, tied=True)
EIGHT_B = llama("8B (Llama 3.1)", 4096, 14336, 32, 32, 8, 128256, tied=False)
SEVENTY_B = llama("70B (Llama 3.1)", 8192, 28672, 80, 64, 8, 128256, tied=False)


def thin(layers: int) -> Shape:
    """So many layers, as narrow as can be: what time it takes is hardly arithmetic."""
    return llama(f"{layers} thin layers", 8, 8, layers, 2, 1, 64, tied=False)


def thin_mixture(layers: int, experts: int) -> Shape:
    """The same with experts, of which two run for a token."""
    dense = thin(layers)
    routed = {"num_local_experts": experts, "num_experts_per_tok": 2}
    return Shape(f"{layers} thin layers of {experts} experts", "mixtral", {**dense.settings, **routed})


def info(shape: Shape) -> ModelInfo:
    """The shape as the package plans with it."""
    return info_of(AutoConfig.for_model(shape.family, **shape.settings), shape.name)


def backend(shape: Shape, dtype: str, device: str) -> LocalBackend:
    """The package's own backend over a random model, whose weights a seed decides; nothing is loaded or moved."""
    torch.manual_seed(SEED)
    config = AutoConfig.for_model(shape.family, **shape.settings)
    with torch.device(device):
        module = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), trust_remote_code=False).eval()
    model = TransformersModel(
        module, tokenizer=_tokenizer(), task="text-generation", device=device, trust_remote_code=False
    )
    return LocalBackend(model, info(shape))


def pair(first: int, shape: Shape, length: int = LENGTH, answer: int = 0) -> TokenPair:
    """Two random prompts of one length that differ in the token at `first`. answer: tokens of each answer."""
    rng = np.random.default_rng(SEED)
    ids = [int(token) for token in rng.integers(3, shape.settings["vocab_size"], length)]
    other = [*ids[:first], 1 + ids[first] % 2, *ids[first + 1 :]]
    answers = (tuple(ids[:answer]), tuple(ids[-answer:] if answer else ()))
    return TokenPair(f"from {first}", "", "", tuple(ids), tuple(other), first, length - first - 1, 1, answers)


def outcome(normalise: bool = False) -> Outcome:
    """A difference of two logits, or with `normalise` of log-probabilities, for which all logits are made."""
    return ResponseOutcome() if normalise else LogitOutcome(plus=(1,), minus=(2,))


def _tokenizer() -> PreTrainedTokenizerFast:
    """A real fast tokenizer of a few words; no text is read here."""
    model = tokenizers.models.WordLevel({word: number for number, word in enumerate(_WORDS)}, unk_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(model), unk_token="<unk>")
