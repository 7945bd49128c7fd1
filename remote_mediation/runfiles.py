"""The files of a run folder as bytes: how each is written, and how it is doubted when it is read.

Any of them may be empty, cut, flipped in a bit, of another program or edited by hand. `run.json` ends in a digest of
itself and binds the pairs by theirs; readouts and notes carry checksums; a ticket is named by the keys in it. What
cannot be what was written is a `DamagedError`. Files of versions that wrote no digests are read all the same, in
folders that such a version began.
"""

from __future__ import annotations

import hashlib
import io
import json
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from math import inf, isfinite
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter

from remote_mediation.engine.answers import lengths_of
from remote_mediation.engine.jobs import Job, Readout
from remote_mediation.engine.payload import digest
from remote_mediation.kinds import of_kind
from remote_mediation.tokens import Prepared, Refusal, from_record, to_record

_Noted = TypeVar("_Noted")
_REFUSAL = TypeAdapter(Refusal)
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
# Keys of `run.json` that are no part of what it says: its own digest, those of files by name, and `FORM`.
_OWN, _OTHERS, _FORM = "digest", "digests", "form"
FORM = 2
"""Of folders in which every readout and note has a checksum and every readout says what it is of (`Origin`).

Older versions began others: 1 has checksums alone, 0 neither.
"""
# What `run.json` holds by name, where a reader takes it for something; all of it is only there in newer versions.
_NONE = type(None)
_KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("study", "model", "files", "served", "prompts", "continued", _OTHERS), (dict,)),
    **{"git": (dict, _NONE), "seconds": (int, float), "memory": (int, float, _NONE), "values": (int,), _FORM: (int,)},
}


class DamagedError(ValueError):
    """A file is not what was written."""


class MisnamedError(DamagedError):
    """A readout is whole and has the name of another one."""

    def __init__(self, own: str, found: StoredReadout) -> None:
        """own: the name that it was written under, without its suffix. found: what it holds."""
        super().__init__(f"it holds the values of job {own}, so it was renamed or copied")
        self.own, self.found = own, found


class Origin(NamedTuple):
    """What a readout is of."""

    name: str
    """Of its file, without its suffix: the job's id."""
    run: str
    """`origin` of `run.json`: a hash of the study and the weights; empty where the run does not say."""


class Submitted(NamedTuple):
    """A job that was handed over to a backend."""

    id: str
    ticket: str
    keys: list[str]
    rows: int
    flops: float
    lengths: Sequence[int | None] = ()
    """As of `lengths_of`; empty where an older version handed it over."""
    task: str = ""
    """What it does (`Job.task`); empty where an older version handed it over."""


class Sealed(NamedTuple):
    """`run.json`."""

    record: dict[str, Any]
    """What it says."""
    digests: dict[str, list[str]]
    """By file, those that it may have; the last is that of the newest version."""
    form: int = FORM
    """0 where files without checksums are read (`FORM`)."""


def record_text(sealed: Sealed) -> str:
    """`run.json`, with a digest of all of it."""
    content = json.loads(json.dumps({**sealed.record, _OTHERS: sealed.digests, _FORM: sealed.form}))
    return json.dumps({**content, _OWN: _digest_of(content)}, indent=2, sort_keys=True) + "\n"


def content_of(path: Path) -> bytes:
    """The bytes of a file.

    Raises:
        DamagedError: a folder, a pipe or the like lies in its place.
        OSError: it is not there, or cannot be read.
    """
    if path.exists() and not path.is_file():
        raise DamagedError("it is no file")
    return path.read_bytes()


def read_record(content: bytes) -> Sealed:
    """What `run.json` holds.

    Raises:
        DamagedError: it is no JSON, not as it was written, or of another program.
    """
    found = _json(content)
    if not isinstance(found, dict):
        raise DamagedError("it holds no record")
    rest = {name: value for name, value in found.items() if name != _OWN}
    if _OWN in found and found[_OWN] != _digest_of(rest):
        raise DamagedError("its digest is another one: it was changed by hand, or cut")
    if {_OTHERS, _FORM} & set(found) and _OWN not in found:
        raise DamagedError("its own digest was taken out")
    if "study" not in found:
        raise DamagedError("it was not written by a run")
    _check_kinds(rest)
    return Sealed(rest, rest.pop(_OTHERS, {}), rest.pop(_FORM, 0))


def _check_kinds(record: Mapping[str, Any]) -> None:
    """Let nothing of `run.json` be of another kind than whoever reads it takes it for.

    Raises:
        DamagedError: with the name of what is.
    """
    for name in _KINDS.keys() & record.keys():
        value = record[name]
        if type(value) not in _KINDS[name] or (isinstance(value, float) and not isfinite(value)):
            raise DamagedError(f"its {name} is {repr(value)[:40]}, which no run writes")
    if record.get(_FORM, 0) not in range(FORM + 1):
        raise DamagedError(f"its form is {record[_FORM]}, which no version up to this one writes")
    if not all(isinstance(allowed, list) for allowed in record.get(_OTHERS, {}).values()):
        raise DamagedError("its digests are no lists")


def pairs_text(prepared: Prepared) -> str:
    """Tokenised pairs and refused ones, one a line."""
    records = [*map(to_record, prepared.pairs), *map(asdict, prepared.refusals)]
    return "".join(json.dumps(record) + "\n" for record in records)


def read_pairs(content: bytes, allowed: Sequence[str], vocab: float = inf) -> Prepared:
    """Tokenised pairs and refused ones.

    allowed: digests, of which they must have one; any if there are none. vocab: tokens that the model has, if known.

    Raises:
        DamagedError: they are not those that were written, or could be those of no run.
    """
    if allowed and digest_of(content) not in allowed:
        raise DamagedError("its digest is not the one in run.json")
    records = [_json(line) for line in content.splitlines()]
    try:
        found = Prepared(
            tuple(from_record(record) for record in records if "reason" not in record),
            tuple(of_kind(_REFUSAL, record) for record in records if "reason" in record),
        )
        _check_pairs(found, vocab)
    except (TypeError, ValueError) as error:
        raise DamagedError(f"a line of it is no pair ({error})") from error
    return found


def _check_pairs(prepared: Prepared, vocab: float) -> None:
    """Let no id stand twice, and no token that the model does not have.

    Raises:
        ValueError: with the first that does.
    """
    names = Counter(one.id for part in prepared for one in part)
    if twice := [name for name, times in names.items() if times > 1]:
        raise ValueError(f"{twice[0]!r} stands in it twice")
    for pair in prepared.pairs:
        tokens = {token for ids in (*pair.prompts, *pair.answers, *pair.openings) for token in ids}
        if strange := [token for token in tokens if not 0 <= token < vocab]:
            raise ValueError(f"{pair.id!r} has the token {strange[0]}, and the model has {vocab}")


def ticket_text(ticket: str, job: Job) -> str:
    """What is kept of a job that was handed over."""
    content = {"ticket": ticket, "keys": job.keys, "rows": job.rows, "flops": job.flops, "task": job.task}
    return json.dumps({**content, "lengths": lengths_of(job)})


def read_ticket(job: str, content: bytes) -> Submitted:
    """A job that was handed over, by its id.

    Raises:
        DamagedError: it is none, or another one.
    """
    try:
        found = Submitted(job, **_json(content))
        numbers = [found.rows, found.flops, *(length for length in found.lengths if length is not None)]
    except TypeError as error:
        raise DamagedError("it is no ticket") from error
    if (
        not isinstance(found.ticket, str)
        or not isinstance(found.task, str)
        or not all(isinstance(number, (int, float)) for number in numbers)
    ):
        raise DamagedError("it is no ticket")
    if digest(found.keys) != job:
        raise DamagedError("its keys are those of another job")
    return found


def readout_bytes(job: Job | Submitted, readout: Readout, run: str = "") -> bytes:
    """What a job brought back, with a checksum. run: as of `Origin`."""
    buffer, origin = io.BytesIO(), Origin(job.id, run)
    keys, lengths = np.array(job.keys), np.array([len(values) for values in readout.values])
    values = np.concatenate(readout.values)
    np.savez(
        buffer,
        keys=keys,
        lengths=lengths,
        values=values,
        seconds=readout.seconds,
        flops=job.flops,
        **origin._asdict(),
        checksum=_checksum(keys, lengths, values, origin),
    )
    return buffer.getvalue()


class StoredReadout(NamedTuple):
    """A readout as it was read."""

    values: dict[str, npt.NDArray[np.float32]]
    """By key."""
    bound: bool
    """Whether it says what it is of; those of older versions do not."""


def read_readout(content: bytes, form: int = FORM, expected: Origin | None = None) -> StoredReadout:
    """One readout. form: of its folder, which says what it must have. expected: what it must be of, if it says so.

    Raises:
        MisnamedError: it has the name of another one.
        DamagedError: it is not what was written, or was measured in another run.
    """
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as data:
            keys, lengths, values = data["keys"], data["lengths"], data["values"]
            bound = form > 1 or "run" in data
            origin = Origin(str(data["name"]), str(data["run"])) if bound else None
            if (form or "checksum" in data) and str(data["checksum"]) != _checksum(keys, lengths, values, origin):
                raise DamagedError("its checksum is another one")
        if values.dtype != np.float32 or len(keys) != len(lengths) or lengths.sum() != len(values):
            raise DamagedError("its values do not belong to its keys")
        parts: Sequence[npt.NDArray[np.float32]] = np.split(values, np.cumsum(lengths)[:-1])
        found = StoredReadout(dict(zip(keys.tolist(), parts, strict=True)), bound)
    except DamagedError:
        raise
    except _DAMAGE as error:
        raise DamagedError(str(error) or type(error).__name__) from error
    if origin and expected and origin.run != expected.run:
        raise DamagedError("it was measured in another run: of another study, or on other weights")
    if origin and expected and origin.name != expected.name:
        raise MisnamedError(origin.name, found)
    return found


def note_text(content: Any) -> str:
    """JSON data with a checksum."""
    content = json.loads(json.dumps(content))
    return json.dumps({"note": content, "checksum": _digest_of(content)})


def read_note(content: bytes, kind: TypeAdapter[_Noted], form: int = FORM) -> _Noted:
    """What was noted. kind: what it is. form: of its folder, which says whether it must have a checksum.

    Raises:
        DamagedError: it is not what was written, or of another kind, as where it was written by hand.
    """
    noted = _json(content)
    if isinstance(noted, dict) and set(noted) == {"note", "checksum"}:
        if noted["checksum"] != _digest_of(noted["note"]):
            raise DamagedError("its checksum is another one")
        noted = noted["note"]
    elif form:
        raise DamagedError("it has no checksum")
    try:
        return of_kind(kind, noted)
    except ValueError as error:
        raise DamagedError(f"it holds something else ({error})") from error


def failures_text(failures: Mapping[str, str]) -> str:
    """Pairs whose jobs failed, with the reason."""
    return json.dumps(failures, indent=2) + "\n"


def read_failures(content: bytes) -> dict[str, str]:
    """Pairs whose jobs failed, with the reason.

    Raises:
        DamagedError: it is no such table.
    """
    found = _json(content)
    if not isinstance(found, dict) or not all(isinstance(reason, str) for reason in found.values()):
        raise DamagedError("it is no table of pairs and reasons")
    return found


def digest_of(content: bytes) -> str:
    """Hash of a file."""
    return hashlib.sha256(content).hexdigest()


def _digest_of(content: Any) -> str:
    """Hash of JSON data, however they are laid out."""
    return digest_of(json.dumps(content, sort_keys=True).encode())


def _json(content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"it is no JSON ({error})" if content.strip() else "it is empty") from error


def _checksum(
    keys: npt.NDArray[np.str_],
    lengths: npt.NDArray[np.int64],
    values: npt.NDArray[np.float32],
    origin: Origin | None,
) -> str:
    """Hash of what a readout says. origin: None where it says nothing of it."""
    said = "\n".join(origin).encode() if origin else b""
    return hashlib.sha256(b"".join(array.tobytes() for array in (keys, lengths, values)) + said).hexdigest()
