"""Which files of a run folder are whole: each is read as the run itself reads it, and none is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import TypeAdapter

from remote_mediation import runfiles
from remote_mediation.runfiles import DamagedError, content_of
from remote_mediation.store import Store


class FileState(NamedTuple):
    """What was found of a file."""

    name: str
    """Path within the run folder."""
    whole: bool
    """Whether it is as it was written, as far as can be told."""
    detail: str
    """What it holds, or what is wrong and what comes of it."""


def check_run(folder: Path) -> list[FileState]:
    """The state of every file that a run reads again, `run.json` first.

    Raises:
        StoreError: there is no run folder, or its `run.json` cannot be used.
    """
    store = Store.open(folder)
    bound, form = store.bound(), store.form()
    states = [_record(folder / "run.json", "whole" if bound else "of an older version, without digests")]
    for name in sorted({*bound, *(path.name for path in folder.glob("*.jsonl"))}):
        states.append(_pairs(folder / name, store, name in bound))
    states += _each(folder, "failures.json", lambda path: runfiles.read_failures, "its pairs will run again")
    states += _each(
        folder, "submitted/*.json", lambda path: partial(runfiles.read_ticket, path.stem), "its job will run again"
    )
    note = partial(runfiles.read_note, kind=TypeAdapter(Any), form=form)  # its reader alone knows its kind
    states += _each(folder, "readouts/*.npz", store.reader, "it will be measured anew")
    states += _each(folder, "notes/*.json", lambda path: note, "it will be made anew")
    states += [_aside(path, folder) for path in sorted(folder.rglob("*.bad"))]
    return states


def _record(path: Path, detail: str) -> FileState:
    if not path.exists():
        return FileState(path.name, False, "gone; its copy is used, and the next run writes it anew")
    state = _state(path, path.parent, runfiles.read_record, "its copy is used, and the next run writes it anew")
    return state._replace(detail=detail) if state.whole else state


def _pairs(path: Path, store: Store, bound: bool) -> FileState:
    """bound: by a digest in `run.json`."""
    if not path.exists():
        return FileState(path.name, False, "gone; run the study again, which makes it anew")
    state = _state(path, path.parent, store.pairs_reader(path), "put it back, or delete it")
    return state if bound or not state.whole else state._replace(detail="readable, and bound by no digest")


def _each(
    folder: Path, pattern: str, reader: Callable[[Path], Callable[[bytes], Any]], then: str
) -> Iterator[FileState]:
    """The files of one kind. then: what becomes of a damaged one when the study goes on."""
    for path in sorted(folder.glob(pattern)):
        yield _state(path, folder, reader(path), then)


def _state(path: Path, folder: Path, read: Callable[[bytes], Any], then: str) -> FileState:
    name = path.relative_to(folder).as_posix()
    try:
        read(content_of(path))
    except (OSError, DamagedError) as error:
        return FileState(name, False, f"{error}; {then}")
    return FileState(name, True, "whole")


def _aside(path: Path, folder: Path) -> FileState:
    return FileState(path.relative_to(folder).as_posix(), True, "damaged, set aside and no longer used")
