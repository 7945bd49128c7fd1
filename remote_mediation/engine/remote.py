"""Jobs on an NDIF server: the same program with another nnsight backend. Foreign exceptions end here."""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import httpx
import torch
import zstandard
from nnsight import TransformersModel
from nnsight.intervention.backends.remote import RemoteBackend
from nnsight.ndif import register
from nnsight.schema.request import RequestModel

from remote_mediation.engine import program
from remote_mediation.engine.answers import changes
from remote_mediation.engine.backend import split_values
from remote_mediation.engine.exchange import MOST_RESULT, OddError, RefusedError, Server, download, exchange, plain
from remote_mediation.engine.jobs import Job, Readout
from remote_mediation.engine.server import preflight, refuse_bad
from remote_mediation.errors import JobError, LostJobError, PreflightError, TransportError
from remote_mediation.models import load_configuration, load_info, load_tokenizer
from remote_mediation.sites import family_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# ndif's words when the process that holds the model ended while a job was in it.
_CRASHED = "Error submitting request to model deployment"
# So often a job may be in the model's process when that ends, before the job is taken to be the reason.
_MOST_CRASHES = 2
# Seconds until a model whose process ended is asked again; it takes about 10 to load a small one.
_CRASH_PAUSE = 5.0
# Seconds without news after which a job is given up, by what was last said of it; the empty state is none so far.
_DEADLINES = {
    "": 120.0,
    "RECEIVED": 600.0,
    "QUEUED": 7200.0,
    "PROVISIONING": 3600.0,
    "DEPLOYING": 3600.0,
    "DISPATCHED": 1800.0,
    "RUNNING": 3600.0,
}
_OTHER_DEADLINE = 1800.0
# Seconds without news after which a queued job is doubted: a small one is sent after it, and must not be done before.
_DOUBTED = 300.0
# Seconds between two tries over a lost connection, at first and at most.
_PAUSES = (0.5, 20.0)
# Seconds for which a server that says so is left alone, all times together.
_LONGEST_WAIT = 3600.0
_SEND_TIMEOUT = httpx.Timeout(10.0, write=60.0, read=300.0)
_POLL_TIMEOUT = httpx.Timeout(10.0, read=30.0)
# No job takes less: a forward run alone does not.
_LEAST_S = 1e-4
_ID = re.compile(r"[A-Za-z0-9_][\w.-]{0,199}")
_ZSTD = b"\x28\xb5\x2f\xfd"

_Found = TypeVar("_Found")


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


class _News(NamedTuple):
    """What a server says of a job."""

    state: str
    """Empty where it says nothing (yet)."""
    line: str
    """For the user."""
    seconds: float
    """Time that it took on the server, once it is done."""
    result: str
    """Address of what it brought back, once it is done."""


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
        retry_for: float = 300.0,
    ) -> None:
        """Build the model's shape and make sure that the server runs it, in the precision that the study says.

        notify: is told what the server says of a job. dtype: the study's precision, None for any. retry_for: seconds
        for which a lost connection is tried again, and a model whose process ended is waited for.

        Raises:
            PreflightError: the server cannot be reached, refuses the key, or cannot run the model as it is.
            ModelError: the model's configuration or tokenizer cannot be had here.
            SiteError: the model's family is not in the table.
        """
        self.info = load_info(name, revision)
        if not load_configuration(name, revision).return_dict:
            raise PreflightError(
                f"{name} has return_dict = false in its config.json, with which a server can run nothing of it; have "
                "it served without, or run it locally"
            )
        if not family_of(self.info.family).causal:
            raise PreflightError(
                f"{name} is of a class that takes images too, of which nnsight sends no text alone; run it locally"
            )
        refuse_bad(preflight(server, name, revision))
        self._server, self._notify, self._retry_for = server, notify, retry_for
        # In transformers 5.24 a pipeline around a model without weights finds no tokenizer by itself.
        self._model = TransformersModel(
            name,
            revision=revision or "main",
            task="text-generation",
            tokenizer=load_tokenizer(name, revision),
            trust_remote_code=False,
        )
        self._model_key = self._model.to_model_key()
        self.traffic = Traffic()
        self._sent: dict[str, str] = {}
        self._crashes: Counter[str] = Counter()
        # The program travels by value: the server does not have this package.
        register(program)
        self.dtype, self.served = self._ask_dtype()
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
        if not _ID.fullmatch(ticket):  # it comes from a file of the run folder, where it stands as text
            raise LostJobError(f"{plain(ticket, self._server.key)!r} is the name of no job")
        try:
            values, made, seconds = self._waited(ticket)
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
        self._refuse_change(made)
        return Readout(split_values(values), seconds, made.get("job", ""))

    def _waited(self, ticket: str) -> tuple[list[torch.Tensor], dict[str, str], float]:
        """A job's values, what made them, and the seconds it took.

        Raises:
            LostJobError: the values are not those that were made.
        """
        found, seconds = self._wait(ticket)
        try:
            values, made = program.opened(found)
        except ValueError as error:
            raise LostJobError(f"job {ticket} brought back {error}") from error
        return values, {name: plain(value, self._server.key) for name, value in made.items()}, seconds

    def _refuse_change(self, made: dict[str, str]) -> None:
        """Let no job of this run be made by other means than those before.

        Raises:
            PreflightError: what the server runs has changed.
        """
        changed = changes(self.served, made)
        if changed:
            raise PreflightError(
                f"{self._server.host} has changed while the study ran: {changed}; results of both do not belong "
                "together, choose another --out"
            )

    def _ask_dtype(self) -> tuple[str, dict[str, str]]:
        """The precision in which the server holds the model, and what runs it. The first job: it deploys the model."""
        try:
            kind, made = self._probed()
        except (JobError, LostJobError) as error:
            raise PreflightError(f"{self._server.host} cannot run {self.info.name}: {error}") from error
        served = {name: value for name, value in made.items() if name != "job"}
        return str(kind.dtype).removeprefix("torch."), {"host": self._server.host, **served}

    def _probe(self) -> dict[str, Any]:
        return {"task": "probe", "blocks": family_of(self.info.family).blocks}

    def _probed(self) -> tuple[torch.Tensor, dict[str, str]]:
        """What a probe brings back, and what made it; it is sent again while the model's process ends."""
        for _ in range(_MOST_CRASHES):
            try:
                return self._probed_once()
            except LostJobError:
                continue
            except _CrashError:
                self._await_model()
        return self._probed_once()

    def _probed_once(self) -> tuple[torch.Tensor, dict[str, str]]:
        values, made, _ = self._waited(self._send(self._probe()))
        if len(values) != 1:
            raise LostJobError(f"a probe brought back {len(values)} tensors, not one")
        if made["job"]:  # its values would be taken for the model's precision
            raise LostJobError(f"the answer to a probe is that to job {made['job']}")
        return values[0], made

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
        return self._retry(partial(self._send_once, payload))

    def _send_once(self, payload: dict[str, Any]) -> str:
        sender = _Sender(self._model_key, self._server, self._model._remoteable_get_env(), self.traffic)
        program.execute(self._model, payload, sender)
        return str(sender.job_id)

    def _wait(self, ticket: str) -> tuple[list[torch.Tensor], float]:
        """A job's tensors and the seconds it took on the server."""
        state, heard, pause, later = "", time.monotonic(), 0.05, ""
        said, known = "", set[str]()  # of the job last, and at any time: what goes back and forth is no news
        while True:
            news = self._retry(partial(self._ask_of, ticket))
            if news.state == "COMPLETED":
                content = self._retry(partial(download, news.result))
                self.traffic.down += len(content)
                self.traffic.seconds += news.seconds
                return tensors_of(content, ticket), news.seconds
            if news.line != said:
                said = news.line
                self._notify(said)
            if news.line not in known:
                heard, later = time.monotonic(), ""
                known.add(news.line)
            state = news.state or state
            silence = time.monotonic() - heard
            self._check_deadline(ticket, state, said, silence)
            if state == "QUEUED" and silence > _DOUBTED:
                later = later or self._send(self._probe())
                self._check_overtaken(ticket, later)
            time.sleep(pause)
            pause = min(pause * 1.5, 2.0)

    def _check_deadline(self, ticket: str, state: str, said: str, silence: float) -> None:
        """Give up a job of which nothing was heard for too long.

        Raises:
            LostJobError: it is sent again then.
        """
        if silence <= _DEADLINES.get(state, _OTHER_DEADLINE):
            return
        if not state:
            raise LostJobError(f"{self._server.host} does not know job {ticket}")
        raise LostJobError(f'no news of job {ticket} for {silence:.0f} s after "{said}"; it is given up')

    def _check_overtaken(self, ticket: str, later: str) -> None:
        """Give up a queued job behind which another one is done: jobs of a model run in the order of their arrival.

        A server whose object store was lost says of the jobs in it for ever what it said last.

        Raises:
            LostJobError: it is sent again then.
        """
        overtaken = False
        with contextlib.suppress(JobError, LostJobError):  # of the later one, which is not what is asked about
            overtaken = self._retry(partial(self._ask_of, later)).state == "COMPLETED"
        if overtaken and self._retry(partial(self._ask_of, ticket)).state == "QUEUED":
            raise LostJobError(f"job {ticket} is still queued and job {later}, sent after it, is done; it is given up")

    def _ask_of(self, ticket: str) -> _News:
        """What the server says of a job.

        Raises:
            JobError: it failed.
            LostJobError: the answer is none about a job, or it is done and left nothing.
            TransportError, PreflightError: the server cannot be asked, or answers about another job.
        """
        server = self._server
        try:
            answer = exchange(server, "GET", f"/response/{ticket}", _POLL_TIMEOUT)
        except RefusedError as error:
            if error.status == 404:
                return _News("", "", 0.0, "")
            raise
        except OddError as error:
            raise LostJobError(str(error)) from error
        if answer.get("id") not in (None, ticket):
            about = plain(str(answer["id"]), server.key)
            raise TransportError(f"{server.host} answers about job {about} where job {ticket} was asked for")
        state, description = answer.get("status"), answer.get("description") or ""
        if not isinstance(state, str) or not state.strip():
            raise LostJobError(f"{server.host} says no state of job {ticket}, but {plain(str(state), server.key)}")
        state = state.strip().upper()
        message = plain(str(description), server.key)
        if state == "ERROR":
            raise (_CrashError if _CRASHED in message else JobError)(message or "the job failed, without a reason")
        result = answer.get("data")
        if state == "COMPLETED" and not _is_address(result):
            raise LostJobError(f"{server.host} says that job {ticket} is done and not where its result lies")
        line = f"{plain(state, server.key).lower()}: {message}".rstrip(": ")
        return _News(state, line, _seconds(answer.get("meta")), str(result))

    def _retry(self, act: Callable[[], _Found]) -> _Found:
        """Do something, again and again while the connection is lost; a server that asks for a pause gets it.

        Raises:
            TransportError: it stays lost, or the server asks for too long a pause.
        """
        end, pause, asked = time.monotonic() + self._retry_for, _PAUSES[0], 0.0
        while True:
            try:
                return act()
            except TransportError as error:
                asked += error.wait
                if asked > _LONGEST_WAIT:
                    raise TransportError(f"{error}; it asks to be left alone for {error.wait:.0f} s") from error
                end += error.wait
                if time.monotonic() > end:
                    raise
                self._notify(f"connection lost, trying again ({error})")
                time.sleep(max(pause, error.wait))
                pause = min(2 * pause, _PAUSES[1])


class _Sender(RemoteBackend):  # type: ignore[misc]  # nnsight is untyped
    """nnsight's backend as far as it makes a request of a block; sending it is ours."""

    def __init__(self, model_key: str, server: Server, env: dict[str, Any], traffic: Traffic) -> None:
        super().__init__(model_key, host=server.host, api_key=server.key, env=env, blocking=False)
        self.display.enabled = self.verbose = False  # nnsight takes a `-v` of whatever command for its own
        self._server, self._traffic = server, traffic

    def submit(self, tracer: Any) -> None:
        """Send the block; `job_id` is the server's name for the job then.

        Raises:
            TransportError, PreflightError, JobError: as `exchange`; the answer has no such name.
        """
        blob: bytes = self._serialize(tracer)
        self._traffic.jobs += 1
        self._traffic.up += len(blob)
        request = RequestModel(model_key=self.model_key, compress=self.compress, env=self.env)
        answer = exchange(
            self._server,
            "POST",
            "/request",
            _SEND_TIMEOUT,
            {
                "ndif-timestamp": repr(time.time()),
                "nnsight-version": metadata.version("nnsight"),
                "python-version": sys.version,
            },
            data={"data": request.metadata()},
            files={"blob": ("request", blob, "application/octet-stream")},
        )
        if not isinstance(answer.get("id"), str) or not _ID.fullmatch(answer["id"]):
            said = plain(json.dumps(answer), self._server.key)
            raise PreflightError(f"{self._server.host} takes a job and gives it no id: {said}; check NDIF_HOST")
        self.job_id = answer["id"]


class _CrashError(JobError):
    """The process that holds the model ended while it had the job, because of the job or of something else."""


def tensors_of(content: bytes, ticket: str) -> list[torch.Tensor]:
    """A result's tensors, read without running what else it may hold, unlike nnsight's own reading.

    Raises:
        LostJobError: it is damaged, or holds more than tensors.
    """
    try:
        if content.startswith(_ZSTD):
            if zstandard.frame_content_size(content) > MOST_RESULT:
                raise ValueError("larger than any result")
            content = zstandard.ZstdDecompressor().decompress(content)
        _refuse_packed(content)
        found = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever foreign bytes make torch raise
        raise LostJobError(f"the result of job {ticket} cannot be read as tensors alone") from error
    values = found.get("values") if isinstance(found, dict) else None
    if not isinstance(values, list) or not all(map(_is_table, values)):
        raise LostJobError(f"the result of job {ticket} is no list of tensors that hold their numbers")
    return values


def _refuse_packed(content: bytes) -> None:
    """torch stores its numbers as they are: what would become more than it is was packed by somebody else.

    Raises:
        ValueError, BadZipFile: it was, or it is no archive of torch's.
    """
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        if sum(entry.file_size for entry in archive.infolist()) > len(content):
            raise ValueError("larger than it is")


def _is_table(value: Any) -> bool:
    """Whether this is a tensor like those of a job: no class of its own, no gradient, and as many numbers as it says.

    A sparse one, one without numbers (on `meta`) or one that repeats a few takes as much memory as it likes.
    """
    if type(value) is not torch.Tensor or value.layout is not torch.strided or value.device.type != "cpu":
        return False
    if value.requires_grad or value.is_quantized or value.is_nested or value.is_complex() or value.is_neg():
        return False
    return bool(value.numel() * value.element_size() <= value.untyped_storage().nbytes())


def _is_address(result: Any) -> bool:
    """Whether a result lies somewhere that can be asked for it."""
    return isinstance(result, str) and result.startswith(("http://", "https://"))


def _seconds(meta: Any) -> float:
    """Time that a job took on the server, as it says; 0 where it does not, or says what cannot be."""
    runtime = meta.get("runtime") if isinstance(meta, dict) else None
    return float(runtime) if isinstance(runtime, (int, float)) and _LEAST_S <= runtime < 1e9 else 0.0
