"""Jobs on this machine: the program of `program.py` handed to nnsight, and nothing leaves it."""

from __future__ import annotations

import contextlib
import ctypes
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from nnsight import TransformersModel
from transformers import PreTrainedModel

from remote_mediation.engine import program
from remote_mediation.engine.backend import split_values
from remote_mediation.engine.copies import other_copy
from remote_mediation.engine.jobs import Job, Readout
from remote_mediation.errors import LostJobError, ModelError, OutOfMemoryError, innermost
from remote_mediation.fetch import located
from remote_mediation.models import load_info
from remote_mediation.sites import ModelInfo

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A parameter of a layer; the group is what stands before the layer's number.
_LAYER = re.compile(r"(.*?)\.\d+\.")
# Causal masks and frequencies that older checkpoints hold in their layers and newer code computes.
_MASKS = (".masked_bias", ".attn.bias", ".attention.bias", ".inv_freq")
# Parameters of mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _MOST_KEPT = -1, -3, 2**30


class LocalBackend:
    """Runs jobs on this machine; nothing leaves it."""

    def __init__(self, model: Any, info: ModelInfo, *, limited: bool = False) -> None:
        """Take over a dispatched nnsight model; `load` builds one from a name.

        limited: memory matters more than time, so that what tensors free is given back at once.
        """
        self._model = model
        self._jobs: dict[str, Job] = {}
        self.info = info
        if not limited:
            _keep_freed_memory()

    @classmethod
    def load(
        cls, name: str, revision: str = "", dtype: str = "float32", device: str = "cpu", *, limited: bool = False
    ) -> LocalBackend:
        """Load a model's weights from a local folder or the hub. limited: as for the class.

        device: as torch names it, or `auto`: over all GPUs that there are, and what they cannot hold beside them.

        Raises:
            ModelError: the weights or the device cannot be had.
            SiteError: the model's family is not in the table.
        """
        info = load_info(name, revision)
        try:
            if device != "auto":
                torch.empty(0, device=device)
            model = TransformersModel(
                located(name),
                revision=revision or "main",
                task="text-generation",
                dispatch=True,
                dtype=getattr(torch, dtype),
                trust_remote_code=False,
                # A map of one place is forgotten by the pipeline, which would then move the model to the first GPU.
                **({"device_map": "auto"} if device == "auto" else {"device": device}),
            )
            missing, unread = _other_weights(model._module, located(name), revision)
            other = other_copy(Path(located(name)))
        except Exception as error:  # whatever a checkpoint's files make foreign code raise
            raise ModelError(
                f"cannot load {name!r} as {dtype} on {device!r}: {innermost(error)}; give a whole model "
                "in transformers' format, or try --device cpu"
            ) from error
        if missing:
            raise ModelError(
                f"cannot load {name!r}: its files lack {_named(missing)}, which would be random; give the folder of "
                "the whole language model"
            )
        if unread:
            raise ModelError(
                f"cannot load {name!r}: its files hold {_named(unread)}, for which its config.json has no place, so "
                "that another model would run; give the config.json of these weights, or merge adapters"
            )
        if other:
            raise ModelError(
                f"cannot load {name!r}: it holds two models, {other} is not what its safetensors have, which would be "
                "read; take one of the two copies away"
            )
        model.eval()
        model._module.config.return_dict = True  # whatever its config.json says; the program reads names
        return cls(model, info, limited=limited)

    @property
    def dtype(self) -> str:
        """Precision of the loaded weights."""
        return str(self._model.dtype).removeprefix("torch.")

    @property
    def served(self) -> dict[str, str]:
        """Nothing: `run.json` has this machine's versions."""
        return {}

    @property
    def model(self) -> Any:
        """The dispatched nnsight model."""
        return self._model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Tokenizer of the model."""
        return self._model.tokenizer

    def submit(self, job: Job) -> str:
        """Keep a job until it is collected."""
        self._jobs[job.id] = job
        return job.id

    def collect(self, ticket: str) -> Readout:
        """Run a submitted job.

        Raises:
            LostJobError: it was submitted in another process.
            OutOfMemoryError: a GPU has too little memory for it.
        """
        if ticket not in self._jobs:
            raise LostJobError(f"job {ticket} was not submitted in this process")
        job, start = self._jobs.pop(ticket), time.perf_counter()
        try:
            with _whole_products():
                values, made = program.opened(program.execute(self._model, job.payload))
        except torch.OutOfMemoryError as error:
            raise OutOfMemoryError(
                f"a GPU ran out of memory in a {job.task} job of {job.rows:,} rows: {innermost(error)}; what is "
                "measured is kept: give the same command again with a smaller --max-memory, in GB with the weights"
            ) from error
        return Readout(split_values(values), time.perf_counter() - start, made["job"])


def _other_weights(module: Any, folder: str, revision: str) -> tuple[list[str], list[str]]:
    """Names of parameters that a model's files do not have, and of those in its layers that only they have.

    Only the files' headers are read: transformers itself would fill the first at random and leave out the second. Tied
    ones need not be there, and heads or towers beside the layers may be. What quantised weights have beside them is
    left to those who read it.
    """
    if not isinstance(module, PreTrainedModel):
        return [], []
    loaded, found = type(module).from_pretrained(
        folder, revision=revision or "main", device_map="meta", output_loading_info=True
    )
    layers = {match[1] for name in loaded.state_dict() if (match := _LAYER.match(name))}
    quantised = getattr(module.config, "quantization_config", None)
    unread = [
        name
        for name in found["unexpected_keys"]
        if (match := _LAYER.match(name)) and match[1] in layers and not (name.endswith(_MASKS) or quantised)
    ]
    return sorted(found["missing_keys"]), sorted(unread)


def _named(names: list[str]) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


@contextlib.contextmanager
def _whole_products() -> Iterator[None]:
    """Let a GPU make products of float32 in float32, though the caller may have switched TF32 on."""
    products = torch.backends.cuda.matmul
    # The newer name where there is one: torch refuses to read the older where a caller has used the newer.
    name, whole = ("fp32_precision", "ieee") if hasattr(products, "fp32_precision") else ("allow_tf32", False)
    before = getattr(products, name)
    setattr(products, name, whole)
    try:
        yield
    finally:
        setattr(products, name, before)


def _keep_freed_memory() -> None:
    """Let the C library keep the pages that tensors free, where it is glibc.

    It would hand back every tensor of some MB and have fresh pages zeroed for the next one, which takes half of the
    time of rows of one token.
    """
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_THRESHOLD, _MOST_KEPT)
        library.mallopt(_M_TRIM_THRESHOLD, _MOST_KEPT)
