"""A model's weights in memory: all of them, in the precision that was asked for, on the devices that were asked for.

transformers fills missing weights at random, leaves out those it has no place for, and takes a checkpoint's own way of
quantising before another's; here each of these is an error.
"""

from __future__ import annotations

import contextlib
import re
import tempfile
import weakref
from pathlib import Path
from typing import Any, get_args

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel

from remote_mediation.engine.copies import in_two_shards, other_copy
from remote_mediation.engine.stored import MASKS, refusable_codes
from remote_mediation.errors import ModelError
from remote_mediation.fetch import located
from remote_mediation.loading import DISK, Attention, Loading
from remote_mediation.models import class_of, folder_at_hand, load_configuration
from remote_mediation.sites import ModelInfo

# A parameter of a layer; the group is what stands before the layer's number.
_LAYER = re.compile(r"(.*?)\.\d+\.")


def load_weights(info: ModelInfo, dtype: str, device: str, loading: Loading) -> PreTrainedModel:
    """A model from a local folder or the hub, on one device or shared out.

    device: of a model that is not shared out.

    Raises:
        ModelError: its files lack weights, hold others or hold two models, or it cannot be had as it was asked for.
        Exception: whatever a checkpoint's files make transformers raise.
    """
    with contextlib.ExitStack() as until_unused:
        # Weights on the disk that no file has as they are used, such as all experts in one tensor.
        rest = until_unused.enter_context(tempfile.TemporaryDirectory(prefix="remote-mediation-"))
        model, found = class_of(info.family).from_pretrained(
            located(info.name),
            revision=info.revision or "main",
            dtype=getattr(torch, dtype),
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            offload_folder=rest,
            device_map=loading.device_map() if loading.shared_out else {"": device},
            **_asked(loading, dtype),
        )
        weakref.finalize(model, until_unused.pop_all().close)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # Else bitsandbytes rounds scales to bfloat16 where a CPU multiplies in it, whatever was asked for.
            module.support_avx512bf16_for_cpu = False
    as_stored = bool(quantisation_of(model)) and not loading.quantization
    _refuse_other_weights(info.name, model, found, as_stored)
    _refuse_codes(info, model, found)
    _refuse_other_ways(info.name, model, loading)
    return model


def quantisation_of(model: Any) -> str:
    """How a model's linear layers are quantised: `nf4`, `int8` or what its configuration calls it; empty for not."""
    settings = getattr(model.config, "quantization_config", None)
    if settings is None:
        return ""
    named = settings if isinstance(settings, dict) else settings.to_dict()
    if named.get("load_in_4bit"):
        return str(named["bnb_4bit_quant_type"])
    if named.get("load_in_8bit"):
        return "int8"
    return str(getattr(named.get("quant_method"), "value", named.get("quant_method")))


def _asked(loading: Loading, dtype: str) -> dict[str, Any]:
    """Arguments for what was asked for; transformers chooses the rest."""
    arguments: dict[str, Any] = {}
    if loading.max_memory:
        arguments["max_memory"] = dict(loading.max_memory)
    if loading.attention:
        arguments["attn_implementation"] = loading.attention
    if loading.quantization == "nf4":
        arguments["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=getattr(torch, dtype)
        )
    elif loading.quantization == "int8":
        arguments["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    return arguments


def _refuse_other_weights(name: str, model: PreTrainedModel, found: dict[str, Any], quantised: bool) -> None:
    """Refuse files without some of the parameters or with other shapes, and with others in modules that the model has.

    Tied ones need not be there, and heads or towers beside the layers may be. quantised: the files are; what they have
    beside weights is left to those who read it.
    """
    if missing := sorted(found["missing_keys"]):
        raise ModelError(
            f"cannot load {name!r}: its files lack {_named(missing)}, which would be random; give the folder of "
            "the whole language model"
        )
    for key, stored, expected in sorted(found["mismatched_keys"]):
        raise ModelError(
            f"cannot load {name!r}: its files hold {key} as {list(stored)}, and its config.json asks for "
            f"{list(expected)}; give the config.json of these weights"
        )
    modules = _with_parameters(model)
    unread = [
        key
        for key in sorted(found["unexpected_keys"])
        if not modules.isdisjoint(_above(key)) and not (key.endswith(MASKS) or quantised)
    ]
    if unread:
        raise ModelError(
            f"cannot load {name!r}: its files hold {_named(unread)}, for which its config.json has no place, so "
            "that another model would run; give the config.json of these weights, or merge adapters"
        )
    if other := other_copy(Path(located(name))):
        raise ModelError(
            f"cannot load {name!r}: it holds two models, {other} is not what its safetensors have, which would be "
            "read; take one of the two copies away"
        )
    if other := in_two_shards(Path(located(name))):
        raise ModelError(f"cannot load {name!r}: {other}; take out the one that does not belong to these weights")


def _refuse_codes(info: ModelInfo, model: PreTrainedModel, found: dict[str, Any]) -> None:
    """Refuse weights that were quantised where the checkpoint does not say so: their codes would be their values."""
    folder = folder_at_hand(info.name, info.revision)
    if folder is None or getattr(load_configuration(info.name, info.revision), "quantization_config", None):
        return
    if codes := refusable_codes(folder, model, found["unexpected_keys"]):
        raise ModelError(
            f"cannot load {info.name!r}: its files hold {codes}, and its config.json has no quantization_config that "
            "says what these codes stand for; give the config.json of these weights, or weights that are not quantised"
        )


def _with_parameters(model: PreTrainedModel) -> set[str]:
    """Names of modules that hold parameters themselves, and of what stands before the layers' numbers."""
    own = {name for name, module in model.named_modules() if next(module.parameters(recurse=False), None) is not None}
    layers = {match[1] for key in model.state_dict() if (match := _LAYER.match(key))}
    return (own | layers) - {""}


def _above(key: str) -> list[str]:
    """Names of all modules that a parameter of this name would lie in."""
    parts = key.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]


def _refuse_other_ways(name: str, model: PreTrainedModel, loading: Loading) -> None:
    """Refuse a model that came in another way than was asked for."""
    found = {"quantization": quantisation_of(model), "attention": model.config._attn_implementation}
    for setting, value in found.items():
        if (asked := getattr(loading, setting)) and asked != value:
            raise ModelError(f"cannot load {name!r} with {setting} {asked}: it came with {value or 'none'}")
    if (attention := found["attention"] or "") not in get_args(Attention):
        raise ModelError(
            f"cannot load {name!r}: its config.json asks for the attention {attention!r}, which takes no masks such as "
            "ours; set [load] attention to 'eager' or 'sdpa'"
        )
    first, parameter = next(iter(model.named_parameters()))
    if parameter.is_meta:
        raise ModelError(
            f"cannot load {name!r}: {first} is on the {DISK} or moved there from the CPU, and its device is where "
            "prompts begin; put it on a device, or give that device more of max_memory"
        )


def _named(names: list[str]) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
