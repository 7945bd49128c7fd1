"""The engine on a GPU, in under six minutes: the tests marked `cuda`, speed, memory and overhead.

Each part is a process of its own with a time limit, so that one that fails or hangs costs nobody else anything; what it
has measured by then is kept, and the files are written anew after every part.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

# Asked of the driver's own library, so that the question leaves a process that may still fork.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

import torch

from bench import gpu_models, gpu_parts
from bench.gpu_parts import Emit, Place, Record
from bench.gpu_report import save
from bench.machine import facts
from bench.report import OUT

# Seconds that all parts together may take; the last ones get what is left.
MOST_SECONDS = 330.0
# A forked part ends with it where an import has already touched the GPU, which torch can then not use.
_NO_FORK = 77
# Seconds of a part that is to be stopped, until it is killed.
_GRACE = 2.0


class Part(NamedTuple):
    """What is measured in one process."""

    name: str
    limit: float
    """Seconds."""
    work: Callable[[Place, Emit], None]


class Status(NamedTuple):
    """How a part ended."""

    part: str
    state: str
    """`done`, `failed`, `stopped at its limit` or `not begun`."""
    seconds: float
    said: str
    """The end of what it said where it did not end well."""


def parts(tiny: bool) -> list[Part]:
    """All of them, in the order in which they run: the surest and most wanted first."""
    if tiny:
        small = gpu_models.llama("tiny", 32, 48, 3, 4, 2, 64, tied=False)
        speeds = [Part("speed-tiny", 60, partial(gpu_parts.speed, small, "float32"))]
    else:
        one, eight = gpu_models.ONE_B, gpu_models.EIGHT_B
        speeds = [
            Part("speed-1B-float32", 50, partial(gpu_parts.speed, one, "float32")),
            Part("speed-8B-bfloat16", 80, partial(gpu_parts.speed, eight, "bfloat16")),
            Part("speed-1B-bfloat16", 50, partial(gpu_parts.speed, one, "bfloat16")),
        ]
    return [Part("tests", 120, gpu_parts.tests), *speeds, Part("overhead", 60, gpu_parts.overhead)]


def main() -> None:
    """Run the parts one after the other; exit 1 if one did not end well."""
    options = _options()
    place = Place("cpu", True) if options.dry_run else Place("cuda", False)
    known = {part.name: part for part in parts(place.tiny)}
    if unknown := set(options.only) - set(known):
        raise SystemExit(f"no part is called {', '.join(sorted(unknown))}: there are {', '.join(known)}")
    wanted = [part for name, part in known.items() if name in (options.only or known)]
    options.output.mkdir(parents=True, exist_ok=True)
    described = {**facts(), **card(), "dry_run": place.tiny}
    begun, statuses, records = time.monotonic(), [], []
    for part in wanted:
        left = MOST_SECONDS - (time.monotonic() - begun)
        status, found = run(part, place, min(part.limit, left))
        statuses.append(status)
        records += [(part.name, record) for record in found]
        save(options.output, described, [status._asdict() for status in statuses], records)
        print(f"{part.name}: {status.state}, {status.seconds:.0f} s, {len(found)} figures", flush=True)
        if status.said:
            print(status.said, flush=True)
    if any(status.state != "done" for status in statuses):
        raise SystemExit(1)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/bench/gpu", description=__doc__)
    parser.add_argument("--output", type=Path, default=OUT, help="folder for gpu.md, gpu.csv and gpu.json")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU with tiny shapes, to see that it works")
    parser.add_argument("--only", nargs="+", default=(), metavar="PART", help="parts by their names")
    return parser.parse_args()


def card() -> dict[str, str]:
    """Name, memory and driver of the first GPU, as its own tool states them; nothing is started on it."""
    asked = ("name", "memory.total", "driver_version")
    command = ["nvidia-smi", f"--query-gpu={','.join(asked)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return {"card": "no NVIDIA GPU here"}
    values = [value.strip() for value in done.stdout.splitlines()[0].split(",")]
    return dict(zip(("card", "memory", "driver"), values, strict=True))


def run(part: Part, place: Place, limit: float) -> tuple[Status, list[Record]]:
    """One part in a process of its own, and what it measured until it ended or was stopped."""
    if limit <= 0:
        return Status(part.name, "not begun", 0.0, "no time was left for it"), []
    with tempfile.TemporaryDirectory() as scratch:
        kept, log = Path(scratch) / "records.jsonl", Path(scratch) / "log"
        kept.touch()
        begun = time.monotonic()
        for method in ("fork", "spawn"):  # to fork spares the imports
            process = multiprocessing.get_context(method).Process(target=_child, args=(part.work, place, kept, log))
            process.start()
            process.join(limit)
            if process.exitcode != _NO_FORK:
                break
        state = {None: "stopped at its limit", 0: "done"}.get(process.exitcode, "failed")
        if process.exitcode is None:
            _stop(process)
        seconds = time.monotonic() - begun
        said = "" if state == "done" else "\n".join(log.read_text("utf-8", "replace").splitlines()[-40:])
        records = [Record(*json.loads(line)) for line in kept.read_text("utf-8").splitlines() if line.endswith("]")]
    return Status(part.name, state, seconds, said), records


def _stop(process: Any) -> None:
    """End a part and all that it started."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, how)
        process.join(_GRACE)


def _child(work: Callable[[Place, Emit], None], place: Place, kept: Path, log: Path) -> None:
    """The part's process: all that it says goes to a file, and each record to another as soon as it is made."""
    os.setpgrp()
    if place.device == "cuda" and torch.cuda._is_in_bad_fork():
        os._exit(_NO_FORK)
    if place.tiny:
        torch.set_num_threads(1)
    with log.open("w", encoding="utf-8", buffering=1) as said, kept.open("a", encoding="utf-8") as records:
        for stream in (1, 2):  # of what it starts, and of libraries
            os.dup2(said.fileno(), stream)
        sys.stdout = sys.stderr = said

        def emit(record: Record) -> None:
            records.write(json.dumps(record) + "\n")
            records.flush()

        try:
            work(place, emit)
        except BaseException:
            traceback.print_exc()
            said.flush()
            os._exit(1)


if __name__ == "__main__":
    main()
