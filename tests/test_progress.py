"""What is said of a study's progress where nobody looks at a terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from remote_mediation import progress
from remote_mediation.progress import Bar, Lines, reporter


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, to be set."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_line_now_and_then_with_the_time_left(clock: list[float]) -> None:
    written = io.StringIO()
    with reporter(Console(file=written, width=60)) as watch:
        assert isinstance(watch, Lines)
        watch.total(1200)
        clock[0] += 10
        watch.advance(100)
        assert written.getvalue() == ""
        clock[0] += 15
        watch.advance(200)  # 300 of 1,200 in 25 s: 75 s to go
        clock[0] += 5
        watch.advance(100)
        clock[0] += 20
        watch.note("job 3 is [queued]")
    first, second = written.getvalue().splitlines()
    assert first == "25 s: measured 300 of 1,200 rows of this step, about 1 min 15 s of it left"
    assert second == "50 s: job 3 is [queued]"


def test_a_terminal_gets_a_bar() -> None:
    with reporter(Console(file=io.StringIO(), force_terminal=True)) as watch:
        assert isinstance(watch, Bar)
        watch.note("loading [bold]")
        watch.total(10)
        watch.advance(10)
