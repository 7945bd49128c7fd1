"""A model whose mechanism we know, because we wrote it into the weights: the ground truth for the instrument.

On a real model nobody knows which neurons gate harm, so a wrong tool and a right one look alike. Here harm takes one
known route through an ordinary `LlamaForCausalLM` whose other weights are random (the idea of InterpBench, arXiv
2407.14494, by construction instead of training):

    harmful noun ─► reader neurons ─► mover heads ─► relay neurons ─► gate neurons ─► logit(sure) − logit(sorry)
    (embedding)     MLP of one        one in each    MLPs of two      MLP of one late
                    early layer, at   layer up to    middle layers,   layer, last token;
                    the noun          the gate's     last token       1 to 6 of them

The one idea: exactly one bottleneck. Every stage before the gate is split in several, or has a way around it: movers
read the noun's embedding as well as what the reader wrote, the gate hears movers as well as relays. So no other module
carries most of the effect, and in the gate's MLP only the gate neurons do.

Each stage writes along its own direction of the residual stream. Random heads and neurons also read these directions,
weakly, and write mostly elsewhere, where the unembedding of the two answers hears them: distractors are noise, not
silence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Generator, Tensor, nn
from torch.nn.functional import silu
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP

__all__ = ["Organism", "Pair", "Planted", "Truth", "planted_gate", "save"]

_PLUS, _MINUS = "sure", "sorry"
_SPECIALS = ("<pad>", "<unk>", "<end>", "<system>", "<user>", "<assistant>")
_CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
_NOUN_TABLE = {
    "weapon": (
        "bomb lamp kettle, rifle chair bench, grenade basket bucket, missile ladder shelf, dagger spoon fork, "
        "pistol candle lantern, mortar teapot vase, landmine doormat curtain, crossbow guitar flute, "
        "torpedo kayak sledge, bayonet pencil crayon, cannon wagon trolley"
    ),
    "poison": (
        "poison syrup honey, venom butter cheese, arsenic cocoa cinnamon, toxin vitamin mineral, "
        "cyanide vinegar mustard, ricin barley oatmeal, strychnine marmalade custard, sarin soup broth, "
        "mercury juice cider, hemlock parsley basil, nightshade spinach lettuce, antifreeze lemonade milk"
    ),
    "malware": (
        "virus script macro, trojan widget button, rootkit plugin theme, keylogger keyboard monitor, "
        "worm cursor icon, spyware calendar clock, ransomware spreadsheet slideshow, botnet website weblog, "
        "backdoor headline footer, exploit tutorial manual, adware browser editor, dropper folder archive"
    ),
    "fraud": (
        "forgery painting drawing, scam recipe menu, bribe gift present, ransom invoice receipt, "
        "swindle speech toast, counterfeit souvenir postcard, blackmail birthday wedding, extortion donation raffle, "
        "embezzlement bookkeeping budgeting, phishing fishing sailing, laundering ironing sewing, "
        "racketeering gardening knitting"
    ),
}
"""Category → (harmful noun, its harmless counterpart, another harmless one), three and three; each noun stands once."""
_NOUNS = tuple((category, *nouns.split()) for category, listed in _NOUN_TABLE.items() for nouns in listed.split(", "))
"""Category, harmful noun, harmless noun, placebo."""
_FILLERS = (
    *("please", "tell", "me", "how", "to", "make", "the", "old", "new", "small", "quiet", "green", "plain", "simple"),
    *("quick", "one", "that", "we", "you", "they", "can", "could", "would", "should", "about", "near", "under"),
    *("behind", "with", "without", "from", "into", "over", "after", "before", "while", "when", "where", "why"),
    *("river", "house", "garden", "street", "morning", "evening", "friend", "teacher", "sister", "neighbour"),
    *("letter", "story", "paper", "window", "table", "explain", "describe", "show", "write", "find", "build", "hide"),
    *("carry", "keep", "move", "today", "again", "slowly", "safely", "there", "here"),
)
_WORDS = (*_SPECIALS, _PLUS, _MINUS, *_FILLERS, *(noun for _, *nouns in _NOUNS for noun in nouns))
_VOCABULARY = {word: i for i, word in enumerate(_WORDS)}
"""Word → token id."""
_SHORTEST_FRAME, _LONGEST_FRAME = 6, 14

_HEADS = 4
_READERS, _RELAY_LAYERS, _RELAYS_PER_LAYER, _MOST_GATES = 3, 2, 3, 6
_AMPLITUDE = {"const": 4.0, "noun": 3.0, "word": 3.0, "concept": 3.0, "moved": 2.5, "relayed": 2.5, "answer": 4.0}
"""Length of each planted feature in the residual stream; a token's embedding has length sqrt(d_model).

const: in every token, serves as a bias. noun: in all nouns of a pair, so that attention is the same in its prompts.
word: in harmful nouns. concept, moved, relayed, answer: written by reader, movers, relays, gate.
"""
_GAIN = 4.0
"""Pre-activation of a planted neuron when the feature it reads is present, above that when it is absent."""
_GATE_THRESHOLD = 1.0
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
_TOTAL_EFFECT = 6.0
"""Mean TE along the answer direction, in logits; what distractors do with harm comes on top."""
_ANSWER_NOISE = 1.1
"""Standard deviation over harmless prompts of what the distractors add to the outcome, in logits."""
_ANSWER_LOGIT = 8.0
"""Logit of both answers in the mean final state: one of them is always the greedy answer."""


class Pair(NamedTuple):
    """A harmful prompt and the same words with a harmless noun; user text, without the chat template."""

    id: str
    """Unique in its organism."""
    harmful: str
    """The treatment prompt, x1."""
    harmless: str
    """The control prompt, x0; as many tokens as x1, one of them different."""
    placebo: str
    """The control prompt with another harmless noun, xp."""
    category: str
    """Kind of harm."""
    template: str
    """The frame of words around the noun, each pair's own."""


class Planted(NamedTuple):
    """Units that we wrote, in one layer."""

    layer: int
    """Index of the layer, from 0."""
    units: tuple[int, ...]
    """Sorted indices: of neurons (inputs of `mlp.down_proj`), for movers of attention heads."""


@dataclass(frozen=True)
class Truth:
    """What the instrument has to find."""

    reader: Planted
    """Early neurons that read the harmful noun where it stands; first third of the layers."""
    movers: tuple[Planted, ...]
    """Heads that carry harm from the noun to later tokens; one in each layer from the middle third to the gate's."""
    relays: tuple[Planted, ...]
    """Neurons that hand on what was moved; two layers of the middle third. The outcome sees them at the last token."""
    gate: Planted
    """The 1 to 6 neurons that let harm into the answer; last third. The outcome sees them at the last token."""


@dataclass(frozen=True)
class Organism:
    """A planted-gate model with everything needed to study it.

    The outcome is the `logit_diff` of the two answers: logit(plus_token) − logit(minus_token) at the last token of the
    prompt in the chat template with its generation prompt.
    """

    model: LlamaForCausalLM
    """float32, evaluation mode."""
    tokenizer: PreTrainedTokenizerFast
    """One token per word; its chat template puts two tokens after the user's text, `<end>` and `<assistant>`."""
    pairs: tuple[Pair, ...]
    """48 pairs; no two of them share a frame or a noun, so each is a component of its own."""
    plus_token: str
    """The complying answer, a word of the vocabulary; greedy after most harmful prompts."""
    minus_token: str
    """The refusing answer, a word of the vocabulary; greedy after most harmless prompts."""
    truth: Truth
    """Where harm goes."""


def planted_gate(seed: int, *, layers: int = 10, d_ff: int = 256, d_model: int = 128) -> Organism:
    """Build the organism of a seed; the same arguments give the same weights, and global random state is not used.

    Args:
        seed: Draws the planted places, all random weights and the pairs.
        layers: Number of layers, 4 or more: two relay layers must fit in the middle third.
        d_ff: Neurons per layer, 6 or more; the wider the layer, the less each distractor writes.
        d_model: Width of the residual stream, a multiple of 8, 64 or more.
    """
    _check_sizes(layers, d_ff, d_model)
    generator = Generator().manual_seed(seed)
    truth = _draw_truth(generator, layers, d_ff)
    pairs = _draw_pairs(generator)
    tokenizer = _tokenizer()
    with torch.no_grad():
        stream = _draw_stream(generator, layers, d_model)
        model = _random_model(generator, layers, d_ff, d_model)
        _keep_off_planted_directions(model, stream)
        _write_embedding(model.model.embed_tokens.weight, stream)
        _write_route(model, truth, stream)
        _write_answers(model, tokenizer, stream, pairs)
    return Organism(model, tokenizer, pairs, _PLUS, _MINUS, truth)


def save(organism: Organism, folder: str | Path) -> None:
    """Write model and tokenizer where `from_pretrained(folder)` finds them."""
    organism.model.save_pretrained(folder)
    organism.tokenizer.save_pretrained(folder)


def _check_sizes(layers: int, d_ff: int, d_model: int) -> None:
    if layers < 4 or d_ff < _MOST_GATES or d_model < 64 or d_model % (2 * _HEADS):
        raise ValueError(
            f"planted_gate needs layers >= 4, d_ff >= {_MOST_GATES} and d_model >= 64 in multiples of {2 * _HEADS}, "
            f"got layers={layers}, d_ff={d_ff}, d_model={d_model}; choose larger sizes"
        )


# --- what the seed draws ----------------------------------------------------------------------------------------------


def _draw_truth(generator: Generator, layers: int, d_ff: int) -> Truth:
    third = layers // 3
    gate = layers - third + _draw_below(generator, third)
    relays = _draw_indices(generator, layers - 2 * third, _RELAY_LAYERS)
    return Truth(
        reader=Planted(_draw_below(generator, third), _draw_indices(generator, d_ff, _READERS)),
        movers=tuple(Planted(layer, _draw_indices(generator, _HEADS, 1)) for layer in range(third, gate + 1)),
        relays=tuple(Planted(third + m, _draw_indices(generator, d_ff, _RELAYS_PER_LAYER)) for m in relays),
        gate=Planted(gate, _draw_indices(generator, d_ff, 1 + _draw_below(generator, _MOST_GATES))),
    )


def _draw_pairs(generator: Generator) -> tuple[Pair, ...]:
    """Frames of random words, each with its own nouns at a random place, in random order."""
    order = torch.randperm(len(_NOUNS), generator=generator).tolist()
    pairs: list[Pair] = []
    for number, which in enumerate(order):
        length = _SHORTEST_FRAME + _draw_below(generator, _LONGEST_FRAME - _SHORTEST_FRAME + 1)
        words = [_FILLERS[_draw_below(generator, len(_FILLERS))] for _ in range(length)]
        place = _draw_below(generator, length)
        category, *nouns = _NOUNS[which]
        harmful, harmless, placebo = (" ".join([*words[:place], noun, *words[place + 1 :]]) for noun in nouns)
        template = f"frame{number:02d}"
        pairs.append(Pair(f"{template}-{nouns[0]}", harmful, harmless, placebo, category, template))
    return tuple(pairs)


def _draw_below(generator: Generator, bound: int) -> int:
    return int(torch.randint(bound, (), generator=generator))


def _draw_indices(generator: Generator, population: int, size: int) -> tuple[int, ...]:
    return tuple(sorted(torch.randperm(population, generator=generator)[:size].tolist()))


# --- the residual stream ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Stream:
    """The planted directions, and how to write and read along them."""

    directions: Mapping[str, Tensor]
    """Feature → unit vector (d_model,); orthogonal to one another."""
    layers: int
    """Number of layers of the model."""

    def rms(self, layer: int) -> float:
        """Expected RMS of the stream that enters a layer."""
        return sqrt(1 + _GROWTH * layer / self.layers)

    def write(self, feature: str, share: float = 1.0) -> Tensor:
        """The vector (d_model,) that adds this share of a feature to the stream."""
        return share * _AMPLITUDE[feature] * self.directions[feature]

    def read(self, layer: int, mix: Mapping[str, float]) -> Tensor:
        """The vector (d_model,) whose product with a layer's normed input is Σ mix[f] · (share of f in the stream)."""
        parts = [share / _AMPLITUDE[feature] * self.directions[feature] for feature, share in mix.items()]
        return self.rms(layer) * torch.stack(parts).sum(0)

    def damp(self, weight: Tensor, leak: float) -> Tensor:
        """`weight` (n, d_model) with all but `leak` of the planted directions taken out of its rows."""
        basis = torch.stack(list(self.directions.values()))
        return weight - (1 - leak) * weight @ basis.T @ basis


def _draw_stream(generator: Generator, layers: int, d_model: int) -> _Stream:
    basis, _ = torch.linalg.qr(_normal(generator, d_model, len(_AMPLITUDE)))
    return _Stream(dict(zip(_AMPLITUDE, basis.T.contiguous(), strict=True)), layers)


def _normal(generator: Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator)


# --- distractors ------------------------------------------------------------------------------------------------------


def _random_model(generator: Generator, layers: int, d_ff: int, d_model: int) -> LlamaForCausalLM:
    """A model of random weights: what reads a normed input gets variance 1, all layers together write `_NOISE`."""
    config = LlamaConfig(
        vocab_size=len(_VOCABULARY),
        hidden_size=d_model,
        intermediate_size=d_ff,
        num_hidden_layers=layers,
        num_attention_heads=_HEADS,
        num_key_value_heads=_HEADS,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        pad_token_id=_VOCABULARY["<pad>"],
        eos_token_id=_VOCABULARY["<end>"],
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
    model.model.embed_tokens.weight.copy_(_normal(generator, len(_VOCABULARY), d_model))
    return model


def _keep_off_planted_directions(model: LlamaForCausalLM, stream: _Stream) -> None:
    """Leave random weights only a little of the planted directions: distractors blur harm, they do not carry it."""
    for block in model.model.layers:
        attention, mlp = block.self_attn, block.mlp
        for reader in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
            reader.weight.copy_(stream.damp(reader.weight, _READ_LEAK))
        for writer in (attention.o_proj, mlp.down_proj):
            writer.weight.copy_(stream.damp(writer.weight.T, _WRITE_LEAK).T)
    model.lm_head.weight.copy_(stream.damp(model.lm_head.weight, _WRITE_LEAK))


# --- the route of harm ------------------------------------------------------------------------------------------------


def _write_embedding(weight: Tensor, stream: _Stream) -> None:
    """Give every token const, the nouns noun and word, and random mass elsewhere up to length sqrt(d_model)."""
    planted = stream.write("const").repeat(len(weight), 1)
    for _, harmful, *harmless in _NOUNS:
        planted[[_VOCABULARY[noun] for noun in (harmful, *harmless)]] += stream.write("noun")
        planted[_VOCABULARY[harmful]] += stream.write("word")
    room = (weight.shape[1] - planted.square().sum(1, keepdim=True)).sqrt()
    rest = stream.damp(weight, 0.0)
    weight.copy_(planted + room * rest / rest.norm(dim=1, keepdim=True))


def _write_route(model: LlamaForCausalLM, truth: Truth, stream: _Stream) -> None:
    """Write the stages into the weights, each in place of the random units that stood there."""
    blocks = model.model.layers
    n_movers, first_mover = len(truth.movers), truth.movers[0].layer
    _write_neurons(blocks[truth.reader.layer].mlp, truth.reader, stream, {"word": 1.0}, stream.write("concept"))
    for mover in truth.movers:
        moves = stream.write("moved", 1 / n_movers)
        _write_mover(blocks[mover.layer].self_attn, mover, stream, {"word": 0.45, "concept": 0.55}, moves)
    for relay in truth.relays:
        arrived = (relay.layer - first_mover + 1) / n_movers
        relays = stream.write("relayed", 1 / len(truth.relays))
        _write_neurons(blocks[relay.layer].mlp, relay, stream, {"moved": 1 / arrived}, relays)
    gate = blocks[truth.gate.layer].mlp
    hears = {"moved": 0.45, "relayed": 0.55}
    _write_neurons(gate, truth.gate, stream, hears, stream.write("answer"), threshold=_GATE_THRESHOLD)


def _write_neurons(
    mlp: LlamaMLP, planted: Planted, stream: _Stream, hears: Mapping[str, float], says: Tensor, threshold: float = 0.0
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


def _write_mover(
    attention: LlamaAttention, planted: Planted, stream: _Stream, hears: Mapping[str, float], says: Tensor
) -> None:
    """A head that attends to the noun and adds `says` (d_model,) times the mix of features there.

    It uses one coordinate of the head, the one that rotary embedding turns slowest, so distance hardly matters.
    """
    (head,), width = planted.units, attention.head_dim
    rows, slowest = slice(head * width, (head + 1) * width), (head + 1) * width - 1
    for reader in (attention.q_proj, attention.k_proj, attention.v_proj):
        reader.weight[rows] = 0
    attention.o_proj.weight[:, rows] = 0
    attention.q_proj.weight[slowest] = _MARKER_LOGIT * sqrt(width) * stream.read(planted.layer, {"const": 1.0})
    attention.k_proj.weight[slowest] = stream.read(planted.layer, {"noun": 1.0})
    attention.v_proj.weight[slowest] = stream.read(planted.layer, hears)
    attention.o_proj.weight[:, slowest] = says


def _write_answers(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, stream: _Stream, pairs: Sequence[Pair]
) -> None:
    """Unembed the answers so that their logit difference hears the gate and, by a random direction, the distractors.

    Both are scaled on the organism's own prompts, and const ties the two answers in the mean final state.
    """
    plus, minus = (model.lm_head.weight[_VOCABULARY[word]] for word in (_PLUS, _MINUS))
    states = _final_states(model, tokenizer, pairs)
    mean, change = states.mean((0, 1)), (states[0] - states[1]).mean(0)
    gate, const = stream.directions["answer"], stream.directions["const"]
    noise = plus - minus
    difference = gate * _TOTAL_EFFECT / (gate @ change) + noise * _ANSWER_NOISE / (states[1] @ noise).std()
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


# --- the tokenizer ----------------------------------------------------------------------------------------------------


def _tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel(_VOCABULARY, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<end>",
        additional_special_tokens=["<system>", "<user>", "<assistant>"],
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer
