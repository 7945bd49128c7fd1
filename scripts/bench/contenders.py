"""The engine, and how the other libraries' documentation does the same: each measures Y of a list of cases.

What the usual loops do once per grid is not timed: taking the activations of both prompts (nnsight, TransformerLens)
and building the intervenable models (pyvene). Of the engine everything is timed, its base runs and planning included.
All run without gradients, on the same weights, in float32, one prompt at a time but for `NnsightInvokes`.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

import nnsight
import pandas as pd
import pyvene
import torch
from nnsight import TransformersModel
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.patching import generic_activation_patch, layer_pos_patch_setter
from transformers import AutoModelForCausalLM

from bench.grid import COMPONENTS, Case
from remote_mediation.engine.budget import Budget, Setting
from remote_mediation.engine.jobs import Keys, plan_jobs
from remote_mediation.engine.local import LocalBackend
from remote_mediation.engine.rows import swap
from remote_mediation.outcomes import Outcome
from remote_mediation.tokens import TokenPair

# Memory of one batch of the engine, as in a study.
BATCH_BYTES = 1e9
# Invokes of one forward pass; 32 rows of 40 tokens, logits of all of them included, take about 300 MB.
INVOKES = 32
_LENS_NAMES = {"layer_output": "resid_post", "attention_output": "attn_out", "mlp_output": "mlp_out"}
_PYVENE_NAMES = {"layer_output": "block_output", "attention_output": "attention_output", "mlp_output": "mlp_output"}


class Contender(Protocol):
    """One way to measure the cases of a pair."""

    title: str
    """For the report."""
    whole: bool
    """Whether it is timed on the whole grid, or on a sample of it."""
    goal: float | None
    """How many times faster the engine is meant to be."""

    def prepare(self, pair: TokenPair, cases: Sequence[Case]) -> None:
        """What is done once per grid and not timed."""
        ...

    def measure(self, cases: Sequence[Case]) -> list[float]:
        """Y of every case; this is timed."""
        ...


class Engine:
    """The package's own path, from rows to values."""

    title = "remote_mediation"
    whole = True
    goal = None

    def __init__(self, backend: LocalBackend, outcome: Outcome) -> None:
        self._backend, self._setting = backend, Setting(backend.info, "float32", outcome)

    def prepare(self, pair: TokenPair, cases: Sequence[Case]) -> None:
        """Nothing is left out of the timing."""
        self._pair = pair

    def measure(self, cases: Sequence[Case]) -> list[float]:
        """One job of all rows."""
        pair, setting = self._pair, self._setting
        rows = [swap(pair, case.site, case.base, setting.info) for case in cases]
        keys, values = Keys(setting, [pair]), {}
        for job in plan_jobs(rows, {pair.id: pair}, setting, Budget(lambda: float("inf"), BATCH_BYTES), keys):
            readout = self._backend.collect(self._backend.submit(job))
            values.update(zip(job.keys, readout.values, strict=True))
        return [setting.outcome.value(pair, values[keys(row)]) for row in rows]


class _Nnsight:
    """What both nnsight loops share: the model and each prompt's activations."""

    whole = False
    goal: float | None = None
    kept: ClassVar[dict[str, int]] = {}
    """Arguments of the forward pass; none, as in the documentation, gives the logits of every token."""

    def __init__(self, model: TransformersModel, outcome: Outcome) -> None:
        self._model, self._outcome = model, outcome

    def prepare(self, pair: TokenPair, cases: Sequence[Case]) -> None:
        """One trace per prompt."""
        self._ids = [torch.tensor([ids]) for ids in pair.prompts]
        self._found = [self._activations(ids) for ids in self._ids]

    def _activations(self, ids: torch.Tensor) -> dict[str, list[torch.Tensor]]:
        model = self._model
        with torch.no_grad(), model.trace(ids):
            found = nnsight.save({name: [] for name in COMPONENTS})
            for block in model.model.layers:
                found["attention_output"].append(block.self_attn.output[0])
                found["mlp_output"].append(block.mlp.output)
                found["layer_output"].append(block.output)
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

    def _difference(self, logits: torch.Tensor) -> torch.Tensor:
        return logits[0, -1, self._outcome.plus[0]] - logits[0, -1, self._outcome.minus[0]]


class NnsightTraces(_Nnsight):
    """One trace per site."""

    title = "nnsight, one trace per site"
    goal = 30.0

    def measure(self, cases: Sequence[Case]) -> list[float]:
        """As in nnsight's activation-patching tutorial."""
        model, values = self._model, []
        for case in cases:
            with torch.no_grad(), model.trace(self._ids[case.base], **self.kept):
                self._write(case)
                value = self._difference(model.lm_head.output).save()
            values.append(float(value))
        return values


class NnsightInvokes(_Nnsight):
    """One invoke per site, many invokes in one forward pass."""

    title = f"nnsight, one invoke per site, {INVOKES} per forward pass"
    goal = 12.0

    def measure(self, cases: Sequence[Case]) -> list[float]:
        """As in nnsight's documentation of batching."""
        model, values = self._model, []
        for first in range(0, len(cases), INVOKES):
            with torch.no_grad(), model.trace(**self.kept) as tracer:
                found = nnsight.save([])
                for case in cases[first : first + INVOKES]:
                    with tracer.invoke(self._ids[case.base]):
                        self._write(case)
                        found.append(self._difference(model.lm_head.output))
            values += [float(value) for value in found]
        return values


class NnsightTracesLast(NnsightTraces):
    """One trace per site, by somebody who knows of `logits_to_keep`."""

    title = "nnsight, one trace per site, last logits only"
    goal = None
    kept: ClassVar[dict[str, int]] = {"logits_to_keep": 1}


class NnsightInvokesLast(NnsightInvokes):
    """One invoke per site, likewise."""

    title = f"{NnsightInvokes.title}, last logits only"
    goal = None
    kept: ClassVar[dict[str, int]] = {"logits_to_keep": 1}


class TransformerLens:
    """`generic_activation_patch` over a table of layers and positions, per component and direction."""

    title = "TransformerLens, generic_activation_patch"
    whole = False
    goal = 30.0

    def __init__(self, folder: str, tokenizer: Any, outcome: Outcome) -> None:
        self._bridge = TransformerBridge.boot_transformers(folder, hf_model=load_plain(folder), tokenizer=tokenizer)
        self._bridge.eval()
        self._outcome = outcome

    def prepare(self, pair: TokenPair, cases: Sequence[Case]) -> None:
        """`run_with_cache` per prompt, of the activations that are patched."""
        self._ids = [torch.tensor([ids]) for ids in pair.prompts]
        suffixes = tuple(f"hook_{name}" for name in _LENS_NAMES.values())
        with torch.no_grad():
            self._caches = [
                self._bridge.run_with_cache(ids, names_filter=lambda name: name.endswith(suffixes))[1]
                for ids in self._ids
            ]

    def measure(self, cases: Sequence[Case]) -> list[float]:
        """One call per component and direction."""
        values: dict[Case, float] = {}
        for base in (0, 1):
            for component in COMPONENTS:
                part = [case for case in cases if (case.base, case.component) == (base, component)]
                if part:
                    values.update(zip(part, self._patch(part, base, _LENS_NAMES[component]), strict=True))
        return [values[case] for case in cases]

    def _patch(self, cases: Sequence[Case], base: int, name: str) -> list[float]:
        table = pd.DataFrame({"layer": [case.layer for case in cases], "pos": [case.place for case in cases]})
        with torch.no_grad():
            found = generic_activation_patch(
                self._bridge,
                self._ids[base],
                self._caches[1 - base],
                self._difference,
                layer_pos_patch_setter,
                name,
                index_df=table,
            )
        return found.tolist()

    def _difference(self, logits: torch.Tensor) -> torch.Tensor:
        return logits[0, -1, self._outcome.plus[0]] - logits[0, -1, self._outcome.minus[0]]


class Pyvene:
    """An `IntervenableModel` with a `VanillaIntervention` per layer and component; each call runs both prompts."""

    title = "pyvene, VanillaIntervention"
    whole = False
    goal = None

    def __init__(self, folder: str, outcome: Outcome) -> None:
        self._model, self._outcome = load_plain(folder), outcome

    def prepare(self, pair: TokenPair, cases: Sequence[Case]) -> None:
        """One intervenable model per layer and component."""
        self._ids = [torch.tensor([ids]) for ids in pair.prompts]
        wanted = dict.fromkeys((case.component, case.layer) for case in cases)
        self._models = {key: self._intervenable(*key) for key in wanted}

    def measure(self, cases: Sequence[Case]) -> list[float]:
        """As in pyvene's tutorials: base, source, and the position in both."""
        values = []
        for case in cases:
            intervenable, where = self._models[case.component, case.layer], [[[case.place]]]
            base, source = {"input_ids": self._ids[case.base]}, {"input_ids": self._ids[1 - case.base]}
            with torch.no_grad():
                _, changed = intervenable(base, [source], {"sources->base": (where, where)})
            logits = changed.logits[0, -1]
            values.append(float(logits[self._outcome.plus[0]] - logits[self._outcome.minus[0]]))
        return values

    def _intervenable(self, component: str, layer: int) -> Any:
        place = pyvene.RepresentationConfig(layer, _PYVENE_NAMES[component], "pos", 1)
        config = pyvene.IntervenableConfig([place], intervention_types=pyvene.VanillaIntervention)
        with contextlib.redirect_stdout(io.StringIO()):
            return pyvene.IntervenableModel(config, model=self._model)


def load_plain(folder: str) -> Any:
    """The model as transformers loads it, for libraries that change the model that they are given."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False).eval()
