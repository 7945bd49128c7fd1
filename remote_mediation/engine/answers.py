"""What a job brings back is checked before it is kept: how many values, how long, of which type, and finite."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from remote_mediation.engine.jobs import Context, Job, Readout
from remote_mediation.engine.rows import Row
from remote_mediation.errors import LostJobError

# Why a pair fails whose outcome is no number.
NOT_FINITE = "no finite outcome; try bfloat16"
# What is wrong with an answer that the model would not have chosen.
NOT_FINITE_LOGITS = "made of logits that are not finite; try bfloat16"
# How far a value may lie from itself when it is measured again: in its unit (logits, nats), and as a share of it.
_ALLOWED = {"float32": (1e-3, 1e-4), "float16": (0.1, 0.02), "bfloat16": (0.5, 0.05)}
# What may differ between replicas of one deployment, or belongs to a single job.
_MAY_CHANGE = ("host", "device", "job")

# Tasks whose values are numbers of tokens, all of them or those of the first half.
_TOKENS = {"generate": 1, "sample": 2}

Known = Mapping[str, npt.NDArray[np.float32]]


class ContradictionError(LostJobError):
    """A value measured again is another one than before."""

    def __init__(self, message: str, key: str) -> None:
        """key: of the value."""
        super().__init__(message)
        self.key = key


def lengths_of(job: Job) -> list[int | None]:
    """Values that each key of a job stands for, in the order of its keys; None where the model's shape decides."""
    return [length for context in job.contexts for length in [_length(context)] * len(context.keys)]


def check_answer(
    job: str, keys: Sequence[str], lengths: Sequence[int | None], readout: Readout, known: Known, dtype: str
) -> None:
    """Refuse an answer that is not the one to this job; the job is then as good as lost.

    job: its id. keys, lengths: as of `lengths_of`. known: values of a run so far, by key, in precision `dtype`.

    Raises:
        LostJobError: it is the answer to another job, of another shape, or contradicts what was measured before.
    """
    if readout.job not in ("", job):
        raise LostJobError(f"the answer to job {job} is that to job {readout.job}")
    check_shape(keys, lengths, readout)
    key, worst = _contradiction(keys, readout, known, dtype)
    if worst > 1:
        if key not in known:
            raise LostJobError(
                f"a job brought back two values for one row that lie {worst:.3g} times as far apart as {dtype} allows: "
                "its rows are mixed up, or what computes them is broken"
            )
        raise ContradictionError(
            f"a job brought back base prompts that lie {worst:.3g} times as far from what earlier jobs measured as "
            f"{dtype} allows: the server or its answers have changed; choose another --out",
            key,
        )


def check_tokens(task: str, readout: Readout, vocab: int) -> None:
    """Refuse numbers of tokens that are none. vocab: of the model. What is not finite is told apart elsewhere.

    Raises:
        LostJobError: with the first of them.
    """
    if task not in _TOKENS:
        return
    for values in readout.values:
        ids = values[: len(values) // _TOKENS[task]]
        wrong = ids[np.isfinite(ids) & ((ids < 0) | (ids >= vocab) | (ids != np.floor(ids)))]
        if len(wrong):
            raise LostJobError(f"a job brought back {wrong[0]:g} for a token of a model that has {vocab}")


def changes(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """What runs jobs now and did not before, in words; empty where nothing that matters has changed."""
    names = [name for name in before if name in now and name not in _MAY_CHANGE]
    found = [(name, before[name] or "none", now[name] or "none") for name in names if before[name] != now[name]]
    return ", ".join(f"{name} {old} before and {new} now" for name, old, new in found)


def _contradiction(keys: Sequence[str], readout: Readout, known: Known, dtype: str) -> tuple[str, float]:
    """How far values measured again lie from what they were, at most, as a multiple of what is allowed; and which.

    Every job measures its pairs' base prompts, and rows that others take values from in each of their batches; within
    one job its first value is what the others are held to. They are the same to the last digit where the same prompts
    run together, and else differ by the order of additions.
    """
    absolute, relative = _ALLOWED[dtype]
    found = {"": 0.0}
    here: dict[str, npt.NDArray[np.float32]] = {}
    for key, value in zip(keys, readout.values, strict=True):
        first = known.get(key, here.setdefault(key, value))
        if first is not value and first.shape == value.shape:
            before = first.astype(np.float64)
            apart = np.abs(value - before) / (absolute + relative * np.abs(before))
            found[key] = max(found.get(key, 0.0), float(np.nanmax(apart, initial=0.0)))
    return max(found.items(), key=lambda item: item[1])


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
    """Pairs of a `measure` job of which a value is NaN or infinite; the name of another task of which one is.

    Of answers that is told for each alone, once it is known where they end (`Lab`), unless no token is finite.
    """
    enough = np.any if job.task == "generate" else np.all
    finite = [bool(enough(np.isfinite(value))) for value in readout.values]
    if job.task != "measure":
        return set() if all(finite) else {job.task}
    return {row.pair for row, good in zip(rows_of(job), finite, strict=True) if not good}


def rows_of(job: Job) -> list[Row]:
    """The rows that the keys of a `measure` job stand for."""
    return [row for context in job.contexts for row in context.rows]


def _length(context: Context) -> int | None:
    task, payload = context.task, context.payload
    if task == "measure":
        return len(payload["stacks"][0]["queries"])
    if task == "generate":
        return len(payload["prompts"]) * int(payload["tokens"])
    if task == "sample":
        return 2 * int(payload["samples"]) * int(payload["tokens"])
    if task == "learn":
        return sum(map(len, payload["start"])) + int(payload["steps"]) + 1
    if task == "drift":
        return 3 * len(payload["answer"])
    return None
