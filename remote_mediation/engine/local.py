"""Jobs on this machine: the program of `program.py` handed to nnsight, and nothing leaves it."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from nnsight import TransformersModel

from remote_mediation.engine import heap, program
from remote_mediation.engine.backend import split_values
from remote_mediation.engine.jobs import Job, Readout
from remote_mediation.engine.weights import load_weights, quantisation_of
from remote_mediation.errors import LostJobError, ModelError, OutOfMemoryError, innermost
from remote_mediation.loading import DISK, PLAIN, Loading, placed
from remote_mediation.models import load_info, load_tokenizer
from remote_mediation.sites import ModelInfo

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class LocalBackend:
    """Runs jobs on this machine; nothing leaves it."""

    def __init__(self, model: Any, info: ModelInfo, *, loading: Loading = PLAIN, limited: bool = False) -> None:
        """Take over a dispatched nnsight model; `load` builds one from a name.

        loading: how it was loaded. limited: memory matters more than time, so that what tensors free is given back at
        once.
        """
        self._model, self.loading = model, loading
        self._jobs: dict[str, Job] = {}
        self.info = info
        self._most = 0.0 if limited else heap.resident() + heap.KEPT
        if not limited:
            heap.keep_freed()

    @classmethod
    def load(
        cls,
        name: str,
        revision: str = "",
        dtype: str = "float32",
        device: str = "cpu",
        *,
        loading: Loading = PLAIN,
        limited: bool = False,
    ) -> LocalBackend:
        """Load a model's weights from a local folder or the hub. limited: as for the class.

        device: as torch names it, or `auto`: over all GPUs that there are, and what they cannot hold beside them.
        loading: quantised, or shared out in another way.

        Raises:
            ModelError: the weights or the device cannot be had, or not as they were asked for.
            SiteError: the model's family is not in the table.
        """
        info, tokenizer = load_info(name, revision), load_tokenizer(name, revision)
        way = loading._replace(spread="auto") if device == "auto" else loading
        try:
            if not way.shared_out:
                torch.empty(0, device=device)
            module = load_weights(info, dtype, device, way)
            with _unreported():
                model = TransformersModel(module, tokenizer=tokenizer, task="text-generation", **_kept_in_place(module))
        except ModelError:
            raise
        except Exception as error:  # whatever a checkpoint's files make foreign code raise
            where = way.device_map() if way.shared_out else device
            raise ModelError(
                f"cannot load {name!r} as {dtype} on {where!r}: {innermost(error)}; give a whole model "
                "in transformers' format, or try --device cpu"
            ) from error
        model.eval()
        module.config.return_dict = True  # whatever its config.json says; the program reads names
        return cls(model, info, loading=loading, limited=limited)

    @property
    def dtype(self) -> str:
        """Precision of the loaded weights."""
        return str(self._model.dtype).removeprefix("torch.")

    @property
    def served(self) -> dict[str, str]:
        """How the weights are held where that is not plainly; `run.json` has this machine's versions."""
        module = self._model._module
        places = getattr(module, "hf_device_map", None)
        found = {"quantization": quantisation_of(module), "device": placed(places) if places else ""}
        known = {name: value for name, value in found.items() if value}
        if not known and self.loading == PLAIN:
            return {}
        return {**known, "attention": module.config._attn_implementation}

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
        heap.give_back_beyond(self._most)
        return Readout(split_values(values), time.perf_counter() - start, made["job"])


def _kept_in_place(module: Any) -> dict[str, Any]:
    """Arguments with which a pipeline leaves a model where it is: else one on a single device goes to the first GPU.

    Of a model that is shared out it takes the first place for a device, which the disk is not.
    """
    places = getattr(module, "hf_device_map", None)
    if places is None:
        return {"device": module.device}
    module.hf_device_map = dict(sorted(places.items(), key=lambda place: place[1] == DISK))
    return {}


@contextlib.contextmanager
def _unreported() -> Iterator[None]:
    """A pipeline of text names all classes that it knows where it gets one that takes images too, and runs it."""
    log = logging.getLogger("transformers.pipelines.base")

    def other(record: logging.LogRecord) -> bool:
        return "is not supported for" not in record.getMessage()

    log.addFilter(other)
    try:
        yield
    finally:
        log.removeFilter(other)


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
