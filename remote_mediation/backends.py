"""Where jobs run. A backend turns a `Job` into a `Readout` by handing the program of `program.py` to nnsight.

Local and NDIF differ in the object passed to nnsight and in nothing else. Foreign exceptions end here.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import torch
from nnsight import TransformersModel
from nnsight.intervention.backends.remote import RemoteBackend, RemoteError
from nnsight.ndif import register
from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_exponential

from remote_mediation import program
from remote_mediation.errors import JobError, LostJobError, ModelError, TransportError
from remote_mediation.fetch import located
from remote_mediation.models import info_of, load_info
from remote_mediation.ndif import Server, preflight, refuse_bad
from remote_mediation.plan import Job, Readout
from remote_mediation.sites import ModelInfo

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class LocalBackend:
    """Runs jobs on this machine; nothing leaves it."""

    def __init__(self, model: Any, info: ModelInfo) -> None:
        """Take over a dispatched nnsight model; `load` builds one from a name."""
        self._model = model
        self._jobs: dict[str, Job] = {}
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
                located(name),
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
        values = program.execute(self._model, self._jobs.pop(ticket).payload)
        return Readout(split_values(values), time.perf_counter() - start)

    def answer(self, prompts: Sequence[tuple[int, ...]], tokens: int) -> list[tuple[int, ...]]:
        """The model's greedy answers, end-of-text tokens left out."""
        payload = {"task": "answer", "prompts": tuple(prompts), "tokens": tokens}
        return strip_answers(program.execute(self._model, payload), self.tokenizer)


class NdifBackend:
    """Runs jobs on an NDIF server. The model here has shapes and no weights; only the outcomes' values come back."""

    def __init__(
        self,
        name: str,
        revision: str,
        server: Server,
        notify: Callable[[str], None],
        *,
        patience: float = 1800.0,
        retry_for: float = 300.0,
    ) -> None:
        """Build the model's shape and make sure that the server can run it.

        notify: is told what the server says of a job. patience: seconds without any news of a job after which it is
        given up. retry_for: seconds for which a lost connection is tried again.

        Raises:
            PreflightError: the server cannot be reached, refuses the key, or cannot run the model.
            ModelError: the model's configuration or tokenizer cannot be had here.
            SiteError: the model's family is not in the table.
        """
        self.info = load_info(name, revision)
        refuse_bad(preflight(server, name, revision))
        self._server, self._notify, self._patience = server, notify, patience
        self._model = TransformersModel(name, revision=revision or "main", task="text-generation")
        self._model_key = self._model.to_model_key()
        self._retry = Retrying(
            retry=retry_if_exception_type(TransportError),
            wait=wait_exponential(multiplier=0.5, max=20),
            stop=stop_after_delay(retry_for),
            before_sleep=lambda state: notify(
                f"connection lost, trying again ({state.outcome and state.outcome.exception()})"
            ),
            reraise=True,
        )
        # The program travels by value: the server does not have this package.
        register(program)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Tokenizer of the model."""
        return self._model.tokenizer

    def submit(self, job: Job) -> str:
        """Send a job; the ticket is the server's id for it."""
        return self._send(job.payload)

    def collect(self, ticket: str) -> Readout:
        """Wait for a job's values, through lost connections."""
        values, seconds = self._wait(ticket)
        return Readout(split_values(values), seconds)

    def answer(self, prompts: Sequence[tuple[int, ...]], tokens: int) -> list[tuple[int, ...]]:
        """The model's greedy answers, end-of-text tokens left out."""
        payload = {"task": "answer", "prompts": tuple(prompts), "tokens": tokens}
        return strip_answers(self._wait(self._send(payload))[0], self.tokenizer) if prompts else []

    def _send(self, payload: dict[str, Any]) -> str:
        return self._retry(self._send_once, payload)

    def _send_once(self, payload: dict[str, Any]) -> str:
        remote = self._remote(None)
        with _translated():
            program.execute(self._model, payload, remote)
        return str(remote.job_id)

    def _wait(self, ticket: str) -> tuple[list[torch.Tensor], float]:
        """A job's tensors and the seconds it took on the server."""
        remote = self._remote(ticket)
        pause = 0.05
        while True:
            result = self._retry(self._poll_once, remote)
            if result is not None:
                return result["values"], float((remote.meta or {}).get("runtime") or 0.0)
            if time.monotonic() - remote.heard > self._patience:
                raise LostJobError(f"no news of job {ticket} for {self._patience:.0f} s; it is given up")
            time.sleep(pause)
            pause = min(pause * 1.5, 2.0)

    def _poll_once(self, remote: _Remote) -> dict[str, Any] | None:
        with _translated():
            result: dict[str, Any] | None = remote()
        return result

    def _remote(self, ticket: str | None) -> _Remote:
        server = self._server
        return _Remote(
            self._model_key, server.host, server.key, self._model._remoteable_get_env(), ticket, self._notify
        )


class _Remote(RemoteBackend):  # type: ignore[misc]  # nnsight is untyped
    """nnsight's non-blocking remote backend, with its status lines sent to us and the time of the last news kept."""

    def __init__(
        self,
        model_key: str,
        host: str,
        key: str,
        env: dict[str, Any],
        ticket: str | None,
        notify: Callable[[str], None],
    ) -> None:
        super().__init__(model_key, host=host, api_key=key, env=env, blocking=False, job_id=ticket)
        self.display.enabled = False
        self.heard = time.monotonic()
        self._notify = notify
        self._said = ""

    def note(self, response: Any) -> bool:
        line = f"{response.status.value.lower()}: {response.description}".rstrip(": ")
        if line != self._said:
            self._said, self.heard = line, time.monotonic()
            self._notify(line)
        return bool(super().note(response))


@contextlib.contextmanager
def _translated() -> Generator[None]:
    """nnsight raises one error for lost connections and failed jobs; tell them apart."""
    try:
        yield
    except RemoteError as error:
        cause = error.__cause__
        if isinstance(cause, httpx.HTTPStatusError) and cause.response.status_code < 500:
            raise JobError(str(error)) from error
        if isinstance(cause, httpx.HTTPError):
            raise TransportError(str(error)) from error
        raise JobError(str(error)) from error
    except httpx.HTTPStatusError as error:
        if error.response.status_code in (403, 404, 410):
            raise LostJobError(f"the result is no longer kept ({error.response.status_code})") from error
        raise TransportError(str(error)) from error
    except httpx.HTTPError as error:
        raise TransportError(str(error) or type(error).__name__) from error


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
