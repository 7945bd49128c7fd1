"""How far a study is: a bar where somebody looks at a terminal, a line now and then where the output is a file."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from remote_mediation.runner import Watch

SECONDS = 20.0
"""Between two lines."""


class Reporter(Watch, Protocol):
    """Sees how far a study is, and what its backend is doing."""

    def note(self, line: str) -> None:
        """What the backend is doing."""
        ...


@contextmanager
def reporter(console: Console) -> Iterator[Reporter]:
    """Shows progress on a console for as long as the context lasts."""
    if not console.is_terminal:
        yield Lines(console)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("rows"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        yield Bar(progress)


class Bar:
    """A bar a wave, and the latest news above it."""

    def __init__(self, progress: Progress) -> None:
        """progress: a started one."""
        self._progress = progress
        self._news = progress.add_task("", total=None, visible=False)
        self._task: TaskID | None = None

    def note(self, line: str) -> None:
        """What the backend is doing."""
        self._progress.update(self._news, description=escape(line), visible=True)

    def total(self, rows: int) -> None:
        """A new wave of rows begins."""
        self._progress.update(self._news, visible=False)
        self._task = self._progress.add_task("measuring", total=rows)

    def advance(self, rows: int) -> None:
        """Some of them are done."""
        if self._task is not None:
            self._progress.advance(self._task, rows)


class Lines:
    """A line every `SECONDS`; none of a study that ends before."""

    def __init__(self, console: Console) -> None:
        """console: where lines go."""
        self._console, self._began = console, time.monotonic()
        self._printed, self._wave = self._began, self._began
        self._total = self._done = 0

    def note(self, line: str) -> None:
        """What the backend is doing."""
        self._line(line)

    def total(self, rows: int) -> None:
        """A new wave of rows begins."""
        self._total, self._done, self._wave = rows, 0, time.monotonic()

    def advance(self, rows: int) -> None:
        """Some of them are done."""
        self._done += rows
        spent = time.monotonic() - self._wave
        left = spent * (self._total - self._done) / self._done if self._done else 0.0
        self._line(f"measured {self._done:,} of {self._total:,} rows of this step, about {_duration(left)} of it left")

    def _line(self, text: str) -> None:
        now = time.monotonic()
        if now - self._printed < SECONDS:
            return
        self._printed = now
        line = f"{_duration(now - self._began)}: {text}"
        with contextlib.suppress(OSError):  # a full disk behind it is no reason to end
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
