"""What an NDIF server says of itself over HTTP: whether it is there, what it runs, which versions, whose key this is.

nnsight's own `status()` and `is_model_running()` turn every failure into "down" or "not running". Here each failure
keeps its name, because what to do about it differs.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import httpx

from remote_mediation.engine.exchange import OddError, Server, exchange, plain
from remote_mediation.errors import JobError, PreflightError, TransportError

PUBLIC_HOST = "https://api.ndif.us"
# Packages whose version decides whether a program means the same on both sides.
_SHARED = ("nnsight", "transformers", "torch")
_TIMEOUT = httpx.Timeout(10.0, read=5.0)
# Seconds for which a server that cannot reach its models is asked again: it takes so long after a restart.
_RECONNECT_S = 30.0
_RECONNECT_PAUSE_S = 2.0
# Characters from which on a key is one and not a word, such as "test", which may well stand in a host's name.
_SECRET = 12

State = Literal["hot", "warm", "deploying", "cold", "unhealthy"]


@dataclass(frozen=True)
class Deployment:
    """One model on a server."""

    repo_id: str
    """Hub id."""
    revision: str
    """Hub revision."""
    task: str
    """Pipeline task."""
    state: State
    """hot: ready; warm: kept in memory, ready in seconds; deploying; cold: on disk; unhealthy."""
    replicas: int
    """Copies of it."""


@dataclass(frozen=True)
class Finding:
    """One thing that `doctor` or a preflight looked at."""

    name: str
    """What."""
    good: bool
    """Whether a study can run with it as it is."""
    detail: str
    """What was found, and what to do where it is not good."""


def server_from_environment() -> Server:
    """Host and key from `NDIF_HOST` and `NDIF_API_KEY`, else from nnsight's configuration.

    Raises:
        PreflightError: the key cannot be one, or the host is no bare address; neither is shown, as it may hold a key.
    """
    from nnsight import CONFIG

    host = (os.environ.get("NDIF_HOST") or CONFIG.API.HOST or PUBLIC_HOST).strip().rstrip("/")
    key = (os.environ.get("NDIF_API_KEY") or CONFIG.API.APIKEY or "").strip()
    if not all("!" <= letter <= "~" for letter in key):
        raise PreflightError("NDIF_API_KEY has spaces, control characters or letters beyond ASCII; copy the key again")
    if re.search(r"[@?#\s\x00-\x1f\x7f]", host) or (len(key) >= _SECRET and key in host):
        raise PreflightError(
            "NDIF_HOST holds more than an address (user, password, query or spaces); set it to https://HOST and the "
            "key as NDIF_API_KEY"
        )
    return Server(host, key)


class SilentError(PreflightError):
    """The server is there and one of its answers fails or does not come in time; jobs may run all the same."""


def ask(server: Server, path: str) -> dict[str, Any]:
    """A server's answer to GET `path`, an object of JSON.

    Raises:
        PreflightError: not reachable, not an NDIF server, or an error of its own; the message tells which.
        SilentError: it is there and fails to answer this, or not in time.
    """
    try:
        return exchange(server, "GET", path, _TIMEOUT)
    except TransportError as error:
        if error.silent:
            raise SilentError(str(error)) from error
        if error.status == 200:
            raise PreflightError(f"{error}, not as an NDIF server does; check NDIF_HOST") from error
        if error.status is not None:
            raise SilentError(f"{error}; try again in a few minutes") from error
        raise PreflightError(f"{error}; check NDIF_HOST and the network") from error
    except JobError as error:
        raise PreflightError(str(error)) from error


def _ask_about(server: Server, path: str) -> dict[str, Any]:
    """The same of what a study can do without.

    Raises:
        PreflightError: not reachable, or not an NDIF server.
        SilentError: it fails to answer this, not in time, or as no NDIF server does.
    """
    try:
        return ask(server, path)
    except OddError as error:
        raise SilentError(str(error)) from error


def await_connected(server: Server, patience: float = _RECONNECT_S) -> None:
    """Return once the server reaches what runs its models; it says 503 for some seconds after a restart.

    Raises:
        PreflightError: see `ask`; it did not within `patience` seconds.
    """
    end = time.monotonic() + patience
    while True:
        try:
            answer = ask(server, "/connected")
        except SilentError:
            if time.monotonic() > end:
                raise
            time.sleep(min(_RECONNECT_PAUSE_S, patience))
            continue
        if "status" not in answer:
            raise PreflightError(f"{server.host} does not answer as an NDIF server does; check NDIF_HOST")
        return


def deployments(server: Server) -> list[Deployment]:
    """The models that a server has, replicas of one model together.

    Raises:
        PreflightError: see `ask`.
        SilentError: it does not say which.
    """
    entries = _ask_about(server, "/status").get("deployments")
    if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
        raise SilentError(f"{server.host} answers /status without a table of deployments")
    groups: dict[tuple[str, str, str], list[State]] = {}
    for name, entry in entries.items():
        known = {**entry, "repo_id": entry.get("repo_id") or name, "revision": entry.get("revision") or "main"}
        repo_id, revision, task = (
            plain(str(known.get(of) or ""), server.key) for of in ("repo_id", "revision", "task")
        )
        groups.setdefault((repo_id, revision, task), []).append(_state(entry))
    order: tuple[State, ...] = ("hot", "warm", "deploying", "cold", "unhealthy")
    return [Deployment(*key, min(states, key=order.index), len(states)) for key, states in sorted(groups.items())]


def check_versions(server: Server) -> list[Finding]:
    """Python and package versions on both sides, the server's word against ours.

    Raises:
        PreflightError: see `ask`.
    """
    try:
        remote = _ask_about(server, "/env")
    except SilentError as error:
        return [Finding("versions", True, f"not compared: {error}")]
    packages = remote.get("packages")
    known = packages if isinstance(packages, dict) else {}
    theirs = {"python": plain(str(remote.get("python_version") or ""), server.key).split(" ")[0]}
    theirs |= {name: plain(str(known.get(name) or ""), server.key) for name in _SHARED}
    ours = {"python": platform.python_version(), **{name: metadata.version(name) for name in _SHARED}}
    return [_compared(name, ours[name], theirs[name]) for name in ours]


def preflight(server: Server, model: str | None, revision: str, patience: float = _RECONNECT_S) -> list[Finding]:
    """Everything that would make a study fail before its first job: server, key, versions, and the model if named.

    `/connected` tells whether jobs run. `/status` may keep silent while they do (ndif 0.1.2, after a restart of its
    Redis), so its silence is told and stops nothing.

    Raises:
        PreflightError: the server cannot be asked.
    """
    await_connected(server, patience)
    findings = [Finding("server", True, f"{server.host} is connected to its models"), _key(server)]
    findings += check_versions(server)
    try:
        found = deployments(server)
    except SilentError as error:
        return [*findings, Finding("models", True, f"not known: {error}; jobs run meanwhile")]
    findings.append(Finding("models", True, f"{len(found)} known"))
    return [*findings, _model(found, model, revision)] if model else findings


def examine(server: Server, model: str | None, revision: str) -> list[Finding]:
    """What `doctor` reports: this machine first, then the server, then the model if one is named. Never raises."""
    findings = [
        Finding("python", sys.version_info >= (3, 11), platform.python_version()),
        _disk(),
        Finding("host", True, f"{server.host} ({'NDIF_HOST' if os.environ.get('NDIF_HOST') else 'default'})"),
    ]
    try:
        return findings + preflight(server, model, revision, patience=0.0)
    except PreflightError as error:
        return [*findings, Finding("server", False, str(error))]


def _disk() -> Finding:
    try:
        free = shutil.disk_usage(Path.cwd()).free / 1e9
    except OSError as error:
        return Finding("disk", False, f"this folder cannot be used ({error.strerror}); go into another one")
    return Finding("disk", free > 1, f"{free:.1f} GB free here" + ("" if free > 1 else "; a run needs about 1 GB"))


def refuse_bad(findings: list[Finding]) -> None:
    """Raise for the findings with which a study cannot run.

    Raises:
        PreflightError: at least one finding is not good.
    """
    bad = [f"{finding.name}: {finding.detail}" for finding in findings if not finding.good]
    if bad:
        raise PreflightError("; ".join(bad))


def _model(found: list[Deployment], repo_id: str, revision: str) -> Finding:
    wanted = (repo_id.lower(), revision or "main")
    mine = [one for one in found if (one.repo_id.lower(), one.revision) == wanted]
    if mine:
        return Finding("model", mine[0].state != "unhealthy", f"{repo_id} is {mine[0].state}")
    return Finding("model", True, f"{repo_id} is not deployed; its first job asks the server to deploy it")


def _state(entry: dict[str, Any]) -> State:
    application, level = entry.get("application_state"), str(entry.get("deployment_level", "")).lower()
    if application == "DEPLOYING":
        return "deploying"
    if level == "cold":
        return "cold"
    if application == "UNHEALTHY":
        return "unhealthy"
    return "warm" if level == "warm" else "hot"


def _key(server: Server) -> Finding:
    identity = ask(server, "/whoami")
    if identity.get("email"):
        return Finding("key", True, f"accepted, {plain(str(identity['email']), server.key)}")
    if server.host == PUBLIC_HOST:
        what = "not recognised" if server.key else "not set"
        return Finding("key", False, f"{what}; register at https://login.ndif.us and set NDIF_API_KEY")
    return Finding("key", True, "this server does not know the key, or asks for none")


def _compared(name: str, ours: str, theirs: str) -> Finding:
    if not theirs:
        return Finding(name, True, f"{ours} here, unknown on the server")
    if ours == theirs:
        return Finding(name, True, f"{ours} on both sides")
    if name == "nnsight":
        return Finding(name, False, f"{ours} here, {theirs} on the server: jobs may not load there; install {theirs}")
    if name == "python" and ours.split(".")[:2] != theirs.split(".")[:2]:
        return Finding(name, True, f"{ours} here, {theirs} on the server: jobs travel as source, so this is no problem")
    return Finding(name, True, f"{ours} here, {theirs} on the server")
