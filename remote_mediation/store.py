"""The run folder: what was asked (`run.json`), on which pairs (`pairs.jsonl`), and every value measured (`readouts/`).

Every file is written whole and then moved into place, so a run that is cut short leaves only finished files and the
same command goes on from there. `run.json`, without which nothing can be read, has a copy beside it. Values are found
by row key, never by the order or grouping of jobs. What is measured only its owner can read: it has prompts and
answers, most of them as numbers of tokens. `run.json` has none.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Sequence
from functools import partial
from math import inf
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter, ValidationError

from remote_mediation import runfiles
from remote_mediation.config import StudyConfig
from remote_mediation.engine.jobs import Job, Readout
from remote_mediation.errors import StoreError
from remote_mediation.kinds import first_of
from remote_mediation.lock import LOCK_FILE, Lock, hold
from remote_mediation.runfiles import DamagedError, MisnamedError, Sealed, content_of
from remote_mediation.runfiles import Submitted as Submitted
from remote_mediation.tokens import Prepared

_log = logging.getLogger(__name__)
MERGED = 200
"""So many readouts become one file."""
_MANY = "merged-"
_RECORD, _COPY = "run.json", ".run.json.copy"
# What prompts or answers may stand in.
_PRIVATE = ("*.jsonl", "failures.json*", "readouts/*", "notes/*", "submitted/*")
_Content = TypeVar("_Content")


class Store:
    """A run folder. `create` makes or reopens one for a study, `open` reads what is there."""

    def __init__(self, folder: Path) -> None:
        """Use `create` or `open`."""
        self.folder = folder
        self._lock: Lock | None = None
        self._single = 0  # readouts of one job each, once they have been counted
        self._warned = False
        self._unbound = False  # whether it was said that readouts do not tell what they are of

    @classmethod
    def create(cls, folder: Path, identity: dict[str, Any]) -> Store:
        """A new run folder, or the one in which this same study was begun. Nothing is written yet.

        Raises:
            StoreError: the folder holds something else or another study, or lies where nothing can be written.
        """
        store = cls(folder)
        try:
            if any((folder / name).exists() for name in (_RECORD, _COPY)):
                store._check_same(identity)
            elif folder.exists() and (not folder.is_dir() or _in_use(folder)):
                raise StoreError(f"{folder} is in use and is no run folder; choose another with --out")
            store._hide()
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
        store._hide()
        return store

    def _hide(self) -> None:
        """Let nobody but their owner read the files for which older versions did not see to that."""
        if os.name == "nt":
            return  # has no such modes
        paths = (path for pattern in _PRIVATE for path in self.folder.glob(pattern) if path.is_file())
        for path in paths:
            if path.stat().st_mode & 0o077:
                try:
                    path.chmod(0o600)
                except OSError as error:
                    _log.warning("%s can be read by others, and not be changed: %s", path, error.strerror)

    def record(self) -> dict[str, Any]:
        """What `run.json` holds; empty for a new run. Where it is damaged or gone, its copy is read.

        Raises:
            StoreError: neither can be used: they cannot be read, were changed, or a run did not write them.
        """
        return self._sealed().record

    def config(self) -> StudyConfig:
        """Settings of the run.

        Raises:
            StoreError: as `record`, or a version of this package wrote it whose settings are others.
        """
        try:
            return StudyConfig(**self.record()["config"])
        except (LookupError, TypeError, ValueError) as error:
            raise StoreError(
                f"{self.folder} holds a run of another version, whose settings cannot be read ({_in_a_line(error)}); "
                "use that version, or run the study anew"
            ) from error

    def _sealed(self) -> Sealed:
        path = self.folder / _RECORD
        try:
            return runfiles.read_record(content_of(path))
        except (FileNotFoundError, NotADirectoryError):
            return self._copied("it is gone") or Sealed({}, {})
        except (OSError, DamagedError) as error:
            copied = self._copied(str(error))
            if copied is None:
                raise StoreError(
                    f"cannot use {path}: {error}; put it back as it was, or choose another folder"
                ) from error
            return copied

    def _copied(self, why: str) -> Sealed | None:
        """The copy of `run.json`, if it is whole. why: what is wrong with `run.json` itself."""
        try:
            found = runfiles.read_record(content_of(self.folder / _COPY))
        except (OSError, DamagedError):
            return None
        if not self._warned:
            _log.warning("%s cannot be used (%s): its copy is read in its place", self.folder / _RECORD, why)
        self._warned = True
        return found

    def record_text(self) -> str:
        """`run.json` as it is written."""
        return runfiles.record_text(self._sealed())

    def form(self) -> int:
        """Of the run folder (`runfiles.FORM`)."""
        return self._sealed().form

    def save_record(self, record: dict[str, Any]) -> None:
        """Write `run.json`."""
        known = self._sealed()
        self._keep_record(Sealed(record, known.digests, known.form))

    def _keep_record(self, sealed: Sealed) -> None:
        """Write `run.json`, its copy first: whichever of them a crash leaves alone can be gone on from."""
        for name in (_COPY, _RECORD):
            self._keep(name, runfiles.record_text(sealed))

    def prepared(self, name: str = "pairs") -> Prepared | None:
        """The tokenised pairs of this run, or others by name; None where they are not known (any more).

        Raises:
            StoreError: they are not those that this run wrote.
        """
        path = self.folder / f"{name}.jsonl"
        try:
            return self.pairs_reader(path)(content_of(path))
        except FileNotFoundError:
            return None
        except (OSError, DamagedError) as error:
            raise StoreError(
                f"{path} is not as this run wrote it ({error}); put it back, or delete it and run the study again, "
                "which makes it anew"
            ) from error

    def pairs_reader(self, path: Path) -> Callable[[bytes], Prepared]:
        """Reads a file of pairs as this run does. Raises: as `runfiles.read_pairs`."""
        record, digests, _ = self._sealed()
        vocab = record.get("model", {}).get("vocab")
        known = vocab if isinstance(vocab, int) else inf  # a record of another kind is refused where it is read
        return partial(runfiles.read_pairs, allowed=digests.get(path.name, ()), vocab=known)

    def bound(self) -> dict[str, list[str]]:
        """Files that `run.json` binds, with the digests that they may have."""
        return self._sealed().digests

    def missing(self) -> list[str]:
        """Files that `run.json` binds and that are gone."""
        return [name for name in self.bound() if not (self.folder / name).exists()]

    def save_prepared(self, prepared: Prepared, name: str = "pairs") -> None:
        """Write the tokenised pairs and the refused ones, bound by `run.json` where there is one."""
        content = runfiles.pairs_text(prepared)
        self._bind(f"{name}.jsonl", runfiles.digest_of(content.encode()))
        self._keep(f"{name}.jsonl", content)

    def _bind(self, name: str, digest: str) -> None:
        """Let a file have this digest or, until it is written, the one that it has."""
        record, digests, form = self._sealed()
        known = digests.get(name, [])[-1:]
        if record and known != [digest]:
            self._keep_record(Sealed(record, {**digests, name: [*known, digest]}, form))

    def save_ticket(self, ticket: str, job: Job) -> None:
        """Remember that a job was handed over, before anyone waits for it."""
        self._keep(f"submitted/{job.id}.json", runfiles.ticket_text(ticket, job))

    def submitted(self) -> list[Submitted]:
        """Jobs that were handed over and whose values are not here yet; a damaged ticket is set aside."""
        paths = sorted(self.folder.glob("submitted/*.json"))
        found = [self._doubted(path, partial(runfiles.read_ticket, path.stem)) for path in paths]
        return [ticket for ticket in found if ticket]

    def save_readout(self, job: Job | Submitted, readout: Readout) -> None:
        """Write what a job brought back, and forget its ticket; many such files become one, as they all are read."""
        self._keep(f"readouts/{job.id}.npz", runfiles.readout_bytes(job, readout, self._origin()))
        self.forget(job.id)
        self._single = self._single + 1 if self._single else len(self._readouts(merged=False))
        if self._single >= MERGED:
            self._merge()

    def _readouts(self, *, merged: bool) -> list[Path]:
        """Files of many jobs (merged), or of one."""
        paths = sorted((self.folder / "readouts").glob("*.npz"))
        return [path for path in paths if path.name.startswith(_MANY) == merged]

    def _merge(self) -> None:
        """Write all files of one job as one. Stopped before it is done, it leaves values twice, and they are equal."""
        paths = self._readouts(merged=False)
        found = self._read(paths)
        if found:
            whole = Submitted(f"{_MANY}{runfiles.digest_of(repr(list(found)).encode())[:16]}", "", list(found), 0, 0.0)
            content = runfiles.readout_bytes(whole, Readout(list(found.values()), 0.0), self._origin())
            self._keep(f"readouts/{whole.id}.npz", content)
        for path in paths:
            _drop(path)  # a damaged one has another name by now
        self._single = 0

    def _read(self, paths: Sequence[Path]) -> dict[str, npt.NDArray[np.float32]]:
        """Values of readouts; of a damaged one none, and it is set aside. Raises: as `values`."""
        form, origin = self.form(), self._origin()
        found = [self._readout(path, form, origin) for path in paths]
        unbound = sum(one is not None and not one.bound for one in found)
        if unbound and not self._unbound:
            _log.warning(
                "%s has %d readouts of an older version, which do not say of which job and weights they are: "
                "they are read as they stand",
                self.folder,
                unbound,
            )
            self._unbound = True
        return {key: value for one in found if one for key, value in one.values.items()}

    def _readout(self, path: Path, form: int, run: str) -> runfiles.StoredReadout | None:
        """One of them. A renamed one is put back under its name, and set aside where another has that."""
        try:
            return self._doubted(path, self._reader(path, form, run))
        except MisnamedError as error:
            own = path.with_stem(error.own)
            if own.exists():
                _set_aside(path, error)
                return None
            _log.warning("%s is put back under the name of %s: %s", path, own.name, error)
            with contextlib.suppress(OSError):
                path.replace(own)
            return error.found

    def reader(self, path: Path) -> Callable[[bytes], runfiles.StoredReadout]:
        """Reads a readout as this run does. Raises: as `runfiles.read_readout`."""
        return self._reader(path, self.form(), self._origin())

    @staticmethod
    def _reader(path: Path, form: int, run: str) -> Callable[[bytes], runfiles.StoredReadout]:
        return partial(runfiles.read_readout, form=form, expected=runfiles.Origin(path.stem, run))

    def _origin(self) -> str:
        """What every readout of this run carries of its study and weights."""
        return str(self._sealed().record.get("origin", ""))

    def holding(self, key: str) -> Path | None:
        """The readout that a value comes from."""
        paths = [*self._readouts(merged=True), *self._readouts(merged=False)]
        return next((path for path in paths if key in self._read([path])), None)

    def forget(self, job_id: str) -> None:
        """Drop a job's ticket. Raises: StoreError, no permission."""
        _drop(self.folder / "submitted" / f"{job_id}.json")

    def save_failure(self, pair_id: str, message: str) -> None:
        """Note that a pair's job failed, with the reason."""
        self._keep("failures.json", runfiles.failures_text({**self.failures(), pair_id: message}))

    def failures(self) -> dict[str, str]:
        """Pairs whose jobs failed, with the reason; where the file is damaged it is set aside and they run again."""
        return self._doubted(self.folder / "failures.json", runfiles.read_failures) or {}

    def note(self, name: str, kind: TypeAdapter[_Content]) -> _Content | None:
        """What `save_note` kept under a name; None if nothing, or nothing whole and of its kind, which is set aside."""
        read = partial(runfiles.read_note, kind=kind, form=self.form())
        return self._doubted(self.folder / "notes" / f"{name}.json", read)

    def save_note(self, name: str, content: Any) -> None:
        """Keep JSON data, such as the verdicts of a judge."""
        self._keep(f"notes/{name}.json", runfiles.note_text(content))

    def values(self) -> dict[str, npt.NDArray[np.float32]]:
        """All values measured so far, by row key; a damaged readout is set aside, so that it is measured anew.

        Raises:
            StoreError: a file of them cannot be opened.
        """
        return self._read([*self._readouts(merged=False), *self._readouts(merged=True)])

    def _doubted(self, path: Path, read: Callable[[bytes], _Content]) -> _Content | None:
        """What a file holds that can be made anew; None where it is not there, or damaged and set aside.

        Raises:
            StoreError: it cannot be opened.
        """
        try:
            return read(content_of(path))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StoreError(f"cannot read {path}: {error.strerror or error}; give back access to it") from error
        except MisnamedError:
            raise
        except DamagedError as error:
            _set_aside(path, error)
            return None

    def _keep(self, name: str, content: str | bytes) -> None:
        """Write what is measured. The folder is this process's alone from the first such file on.

        Raises:
            StoreError: another process measures into the folder, it is no longer there, no permission, or no space.
        """
        if self._lock is not None and not self._lock.holds():
            raise StoreError(
                f"{self.folder} is no longer what this run measures into: it was moved, deleted, or taken by another "
                "process; put it back, or name its new place with --out, and give the same command again"
            )
        if self._lock is None:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._lock = hold(self.folder)
            except OSError as error:
                _remove(self.folder / LOCK_FILE)
                raise StoreError(
                    f"cannot write {self.folder}: {error.strerror}; free some space or choose another --out"
                ) from error
        self.write(name, content, private=name not in (_RECORD, _COPY))

    def write(self, name: str, content: str | bytes, *, private: bool = False) -> None:
        """Write a file of the run folder, whole or not at all. private: nobody but its owner can read it (0600).

        Raises:
            StoreError: no permission or no space.
        """
        path = self.folder / name
        partial = path.with_name(f".{path.name}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.unlink(missing_ok=True)  # one that was left behind would keep its mode
            with open(partial, "wb", opener=_private if private else None) as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except OSError as error:
            _remove(partial)
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


def _private(path: str, flags: int) -> int:
    """Open a file that nobody else can read from its first byte on."""
    return os.open(path, flags, 0o600)


def _drop(path: Path) -> None:
    """Delete a file, if it is there.

    Raises:
        StoreError: no permission.
    """
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise StoreError(f"cannot delete {path}: {error.strerror}; give back the right to write there") from error


def _set_aside(path: Path, error: Exception) -> None:
    """Rename a damaged file, where the folder can be written; it is not read in either case."""
    aside = path.with_name(f"{path.name}.bad")
    with contextlib.suppress(OSError):
        path.replace(aside)
    _log.warning("%s is damaged (%s): set aside as %s, to be made anew", path, error, aside)


def _in_a_line(error: Exception) -> str:
    """What is wrong with settings, by the first of them."""
    if isinstance(error, ValidationError):
        return first_of(error)
    return str(error)


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
