"""Weights that lie twice in a model's folder: is the copy that is read the one that was meant?

Transformers reads the safetensors of a folder and passes over `pytorch_model.bin`; where shards lie beside one file of
safetensors it reads the one. Scripts that save one kind beside an older other leave two models in one folder, and the
older one may run. Of a parameter that two shards hold it takes either, whatever the index says.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from remote_mediation.engine.stored import files_read, names_in, tensor_in, tensors

_VALUES = 2**16
"""Values of a parameter that are compared: training changes them all."""


def other_copy(folder: Path) -> str:
    """A parameter that files of a folder hold otherwise than its safetensors, in words; empty where none.

    Where one file of safetensors and shards lie in it, transformers reads the one file.
    """
    single, shards = folder / "model.safetensors", sorted(folder.glob("model-*-of-*.safetensors"))
    read, others = ([single], shards) if single.is_file() else (shards, [])
    others = [*others, *sorted(folder.glob("pytorch_model*.bin"))]
    if not others or not read:
        return ""
    with ExitStack() as opened:
        files = [opened.enter_context(safe_open(path, "pt")) for path in read]
        stored = {name: file for file in files for name in file.keys()}  # noqa: SIM118 - it is no mapping
        for path in others:
            for name, tensor in tensors(path):
                if name in stored and not _same(tensor, stored[name].get_slice(name)):
                    return f"{name} of {path.name}"
    return ""


def in_two_shards(folder: Path) -> str:
    """A parameter that two of the files that are read hold with other values, in words; empty where none."""
    first: dict[str, Path] = {}
    for path in files_read(folder):
        for name in names_in(path):
            other = first.setdefault(name, path)
            if other is not path and not _equal(tensor_in(other, name), tensor_in(path, name)):
                return f"{name} in {other.name} is not that in {path.name}"
    return ""


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def _same(tensor: Tensor, stored: Any) -> bool:
    """Whether a tensor is that of a safetensors file, as far as the coarser of the two precisions can tell.

    stored: a slice of the file.
    """
    if not tensor.ndim:  # a counter
        return True
    if list(tensor.shape) != stored.get_shape():
        return False
    rows = max(1, _VALUES * len(tensor) // max(tensor.numel(), 1))
    one, other = tensor[:rows], stored[:rows]
    if one.dtype == other.dtype or not (one.is_floating_point() and other.is_floating_point()):
        return torch.equal(one, other.to(one.dtype))
    coarse = max(torch.finfo(one.dtype).eps, torch.finfo(other.dtype).eps)
    return torch.allclose(one.double(), other.double(), rtol=coarse, atol=coarse**2)
