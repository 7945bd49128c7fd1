"""Start, watch and stop the server and its parts."""

import json
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from contextlib import suppress
from typing import Any, NoReturn

from . import processes
from .errors import StackError
from .install import tail
from .parts import PARTS, Part
from .processes import Session, wait_until
from .settings import (
    ENV_FILE,
    LOOPBACK,
    RAY_TEMP,
    RUN,
    SERVER_HOME,
    SERVER_TEMP,
    Settings,
    client_environment,
    export_lines,
    server_environment,
)

_PART_TIMEOUT_S = 90.0
_CONNECT_TIMEOUT_S = 120.0
_STATUS_TIMEOUT_S = 60.0
_ANSWER_TIMEOUT_S = 90.0
_MODEL_ACTORS = ("ray::CPUModel", "ray::CPUSandboxModel")
"""How Ray titles the processes that run the classes of server/cpu_actors.py."""


def start_all(settings: Settings) -> None:
    """Start the server and return when its API has a status. If a part fails, the others are left running."""
    for folder in (SERVER_HOME, SERVER_TEMP):
        folder.mkdir(parents=True, exist_ok=True)
    for part in PARTS.values():
        if part.log.exists():
            part.log.replace(part.log.with_suffix(".previous.log"))
    settings.save()
    start(["redis", "s3", "hub", "ray"], settings)
    start(["api"], settings)
    await_status(settings)
    ENV_FILE.write_text(export_lines(client_environment(settings)))


def start(names: list[str], settings: Settings) -> None:
    """Start parts side by side and return when each takes connections."""
    chosen = [PARTS[name] for name in names]
    for part in chosen:
        _start(part, settings)
    for part in chosen:
        _await(part, settings)
        if part.completion:
            _complete(part, part.completion(settings), settings)


def _start(part: Part, settings: Settings) -> None:
    stop(part)  # what a killed first process left behind
    port = settings.port(part.name)
    if _listens(port):
        raise StackError(f"port {port} ({part.name}) is taken by another program; set NDIF_PORT_BASE")
    session = processes.start(
        part.command(settings), environment=server_environment(settings) | part.environment, folder=RUN, log=part.log
    )
    part.record.write_text(" ".join(map(str, session)))


def _await(part: Part, settings: Settings) -> None:
    wait_until(lambda: is_up(part, settings) or first_pid(part) is None, _PART_TIMEOUT_S)
    if first_pid(part) is None:
        _fail(f"{part.name} ended at once", part)
    if not is_up(part, settings):
        _fail(f"{part.name} did not open port {settings.port(part.name)} within {_PART_TIMEOUT_S:.0f} s", part)


def _complete(part: Part, command: list[str], settings: Settings) -> None:
    with part.log.open("ab") as output:
        status = subprocess.run(
            command, check=False, env=server_environment(settings), cwd=RUN, stdout=output, stderr=subprocess.STDOUT
        ).returncode
    if status:
        _fail(f"{' '.join(command)} ended with status {status}", part)


def await_status(settings: Settings) -> None:
    """Return when the API has a status from the controller, which takes Redis, Ray and the API."""
    if not wait_until(lambda: _get(settings, "/connected") is not None, _CONNECT_TIMEOUT_S):
        _fail(f"the API did not reach Ray within {_CONNECT_TIMEOUT_S:.0f} s", PARTS["api"], PARTS["ray"])
    # The API is connected a moment before it listens for status requests; one that comes in between waits in vain.
    time.sleep(1)
    if not wait_until(lambda: status(settings) is not None, _STATUS_TIMEOUT_S):
        _fail(f"{settings.url('api')}/status has no answer within {_STATUS_TIMEOUT_S:.0f} s", PARTS["api"])


def _fail(problem: str, *parts: Part) -> NoReturn:
    logs = "".join(f"\nlast lines of {part.log}:\n{tail(part.log)}" for part in parts)
    raise StackError(problem + logs)


def status(settings: Settings) -> dict[str, Any] | None:
    """What the API's /status says, None if it refuses or is not there."""
    return _get(settings, "/status")


def is_up(part: Part, settings: Settings) -> bool:
    """Whether the part's first process lives and its port takes connections."""
    return first_pid(part) is not None and _listens(settings.port(part.name))


def all_up(settings: Settings) -> bool:
    """Whether each part is up."""
    return all(is_up(part, settings) for part in PARTS.values())


def first_pid(part: Part) -> int | None:
    """The process that `start` made, None if it is gone, although others of the part may be left."""
    session = _session(part)
    return session.leader if session and session.leader in processes.members(session) else None


def pids(part: Part) -> list[int]:
    """All processes of a part."""
    session = _session(part)
    return processes.members(session) if session else []


def model_actor_pids() -> list[int]:
    """Processes that hold a model."""
    return [pid for pid in pids(PARTS["ray"]) if processes.title(pid).startswith(_MODEL_ACTORS)]


def stop(part: Part) -> bool:
    """End a part's processes and forget it; returns whether there were any."""
    session = _session(part)
    if session is None:
        return False
    was_running = bool(processes.members(session))
    processes.stop(session)
    part.record.unlink()
    return was_running


def stop_all() -> list[str]:
    """End all parts and delete what they wrote but for the logs; returns the names of those that ran."""
    stopped = [part.name for part in reversed(PARTS.values()) if stop(part)]
    for folder in (RUN, RAY_TEMP):
        shutil.rmtree(folder, ignore_errors=True)
    ENV_FILE.unlink(missing_ok=True)
    return stopped


def kill(part: Part) -> None:
    """End a part's processes as a crash would: without notice, all at once."""
    session = _session(part)
    if session:
        processes.kill(session)


def kill_model_actors() -> None:
    """End the processes that hold a model; Ray starts them again."""
    for pid in model_actor_pids():
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _session(part: Part) -> Session | None:
    """What `start` recorded, also when the processes are gone."""
    try:
        leader, started, boot = part.record.read_text().split()
    except FileNotFoundError:
        return None
    return Session(int(leader), int(started), boot)


def _listens(port: int) -> bool:
    try:
        socket.create_connection((LOOPBACK, port), timeout=1).close()
    except OSError:
        return False
    return True


def _get(settings: Settings, path: str) -> dict[str, Any] | None:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy in the environment is not for us
    try:
        with direct.open(settings.url("api") + path, timeout=_ANSWER_TIMEOUT_S) as answer:
            value: dict[str, Any] = json.load(answer)
    except OSError:
        return None
    return value
