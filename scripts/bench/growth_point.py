"""One point of `growth`, in a process of its own: load the model, measure a grid, print time and peak as JSON."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from remote_mediation.engine.budget import Setting
    from remote_mediation.engine.local import LocalBackend
    from remote_mediation.engine.rows import Row
    from remote_mediation.tokens import TokenPair

SIZES = {
    "pairs": (1, 2, 4, 8),
    "layers": (6, 12, 18, 24, 30),
    "positions": (1, 2, 4, 8, 16),
    "neurons": (64, 256, 1024, 4096),
}
AXES = {
    "pairs": "MLP and attention output of every layer, all tokens from the first difference on at once, both ways.",
    "layers": "The first layers of the model as a model of their own; MLP output of each at each single token from the "
    "first difference on, both ways, one pair. More layers are more outcomes, with more layers above each.",
    "positions": "MLP output of every layer at each of the last tokens of the prompt, both ways, one pair. The earlier "
    "a token, the more tokens behind it change too.",
    "neurons": "Single MLP neurons of the last 10 layers at the last token, both ways, one pair.",
}
DEFAULT_LAYERS = 30
NEURON_LAYERS = 10
BATCH_BYTES = 1e9
JOB_FLOPS = 1e12


def main(axis: str, size: int, repeats: int) -> None:
    """Measure one point and print it."""
    from bench.machine import Load, load_average
    from remote_mediation.engine.budget import Setting
    from remote_mediation.outcomes import logit_diff

    backend = _backend(size if axis == "layers" else DEFAULT_LAYERS)
    setting = Setting(backend.info, "float32", logit_diff(["Sure"], ["Sorry"], backend.tokenizer))
    pairs = _pairs(backend, axis, size)
    rows = _ROWS[axis](pairs, setting, size)
    _measure(rows[:1], pairs, setting, backend)  # weights are read from disk when they are first used
    loaded, load, average = _peak_mb(), Load(), load_average()
    seconds = min(_measure(rows, pairs, setting, backend) for _ in range(repeats))
    point = {
        "axis": axis,
        "size": size,
        "outcomes": len(rows),
        "seconds": seconds,
        "loaded_mb": loaded,
        "peak_mb": _peak_mb(),
        "load_average": average,
        "others": load.others(),
    }
    print(json.dumps(point))


def _backend(layers: int) -> LocalBackend:
    """The model, or its first layers."""
    import torch
    from nnsight import TransformersModel
    from transformers import AutoConfig
    from transformers.utils import logging

    from bench.grid import MODEL
    from remote_mediation.engine.local import LocalBackend
    from remote_mediation.fetch import located
    from remote_mediation.models import info_of

    logging.set_verbosity_error()  # the layers left out are no news
    logging.disable_progress_bar()
    folder, config = located(MODEL), AutoConfig.from_pretrained(located(MODEL), num_hidden_layers=layers)
    model = TransformersModel(
        folder,
        task="text-generation",
        dispatch=True,
        dtype=torch.float32,
        device="cpu",
        num_hidden_layers=layers,
    )
    model.eval()
    return LocalBackend(model, info_of(config, MODEL))


def _pairs(backend: LocalBackend, axis: str, size: int) -> list[TokenPair]:
    """Built-in pairs; for positions the one with the most tokens behind its first difference."""
    from bench.grid import equal_pairs
    from remote_mediation.pairs import load_pairs
    from remote_mediation.tokens import tokenise

    if axis == "positions":
        return [max(tokenise(load_pairs("builtin"), backend.tokenizer).pairs, key=lambda pair: len(pair.tokens()))]
    return equal_pairs(backend.tokenizer, max(SIZES["pairs"]))[: size if axis == "pairs" else 1]


def _pair_rows(pairs: list[TokenPair], setting: Setting, size: int) -> list[Row]:
    return _swaps(
        pairs,
        setting,
        [
            (name, layer, "all", ())
            for name in ("mlp_output", "attention_output")
            for layer in range(setting.info.layers)
        ],
    )


def _layer_rows(pairs: list[TokenPair], setting: Setting, size: int) -> list[Row]:
    (pair,) = pairs
    return _swaps(pairs, setting, [("mlp_output", layer, name, ()) for layer in range(size) for name in pair.tokens()])


def _position_rows(pairs: list[TokenPair], setting: Setting, size: int) -> list[Row]:
    (pair,), layers = pairs, range(setting.info.layers)
    return _swaps(
        pairs, setting, [("mlp_output", layer, name, ()) for layer in layers for name in pair.tokens()[-size:]]
    )


def _neuron_rows(pairs: list[TokenPair], setting: Setting, size: int) -> list[Row]:
    layers = range(setting.info.layers - NEURON_LAYERS, setting.info.layers)
    units = [(layers[i % NEURON_LAYERS], i // NEURON_LAYERS) for i in range(size)]
    return _swaps(pairs, setting, [("mlp_neurons", layer, "last", (unit,)) for layer, unit in units])


_ROWS: dict[str, Callable[[list[TokenPair], Setting, int], list[Row]]] = {
    "pairs": _pair_rows,
    "layers": _layer_rows,
    "positions": _position_rows,
    "neurons": _neuron_rows,
}


def _swaps(pairs, setting, sites) -> list[Row]:  # type: ignore[no-untyped-def]
    from remote_mediation.engine.rows import swap
    from remote_mediation.sites import Site

    return [swap(pair, Site(*site), base, setting.info) for pair in pairs for site in sites for base in (0, 1)]


def _measure(rows: list[Row], pairs: list[TokenPair], setting: Setting, backend: LocalBackend) -> float:
    """Seconds from rows to values."""
    from remote_mediation.engine.budget import Budget
    from remote_mediation.engine.jobs import Keys, plan_jobs

    start = time.perf_counter()
    budget = Budget(lambda: JOB_FLOPS, BATCH_BYTES)
    for job in plan_jobs(rows, {pair.id: pair for pair in pairs}, setting, budget, Keys(setting, pairs)):
        backend.collect(backend.submit(job))
    return time.perf_counter() - start


def _peak_mb() -> float:
    """Peak of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
