"""What can come back in place of an answer: a study survives it, or ends in one line that says what came from where.

Every fault stands between the client and a small server that runs real jobs (small_ndif.py).
"""

from __future__ import annotations

import contextlib
import gzip
import io
import itertools
import json
import platform
import re
import socket
import ssl
import subprocess
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import pandas as pd
import pytest
import torch
import zstandard
from fakes import records, write_pairs
from nnsight.modeling import huggingface
from oracle import Subject, token_pair
from small_ndif import KEY, Answer, Fault, SmallNdif, answer, packed, resealed, unpacked

from remote_mediation.config import StudyConfig
from remote_mediation.engine import exchange as exchange_module
from remote_mediation.engine import remote as remote_module
from remote_mediation.engine.exchange import Server, download, exchange
from remote_mediation.engine.jobs import Job
from remote_mediation.engine.local import LocalBackend
from remote_mediation.engine.program import checksum
from remote_mediation.engine.remote import NdifBackend, tensors_of
from remote_mediation.engine.rows import swap
from remote_mediation.errors import BackendError, JobError, LostJobError, PreflightError, StoreError, TransportError
from remote_mediation.outcomes import ResponseOutcome
from remote_mediation.sites import Site
from remote_mediation.store import Store
from remote_mediation.study import run_study

HTML = answer("<!doctype html><html>Please log in to the network</html>", Content_Type="text/html")
BEFORE = 2  # jobs of a study that pass before a fault


class Client:
    """A backend on a small server, and a study to measure on it."""

    def __init__(self, model: LocalBackend, pairs: Path) -> None:
        self.said: list[str] = []
        self.local, self.small = model, SmallNdif(model.model)
        self.study = StudyConfig(
            model=model.info.name,
            pairs=str(pairs),
            backend="ndif",
            analyses=["layers"],
            positions={"layers": ["last"]},
            outcome="logit_diff",
            logit_diff={"plus": ["sure"], "minus": ["sorry"]},
            statistics={"resamples": 100},
            job_seconds=1e-9,
        )
        self.backend = NdifBackend(self.study.model, "", self.small.server, self.note, retry_for=0.5)

    def note(self, line: str) -> None:
        self.said.append(line)

    def run(self, folder: Path, fault: Fault = lambda path, found: found) -> Run:
        """Measure the study with a fault on the way."""
        self.said.clear()
        self.small.fault, before = fault, self.small.jobs()
        effects = run_study(self.study, self.backend, Store.create(folder, self.study.identity())).effects
        assert not any("\n" in line or KEY in line for line in self.said)
        return Run(effects, self.small.jobs() - before)

    def measure(self, job: Job) -> list[np.ndarray[Any, Any]]:
        """Values of one job."""
        self.said.clear()
        values = self.backend.collect(self.backend.submit(job)).values
        assert not any("\n" in line or KEY in line for line in self.said)
        return values

    def end(self, folder: Path, fault: Fault) -> BackendError:
        """The error in which the study ends: one line without a key."""
        with pytest.raises(BackendError) as caught:
            self.run(folder, fault)
        assert KEY not in str(caught.value)
        assert "\n" not in str(caught.value)
        return caught.value


class Run(NamedTuple):
    """A measured study."""

    effects: pd.DataFrame
    jobs: int
    """Jobs that the server was sent."""


@pytest.fixture(scope="module")
def client(subject: Callable[[str], Subject], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    model = subject("llama_chat").backend
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", "127.0.0.1")
        patch.setitem(huggingface._ID_CACHE, model.info.name, "org/tiny")
        patch.setattr(remote_module, "_PAUSES", (0.001, 0.01))
        patch.setattr(remote_module, "_CRASH_PAUSE", 0.001)
        found = Client(model, write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", records()[:4]))
        yield found
        found.small.close()


@pytest.fixture(scope="module")
def job(subject: Callable[[str], Subject]) -> Job:
    """Rows on one pair."""
    pair, model = token_pair("pair", answers=(3, 2)), subject("llama_chat")
    sites = [Site("layer_output", 1, "last"), Site("mlp_output", 2, "edit")]
    rows = [swap(pair, site, side, model.info) for site in sites for side in (0, 1)]
    return model.plan([pair], rows, ResponseOutcome())[0]


@pytest.fixture(scope="module")
def whole(client: Client, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The study undisturbed."""
    found = client.run(tmp_path_factory.mktemp("whole") / "run")
    assert found.jobs > BEFORE + 1
    assert found.effects["nie"].abs().max() > 0.1
    return found


def at(kind: str, spoil: Callable[[Answer], Answer | None], times: int = 1, after: int = BEFORE) -> Fault:
    """A fault in the answers to one kind of request from a job on, so many times."""
    seen = {"requests": 0, "times": 0}

    def fault(path: str, found: Answer) -> Answer | None:
        seen["requests"] += path == "/request"
        mine = path.startswith(f"/{kind}") and seen["requests"] > after and found.status == 200
        if not mine or seen["times"] >= times:
            return found
        seen["times"] += 1
        return spoil(found)

    return fault


def always(kind: str, spoil: Callable[[Answer], Answer | None]) -> Fault:
    return at(kind, spoil, times=10**9, after=0)


def changed(**fields: Any) -> Callable[[Answer], Answer]:
    """A JSON answer with other fields; those that are `...` are left out."""

    def spoil(found: Answer) -> Answer:
        content = {**json.loads(found.body), **fields}
        return answer({name: value for name, value in content.items() if value is not ...})

    return spoil


def values(change: Callable[[list[torch.Tensor]], list[torch.Tensor]]) -> Callable[[Answer], Answer]:
    """A result with other values, and with the checksum of these."""

    def spoil(found: Answer) -> Answer:
        *known, weights, text, _ = unpacked(found.body)["values"]
        return answer(packed({"values": resealed([*change(known), weights, text])}))

    return spoil


def tensors(change: Callable[[list[torch.Tensor]], list[torch.Tensor]]) -> Callable[[Answer], Answer]:
    """A result with other tensors."""
    return lambda found: answer(packed({"values": change(unpacked(found.body)["values"])}))


def said(name: str, value: str) -> Callable[[Answer], Answer]:
    """A result made by something else."""

    def change(found: list[torch.Tensor]) -> list[torch.Tensor]:
        lines = bytes(found[-2].tolist()).decode().splitlines()
        text = "\n".join(f"{name} {value}" if line.startswith(f"{name} ") else line for line in lines)
        return resealed([*found[:-2], torch.tensor(list(text.encode()), dtype=torch.uint8)])

    return tensors(change)


def flipped(value: torch.Tensor) -> torch.Tensor:
    """A table with the lowest bit of its last number flipped."""
    changed = value.clone()
    changed.view(torch.int32)[-1, -1] ^= 1
    return changed


def deflated(result: bytes) -> bytes:
    """A result whose numbers, many zeros, are packed once more: some hundred bytes that become 4 MB."""
    values, packed_again = io.BytesIO(), io.BytesIO()
    torch.save({"values": [torch.zeros(10**6), *unpacked(result)["values"]]}, values)
    with zipfile.ZipFile(values) as old, zipfile.ZipFile(packed_again, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return packed_again.getvalue()


def unzipped(result: bytes) -> bytes:
    """A result as torch wrote it before it wrote archives."""
    buffer = io.BytesIO()
    torch.save(unpacked(result), buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


PASSING: dict[str, Callable[[Answer], Answer | None]] = {
    "disconnected": lambda found: None,
    "empty": lambda found: answer(b""),
    "blank": lambda found: answer(b" \n"),
    "page": lambda found: HTML,
    "cut JSON": lambda found: answer(found.body[: len(found.body) // 2]),
    "cut on the way": lambda found: found._replace(cut=len(found.body) // 2),
    "text": lambda found: answer("OK"),
    "no UTF-8": lambda found: answer(b"\xff\xfe\x00"),
    "deep JSON": lambda found: answer("[" * 100_000),
    "no gzip": lambda found: answer(found.body, Content_Encoding="gzip"),
    "cut gzip": lambda found: answer(gzip.compress(found.body)[:20], Content_Encoding="gzip"),
    "408": lambda found: answer({"detail": "Timeout"}, 408),
    "425": lambda found: answer({"detail": "Too early"}, 425),
    "429": lambda found: answer({"detail": "Slow down"}, 429),
    "429 with a wait": lambda found: answer({"detail": "Slow down"}, 429, Retry_After="0"),
    "500": lambda found: answer("Internal Server Error", 500),
    "502 page": lambda found: HTML._replace(status=502),
    "503": lambda found: answer({"detail": "compute backend is reconnecting"}, 503),
    "504": lambda found: answer(None, 504),
    "520": lambda found: answer([], 520),
}
OF_A_RESULT = {"cut on the way", "disconnected", "no gzip", "408", "429", "500", "502 page", "503", "504", "520"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *[(kind, name) for kind in ("request", "response") for name in PASSING],
        *[("results", name) for name in PASSING if name in OF_A_RESULT],
    ],
)
def test_what_passes_is_tried_again(
    client: Client, job: Job, kind: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client.backend, "_retry_for", 60.0)  # however slow the machine is
    client.small.fault, before = at(kind, PASSING[name], times=2, after=0), client.small.jobs()
    for found, wanted in zip(client.measure(job), client.local.collect(client.local.submit(job)).values, strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-6)
    assert sum("connection lost, trying again" in line for line in client.said) == 2
    assert client.small.jobs() - before == (3 if kind == "request" else 1)  # taken before the answer was spoilt


LOST: dict[str, tuple[str, Callable[[Answer], Answer | None]]] = {
    "null": ("response", lambda found: answer(None)),
    "list": ("response", lambda found: answer([1, 2])),
    "number": ("response", lambda found: answer(7)),
    "string": ("response", lambda found: answer('"COMPLETED"')),
    "no state": ("response", changed(status=...)),
    "state null": ("response", changed(status=None)),
    "state a list": ("response", changed(status=["COMPLETED"])),
    "done without data": ("response", changed(data=...)),
    "done with null": ("response", changed(data=None)),
    "done with nothing": ("response", changed(data="")),
    "done with a number": ("response", changed(data=1)),
    "done with values": ("response", changed(data={"values": [1.0]})),
    "result in a file": ("response", changed(data="file:///etc/passwd")),
    "result nowhere": ("response", changed(data="results/job-1")),
    "result at no address": ("response", changed(data="http://host:port/x")),
    "result at no host": ("response", changed(data="http://")),
    "result at no port": ("response", changed(data="http://127.0.0.1:99999/x")),
    "result at half a letter": ("response", changed(data="http://127.0.0.1/\ud800")),
    "result gone": ("results", lambda found: answer("", 404)),
    "result expired": ("results", lambda found: answer("<Error>", 403)),
    "result moved": ("results", lambda found: answer("", 302, Location="http://127.0.0.1:9/")),
    "result empty": ("results", lambda found: answer(b"")),
    "result a page": ("results", lambda found: HTML),
    "result cut": ("results", lambda found: answer(found.body[: len(found.body) // 2])),
    "result flipped": ("results", lambda found: answer(found.body[:300] + bytes(99) + found.body[399:])),
    "result of another job": ("results", lambda found: answer(packed({"values": [torch.zeros(1, 2)]}))),
    "no values": ("results", values(lambda found: [])),
    "values in float64": ("results", values(lambda found: [value.double() for value in found])),
    "values of one row": ("results", values(lambda found: [value[0] for value in found])),
    "values too few": ("results", values(lambda found: [value[:-1] for value in found])),
    "a bit of a value": ("results", tensors(lambda found: [flipped(found[0]), *found[1:]])),
    "no checksum": ("results", tensors(lambda found: found[:-1])),
    "a checksum of nothing": ("results", tensors(lambda found: [*found[:-1], found[-1][:0]])),
    "a checksum alone": ("results", tensors(lambda found: found[-1:])),
    "weights beyond numbers": (
        "results",
        tensors(lambda found: resealed([*found[:-3], torch.tensor([torch.inf]), found[-2]])),
    ),
    "a checksum in floats": ("results", tensors(lambda found: [*found[:-1], found[-1].double()])),
    "sparse values": ("results", tensors(lambda found: [found[0].to_sparse(), *found[1:]])),
    "no numbers": ("results", tensors(lambda found: [found[0].to("meta"), *found[1:]])),
    "numbers without end": ("results", tensors(lambda found: [torch.zeros(1).expand(10**7, 10**6), *found[1:]])),
    "values with a gradient": ("results", tensors(lambda found: [found[0].requires_grad_(), *found[1:]])),
    "a parameter": ("results", tensors(lambda found: [torch.nn.Parameter(found[0]), *found[1:]])),
    "complex values": ("results", tensors(lambda found: [found[0].to(torch.complex64), *found[1:]])),
    "packed in its archive": ("results", lambda found: answer(zstandard.compress(deflated(found.body)))),
    "no archive": ("results", lambda found: answer(zstandard.compress(unzipped(found.body)))),
    "packed twice": (
        "results",
        lambda found: answer(gzip.compress(gzip.compress(found.body)), Content_Encoding="gzip, gzip"),
    ),
    "packed otherwise": ("results", lambda found: answer(zstandard.compress(found.body), Content_Encoding="zstd")),
    "other weights": ("results", tensors(lambda found: [*found[:-3], found[-3] + 1, *found[-2:]])),
    "nobody's": ("results", tensors(lambda found: resealed([*found[:-2], torch.zeros(0, dtype=torch.uint8)]))),
    "no text": ("results", tensors(lambda found: resealed([*found[:-2], torch.full((9,), 255, dtype=torch.uint8)]))),
    "numbers for text": ("results", tensors(lambda found: resealed([*found[:-2], torch.full((9,), 0.5)]))),
    "nothing made": ("results", tensors(lambda found: resealed([]))),
    "another job's": ("results", said("job", "0123456789abcdef01234567")),
    "values too many": ("results", values(lambda found: [torch.cat([value, value]) for value in found])),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["response", "results"])
def test_a_job_whose_answer_is_none_is_sent_again(client: Client, whole: Run, tmp_path: Path, kind: str) -> None:
    """Each time one fault more, to three jobs of four."""
    spoils = [spoil for where, spoil in LOST.values() if where == kind]
    left, seen = iter(spoils), list[str]()

    def fault(path: str, found: Answer) -> Answer | None:
        if not path.startswith(f"/{kind}") or found.status != 200 or path in seen:
            return found
        seen.append(path)
        spoil = next(left, None) if len(seen) % 4 else None
        return spoil(found) if spoil else found

    found = client.run(tmp_path / "run", fault)
    pd.testing.assert_frame_equal(found.effects, whole.effects)
    assert next(left, None) is None
    assert found.jobs == whole.jobs + len(spoils)


ORDERS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "two rows for each other": lambda table: table[[0, 1, 3, 2, *range(4, len(table))]],
    "rows from behind": lambda table: table.flip(0),
    "rows moved on by one": lambda table: table.roll(1, 0),
    "each row's values from behind": lambda table: table.flip(1),
    "rows for columns": lambda table: table.T.reshape(table.shape),
}


@pytest.mark.parametrize("order", ORDERS)
def test_values_in_another_order_are_none(client: Client, job: Job, order: str) -> None:
    mixed = tensors(lambda found: [ORDERS[order](found[0]), *found[1:]])
    client.small.fault = at("results", mixed, after=0)
    with pytest.raises(LostJobError, match="their checksum is another one"):
        client.measure(job)
    for found, wanted in zip(client.measure(job), client.local.collect(client.local.submit(job)).values, strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_every_order_of_a_jobs_rows_has_its_own_checksum(client: Client, job: Job) -> None:
    """Some of them are equal: what decides everything after it, swapped, gives what the other prompt gives."""
    table = torch.tensor(np.stack(client.local.collect(client.local.submit(job)).values))
    assert (len(table), len(torch.unique(table, dim=0))) == (6, 4)
    tables = [table[list(order)] for order in itertools.permutations(range(len(table)))]
    sums = {one.numpy().tobytes(): int(checksum([one])) for one in tables}
    assert len(set(sums.values())) == len(sums) == 720 / 2 / 2


# What a study ends in when a fault stays: kind of request, what happens to it, the error, and what is said.
STAYING: dict[str, tuple[str, Callable[[Answer], Answer | None], type[BackendError], str]] = {
    "page": ("request", lambda found: HTML, TransportError, r"answers /request with a web page$"),
    "empty": ("request", lambda found: answer(b""), TransportError, r"answers /request with nothing$"),
    "text": ("request", lambda found: answer("OK"), TransportError, r"with 2 bytes that are no JSON$"),
    "null": ("request", lambda found: answer(None), PreflightError, r"answers /request with null, not as an NDIF"),
    "list": ("request", lambda found: answer([]), PreflightError, r"answers /request with a list, not as an NDIF"),
    "no id": ("request", changed(id=...), PreflightError, r"takes a job and gives it no id: \{.*check NDIF_HOST$"),
    "id a path": ("request", changed(id="../status"), PreflightError, r"takes a job and gives it no id"),
    "id a number": ("request", changed(id=3), PreflightError, r"takes a job and gives it no id"),
    "redirect": (
        "request",
        lambda found: answer("", 307, Location="https://elsewhere/request"),
        PreflightError,
        r"sends on to https://elsewhere/request \(307\); set NDIF_HOST to where it lies$",
    ),
    "400": (
        "request",
        lambda found: answer({"detail": "nnsight is too old"}, 400),
        PreflightError,
        r"/request answers 400 nnsight is too old$",
    ),
    "401": (
        "request",
        lambda found: answer({"detail": f"no {KEY}"}, 401),
        PreflightError,
        r"key \(no <key>\); set NDIF",
    ),
    "407": ("request", lambda found: answer("", 407), PreflightError, r"a proxy on the way to .* asks for a password"),
    "413": ("request", lambda found: answer("", 413), JobError, r"takes no request of this size \(413\)$"),
    "500": ("request", lambda found: answer("", 500), TransportError, r"is up but not ready \(500\)$"),
    "poll 403": ("response", lambda found: answer("", 403), PreflightError, r"refuses the API key \(403\)"),
    "poll null": ("response", lambda found: answer(None), LostJobError, r"answers /response/job-\d+ with null"),
    "poll state": ("response", changed(status=5), LostJobError, r"says no state of job job-\d+, but 5$"),
    "no data": ("response", changed(data=None), LostJobError, r"job-\d+ is done and not where its result lies$"),
    "gone": ("results", lambda found: answer("", 404), LostJobError, r"result is no longer kept \(404 from 127"),
    "result 500": ("results", lambda found: answer("", 500), TransportError, r"which keeps results, answers 500$"),
    "bad zstd": ("results", lambda found: answer(found.body[:60]), LostJobError, r"cannot be read as tensors alone$"),
    "a bit": (
        "results",
        tensors(lambda found: [found[0] + 1, *found[1:]]),
        LostJobError,
        r"^job job-\d+ brought back values that are not those that were made there: their checksum is another one$",
    ),
    "job": ("results", said("job", "f00d"), LostJobError, r"^the answer to job [0-9a-f]{24} is that to job f00d$"),
    "torch": (
        "results",
        said("torch", "9.9"),
        PreflightError,
        r"has changed while the study ran: torch \S+ before and 9.9",
    ),
    "NaN": ("results", values(lambda found: [value * torch.nan for value in found]), JobError, r"no finite outcome"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", STAYING)
def test_a_fault_that_stays_ends_the_study_in_one_line(client: Client, tmp_path: Path, name: str) -> None:
    kind, spoil, error, said = STAYING[name]
    found = client.end(tmp_path / "run", always(kind, spoil))
    assert isinstance(found, error)
    assert re.search(said, str(found)), str(found)


@pytest.mark.parametrize("name", ["..", ".", "-x", "a/../b", "%2e%2e", "a b", "", "x" * 201])
def test_an_id_that_leads_elsewhere_is_none(client: Client, job: Job, name: str) -> None:
    client.small.fault = always("request", changed(id=name))
    with pytest.raises(PreflightError, match="takes a job and gives it no id"):
        client.measure(job)


def test_what_was_measured_before_a_fault_is_kept(client: Client, whole: Run, tmp_path: Path) -> None:
    client.end(tmp_path / "run", at("response", lambda found: HTML, times=10**9))
    found = client.run(tmp_path / "run")
    pd.testing.assert_frame_equal(found.effects, whole.effects)
    assert found.jobs == whole.jobs - BEFORE - 1  # and the job that was under way was not sent again


# --- the first job of all ---------------------------------------------------------------------------------------------

OF_VALUES = ("NaN", "torch", "a bit", "job")  # a probe has none, and nothing before it to be compared with
OF_A_PROBE: dict[str, tuple[str, Callable[[Answer], Answer | None]]] = {
    **{name: spoil for name, spoil in LOST.items() if not name.startswith(("values", "a bit", "another job"))},
    **{f"{name} for good": (kind, spoil) for name, (kind, spoil, *_) in STAYING.items() if name not in OF_VALUES},
    "two tensors": ("results", values(lambda found: [*found, *found])),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_A_PROBE)
def test_a_server_that_cannot_answer_a_probe_is_refused_in_one_line(client: Client, name: str) -> None:
    kind, spoil = OF_A_PROBE[name]
    client.small.fault = always(kind, spoil)
    with pytest.raises(BackendError) as caught:
        NdifBackend(client.study.model, "", client.small.server, client.note, retry_for=0.05)
    assert not any(KEY in line or "\n" in line for line in [str(caught.value), *client.said])


def test_the_answer_to_a_job_is_none_to_a_probe(client: Client, job: Job) -> None:
    """It would be in float32, whatever the model is in."""
    client.small.fault = lambda path, found: found
    client.measure(job)
    result = client.small.found(f"/results/job-{client.small.jobs() - 1}")
    client.small.fault = always("results", lambda found: result)
    with pytest.raises(PreflightError, match=rf"the answer to a probe is that to job {job.id}$"):
        NdifBackend(client.study.model, "", client.small.server, client.note, retry_for=0.05)


# --- what made the values ---------------------------------------------------------------------------------------------


def test_run_json_says_what_really_ran(client: Client, whole: Run, tmp_path: Path) -> None:
    client.run(tmp_path / "run")
    served = Store.open(tmp_path / "run").record()["served"]
    assert served.pop("weights") == client.backend.served["weights"]
    assert re.fullmatch("[0-9a-f]{16}", client.backend.served["weights"])
    assert served == {
        **{"host": client.small.server.host, "python": platform.python_version(), "torch": torch.__version__},
        **{name: metadata.version(name) for name in ("transformers", "nnsight")},
        **{"revision": "", "dtype": "float32", "device": "cpu"},
    }


@pytest.mark.parametrize("name", ["python", "torch", "transformers", "nnsight", "revision", "dtype"])
def test_a_server_that_changes_between_two_jobs_is_refused(client: Client, tmp_path: Path, name: str) -> None:
    found = client.end(tmp_path / "run", at("results", said(name, "9.9"), times=10**9))
    assert isinstance(found, PreflightError)
    assert re.search(
        rf"has changed while the study ran: {name} \S+ before and 9.9 now; .* choose another --out$", str(found)
    )
    assert len(list((tmp_path / "run/readouts").iterdir())) == BEFORE


def test_a_server_that_changes_between_two_processes_is_refused(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.run(tmp_path / "run")
    for name, refused in (("weights", True), ("torch", True), ("host", False), ("device", False)):
        monkeypatch.setattr(client.backend, "served", {**client.backend.served, name: "other"})
        if refused:
            with pytest.raises(StoreError, match=rf"made by other means \({name} \S+ before and other now\)"):
                client.run(tmp_path / "run")
        else:
            client.run(tmp_path / "run")
        monkeypatch.undo()


def test_a_folder_of_an_older_version_goes_on(client: Client, whole: Run, tmp_path: Path) -> None:
    """Nobody noted what had made its values: what makes them from now on is noted."""
    client.end(tmp_path / "run", at("results", said("torch", "9.9"), times=10**9))
    store = Store.open(tmp_path / "run")
    store.save_record({name: value for name, value in store.record().items() if name != "served"})
    found = client.run(tmp_path / "run")
    pd.testing.assert_frame_equal(found.effects, whole.effects)
    assert Store.open(tmp_path / "run").record()["served"] == client.backend.served


def test_other_weights_have_another_hash(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    client.small.fault = lambda path, found: found
    weight = client.local.model._module.model.layers[1].mlp.down_proj.weight
    before = weight[0, 3].item()
    try:
        with torch.no_grad():
            weight[0, 3] += 0.001
        made = client.backend._probed()[1]
    finally:
        with torch.no_grad():
            weight[0, 3] = before
    assert made["weights"] != client.backend.served["weights"]
    assert client.backend._probed()[1]["weights"] == client.backend.served["weights"]


def test_base_prompts_that_come_back_otherwise_are_noticed(client: Client, whole: Run, tmp_path: Path) -> None:
    # The fourth job is the second one of its pair.
    shifted = at("results", values(lambda found: [found[0] + 0.01]), after=3)
    found = client.run(tmp_path / "once", shifted)
    pd.testing.assert_frame_equal(found.effects, whole.effects)
    assert found.jobs == whole.jobs + 1
    error = client.end(tmp_path / "always", at("results", values(lambda found: [found[0] + 0.01]), 10**9, after=3))
    assert re.search(r"^a job brought back base prompts that lie \S+ times as far from what earlier jobs", str(error))
    near = at("results", values(lambda found: [found[0] + 1e-5]), times=10**9)
    assert client.run(tmp_path / "near", near).jobs == whole.jobs


# --- states ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["QUEUED", "RUNNING", "DEPLOYING", "LOG", "THAWING", "done"])
def test_a_job_that_is_under_way_is_waited_for(client: Client, job: Job, state: str) -> None:
    news = changed(status=state, description="wait", data=..., meta=...)
    client.small.fault = at("response", news, times=3, after=0)
    assert len(client.measure(job)) == len(job.keys)
    assert client.said.count(f"{state.lower()}: wait") == 1


@pytest.mark.parametrize(
    "state", ["RECEIVED", "QUEUED", "PROVISIONING", "DEPLOYING", "DISPATCHED", "RUNNING", "THAWING"]
)
def test_every_state_has_a_deadline(client: Client, job: Job, monkeypatch: pytest.MonkeyPatch, state: str) -> None:
    monkeypatch.setattr(remote_module, "_DEADLINES", {**remote_module._DEADLINES, state: 0.2})
    client.small.fault = always("response", changed(status=state, description="wait", data=..., meta=...))
    said = rf'^no news of job job-\d+ for 0 s after "{state.lower()}: wait"; it is given up$'
    with pytest.raises(LostJobError, match=said):
        client.measure(job)


@pytest.mark.parametrize("state", ["completed", "Completed", " COMPLETED\n"])
def test_states_are_read_however_they_are_written(
    client: Client, job: Job, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    monkeypatch.setattr(remote_module, "_OTHER_DEADLINE", 0.2)
    client.small.fault = always("response", changed(status=state))
    assert len(client.measure(job)) == len(job.keys)
    client.small.fault = always("response", changed(status="Error", description="Boom"))
    with pytest.raises(JobError, match=r"^Boom$"):
        client.measure(job)


def test_news_puts_the_deadline_off(client: Client, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_module, "_DEADLINES", {"QUEUED": 1.0})
    places = iter(range(10**6))

    def queued(found: Answer) -> Answer:
        return changed(status="QUEUED", description=f"place {next(places)}")(found)

    client.small.fault = at("response", queued, times=8, after=0)
    client.measure(job)
    assert sum("queued: place" in line for line in client.said) == 8


def test_states_that_go_back_and_forth_are_no_news(client: Client, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_module, "_DEADLINES", {"QUEUED": 0.3, "RUNNING": 0.3})
    states = itertools.cycle(["QUEUED", "RUNNING"])

    def turning(found: Answer) -> Answer:
        return changed(status=next(states), description="wait", data=..., meta=...)(found)

    client.small.fault = at("response", turning, times=60, after=0)
    with pytest.raises(LostJobError, match=r"is given up$"):
        client.measure(job)


def test_a_queued_job_that_a_later_one_overtakes_is_sent_again(
    client: Client, whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_module, "_DOUBTED", 0.1)
    stuck = [f"/response/job-{client.small.jobs() + BEFORE}"]
    queued = changed(status="QUEUED", description="place 1", data=..., meta=...)
    found = client.run(tmp_path / "run", lambda path, it: queued(it) if path in stuck else it)
    pd.testing.assert_frame_equal(found.effects, whole.effects)
    assert found.jobs == whole.jobs + 2  # the job again, and the probe that overtook it


def test_a_queue_in_which_nothing_moves_is_waited_for(
    client: Client, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_module, "_DOUBTED", 0.1)
    queued = changed(status="QUEUED", description="place 1", data=..., meta=...)
    client.small.fault = at("response", queued, times=12, after=0)
    before = client.small.jobs()
    assert len(client.measure(job)) == len(job.keys)
    assert client.small.jobs() == before + 2  # the job, and one probe behind it


def test_a_job_that_the_server_does_not_know_is_sent_again(
    client: Client, whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_module, "_DEADLINES", {"": 0.2})
    lost = [f"/response/job-{client.small.jobs() + BEFORE}"]
    found = client.run(tmp_path / "run", lambda path, it: answer({}, 404) if path in lost else it)
    pd.testing.assert_frame_equal(found.effects, whole.effects)
    assert found.jobs == whole.jobs + 1


@pytest.mark.parametrize("ticket", ["../status", "a\x00b", "x" * 10**5, "", "job 1?key=2"])
def test_a_ticket_that_is_no_name_is_no_job(client: Client, ticket: str) -> None:
    """It comes from a file, which may have been edited; a study goes on without it."""
    client.small.fault, asked = (lambda path, found: found), len(client.small.asked)
    with pytest.raises(LostJobError, match=r"is the name of no job$") as caught:
        client.backend.collect(ticket)
    assert "\x00" not in str(caught.value)
    assert len(client.small.asked) == asked


@pytest.mark.parametrize(
    "spoil",
    [
        ("response", changed(status="ERROR", description="Ray is restarting")),
        ("results", values(lambda found: [found[0] * torch.nan])),
    ],
    ids=["error", "NaN"],
)
def test_what_happens_to_a_pair_once_does_not_leave_it_out(
    client: Client, whole: Run, tmp_path: Path, spoil: tuple[str, Callable[[Answer], Answer | None]]
) -> None:
    found = client.run(tmp_path / "run", at(*spoil))
    pd.testing.assert_frame_equal(found.effects, whole.effects)
    assert found.jobs == whole.jobs + 1
    assert Store.open(tmp_path / "run").failures() == {}


def test_the_state_of_another_job_is_none(client: Client, whole: Run, tmp_path: Path) -> None:
    mixed_up = changed(id="job-1", status="ERROR", description="index out of range")
    found = client.run(tmp_path / "run", at("response", mixed_up, times=3))
    pd.testing.assert_frame_equal(found.effects, whole.effects)
    assert found.jobs == whole.jobs
    assert Store.open(tmp_path / "run").failures() == {}
    assert any("answers about job job-1 where job job-" in line for line in client.said)


def test_a_server_that_fails_for_good_ends_the_study_and_leaves_no_pair_out(
    client: Client, whole: Run, tmp_path: Path
) -> None:
    out_of_memory = changed(status="ERROR", description="CUDA out of memory", data=...)
    found = client.end(tmp_path / "run", at("response", out_of_memory, times=10**9))
    assert re.search(r"^what was measured before fails now, too, .* mended: CUDA out of memory$", str(found))
    assert Store.open(tmp_path / "run").failures() == {}
    later = client.run(tmp_path / "run")
    pd.testing.assert_frame_equal(later.effects, whole.effects)
    assert later.jobs == whole.jobs - BEFORE


def test_a_failed_job_says_why(client: Client, tmp_path: Path) -> None:
    failed = changed(
        status="ERROR", description=f"Traceback (most recent call last):\n  at /a/b/c\nBoom: \x1b[2J {KEY}"
    )
    client.small.fault = always("response", failed)
    with pytest.raises(JobError, match=r"^Boom: \ufffd\[2J <key>$"):
        client.backend._wait(client.backend._send(client.backend._probe()))


@pytest.mark.parametrize("description", [None, "", ...])
def test_a_failed_job_without_a_reason(client: Client, description: Any) -> None:
    client.small.fault = always("response", changed(status="ERROR", description=description))
    with pytest.raises(JobError, match=r"^the job failed, without a reason$"):
        client.backend._wait(client.backend._send(client.backend._probe()))


@pytest.mark.parametrize(
    "meta", [None, [], {"runtime": "soon"}, {"runtime": -1}, {"runtime": 1e300}, {"runtime": 1e-300}, {}]
)
def test_odd_costs_of_a_job_count_as_none(client: Client, meta: Any) -> None:
    client.small.fault = always("response", changed(meta=meta))
    assert client.backend._wait(client.backend._send(client.backend._probe()))[1] == 0.0


# --- being asked to wait ---------------------------------------------------------------------------------------------


def test_retry_after_is_obeyed(client: Client, whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    slow = at("response", lambda found: answer({}, 429, Retry_After="7"), times=2)
    pd.testing.assert_frame_equal(client.run(tmp_path / "run", slow).effects, whole.effects)
    assert slept.count(7.0) == 2


def test_a_server_that_wants_to_be_left_alone_for_long_ends_the_study(client: Client, tmp_path: Path) -> None:
    found = client.end(tmp_path / "run", always("request", lambda found: answer({}, 429, Retry_After="86400")))
    assert re.search(r"/request answers 429; it asks to be left alone for 86400 s$", str(found))


@pytest.mark.parametrize(
    ("said", "seconds"),
    [
        ("3", 3),
        ("soon", 0),
        ("-5", 0),
        ("", 0),
        ("1e9", 0),
        ("²", 0),
        ("Sun, 06 Nov 1994 08:49:37 GMT", 0),
        ("Sun, 06 Nov 99999999999999999999 08:49:37 GMT", 0),
    ],
)
def test_the_wait_that_is_asked_for(said: str, seconds: float) -> None:
    assert _asked_to_wait(said) == seconds


def test_a_wait_until_a_time_is_the_time_until_then() -> None:
    until = datetime.now(UTC) + timedelta(seconds=600)
    assert 500 < _asked_to_wait(format_datetime(until, usegmt=True)) <= 600


def test_a_wait_is_told_by_the_servers_own_clock() -> None:
    """A clock that is two days ahead asks for a minute all the same."""
    then = datetime.now(UTC) + timedelta(days=2)
    headers = {"date": format_datetime(then, usegmt=True)}
    headers["retry-after"] = format_datetime(then + timedelta(seconds=60), usegmt=True)
    assert exchange_module._wait(httpx.Response(503, headers=headers)) == 60
    headers["date"] = "today"
    assert exchange_module._wait(httpx.Response(503, headers=headers)) > 86400


def _asked_to_wait(said: str) -> float:
    return exchange_module._wait(httpx.Response(429, headers={"retry-after": said.encode()}))


# --- slow and large --------------------------------------------------------------------------------------------------


def test_a_silent_server_is_named(client: Client) -> None:
    client.small.fault = lambda path, found: found._replace(after=0.5)
    with pytest.raises(TransportError, match=r"does not answer /status within 0 s$") as caught:
        exchange(client.small.server, "GET", "/status", httpx.Timeout(0.2))
    assert caught.value.silent


@pytest.fixture(params=["headers", "body", "chunks"])
def trickling(request: pytest.FixtureRequest) -> Iterator[str]:
    """Address of a server whose answers come a byte at a time, without an end."""
    start = {
        "headers": b"HTTP/1.1 200 OK\r\nX-Slow: ",
        "body": b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n",
        "chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
    }[request.param]
    more = b"1\r\n \r\n" if request.param == "chunks" else b" "
    listening, over = socket.create_server(("127.0.0.1", 0)), threading.Event()

    def serve() -> None:
        with contextlib.suppress(OSError):
            taken, _ = listening.accept()
            with taken:
                taken.recv(2**16)
                taken.sendall(start)
                while not over.wait(0.05):
                    taken.sendall(more)

    threading.Thread(target=serve, daemon=True).start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    over.set()
    listening.close()


def test_an_answer_that_trickles_has_an_end(trickling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(exchange_module, "_WHOLE_JSON_S", 1.0)
    monkeypatch.setattr(exchange_module, "_WHOLE_RESULT_S", 1.0)
    began = time.monotonic()
    with pytest.raises(TransportError, match=r"/status has not sent all of its answer within 1 s$") as caught:
        exchange(Server(trickling, KEY), "GET", "/status", httpx.Timeout(0.5))
    assert caught.value.silent
    assert time.monotonic() - began < 5


def test_a_result_that_trickles_has_an_end(trickling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(exchange_module, "_WHOLE_RESULT_S", 0.5)
    with pytest.raises(TransportError, match=r"^127.0.0.1 has not sent all of its answer within 0 s$"):
        download(f"{trickling}/results/1")


def test_an_answer_without_an_end_is_not_read_to_it(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange_module, "MOST_JSON", 2**20)
    bomb = answer(gzip.compress(b" " * 2**24), Content_Encoding="gzip")
    client.small.fault = lambda path, found: bomb
    with pytest.raises(PreflightError, match=r"/status answers with more than 1 MiB$"):
        exchange(client.small.server, "GET", "/status", httpx.Timeout(5.0))
    monkeypatch.setattr(exchange_module, "MOST_RESULT", 2**20)
    with pytest.raises(LostJobError, match=r"^the result cannot be one: 127.0.0.1 answers with more than 1 MiB$"):
        download(f"{client.small.server.host}/results/job-0")


def test_a_result_that_unpacks_itself_is_none() -> None:
    result = packed({"values": [torch.zeros(2, 2)]})
    for spoilt in (deflated(result), zstandard.compress(deflated(result)), unzipped(result)):
        with pytest.raises(LostJobError, match="cannot be read as tensors alone"):
            tensors_of(spoilt, "t")
    assert len(tensors_of(result, "t")) == 1


def test_a_result_that_says_to_be_huge_is_not_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_module, "MOST_RESULT", 100)
    with pytest.raises(LostJobError, match="cannot be read as tensors alone"):
        tensors_of(packed({"values": [torch.zeros(1000)]}), "t")


@pytest.mark.parametrize("name", ["X-Proxy: caf\xe9", "Server: \xff\xfe"])
@pytest.mark.parametrize("status", [200, 503])
def test_headers_beyond_ascii(name: str, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    body = f"HTTP/1.1 {status} OK\r\n{name}\r\nRetry-After: 7\r\nContent-Length: 2\r\n\r\n{{}}"
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            taken, _ = listening.accept()
            with taken:
                taken.recv(2**16)
                taken.sendall(body.encode("latin-1"))

        threading.Thread(target=serve, daemon=True).start()
        server = Server(f"http://127.0.0.1:{listening.getsockname()[1]}", KEY)
        if status == 200:
            assert exchange(server, "GET", "/status", httpx.Timeout(5.0)) == {}
            return
        with pytest.raises(TransportError, match="is up but not ready") as caught:
            exchange(server, "GET", "/status", httpx.Timeout(5.0))
        assert caught.value.wait == 7


# --- what stands between ---------------------------------------------------------------------------------------------


def asked(host: str) -> BackendError:
    with pytest.raises(BackendError) as caught:
        exchange(Server(host, KEY), "GET", "/status", httpx.Timeout(5.0))
    assert KEY not in str(caught.value)
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    ("host", "error", "said"),
    [
        ("http://127.0.0.1:9", TransportError, r"cannot reach http://127.0.0.1:9 \(.*refused\)$"),
        ("http://no.such.host.invalid", TransportError, r"cannot reach http://no.such.host.invalid \("),
        ("localhost:5000", PreflightError, r"cannot reach localhost:5000 .*; check NDIF_HOST"),
        ("ftp://host", PreflightError, r"cannot reach ftp://host .*; check NDIF_HOST"),
        ("http://host:port", PreflightError, r"cannot reach http://host:port .*; check NDIF_HOST"),
        ("http://", PreflightError, r"cannot reach http:// .*; check NDIF_HOST"),
        ("", PreflightError, r"cannot reach  .*; check NDIF_HOST"),
    ],
)
def test_addresses(host: str, error: type[BackendError], said: str) -> None:
    found = asked(host)
    assert type(found) is error
    assert re.search(said, str(found)), str(found)


@pytest.fixture
def through(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bytes], None]]:
    """Everything goes through a proxy that answers so."""
    listening = socket.create_server(("127.0.0.1", 0))
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)

    def start(said: bytes) -> None:
        def serve() -> None:
            try:
                taken, _ = listening.accept()
            except OSError:
                return
            with taken:
                taken.recv(2**16)
                taken.sendall(said)

        threading.Thread(target=serve, daemon=True).start()
        for name in ("HTTPS_PROXY", "HTTP_PROXY", "https_proxy", "http_proxy"):
            monkeypatch.setenv(name, f"http://me:secret@127.0.0.1:{listening.getsockname()[1]}")

    yield start
    listening.close()


@pytest.mark.parametrize(
    ("host", "said", "error", "told"),
    [
        ("https://ndif", b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n", PreflightError, r"answers 407 Proxy"),
        (
            "https://ndif",
            b"HTTP/1.1 403 Forbidden\r\n\r\n",
            PreflightError,
            r"answers 403 Forbidden; check HTTPS_PROXY",
        ),
        ("https://ndif", b"HTTP/1.1 502 Bad Gateway\r\n\r\n", TransportError, r"answers 502 Bad Gateway"),
        ("https://ndif", b"", TransportError, r"cannot reach https://ndif"),
        (
            "http://ndif",
            b"HTTP/1.1 407 No\r\nContent-Length: 0\r\n\r\n",
            PreflightError,
            r"asks for a password \(407\)",
        ),
        ("http://ndif", b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n<html>", TransportError, r"with a web page$"),
        ("http://ndif", b"garbage\r\n\r\n", TransportError, r"cannot reach http://ndif"),
    ],
)
def test_proxies(through: Any, host: str, said: bytes, error: type[BackendError], told: str) -> None:
    through(said)
    found = asked(host)
    assert isinstance(found, error)
    assert re.search(told, str(found)), str(found)
    assert "secret" not in str(found)


@pytest.mark.parametrize("proxy", ["foo://me:secret@host", "socks5://me:secret@host", "http://me:secret@host:port"])
def test_proxies_that_are_none(monkeypatch: pytest.MonkeyPatch, proxy: str) -> None:
    for name in ("NO_PROXY", "no_proxy", "ALL_PROXY", "all_proxy", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTPS_PROXY", proxy)
    found = asked("https://ndif")
    assert isinstance(found, PreflightError)
    assert re.search(
        r"^cannot ask https://ndif \(.*\); check HTTPS_PROXY, HTTP_PROXY, ALL_PROXY, NO_PROXY and SSL_CERT_FILE$",
        str(found),
    )
    assert "secret" not in str(found)


def test_certificates_that_nobody_vouches_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    subprocess.run([*command, "-subj", "/CN=127.0.0.1", "-keyout", key, "-out", cert], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    small = SmallNdif()
    small.http.socket = context.wrap_socket(small.http.socket, server_side=True)
    host = small.server.host.replace("http://", "https://")
    found = asked(host)
    assert type(found) is PreflightError
    assert re.search(rf"^the certificate of {host} is not trusted \(.*\); check NDIF_HOST, or name the", str(found))
    small.close()


def test_a_server_without_encryption_and_one_without_its_certificates(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.small.fault = lambda path, found: found
    assert isinstance(asked(client.small.server.host.replace("http://", "https://")), TransportError)
    monkeypatch.setenv("SSL_CERT_FILE", "/no/such/file.pem")
    assert "check HTTPS_PROXY, HTTP_PROXY, ALL_PROXY, NO_PROXY and SSL_CERT_FILE" in str(asked("https://ndif"))
