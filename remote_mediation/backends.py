"""Where jobs run. A backend turns a `Job` into a `Readout` by handing the program of `program.py` to nnsight.

Local and NDIF differ in the object passed to nnsight and in nothing else. Foreign exceptions end here.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from nnsight import TransformersModel

from remote_mediation import program
from remote_mediation.errors import ModelError
from remote_mediation.models import info_of
from remote_mediation.plan import Job, Readout
from remote_mediation.sites import ModelInfo

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class LocalBackend:
    """Runs jobs on this machine; nothing leaves it."""

    def __init__(self, model: Any, info: ModelInfo) -> None:
        """Take over a dispatched nnsight model; `load` builds one from a name."""
        self._model = model
        self.info = info

    @classmethod
    def load(cls, name: str, revision: str = "", dtype: str = "float32", device: str = "cpu") -> LocalBackend:
        """Load a model's weights from a local folder or the hub.

        Raises:
            ModelError: the weights or the device cannot be had.
            SiteError: the model's family is not in the table.
        """
        try:
            model = TransformersModel(
                name,
                revision=revision or "main",
                task="text-generation",
                dispatch=True,
                dtype=getattr(torch, dtype),
                device_map=device,
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise ModelError(f"cannot load {name!r} as {dtype} on {device!r}: {error}") from error
        model.eval()
        return cls(model, info_of(model.config, name, revision))

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Tokenizer of the model."""
        return self._model.tokenizer

    def run(self, job: Job) -> Readout:
        """Run a measuring job."""
        start = time.perf_counter()
        values = program.execute(self._model, job.payload)
        return Readout(split_values(values), time.perf_counter() - start)

    def answer(self, prompts: Sequence[tuple[int, ...]], tokens: int) -> list[tuple[int, ...]]:
        """The model's greedy answers, end-of-text tokens left out."""
        payload = {"task": "answer", "prompts": tuple(prompts), "tokens": tokens}
        return strip_answers(program.execute(self._model, payload), self.tokenizer)


def split_values(contexts: list[torch.Tensor]) -> list[np.ndarray[Any, np.dtype[np.float32]]]:
    """The contexts' tensors `[run, read]` as one vector per run."""
    return [row for values in contexts for row in values.numpy()]


def strip_answers(answers: list[torch.Tensor], tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, ...]]:
    """Answers without the special tokens that end them."""
    stripped: list[tuple[int, ...]] = []
    for answer in answers:
        ids = answer.tolist()
        while ids and ids[-1] in tokenizer.all_special_ids:
            ids.pop()
        stripped.append(tuple(ids))
    return stripped
