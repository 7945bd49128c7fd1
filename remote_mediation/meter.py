"""How far a long step is and how long it will still take: a bar on a terminal, else a line now and then.

The work knows nothing of it: a thread asks a function how many bytes are there by now.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread
from time import monotonic
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

LINE_EVERY = 20.0
"""Seconds between lines where there is no terminal."""
BAR_EVERY = 0.5
"""Seconds between looks where there is one."""


@contextmanager
def metered(console: Console | None, what: str, total: int, done: Callable[[], int]) -> Iterator[None]:
    """Tell on a console how far a step is while the body runs; tell nobody where it is None.

    Args:
        console: where to.
        what: is being done: "downloading", "converting" ...
        total: bytes that make the step complete.
        done: bytes so far.
    """
    if console is None:
        yield
        return
    look, show = (BAR_EVERY, _bar) if console.is_terminal else (LINE_EVERY, _lines)
    with show(console, what, total, done) as update:
        stop = Event()
        thread = Thread(target=_until, args=(stop, look, update), daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


def bytes_in(folder: Path) -> int:
    """Bytes of the files in a folder; those that go while it looks do not count."""
    size = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                size += (Path(root) / name).stat().st_size
    return size


def duration(seconds: float) -> str:
    """`45 s`, `3 min`: as precise as an estimate deserves."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def megabytes(size: int) -> str:
    """`478 MB`, `1.1 GB`."""
    return f"{size / 1e6:.0f} MB" if size < 999.5e6 else f"{size / 1e9:.1f} GB"


def _until(stop: Event, look: float, update: Callable[[], None]) -> None:
    while not stop.wait(look):
        update()


@contextmanager
def _bar(console: Console, what: str, total: int, done: Callable[[], int]) -> Iterator[Callable[[], None]]:
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(what, total=total, completed=done())
        yield lambda: progress.update(task, completed=min(done(), total))


@contextmanager
def _lines(console: Console, what: str, total: int, done: Callable[[], int]) -> Iterator[Callable[[], None]]:
    began, before = monotonic(), done()
    moving = began  # the rate is that of the work since it could be seen to move

    def say(end: str) -> None:
        console.print(f"{what}: {end}", soft_wrap=True, highlight=False, markup=False)

    def update() -> None:
        nonlocal moving
        now = done()
        left = "time left unknown"
        if now <= before:
            moving = monotonic()
        elif now < total:
            seconds = (total - now) * (monotonic() - moving) / (now - before)
            left = f"{duration(seconds)} left"
        else:
            left = "nearly done"
        say(f"{megabytes(min(now, total))} of {megabytes(total)}, {left}")

    say(megabytes(total))
    yield update
    say(f"done in {duration(monotonic() - began)}")
