"""A small NDIF server: real HTTP on loopback, nnsight requests run by a real model, and answers that can be spoilt.

What it answers was recorded of ndif 0.1.2. A fault stands between it and the client as a proxy would: it sees the
path of a request and the answer to it, and hands on another one.
"""

from __future__ import annotations

import io
import json
import linecache
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

import torch
import zstandard
from nnsight.schema.request import RequestModel
from nnsight.tracing import tracer as tracing

from remote_mediation.engine import program
from remote_mediation.engine.exchange import Server

KEY = "11111111-2222-3333-4444-555555555555"


class Answer(NamedTuple):
    """What is sent back."""

    status: int
    body: bytes
    headers: dict[str, str] = {}  # noqa: RUF012 (never written to)
    after: float = 0.0
    """Seconds until it is sent."""
    cut: int | None = None
    """Bytes after which the connection ends."""


Fault = Callable[[str, Answer], Answer | None]
"""Path of a request and its answer; what is handed on, None for nothing at all."""


def answer(content: Any, status: int = 200, **headers: str) -> Answer:
    """JSON, or text or bytes as they are."""
    body = content.encode() if isinstance(content, str) else content
    return Answer(status, body if isinstance(body, bytes) else json.dumps(body).encode(), headers)


def packed(content: Any) -> bytes:
    """A result as ndif keeps it."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return zstandard.ZstdCompressor().compress(buffer.getvalue())


def resealed(made: list[torch.Tensor]) -> list[torch.Tensor]:
    """Values and what made them, as the block would have returned them."""
    return [*made, program.checksum(made)]


def unpacked(content: bytes) -> Any:
    """What a kept result holds."""
    return torch.load(io.BytesIO(zstandard.ZstdDecompressor().decompress(content)), weights_only=True)


class SmallNdif:
    """Serves one dispatched nnsight model until it is closed."""

    def __init__(self, model: Any = None) -> None:
        self.fault: Fault = lambda path, found: found
        self.asked: list[str] = []
        """Paths of all requests so far."""
        self._model, self._blobs, self._results = model, {}, {}
        self._running = threading.Lock()
        small = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._hand_on(small.found(self.path))

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                boundary = self.headers["Content-Type"].split("boundary=")[1].encode()
                self._hand_on(small.taken(body, boundary))

            def _hand_on(self, found: Answer) -> None:
                small.asked.append(self.path)
                sent = small.fault(self.path, found)
                if sent is None:
                    self.close_connection = True
                    return
                time.sleep(sent.after)
                self.send_response(sent.status)
                for name, value in {"Content-Length": str(len(sent.body)), **sent.headers}.items():
                    self.send_header(name.replace("_", "-"), value)
                self.end_headers()
                self.wfile.write(sent.body[: sent.cut])
                self.close_connection = True

            def log_message(self, *args: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server = Server(f"http://127.0.0.1:{self.http.server_port}", KEY)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()

    def jobs(self) -> int:
        """Jobs that were taken."""
        return len(self._blobs)

    def taken(self, body: bytes, boundary: bytes) -> Answer:
        """POST /request: a job is kept until someone asks for it."""
        (part,) = [part for part in body.split(b"--" + boundary) if b'name="blob"' in part]
        job = f"job-{len(self._blobs)}"
        self._blobs[job] = part.split(b"\r\n\r\n", 1)[1].removesuffix(b"\r\n")
        return answer({"id": job, "status": "RECEIVED", "description": "Your job has been received."})

    def found(self, path: str) -> Answer:
        """Any GET."""
        known = {
            "/connected": {"status": "connected"},
            "/whoami": {"email": "me@example.org", "tags": []},
            "/env": {"python_version": "3.11.7 (main)", "packages": {"nnsight": "0.8.1"}},
            "/status": {"deployments": {}},
        }
        folder, _, job = path[1:].partition("/")
        if folder == "response" and job in self._blobs:
            self._result(job)
            url = f"{self.server.host}/results/{job}"
            return answer({"id": job, "status": "COMPLETED", "description": "", "data": url, "meta": {"runtime": 0.5}})
        if folder == "results" and job in self._blobs:
            return answer(self._result(job))
        return answer(known[path]) if path in known else answer({"detail": "Not Found"}, 404)

    def _result(self, job: str) -> bytes:
        """What a job brings back, run once."""
        with self._running:
            if job not in self._results:
                self._results[job] = packed({"values": self._run(self._blobs[job])})
            return self._results[job]

    def _run(self, blob: bytes) -> list[torch.Tensor]:
        tracer = RequestModel.deserialize(blob, self._model._remoteable_persistent_objects(), compress=True)
        linecache.cache.pop(program.__file__, None)  # it holds the block alone now, as on a server of its own
        tracing.inc()
        try:
            tracer.execute(tracer.info.code)
        finally:
            tracing.dec()
        return tracer.info.frame.f_locals["values"]
