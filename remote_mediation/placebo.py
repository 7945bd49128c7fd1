"""Are the placebos fair, and which pairs are independent? Two questions about texts, asked before a model runs.

A placebo is a second harmless prompt that differs from the harmless one where the harmful one does. What it
does to a model is what *any* edit does, so it can stand against harm only if both edits are alike in everything
but harm. `balance` says how alike they are in what is known to move a model: how many tokens are exchanged, how
rare they are, how far the new ones lie from the old.

Pairs that share a sentence frame, a prompt or an exchanged word are not independent draws. `components` says
which of them belong together: the unit that is resampled and that a split must not cut.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from remote_mediation.pairs import PromptPair, folded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ALIKE = 0.25
"""Standardised differences below this count as balanced (Stuart 2010, Statistical Science 25:1, section 4.1)."""

TOKENS = "tokens exchanged"
RARITY = "rarity (nats)"
DISTANCE = "embedding distance"

# Texts that are encoded together.
_TOGETHER = 3000
_WORD = re.compile(r"\w+(?:['\u2019-]\w+)*")
# What a prompt is about is not said by these: two pairs that exchange "a" for "the" have nothing in common.
_GRAMMAR = """
    a an the this that these those some any each every all both and or but nor so as if than then
    of in on at to from for with without by about into onto over under through between after before up down out off
    i me my you your he him his she her it its we us our they them their
    who whom whose which what when where why how
    am is are was were be been being do does did have has had can could will would shall should may might must
"""
_FUNCTION_WORDS = frozenset(_GRAMMAR.split())


@dataclass(frozen=True)
class Balance:
    """How alike harm edits and placebo edits are in one measure, over the pairs that have a placebo."""

    measure: str
    """`tokens exchanged`, `rarity (nats)` or `embedding distance`."""
    harm: float
    """Mean over pairs of the edit that turns the harmless prompt into the harmful one."""
    placebo: float
    """Mean over pairs of the edit that turns the harmless prompt into the placebo."""
    difference: float
    """Harm less placebo, in pooled standard deviations. NaN: fewer than two pairs; infinite: neither has spread."""
    pairs: int
    """Pairs that the means are over."""

    @property
    def alike(self) -> bool:
        """Whether the difference is small enough to compare the two edits. False where it is unknown."""
        return abs(self.difference) < ALIKE


class _Edit(NamedTuple):
    """The tokens between the common beginning and the common end of two prompts."""

    removed: tuple[int, ...]
    added: tuple[int, ...]


def balance(
    pairs: Sequence[PromptPair],
    tokenizer: PreTrainedTokenizerBase,
    embeddings: NDArray[np.floating] | None = None,
) -> tuple[Balance, ...]:
    """Standardised differences between harm edits and placebo edits; pairs without a placebo are left out.

    Three measures, each of the edit that makes the harmful prompt, or the placebo, of the harmless one:
    the number of tokens that come in; their rarity; and, with `embeddings`, the Euclidean distance between the mean
    embedding of the tokens that come in and of those that go.

    Rarity is read from the tokenizer: byte-pair vocabularies are numbered in the order in which pieces were merged,
    the most frequent first, so a token's id stands in for its rank, and by Zipf's law −log p is log rank up to a
    constant. An edit's rarity is the sum of log(1 + id) over its tokens. It means nothing for a vocabulary that is not
    ordered by frequency (a list in alphabetical order, for instance).

    The standardised difference is (mean − mean) / √((variance + variance) / 2) (Austin 2009, Statistics in Medicine
    28:3083, equation 1).

    Args:
        pairs: As read from a file.
        tokenizer: Of the model that will see the pairs; no chat template is used.
        embeddings: The model's input embeddings, [vocabulary, d_model]; without them there is no third measure.
    """
    with_placebo = [pair for pair in pairs if pair.placebo and pair.aligned]
    ids = _ids([text for pair in with_placebo for text in (pair.harmless, pair.harmful, pair.placebo)], tokenizer)
    harm = [_edit(old, new) for old, new in zip(ids[::3], ids[1::3], strict=True)]
    placebo = [_edit(old, new) for old, new in zip(ids[::3], ids[2::3], strict=True)]

    measured = [
        _compare(TOKENS, [len(edit.added) for edit in harm], [len(edit.added) for edit in placebo]),
        _compare(RARITY, [_rarity(edit) for edit in harm], [_rarity(edit) for edit in placebo]),
    ]
    if embeddings is not None:
        # A word that is only put in, or only taken out, has no partner to be distant from.
        both = [i for i in range(len(harm)) if all((*harm[i], *placebo[i]))]
        distances = ([_distance(edits[i], embeddings) for i in both] for edits in (harm, placebo))
        measured.append(_compare(DISTANCE, *distances))
    return tuple(measured)


def components(pairs: Sequence[PromptPair]) -> tuple[str, ...]:
    """The component of every pair, named by the id of the first pair in it.

    Two pairs belong together when they share a template, a whole prompt (harmful, harmless or placebo, whatever its
    side or id) or an edit word, and when a third pair links them. An empty template is shared with nobody. Upper and
    lower case are one; inflected forms are different words. Prompts that are not aligned have no edit words.
    """
    labels = _linked([_shared_by(pair) for pair in pairs])
    first: dict[int, str] = {}
    for pair, label in zip(pairs, labels, strict=True):
        first.setdefault(label, pair.id)
    return tuple(first[label] for label in labels)


def _linked(keys: Sequence[set[tuple[str, str]]]) -> list[int]:
    """A number for every item, the same for those that share a key, or that others link. keys: of each item."""
    node = {key: len(keys) + number for number, key in enumerate(sorted(set().union(*keys)))}
    links = np.array([(row, node[key]) for row, of_item in enumerate(keys) for key in of_item], int).reshape(-1, 2)
    size = len(keys) + len(node)
    graph = coo_array((np.ones(len(links)), (links[:, 0], links[:, 1])), shape=(size, size))
    _, labels = connected_components(graph, directed=False)
    return [int(label) for label in labels[: len(keys)]]


def edit_words(pair: PromptPair) -> frozenset[str]:
    """The content words in which the harmless prompt and the harmful one, or the placebo, differ, in lower case.

    A word counts when one of the two prompts has it and the other has not, wherever it stands; articles, prepositions,
    pronouns and auxiliaries do not count.
    """
    harmless = _words(pair.harmless)
    differing = _words(pair.harmful) ^ harmless
    if pair.placebo:
        differing |= _words(pair.placebo) ^ harmless
    return frozenset(differing - _FUNCTION_WORDS)


def _words(text: str) -> set[str]:
    return set(_WORD.findall(folded(text)))


def _shared_by(pair: PromptPair) -> set[tuple[str, str]]:
    """All that links a pair to others: kind and text."""
    prompts = (pair.harmful, pair.harmless, pair.placebo)
    shared = {("prompt", folded(prompt)) for prompt in prompts if prompt}
    if pair.aligned:
        shared |= {("word", word) for word in edit_words(pair)}
    if pair.template:
        shared.add(("template", pair.template))
    return shared


def _ids(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, ...]]:
    """Token ids of texts, some at a time: encoded all at once they take gigabytes."""
    parts = [texts[start : start + _TOGETHER] for start in range(0, len(texts), _TOGETHER)]
    return [tuple(ids) for part in parts for ids in tokenizer(part, add_special_tokens=False)["input_ids"]]


def _edit(old: tuple[int, ...], new: tuple[int, ...]) -> _Edit:
    shorter = min(len(old), len(new))
    start = next((i for i in range(shorter) if old[i] != new[i]), shorter)
    end = next((i for i in range(shorter - start) if old[-1 - i] != new[-1 - i]), shorter - start)
    return _Edit(old[start : len(old) - end], new[start : len(new) - end])


def _rarity(edit: _Edit) -> float:
    return sum(math.log1p(token) for token in edit.added)


def _distance(edit: _Edit, embeddings: NDArray[np.floating]) -> float:
    old, new = (embeddings[list(tokens)].mean(axis=0, dtype=float) for tokens in edit)
    return float(np.linalg.norm(new - old))


def _compare(measure: str, harm: Sequence[float], placebo: Sequence[float]) -> Balance:
    if len(harm) < 2:
        mean = (harm[0], placebo[0]) if harm else (math.nan, math.nan)
        return Balance(measure, *mean, math.nan, len(harm))
    means = float(np.mean(harm)), float(np.mean(placebo))
    pooled = math.sqrt((np.var(harm, ddof=1) + np.var(placebo, ddof=1)) / 2)
    return Balance(measure, *means, _in_deviations(means[0] - means[1], pooled), len(harm))


def _in_deviations(gap: float, deviation: float) -> float:
    """The gap in standard deviations; without any, equal means are alike and others as far apart as can be."""
    if deviation:
        return gap / deviation
    return math.copysign(math.inf, gap) if gap else 0.0
