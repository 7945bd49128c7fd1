"""Subjects of the engine's tests: tiny models of the real transformers classes, random but seeded, saved to a folder.

Weights are large enough for effects of the order of 1, so that a test of an effect can fail.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from oracle import HYBRIDS, KINDS, VOCAB, Subject
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from remote_mediation.engine.local import LocalBackend
from remote_mediation.fetch import located

LAYERS, WINDOW = 3, 6
WORDS = (
    "<pad> <s> </s> <unk> <user> <assistant> <end> how do i a the to steal wash fix burn my your old car bank bike "
    "house near school in at night day quickly please tell me write story about sure sorry yes no cannot here is way "
    "take ride wreck paint rob rent flood clean"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<user> {{ message['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)

# Models whose tests are quick: one of each kind of block, of mixtures and of hybrids.
QUICK = {*KINDS, *HYBRIDS, "mixtral", "qwen2_moe", "gpt_oss", "llama_chat"}

_SHAPE = {"hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "intermediate_size": 40}
_GQA = {**_SHAPE, "num_key_value_heads": 2}
_WIDE_HEADS = {**_GQA, "head_dim": 12}  # side by side the heads are wider than the residual stream
_GEMMA = {**_WIDE_HEADS, "query_pre_attn_scalar": 12}
_GEMMA2 = {**_GEMMA, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 6.0}  # low enough to bend these logits
_QWEN_WINDOW = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
_GEMMA_WINDOW = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": WINDOW}
_ALTERNATING = {"layer_types": _GEMMA_WINDOW["layer_types"]}
_TOKENS = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_ROUTED = {"num_experts_per_tok": 2}
_LATENT = {  # keys and values from one compressed vector; the first layer has one MLP, the others experts
    **_SHAPE,
    **_ROUTED,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 24,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 2,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
}
_CONVOLVED = {  # a convolution in one layer of three; of 60 neurons the class makes 40
    "layer_types": ["full_attention", "conv", "full_attention"],
    "block_multiple_of": 8,
}
_LINEAR = {  # linear attention in one layer of three
    "layer_types": ["full_attention", "linear_attention", "full_attention"],
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
_SHARED_EXPERT = {
    **_ROUTED,
    "num_experts": 4,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 20,
}
_GPT2 = {"n_embd": 32, "n_layer": LAYERS, "n_head": 4}
_EYE = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}  # an image tower, which no test looks into
_QWEN_EYE = {**_EYE, "depth": 1, "num_heads": 1, "out_hidden_size": _SHAPE["hidden_size"], "num_position_embeddings": 4}

# By name: `model_type` and configuration. The seed of each is its place here: a new one goes to the end.
SUBJECTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _WIDE_HEADS),
    "llama_chat": ("llama", {**_GQA, "tie_word_embeddings": True}),
    "mistral": ("mistral", _WIDE_HEADS),
    "mistral_window": ("mistral", {**_WIDE_HEADS, "sliding_window": WINDOW}),
    "qwen2": ("qwen2", _GQA),
    "qwen2_window": ("qwen2", {**_GQA, **_QWEN_WINDOW}),
    "qwen3": ("qwen3", _WIDE_HEADS),
    "qwen3_window": ("qwen3", {**_WIDE_HEADS, **_QWEN_WINDOW}),
    "phi3": ("phi3", _GQA),
    # The list is not read by transformers: every layer of phi3 slides.
    "phi3_window": ("phi3", {**_GQA, "sliding_window": WINDOW, "layer_types": ["full_attention"] * LAYERS}),
    "gemma2": ("gemma2", _GEMMA2),
    "gemma2_window": ("gemma2", {**_GEMMA2, **_GEMMA_WINDOW}),
    "gemma3_text": ("gemma3_text", _GEMMA),
    "gemma3_text_window": ("gemma3_text", {**_GEMMA, **_GEMMA_WINDOW}),
    "gpt2": ("gpt2", _GPT2),
    "gpt2_narrow": ("gpt2", {**_GPT2, "n_inner": 40}),
    "gpt_neox": ("gpt_neox", {**_SHAPE, "use_parallel_residual": True}),
    "gpt_neox_sequential": ("gpt_neox", {**_SHAPE, "use_parallel_residual": False}),
    **{name: (name, _WIDE_HEADS) for name in ("gemma", "ministral3", "seed_oss", "ernie4_5", "arcee", "glm4")},
    **{name: (name, _GQA) for name in ("olmo", "olmo2", "apertus", "stablelm", "phi")},
    **{name: (name, _WIDE_HEADS) for name in ("nemotron", "hunyuan_v1_dense", "exaone4", "smollm3", "glm")},
    "helium": ("helium", {**_GQA, "head_dim": 8}),
    "olmo3": ("olmo3", {**_GQA, "sliding_window": WINDOW, **_ALTERNATING}),
    "ministral": ("ministral", {**_WIDE_HEADS, "sliding_window": WINDOW, **_ALTERNATING}),
    "cohere": ("cohere", {**_GQA, "logit_scale": 0.5}),
    "cohere2": ("cohere2", {**_WIDE_HEADS, "logit_scale": 0.5, "sliding_window": WINDOW, **_ALTERNATING}),
    "exaone4_window": ("exaone4", {**_WIDE_HEADS, "sliding_window": WINDOW, **_ALTERNATING}),
    "stablelm_parallel": ("stablelm", {**_GQA, "use_parallel_residual": True, "qk_layernorm": True}),
    "granite": ("granite", {**_GQA, "residual_multiplier": 0.6, "logits_scaling": 2.0}),
    "gptj": ("gptj", {**_GPT2, "rotary_dim": 4}),
    "falcon": ("falcon", {**_SHAPE, "ffn_hidden_size": 40}),
    "falcon_sequential": ("falcon", {**_SHAPE, "parallel_attn": False, "multi_query": False, "bias": True}),
    "falcon_new": ("falcon", {**_SHAPE, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "gemma3": (
        "gemma3",
        {
            "text_config": {**_GEMMA, **_GEMMA_WINDOW, **_TOKENS},
            "vision_config": {
                "hidden_size": 8,
                "intermediate_size": 8,
                "num_hidden_layers": 1,
                "num_attention_heads": 1,
            },
        },
    ),
    "mixtral": ("mixtral", {**_WIDE_HEADS, **_ROUTED, "num_local_experts": 4}),
    "mixtral_chat": ("mixtral", {**_WIDE_HEADS, **_ROUTED, "num_local_experts": 4}),
    "phimoe": ("phimoe", {**_GQA, **_ROUTED, "num_local_experts": 4}),
    "gpt_oss": ("gpt_oss", {**_WIDE_HEADS, **_ROUTED, "num_local_experts": 4, "sliding_window": WINDOW}),
    "olmoe": ("olmoe", {**_GQA, **_ROUTED, "num_experts": 4}),
    "qwen2_moe": (
        "qwen2_moe",
        {**_GQA, **_ROUTED, "num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 20},
    ),
    "qwen3_moe": ("qwen3_moe", {**_WIDE_HEADS, **_ROUTED, "num_experts": 4, "moe_intermediate_size": 24}),
    "granitemoe": ("granitemoe", {**_GQA, **_ROUTED, "num_local_experts": 4, "residual_multiplier": 0.22}),
    "deepseek_v2": ("deepseek_v2", {**_LATENT, "topk_method": "greedy"}),
    "deepseek_v3": ("deepseek_v3", _LATENT),
    "ministral3_window": ("ministral3", {**_WIDE_HEADS, "sliding_window": WINDOW}),
    "smollm3_window": (
        "smollm3",
        {**_WIDE_HEADS, "use_sliding_window": True, "sliding_window": WINDOW, "no_rope_layer_interval": 2},
    ),
    "mixtral_window": ("mixtral", {**_WIDE_HEADS, **_ROUTED, "num_local_experts": 4, "sliding_window": WINDOW}),
    "phimoe_window": ("phimoe", {**_GQA, **_ROUTED, "num_local_experts": 4, "sliding_window": WINDOW}),
    "qwen2_moe_window": (
        "qwen2_moe",
        {**_GQA, **_ROUTED, **_QWEN_WINDOW, "num_experts": 4, "moe_intermediate_size": 24, "max_window_layers": 3},
    ),
    "qwen3_moe_window": (
        "qwen3_moe",
        {**_WIDE_HEADS, **_ROUTED, **_QWEN_WINDOW, "num_experts": 4, "moe_intermediate_size": 24},
    ),
    "qwen2_moe_chat": (
        "qwen2_moe",
        {**_GQA, **_ROUTED, "num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 20},
    ),
    "lfm2": ("lfm2", {**_GQA, **_CONVOLVED, "intermediate_size": 60}),
    "qwen3_5_text": ("qwen3_5_text", {**_WIDE_HEADS, **_LINEAR}),
    "qwen3_next": (
        "qwen3_next",
        {
            **_WIDE_HEADS,
            **_ROUTED,
            **_LINEAR,
            "num_experts": 4,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 20,
        },
    ),
    "lfm2_chat": ("lfm2", {**_GQA, **_CONVOLVED, "intermediate_size": 60}),
    "qwen3_5_moe_text": (
        "qwen3_5_moe_text",
        {
            **_WIDE_HEADS,
            **_ROUTED,
            **_LINEAR,
            "num_experts": 4,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 20,
        },
    ),
    "lfm2_moe": (
        "lfm2_moe",
        {**_GQA, **_ROUTED, **_CONVOLVED, "num_experts": 4, "moe_intermediate_size": 24, "num_dense_layers": 1},
    ),
    "mistral3": (
        "mistral3",
        {
            "text_config": {"model_type": "mistral", **_WIDE_HEADS, **_TOKENS},
            "vision_config": {"model_type": "pixtral", **_EYE, "head_dim": 8, "num_hidden_layers": 1},
            "tie_word_embeddings": False,
        },
    ),
    "qwen3_5": ("qwen3_5", {"text_config": {**_WIDE_HEADS, **_LINEAR, **_TOKENS}, "vision_config": _QWEN_EYE}),
    "qwen3_5_moe": (
        "qwen3_5_moe",
        {"text_config": {**_WIDE_HEADS, **_LINEAR, **_TOKENS, **_SHARED_EXPERT}, "vision_config": _QWEN_EYE},
    ),
}


def pytest_configure() -> None:
    """One thread: the tensors are too small to share out."""
    torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a test that is repeated for every model the quick ones are those of `QUICK`."""
    slow = SUBJECTS.keys() - QUICK
    for item in items:
        parameters = (
            item.callspec.params.values() if isinstance(item, pytest.Function) and hasattr(item, "callspec") else ()
        )
        if any(isinstance(value, str) and value in slow for value in parameters):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Subject]:
    """Subjects by name (a key of `SUBJECTS`), each made once."""
    made: dict[str, Subject] = {}

    def get(name: str) -> Subject:
        if name not in made:
            made[name] = make_subject(name, tmp_path_factory.mktemp(name))
        return made[name]

    return get


@pytest.fixture(scope="session")
def smollm2() -> Subject:
    """SmolLM2-135M-Instruct, from the folder that the environment names, or else from the package's model cache."""
    folder = Path(os.environ.get("REMOTE_MEDIATION_SMOLLM2") or located("HuggingFaceTB/SmolLM2-135M-Instruct"))
    if not (folder / "config.json").is_file():
        pytest.skip(
            "run `remote-mediation fetch-model smollm2`, or name the model's folder in REMOTE_MEDIATION_SMOLLM2"
        )
    return _load(folder)


def make_subject(name: str, folder: Path) -> Subject:
    """A subject by name (a key of `SUBJECTS`), its files in an empty folder."""
    _tiny_model(*SUBJECTS[name], seed=list(SUBJECTS).index(name)).save_pretrained(folder)
    _tiny_tokenizer(chat=name.endswith("chat")).save_pretrained(folder)
    return _load(folder)


def _load(folder: Path) -> Subject:
    found = AutoConfig.from_pretrained(folder)
    auto = AutoModelForImageTextToText if found.model_type == "mistral3" else AutoModelForCausalLM
    plain = auto.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return Subject(LocalBackend.load(str(folder)), plain.eval())


def _tiny_model(family: str, settings: dict[str, Any], seed: int) -> PreTrainedModel:
    """Matrices have standard deviation 0.3; biases and norms are moved as far off the 0 and 1 they start from.

    A wrapper is whole, with its image tower, as its checkpoints are.
    """
    auto = AutoModelForImageTextToText if "vision_config" in settings else AutoModelForCausalLM
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # gpt_oss draws its attention sinks, to which noise is added below
        model = auto.from_config(AutoConfig.for_model(family, **_TOKENS, **settings)).float()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.empty(weight.shape).normal_(0, 0.3, generator=generator)
            weight.copy_(weight + noise if weight.dim() == 1 else noise)
        if not model.config.tie_word_embeddings:
            model.get_input_embeddings().weight.mul_(3)
    return model


def _tiny_tokenizer(chat: bool) -> PreTrainedTokenizerFast:
    """A real fast tokenizer, one token per known word."""
    words = WORDS.split()
    words += [f"word{number}" for number in range(VOCAB - len(words))]
    model = tokenizers.models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    if chat:
        fast.chat_template = CHAT_TEMPLATE
    return fast


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one page, which is taken."""
    folder = tmp_path / "full"
    folder.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    if sys.platform != "linux" or libc.mount(b"tmpfs", bytes(folder), b"tmpfs", 0, b"size=4k"):
        pytest.skip("needs the right to mount a small file system")
    try:
        (folder / "filler").write_bytes(bytes(4096))
        yield folder
    finally:
        libc.umount2(bytes(folder), 2)
