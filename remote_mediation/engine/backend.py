"""A place that runs jobs: the one protocol that this machine and a server both follow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from remote_mediation.engine.jobs import Job, Readout
from remote_mediation.sites import ModelInfo

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


class Backend(Protocol):
    """A place that runs jobs."""

    @property
    def info(self) -> ModelInfo:
        """Shape of its model."""
        ...

    @property
    def dtype(self) -> str:
        """Precision in which it holds the model, as torch names it."""
        ...

    @property
    def served(self) -> Mapping[str, str]:
        """What runs the jobs and no setting tells: a server's host, versions and hash of weights, or where a model is.

        Of a model on this machine how it is quantised, its attention and its devices, where one is not the plain one.
        """
        ...

    @property
    def model(self) -> Any:
        """The nnsight model that it traces."""
        ...

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Tokenizer of its model."""
        ...

    def submit(self, job: Job) -> str:
        """Hand over a job; what comes back is a ticket for its values, which outlives this process where it can.

        Raises:
            BackendError: it could not be handed over.
        """
        ...

    def collect(self, ticket: str) -> Readout:
        """Wait for a job's values.

        Raises:
            JobError: the job failed.
            LostJobError: nothing is known of this ticket (any more).
            BackendError: the backend could not be reached.
        """
        ...


def split_values(contexts: list[torch.Tensor]) -> list[np.ndarray[Any, np.dtype[np.float32]]]:
    """The contexts' tensors `[run, read]` as one vector per run."""
    return [row for values in contexts for row in values.numpy()]
