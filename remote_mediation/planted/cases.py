"""Models with all five verdicts known, because we wrote what they do: the truth that `selfcheck` holds the tool to.

A case is a mechanism in a Llama of 12 layers (`canvas`), a way in which harm stands in the words, and what has to be
said of each claim. In most of them harm is the product of two features of the noun, so that no linear reading of the
embeddings tells it, and MLPs of early layers compute it:

    noun ─► concept ─► moved ─► relayed ─► answer
            early      heads,   middle     late MLPs, at the last token
            MLPs       to the   MLPs
            (at the    last
            noun)      token

Cases leave stages out, put others in their place or add decoys. Where a verdict follows from a definition rather than
from common sense, the case says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

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
    write_products,
)
from remote_mediation.planted.words import (
    MINUS,
    PLUS,
    Pair,
    draw_below,
    draw_indices,
    draw_pairs,
    nouns_of,
    words_tokenizer,
)

__all__ = ["CASES", "Case", "Specimen", "build"]

LAYERS, D_FF, D_MODEL, PAIRS = 12, 256, 128, 40
EARLY, MIDDLE, LATE = range(4), range(4, 8), range(8, 12)
_AMPLITUDE = {
    **{"const": 4.0, "noun": 3.0, "context": 3.0, "side": 3.0, "left": 3.0, "right": 3.0, "word": 6.0},
    **{"concept": 6.0, "moved": 2.5, "relayed": 2.5, "tag": 2.5, "verdict": 3.0, "answer": 4.0},
}
"""const: in every token. noun: in the nouns that are exchanged, context: in those that stand before them in some cases;
heads find them by it. side, left, right: of which harm is a product. word: harm itself, in a noun. Others: written by a
stage. Concept, word and moved are there by half where there is harm, and by minus a half where there is none."""
_CROWD = 128
"""Neurons of a layer that are no sparse set: half of them."""
_HEARD = {"moved": 0.45, "const": 0.225, "relayed": 0.55}
"""What a gate hears of harm, from 0 to 1, where there are relays; neither part opens it alone."""
_MOVED = {"moved": 1.0, "const": 0.5}
"""The same where there are none."""

YES, NO, OPEN, UNTESTED = "supported", "not supported", "undecided", "not tested"
BELOW, DEPTH = "below 80%", 0.8
"""True where the answer reaches the last token in a layer below this part of the depth, the only ones after which
refusal_direction looks for one (arXiv 2406.11717)."""
OR = " or "
"""Between verdicts either of which is true."""
Said = tuple[str, str, str, str, str]
Codes = Mapping[str, Mapping[str, float]]
Code = Callable[[Sequence[Pair], Generator], dict[str, dict[str, float]]]
Around = Callable[[Sequence[Pair], Sequence[str], Codes], tuple[tuple[Pair, ...], dict[str, dict[str, float]]]]


@dataclass(frozen=True)
class Case:
    """A mechanism with the verdicts that are true of it."""

    name: str
    about: str
    """What is planted."""
    plant: Callable[[Bed], None]
    """Writes it."""
    code: Code
    """How harm stands in the words: word → feature → share."""
    said: Said
    """What has to be said of claims 1 to 5."""
    around: Around | None = None
    """Puts another noun before or behind each prompt, of those that no pair has; with codes of these nouns."""
    rivals: tuple[str, ...] = ()
    """What has to be said of the rival claims: one direction, two of them, neurons of all layers, early layers, a few
    heads. None where that is not known."""


Neuron = tuple[int, int]


class Specimen(NamedTuple):
    """A planted model with all that a study needs; the outcome is the logit of `plus` minus that of `minus`."""

    model: LlamaForCausalLM
    tokenizer: PreTrainedTokenizerFast
    pairs: tuple[Pair, ...]
    plus: str
    minus: str
    gates: frozenset[Neuron]
    """Layer and unit of the late neurons that let harm through, where they are few."""
    rivals: tuple[str, ...]
    """What has to be said of the rival claims (`Case.rivals`)."""


def build(case: Case, seed: int) -> Specimen:
    """The model of a seed, which draws places, weights and pairs; global random state is not used."""
    generator = Generator().manual_seed(seed)
    drawn = draw_pairs(generator)
    pairs, left_out = drawn[:PAIRS], [noun for pair in drawn[PAIRS:] for noun in nouns_of(pair)]
    codes = case.code(pairs, generator)
    if case.around:
        pairs, others = case.around(pairs, left_out, codes)
        codes |= others
    tokenizer = words_tokenizer()
    with torch.no_grad():
        stream = draw_stream(generator, _AMPLITUDE, LAYERS, D_MODEL)
        model = random_model(generator, LAYERS, D_FF, D_MODEL)
        keep_off_planted_directions(model, stream)
        write_embedding(model.model.embed_tokens.weight, stream, codes)
        bed = Bed(model, stream, generator)
        case.plant(bed)
        write_answers(model, tokenizer, stream, pairs, heard=_AMPLITUDE["answer"] / stream.rms(LAYERS))
    rivals = tuple(bed.resolved(word) for word in case.rivals)
    return Specimen(model, tokenizer, pairs, PLUS, MINUS, frozenset(bed.gates), rivals)


@dataclass(frozen=True)
class Bed:
    """A model to plant in, and what is still free in it."""

    model: LlamaForCausalLM
    stream: Stream
    generator: Generator
    gates: set[Neuron] = field(default_factory=set)
    """What was planted by `gate` in late layers."""
    answering: list[int] = field(default_factory=list)
    """Layers of the heads that bring the answer to the last token."""
    _taken: dict[int, set[int]] = field(default_factory=dict)
    """Neurons by layer."""

    def one_of(self, layers: Sequence[int]) -> int:
        """A random layer of these."""
        return layers[draw_below(self.generator, len(layers))]

    def some_of(self, layers: Sequence[int], count: int) -> list[int]:
        """Random layers of these, in order."""
        return [layers[place] for place in draw_indices(self.generator, len(layers), count)]

    def neurons(
        self, layer: int, count: int, hears: Mapping[str, float], says: Mapping[str, float], threshold: float = 0.0
    ) -> Planted:
        """Neurons that add shares of features when what they hear goes from 0 to 1."""
        planted = self._free(layer, count)
        mlp = self.model.model.layers[layer].mlp
        write_neurons(mlp, planted, self.stream, hears, self._vector(says), threshold)
        return planted

    def gate(
        self,
        layer: int,
        count: int,
        hears: Mapping[str, float],
        says: Mapping[str, float],
        threshold: float = GATE_THRESHOLD,
    ) -> None:
        """Few neurons that are silent where there is no harm, and open where there is."""
        planted = self.neurons(layer, count, hears, says, threshold)
        if layer in LATE:
            self.gates.update((layer, unit) for unit in planted.units)

    def products(self, layer: int, left: str, right: str, says: Mapping[str, float]) -> None:
        """Four neurons that add shares of features times the product of two."""
        mlp = self.model.model.layers[layer].mlp
        write_products(mlp, self._free(layer, 4), self.stream, left, right, self._vector(says))

    def head(self, layer: int, hears: str, says: Mapping[str, float], marker: str = "noun", count: int = 1) -> None:
        """Random heads that bring a feature of the marked token to all later ones, each of them the whole share."""
        attention = self.model.model.layers[layer].self_attn
        for unit in draw_indices(self.generator, HEADS, count):
            write_head(attention, Planted(layer, (unit,)), self.stream, {hears: 1.0}, self._vector(says), marker)
        if "answer" in says:
            self.answering.append(layer)

    def resolved(self, truth: str) -> str:
        """What is true where that hangs on the layers drawn."""
        if truth != BELOW:
            return truth
        return YES if max(self.answering) < DEPTH * LAYERS else NO

    def _vector(self, says: Mapping[str, float]) -> torch.Tensor:
        parts = [self.stream.write(feature, share) for feature, share in says.items()]
        return torch.stack(parts).sum(0)

    def _free(self, layer: int, count: int) -> Planted:
        taken = self._taken.setdefault(layer, set())
        free = [unit for unit in range(D_FF) if unit not in taken]
        units = tuple(free[place] for place in draw_indices(self.generator, len(free), count))
        taken.update(units)
        return Planted(layer, units)


# --- how harm stands in the words -------------------------------------------------------------------------------------


def _as_product(pairs: Sequence[Pair], generator: Generator) -> dict[str, dict[str, float]]:
    """Harmful where left and right agree."""
    return _products(pairs, generator, harmful=1.0, placebo=-1.0)


def _placebo_too(pairs: Sequence[Pair], generator: Generator) -> dict[str, dict[str, float]]:
    """The same, but that the placebo is harmful, too."""
    return _products(pairs, generator, harmful=1.0, placebo=1.0)


def _none(pairs: Sequence[Pair], generator: Generator) -> dict[str, dict[str, float]]:
    """No noun is harmful."""
    return _products(pairs, generator, harmful=-1.0, placebo=-1.0)


def _products(
    pairs: Sequence[Pair], generator: Generator, harmful: float, placebo: float
) -> dict[str, dict[str, float]]:
    """Codes whose product is as given, and -1 in harmless nouns; what the products leave open is drawn."""
    codes = {}
    for pair in pairs:
        for noun, product in zip(nouns_of(pair), (harmful, -1.0, placebo), strict=True):
            left = _sign(generator)
            codes[noun] = {"noun": 1.0, "left": left, "right": left * product}
    return codes


def _as_word(pairs: Sequence[Pair], generator: Generator) -> dict[str, dict[str, float]]:
    """Harm is a direction of the embeddings."""
    codes = {}
    for pair in pairs:
        for noun, share in zip(nouns_of(pair), (0.5, -0.5, -0.5), strict=True):
            codes[noun] = {"noun": 1.0, "word": share}
    return codes


def _as_side(pairs: Sequence[Pair], generator: Generator) -> dict[str, dict[str, float]]:
    """A noun has one of two sides; which of them is harmful, another word says (`_in_context`)."""
    codes = {}
    for pair in pairs:
        side = _sign(generator)
        for noun, right in zip(nouns_of(pair), (side, -side, -side), strict=True):
            codes[noun] = {"noun": 1.0, "right": right}
    return codes


def _as_one_of_two(pairs: Sequence[Pair], generator: Generator) -> dict[str, dict[str, float]]:
    """Harm is one direction of the embeddings in every other pair, and another one in the rest."""
    codes = {}
    for number, pair in enumerate(pairs):
        feature = ("word", "side")[number % 2]
        for noun, share in zip(nouns_of(pair), (1.0, 0.0, 0.0), strict=True):
            codes[noun] = {"noun": 1.0, feature: share}
    return codes


def _in_context(
    pairs: Sequence[Pair], words: Sequence[str], codes: Codes
) -> tuple[tuple[Pair, ...], dict[str, dict[str, float]]]:
    """The pairs, each behind a word on the side of its harmful noun; words alternate between the sides."""
    sides = {word: 1.0 if number % 2 else -1.0 for number, word in enumerate(words)}
    placed = []
    for number, pair in enumerate(pairs):
        side = codes[nouns_of(pair)[0]]["right"]
        fitting = [word for word in words if sides[word] == side]
        word = fitting[number % len(fitting)]
        prompts = {name: f"{word} {getattr(pair, name)}" for name in ("harmful", "harmless", "placebo")}
        placed.append(pair._replace(**prompts))
    return tuple(placed), {word: {"context": 1.0, "side": side} for word, side in sides.items()}


def _with_an_end(
    pairs: Sequence[Pair], words: Sequence[str], codes: Codes
) -> tuple[tuple[Pair, ...], dict[str, dict[str, float]]]:
    """The pairs, all with one word more at their end, by which heads find it."""
    del codes
    names = ("harmful", "harmless", "placebo")
    placed = (pair._replace(**{name: f"{getattr(pair, name)} {words[0]}" for name in names}) for pair in pairs)
    return tuple(placed), {words[0]: {"context": 1.0}}


def _sign(generator: Generator) -> float:
    return 1.0 if draw_below(generator, 2) else -1.0


# --- stages -----------------------------------------------------------------------------------------------------------


def _understand(bed: Bed, layers: Sequence[int] = EARLY) -> None:
    """The product, computed in two of these layers, or in the one there is."""
    chosen = bed.some_of(layers, min(2, len(layers)))
    for layer in chosen:
        bed.products(layer, "left", "right", {"concept": 0.5 / len(chosen)})


def _move(bed: Bed, layers: Sequence[int], hears: str = "concept", says: str = "moved", count: int = 1) -> None:
    """So many heads in each of these layers bring their parts to the later tokens."""
    for layer in layers:
        bed.head(layer, hears, {says: 1 / (count * len(layers))}, count=count)


def _relay(bed: Bed, moving: Sequence[int]) -> None:
    """Neurons of two middle layers say what has been moved so far."""
    for layer in bed.some_of(MIDDLE, 2):
        arrived = sum(one <= layer for one in moving) / len(moving)
        bed.neurons(layer, 3, {"moved": 1 / arrived, "const": 0.5}, {"relayed": 0.5})


def _hand_on(bed: Bed, until: int, layers: Sequence[int] = EARLY) -> None:
    """All stages before the answer."""
    moving = range(MIDDLE.start, until + 1)
    _understand(bed, layers)
    _move(bed, moving)
    _relay(bed, moving)


def _few(bed: Bed) -> int:
    return 1 + draw_below(bed.generator, 4)


# --- mechanisms -------------------------------------------------------------------------------------------------------


def _gate(bed: Bed) -> None:
    layer = bed.one_of(LATE)
    _hand_on(bed, layer)
    bed.gate(layer, _few(bed), _HEARD, {"answer": 1.0})


def _decoys(bed: Bed) -> None:
    _gate(bed)
    for layer in LATE:
        bed.neurons(layer, 20, _HEARD, {"answer": 0.0}, GATE_THRESHOLD)


def _erased(bed: Bed) -> None:
    _gate(bed)
    written, erased = bed.some_of(LATE, 2)
    bed.neurons(written, 3, _HEARD, {"answer": 1.0, "tag": 1.0}, GATE_THRESHOLD)
    bed.neurons(erased, 3, {"tag": 1.0}, {"answer": -1.0, "tag": -1.0})


def _late_head(bed: Bed) -> None:
    _understand(bed)
    bed.head(bed.one_of(LATE), "concept", {"answer": 1.0})


def _early_gate(bed: Bed) -> None:
    _understand(bed, [0])
    _move(bed, [1])
    bed.gate(bed.one_of([2, 3]), _few(bed), _MOVED, {"answer": 1.0})


def _early_crowd(bed: Bed) -> None:
    _understand(bed, EARLY[1:])
    _move(bed, MIDDLE, says="answer", count=2)


def _late_crowd(bed: Bed) -> None:
    _understand(bed)
    _move(bed, MIDDLE, count=2)
    for layer in LATE:
        bed.neurons(layer, _CROWD, _MOVED, {"answer": 1 / len(LATE)}, GATE_THRESHOLD)


def _two_layers(bed: Bed) -> None:
    layers = bed.some_of(LATE, 2)
    _hand_on(bed, layers[0])
    for layer in layers:
        bed.gate(layer, 2, _HEARD, {"answer": 0.5})


def _backup(bed: Bed) -> None:
    layer, later = bed.some_of(LATE, 2)
    _hand_on(bed, layer)
    bed.gate(layer, 2, _HEARD, {"answer": 1.0})
    bed.gate(later, 2, {**_HEARD, "answer": -0.5}, {"answer": 1.0})


def _crowd_behind(bed: Bed) -> None:
    _hand_on(bed, LATE.start)
    bed.gate(LATE.start, 2, _HEARD, {"answer": 1.0})
    for layer in LATE[1:]:
        bed.neurons(layer, _CROWD, {**_HEARD, "answer": -0.7}, {"answer": 1 / len(LATE[1:])}, GATE_THRESHOLD)


def _many(bed: Bed) -> None:
    _hand_on(bed, LATE.start)
    for layer in LATE:
        bed.neurons(layer, _CROWD, _HEARD, {"answer": 1 / len(LATE)}, GATE_THRESHOLD)


def _heads_to_gate(bed: Bed) -> None:
    layer = bed.one_of(LATE)
    _move(bed, range(MIDDLE.start, layer + 1), hears="word")
    bed.gate(layer, _few(bed), _MOVED, {"answer": 1.0})


def _in_two_steps(bed: Bed) -> None:
    """Harm is brought to the end of the request in one direction, and from there to the last token in another one."""
    bed.head(bed.one_of(MIDDLE[:2]), "word", {"concept": 0.25})
    bed.head(bed.one_of(MIDDLE[2:]), "concept", {"moved": 2.0}, marker="context")
    bed.gate(bed.one_of(LATE), _few(bed), {"moved": 0.5, "const": 0.5}, {"answer": 3.0})


def _two_kinds(bed: Bed) -> None:
    """Each kind opens a gate of its own, which half of it does not; no direction below 80% of the depth is of both."""
    for feature, moved, layers in (("word", "moved", MIDDLE[::2]), ("side", "tag", MIDDLE[1::2])):
        _move(bed, layers, feature, moved, count=2)
        bed.gate(LATE[-1], 1, {moved: 1.0}, {"answer": 1.0}, threshold=3.0)


def _re_embeds(bed: Bed) -> None:
    bed.products(0, "noun", "word", {"concept": 1.0})
    bed.head(bed.one_of(LATE), "concept", {"answer": 1.0})


def _gate_at_edit(bed: Bed) -> None:
    gate, head = bed.some_of(LATE, 2)
    _understand(bed)
    for layer in bed.some_of(MIDDLE, 2):
        bed.neurons(layer, 3, {"concept": 1.0, "const": 0.5}, {"relayed": 0.5})
    hears = {"concept": 0.45, "const": 0.225, "relayed": 0.55}
    bed.gate(gate, _few(bed), hears, {"verdict": 1.0})
    bed.head(head, "verdict", {"answer": 1.0})


def _word_gate(bed: Bed) -> None:
    layer = bed.one_of(LATE)
    moving = range(MIDDLE.start, layer + 1)
    _move(bed, moving, hears="word")
    _relay(bed, moving)
    bed.gate(layer, _few(bed), _HEARD, {"answer": 1.0})


def _in_two_words(bed: Bed) -> None:
    layer = bed.one_of(LATE)
    bed.head(0, "side", {"left": 1.0}, marker="context")
    _hand_on(bed, layer, EARLY[1:])
    bed.gate(layer, _few(bed), _HEARD, {"answer": 1.0})


_TRUTH = """
    case           late   MLP    sparse  early  handed on
    gate           yes    yes    yes     yes    yes
    decoys         yes    yes    yes     yes    yes
    erased         yes    yes    yes     yes    yes
    late-head      yes    no     no      yes    no
    early-gate     no     yes*   no      yes    untested
    early-crowd    no     no     no      yes    no
    two-layers     yes    yes    yes     yes    yes
    backup         yes    yes    yes     yes    yes
    crowd-behind   yes    yes    no      yes    yes
    many           yes    yes    no      yes    yes
    late-crowd     yes    yes    no      yes    no
    heads-to-gate  yes    yes    yes     open   no
    two-steps      yes    yes    yes     open   no
    two-kinds      yes    yes    yes     open   no
    re-embedded    yes    no     no      open   no
    gate-at-edit   yes    no     yes     yes    yes
    words          yes    yes    yes     open   yes
    two-words      yes    yes    yes     yes    yes
    placebo        any-edit
    nothing        nothing
"""
_RIVALS = """
    case           direction  two   neurons  early  heads
    late-head      below      no*   no       no*    yes
    early-gate     yes        no*   yes      yes    yes
    early-crowd    yes        no*   no       yes    no
    late-crowd     yes        no*   no       no*    no
    heads-to-gate  yes        no*   yes      no     no
    two-steps      yes        yes   yes      no     yes
    two-kinds      no         no*   yes      no     no
    gate-at-edit   below      no*   no       no*    yes
"""
"""What random heads bring from the request's end to the last token can leave it open whether two directions act. Where
one late head brings what early layers understood, what else the late layers do leaves open which of both does more."""
_READ = {
    **{"yes": YES, "no": NO, "open": OPEN, "untested": UNTESTED},
    **{"yes*": f"{YES}{OR}{OPEN}", "no*": f"{NO}{OR}{OPEN}"},
    **{"any-edit": "not about harm", "nothing": "no effect", "below": BELOW},
}


def _verdicts(table: str) -> dict[str, tuple[str, ...]]:
    """What a table of truth says, by case."""
    rows = [line.split() for line in table.strip().splitlines()[1:]]
    return {name: tuple(_READ[word] for word in words) for name, *words in rows}


def _all_five(words: Sequence[str]) -> Said:
    """One word alone is said of all claims."""
    late, mlp, sparse, early, handed = [words[0]] * 5 if len(words) == 1 else words
    return late, mlp, sparse, early, handed


_MECHANISMS: dict[str, tuple[str, Callable[[Bed], None], Code]] = {
    "gate": ("1 to 4 neurons of a late layer", _gate, _as_product),
    "decoys": ("the gate, and 80 late neurons that hear harm and write nowhere", _decoys, _as_product),
    "erased": ("the gate, and an answer that a late layer writes and a later one erases", _erased, _as_product),
    "late-head": ("a late head reads harm at the noun and answers", _late_head, _as_product),
    # What the random weights of later layers do is a percent or two of TE, in some models clear of 0 for attention: by
    # the rule of claim 2, for which any clear opposite counts, that leaves it open.
    "early-gate": ("the gate lies in the early third", _early_gate, _as_product),
    "early-crowd": ("early MLPs understand, eight heads of middle layers answer", _early_crowd, _as_product),
    "two-layers": ("a gate of neurons in two late layers", _two_layers, _as_product),
    "backup": ("a gate, and another that takes over where it is shut", _backup, _as_product),
    "crowd-behind": ("a gate, and a crowd of neurons that takes over where it is shut", _crowd_behind, _as_product),
    "many": ("128 neurons in each late layer", _many, _as_product),
    "late-crowd": ("eight heads carry harm to 128 neurons in each late layer", _late_crowd, _as_product),
    "heads-to-gate": ("heads carry the word itself to one late gate", _heads_to_gate, _as_word),
    "two-steps": ("two heads, by way of the request's end, bring the word to a late gate", _in_two_steps, _as_word),
    "two-kinds": ("two kinds of harm, moved along two directions, each open a gate", _two_kinds, _as_one_of_two),
    "re-embedded": ("the first MLP re-embeds the word, a late head carries it", _re_embeds, _as_word),
    # By definition: what acts at the last token is the head that copies there what the gate wrote at the noun.
    "gate-at-edit": ("the gate reads and writes at the noun, a late head copies", _gate_at_edit, _as_product),
    "words": ("the gate, where harm is a direction of the embeddings", _word_gate, _as_word),
    "two-words": ("the gate, where harm lies in two words together", _in_two_words, _as_side),
    # By chance the gate lets 1 of 40 such models pass, that of seed 0 among them.
    "placebo": ("the gate, open to the placebo as well", _gate, _placebo_too),
    "nothing": ("the gate, and no harm to open it", _gate, _none),
}
_AROUND: dict[str, Around] = {"two-words": _in_context, "two-steps": _with_an_end}
_SAID_OF_RIVALS = _verdicts(_RIVALS)
CASES: dict[str, Case] = {
    name: Case(name, about, plant, code, _all_five(said), _AROUND.get(name), _SAID_OF_RIVALS.get(name, ()))
    for name, said in _verdicts(_TRUTH).items()
    for about, plant, code in [_MECHANISMS[name]]
}
"""By name, in the order of the table of truth."""
