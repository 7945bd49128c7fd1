"""Weights as the files of a model hold them, whatever transformers makes of them when it loads them.

It casts every tensor to the precision that was asked for. Codes of a quantised checkpoint, whole numbers or floats of
8 bits, become weights in that way where its configuration does not say that they are codes.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

# In the order in which transformers looks for them; an index names shards.
_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# Causal masks, frequencies and numbers of positions that older checkpoints hold and newer code computes.
MASKS = (".masked_bias", ".attn.bias", ".attention.bias", ".inv_freq", "position_ids")


def tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Parameters of a file, of either format, by name."""
    if path.suffix == ".bin":
        yield from torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True).items()
        return
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118 - it is no mapping
            yield name, file.get_tensor(name)


def names_in(path: Path) -> list[str]:
    """Names of the parameters of a file."""
    if path.suffix == ".bin":
        return [name for name, _ in tensors(path)]
    with safe_open(path, "pt") as file:
        return list(file.keys())


def tensor_in(path: Path, name: str) -> Tensor:
    """A parameter of a file."""
    if path.suffix == ".bin":
        return dict(tensors(path))[name]
    with safe_open(path, "pt") as file:
        found: Tensor = file.get_tensor(name)
        return found


def refusable_codes(folder: Path, model: Any, unread: Collection[str]) -> str:
    """A weight that files of a folder hold as whole numbers or floats of 8 bits, with its type; empty where none.

    model: what was loaded from there. unread: names of what was not. Buffers may be of any type, and so may counters.
    """
    buffers = [name for name, _ in model.named_buffers()]
    ignored = [re.compile(one) for one in model._keys_to_ignore_on_load_unexpected or ()]
    for name, dtype in _types(folder):
        if dtype.is_floating_point and dtype.itemsize > 1:
            continue
        beside = name.endswith(MASKS) or any(one.search(name) for one in ignored)
        if not (beside or _among(name, buffers) or _among(name, unread)):
            return f"{name} in {str(dtype).removeprefix('torch.')}"
    return ""


def _among(name: str, names: Collection[str]) -> bool:
    """Whether a name is one of others, which may have more in front, or less."""
    return any(name == one or one.endswith(f".{name}") or name.endswith(f".{one}") for one in names)


def _types(folder: Path) -> Iterator[tuple[str, torch.dtype]]:
    """Types of the tensors that transformers reads from a folder, by name, but for single numbers."""
    for path in files_read(folder):
        if path.suffix == ".bin":
            yield from ((name, tensor.dtype) for name, tensor in tensors(path) if tensor.ndim)
            continue
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                stored = file.get_slice(name)
                if stored.get_shape():
                    yield name, stored[:0].dtype


def files_read(folder: Path) -> list[Path]:
    """The files of weights that transformers reads."""
    found = next((folder / name for name in _FILES if (folder / name).is_file()), None)
    if found is None or found.suffix != ".json":
        return [found] if found else []
    return sorted({folder / name for name in json.loads(found.read_text("utf-8"))["weight_map"].values()})
