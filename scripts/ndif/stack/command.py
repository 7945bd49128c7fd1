"""What `up`, `down` and `part` share as commands: one at a time, and errors as sentences."""

import fcntl
import sys
from collections.abc import Callable
from typing import NoReturn

from .errors import StackError
from .settings import HOME, LOGS


def run(command: Callable[[], int], *, alone: bool = True) -> NoReturn:
    """Run a command and exit with its status.

    Args:
        command: returns the exit status.
        alone: wait for other commands to end and keep later ones waiting.
    """
    try:
        sys.exit(_run_alone(command) if alone else command())
    except StackError as error:
        sys.exit(f"error: {error}")


def _run_alone(command: Callable[[], int]) -> int:
    LOGS.mkdir(parents=True, exist_ok=True)
    (HOME / ".gitignore").write_text("*\n")
    with (HOME / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return command()
