"""What rows cost: floating-point operations and bytes, of a model of this shape. No weights are needed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from remote_mediation.engine.rows import Projected, Row, Source
from remote_mediation.engine.unfold import tokens_run
from remote_mediation.errors import SettingsError
from remote_mediation.loading import QUANTISED_BYTES, Quantization
from remote_mediation.outcomes import Outcome
from remote_mediation.sites import Component, ModelInfo
from remote_mediation.tokens import TokenPair

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Resident bytes of Python, torch, transformers, nnsight and what a run takes beside weights and batches
# (scripts/bench/memory measures them).
LIBRARIES = 0.6e9
DEFAULT_BATCH = 1e9
SMALLEST_BATCH = 0.1e9
# Layers' worth of a row's keys and values: shown to a layer and grown by it, of the one before, for the next one.
_CACHED_LAYERS = 3
# Copies of the answer logits that are alive at once: as computed, as float32, and inside logsumexp.
LOGIT_COPIES = 3


class Setting(NamedTuple):
    """What all rows of a study share."""

    info: ModelInfo
    dtype: str
    outcome: Outcome
    quantization: Quantization = ""

    @property
    def precision(self) -> str:
        """In which numbers the model is held and multiplied, for the names of rows."""
        return f"{self.dtype} {self.quantization}".rstrip()


class Budget(NamedTuple):
    """What a job and a batch may cost."""

    job_flops: Callable[[], float]
    """Floating-point operations of the next job; asked anew for each, as the backend's speed becomes known."""
    batch_bytes: float
    """Memory of one batch's activations and of what base runs keep for it, in bytes."""


def layer_flops(info: ModelInfo, tokens: int, keys: int) -> float:
    """Floating-point operations of one layer over `tokens` tokens that attend to `keys` tokens each.

    Two per weight and token, and two matrix products of the attention (Kaplan et al. 2020, arXiv 2001.08361, table 1).
    """
    attention = 2 * info.d_model * info.d_head * (info.heads + info.kv_heads)
    mlp = (3 if info.gated else 2) * info.d_model * info.d_ff
    return 2.0 * tokens * (attention + mlp) + 4.0 * tokens * keys * info.heads * info.d_head


def run_from(row: Row, pair: TokenPair, info: ModelInfo) -> int:
    """First token that a row has to run: its first written one, but no later than the one that predicts the answers.

    The very first one in a model that cannot go on from another run's keys and values.
    """
    if info.unfolded:
        return 0
    return min(row.start, len(pair.prompts[row.base]) - 1)


def row_flops(row: Row, pair: TokenPair, setting: Setting) -> float:
    """Operations of one row in the engine: its tokens from the first written one on, its layers likewise."""
    length = tokens_run(pair, row.base, setting.info)
    tokens = length - run_from(row, pair, setting.info)
    layers = layer_flops(setting.info, tokens, length) * (setting.info.layers - row.low)
    return layers + _unembedding_flops(pair, setting)


def base_flops(pair: TokenPair, setting: Setting) -> float:
    """Operations of a pair's two base runs."""
    return sum(prompt_flops(pair, side, setting) for side in (0, 1))


def prompt_flops(pair: TokenPair, side: int, setting: Setting) -> float:
    """Operations of the base run of one prompt of a pair."""
    length = tokens_run(pair, side, setting.info)
    return layer_flops(setting.info, length, length) * setting.info.layers + _unembedding_flops(pair, setting)


def row_bytes(pair: TokenPair, start: int, setting: Setting) -> float:
    """Peak memory of one row of a batch: answer logits, or one layer's activations, keys and values."""
    return max(_logit_bytes(pair, setting), _layer_bytes(pair, start, setting))


def graph_bytes(pair: TokenPair, start: int, layers: int, setting: Setting) -> float:
    """Memory of one row whose gradient is taken: what it runs is kept, in so many layers, about twice over."""
    return _logit_bytes(pair, setting) + 2 * layers * _layer_bytes(pair, start, setting)


def _logit_bytes(pair: TokenPair, setting: Setting) -> float:
    if not setting.outcome.normalise:
        return 0.0
    return float((1 + pair.fed) * setting.info.vocab * 4 * LOGIT_COPIES)


def _layer_bytes(pair: TokenPair, start: int, setting: Setting) -> float:
    info, size = setting.info, DTYPE_BYTES[setting.dtype]
    length = max(tokens_run(pair, side, info) for side in (0, 1))
    layer = (length - start) * (4 * info.d_model + 3 * info.d_ff) * size
    attention = 2 * length * info.heads * info.d_head * size + (length - start) * length * info.heads * size
    cache = 2 * _CACHED_LAYERS * length * info.kv_heads * info.d_head * size
    return float(layer + attention + cache)


def held_bytes(pairs: Sequence[TokenPair], rows: Iterable[Row], setting: Setting) -> float:
    """Memory of what base runs keep for rows: keys and values, the stream, and the components that rows take."""
    info, size = setting.info, DTYPE_BYTES[setting.dtype]
    first, components = captured(pairs, rows, info)
    width = info.d_model + sum(kept_width(info, component) for component in components)
    lengths = [len(prompt) + pair.fed for pair in pairs for prompt in pair.prompts]
    cached = 2 * info.kv_heads * info.d_head
    return float(info.layers * size * sum(length * cached + (length - first) * width for length in lengths))


def kept_width(info: ModelInfo, component: Component) -> int:
    """Numbers that a base run keeps of a component at one token; of experts what they are given."""
    width = info.tensor_width(component)
    return width + info.experts if component == "expert_output" else width


def weight_bytes(info: ModelInfo, dtype: str, quantization: Quantization = "") -> float:
    """Memory of the model's weights. quantization: of all but experts, which transformers holds in one tensor."""
    idle = (3 if info.gated else 2) * info.d_model * max(info.stored_ff - info.d_ff, 0)
    return running_bytes(info, dtype, quantization) + idle * len(info.routed) * DTYPE_BYTES[dtype]


def running_bytes(info: ModelInfo, dtype: str, quantization: Quantization = "") -> float:
    """Memory of the weights that run for a token: all of them but the experts of a mixture that it is not routed to."""
    size = DTYPE_BYTES[dtype]
    layers = layer_flops(info, 1, 0) / 2 * info.layers
    experts = (3 if info.gated else 2) * info.d_model * info.d_ff * len(info.routed)
    embeddings = info.vocab * info.d_model * (1 if info.tied else 2)
    return (layers - experts) * QUANTISED_BYTES.get(quantization, size) + (experts + embeddings) * size


def batch_budget(setting: Setting, max_memory: float | None, here: bool) -> float:
    """Bytes that a batch's activations may take, of `max_memory` GB in all. here: the weights are on this machine.

    Raises:
        SettingsError: libraries and weights alone take as much.
    """
    if max_memory is None:
        return DEFAULT_BATCH
    fixed = LIBRARIES + weight_bytes(setting.info, setting.dtype, setting.quantization) if here else 0.0
    left = max_memory * 1e9 - fixed
    if left < SMALLEST_BATCH:
        raise SettingsError(
            f"max_memory {max_memory:g} GB is too little: libraries and weights take {fixed / 1e9:.2f} GB; "
            f"give at least {math.ceil((fixed + SMALLEST_BATCH) / 1e7) / 100:.2f}"
        )
    return left


def _unembedding_flops(pair: TokenPair, setting: Setting) -> float:
    read = setting.info.vocab if setting.outcome.normalise else len(setting.outcome.reads(pair))
    return 2.0 * (1 + pair.fed) * setting.info.d_model * read


def captured(pairs: Iterable[TokenPair], rows: Iterable[Row], info: ModelInfo) -> tuple[int, set[Component]]:
    """What rows need of the base runs: from which token on, and which components."""
    writes = [write for row in rows for write in row.writes]
    sources = [(write.component, write.value.places) for write in writes if isinstance(write.value, Source | Projected)]
    begins = [*(write.places[0] for write in writes), *(taken[0] for _, taken in sources)]
    first = 0 if info.unfolded else min([*begins, *(pair.first for pair in pairs)])
    return first, {kept_component(component) for component, _ in sources}


def kept_component(component: Component) -> Component:
    """Under which name a base run keeps a component: all experts are made of what they are given."""
    return "expert_output" if component in ("expert_neurons", "shared_expert_output") else component
