"""How far a study is: a bar where somebody looks at a terminal, a line now and then where the output is a file."""

from __future__ import annotations

import contextlib
import math
import threading
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
)

from remote_mediation.runner import Watch

SECONDS = 20.0
"""Between two lines."""


class Reporter(Watch, Protocol):
    """Sees how far a study is, and what its backend is doing."""

    def note(self, line: str) -> None:
        """What the backend is doing."""
        ...


class Left:
    """How long a study goes on, at most: what is left of all its steps, at the speed of what is done."""

    def __init__(self) -> None:
        self._began: float | None = None
        self._spent = self._done = self._end = 0.0
        self._rows = self._rows_done = 0
        self._wave = 0.0

    def ahead(self, operations: float) -> None:
        """So many operations are left of all steps, at most; those done from here on are counted against them."""
        self._end = self._done + operations

    def total(self, rows: int) -> None:
        """A new wave of rows begins."""
        self._rows, self._rows_done, self._wave = rows, 0, time.monotonic()
        self._began = self._wave

    def advance(self, rows: int, operations: float) -> None:
        """Some of them are done."""
        now = time.monotonic()
        self._spent += now - (now if self._began is None else self._began)  # what lies between waves is no measuring
        self._began = now
        self._rows_done += rows
        self._done += operations

    @property
    def begun(self) -> bool:
        """Whether there has been a wave."""
        return self._began is not None

    @property
    def seconds(self) -> float:
        """Of all steps; no less than this wave's rows take. NaN before anything is done."""
        if not self._done or not self._rows_done:
            return math.nan
        of_wave = (time.monotonic() - self._wave) * (self._rows - self._rows_done) / self._rows_done
        return max((self._end - self._done) * self._spent / self._done, of_wave)

    @property
    def rows(self) -> str:
        """Of the wave, in words."""
        return f"{self._rows_done:,} of {self._rows:,} rows of this step"

    def __str__(self) -> str:
        seconds = self.seconds
        return "" if math.isnan(seconds) else f"at most about {_duration(seconds)} left of all steps"


@contextmanager
def reporter(console: Console) -> Iterator[Reporter]:
    """Shows progress on a console for as long as the context lasts."""
    if not console.is_terminal:
        with _ticking(Lines(console)) as lines:
            yield lines
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("rows"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
    )
    with Progress(*columns, console=console) as progress:
        yield Bar(progress)


@contextmanager
def _ticking(lines: Lines) -> Iterator[Lines]:
    """Lines that go on while a job takes longer than the time between two."""
    ended = threading.Event()

    def tick() -> None:
        while not ended.wait(SECONDS / 4):
            lines.tick()

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield lines
    finally:
        ended.set()
        thread.join()


class Bar:
    """A bar a wave, the latest news above it, and beside it the time left of all waves."""

    def __init__(self, progress: Progress) -> None:
        """progress: a started one."""
        self._progress, self._left = progress, Left()
        self._news = progress.add_task("", total=None, visible=False, left="")
        self._task: TaskID | None = None

    def note(self, line: str) -> None:
        """What the backend is doing."""
        self._progress.update(self._news, description=escape(line), visible=True)

    def ahead(self, operations: float) -> None:
        """So many operations are left of all steps."""
        self._left.ahead(operations)

    def total(self, rows: int) -> None:
        """A new wave of rows begins."""
        self._left.total(rows)
        self._progress.update(self._news, visible=False)
        self._task = self._progress.add_task("measuring", total=rows, left="")

    def advance(self, rows: int, operations: float) -> None:
        """Some of them are done."""
        self._left.advance(rows, operations)
        if self._task is not None:
            self._progress.update(self._task, advance=rows, left=str(self._left))


class Lines:
    """A line every `SECONDS`; none of a study that ends before."""

    def __init__(self, console: Console) -> None:
        """console: where lines go."""
        self._console, self._began = console, time.monotonic()
        self._printed, self._left = self._began, Left()
        self._printing = threading.Lock()

    def note(self, line: str) -> None:
        """What the backend is doing."""
        self._line(line)

    def ahead(self, operations: float) -> None:
        """So many operations are left of all steps."""
        self._left.ahead(operations)

    def total(self, rows: int) -> None:
        """A new wave of rows begins."""
        self._left.total(rows)

    def advance(self, rows: int, operations: float) -> None:
        """Some of them are done."""
        self._left.advance(rows, operations)
        self.tick()

    def tick(self) -> None:
        """Time goes by; nothing is said before a wave begins."""
        if self._left.begun:
            self._line("; ".join(filter(None, (f"measured {self._left.rows}", str(self._left)))))

    def _line(self, text: str) -> None:
        with self._printing:
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
