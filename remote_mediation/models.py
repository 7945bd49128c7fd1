"""What can be known of a model without its weights: its shape (`ModelInfo`) and its tokenizer."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from remote_mediation.errors import ModelError, SiteError
from remote_mediation.fetch import located
from remote_mediation.sites import ModelInfo, family_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

_UNGATED = ("gpt2", "gpt_neox")
# All their layers slide when one does: transformers gives these models one mask and does not read `layer_types`.
_ONE_MASK = ("mistral", "phi3")


def load_info(name: str, revision: str = "") -> ModelInfo:
    """Read a model's configuration from a local folder or the hub.

    Raises:
        ModelError: no such model, or no way to reach the hub.
        SiteError: the model's family is not in the table.
    """
    from transformers import AutoConfig

    info = info_of(_load(AutoConfig, name, revision), name, revision)
    return replace(info, weights=_fingerprint(Path(located(name))))


def load_tokenizer(name: str, revision: str = "") -> PreTrainedTokenizerBase:
    """Load a model's tokenizer from a local folder or the hub.

    Raises:
        ModelError: no such model, or no way to reach the hub.
    """
    from transformers import AutoTokenizer

    return _load(AutoTokenizer, name, revision)


def info_of(config: PreTrainedConfig, name: str, revision: str = "") -> ModelInfo:
    """The shape of a model from its transformers configuration.

    Raises:
        SiteError: the model's family is not in the table, or it is no causal decoder.
    """
    family_of(config.model_type)
    if getattr(config, "use_bidirectional_attention", False):
        raise SiteError(f"{name} attends in both directions; only causal decoders can be studied")
    heads, d_model = config.num_attention_heads, config.hidden_size
    sliding, window = _sliding_layers(config)
    return ModelInfo(
        name=name,
        revision=revision,
        family=config.model_type,
        layers=config.num_hidden_layers,
        d_model=d_model,
        d_ff=getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * d_model,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        d_head=getattr(config, "head_dim", None) or d_model // heads,
        vocab=config.vocab_size,
        gated=config.model_type not in _UNGATED,
        tied=bool(config.tie_word_embeddings),
        sliding=sliding,
        window=window,
    )


def _fingerprint(folder: Path) -> str:
    """Names, sizes and times of a local folder's weight files as a short hash; empty for a hub id."""
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    facts = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.blake2b(repr(facts).encode(), digest_size=8).hexdigest() if facts else ""


def _sliding_layers(config: PreTrainedConfig) -> tuple[tuple[int, ...], int | None]:
    """Layers with sliding-window attention and their window; none where the configuration names no window."""
    window = getattr(config, "sliding_window", None)
    if not window or getattr(config, "use_sliding_window", True) is False:
        return (), None
    listed = None if config.model_type in _ONE_MASK else getattr(config, "layer_types", None)
    kinds = listed or ["sliding_attention"] * config.num_hidden_layers
    return tuple(layer for layer, kind in enumerate(kinds) if kind == "sliding_attention"), window


def _load(kind: Any, name: str, revision: str) -> Any:
    try:
        return kind.from_pretrained(located(name), revision=revision or "main")
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"cannot load model {name!r}: {reason}; give a local folder, a hub id (a hub must be reachable), or run "
            "`remote-mediation fetch-model smollm2`"
        ) from error
