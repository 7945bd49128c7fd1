"""Packed sequences taken apart: what a model runs whose layers do not all have softmax attention.

A packed sequence holds a prompt and all that is fed behind it, told apart by the attention mask. A convolution or a
linear attention reads its tokens one after the other and knows no such mask, nor can it begin from the keys and values
of a prefix. So each chain of fed tokens runs as a sequence of its own, from the prompt's first token on.
"""

from __future__ import annotations

from typing import Any

from remote_mediation.sites import ModelInfo
from remote_mediation.tokens import TokenPair, trie


def sequences(pair: TokenPair, side: int) -> tuple[tuple[int, ...], ...]:
    """Packed indices of each sequence, one for every end of what is fed, all as long as the longest.

    Shorter ones repeat their last token, which nothing before it sees and nobody reads.
    """
    length = len(pair.prompts[side])
    chains = _opened(pair) if pair.openings else _answered(pair)
    longest = max(map(len, chains))
    found = [(*range(length), *(length + index for index in chain)) for chain in chains]
    return tuple(one + (one[-1],) * (length + longest - len(one)) for one in found)


def _opened(pair: TokenPair) -> list[tuple[int, ...]]:
    """By end of the trie of openings the nodes that lead there; one empty chain where nothing is fed."""
    nodes = list(trie(pair.openings).values())
    chains: list[tuple[int, ...]] = []
    for end in set(range(len(nodes))) - {node.parent for node in nodes}:
        chain = [end]
        while nodes[chain[0]].parent >= 0:
            chain.insert(0, nodes[chain[0]].parent)
        chains.append(tuple(chain))
    return sorted(chains) or [()]


def _answered(pair: TokenPair) -> list[tuple[int, ...]]:
    """The fed tokens of each answer that has some; one empty chain where none has."""
    chains, begin = [], 0
    for answer in pair.answers:
        fed = max(len(answer) - 1, 0)
        chains.append(tuple(range(begin, begin + fed)))
        begin += fed
    return [chain for chain in chains if chain] or [()]


def unfolding(pair: TokenPair, side: int, info: ModelInfo) -> dict[str, Any]:
    """For a payload: the sequences, and in which of them and where each packed token stands; empty where none."""
    if not info.unfolded:
        return {}
    paths = sequences(pair, side)
    found: dict[int, tuple[int, int]] = {}
    for number, path in enumerate(paths):
        for place, index in enumerate(path):
            found.setdefault(index, (number, place))
    return {"paths": paths, "folds": tuple(zip(*(found[index] for index in sorted(found)), strict=True))}


def tokens_run(pair: TokenPair, side: int, info: ModelInfo) -> int:
    """Tokens that one whole row runs: those of the packed sequence, or of all that it is taken apart into."""
    if not info.unfolded:
        return len(pair.prompts[side]) + pair.fed
    return sum(map(len, sequences(pair, side)))
