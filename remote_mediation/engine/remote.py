"""Jobs on an NDIF server: the same program with another nnsight backend. Foreign exceptions end here."""

from __future__ import annotations

import contextlib
import io
import pickle
import time
from collections import Counter
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx
import torch
import zstandard
from nnsight import TransformersModel
from nnsight.intervention.backends.remote import RemoteBackend, RemoteError
from nnsight.ndif import register
from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_exponential

from remote_mediation.engine import program
from remote_mediation.engine.backend import split_values
from remote_mediation.engine.jobs import Job, Readout
from remote_mediation.engine.server import Server, plain, preflight, refuse_bad
from remote_mediation.errors import BackendError, JobError, LostJobError, PreflightError, TransportError
from remote_mediation.models import load_info
from remote_mediation.sites import family_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# ndif's words when the process that holds the model ended while a job was in it.
_CRASHED = "Error submitting request to model deployment"
# So often a job may be in the model's process when that ends, before the job is taken to be the reason.
_MOST_CRASHES = 2
# Seconds until a model whose process ended is asked again; it takes about 10 to load a small one.
_CRASH_PAUSE = 5.0
# Seconds after which a job of which the server has never said anything is taken to be unknown to it.
_UNKNOWN_FOR = 120.0
# HTTP statuses below 500 that pass by themselves.
_TRANSIENT = (408, 425, 429)
# What torch raises over bytes that are no file of its own, or a damaged one.
_DAMAGE = (RuntimeError, ValueError, EOFError, KeyError, IndexError, TypeError, AttributeError, OSError, MemoryError)


@dataclass
class Traffic:
    """What a client has exchanged with a server."""

    jobs: int = 0
    """Jobs sent."""
    up: int = 0
    """Bytes of their payloads."""
    down: int = 0
    """Bytes of the values that came back, as transferred."""
    seconds: float = 0.0
    """Time that the jobs which came back took on the server."""


class NdifBackend:
    """Runs jobs on an NDIF server. The model here has shapes and no weights; only the outcomes' values come back."""

    def __init__(
        self,
        name: str,
        revision: str,
        server: Server,
        notify: Callable[[str], None],
        *,
        dtype: str | None = None,
        patience: float = 1800.0,
        retry_for: float = 300.0,
    ) -> None:
        """Build the model's shape and make sure that the server runs it, in the precision that the study says.

        notify: is told what the server says of a job. dtype: the study's precision, None for any. patience: seconds
        without any news of a job after which it is given up. retry_for: seconds for which a lost connection is tried
        again, and a model whose process ended is waited for.

        Raises:
            PreflightError: the server cannot be reached, refuses the key, or cannot run the model.
            ModelError: the model's configuration or tokenizer cannot be had here.
            SiteError: the model's family is not in the table.
        """
        self.info = load_info(name, revision)
        refuse_bad(preflight(server, name, revision))
        self._server, self._notify, self._patience, self._retry_for = server, notify, patience, retry_for
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
        self.traffic = Traffic()
        self._sent: dict[str, str] = {}
        self._crashes: Counter[str] = Counter()
        # The program travels by value: the server does not have this package.
        register(program)
        self.dtype = self._ask_dtype()
        if dtype and dtype != self.dtype:
            raise PreflightError(
                f'{server.host} runs {name} in {self.dtype}, the study says {dtype}; set dtype = "{self.dtype}"'
            )

    @property
    def model(self) -> Any:
        """The nnsight model of shapes without weights."""
        return self._model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Tokenizer of the model."""
        return self._model.tokenizer

    def submit(self, job: Job) -> str:
        """Send a job; the ticket is the server's id for it."""
        ticket = self._send(job.payload)
        self._sent[ticket] = job.id
        return ticket

    def collect(self, ticket: str) -> Readout:
        """Wait for a job's values, through lost connections.

        A job in which the model's process ended is lost, to be sent again once the model is back. When that happens to
        one job again and again, although the model comes back each time, the job is to blame and has failed.
        """
        try:
            values, seconds = self._wait(ticket)
        except _CrashError as error:
            job = self._sent.get(ticket, "")
            self._crashes[job] += 1
            self._await_model()
            if self._crashes[job] > _MOST_CRASHES:
                raise JobError(f"the model's process ended {self._crashes[job]} times in it ({error})") from error
            raise LostJobError(str(error)) from error
        if any(value.dtype != torch.float32 or value.ndim != 2 for value in values):
            kinds = ", ".join(sorted({f"{value.dtype} of {value.ndim} dimensions" for value in values}))
            raise LostJobError(f"job {ticket} brought back {kinds}, not tables of float32")
        return Readout(split_values(values), seconds)

    def _ask_dtype(self) -> str:
        """The precision in which the server holds the model. The first job: it asks for the model to be deployed."""
        try:
            (empty,) = self._probed()
        except JobError as error:
            raise PreflightError(f"{self._server.host} cannot run {self.info.name}: {error}") from error
        return str(empty.dtype).removeprefix("torch.")

    def _probe(self) -> dict[str, Any]:
        return {"task": "probe", "blocks": family_of(self.info.family).blocks}

    def _probed(self) -> list[torch.Tensor]:
        """What a probe brings back; it is sent again while the model's process ends."""
        for _ in range(_MOST_CRASHES):
            with contextlib.suppress(_CrashError, LostJobError):
                return self._wait(self._send(self._probe()))[0]
            self._await_model()
        return self._wait(self._send(self._probe()))[0]

    def _await_model(self) -> None:
        """Return once the model answers again.

        Raises:
            TransportError: it did not, for as long as a lost connection is borne.
        """
        end = time.monotonic() + self._retry_for
        while time.monotonic() < end:
            self._notify("the model's process ended on the server, waiting for it")
            time.sleep(_CRASH_PAUSE)
            with contextlib.suppress(JobError, LostJobError):
                self._wait(self._send(self._probe()))
                return
        raise TransportError(
            f"{self.info.name} has not come back on {self._server.host} within {self._retry_for:.0f} s; what is "
            "measured is kept, run the same command again later"
        )

    def _send(self, payload: dict[str, Any]) -> str:
        return self._retry(self._send_once, payload)

    def _send_once(self, payload: dict[str, Any]) -> str:
        remote = self._remote(None)
        with _translated(self._server):
            program.execute(self._model, payload, remote)
        return str(remote.job_id)

    def _wait(self, ticket: str) -> tuple[list[torch.Tensor], float]:
        """A job's tensors and the seconds it took on the server."""
        remote = self._remote(ticket)
        pause = 0.05
        while True:
            result = self._retry(self._poll_once, remote)
            if result is not None:
                seconds = float((remote.meta or {}).get("runtime") or 0.0)
                self.traffic.seconds += seconds
                return result["values"], seconds
            silence = time.monotonic() - remote.heard
            if remote.status is None and silence > min(self._patience, _UNKNOWN_FOR):
                raise LostJobError(f"the server does not know job {ticket}")
            if silence > self._patience:
                raise LostJobError(f"no news of job {ticket} for {self._patience:.0f} s; it is given up")
            time.sleep(pause)
            pause = min(pause * 1.5, 2.0)

    def _poll_once(self, remote: _Remote) -> dict[str, Any] | None:
        with _translated(self._server):
            result: dict[str, Any] | None = remote()
        return result

    def _remote(self, ticket: str | None) -> _Remote:
        server = self._server
        env = self._model._remoteable_get_env()
        return _Remote(self._model_key, server, env, ticket, self._notify, self.traffic)


class _Remote(RemoteBackend):  # type: ignore[misc]  # nnsight is untyped
    """nnsight's non-blocking remote backend, with its status lines sent to us and the time of the last news kept."""

    def __init__(
        self,
        model_key: str,
        server: Server,
        env: dict[str, Any],
        ticket: str | None,
        notify: Callable[[str], None],
        traffic: Traffic,
    ) -> None:
        super().__init__(model_key, host=server.host, api_key=server.key, env=env, blocking=False, job_id=ticket)
        self.api_key = server.key  # and no other that nnsight may know
        self.display.enabled = self.verbose = False  # nnsight takes a `-v` of whatever command for its own
        self.heard = time.monotonic()
        self._notify, self._traffic = notify, traffic
        self._said = ""

    def _serialize(self, tracer: Any) -> bytes:
        blob: bytes = super()._serialize(tracer)
        self._traffic.jobs += 1
        self._traffic.up += len(blob)
        return blob

    def finalize(self, content: bytes) -> Any:
        """A result's dict of tensors, read without running what else it may hold, unlike nnsight's own reading.

        Raises:
            LostJobError: it is damaged, or holds more than tensors.
        """
        self._traffic.down += len(content)
        try:
            if self.compress:
                content = zstandard.ZstdDecompressor().decompress(content)
            found = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except (zstandard.ZstdError, pickle.UnpicklingError, *_DAMAGE) as error:
            raise LostJobError(f"the result of job {self.job_id} cannot be read as tensors alone") from error
        values = found.get("values") if isinstance(found, dict) else None
        if not isinstance(values, list) or not all(isinstance(value, torch.Tensor) for value in values):
            raise LostJobError(f"the result of job {self.job_id} is no list of tensors")
        return found

    def note(self, response: Any) -> bool:
        line = f"{response.status.value.lower()}: {plain(response.description or '', self.api_key)}".rstrip(": ")
        if line != self._said:
            self._said, self.heard = line, time.monotonic()
            self._notify(line)
        return bool(super().note(response))


class _CrashError(JobError):
    """The process that holds the model ended while it had the job, because of the job or of something else."""


@contextlib.contextmanager
def _translated(server: Server) -> Generator[None]:
    """nnsight raises one error for lost connections, refused requests and failed jobs; tell them apart."""
    try:
        yield
    except RemoteError as error:
        message, cause = plain(str(error), server.key), error.__cause__
        if isinstance(cause, httpx.HTTPStatusError):
            raise _refused(message, cause.response.status_code) from error
        if isinstance(cause, httpx.HTTPError):
            raise TransportError(message) from error
        raise (_CrashError if _CRASHED in message else JobError)(message) from error
    except httpx.HTTPStatusError as error:
        status, asked = error.response.status_code, str(error.request.url)
        if status in _TRANSIENT or status >= 500:
            raise TransportError(f"{server.host} answers {status}") from error
        if asked.startswith(server.host + "/response/") and status in (401, 403):
            raise PreflightError(f"{server.host} refuses the API key ({status}); set NDIF_API_KEY") from error
        raise LostJobError(f"the result is no longer kept ({status})") from error
    except httpx.HTTPError as error:
        raise TransportError(plain(str(error), server.key) or type(error).__name__) from error


def _refused(message: str, status: int) -> BackendError:
    """What an HTTP error to a request means: later, smaller, or not at all."""
    if status in _TRANSIENT or status >= 500:
        return TransportError(message)
    if status == 413:
        return JobError(message)
    return PreflightError(f"the server refuses requests ({status}): {message}")
