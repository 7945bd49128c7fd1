"""Models into a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError


def save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write a model of transformers and its tokenizer.

    Raises:
        OSError: no permission or no space; safetensors has an error of its own for that.
    """
    try:
        model.save_pretrained(folder)
    except SafetensorError as error:
        raise OSError(f"cannot write a model into {folder}: {error}") from error
    tokenizer.save_pretrained(folder)
