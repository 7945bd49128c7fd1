"""Where the server lives, which ports it takes and what environment its processes see.

`up` decides the settings once and writes them down; the other commands read them back, so they speak about the
server that is there and not about the shell they were typed in.
"""

import hashlib
import json
import os
import shlex
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from .errors import StackError

SERVER_CODE = Path(__file__).resolve().parent.parent / "server"
HOME = Path(__file__).resolve().parents[3] / ".ndif"
"""The one folder written to. Git-ignored by a file of its own, so the project need not know of it."""

VENV = HOME / "venv"
LOGS = HOME / "logs"
RUN = HOME / "run"
"""Everything `down` deletes: pids, Redis's data, the server's model cache; and Ray's session, there if it fits."""
RAY_TEMP = RUN / "ray"
if len(str(RAY_TEMP)) > 44:  # Ray puts sockets up to 63 characters below it; the kernel takes paths of up to 107
    RAY_TEMP = Path(tempfile.gettempdir()) / f"ray-{hashlib.sha256(str(HOME).encode()).hexdigest()[:12]}"
SERVER_HOME = RUN / "home"
SERVER_TEMP = RUN / "tmp"
CLIENT_CACHE = HOME / "client"
"""HF_HOME of clients: the look-alike hub's commits must not mix with those of the real one."""
ENV_FILE = HOME / "env.sh"
_RECORD = RUN / "settings.json"

LOOPBACK = "127.0.0.1"
DEFAULT_REPO = "HuggingFaceTB/SmolLM2-135M-Instruct"

_PORTS = (
    "api",
    "redis",
    "s3",
    "hub",
    "ray",
    "ray-gcs",
    "ray-objects",
    "ray-nodes",
    "ray-dashboard",
    "ray-agent-grpc",
    "ray-agent-http",
    "ray-runtime-env",
    "ray-metrics",
    "ray-dashboard-metrics",
    "ray-autoscaler-metrics",
)
"""A port is the base plus its place here. `ray` is the one that the API connects to."""
_FIRST_WORKER, _LAST_WORKER = 100, 399
"""Ray gives each worker process a port; without a range of their own they land on the ones above."""
_RAY_CLIENT_SERVERS = 23000
"""Ray starts one process per connected client on the ports from here on; that is fixed in its source."""

TUNABLE = {
    "NDIF_DEFAULT_EXECUTION_TIMEOUT_SECONDS": "600",
    "NDIF_DEFAULT_DTYPE": "float32",
    "NDIF_STATUS_TTL_S": "5",
    "NDIF_STATUS_TIMEOUT_S": "10",
    "NDIF_AUTOSCALING_MAX_REPLICAS": "1",
    "NDIF_SANDBOX_POOL_SIZE": "2",
    "NDIF_LOG_LEVEL": "INFO",
    "OMP_NUM_THREADS": "1",
}
"""Server settings that the caller's environment may override, with the value used otherwise.

One replica, because a second one (NDIF adds it when a job waits 30 s) halves the speed of the first on a small machine.
"""


@dataclass(frozen=True)
class Settings:
    """What distinguishes one server from another."""

    models: dict[str, str]
    """Repo id -> folder with config, tokenizer and safetensors files."""
    sandbox: bool
    """Blocks run in a process apart from the model, as for the users of a shared NDIF."""
    port_base: int
    tuning: dict[str, str]
    """A value for each name in TUNABLE."""

    def port(self, name: str) -> int:
        """The port of a part, or one of Ray's other ports."""
        return self.port_base + _PORTS.index(name)

    @property
    def worker_ports(self) -> tuple[int, int]:
        """First and last port of Ray's workers."""
        return self.port_base + _FIRST_WORKER, self.port_base + _LAST_WORKER

    def url(self, name: str) -> str:
        """The address of a part that speaks HTTP."""
        return f"http://{LOOPBACK}:{self.port(name)}"

    def save(self) -> None:
        """Write down that this is the server that runs."""
        _RECORD.write_text(json.dumps(asdict(self), indent=2))


def load() -> Settings | None:
    """The settings of the server that `up` started last, None after `down`."""
    try:
        return Settings(**json.loads(_RECORD.read_text()))
    except FileNotFoundError:
        return None


def from_arguments(models: list[str], *, sandbox: bool) -> Settings:
    """The settings asked for, with what is left to the environment and to the server's previous settings.

    Args:
        models: `DIR` or `DIR=REPO_ID`; empty means the models that were served before.
        sandbox: whether blocks run in a process of their own.
    """
    previous = load()
    if models:
        served = _parse_models(models)
    elif previous:
        served = previous.models
    else:
        raise StackError("name a model folder to serve: up MODEL_DIR[=REPO_ID] ...")
    return Settings(
        models=served,
        sandbox=sandbox,
        port_base=_port_base(),
        tuning={name: os.environ.get(name, default) for name, default in TUNABLE.items()},
    )


def _parse_models(arguments: list[str]) -> dict[str, str]:
    models: dict[str, str] = {}
    for argument in arguments:
        folder, _, repo = argument.partition("=")
        repo = repo or DEFAULT_REPO
        path = Path(folder).resolve()
        if not (path / "config.json").is_file():
            raise StackError(f"{path} holds no config.json; give a folder as save_pretrained() writes it")
        if repo.count("/") != 1:
            raise StackError(f"{repo!r} is not a repo id of the form OWNER/NAME")
        if repo in models:
            raise StackError(f"two folders for {repo}; give the others a name of their own: {folder}=OWNER/NAME")
        models[repo] = str(path)
    return models


def _port_base() -> int:
    text = os.environ.get("NDIF_PORT_BASE", "18000")
    highest = _RAY_CLIENT_SERVERS - _LAST_WORKER - 1
    if not text.isdigit() or not 1024 <= int(text) <= highest:
        raise StackError(f"NDIF_PORT_BASE is {text!r}; it must be a number from 1024 to {highest}")
    return int(text)


def server_environment(settings: Settings) -> dict[str, str]:
    """The whole environment of the server's processes.

    Nothing is inherited but the search path and the TUNABLE names, so that a token, a proxy or a RAY_ADDRESS in the
    caller's shell can neither reach the jobs nor change what the server does.
    """
    actor = "CPUSandboxModelActor" if settings.sandbox else "CPUModelActor"
    return settings.tuning | {
        "PATH": os.pathsep.join([str(VENV / "bin"), os.environ.get("PATH", os.defpath)]),
        "HOME": str(SERVER_HOME),
        "TMPDIR": str(SERVER_TEMP),
        "LANG": "C.UTF-8",
        "PYTHONPATH": str(SERVER_CODE),
        "PYTHONDONTWRITEBYTECODE": "1",
        "NDIF_MODEL_IMPORT_PATH": f"cpu_actors.{actor}",
        "NDIF_CONTROLLER_IMPORT_PATH": "cpu_actors.CPUControllerActor",
        "NDIF_REDIS_URL": f"redis://{LOOPBACK}:{settings.port('redis')}",
        "NDIF_OBJECT_STORE_URL": settings.url("s3"),
        "NDIF_OBJECT_STORE_ACCESS_KEY": "ndif",
        "NDIF_OBJECT_STORE_SECRET_KEY": "in-memory",
        "NDIF_RAY_ADDRESS": f"ray://{LOOPBACK}:{settings.port('ray')}",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "disabled",  # unless told so, Ray turns authentication on where it finds a token
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # no other node could take the work over
        "DASHBOARD_METRIC_PORT": str(settings.port("ray-dashboard-metrics")),
        "AUTOSCALER_METRIC_PORT": str(settings.port("ray-autoscaler-metrics")),
        # Makes Ray stay on loopback. Otherwise it takes 127.0.0.1 for the machine's own address, and listens there too:
        # whoever reaches those ports can run code.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        # With it Ray's per-client servers die at birth now and then (ndif's own ray/start.sh measures it).
        "GRPC_ENABLE_FORK_SUPPORT": "0",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HOME": str(RUN / "huggingface"),
        **_hub_environment(settings),
    }


def client_environment(settings: Settings) -> dict[str, str]:
    """What a client has to export to reach this server and nothing else."""
    return {
        "NDIF_HOST": settings.url("api"),
        "HF_HOME": str(CLIENT_CACHE),
        "NO_PROXY": _no_proxy(),
        "no_proxy": _no_proxy(),
        **_hub_environment(settings),
    }


def _hub_environment(settings: Settings) -> dict[str, str]:
    return {
        "HF_ENDPOINT": settings.url("hub"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
    }


def _no_proxy() -> str:
    """The caller's exceptions from its proxy, loopback among them."""
    hosts = os.environ.get("NO_PROXY", "").split(",")
    return ",".join([LOOPBACK, *(host for host in hosts if host and host != LOOPBACK)])


def export_lines(environment: dict[str, str]) -> str:
    """The environment as lines that a shell can source."""
    return "".join(f"export {name}={shlex.quote(value)}\n" for name, value in environment.items())


def tunable_help() -> str:
    """The environment variables that `up` reads, as an epilog for --help."""
    rows = {"NDIF_PORT_BASE": "18000", "NDIF_PYTHON": "python3.11", **TUNABLE}
    return "environment (name, default):\n" + "\n".join(f"  {name:40} {value}" for name, value in rows.items())
