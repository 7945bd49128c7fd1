"""The oracle of a mixture's parts: every expert written out from the stacked weights, one at a time.

The engine asks the model's own experts again with other weights; here their matrices are multiplied by hand, and what a
row changes is added to the MLP by a plain hook. Module names are written out again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from oracle import Oracle, unpacked
from torch import Tensor, nn
from transformers import PreTrainedModel

from remote_mediation.engine.rows import Constant, Projected, Scale, Source, Write

_MLP = dict.fromkeys(
    ("mixtral", "phimoe", "gpt_oss", "olmoe", "qwen2_moe", "qwen3_moe", "qwen3_next"), "model.layers.{}.mlp"
)
MLP = {**_MLP, **dict.fromkeys(("deepseek_v2", "deepseek_v3", "qwen3_5_moe_text"), "model.layers.{}.mlp")}
MLP["lfm2_moe"] = "model.layers.{}.feed_forward"
MLP["granitemoe"] = "model.layers.{}.block_sparse_moe"
# The expert that always runs, and what weights it.
SHARED = dict.fromkeys(("qwen2_moe", "qwen3_next", "qwen3_5_moe_text"), ("shared_expert", "shared_expert_gate"))
SHARED |= dict.fromkeys(("deepseek_v2", "deepseek_v3"), ("shared_experts", ""))
PARTS = ("router", "expert_output", "expert_neurons", "shared_expert_output")


def neurons(module: nn.Module, number: int, hidden: Tensor, family: str) -> Tensor:
    """What goes into one expert's down-projection `[token, neuron]`, of vectors `[token, width]`, by hand."""
    if family == "gpt_oss":  # gate and up in turns, with biases, bounded (its paper, section 2.2)
        both = hidden @ module.gate_up_proj[number] + module.gate_up_proj_bias[number]
        gate, up = both[:, 0::2].clamp(max=7.0), both[:, 1::2].clamp(-7.0, 7.0)
        return gate * torch.sigmoid(1.702 * gate) * (up + 1)
    gate, up = (hidden @ module.gate_up_proj[number].T).tensor_split(2, dim=1)
    return gate * torch.sigmoid(gate) * up


def down(module: nn.Module, number: int, family: str) -> Tensor:
    """One expert's down-projection `[neuron, width]`."""
    return module.down_proj[number] if family == "gpt_oss" else module.down_proj[number].T


def expert(module: nn.Module, number: int, hidden: Tensor, family: str) -> Tensor:
    """One expert of vectors `[token, width]`, by hand."""
    found = neurons(module, number, hidden, family) @ down(module, number, family)
    return found + module.down_proj_bias[number] if family == "gpt_oss" else found


@dataclass(frozen=True)
class Parts:
    """What a mixture adds for the tokens of one pass, all rows in one line."""

    routing: Tensor
    """`[token, expert]`"""
    routed: Tensor
    """`[token, expert, width]` as it reaches the stream."""
    active: Tensor
    """`[token, neuron]`, expert by expert, weighted."""
    shared: Tensor
    """`[token, width]`; 0 where no expert always runs."""

    def of(self, write: Write, token: int) -> Tensor:
        """What a write is about at one token."""
        if write.component == "router":
            return self.routing[token]
        if write.component == "expert_neurons":
            return self.active[token]
        if write.component == "shared_expert_output":
            return self.shared[token]
        return self.routed[token, list(write.columns) or slice(None)].sum(0)


class Handles:
    """Several hooks that are taken off together."""

    def __init__(self, *handles: Any) -> None:
        self._handles = handles

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def mlp_of(model: PreTrainedModel, layer: int) -> nn.Module:
    """The MLP of a layer, with experts or not."""
    return model.get_submodule(MLP[model.config.model_type].format(layer))


class MixtureOracle(Oracle):
    """The oracle with a mixture's parts beside the components of every family."""

    def _mlp(self, layer: int) -> nn.Module:
        return mlp_of(self._model, layer)

    def _parts(self, layer: int, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Parts:
        family, mlp = self._model.config.model_type, self._mlp(layer)
        count = len(mlp.experts.down_proj)
        routing = torch.stack([(weights * (chosen == number)).sum(1) for number in range(count)], 1)
        routed = torch.stack(
            [routing[:, [number]] * expert(mlp.experts, number, hidden, family) for number in range(count)], 1
        )
        active = [routing[:, [number]] * neurons(mlp.experts, number, hidden, family) for number in range(count)]
        shared = torch.zeros_like(hidden)
        if family in SHARED:
            name, gate = SHARED[family]
            one = getattr(mlp, name)
            inner = hidden @ one.gate_proj.weight.T
            shared = (inner * torch.sigmoid(inner) * (hidden @ one.up_proj.weight.T)) @ one.down_proj.weight.T
            shared = shared * torch.sigmoid(hidden @ getattr(mlp, gate).weight.T) if gate else shared
        return Parts(routing, routed * self._multiplier, torch.cat(active, 1), shared * self._multiplier)

    def _record(self, side: int, answer: int) -> dict[tuple[str, int], Any]:
        """Beside what every oracle records, the `Parts` of each layer that has experts."""
        seen: dict[tuple[str, int], Any] = {}

        def look(layer: int) -> Any:
            def keep(_: nn.Module, args: tuple[Any, ...]) -> None:
                seen["parts", layer] = self._parts(layer, *args)

            return self._mlp(layer).experts.register_forward_pre_hook(keep)

        layers = range(self._model.config.num_hidden_layers)
        self._forward(side, answer, 1, [look(layer) for layer in layers if hasattr(self._mlp(layer), "experts")])
        return {**super()._record(side, answer), **seen}

    def _hold(self, write: Write, row: int, side: int, answer: int) -> Any:
        if write.component not in PARTS:
            return super()._hold(write, row, side, answer)
        packed, length = unpacked(self._pair, side), self._length(side, answer)
        here = [
            (number, row * length + packed[place].index)
            for number, place in enumerate(write.places)
            if answer in packed[place].answers
        ]
        if write.component == "router":
            return self._hold_routing(write, here)
        return self._hold_sum(write, here)

    def _length(self, side: int, answer: int) -> int:
        """Tokens of one pass."""
        fed = (self._pair.openings or self._pair.answers)[answer]
        return len(self._pair.prompts[side]) + max(len(fed) - 1, 0)

    def _hold_routing(self, write: Write, here: list[tuple[int, int]]) -> Any:
        """Every expert is named, with its weight or 0."""

        def change(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            hidden, chosen, weights = args
            routing = self._parts(write.layer, hidden, chosen, weights).routing
            columns = list(write.columns) or list(range(routing.shape[1]))
            for number, token in here:
                routing[token, columns] = self._new(write, number, routing[token], columns)
            return hidden, torch.arange(routing.shape[1]).repeat(len(routing), 1), routing

        return self._mlp(write.layer).experts.register_forward_pre_hook(change)

    def _hold_sum(self, write: Write, here: list[tuple[int, int]]) -> Any:
        """The MLP's output changes by as much as what is written changes."""
        differences: dict[int, Tensor] = {}

        def look(_: nn.Module, args: tuple[Any, ...]) -> None:
            parts = self._parts(write.layer, *args)
            for number, token in here:
                own = parts.of(write, token)
                if write.component == "expert_neurons":
                    columns = list(write.columns) or list(range(len(own)))
                    change = self._new(write, number, own, columns) - own[columns]
                    differences[token] = change @ self.columns(write.layer)[columns]
                else:
                    differences[token] = self._new(write, number, own, list(range(len(own)))) - own

        def add(_: nn.Module, __: Any, output: Any) -> Any:
            total = (output[0] if isinstance(output, tuple) else output).clone()
            for token, difference in differences.items():
                total.view(-1, total.shape[-1])[token] += difference / self._multiplier
            return (total, *output[1:]) if isinstance(output, tuple) else total

        mlp = self._mlp(write.layer)
        return Handles(mlp.experts.register_forward_pre_hook(look), mlp.register_forward_hook(add))

    def columns(self, layer: int) -> Tensor:
        """`[neuron, width]`: what each neuron of all experts of a layer adds to the stream where its value is 1."""
        experts, family = self._mlp(layer).experts, self._model.config.model_type
        by_expert = [down(experts, number, family) for number in range(len(experts.down_proj))]
        return torch.cat(by_expert) * self._multiplier

    def _new(self, write: Write, number: int, own: Tensor, columns: list[int]) -> Tensor:
        """What the written columns become at the write's place of that number."""
        match write.value:
            case Scale(factor):
                return own[columns] * factor
            case Constant(values):
                return torch.tensor(values)
            case Source(side, places):
                return self._other_part(write, side, places[number])[columns]
            case Projected(side, places, basis, along):
                other = self._other_part(write, side, places[number])[columns]
                pairs = zip(torch.tensor(basis.vectors), torch.tensor(along.vectors), strict=True)
                return own[columns] + sum(torch.dot(other - own[columns], read) * written for read, written in pairs)
        raise AssertionError(write.value)

    def _other_part(self, write: Write, side: int, place: int) -> Tensor:
        token = unpacked(self._pair, side)[place]
        return self._recorded[side, token.answers[0]]["parts", write.layer].of(write, token.index)
