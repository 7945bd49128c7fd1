"""Errors that a user can act on. Every message says what happened, with which values, and what to do next.

MediationError
├── InputError            what was asked for cannot be run; nothing was written (exit code 2)
│   ├── SettingsError     study file or flags
│   ├── PairsError        pairs file, alignment, responses
│   ├── SiteError         unknown family, component, layer, unit or position
│   ├── ModelError        model or tokenizer not found
│   ├── JudgeError        judge that cannot be loaded or answers amiss, file of labelled answers
│   └── StoreError        run folder: another study, no permission, no space
└── BackendError          the place that runs the model (exit code 1)
    ├── PreflightError    server not reachable, key refused, model not deployable, versions apart
    ├── TransportError    connection lost; the only error that is retried
    ├── OutOfMemoryError  a job is too large for the GPU of this machine
    └── JobError          the job itself failed; carries the server's message
"""

from __future__ import annotations


def innermost(error: BaseException) -> str:
    """The cause at the bottom of an exception, as one line that names its kind where its text does not say enough.

    Where a text quotes tracebacks, that of the first is the cause.
    """
    while (cause := error.__cause__ or (None if error.__suppress_context__ else error.__context__)) is not None:
        error = cause
    if quoted := _quoted(str(error).splitlines()):
        return quoted
    text = " ".join(str(error).split())
    return text if isinstance(error, (OSError, ValueError)) and text else f"{type(error).__name__}: {text}"


def _quoted(lines: list[str]) -> str:
    """The line that names the exception in the first traceback that a message quotes; empty where it quotes none."""
    inside = False
    for line in lines:
        if inside and line.strip() and not line[0].isspace():
            return line.strip()
        inside = inside or line.startswith("Traceback (most recent call last)")
    return ""


def let_stop(error: BaseException) -> None:
    """Let an exception through that ends the process; all others are errors of the foreign code that raised them.

    Rust's panics, as a damaged `tokenizer.json` may cause, are among these and are no `Exception`.
    """
    if isinstance(error, (KeyboardInterrupt, SystemExit)):
        raise error


class MediationError(Exception):
    """Root of all errors raised on purpose by this package."""

    exit_code = 1


class InputError(MediationError):
    """The request cannot be run as it stands."""

    exit_code = 2


class SettingsError(InputError):
    """A study file or a flag holds a value that is not allowed."""


class PairsError(InputError):
    """A pairs file cannot be read, or its pairs cannot be used."""


class SiteError(InputError):
    """A site names something that the model does not have."""


class ModelError(InputError):
    """A model, its configuration or its tokenizer cannot be loaded."""


class JudgeError(InputError):
    """A judge cannot be loaded, its verdicts cannot be used, or a file of labelled answers cannot be read."""


class StoreError(InputError):
    """A run folder cannot be used."""


class BackendError(MediationError):
    """The backend could not run what was asked."""


class PreflightError(BackendError):
    """A remote study would fail before its first job."""


class TransportError(BackendError):
    """The connection failed; the job may still be running."""

    def __init__(self, message: str, status: int | None = None, wait: float = 0.0, *, silent: bool = False) -> None:
        """Say what happened on the way.

        status: of HTTP, if there was an answer. wait: seconds for which the server asks to be left alone. silent:
        whether the server is there and did not answer in time.
        """
        super().__init__(message)
        self.status, self.wait, self.silent = status, wait, silent


class OutOfMemoryError(BackendError):
    """A job needs more memory than a GPU of this machine has."""


class JobError(BackendError):
    """A job failed where it ran."""


class LostJobError(BackendError):
    """A job that was handed over is not known any more."""
