"""The run folder: what was asked (`run.json`), on which pairs (`pairs.jsonl`), and every value measured (`readouts/`).

Every file is written whole and then moved into place, so a run that is cut short leaves only finished files and the
same command goes on from there. Values are found by row key, never by the order or grouping of jobs.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import struct
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from remote_mediation.engine.answers import lengths_of
from remote_mediation.engine.jobs import Job, Readout
from remote_mediation.errors import StoreError
from remote_mediation.lock import LOCK_FILE, Lock, hold
from remote_mediation.tokens import Prepared, Refusal, from_record, to_record

# What numpy and zipfile raise over damaged bytes.
_DAMAGE = (
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    EOFError,
    RuntimeError,
    MemoryError,
    SyntaxError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)
_log = logging.getLogger(__name__)


class Submitted(NamedTuple):
    """A job that was handed over to a backend."""

    id: str
    ticket: str
    keys: list[str]
    rows: int
    flops: float
    lengths: Sequence[int | None] = ()
    """As of `lengths_of`; empty where an older version handed it over."""


class Store:
    """A run folder. `create` makes or reopens one for a study, `open` reads what is there."""

    def __init__(self, folder: Path) -> None:
        """Use `create` or `open`."""
        self.folder = folder
        self._lock: Lock | None = None

    @classmethod
    def create(cls, folder: Path, identity: dict[str, Any]) -> Store:
        """A new run folder, or the one in which this same study was begun. Nothing is written yet.

        Raises:
            StoreError: the folder holds something else or another study, or lies where nothing can be written.
        """
        store = cls(folder)
        try:
            if (folder / "run.json").exists():
                store._check_same(identity)
            elif folder.exists() and (not folder.is_dir() or _in_use(folder)):
                raise StoreError(f"{folder} is in use and is no run folder; choose another with --out")
            parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        except OSError as error:
            raise StoreError(f"cannot use {folder}: {error.strerror}; choose another --out") from error
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            reason = f"no permission in {parent}" if parent.is_dir() else f"{parent} is a file"
            raise StoreError(f"cannot write {folder}: {reason}; choose another --out")
        return store

    @classmethod
    def open(cls, folder: Path) -> Store:
        """An existing run folder.

        Raises:
            StoreError: there is none.
        """
        store = cls(folder)
        if not store.record():
            raise StoreError(
                f"{folder} is no run folder (it has no run.json); give the folder of a finished or begun run"
            )
        return store

    def record(self) -> dict[str, Any]:
        """What `run.json` holds; empty for a new run.

        Raises:
            StoreError: it cannot be read, or a run of this package did not write it.
        """
        path = self.folder / "run.json"
        try:
            if not path.exists():
                return {}
            record = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise StoreError(f"cannot read {path}: {error}; choose another folder") from error
        if not isinstance(record, dict) or "study" not in record:
            raise StoreError(f"{path} was not written by a run; choose another folder")
        return record

    def save_record(self, record: dict[str, Any]) -> None:
        """Write `run.json`."""
        self._keep("run.json", json.dumps(record, indent=2, sort_keys=True) + "\n")

    def prepared(self, name: str = "pairs") -> Prepared | None:
        """The tokenised pairs of this run, or others by name, once they are known."""
        path = self.folder / f"{name}.jsonl"
        if not path.exists():
            return None
        records = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        return Prepared(
            tuple(from_record(record) for record in records if "reason" not in record),
            tuple(Refusal(**record) for record in records if "reason" in record),
        )

    def save_prepared(self, prepared: Prepared, name: str = "pairs") -> None:
        """Write the tokenised pairs and the refused ones."""
        records = [*map(to_record, prepared.pairs), *map(asdict, prepared.refusals)]
        self._keep(f"{name}.jsonl", "".join(json.dumps(record) + "\n" for record in records))

    def save_ticket(self, ticket: str, job: Job) -> None:
        """Remember that a job was handed over, before anyone waits for it."""
        content = {
            "ticket": ticket,
            "keys": job.keys,
            "rows": job.rows,
            "flops": job.flops,
            "lengths": lengths_of(job),
        }
        self._keep(f"submitted/{job.id}.json", json.dumps(content))

    def submitted(self) -> list[Submitted]:
        """Jobs that were handed over and whose values are not here yet."""
        paths = sorted(self.folder.glob("submitted/*.json"))
        return [Submitted(path.stem, **json.loads(path.read_text("utf-8"))) for path in paths]

    def save_readout(self, job: Job | Submitted, readout: Readout) -> None:
        """Write what a job brought back, and forget its ticket."""
        buffer = io.BytesIO()
        keys, lengths = np.array(job.keys), np.array([len(values) for values in readout.values])
        values = np.concatenate(readout.values)
        np.savez(
            buffer,
            keys=keys,
            lengths=lengths,
            values=values,
            seconds=readout.seconds,
            flops=job.flops,
            checksum=_checksum(keys, lengths, values),
        )
        self._keep(f"readouts/{job.id}.npz", buffer.getvalue())
        self.forget(job.id)

    def forget(self, job_id: str) -> None:
        """Drop a job's ticket."""
        (self.folder / "submitted" / f"{job_id}.json").unlink(missing_ok=True)

    def save_failure(self, pair_id: str, message: str) -> None:
        """Note that a pair's job failed, with the reason."""
        self._keep("failures.json", json.dumps({**self.failures(), pair_id: message}, indent=2) + "\n")

    def failures(self) -> dict[str, str]:
        """Pairs whose jobs failed, with the reason."""
        path = self.folder / "failures.json"
        return json.loads(path.read_text("utf-8")) if path.exists() else {}

    def note(self, name: str) -> Any:
        """What `save_note` kept under a name; None if nothing."""
        path = self.folder / "notes" / f"{name}.json"
        return json.loads(path.read_text("utf-8")) if path.exists() else None

    def save_note(self, name: str, content: Any) -> None:
        """Keep JSON data, such as the verdicts of a judge."""
        self._keep(f"notes/{name}.json", json.dumps(content))

    def values(self) -> dict[str, npt.NDArray[np.float32]]:
        """All values measured so far, by row key; a damaged readout is set aside, so that it is measured anew.

        Raises:
            StoreError: a file of them cannot be opened.
        """
        found: dict[str, npt.NDArray[np.float32]] = {}
        for path in sorted((self.folder / "readouts").glob("*.npz")):
            try:
                found.update(_read(path))
            except OSError as error:
                raise StoreError(f"cannot read {path}: {error.strerror or error}; give back access to it") from error
            except _DAMAGE as error:
                _set_aside(path, error)
        return found

    def _keep(self, name: str, content: str | bytes) -> None:
        """Write what is measured. The folder is this process's alone from the first such file on.

        Raises:
            StoreError: another process measures into the folder, no permission, or no space.
        """
        if self._lock is None:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._lock = hold(self.folder)
            except OSError as error:
                _remove(self.folder / LOCK_FILE)
                raise StoreError(
                    f"cannot write {self.folder}: {error.strerror}; free some space or choose another --out"
                ) from error
        self.write(name, content)

    def write(self, name: str, content: str | bytes) -> None:
        """Write a file of the run folder, whole or not at all.

        Raises:
            StoreError: no permission or no space.
        """
        path = self.folder / name
        partial = path.with_name(f".{path.name}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except OSError as error:
            _remove(partial)
            if not self.folder.exists():
                self._lock = None  # it went with the folder
            raise StoreError(
                f"cannot write {path}: {error.strerror}; free some space or choose another --out"
            ) from error

    def _check_same(self, identity: dict[str, Any]) -> None:
        known = self.record()["study"]
        for name in sorted({*identity, *known}):
            if identity.get(name) != known.get(name):
                raise StoreError(
                    f"{self.folder} holds another study: its {name} is {known.get(name)!r}, not "
                    f"{identity.get(name)!r}; choose another folder with --out"
                )


def _read(path: Path) -> dict[str, npt.NDArray[np.float32]]:
    """Values of one readout, by key. One without a checksum is of an older version.

    Raises:
        ValueError: they are not those that were written, or one of `_DAMAGE`.
    """
    with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as data:
        keys, lengths, values = data["keys"], data["lengths"], data["values"]
        if "checksum" in data and str(data["checksum"]) != _checksum(keys, lengths, values):
            raise ValueError("its checksum is another one")
    if values.dtype != np.float32 or len(keys) != len(lengths) or lengths.sum() != len(values):
        raise ValueError("its values do not belong to its keys")
    parts: Sequence[npt.NDArray[np.float32]] = np.split(values, np.cumsum(lengths)[:-1])
    return dict(zip(keys.tolist(), parts, strict=True))


def _checksum(keys: npt.NDArray[np.str_], lengths: npt.NDArray[np.int64], values: npt.NDArray[np.float32]) -> str:
    """Hash of what a readout says."""
    return hashlib.sha256(b"".join(array.tobytes() for array in (keys, lengths, values))).hexdigest()


def _set_aside(path: Path, error: Exception) -> None:
    """Rename a damaged readout, where the folder can be written; it is not read in either case."""
    aside = path.with_name(f"{path.name}.bad")
    with contextlib.suppress(OSError):
        path.replace(aside)
    _log.warning("%s is damaged (%s): set aside as %s, to be measured anew", path, error or type(error).__name__, aside)


def _in_use(folder: Path) -> bool:
    """Whether a folder has files, other than what a run leaves that ended before its first file."""
    return any(path.name != LOCK_FILE for path in folder.iterdir())


def _remove(partial: Path) -> None:
    """Take away an unfinished file, and its folder where it was to be the first file in it beside the lock."""
    with contextlib.suppress(OSError):
        partial.unlink(missing_ok=True)
        if [path.name for path in partial.parent.iterdir()] == [LOCK_FILE]:
            (partial.parent / LOCK_FILE).unlink()
        partial.parent.rmdir()
