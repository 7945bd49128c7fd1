"""Which models can be studied: the table of families, and a look at one model built from its configuration alone.

A model is built on torch's meta device, where tensors have shapes and no memory, so that the largest one is checked in
seconds and no weights are loaded: every module that its family's row names must be there, as wide as `ModelInfo` says.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from remote_mediation.errors import ModelError, SiteError
from remote_mediation.models import class_of, info_of, load_configuration
from remote_mediation.sites import (
    FAMILIES,
    HEAD_COMPONENTS,
    NOT_COVERED,
    PROJECTED_HEADS,
    SHARED_HEADS,
    Component,
    Family,
    Hook,
    Mixture,
    ModelInfo,
)

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig

_CHECKED: tuple[Component, ...] = ("mlp_neurons", *HEAD_COMPONENTS)


class FamilyLine(NamedTuple):
    """One family, as it is shown."""

    family: str
    components: dict[str, str]
    """What each component is there, by name; the reason where it cannot be had."""
    reason: str
    """Why the whole family cannot be studied; empty for a covered one."""


@dataclass(frozen=True)
class Coverage:
    """What is known of one model from its configuration."""

    name: str
    reason: str
    """Why it cannot be studied; empty where it can."""
    info: ModelInfo | None = None
    """Its shape, where its family is in the table."""
    model_class: str = ""
    """The transformers class that was built."""
    parameters: int = 0
    """Weights that are stored."""
    active: int = 0
    """Weights that run for a token: all of them but the experts of a mixture that a token is not routed to."""
    components: dict[str, str] = field(default_factory=dict)
    """What each component is there, by name."""

    @property
    def covered(self) -> bool:
        """Whether it can be studied."""
        return not self.reason

    def lines(self) -> list[str]:
        """What is known, a line each."""
        verdict = f"{self.name} cannot be studied: {self.reason}" if self.reason else f"{self.name} can be studied"
        if self.info is None:
            return [verdict]
        info = self.info
        running = (
            "" if self.active == self.parameters else f", of which {self.active / 1e9:.3g} billion run for a token"
        )
        return [
            verdict,
            f"class: {self.model_class}, family {info.family}",
            f"shape: {info.layers} layers, stream {info.d_model}, {info.heads} heads of {info.d_head}, MLP {info.d_ff}",
            f"parameters: {self.parameters / 1e9:.3g} billion{running}",
            f"weights: {self.parameters * 4 / 1e9:.3g} GB in float32, {self.parameters * 2 / 1e9:.3g} GB in bfloat16",
            *(f"{name}: {words}" for name, words in self.components.items()),
        ]


def family_lines() -> list[FamilyLine]:
    """Every family of the table by name, then those that cannot be studied."""
    covered = [FamilyLine(name, described(family), "") for name, family in sorted(FAMILIES.items())]
    return covered + [FamilyLine(name, {}, reason) for name, reason in sorted(NOT_COVERED.items())]


def described(family: Family) -> dict[str, str]:
    """What each component is in a family, in words, in forward order."""
    lines = {"layer_output": f"{family.blocks}[i]"}
    for name, hook in family.hooks.items():
        if name == "layer_output":
            continue
        scaled = name in ("attention_output", "mlp_output") and family.multiplier
        lines[name] = f"{hook.side} of {hook.path}" + (f" x {family.multiplier}" if scaled else "")
        joined = PROJECTED_HEADS if family.projection in ("joined", "grouped") else PROJECTED_HEADS[:1]
        if name in joined and family.projection != "apart":
            lines[name] = f"its columns of the {lines[name]}"
    if family.mixer is not None:
        lines["attention_output"] += f"; {family.mixer.side} of {family.mixer.path} in layers without softmax attention"
        for name in HEAD_COMPONENTS:
            lines[name] += "; none in layers without softmax attention"
    lines.setdefault("query_heads", "none: wider than what a head gives")
    for name in SHARED_HEADS:
        lines.setdefault(name, "none: attention makes them anew in every pass, of all tokens")
    if family.mixture is not None:
        lines["mlp_neurons"] = "none: a mixture of experts"
        lines |= _described_parts(family.mixture)
    return lines


def _described_parts(mixture: Mixture) -> dict[str, str]:
    """What the parts of a mixture are, in words."""
    shared = mixture.shared_module + (f" x sigmoid of {mixture.shared_gate}" if mixture.shared_gate else "")
    return {
        "router": f"weights that enter {mixture.module}, 0 for experts not chosen",
        "expert_neurons": f"one neuron of an expert of {mixture.module}, weighted, where a layer has experts",
        "expert_output": f"one expert of {mixture.module}, weighted, where a layer has experts",
        "shared_expert_output": shared or "none: no expert always runs",
    }


def check_model(name: str, revision: str = "") -> Coverage:
    """Build a model of this configuration without weights, and see whether all that its row names is there.

    Raises:
        ModelError: no such model, or no way to reach the hub.
    """
    config = load_configuration(name, revision)
    try:
        info = info_of(config, name, revision)
    except SiteError as error:
        return Coverage(name, str(error))
    return examine(config, info)


def examine(config: PreTrainedConfig, info: ModelInfo) -> Coverage:
    """The coverage of a model whose family is in the table.

    Raises:
        ModelError: transformers cannot build it.
    """
    model, family = _on_meta(config, info.name), FAMILIES[info.family]
    stored = sum(weight.numel() for weight in model.parameters())
    idle = 3 * info.d_model * max(info.stored_ff - info.d_ff, 0) * len(info.routed)
    reason = next(_faults(model, family, info), "")
    return Coverage(info.name, reason, info, type(model).__name__, stored, stored - idle, described(family))


def _on_meta(config: PreTrainedConfig, name: str) -> nn.Module:
    import torch

    try:
        with torch.device("meta"):
            model: nn.Module = class_of(config.model_type).from_config(config, trust_remote_code=False)
    except (ValueError, ImportError, AttributeError) as error:
        raise ModelError(f"transformers cannot build {name!r}: {str(error).strip().splitlines()[0]}") from error
    return model


def _faults(model: nn.Module, family: Family, info: ModelInfo) -> Iterator[str]:
    """What the family's row names and the model has not."""
    blocks = list(_blocks(model, family))
    if len(blocks) != info.layers:
        yield f"{family.blocks} holds {len(blocks)} layers, the configuration says {info.layers}"
    if not hasattr(model, "lm_head"):
        yield "it has no lm_head to read answers from"
    for layer, block in enumerate(blocks):
        for component, hook in _hooks_at(family, info, layer).items():
            module = _module(block, hook)
            if module is None:
                yield f"layer {layer} has no {hook.path}, where {component} is read"
            elif component in _CHECKED and _width(info, component) not in module.weight.shape:
                width, shape = _width(info, component), tuple(module.weight.shape)
                yield f"{hook.path} of layer {layer} is {shape}, and should be {width} wide for {component}"
        if family.mixture is not None:
            yield from _mixture_faults(block, family.mixture, info, layer)


def _width(info: ModelInfo, component: Component) -> int:
    """How wide the tensor should be at which a component passes, with what else passes there."""
    within = info.columns_within(component)
    return within.groups * within.stride if within else info.tensor_width(component)


def _hooks_at(family: Family, info: ModelInfo, layer: int) -> dict[Component, Hook]:
    """The hooks that a layer should have."""
    hooks = {component: hook for component, hook in family.hooks.items() if layer in info.layers_with(component)}
    return {**hooks, "attention_output": family.mixer} if family.mixer and layer in info.recurrent else hooks


def _mixture_faults(block: nn.Module, mixture: Mixture, info: ModelInfo, layer: int) -> Iterator[str]:
    """What a layer of a mixture should have and has not, or has and should not."""
    experts, wanted = _module(block, Hook(mixture.module)), layer in info.routed
    if (experts is not None) != wanted:
        yield f"layer {layer} has {'no ' if wanted else ''}{mixture.module}, the configuration says otherwise"
    if experts is None:
        return
    if len(experts.down_proj) != info.experts:
        yield f"layer {layer} has {len(experts.down_proj)} experts, the configuration says {info.experts}"
    neurons = experts.down_proj.shape[1 if experts.is_transposed else 2]
    if neurons != info.expert_ff:
        yield f"experts of layer {layer} have {neurons} neurons, the configuration says {info.expert_ff}"
    for path in filter(None, (mixture.shared_module, mixture.shared_gate)):
        if _module(block, Hook(path)) is None:
            yield f"layer {layer} has no {path}, which shared_expert_output is made of"


def _blocks(model: nn.Module, family: Family) -> list[Any]:
    return list(model.get_submodule(family.blocks).children())


def _module(block: nn.Module, hook: Hook) -> Any:
    try:
        return block.get_submodule(hook.path)
    except AttributeError:
        return None
