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

What it is written on is a `canvas`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Generator
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from remote_mediation.planted.canvas import (
    GATE_THRESHOLD,
    HEADS,
    Planted,
    Stream,
    draw_stream,
    keep_off_planted_directions,
    random_model,
    write_answers,
    write_embedding,
    write_head,
    write_neurons,
)
from remote_mediation.planted.words import (
    MINUS,
    NOUNS,
    PLUS,
    Pair,
    draw_below,
    draw_indices,
    draw_pairs,
    words_tokenizer,
)
from remote_mediation.saving import save_model

__all__ = ["Organism", "Pair", "Planted", "Truth", "planted_gate", "save"]

_READERS, _RELAY_LAYERS, _RELAYS_PER_LAYER, _MOST_GATES = 3, 2, 3, 6
_AMPLITUDE = {"const": 4.0, "noun": 3.0, "word": 3.0, "concept": 3.0, "moved": 2.5, "relayed": 2.5, "answer": 4.0}
"""const: in every token, serves as a bias. noun: in all nouns of a pair, so that attention is the same in its prompts.
word: in harmful nouns. concept, moved, relayed, answer: written by reader, movers, relays, gate."""
_CODES = {
    **{noun: {"noun": 1.0} for _, _, *harmless in NOUNS for noun in harmless},
    **{harmful: {"noun": 1.0, "word": 1.0} for _, harmful, *_ in NOUNS},
}


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
    pairs = draw_pairs(generator)
    tokenizer = words_tokenizer()
    with torch.no_grad():
        stream = draw_stream(generator, _AMPLITUDE, layers, d_model)
        model = random_model(generator, layers, d_ff, d_model)
        keep_off_planted_directions(model, stream)
        write_embedding(model.model.embed_tokens.weight, stream, _CODES)
        _write_route(model, truth, stream)
        write_answers(model, tokenizer, stream, pairs)
    return Organism(model, tokenizer, pairs, PLUS, MINUS, truth)


def save(organism: Organism, folder: str | Path) -> None:
    """Write model and tokenizer where `from_pretrained(folder)` finds them."""
    save_model(organism.model, organism.tokenizer, Path(folder))


def _check_sizes(layers: int, d_ff: int, d_model: int) -> None:
    if layers < 4 or d_ff < _MOST_GATES or d_model < 64 or d_model % (2 * HEADS):
        raise ValueError(
            f"planted_gate needs layers >= 4, d_ff >= {_MOST_GATES} and d_model >= 64 in multiples of {2 * HEADS}, "
            f"got layers={layers}, d_ff={d_ff}, d_model={d_model}; choose larger sizes"
        )


def _draw_truth(generator: Generator, layers: int, d_ff: int) -> Truth:
    third = layers // 3
    gate = layers - third + draw_below(generator, third)
    relays = draw_indices(generator, layers - 2 * third, _RELAY_LAYERS)
    return Truth(
        reader=Planted(draw_below(generator, third), draw_indices(generator, d_ff, _READERS)),
        movers=tuple(Planted(layer, draw_indices(generator, HEADS, 1)) for layer in range(third, gate + 1)),
        relays=tuple(Planted(third + m, draw_indices(generator, d_ff, _RELAYS_PER_LAYER)) for m in relays),
        gate=Planted(gate, draw_indices(generator, d_ff, 1 + draw_below(generator, _MOST_GATES))),
    )


def _write_route(model: LlamaForCausalLM, truth: Truth, stream: Stream) -> None:
    """Write the stages into the weights, each in place of the random units that stood there."""
    blocks = model.model.layers
    n_movers, first_mover = len(truth.movers), truth.movers[0].layer
    write_neurons(blocks[truth.reader.layer].mlp, truth.reader, stream, {"word": 1.0}, stream.write("concept"))
    for mover in truth.movers:
        moves = stream.write("moved", 1 / n_movers)
        write_head(blocks[mover.layer].self_attn, mover, stream, {"word": 0.45, "concept": 0.55}, moves)
    for relay in truth.relays:
        arrived = (relay.layer - first_mover + 1) / n_movers
        relays = stream.write("relayed", 1 / len(truth.relays))
        write_neurons(blocks[relay.layer].mlp, relay, stream, {"moved": 1 / arrived}, relays)
    gate = blocks[truth.gate.layer].mlp
    hears = {"moved": 0.45, "relayed": 0.55}
    write_neurons(gate, truth.gate, stream, hears, stream.write("answer"), threshold=GATE_THRESHOLD)
