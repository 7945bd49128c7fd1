"""The floor: the fewest operations that a pair's outcomes need, over the speed of the machine's own matrix products.

Only matrix products count, two operations per multiply-add. A row whose token `q` is written in layer `l` can change
nothing at tokens before `q`, nor below the write. Two counts are given:

- *whole layers*: every layer above the write, over all tokens from `q` on, keys up to each token itself; for
  `attention_output` the MLP of its own layer too; two rows of the unembedding; both base runs in full.
- *fewest*: of these only what both can differ from the base run and is read by the outcome. In the layer of the write
  and in the projections to queries, keys and values of the next one, only token `q` differs. In the last layer only the
  last token is read, and a write that it cannot see needs nothing. The base runs share the prompt before the first
  difference.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from bench.grid import Case
from remote_mediation.sites import ModelInfo
from remote_mediation.tokens import TokenPair

READS = 2
# Rows of the products timed, [rows, d_model] x [d_model, d_ff] and back: one token of a batch to a large batch.
PRODUCT_ROWS = (256, 1024, 4096)
PRODUCT_REPEATS = 7
LAYERS_ROWS, LAYERS_REPEATS = 1024, 3


@dataclass(frozen=True)
class Floor:
    """Operations of a pair's grid by both counts."""

    whole_layers: float
    fewest: float


@dataclass(frozen=True)
class _Costs:
    """Operations per token, by part of a layer."""

    query: float
    keyvalue: float
    out: float
    mlp: float
    attend: float
    """Per key attended to."""
    unembed: float
    """Of the tokens that are read."""
    layers: int

    @property
    def qkv(self) -> float:
        """Queries, keys and values of a token."""
        return self.query + self.keyvalue

    def layer(self, first: int, length: int) -> float:
        """One layer over the tokens from `first` to the end."""
        return (length - first) * (self.qkv + self.out + self.mlp) + self.attend * _keys(first, length)

    def last_layer(self, keys: int, queries: int, length: int) -> float:
        """The last layer for its last token, with so many keys and queries (0 or 1) that are not known yet."""
        return keys * self.keyvalue + queries * self.query + self.attend * length + self.out + self.mlp


def floor_of(pair: TokenPair, cases: list[Case], info: ModelInfo) -> Floor:
    """Both counts for all cases of a pair."""
    costs, length = _costs(info), len(pair.x0)
    whole = sum(_whole_row(costs, case, length) for case in cases)
    fewest = sum(_fewest_row(costs, case, length) for case in cases)
    return Floor(whole + _whole_bases(costs, length), fewest + _fewest_bases(costs, pair.first, length))


def matmul_rate(info: ModelInfo) -> tuple[float, list[tuple[int, float]]]:
    """Operations per second of the model's MLP products in float32, and by number of rows; best of several."""
    up, down = torch.randn(info.d_ff, info.d_model), torch.randn(info.d_model, info.d_ff)
    rates = [(rows, max(_product_rate(rows, up, down) for _ in range(PRODUCT_REPEATS))) for rows in PRODUCT_ROWS]
    return max(rate for _, rate in rates), rates


def layers_rate(model: torch.nn.Module) -> float:
    """The same of all linear modules of a model's layers one after the other: weights come from memory, not a cache."""
    weights = [module.weight for module in model.modules() if isinstance(module, torch.nn.Linear)]
    data = {width: torch.randn(LAYERS_ROWS, width) for width in {weight.shape[1] for weight in weights}}

    def once() -> float:
        start = time.perf_counter()
        for weight in weights:
            torch.nn.functional.linear(data[weight.shape[1]], weight)
        return 2.0 * LAYERS_ROWS * sum(weight.numel() for weight in weights) / (time.perf_counter() - start)

    with torch.no_grad():
        return max(once() for _ in range(LAYERS_REPEATS))


def _product_rate(rows: int, up: torch.Tensor, down: torch.Tensor) -> float:
    data = torch.randn(rows, up.shape[1])
    start = time.perf_counter()
    torch.nn.functional.linear(torch.nn.functional.linear(data, up), down)
    return 4.0 * rows * up.numel() / (time.perf_counter() - start)


def _costs(info: ModelInfo) -> _Costs:
    inner = info.heads * info.d_head
    return _Costs(
        query=2.0 * info.d_model * inner,
        keyvalue=4.0 * info.d_model * info.kv_heads * info.d_head,
        out=2.0 * inner * info.d_model,
        mlp=(6.0 if info.gated else 4.0) * info.d_model * info.d_ff,
        attend=4.0 * inner,
        unembed=2.0 * READS * info.d_model,
        layers=info.layers,
    )


def _keys(first: int, length: int) -> int:
    """Keys that the tokens from `first` on attend to, all together."""
    return sum(range(first + 1, length + 1))


def _whole_row(costs: _Costs, case: Case, length: int) -> float:
    above = costs.layers - case.layer - 1
    own = (length - case.place) * costs.mlp if case.component == "attention_output" else 0.0
    return own + above * costs.layer(case.place, length) + costs.unembed


def _fewest_row(costs: _Costs, case: Case, length: int) -> float:
    above, tokens, is_last = costs.layers - case.layer - 1, length - case.place, case.place == length - 1
    if not above and not is_last:
        return 0.0  # written in the last layer, where only the last token is read
    own = costs.mlp if case.component == "attention_output" else 0.0
    if not above:
        return own + costs.unembed
    if above == 1:
        return own + costs.last_layer(1, int(is_last), length) + costs.unembed
    spared = (tokens - 1) * costs.qkv  # in the first layer above only the written token's input has changed
    middle = (above - 1) * costs.layer(case.place, length) - spared
    return own + middle + costs.last_layer(tokens, 1, length) + costs.unembed


def _whole_bases(costs: _Costs, length: int) -> float:
    return 2 * (costs.layers * costs.layer(0, length) + costs.unembed)


def _fewest_bases(costs: _Costs, first: int, length: int) -> float:
    """The prompt before the first difference once, the last layer for the last token."""
    shared = (costs.layers - 1) * (costs.layer(0, length) - costs.layer(first, length)) + first * costs.keyvalue
    own = (costs.layers - 1) * costs.layer(first, length) + costs.last_layer(length - first, 1, length)
    return shared + 2 * (own + costs.unembed)
