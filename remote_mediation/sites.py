"""Where a mediator lives: the one table that maps components of a model family to modules, and `Site` itself.

A family is a row of data. Adding one means adding a row to `FAMILIES`; nothing else in the package knows module names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from remote_mediation.errors import SiteError

Component = Literal["layer_output", "attention_output", "mlp_output", "mlp_neurons", "attention_heads"]
COMPONENTS: tuple[Component, ...] = get_args(Component)
# The order in which a block computes them, which is the order in which nnsight lets a trace read them.
FORWARD_ORDER: tuple[Component, ...] = (
    "attention_heads",
    "attention_output",
    "mlp_neurons",
    "mlp_output",
    "layer_output",
)


class Hook(NamedTuple):
    """Where a component's tensor passes: a module of the block, its input or output, and which item of a tuple."""

    path: str
    side: Literal["input", "output"] = "output"
    item: int | None = None


@dataclass(frozen=True)
class Family:
    """Module names of one architecture, relative to the model (`blocks`) or to a block (the hooks)."""

    blocks: str
    """Path of the list of decoder layers."""
    attention_output: Hook
    """What attention adds to the residual stream, after a post-norm where the family has one."""
    mlp_output: Hook
    """What the MLP adds to the residual stream, after a post-norm where the family has one."""
    mlp_neurons: Hook
    """Input of the down-projection, `d_ff` wide."""
    attention_heads: Hook
    """Input of the attention's output projection, heads side by side."""

    def hook(self, component: Component) -> Hook:
        """The hook of a component; every family's `layer_output` is the block's own output."""
        return Hook("") if component == "layer_output" else getattr(self, component)


_LLAMA = Family(
    blocks="model.layers",
    attention_output=Hook("self_attn", "output", 0),
    mlp_output=Hook("mlp"),
    mlp_neurons=Hook("mlp.down_proj", "input"),
    attention_heads=Hook("self_attn.o_proj", "input"),
)
_GEMMA = Family(  # sandwich norms: what reaches the stream has passed the post-norm
    blocks="model.layers",
    attention_output=Hook("post_attention_layernorm"),
    mlp_output=Hook("post_feedforward_layernorm"),
    mlp_neurons=Hook("mlp.down_proj", "input"),
    attention_heads=Hook("self_attn.o_proj", "input"),
)
FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "phi3": _LLAMA,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "gpt2": Family(
        blocks="transformer.h",
        attention_output=Hook("attn", "output", 0),
        mlp_output=Hook("mlp"),
        mlp_neurons=Hook("mlp.c_proj", "input"),
        attention_heads=Hook("attn.c_proj", "input"),
    ),
    "gpt_neox": Family(
        blocks="gpt_neox.layers",
        attention_output=Hook("attention", "output", 0),
        mlp_output=Hook("mlp"),
        mlp_neurons=Hook("mlp.dense_4h_to_h", "input"),
        attention_heads=Hook("attention.dense", "input"),
    ),
}


def family_of(model_type: str) -> Family:
    """The table row of a configuration's `model_type`.

    Raises:
        SiteError: no row for it; the message says which row to add.
    """
    if model_type not in FAMILIES:
        raise SiteError(
            f"model family {model_type!r} is not in the table (known: {', '.join(sorted(FAMILIES))}); add a row "
            f"FAMILIES[{model_type!r}] = Family(blocks=..., attention_output=..., mlp_output=..., mlp_neurons=..., "
            "attention_heads=...) to remote_mediation/sites.py"
        )
    return FAMILIES[model_type]


@dataclass(frozen=True)
class ModelInfo:
    """The shape of a model, from its configuration alone; no weights are needed to plan a study."""

    name: str
    """Hub id or local folder."""
    revision: str
    """Hub revision; empty for the default one and for local folders."""
    family: str
    """`model_type` of the configuration, a key of `FAMILIES`."""
    layers: int
    """Number of decoder layers."""
    d_model: int
    """Width of the residual stream."""
    d_ff: int
    """Number of MLP neurons per layer."""
    heads: int
    """Number of attention (query) heads per layer."""
    kv_heads: int
    """Number of key/value heads per layer."""
    d_head: int
    """Width of one head."""
    vocab: int
    """Rows of the unembedding."""
    gated: bool
    """Whether the MLP has a gate projection beside the up-projection (three matrices instead of two)."""
    tied: bool
    """Whether embedding and unembedding are the same matrix."""
    sliding: tuple[int, ...]
    """Layers with sliding-window attention."""
    window: int | None
    """Tokens that a sliding-window layer sees, itself included."""
    weights: str = ""
    """Fingerprint of a local folder's weight files; empty for a hub model, which its revision names."""

    def width(self, component: Component) -> int:
        """Units of a component: heads for `attention_heads`, vector width for the others."""
        return {"mlp_neurons": self.d_ff, "attention_heads": self.heads}.get(component, self.d_model)

    def tensor_width(self, component: Component) -> int:
        """Columns of a component's tensor."""
        return self.width(component) * (self.d_head if component == "attention_heads" else 1)

    def columns(self, component: Component, units: tuple[int, ...]) -> tuple[int, ...]:
        """Tensor columns of units: a head is `d_head` columns, every other unit is one."""
        if component != "attention_heads":
            return units
        return tuple(head * self.d_head + column for head in units for column in range(self.d_head))


@dataclass(frozen=True, order=True)
class Site:
    """One mediator: a component of a layer, at a named position, whole or some of its units."""

    component: Component
    """Which tensor."""
    layer: int
    """Decoder layer, from 0."""
    position: str
    """A span of the prompt or one of its tokens; see `TokenPair.places`."""
    units: tuple[int, ...] = ()
    """Neurons or heads, ascending; empty for the whole tensor."""


def check_site(site: Site, info: ModelInfo) -> None:
    """Refuse a site that the model does not have.

    Raises:
        SiteError: unknown component, layer or unit out of range.
    """
    if site.component not in COMPONENTS:
        raise SiteError(f"unknown component {site.component!r}; use one of {', '.join(COMPONENTS)}")
    if not 0 <= site.layer < info.layers:
        raise SiteError(f"layer {site.layer} is out of range: {info.name} has layers 0 to {info.layers - 1}")
    width = info.width(site.component)
    outside = [unit for unit in site.units if not 0 <= unit < width]
    if outside:
        raise SiteError(f"unit {outside[0]} of {site.component} is out of range: {info.name} has 0 to {width - 1}")


class Thirds(NamedTuple):
    """The layers of a model as the claims cut them; any rest of the division goes to the earlier thirds."""

    early: range
    middle: range
    late: range


def thirds(layers: int) -> Thirds:
    """Early 0..⌈L/3⌉−1, middle ⌈L/3⌉..⌈2L/3⌉−1, late ⌈2L/3⌉..L−1."""
    first, second = -(-layers // 3), -(-2 * layers // 3)
    return Thirds(range(first), range(first, second), range(second, layers))


def band(component: Component, layers: Sequence[int], position: str) -> list[Site]:
    """One whole component of several layers, to be swapped together."""
    return [Site(component, layer, position) for layer in layers]
