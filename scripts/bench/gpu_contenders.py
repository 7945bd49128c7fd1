"""The engine, and what one would write without it: one pass with plain hooks a site, one nnsight trace a site.

`contenders.py` has the same loops beside other libraries; here both run where the model is, and their values stay there
until the last is made, which is kinder to them than reading each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import nnsight
import torch

from bench.grid import COMPONENTS, Case
from remote_mediation.engine.budget import Budget, Setting
from remote_mediation.engine.jobs import Job, Keys, plan_jobs
from remote_mediation.engine.local import LocalBackend
from remote_mediation.engine.rows import Row
from remote_mediation.outcomes import Outcome
from remote_mediation.tokens import TokenPair

_MODULES = {"layer_output": "", "attention_output": "self_attn", "mlp_output": "mlp"}


class Measured(NamedTuple):
    """What the engine brought back."""

    values: list[float]
    """Y of each row."""
    jobs: list[Job]
    """As they were planned."""


def engine(
    backend: LocalBackend, setting: Setting, pair: TokenPair, rows: Sequence[Row], batch_bytes: float
) -> Measured:
    """The package's own path, planning included."""
    keys, found, jobs = Keys(setting, [pair]), {}, []
    for job in plan_jobs(rows, {pair.id: pair}, setting, Budget(lambda: math.inf, batch_bytes), keys):
        jobs.append(job)
        found.update(zip(job.keys, backend.collect(backend.submit(job)).values, strict=True))
    return Measured([setting.outcome.value(pair, found[keys(row)]) for row in rows], jobs)


class Hooks:
    """Plain transformers with plain PyTorch hooks: one forward pass a site, only the last token's logits."""

    title = "one pass with plain hooks a site"

    def __init__(self, module: Any, pair: TokenPair, outcome: Outcome) -> None:
        """Take the activations of both prompts; that is not timed."""
        self._module, self._outcome = module, outcome
        self._ids = [torch.tensor([ids], device=module.device) for ids in pair.prompts]
        self._found = [self._activations(ids) for ids in self._ids]

    def measure(self, cases: Sequence[Case]) -> list[float]:
        """Y of each case."""
        with torch.no_grad():
            return torch.stack([self._value(case) for case in cases]).tolist()

    def _value(self, case: Case) -> torch.Tensor:
        new = self._found[1 - case.base][case.component, case.layer][:, case.place]

        def write(tensor: torch.Tensor) -> torch.Tensor:
            tensor[:, case.place] = new
            return tensor

        handle = self._hook(case.component, case.layer, write)
        try:
            logits = self._module(input_ids=self._ids[case.base], use_cache=False, logits_to_keep=1).logits
        finally:
            handle.remove()
        return difference(logits, self._outcome)

    def _activations(self, ids: torch.Tensor) -> dict[tuple[str, int], torch.Tensor]:
        found: dict[tuple[str, int], torch.Tensor] = {}

        def keep(key: tuple[str, int]) -> Callable[[torch.Tensor], torch.Tensor]:
            def look(tensor: torch.Tensor) -> torch.Tensor:
                found[key] = tensor.clone()
                return tensor

            return look

        keys = [(name, layer) for name in COMPONENTS for layer in range(len(self._module.model.layers))]
        handles = [self._hook(*key, keep(key)) for key in keys]
        with torch.no_grad():
            self._module(input_ids=ids, use_cache=False, logits_to_keep=1)
        for handle in handles:
            handle.remove()
        return found

    def _hook(self, component: str, layer: int, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
        block = self._module.model.layers[layer]
        module = block.get_submodule(_MODULES[component])

        def changed(_: Any, __: Any, output: Any) -> Any:
            return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

        return module.register_forward_hook(changed)


class Traces:
    """One nnsight trace a site, only the last token's logits."""

    title = "one nnsight trace a site"

    def __init__(self, model: Any, pair: TokenPair, outcome: Outcome) -> None:
        """Take the activations of both prompts; that is not timed."""
        self._model, self._outcome = model, outcome
        self._ids = [torch.tensor([ids]) for ids in pair.prompts]
        self._found = [self._activations(ids) for ids in self._ids]

    def measure(self, cases: Sequence[Case]) -> list[float]:
        """Y of each case."""
        model, values = self._model, []
        for case in cases:
            with torch.no_grad(), model.trace(self._ids[case.base], logits_to_keep=1):
                self._write(case)
                value = difference(model.lm_head.output, self._outcome).save()
            values.append(value)
        return torch.stack(values).tolist()

    def _activations(self, ids: torch.Tensor) -> dict[str, list[torch.Tensor]]:
        model = self._model
        with torch.no_grad(), model.trace(ids, logits_to_keep=1):
            found = nnsight.save({name: [] for name in COMPONENTS})
            for block in model.model.layers:
                found["attention_output"].append(block.self_attn.output[0].clone())
                found["mlp_output"].append(block.mlp.output.clone())
                found["layer_output"].append(block.output.clone())
        return found

    def _write(self, case: Case) -> None:
        block = self._model.model.layers[case.layer]
        new = self._found[1 - case.base][case.component][case.layer][:, case.place]
        if case.component == "attention_output":
            block.self_attn.output[0][:, case.place] = new
        elif case.component == "mlp_output":
            block.mlp.output[:, case.place] = new
        else:
            block.output[:, case.place] = new


def difference(logits: torch.Tensor, outcome: Outcome) -> torch.Tensor:
    """Y of the logits `[row, token, vocab]` of one row, at its last token."""
    last = logits[0, -1].float()
    return last[outcome.plus[0]] - last[outcome.minus[0]]
