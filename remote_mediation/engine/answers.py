"""What a job brings back is checked before it is kept: how many values, how long, of which type, and finite."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from remote_mediation.engine.jobs import Job, Part, Readout
from remote_mediation.engine.rows import Row
from remote_mediation.errors import LostJobError

# Why a pair fails whose outcome is no number.
NOT_FINITE = "no finite outcome; try bfloat16"


def lengths_of(job: Job) -> list[int | None]:
    """Values that each key of a job stands for, in the order of its keys; None where the model's shape decides."""
    return [length for part in job.parts for length in [_length(job.task, part)] * len(part.keys)]


def check_shape(keys: Sequence[str], lengths: Sequence[int | None], readout: Readout) -> None:
    """Refuse an answer that is not the one to this job; the job is then as good as lost.

    lengths: as of `lengths_of`.

    Raises:
        LostJobError: it has other than one vector per key, of another length, or not in float32.
    """
    values = readout.values
    if len(values) != len(keys):
        raise LostJobError(f"a job of {len(keys)} keys brought back values for {len(values)}")
    for value, length in zip(values, lengths, strict=True):
        if value.dtype != np.float32 or value.ndim != 1:
            raise LostJobError(f"a job brought back {value.dtype} {list(value.shape)}, not one row of float32")
        if not len(value) or length not in (None, len(value)):
            raise LostJobError(f"a job brought back {len(value)} values for a key that has {length or 'some'}")


def not_finite(job: Job, readout: Readout) -> set[str]:
    """Pairs of a `measure` job of which a value is NaN or infinite; all pairs of a job of another task."""
    finite = [bool(np.isfinite(value).all()) for value in readout.values]
    if job.task != "measure":
        return set() if all(finite) else set(job.pairs)
    return {row.pair for row, good in zip(rows_of(job), finite, strict=True) if not good}


def rows_of(job: Job) -> list[Row]:
    """The rows that the keys of a `measure` job stand for."""
    return [row for part in job.parts for row in part.rows]


def _length(task: str, part: Part) -> int | None:
    payload = part.payload
    if task == "measure":
        return len(payload["stacks"][0]["queries"])
    if task == "generate":
        return len(payload["prompts"]) * int(payload["tokens"])
    if task == "sample":
        return 2 * int(payload["samples"]) * int(payload["tokens"])
    if task == "drift":
        return 3 * len(payload["answer"])
    return None
