"""What the server needs on the machine: a virtual environment of its own, and Redis."""

import os
import shutil
import subprocess
from pathlib import Path

from .errors import StackError
from .settings import LOGS, SERVER_CODE, VENV

_REQUIREMENTS = SERVER_CODE / "requirements.txt"
_NDIF = ["--no-deps", "--ignore-requires-python", "ndif==0.1.2"]
"""ndif 0.1.2 declares Python >= 3.12, where nnsight 0.8.1 can read a loop's previous value; its code runs on 3.11."""
_INSTALLED = VENV / "installed.txt"
"""What the environment was built from; written last, so a broken installation is never taken for a whole one."""


def environment() -> None:
    """Create the server's virtual environment, unless it already has these versions."""
    wanted = _REQUIREMENTS.read_text() + " ".join(_NDIF) + "\n"
    if _INSTALLED.is_file() and _INSTALLED.read_text() == wanted:
        return
    python = os.environ.get("NDIF_PYTHON", "python3.11")
    if not shutil.which(python):
        raise StackError(f"{python} is not on the PATH; install Python 3.11 or set NDIF_PYTHON to its interpreter")
    print(f"installing the server into {VENV} (1.7 GB, a minute or two)", flush=True)
    pip = [str(VENV / "bin" / "pip"), "install", "--progress-bar=off"]
    _run([python, "-m", "venv", "--clear", str(VENV)])
    _run([*pip, "-r", str(_REQUIREMENTS)])
    _run([*pip, *_NDIF])
    _INSTALLED.write_text(wanted)


def redis() -> None:
    """Install Debian's redis-server if there is none."""
    if shutil.which("redis-server"):
        return
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise StackError("there is no redis-server on the PATH; install it, for example: apt-get install redis-server")
    print("installing redis-server with apt-get", flush=True)
    _run(["apt-get", "update"])
    _run(["apt-get", "install", "--yes", "--no-install-recommends", "redis-server"])


def _run(argv: list[str]) -> None:
    log = LOGS / "install.log"
    with log.open("ab") as output:
        status = subprocess.run(argv, check=False, stdout=output, stderr=subprocess.STDOUT).returncode
    if status:
        raise StackError(f"{' '.join(argv)} ended with status {status}; last lines of {log}:\n{tail(log)}")


def tail(log: Path, lines: int = 20) -> str:
    """The last lines of a log, indented."""
    if not log.is_file():
        return "  (there is no log)"
    return "\n".join("  " + line for line in log.read_text(errors="replace").splitlines()[-lines:])
