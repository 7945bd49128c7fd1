"""What planted mechanisms are written on: a Llama of random weights whose stream has directions of their own for them.

Each stage of a mechanism writes along its own direction of the residual stream. Random heads and neurons also read
these directions, weakly, and write mostly elsewhere, where the unembedding of the two answers hears them: distractors
are noise, not silence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import silu
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP

from remote_mediation.planted.words import MINUS, PLUS, VOCABULARY, Pair

HEADS = 4
_GAIN = 4.0
"""Pre-activation of a planted neuron when the feature it reads is present, above that when it is absent."""
GATE_THRESHOLD = 1.0
"""Minus the pre-activation of a gate neuron without harm: there SiLU is flat, and noise does not pass."""
_MARKER_LOGIT = 7.0
"""Attention score of a mover for the noun; its score for other tokens is about 0."""
_NOISE = 1.0
"""RMS of what distractor neurons add to a coordinate of the stream over all layers; it is 1 in the embedding."""
_GROWTH = 1.1
"""What all distractors add to the mean square of the stream, measured; heads average over tokens and add little."""
_NEURON_RMS = 0.6
"""RMS of silu(g)·u for independent standard normal g and u."""
_QUERY_GAIN = 2.0
"""Makes distractor heads attend to few tokens, so that what they write differs from prompt to prompt."""
_READ_LEAK, _WRITE_LEAK = 0.3, 0.05
"""How much of the planted directions is left in the weights with which distractors read, and write."""
TOTAL_EFFECT = 6.0
"""Mean TE along the answer direction, in logits; what distractors do with harm comes on top."""
_ANSWER_NOISE = 1.1
"""Standard deviation over harmless prompts of what the distractors add to the outcome, in logits."""
_ANSWER_LOGIT = 8.0
"""Logit of both answers in the mean final state: one of them is always the greedy answer."""


class Planted(NamedTuple):
    """Units that we wrote, in one layer."""

    layer: int
    """Index of the layer, from 0."""
    units: tuple[int, ...]
    """Sorted indices: of neurons (inputs of `mlp.down_proj`), for movers of attention heads."""


# --- the residual stream ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stream:
    """The planted directions, and how to write and read along them."""

    directions: Mapping[str, Tensor]
    """Feature → unit vector (d_model,); orthogonal to one another."""
    amplitude: Mapping[str, float]
    """Feature → its length in the stream when it is there as a whole; a token's embedding has length sqrt(d_model)."""
    layers: int
    """Number of layers of the model."""

    def rms(self, layer: int) -> float:
        """Expected RMS of the stream that enters a layer."""
        return sqrt(1 + _GROWTH * layer / self.layers)

    def write(self, feature: str, share: float = 1.0) -> Tensor:
        """The vector (d_model,) that adds this share of a feature to the stream."""
        return share * self.amplitude[feature] * self.directions[feature]

    def read(self, layer: int, mix: Mapping[str, float]) -> Tensor:
        """The vector (d_model,) whose product with a layer's normed input is Σ mix[f] · (share of f in the stream)."""
        parts = [share / self.amplitude[feature] * self.directions[feature] for feature, share in mix.items()]
        return self.rms(layer) * torch.stack(parts).sum(0)

    def damp(self, weight: Tensor, leak: float) -> Tensor:
        """`weight` (n, d_model) with all but `leak` of the planted directions taken out of its rows."""
        basis = torch.stack(list(self.directions.values()))
        return weight - (1 - leak) * weight @ basis.T @ basis


def draw_stream(generator: Generator, amplitude: Mapping[str, float], layers: int, d_model: int) -> Stream:
    """Random orthogonal directions for some features of these amplitudes."""
    basis, _ = torch.linalg.qr(_normal(generator, d_model, len(amplitude)))
    return Stream(dict(zip(amplitude, basis.T.contiguous(), strict=True)), amplitude, layers)


def _normal(generator: Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator)


# --- distractors ------------------------------------------------------------------------------------------------------


def random_model(generator: Generator, layers: int, d_ff: int, d_model: int) -> LlamaForCausalLM:
    """A model of random weights: what reads a normed input gets variance 1, all layers together write `_NOISE`."""
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=d_model,
        intermediate_size=d_ff,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        pad_token_id=VOCABULARY["<pad>"],
        eos_token_id=VOCABULARY["<end>"],
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        model = LlamaForCausalLM(config).eval()
    for linear in model.modules():
        if isinstance(linear, nn.Linear):
            linear.weight.copy_(_normal(generator, *linear.weight.shape) / sqrt(linear.in_features))
    for block in model.model.layers:
        block.self_attn.q_proj.weight.mul_(_QUERY_GAIN)
        block.self_attn.o_proj.weight.mul_(_NOISE / sqrt(layers))
        block.mlp.down_proj.weight.mul_(_NOISE / sqrt(layers) / _NEURON_RMS)
    model.model.embed_tokens.weight.copy_(_normal(generator, len(VOCABULARY), d_model))
    return model


def keep_off_planted_directions(model: LlamaForCausalLM, stream: Stream) -> None:
    """Leave random weights only a little of the planted directions: distractors blur harm, they do not carry it."""
    for block in model.model.layers:
        attention, mlp = block.self_attn, block.mlp
        for reader in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
            reader.weight.copy_(stream.damp(reader.weight, _READ_LEAK))
        for writer in (attention.o_proj, mlp.down_proj):
            writer.weight.copy_(stream.damp(writer.weight.T, _WRITE_LEAK).T)
    model.lm_head.weight.copy_(stream.damp(model.lm_head.weight, _WRITE_LEAK))


# --- what is planted --------------------------------------------------------------------------------------------------


def write_embedding(weight: Tensor, stream: Stream, codes: Mapping[str, Mapping[str, float]]) -> None:
    """Give every token const, words their code, and random mass elsewhere up to length sqrt(d_model).

    codes: word → feature → share of it. Features that the stream does not have are passed over.
    """
    planted = stream.write("const").repeat(len(weight), 1)
    for word, code in codes.items():
        for feature, share in code.items():
            if feature in stream.amplitude:
                planted[VOCABULARY[word]] += stream.write(feature, share)
    room = (weight.shape[1] - planted.square().sum(1, keepdim=True)).sqrt()
    rest = stream.damp(weight, 0.0)
    weight.copy_(planted + room * rest / rest.norm(dim=1, keepdim=True))


def write_neurons(
    mlp: LlamaMLP, planted: Planted, stream: Stream, hears: Mapping[str, float], says: Tensor, threshold: float = 0.0
) -> None:
    """Neurons that together add `says` (d_model,) when the mix of features they hear goes from 0 to 1.

    Each computes silu(_GAIN · mix − threshold · const) · const; their shares of `says` lie within 15% of equal.
    """
    units, const = list(planted.units), stream.read(planted.layer, {"const": 1.0})
    silent, loud = silu(torch.tensor([-threshold, _GAIN - threshold]))
    shares = torch.linspace(0.85, 1.15, len(units))
    mlp.gate_proj.weight[units] = _GAIN * stream.read(planted.layer, hears) - threshold * const
    mlp.up_proj.weight[units] = const
    mlp.down_proj.weight[:, units] = torch.outer(says, shares / shares.sum()) / (loud - silent)


def write_products(mlp: LlamaMLP, planted: Planted, stream: Stream, left: str, right: str, says: Tensor) -> None:
    """Pairs of neurons that together add the product of two features, times `says` (d_model,).

    silu(g a) b + silu(−g a) (−b) = g a b, exactly: what no neuron with one input could do, a pair of gated ones does.
    """
    signs = torch.tensor([1.0, -1.0]).repeat(len(planted.units) // 2)
    units = list(planted.units)[: len(signs)]
    mlp.gate_proj.weight[units] = torch.outer(_GAIN * signs, stream.read(planted.layer, {left: 1.0}))
    mlp.up_proj.weight[units] = torch.outer(signs, stream.read(planted.layer, {right: 1.0}))
    mlp.down_proj.weight[:, units] = (says / (_GAIN * len(signs) / 2))[:, None]


def write_head(
    attention: LlamaAttention,
    planted: Planted,
    stream: Stream,
    hears: Mapping[str, float],
    says: Tensor,
    marker: str = "noun",
) -> None:
    """A head that attends to the token with the marker and adds `says` (d_model,) times the mix of features there.

    It uses one coordinate of the head, the one that rotary embedding turns slowest, so distance hardly matters.
    """
    (head,), width = planted.units, attention.head_dim
    rows, slowest = slice(head * width, (head + 1) * width), (head + 1) * width - 1
    for reader in (attention.q_proj, attention.k_proj, attention.v_proj):
        reader.weight[rows] = 0
    attention.o_proj.weight[:, rows] = 0
    attention.q_proj.weight[slowest] = _MARKER_LOGIT * sqrt(width) * stream.read(planted.layer, {"const": 1.0})
    attention.k_proj.weight[slowest] = stream.read(planted.layer, {marker: 1.0})
    attention.v_proj.weight[slowest] = stream.read(planted.layer, hears)
    attention.o_proj.weight[:, slowest] = says


def write_answers(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    stream: Stream,
    pairs: Sequence[Pair],
    heard: float | None = None,
) -> None:
    """Unembed the answers so that their logit difference hears the answer feature and, randomly, the distractors.

    Both are scaled on the pairs' own prompts, and const ties the two answers in the mean final state.
    heard: by how much harm moves the final state along the answer feature; as measured on the pairs if not given.
    """
    plus, minus = (model.lm_head.weight[VOCABULARY[word]] for word in (PLUS, MINUS))
    states = _final_states(model, tokenizer, pairs)
    mean, change = states.mean((0, 1)), (states[0] - states[1]).mean(0)
    answer, const = stream.directions["answer"], stream.directions["const"]
    noise = plus - minus
    moved = answer @ change if heard is None else heard
    difference = answer * TOTAL_EFFECT / moved + noise * _ANSWER_NOISE / (states[1] @ noise).std()
    for row, half in ((plus, difference / 2), (minus, -difference / 2)):
        row.copy_(half + const * (_ANSWER_LOGIT - half @ mean) / (const @ mean))


def _final_states(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, pairs: Sequence[Pair]) -> Tensor:
    """What the unembedding reads at the last token of the harmful and of the harmless prompts: (2, pair, d_model)."""
    texts = [pair.harmful for pair in pairs] + [pair.harmless for pair in pairs]
    chats = [[{"role": "user", "content": text}] for text in texts]
    batch = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    states: Tensor = model.model(**batch, use_cache=False).last_hidden_state[:, -1]
    return states.reshape(2, len(pairs), -1)
