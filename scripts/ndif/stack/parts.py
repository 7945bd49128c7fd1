"""The five parts of the server as data: which command is each.

    client ──HTTP, websocket──► api ──queue, answers── redis
                                 │                       │
                                 └──Ray client──► ray (controller, model actors) ──results──► s3
                                                          └──weights── hub

`redis`, `s3` and `hub` stand alone; `ray` needs all three when it loads and runs a model; `api` needs redis and ray.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from .settings import LOGS, LOOPBACK, RAY_TEMP, RUN, SERVER_CODE, VENV, Settings

_OBJECT_STORE_BYTES = 200_000_000
_ACTOR_SLOTS = 8
"""The controller and each model actor take one. Memory, not this number, is meant to be the limit."""

Command = Callable[[Settings], list[str]]


@dataclass(frozen=True)
class Part:
    """A program of its own, that can be started and stopped without the others."""

    name: str
    command: Command
    completion: Command | None = None
    """Runs to its end once the part takes connections."""
    environment: dict[str, str] = field(default_factory=dict)
    """Beside what all parts see."""

    @property
    def log(self) -> Path:
        """Where its output goes."""
        return LOGS / f"{self.name}.log"

    @property
    def record(self) -> Path:
        """Where its process is written down while it is meant to run."""
        return RUN / f"{self.name}.pid"


def _redis(settings: Settings) -> list[str]:
    # The append-only file keeps the queue, and the flag by which the API knows of Ray, across a restart of Redis alone.
    options = {"port": settings.port("redis"), "bind": LOOPBACK, "dir": RUN, "save": "", "appendonly": "yes"}
    return ["redis-server", *(word for name, value in options.items() for word in (f"--{name}", str(value)))]


def _s3(settings: Settings) -> list[str]:
    return [_program("moto_server"), "--host", LOOPBACK, "--port", str(settings.port("s3"))]


def _bucket(settings: Settings) -> list[str]:
    """Makes the bucket: ndif does so once in each of its processes, and would not again for a store that restarted."""
    code = "from ndif.common.providers.objectstore import ObjectStoreProvider as store; store.put('started', b'')"
    return [_program("python"), "-c", code]


def _hub(settings: Settings) -> list[str]:
    models = [f"{repo}={folder}" for repo, folder in settings.models.items()]
    return [_program("python"), str(SERVER_CODE / "hub.py"), str(settings.port("hub")), *models]


def _ray(settings: Settings) -> list[str]:
    # The controller passes over nodes without a GPU, so this one claims a GPU that has half of the machine's memory.
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    resources = {"head": 10, "cuda_memory_bytes": memory, "cpu_memory_bytes": memory}
    first_worker, last_worker = settings.worker_ports
    options = {
        "node-ip-address": LOOPBACK,
        "dashboard-host": LOOPBACK,
        "temp-dir": RAY_TEMP,
        "num-cpus": _ACTOR_SLOTS,
        "num-gpus": 1,
        "resources": json.dumps(resources),
        "object-store-memory": _OBJECT_STORE_BYTES,
        "ray-client-server-port": settings.port("ray"),
        "port": settings.port("ray-gcs"),
        "object-manager-port": settings.port("ray-objects"),
        "node-manager-port": settings.port("ray-nodes"),
        "dashboard-port": settings.port("ray-dashboard"),
        "dashboard-agent-grpc-port": settings.port("ray-agent-grpc"),
        "dashboard-agent-listen-port": settings.port("ray-agent-http"),
        "runtime-env-agent-port": settings.port("ray-runtime-env"),
        "metrics-export-port": settings.port("ray-metrics"),
        "min-worker-port": first_worker,
        "max-worker-port": last_worker,
        "include-dashboard": "true",  # the controller lists nodes and actors through it
    }
    return [_program("ray"), "start", "--head", "--block", *(f"--{name}={value}" for name, value in options.items())]


def _controller(settings: Settings) -> list[str]:
    """Puts ndif's controller, an actor that outlives this command, onto the Ray that was just started."""
    address = f"RAY_ADDRESS={LOOPBACK}:{settings.port('ray-gcs')}"
    return ["env", address, _program("python"), "-m", "ndif.services.ray.deployments.controller.controller"]


def _api(settings: Settings) -> list[str]:
    config = "python:ndif.services.api.gunicorn_conf"
    address = f"{LOOPBACK}:{settings.port('api')}"
    return [_program("gunicorn"), "--config", config, "--bind", address, "ndif.services.api.app:app"]


def _program(name: str) -> str:
    return str(VENV / "bin" / name)


PARTS = {
    part.name: part
    for part in (
        Part("redis", _redis),
        Part("s3", _s3, completion=_bucket),
        Part("hub", _hub),
        Part("ray", _ray, completion=_controller),
        Part(
            "api",
            _api,
            environment={
                "NNSIGHT_CONFIG": str(SERVER_CODE / "nnsight-api.yaml"),
                # Without it the API answers the loss of Ray by starting a Ray of its own, and never finds the new one.
                "RAY_ENABLE_AUTO_CONNECT": "0",
            },
        ),
    )
}
"""In the order of starting; stopping goes backwards."""
