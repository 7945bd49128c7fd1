"""What is said of a study's progress where nobody looks at a terminal."""

from __future__ import annotations

import io
import threading

import pytest
from rich.console import Console

from remote_mediation import progress
from remote_mediation.progress import Bar, Left, Lines, reporter


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, to be set."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_line_now_and_then_with_the_time_left_of_all_steps(clock: list[float]) -> None:
    written = io.StringIO()
    with reporter(Console(file=written, width=60)) as watch:
        assert isinstance(watch, Lines)
        clock[0] += 5  # the model is loaded
        watch.ahead(10_000)
        watch.total(1200)
        clock[0] += 10
        watch.advance(100, 400)
        assert written.getvalue() == ""
        clock[0] += 15
        watch.advance(200, 600)  # 1,000 of 10,000 operations in 25 s: 225 s to go
        clock[0] += 5
        watch.advance(100, 500)
        clock[0] += 20
        watch.note("job 3 is [queued]")
    first, second = written.getvalue().splitlines()
    assert first == "30 s: measured 300 of 1,200 rows of this step; at most about 3 min 45 s left of all steps"
    assert second == "55 s: job 3 is [queued]"


def test_the_time_left_is_that_of_the_steps_to_come_and_no_less_than_that_of_the_rows_at_hand(
    clock: list[float],
) -> None:
    left = Left()
    assert str(left) == ""
    left.ahead(3000)
    left.total(10)
    clock[0] += 10
    left.advance(10, 1000)
    assert left.seconds == 20
    clock[0] += 100  # nothing is measured between two steps
    left.ahead(200)  # the first took less than it might have
    left.total(4)
    clock[0] += 10
    left.advance(1, 100)  # 1,100 operations in 20 s, but three of four rows are left, 10 s each
    assert left.seconds == 30
    clock[0] += 30
    left.advance(3, 100)
    assert left.seconds == 0


def test_a_terminal_gets_a_bar(clock: list[float]) -> None:
    written = io.StringIO()
    with reporter(Console(file=written, force_terminal=True, width=120)) as watch:
        assert isinstance(watch, Bar)
        watch.note("loading [bold]")
        watch.total(10)
        watch.ahead(400)
        clock[0] += 3
        watch.advance(5, 100)
    assert "9 s left of all steps" in " ".join(written.getvalue().split())


def test_a_job_that_takes_long_is_told_of_while_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SECONDS", 0.01)
    told = threading.Event()

    class Heard(io.StringIO):
        def write(self, text: str) -> int:
            if "rows" in text:
                told.set()
            return super().write(text)

    written = Heard()
    with reporter(Console(file=written, width=60)) as watch:
        assert not told.wait(0.1)  # nothing has begun
        watch.total(10)
        assert told.wait(60)
    assert "measured 0 of 10 rows of this step" in written.getvalue()
    assert not [thread for thread in threading.enumerate() if "tick" in thread.name]
