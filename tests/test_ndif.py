"""What is said of servers that are down, no NDIF server, out of reach of their models, slow, or of another version.

A real HTTP server on loopback, fed with answers. The same against a real NDIF server: tests/ndif.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

import httpx
import numpy as np
import pytest
import torch
import zstandard
from small_ndif import KEY, packed
from typer.testing import CliRunner

from remote_mediation.cli import app
from remote_mediation.engine import server as server_module
from remote_mediation.engine.exchange import Server, plain
from remote_mediation.engine.local import LocalBackend
from remote_mediation.engine.remote import NdifBackend, tensors_of
from remote_mediation.engine.server import ask, preflight, refuse_bad, server_from_environment
from remote_mediation.errors import LostJobError, PreflightError

ENV = {"python_version": "3.11.7 (main)", "packages": {"nnsight": "0.8.1"}}
WORKING: dict[str, tuple[int, Any]] = {
    "/connected": (200, {"status": "connected"}),
    "/whoami": (200, {"email": "me@example.org", "tags": []}),
    "/env": (200, ENV),
    "/status": (
        200,
        {
            "deployments": {
                "a": {"repo_id": "org/hot", "revision": "main", "task": "t", "deployment_level": "HOT"},
                "b": {"repo_id": "org/warm", "revision": "main", "task": "t", "deployment_level": "WARM"},
                "c": {"repo_id": "org/ill", "revision": "main", "application_state": "UNHEALTHY"},
                "d": {"repo_id": "org/coming", "revision": "main", "application_state": "DEPLOYING"},
            }
        },
    ),
}


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Server]]:
    """Start a server with these answers by path; a status of 0 means never to answer."""
    running: list[ThreadingHTTPServer] = []
    released = threading.Event()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(server_module, "_TIMEOUT", httpx.Timeout(0.5))
    monkeypatch.setattr(server_module, "_RECONNECT_PAUSE_S", 0.05)

    def start(answers: dict[str, Any]) -> Server:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                found = answers.get(self.path, (404, {"detail": "Not Found"}))
                status, content = found.pop(0) if isinstance(found, list) else found
                if status == 0:
                    released.wait(5)
                    return
                body = content.encode() if isinstance(content, str) else json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        running.append(server)
        host = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setenv("NDIF_HOST", host)
        monkeypatch.setenv("NDIF_API_KEY", KEY)
        return Server(host, KEY)

    yield start
    released.set()
    for server in running:
        server.shutdown()
        server.server_close()


def refusal(server: Server, model: str = "org/hot") -> str:
    with pytest.raises(PreflightError) as caught:
        refuse_bad(preflight(server, model, "", patience=0.2))
    assert KEY not in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_server_in_order(serve: Callable[..., Server]) -> None:
    findings = {finding.name: finding for finding in preflight(serve(WORKING), "org/hot", "")}
    assert all(finding.good for finding in findings.values())
    assert findings["key"].detail == "accepted, me@example.org"
    assert findings["model"].detail == "org/hot is hot"


def test_a_server_that_is_down(monkeypatch: pytest.MonkeyPatch) -> None:
    message = refusal(Server("http://127.0.0.1:9", ""))
    assert "cannot reach http://127.0.0.1:9" in message
    assert "check NDIF_HOST" in message


@pytest.mark.parametrize(
    "answers",
    [{}, {"/connected": (200, "<html>welcome</html>")}, {"/connected": (200, [1])}],
    ids=["404", "a page", "other JSON"],
)
def test_a_host_that_is_no_ndif_server(serve: Callable[..., Server], answers: dict[str, Any]) -> None:
    assert "check NDIF_HOST" in refusal(serve(answers))


@pytest.mark.parametrize("content", [None, [], 3, True, "text"])
@pytest.mark.parametrize("path", ["/connected", "/whoami"])
def test_other_json_than_a_servers(serve: Callable[..., Server], path: str, content: Any) -> None:
    said = refusal(serve({**WORKING, path: (200, json.dumps(content))}))
    assert f" answers {path} with " in said
    assert said.endswith("not as an NDIF server does; check NDIF_HOST")


@pytest.mark.parametrize(
    "content",
    [None, [], {"packages": 3}, {"packages": [1]}, {"packages": {"torch": None}}, {"python_version": 3}, {}],
)
def test_an_odd_env_stops_no_study(serve: Callable[..., Server], content: Any) -> None:
    refuse_bad(preflight(serve({**WORKING, "/env": (200, json.dumps(content))}), "org/hot", ""))


@pytest.mark.parametrize(
    "content",
    [None, [], {}, {"deployments": None}, {"deployments": []}, {"deployments": {"a": None}}]
    + [{"deployments": {"a": {name: value}}} for name in ("repo_id", "revision", "task") for value in (3, [1], {})]
    + [{"deployments": {"a": {"application_state": [], "deployment_level": {}}}}],
)  # fmt: skip
def test_an_odd_status_stops_no_study(serve: Callable[..., Server], content: Any) -> None:
    refuse_bad(preflight(serve({**WORKING, "/status": (200, json.dumps(content))}), "org/hot", ""))


def test_what_a_server_says_cannot_steer_a_terminal(serve: Callable[..., Server]) -> None:
    deployments = {"a": {"repo_id": "org/\x1b[2J\x07hot", "task": "\x9b31m"}}
    told = {"/whoami": {"email": "me\x1b]0;"}, "/status": {"deployments": deployments}}
    told["/env"] = {"python_version": f"\x1b[2J\x9b3.11{KEY}"}
    serve({**WORKING, **{path: (200, content) for path, content in told.items()}})
    for command in (["status"], ["doctor"]):
        said = CliRunner().invoke(app, command).output
        assert not any(letter in said for letter in "\x1b\x07\x9b")
        assert KEY not in said


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (401, "refuses the API key (Bad key <key>); set NDIF_API_KEY"),
        (403, "refuses the API key (Bad key <key>); set NDIF_API_KEY"),
        (503, "is up but not ready (503 Bad key <key>); try again in a few minutes"),
        (504, "does not answer /whoami in time"),
    ],
)
def test_statuses(serve: Callable[..., Server], status: int, said: str) -> None:
    assert said in refusal(serve({**WORKING, "/whoami": (status, {"detail": f"Bad key {KEY}"})}))


def test_a_server_that_is_reconnecting_is_waited_for(serve: Callable[..., Server]) -> None:
    reconnecting = (503, {"detail": "Service temporarily unavailable: compute backend is reconnecting."})
    findings = preflight(serve({**WORKING, "/connected": [reconnecting] * 3 + [WORKING["/connected"]]}), None, "")
    assert all(finding.good for finding in findings)
    assert "compute backend is reconnecting" in refusal(serve({**WORKING, "/connected": reconnecting}))


@pytest.mark.parametrize("silence", [(0, ""), (504, {"detail": "Timed out waiting for cluster status."})])
def test_a_status_that_does_not_come_stops_no_study(serve: Callable[..., Server], silence: tuple[int, Any]) -> None:
    findings = preflight(serve({**WORKING, "/status": silence, "/env": silence}), "org/hot", "")
    refuse_bad(findings)
    told = {finding.name: finding.detail for finding in findings}
    assert told["models"].startswith("not known: http")
    assert told["models"].endswith("jobs run meanwhile")
    assert told["versions"].startswith("not compared")


def test_another_nnsight_is_refused_and_another_python_is_not(serve: Callable[..., Server]) -> None:
    env = {"python_version": "3.9.1", "packages": {"nnsight": "0.9.0", "torch": "1.0", "transformers": "4.1"}}
    server = serve({**WORKING, "/env": (200, env)})
    assert refusal(server) == "nnsight: 0.8.1 here, 0.9.0 on the server: jobs may not load there; install 0.9.0"
    told = {finding.name: finding for finding in preflight(server, None, "")}
    assert told["python"].good
    assert "travel as source" in told["python"].detail
    assert "1.0 on the server" in told["torch"].detail


def test_models_by_state(serve: Callable[..., Server]) -> None:
    server = serve(WORKING)
    assert refusal(server, "org/ill") == "model: org/ill is unhealthy"
    for model, state in (("org/warm", "is warm"), ("org/coming", "is deploying"), ("org/new", "asks the server to")):
        findings = preflight(server, model, "")
        refuse_bad(findings)
        assert state in findings[-1].detail


def test_doctor_says_what_would_fail(serve: Callable[..., Server]) -> None:
    serve(WORKING)
    well = CliRunner().invoke(app, ["doctor", "--model", "org/hot"])
    assert well.exit_code == 0, well.output
    assert "FAIL" not in well.output
    serve({**WORKING, "/whoami": (403, {"detail": "no"})})
    ill = CliRunner().invoke(app, ["doctor"])
    assert ill.exit_code == 1
    assert "FAIL server: http" in ill.output
    assert KEY not in well.output + ill.output


def test_status_lists_models_and_tells_failures_apart(serve: Callable[..., Server]) -> None:
    serve(WORKING)
    listed = CliRunner().invoke(app, ["status"])
    assert listed.exit_code == 0
    for word in ("org/hot", "org/warm", "org/ill", "hot", "warm", "unhealthy", "deploying"):
        assert word in listed.output
    serve({**WORKING, "/status": (504, {"detail": "Timed out"})})
    silent = CliRunner().invoke(app, ["status"])
    assert isinstance(silent.exception, PreflightError)
    assert "does not answer /status in time" in str(silent.exception)
    assert "down" not in str(silent.exception)


def test_a_study_asked_for_on_a_server_never_runs_here(
    serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch, subject: Callable[[str], Any]
) -> None:
    model = subject("llama").info.name

    def never(*args: object, **settings: object) -> None:
        raise AssertionError("a remote study loaded a local model")

    monkeypatch.setattr(LocalBackend, "load", never)
    server = serve({**WORKING, "/whoami": (403, {"detail": "no"})})
    with pytest.raises(PreflightError, match="refuses the API key"):
        NdifBackend(model, "", server, lambda line: None)


def test_the_key_is_in_no_repr() -> None:
    assert KEY not in repr(Server("http://host", KEY))


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("", ""),
        ("one line", "one line"),
        ("two\nlines", "two lines"),
        ('Traceback (most recent call last):\n  File "/home/me/x.py"\nIndexError: too far', "IndexError: too far"),
        (f"Invalid: '{KEY}'. See https://login.ndif.us/a/b", "Invalid: '<key>'. See https://login.ndif.us/a/b"),
        ("no such file: '/home/me/secret/x.py'", "no such file: '<path>'"),
        ("shape 3/4/5 and a/b", "shape 3/4/5 and a/b"),
    ],
)  # fmt: skip
def test_messages_of_a_server_in_one_plain_line(message: str, expected: str) -> None:
    assert plain(message, KEY) == expected


# --- what comes back is read and not run ----------------------------------------------------------------------------


class Hostile:
    """Writes a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self._path, "ran")


def test_a_result_comes_back_as_it_was_sent() -> None:
    values = [torch.tensor([[1.5, -2.5]]), torch.empty(0, dtype=torch.bfloat16)]
    (first, second) = tensors_of(packed({"values": values}), "t1")
    np.testing.assert_array_equal(first.numpy(), values[0].numpy())
    assert second.dtype == torch.bfloat16


def test_a_hostile_result_runs_nothing(tmp_path: Path) -> None:
    blob = packed({"values": [torch.zeros(1, 1)], "more": Hostile(tmp_path / "file")})
    with pytest.raises(LostJobError, match="the result of job t1 cannot be read as tensors alone"):
        tensors_of(blob, "t1")
    assert list(tmp_path.iterdir()) == []


WHOLE = packed({"values": [torch.zeros(4, 4)]})


@pytest.mark.parametrize(
    "blob",
    [
        b"",
        b"<html>sorry</html>",
        WHOLE[: len(WHOLE) // 2],
        zstandard.ZstdCompressor().compress(b"no tensors"),
        zstandard.ZstdCompressor().compress(zstandard.ZstdDecompressor().decompress(WHOLE)[:-40]),
        zstandard.ZstdCompressor().compressobj().compress(b"no size"),
        packed([torch.zeros(1)]),
        packed({"values": None}),
        packed({"values": torch.zeros(2, 2)}),
        packed({"values": ["text"]}),
        packed({}),
        packed(None),
    ],
    ids=["empty", "page", "cut", "text", "cut inside", "endless", "list", "null", "tensor", "strings", "no", "none"],
)
def test_a_damaged_result_is_a_lost_job(blob: bytes) -> None:
    with pytest.raises(LostJobError, match=r"^the result of job t1 "):
        tensors_of(blob, "t1")


# --- keys -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("around", ["{}\n", "  {}", "\t{}\r\n"])
def test_a_key_is_stripped(monkeypatch: pytest.MonkeyPatch, around: str) -> None:
    monkeypatch.setenv("NDIF_API_KEY", around.format(KEY))
    assert server_from_environment().key == KEY


@pytest.mark.parametrize("inside", ["\n", " ", "\t", "\x1b[2J", "\x7f", "\u200b", "é"])
def test_a_key_that_is_none_is_refused_and_not_shown(monkeypatch: pytest.MonkeyPatch, inside: str) -> None:
    monkeypatch.setenv("NDIF_API_KEY", KEY[:18] + inside + KEY[18:])
    with pytest.raises(PreflightError, match=r"NDIF_API_KEY has .*; copy the key again") as caught:
        server_from_environment()
    assert not any(part in str(caught.value) for part in KEY.split("-"))


@pytest.mark.parametrize(
    "host", ["http://me:{}@host", "https://host/?key={}", "https://host/{}", "https://host/#{}", "https://host/ {}"]
)
def test_a_key_in_the_host_is_refused_and_not_shown(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    monkeypatch.setenv("NDIF_API_KEY", KEY)
    monkeypatch.setenv("NDIF_HOST", host.format(KEY))
    with pytest.raises(PreflightError, match="NDIF_HOST holds more than an address") as caught:
        server_from_environment()
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("key", ["local", "test", "1", "http"])
def test_a_word_for_a_key_may_stand_in_the_host(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv("NDIF_API_KEY", key)
    monkeypatch.setenv("NDIF_HOST", "http://test.localhost:5001")
    assert server_from_environment() == Server("http://test.localhost:5001", key)


def test_doctor_in_a_folder_that_is_gone(
    serve: Callable[..., Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(WORKING)
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    found = CliRunner().invoke(app, ["doctor"])
    assert found.exit_code == 1
    assert "FAIL disk: this folder cannot be used (No such file or directory); go into another one" in found.output


@pytest.mark.parametrize("key", ["1111\n2222", "a key/+&", "11\r\nHost: x"])
def test_a_malformed_key_is_in_no_message(key: str) -> None:
    with pytest.raises(PreflightError) as caught:
        ask(Server("http://127.0.0.1:9", key), "/connected")
    assert not {key, repr(key)[1:-1]} & set(str(caught.value).split("'"))
    for written in (key, repr(key)[1:-1], quote(key, safe=""), quote_plus(key)):
        assert plain(f"GET http://host/?key={written} failed", key) == "GET http://host/?key=<key> failed"
