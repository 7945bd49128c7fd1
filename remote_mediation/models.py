"""What can be known of a model without its weights: its shape (`ModelInfo`) and its tokenizer."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from remote_mediation.digests import content
from remote_mediation.errors import ModelError, SiteError, innermost, let_stop
from remote_mediation.fetch import located
from remote_mediation.prompts import PLAIN, PromptForm, end_of_turn
from remote_mediation.sites import Family, ModelInfo, family_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

# Files of a model that may say which tokens end an answer.
_DECLARING = ("generation_config.json", "config.json")
# Files of a processor that may have the chat template which the tokenizer lacks.
_PROCESSORS = ("chat_template.json", "processor_config.json")
# Settings that say for how long a sequence a model was made.
_LENGTHS = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len")
# How a file begins that stands for one which git has not fetched.
_POINTER = b"version https://git-lfs"
# Files of a model's folder that change what it computes or what it is fed.
_TELLING = {".safetensors", ".bin", ".pt", ".pth", ".json", ".model", ".jinja", ".txt", ".py", ".tiktoken"}
# Those of them that hold weights.
_WEIGHTS = (".safetensors", ".bin")


def load_info(name: str, revision: str = "") -> ModelInfo:
    """Read a model's configuration from a local folder or the hub.

    Raises:
        ModelError: no such model, or no way to reach the hub.
        SiteError: the model's family is not in the table.
    """
    info = info_of(load_configuration(name, revision), name, revision)
    _bring_generation_config(name, revision)
    return replace(info, weights=fingerprint(name))


def _bring_generation_config(name: str, revision: str) -> None:
    """Have what a hub's model declares of generation in the cache; many have no such file."""
    from transformers import GenerationConfig

    if not Path(located(name)).is_dir():
        with contextlib.suppress(OSError, ValueError):
            GenerationConfig.from_pretrained(name, revision=revision or "main")


def refuse_pointers(name: str) -> None:
    """Refuse a local folder in which files of the model are stand-ins of git-LFS.

    Raises:
        ModelError: with the name of one.
    """
    folder = Path(located(name))
    small = [path for path in _telling_files(folder) if path.stat().st_size < 1024]
    for path in small:
        if path.read_bytes().startswith(_POINTER):
            raise ModelError(f"cannot load model {name!r}: {path.name} is a git-LFS pointer; run `git lfs pull` in it")


def refuse_adapter(name: str) -> None:
    """Refuse a local folder of a PEFT adapter: transformers would take the base model that it names from elsewhere.

    Raises:
        ModelError: with what to do instead.
    """
    if (Path(located(name)) / "adapter_config.json").is_file():
        raise ModelError(
            f"{name!r} is a PEFT adapter and no whole model; merge it into its base (`merge_and_unload`), or study the "
            "base and name the adapter under [attacks] checkpoints"
        )


def _telling_files(folder: Path) -> list[Path]:
    """Files of a local folder that make a model what it is; none of a hub id."""
    files = {*folder.glob("*"), *folder.glob("additional_chat_templates/*"), *_shards(folder)}
    return sorted(path for path in files if path.suffix in _TELLING and path.is_file())


def _shards(folder: Path) -> list[Path]:
    """Weights that an index of a local folder names, which may lie in folders of it; none where it cannot be read."""
    found: list[Path] = []
    for index in folder.glob("*.index.json"):
        with contextlib.suppress(OSError, ValueError, KeyError, AttributeError, TypeError):
            found += [folder / name for name in set(json.loads(index.read_text("utf-8"))["weight_map"].values())]
    return found


def load_configuration(name: str, revision: str = "") -> PreTrainedConfig:
    """A model's transformers configuration, from a local folder or the hub.

    Raises:
        ModelError: no such model, no way to reach the hub, or it says two things.
    """
    from transformers import AutoConfig

    config: PreTrainedConfig = _load(AutoConfig, name, revision)
    _refuse_two_ropes(name, revision)
    return config


def _refuse_two_ropes(name: str, revision: str) -> None:
    """Refuse a configuration that has the older and the newer settings of rotary embeddings, and not alike.

    Of those that makers tell to add for long contexts, under the older name, transformers 5 takes all, and the default
    frequency; of an older frequency beside the newer settings it takes none (`RotaryEmbeddingConfigMixin`).
    """
    path = _at_hand(name, revision, "config.json")
    whole = json.loads(path.read_text("utf-8")) if path else {}
    for part in (whole, whole.get("text_config") or {}):
        newer, older, theta = (part.get(key) for key in ("rope_parameters", "rope_scaling", "rope_theta"))
        other = "rope_scaling" if newer and older and older != newer else ""
        if newer and theta is not None and newer.get("rope_theta", theta) != theta:
            other = "rope_theta"
        if other:
            raise ModelError(
                f"the config.json of {name!r} has {other} {part[other]} beside rope_parameters {newer}, and both do "
                "not hold; write into rope_parameters what is meant, and take the other out"
            )


def class_of(model_type: str) -> Any:
    """What of transformers builds and loads a family's models."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForCausalLM if family_of(model_type).causal else AutoModelForImageTextToText


def load_tokenizer(name: str, revision: str = "") -> PreTrainedTokenizerBase:
    """Load a model's tokenizer from a local folder or the hub.

    Raises:
        ModelError: no such model, or no way to reach the hub.
    """
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = _load(AutoTokenizer, name, revision)
    if not tokenizer.chat_template:
        tokenizer.chat_template = _template_of_processor(name, revision)
    return tokenizer


def _template_of_processor(name: str, revision: str) -> Any:
    """The chat template that stands in the files of a processor, as some models that take images have it, or none."""
    for file in _PROCESSORS:
        path = _at_hand(name, revision, file)
        try:
            found = json.loads(path.read_text("utf-8")).get("chat_template") if path else None
        except (OSError, ValueError, AttributeError) as error:
            raise ModelError(f"cannot read {path}: {innermost(error)}; mend it or take it away") from error
        if found:
            return found
    return None


def ends_of_answers(
    name: str, revision: str, tokenizer: PreTrainedTokenizerBase, form: PromptForm = PLAIN
) -> list[int]:
    """Tokens that end an answer: the tokenizer's special ones, what the model's files at hand declare, the template's.

    No hub is asked: `load_info` has brought the files here, where the model comes from one.
    """
    marked = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    declared = {end for file in _DECLARING for end in _declared_ends(name, revision, file)}
    turn = end_of_turn(tokenizer, form)
    return sorted({*tokenizer.all_special_ids, *marked, *declared, *(() if turn is None else (turn,))})


def _declared_ends(name: str, revision: str, file: str) -> list[int]:
    """`eos_token_id` of a configuration file, of its language model too; none where there is no such file."""
    path = _at_hand(name, revision, file)
    if path is None:
        return []
    try:
        whole = json.loads(path.read_text("utf-8"))
        parts = (whole, whole.get("text_config") or {})
        declared = [part["eos_token_id"] for part in parts if part.get("eos_token_id") is not None]
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(f"cannot read {path}: {innermost(error)}; mend it or take it away") from error
    ends = [end for one in declared for end in (one if isinstance(one, list) else [one])]
    if not all(type(end) is int for end in ends):
        raise ModelError(f"{path} has eos_token_id {declared[0]!r}, which is no list of token ids; mend it")
    return ends


def _at_hand(name: str, revision: str, file: str) -> Path | None:
    """A file of a model in its folder or in the hub's cache on this machine; None where it is in neither."""
    from huggingface_hub import try_to_load_from_cache

    folder = Path(located(name))
    if folder.is_dir():
        return folder / file if (folder / file).is_file() else None
    try:
        found = try_to_load_from_cache(name, file, revision=revision or "main")
    except ValueError:  # no name that a hub could have
        return None
    return Path(found) if isinstance(found, str) else None


def folder_at_hand(name: str, revision: str = "") -> Path | None:
    """Where a whole model lies on this machine: a folder of its own, or in the hub's cache; None: nowhere."""
    folder = Path(located(name))
    if folder.is_dir():
        return folder
    config = _at_hand(name, revision, "config.json")
    return config.parent if config and weights_here(name, revision) else None


def why_no_hub(name: str, revision: str = "", seconds: float = 3.0) -> str:
    """Why a model cannot be had from a hub, which is waited for so long; empty where one has it."""
    from huggingface_hub import HfApi

    try:
        HfApi().model_info(name, revision=revision or None, timeout=seconds)
    except Exception as error:  # of several libraries
        return innermost(error)
    return ""


def info_of(config: PreTrainedConfig, name: str, revision: str = "") -> ModelInfo:
    """The shape of a model from its transformers configuration.

    Raises:
        SiteError: the model's family is not in the table, or it is no causal decoder.
    """
    family = family_of(config.model_type)
    text = getattr(config, family.tower) if family.tower else config
    _check(text, family, name)
    heads, d_model = text.num_attention_heads, text.hidden_size
    sliding, window = _sliding_layers(text, family)
    d_ff, stored_ff = _mlp_widths(text, family)
    return ModelInfo(
        name=name,
        revision=revision,
        family=config.model_type,
        layers=text.num_hidden_layers,
        d_model=d_model,
        d_ff=d_ff,
        heads=heads,
        kv_heads=_key_value_heads(text, family),
        kv_copies=_copies(text, family),
        d_head=getattr(text, family.d_head, None) or d_model // heads,
        vocab=text.vocab_size,
        gated=family.gated,
        tied=bool((config if family.wrapped else text).tie_word_embeddings),
        sliding=sliding,
        window=window,
        multiplier=getattr(text, family.multiplier) if family.multiplier else 1.0,
        stored_ff=stored_ff,
        context=_context(text),
        experts=getattr(text, family.mixture.experts) if family.mixture else 0,
        chosen=text.num_experts_per_tok if family.mixture else 0,
        expert_ff=getattr(text, family.mixture.width) if family.mixture else 0,
        routed=_routed_layers(text, family),
        recurrent=_recurrent_layers(text, family),
    )


def _context(config: PreTrainedConfig) -> int:
    """Tokens of the longest sequence whose numbers depend on nothing but itself; 0 where the configuration says none.

    From one length on LongRoPE turns every sequence of a batch otherwise, short ones too, but not keys that are kept
    from before (transformers, `longrope_frequency_update`).
    """
    longest = next((length for name in _LENGTHS if (length := getattr(config, name, None))), 0)
    rope = getattr(config, "rope_parameters", None) or {}
    return rope["original_max_position_embeddings"] if rope.get("rope_type") == "longrope" else longest


def _check(config: PreTrainedConfig, family: Family, name: str) -> None:
    """Refuse what the family's row says cannot be studied."""
    if getattr(config, "use_bidirectional_attention", False):
        raise SiteError(f"{name} attends in both directions; only causal decoders can be studied")
    for setting, value, reason in family.refused:
        if getattr(config, setting, None) == value:
            raise SiteError(f"{name} has {setting} = {value!r} and cannot be studied: {reason}")


def _mlp_widths(config: PreTrainedConfig, family: Family) -> tuple[int, int]:
    """Neurons of a layer that run for a token, and those of all its experts (0 where it has none)."""
    mixture = family.mixture
    if mixture is None:
        return _adjusted(config, getattr(config, family.d_ff, None) or 4 * config.hidden_size), 0
    width = getattr(config, mixture.width)
    always = getattr(config, mixture.shared_width) if mixture.shared_width else 0
    always += width * (getattr(config, mixture.shared) or 0) if mixture.shared else 0
    running, stored = (
        count * width + always for count in (config.num_experts_per_tok, getattr(config, mixture.experts))
    )
    return running, stored


def _routed_layers(config: PreTrainedConfig, family: Family) -> tuple[int, ...]:
    """Layers of a mixture that have experts, as its transformers class builds them."""
    if family.mixture is None:
        return ()
    layers = range(config.num_hidden_layers)
    if family.mixture.dense_first:
        layers = layers[getattr(config, family.mixture.dense_first) or 0 :]
    if family.mixture.dense_listed:
        step = config.decoder_sparse_step
        return tuple(layer for layer in layers if layer not in config.mlp_only_layers and (layer + 1) % step == 0)
    return tuple(layers)


def _recurrent_layers(config: PreTrainedConfig, family: Family) -> tuple[int, ...]:
    """Layers of a hybrid that have no softmax attention."""
    kinds = config.layer_types if family.mixer else ()
    return tuple(layer for layer, kind in enumerate(kinds) if kind != "full_attention")


def _adjusted(config: PreTrainedConfig, width: int) -> int:
    """MLP width that a class makes of the one in its configuration (transformers, Lfm2MLP)."""
    if not getattr(config, "block_auto_adjust_ff_dim", False):
        return width
    width = int(2 * width / 3)
    if config.block_ffn_dim_multiplier is None:
        return width
    width = int(config.block_ffn_dim_multiplier * width)
    multiple = int(config.block_multiple_of)
    return -(-width // multiple) * multiple


def _key_value_heads(config: PreTrainedConfig, family: Family) -> int:
    """Key/value heads as the cache holds them: Falcon's newer blocks repeat them, its multi-query ones have one."""
    if getattr(config, "new_decoder_architecture", False):
        return int(config.num_attention_heads)
    if getattr(config, "multi_query", False):
        return 1
    return getattr(config, family.kv_heads, None) or int(config.num_attention_heads)


def _copies(config: PreTrainedConfig, family: Family) -> int:
    """How often the cache holds each key/value head (transformers, `FalconAttention._split_heads`)."""
    repeated = getattr(config, "new_decoder_architecture", False)
    return int(config.num_attention_heads) // int(getattr(config, family.kv_heads)) if repeated else 1


def fingerprint(name: str, hashed: Callable[[Path], str] = content) -> str:
    """Content of the files of a local folder that make the model what it is, as a short hash; empty for a hub id.

    hashed: gives that of a file.
    """
    digests = [(path.name, hashed(path)) for path in _telling_files(Path(located(name)))]
    return hashlib.blake2b(repr(digests).encode(), digest_size=8).hexdigest() if digests else ""


def hub_contents(name: str, revision: str = "", hashed: Callable[[Path], str] = content) -> dict[str, str]:
    """Hashes by name of a model's files in the hub's cache on this machine; none of a local folder.

    A hub's `main` moves: what a run was begun with is told from what is there now by these.
    """
    config = _at_hand(name, revision, "config.json")
    if config is None or Path(located(name)).is_dir():
        return {}
    return {path.name: hashed(path) for path in _telling_files(config.parent)}


def weights_here(name: str, revision: str = "") -> bool:
    """Whether files of a model's weights are on this machine: in its folder, or in the hub's cache."""
    config = _at_hand(name, revision, "config.json")
    return config is not None and any(path.suffix in _WEIGHTS for path in _telling_files(config.parent))


def dated_fingerprint(name: str) -> str:
    """What run folders of older versions hold in place of `fingerprint`: names, sizes and times of safetensors."""
    folder = Path(located(name))
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    facts = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.blake2b(repr(facts).encode(), digest_size=8).hexdigest() if facts else ""


def _sliding_layers(config: PreTrainedConfig, family: Family) -> tuple[tuple[int, ...], int | None]:
    """Layers with sliding-window attention and their window; none where family or configuration have no window."""
    window = getattr(config, "sliding_window", None)
    if not window or not family.windows or getattr(config, "use_sliding_window", True) is False:
        return (), None
    if family.windows == "all":
        return tuple(range(config.num_hidden_layers)), window
    return tuple(layer for layer, kind in enumerate(config.layer_types) if kind == "sliding_attention"), window


def _load(kind: Any, name: str, revision: str) -> Any:
    refuse_pointers(name)
    refuse_adapter(name)
    try:
        # Without the last argument transformers asks on the terminal whether to run code of the checkpoint's.
        return kind.from_pretrained(located(name), revision=revision or "main", trust_remote_code=False)
    except BaseException as error:  # whatever a checkpoint's files make foreign code raise
        let_stop(error)
        raise ModelError(
            f"cannot load model {name!r}: {innermost(error)}; give a local folder, a hub id (a hub must be "
            f"reachable{_named_hub()}), or run `remote-mediation fetch-model smollm2`"
        ) from error


def _named_hub() -> str:
    """What to unset where the environment names a hub that may be gone, as a shell does after `scripts/ndif/down`."""
    named = "; HF_ENDPOINT is set: where what it names is down, `unset HF_ENDPOINT HF_HOME`"
    return named if os.environ.get("HF_ENDPOINT") else ""
