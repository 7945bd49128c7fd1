"""Where a mediator lives: the one table that maps components of a model family to modules, and `Site` itself.

A family is a row of data. Adding one means adding a row to `FAMILIES`; nothing else in the package knows module names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple, get_args

from pydantic import TypeAdapter

from remote_mediation.errors import SiteError
from remote_mediation.kinds import of_kind

Component = Literal[
    "layer_output",
    "attention_output",
    "mlp_output",
    "mlp_neurons",
    "attention_heads",
    "query_heads",
    "key_heads",
    "value_heads",
    "router",
    "expert_output",
    "expert_neurons",
    "shared_expert_output",
]
COMPONENTS: tuple[Component, ...] = get_args(Component)
# The order in which a block computes them, which is the order in which nnsight lets a trace read them.
FORWARD_ORDER: tuple[Component, ...] = (
    "query_heads",
    "key_heads",
    "value_heads",
    "attention_heads",
    "attention_output",
    "mlp_neurons",
    "router",
    "expert_neurons",
    "expert_output",
    "shared_expert_output",
    "mlp_output",
    "layer_output",
)
# Parts of a mixture of experts; a unit of the first two is one routed expert, of the third one neuron of one of them,
# whose number is that of the expert times the neurons of an expert, plus its own there.
MIXTURE_COMPONENTS: tuple[Component, ...] = ("router", "expert_output", "expert_neurons", "shared_expert_output")
HeadComponent = Literal["attention_heads", "query_heads", "key_heads", "value_heads"]
# What only softmax attention has; a unit is one head, `d_head` wide.
HEAD_COMPONENTS: tuple[HeadComponent, ...] = get_args(HeadComponent)
# What attention makes of the stream.
PROJECTED_HEADS: tuple[Component, ...] = ("query_heads", "key_heads", "value_heads")
# Heads that several query heads share; there are as many as `ModelInfo.shared_heads` says.
SHARED_HEADS: tuple[Component, ...] = ("key_heads", "value_heads")


_ALIBI = (
    "its attention biases (ALiBi) count a token's place in the sequence; packed answers stand at another place than "
    "their position says"
)


_BIASED = "its convolutions carry their bias over from padding, so that prompts cannot be continued side by side"


class Hook(NamedTuple):
    """Where a component's tensor passes: a module of the block, its input or output, and which item of a tuple."""

    path: str
    side: Literal["input", "output"] = "output"
    item: int | None = None


class Columns(NamedTuple):
    """What a component has of a tensor that holds others too: some neighbouring columns of each of its equal groups."""

    groups: int
    """The tensor's columns are so many groups."""
    stride: int
    """Columns of a group."""
    first: int
    """The component's first one in a group."""
    width: int
    """How many it has in a group."""


class Refusal(NamedTuple):
    """A setting of a family's configuration under which the model cannot be studied."""

    setting: str
    value: Any
    reason: str


class Mixture(NamedTuple):
    """Where a mixture of experts has its modules and says its sizes: paths in a block, names of settings.

    One module takes hidden states, the numbers of the chosen experts and their weights, and gives the weighted sum.
    """

    experts: str
    """How many routed experts a layer has; `num_experts_per_tok` of them run for a token."""
    width: str
    """Hidden width of one of them."""
    shared_width: str = ""
    """Hidden width of the expert that always runs; empty where there is none or `shared` counts them."""
    shared: str = ""
    """How many experts of `width` always run."""
    module: str = "mlp.experts"
    """The routed experts."""
    shared_module: str = ""
    """The expert that always runs; empty where there is none."""
    shared_gate: str = ""
    """Module whose sigmoid weights it; empty where nothing does."""
    dense_first: str = ""
    """How many of the first layers have one MLP in place of experts; empty for none."""
    dense_listed: bool = False
    """Whether those have one that `mlp_only_layers` lists and `decoder_sparse_step` steps over."""


@dataclass(frozen=True)
class Family:
    """Module names of one architecture, relative to the model (`blocks`) or to a block (the hooks)."""

    blocks: str
    """Path of the list of decoder layers."""
    attention_output: Hook
    """What attention adds to the residual stream, after a post-norm where the family has one."""
    mlp_output: Hook
    """What the MLP adds to the residual stream, after a post-norm where the family has one."""
    mlp_neurons: Hook | None
    """Input of the down-projection, `d_ff` wide; None for a mixture of experts, which has no such tensor."""
    attention_heads: Hook
    """Input of the attention's output projection, heads side by side."""
    query_heads: Hook | None
    """Where queries pass, heads side by side: before they are turned by their position, and before a norm of each head;
    after a norm that spans them all, so that a head that is swapped leaves the others as they are. None where a query
    is not as wide as what its head gives."""
    key_heads: Hook | None
    """Where keys pass, key/value heads side by side, in the same way. None where no module gives the keys of its own
    tokens alone."""
    value_heads: Hook | None
    """Where values pass, in the same way."""
    projection: Literal["apart", "joined", "grouped", "gated"] = "apart"
    """How the three stand in what their modules give: alone; all queries, keys, then values; the queries of each
    key/value head, its key, then its value; or alone but for a gate behind the query of each head."""
    embeddings: tuple[str, ...] = ("embed_tokens",)
    """Modules beside the list of layers whose outputs add up to what enters the first one, but for a factor."""
    layer_item: int | None = None
    """Which item of what a block returns is the stream; None where it returns nothing else."""
    gated: bool = True
    """Whether the MLP has a gate projection beside the up-projection."""
    windows: Literal["", "listed", "all"] = ""
    """Layers that attend in a sliding window where the configuration names one: none, those that its `layer_types`
    lists, or all of them (transformers gives the model one mask). What else a configuration says is not read."""
    multiplier: str = ""
    """Setting that both contributions are multiplied by after their modules; empty for none."""
    d_ff: str = "intermediate_size"
    """Setting with the MLP's hidden width; where it is absent or None, the width is four times the stream's."""
    d_head: str = "head_dim"
    """Setting with the width of a head's output; where it is absent or None, the heads share the stream's width."""
    kv_heads: str = "num_key_value_heads"
    """Setting with the number of key/value heads; where it is absent or None, there are as many as query heads."""
    mixer: Hook | None = None
    """What stands in attention's place in layers that `layer_types` does not call `full_attention`; None where all
    layers have softmax attention. It has no heads, and adds to the stream what `attention_output` is there."""
    mixture: Mixture | None = None
    """Where the sizes of a mixture of experts stand."""
    tower: str = ""
    """Setting that holds the text model's own configuration, for a wrapper around it; empty for a plain decoder."""
    refused: tuple[Refusal, ...] = ()
    """Settings under which it cannot be studied."""
    causal: bool = True
    """Whether transformers has a causal language model of it; else its class that takes images too is given none."""

    @property
    def wrapped(self) -> bool:
        """Whether the class that runs is the wrapper itself, with the text model inside; else it is the text model."""
        return bool(self.tower) and self.blocks.startswith("model.language_model.")

    def hook(self, component: Component) -> Hook | None:
        """The hook of a component, None where no module has it; `layer_output` is the block's own."""
        if component == "layer_output":
            return Hook("", "output", self.layer_item)
        if component in MIXTURE_COMPONENTS:
            return None
        found: Hook | None = getattr(self, component)
        return found

    def module(self, component: Component) -> str:
        """Path in a block of the module where a component passes; routing weights are an input of the experts."""
        hook = self.hook(component)
        if hook is not None or self.mixture is None:
            return hook.path if hook else ""
        return self.mixture.shared_module if component == "shared_expert_output" else self.mixture.module

    @property
    def embedding_paths(self) -> tuple[str, ...]:
        """Paths of the embeddings from the model."""
        around = self.blocks.rpartition(".")[0]
        return tuple(f"{around}.{name}" for name in self.embeddings)

    @property
    def hooks(self) -> dict[Component, Hook]:
        """The hooks of the components that are one module's input or output, in forward order."""
        modules = [component for component in FORWARD_ORDER if component not in MIXTURE_COMPONENTS]
        found = {component: self.hook(component) for component in modules}
        return {component: hook for component, hook in found.items() if hook is not None}

    @cached_property
    def components(self) -> tuple[Component, ...]:
        """What the family has, in forward order: the hooks' components and the parts of a mixture."""
        parts: set[Component] = set()
        if self.mixture is not None:
            parts = {"router", "expert_output", "expert_neurons"}
            parts |= {"shared_expert_output"} if self.mixture.shared_module else set()
        return tuple(component for component in FORWARD_ORDER if component in self.hooks or component in parts)


_LLAMA = Family(
    blocks="model.layers",
    attention_output=Hook("self_attn", "output", 0),
    mlp_output=Hook("mlp"),
    mlp_neurons=Hook("mlp.down_proj", "input"),
    attention_heads=Hook("self_attn.o_proj", "input"),
    query_heads=Hook("self_attn.q_proj"),
    key_heads=Hook("self_attn.k_proj"),
    value_heads=Hook("self_attn.v_proj"),
)
_UNGATED_LLAMA = replace(_LLAMA, gated=False)
_POST_NORM = replace(  # what reaches the stream has passed a norm of its own
    _LLAMA,
    attention_output=Hook("post_attention_layernorm"),
    mlp_output=Hook("post_feedforward_layernorm"),
)
_POST_NORM_KEYS = replace(  # one norm for the queries of all heads, and one for the keys
    _POST_NORM,
    query_heads=Hook("self_attn.q_norm"),
    key_heads=Hook("self_attn.k_norm"),
)
_MIXTRAL = replace(_LLAMA, mlp_neurons=None, mixture=Mixture("num_local_experts", "intermediate_size"))
_DEEPSEEK = replace(
    _MIXTRAL,
    query_heads=None,  # wider than what a head gives
    key_heads=None,  # every pass makes keys and values anew, of all tokens before too, from one vector per token
    value_heads=None,
    d_head="v_head_dim",
    mixture=Mixture(
        "n_routed_experts",
        "moe_intermediate_size",
        shared="n_shared_experts",
        shared_module="mlp.shared_experts",
        dense_first="first_k_dense_replace",
    ),
)
_QWEN_EXPERTS = Mixture(
    "num_experts",
    "moe_intermediate_size",
    shared_width="shared_expert_intermediate_size",
    shared_module="mlp.shared_expert",
    shared_gate="mlp.shared_expert_gate",
    dense_listed=True,
)
_QWEN_MOE = replace(_MIXTRAL, mixture=_QWEN_EXPERTS)
_QWEN_3_5 = replace(_LLAMA, projection="gated", mixer=Hook("linear_attn"))
_QWEN_3_5_MOE = replace(
    _QWEN_MOE, projection="gated", mixer=Hook("linear_attn"), mixture=_QWEN_EXPERTS._replace(dense_listed=False)
)
_LFM2 = Family(
    blocks="model.layers",
    attention_output=Hook("self_attn", "output", 0),
    mlp_output=Hook("feed_forward"),
    mlp_neurons=Hook("feed_forward.w2", "input"),
    attention_heads=Hook("self_attn.out_proj", "input"),
    query_heads=Hook("self_attn.q_proj"),
    key_heads=Hook("self_attn.k_proj"),
    value_heads=Hook("self_attn.v_proj"),
    mixer=Hook("conv"),
    refused=(Refusal("conv_bias", True, _BIASED),),
)
FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": replace(_LLAMA, windows="all"),
    "ministral": replace(_LLAMA, windows="listed"),
    "ministral3": replace(_LLAMA, windows="all"),
    "qwen2": replace(_LLAMA, windows="listed"),
    "qwen3": replace(_LLAMA, windows="listed"),
    "phi3": replace(
        _LLAMA,
        query_heads=Hook("self_attn.qkv_proj"),
        key_heads=Hook("self_attn.qkv_proj"),
        value_heads=Hook("self_attn.qkv_proj"),
        projection="joined",
        windows="all",
    ),
    "gemma": _LLAMA,
    "gemma2": replace(_POST_NORM, windows="listed"),
    "gemma3_text": replace(_POST_NORM, windows="listed"),
    "gemma3": replace(_POST_NORM, blocks="model.language_model.layers", tower="text_config", windows="listed"),
    "mistral3": replace(_LLAMA, blocks="model.language_model.layers", tower="text_config", windows="all", causal=False),
    "smollm3": replace(_LLAMA, windows="listed"),
    "olmo": _LLAMA,
    "olmo2": _POST_NORM_KEYS,
    "olmo3": replace(_POST_NORM_KEYS, windows="listed"),
    "seed_oss": _LLAMA,
    "helium": _LLAMA,
    "ernie4_5": _LLAMA,
    "hunyuan_v1_dense": _LLAMA,
    "exaone4": replace(_POST_NORM, windows="listed"),
    "glm": _LLAMA,
    "glm4": replace(
        _LLAMA,
        attention_output=Hook("post_self_attn_layernorm"),
        mlp_output=Hook("post_mlp_layernorm"),
    ),
    "granite": replace(_LLAMA, multiplier="residual_multiplier"),
    "cohere": _LLAMA,
    "cohere2": replace(_LLAMA, windows="listed"),
    "stablelm": _LLAMA,
    "arcee": _UNGATED_LLAMA,
    "nemotron": _UNGATED_LLAMA,
    "apertus": _UNGATED_LLAMA,
    "phi": replace(
        _UNGATED_LLAMA,
        mlp_neurons=Hook("mlp.fc2", "input"),
        attention_heads=Hook("self_attn.dense", "input"),
    ),
    "gpt2": Family(
        blocks="transformer.h",
        embeddings=("wte", "wpe"),
        attention_output=Hook("attn", "output", 0),
        mlp_output=Hook("mlp"),
        mlp_neurons=Hook("mlp.c_proj", "input"),
        attention_heads=Hook("attn.c_proj", "input"),
        query_heads=Hook("attn.c_attn"),
        key_heads=Hook("attn.c_attn"),
        value_heads=Hook("attn.c_attn"),
        projection="joined",
        gated=False,
        d_ff="n_inner",
    ),
    "gptj": Family(
        blocks="transformer.h",
        embeddings=("wte",),
        attention_output=Hook("attn", "output", 0),
        mlp_output=Hook("mlp"),
        mlp_neurons=Hook("mlp.fc_out", "input"),
        attention_heads=Hook("attn.out_proj", "input"),
        query_heads=Hook("attn.q_proj"),
        key_heads=Hook("attn.k_proj"),
        value_heads=Hook("attn.v_proj"),
        layer_item=0,
        gated=False,
        d_ff="n_inner",
    ),
    "gpt_neox": Family(
        blocks="gpt_neox.layers",
        embeddings=("embed_in",),
        attention_output=Hook("attention", "output", 0),
        mlp_output=Hook("mlp"),
        mlp_neurons=Hook("mlp.dense_4h_to_h", "input"),
        attention_heads=Hook("attention.dense", "input"),
        query_heads=Hook("attention.query_key_value"),
        key_heads=Hook("attention.query_key_value"),
        value_heads=Hook("attention.query_key_value"),
        projection="grouped",
        gated=False,
    ),
    "falcon": Family(
        blocks="transformer.h",
        embeddings=("word_embeddings",),
        attention_output=Hook("self_attention", "output", 0),
        mlp_output=Hook("mlp"),
        mlp_neurons=Hook("mlp.dense_4h_to_h", "input"),
        attention_heads=Hook("self_attention.dense", "input"),
        query_heads=Hook("self_attention.query_key_value"),
        key_heads=Hook("self_attention.query_key_value"),
        value_heads=Hook("self_attention.query_key_value"),
        projection="grouped",
        layer_item=0,
        gated=False,
        d_ff="ffn_hidden_size",
        kv_heads="num_kv_heads",
        refused=(Refusal("alibi", True, _ALIBI),),
    ),
    "lfm2": _LFM2,
    "lfm2_moe": replace(
        _LFM2,
        mlp_neurons=None,
        mixture=Mixture(
            "num_experts",
            "moe_intermediate_size",
            module="feed_forward.experts",
            dense_first="num_dense_layers",
        ),
    ),
    "qwen3_5_text": _QWEN_3_5,
    "qwen3_5": replace(_QWEN_3_5, tower="text_config"),
    "mixtral": replace(_MIXTRAL, windows="all"),
    "phimoe": replace(_MIXTRAL, windows="all"),
    "gpt_oss": replace(_MIXTRAL, windows="listed", mlp_output=Hook("mlp", "output", 0)),
    "olmoe": replace(
        _MIXTRAL,
        query_heads=Hook("self_attn.q_norm"),
        key_heads=Hook("self_attn.k_norm"),
        mixture=Mixture("num_experts", "intermediate_size"),
    ),
    "qwen2_moe": replace(_QWEN_MOE, windows="listed"),
    "qwen3_moe": replace(
        _MIXTRAL,
        windows="all",
        mixture=Mixture("num_experts", "moe_intermediate_size", dense_listed=True),
    ),
    "qwen3_next": replace(_QWEN_MOE, projection="gated", mixer=Hook("linear_attn")),
    "qwen3_5_moe_text": _QWEN_3_5_MOE,
    "qwen3_5_moe": replace(_QWEN_3_5_MOE, tower="text_config"),
    "granitemoe": replace(
        _MIXTRAL,
        mlp_output=Hook("block_sparse_moe"),
        multiplier="residual_multiplier",
        mixture=Mixture("num_local_experts", "intermediate_size", module="block_sparse_moe.experts"),
    ),
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": _DEEPSEEK,
}
_GEMMA4 = (
    "its blocks rescale the stream by a number that stands in the weights, its layers have heads of unequal width, and "
    "its smaller models add a third contribution and share the keys and values of lower layers"
)
_LLAMA4 = (
    "its mixtures run on the tokens of all rows in one line and give a tensor in which rows and tokens are not apart, "
    "and weight what goes into an expert in place of what comes out of it"
)
_PARALLEL = (
    "its layers add a state-space model's output beside attention's, a third contribution, which no component here is"
)
# Decoders that were looked at and cannot be studied, and why.
NOT_COVERED: dict[str, str] = {
    "bloom": _ALIBI,
    "mpt": _ALIBI,
    "gpt_neo": (
        "its local layers cut their window out of a mask of their own, by the token's place in the sequence; packed "
        "answers stand at another place than their position says"
    ),
    "opt": (
        "its MLP runs on the tokens of all rows in one line, so that no tensor of it has rows and tokens apart; with "
        "post-norm (opt-350m) its blocks normalise the stream as well, which is then no sum"
    ),
    "gemma3n": "its blocks keep several streams that are predicted and corrected, and layers share keys and values",
    "gemma4": _GEMMA4,
    "gemma4_text": _GEMMA4,
    "llama4": _LLAMA4,
    "llama4_text": _LLAMA4,
    "falcon_h1": _PARALLEL,
}


def family_of(model_type: str) -> Family:
    """The table row of a configuration's `model_type`.

    Raises:
        SiteError: no row for it; the message says why, or which row to add.
    """
    if model_type in NOT_COVERED:
        raise SiteError(f"model family {model_type!r} cannot be studied: {NOT_COVERED[model_type]}")
    if model_type not in FAMILIES:
        raise SiteError(
            f"model family {model_type!r} is not in the table (known: {', '.join(sorted(FAMILIES))}); add a row "
            f"FAMILIES[{model_type!r}] = Family(blocks=..., attention_output=..., mlp_output=..., mlp_neurons=..., "
            "attention_heads=..., query_heads=..., key_heads=..., value_heads=...) to remote_mediation/sites.py"
        )
    return FAMILIES[model_type]


def _lacking(component: Component, family: str) -> str:
    """Why a family has no such component, and what it has."""
    if component == "mlp_neurons":
        return (
            f"a layer of a mixture of experts ({family}) has no one MLP whose neurons could be named; study "
            "layer_output, attention_output, mlp_output, attention_heads, expert_output or expert_neurons"
        )
    if component == "query_heads":
        return f"a query of {family} is wider than what its head gives; study attention_heads"
    if component in SHARED_HEADS:
        return (
            f"attention of {family} makes the keys and values of all tokens anew in every pass, from one vector per "
            "token, so that no module gives those of some tokens alone; study attention_heads"
        )
    if FAMILIES[family].mixture is None:
        return f"{family} is no mixture of experts"
    return f"the layers of {family} have no expert that always runs"


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
    """Number of MLP neurons per layer; of a mixture of experts, those that run for a token."""
    heads: int
    """Number of attention (query) heads per layer."""
    kv_heads: int
    """Number of key/value heads per layer, as the cache holds them."""
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
    multiplier: float = 1.0
    """What a contribution is multiplied by after its module, on its way into the stream."""
    stored_ff: int = 0
    """Neurons per layer of all experts of a mixture together; 0 where all that is stored runs."""
    context: int = 0
    """Tokens of the longest sequence that the model was made for; 0 where its configuration does not say."""
    experts: int = 0
    """Routed experts of a layer of a mixture; 0 for a model without."""
    chosen: int = 0
    """Experts that a token is routed to."""
    expert_ff: int = 0
    """Neurons of one routed expert."""
    routed: tuple[int, ...] = ()
    """Layers of a mixture that have experts; the others have one MLP."""
    recurrent: tuple[int, ...] = ()
    """Layers without softmax attention, such as convolutions or linear attention."""
    kv_copies: int = 1
    """How often the cache holds each key/value head: once but where attention repeats them before it keeps them."""

    @property
    def shared_heads(self) -> int:
        """Key/value heads per layer that differ: units of `key_heads` and `value_heads`."""
        return self.kv_heads // self.kv_copies

    @property
    def unfolded(self) -> bool:
        """Whether prompts and answers run as whole sequences of their own, as layers without softmax attention need."""
        return bool(self.recurrent)

    def layers_with(self, component: Component) -> tuple[int, ...]:
        """Layers that have a component."""
        if component in MIXTURE_COMPONENTS:
            return self.routed
        lacking = self.recurrent if component in HEAD_COMPONENTS else ()
        return tuple(layer for layer in range(self.layers) if layer not in lacking)

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> ModelInfo:
        """A shape that was kept as JSON.

        Raises:
            ValueError: it is none.
        """
        return of_kind(TypeAdapter(cls), record)

    def width(self, component: Component) -> int:
        """Units of a component: heads, experts, neurons of all experts, the one shared expert, or the others' width.

        Raises:
            SiteError: the family has no such component.
        """
        self._refuse_lacking(component)
        counts: dict[Component, int] = {"mlp_neurons": self.d_ff}
        counts |= dict.fromkeys(("attention_heads", "query_heads"), self.heads)
        counts |= dict.fromkeys(SHARED_HEADS, self.shared_heads)
        counts |= {"router": self.experts, "expert_output": self.experts, "shared_expert_output": 1}
        counts |= {"expert_neurons": self.experts * self.expert_ff}
        return counts.get(component, self.d_model)

    def _refuse_lacking(self, component: Component) -> None:
        if not self.has(component):
            raise SiteError(f"{self.name} has no {component}: {_lacking(component, self.family)}")

    def has(self, component: Component) -> bool:
        """Whether the family has such a component."""
        return component in family_of(self.family).components

    def tensor_width(self, component: Component) -> int:
        """Numbers that a component has at one token, all units together."""
        if component in ("expert_output", "shared_expert_output"):
            return self.d_model
        return self.width(component) * (self.d_head if component in HEAD_COMPONENTS else 1)

    def columns_within(self, component: Component) -> Columns | None:
        """Where queries, keys or values stand in what one module gives with others; None for what stands alone."""
        projection = family_of(self.family).projection
        if component == "query_heads" and projection == "gated":
            return Columns(self.heads, 2 * self.d_head, 0, self.d_head)
        if component not in PROJECTED_HEADS or projection not in ("joined", "grouped"):
            return None
        groups = self.shared_heads if projection == "grouped" else 1
        queries, keys = (heads * self.d_head // groups for heads in (self.heads, self.shared_heads))
        first = {"query_heads": 0, "key_heads": queries, "value_heads": queries + keys}[component]
        return Columns(groups, queries + 2 * keys, first, queries if component == "query_heads" else keys)

    def vector_width(self, component: Component, units: tuple[int, ...]) -> int:
        """Numbers that units of a component (all if none are named) have at one token; experts add up to one vector."""
        if component in ("expert_output", "shared_expert_output"):
            return self.tensor_width(component)
        return len(self.columns(component, units)) or self.tensor_width(component)

    def columns(self, component: Component, units: tuple[int, ...]) -> tuple[int, ...]:
        """Tensor columns of units: a head is `d_head` columns, every other unit is one; an expert is its number."""
        self._refuse_lacking(component)
        if component not in HEAD_COMPONENTS:
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
    """Neurons, heads or experts, ascending; empty for the whole tensor."""


def refuse_absent(site: Site, info: ModelInfo) -> None:
    """Refuse a part of a mixture in a layer that has one MLP, and heads in a layer without softmax attention.

    Raises:
        SiteError: with the layers that have it.
    """
    if site.component not in (*HEAD_COMPONENTS, *MIXTURE_COMPONENTS):
        return
    there = info.layers_with(site.component)
    if site.layer not in there and 0 <= site.layer < info.layers:
        why = "no softmax attention" if site.component in HEAD_COMPONENTS else "one MLP"
        raise SiteError(
            f"layer {site.layer} of {info.name} has no {site.component}: it has {why}; layers that have it are "
            f"{', '.join(map(str, there))}"
        )


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
    refuse_absent(site, info)
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
