"""Weights that lie twice in a model's folder: is the copy that is read the one that was meant?

Transformers reads the safetensors of a folder and passes over `pytorch_model.bin`. Scripts that save the latter beside
older safetensors leave two models in one folder, and the older one runs.
"""

from __future__ import annotations

import zipfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

_VALUES = 2**16
"""Values of a parameter that are compared: training changes them all."""


def other_copy(folder: Path) -> str:
    """A parameter that a PyTorch file of a folder holds otherwise than its safetensors, in words; empty where none."""
    others = sorted(folder.glob("pytorch_model*.bin"))
    if not others:
        return ""
    with ExitStack() as opened:
        read = {
            name: file
            for path in sorted(folder.glob("model*.safetensors"))
            for file in [opened.enter_context(safe_open(path, "pt"))]
            for name in file.keys()  # noqa: SIM118 - it is no mapping
        }
        for path in others if read else ():
            tensors = torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True)
            for name, tensor in tensors.items():
                if name in read and not _same(tensor, read[name].get_slice(name)):
                    return f"{name} of {path.name}"
    return ""


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
