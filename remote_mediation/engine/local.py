"""Jobs on this machine: the program of `program.py` handed to nnsight, and nothing leaves it."""

from __future__ import annotations

import contextlib
import ctypes
import time
from typing import TYPE_CHECKING, Any

import torch
from nnsight import TransformersModel
from transformers import PreTrainedModel

from remote_mediation.engine import program
from remote_mediation.engine.backend import split_values
from remote_mediation.engine.jobs import Job, Readout
from remote_mediation.errors import LostJobError, ModelError, innermost
from remote_mediation.fetch import located
from remote_mediation.models import load_info
from remote_mediation.sites import ModelInfo

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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

        Raises:
            ModelError: the weights or the device cannot be had.
            SiteError: the model's family is not in the table.
        """
        info = load_info(name, revision)
        try:
            torch.empty(0, device=device)
            model = TransformersModel(
                located(name),
                revision=revision or "main",
                task="text-generation",
                dispatch=True,
                dtype=getattr(torch, dtype),
                device_map=device,
            )
            missing = _missing_weights(model._module, located(name), revision)
        except Exception as error:  # whatever a checkpoint's files make foreign code raise
            raise ModelError(
                f"cannot load {name!r} as {dtype} on {device!r}: {innermost(error)}; give a whole model "
                "in transformers' format, or try --device cpu"
            ) from error
        if missing:
            named = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
            raise ModelError(
                f"cannot load {name!r}: its files lack {named}, which would be random; give the folder of the whole "
                "language model"
            )
        model.eval()
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
        """
        if ticket not in self._jobs:
            raise LostJobError(f"job {ticket} was not submitted in this process")
        start = time.perf_counter()
        values, made = program.opened(program.execute(self._model, self._jobs.pop(ticket).payload))
        return Readout(split_values(values), time.perf_counter() - start, made["job"])


def _missing_weights(module: Any, folder: str, revision: str) -> list[str]:
    """Names of the parameters that a model's files do not have; tied ones need not be there.

    Only the files' headers are read: transformers itself would fill such parameters at random.
    """
    if not isinstance(module, PreTrainedModel):
        return []
    _, found = type(module).from_pretrained(
        folder, revision=revision or "main", device_map="meta", output_loading_info=True
    )
    return sorted(found["missing_keys"])


def _keep_freed_memory() -> None:
    """Let the C library keep the pages that tensors free, where it is glibc.

    It would hand back every tensor of some MB and have fresh pages zeroed for the next one, which takes half of the
    time of rows of one token.
    """
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_THRESHOLD, _MOST_KEPT)
        library.mallopt(_M_TRIM_THRESHOLD, _MOST_KEPT)
