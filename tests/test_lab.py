"""The lab on a canned backend: what it keeps, what it asks for again, and what it says of what failed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import INFO, LOGITS, CannedBackend, canned, records, token_pair
from pydantic import TypeAdapter

from remote_mediation.config import StudyConfig
from remote_mediation.effects import Request
from remote_mediation.engine.jobs import Context, Job, Keys
from remote_mediation.engine.rows import Row, swap
from remote_mediation.engine.tasks import screen_tasks
from remote_mediation.errors import JobError, LostJobError
from remote_mediation.lab import Lab, Study, UnmeasuredError
from remote_mediation.pairs import PromptPair
from remote_mediation.runner import MOST_TRIES
from remote_mediation.sites import Site
from remote_mediation.store import Store

ANY = TypeAdapter(Any)
PAIRS = tuple(token_pair(f"p{i}", x1=(1, 2, 10 + i, 4, 5)) for i in range(6))
SITE = Site("mlp_output", 2, "all")
BARE = [Row(pair.id, side) for pair in PAIRS for side in (0, 1)]


def lab(folder: Path, backend: CannedBackend | None = None, **settings: Any) -> Lab:
    config = StudyConfig(model="tiny", analyses=["layers"], **settings)
    return Lab(Study(config, INFO, LOGITS, PAIRS, ()), Store(folder), backend)


def swaps(pairs: tuple[Any, ...] = PAIRS) -> list[Row]:
    return [swap(pair, SITE, 0, INFO) for pair in pairs]


def screenings(here: Lab) -> list[Context]:
    """One for each pair."""
    return [task for pair in PAIRS for task in screen_tasks([pair], "mlp_neurons", "last", here.study.setting)]


def test_outcomes_of_failed_pairs_are_missing(tmp_path: Path) -> None:
    found = lab(tmp_path, CannedBackend({}, refuses=["p2"])).outcomes(swaps())
    assert np.isnan(found).tolist() == [name == "p2" for name in (pair.id for pair in PAIRS)]
    # Without a backend, too, and the other values stay what they were.
    np.testing.assert_array_equal(lab(tmp_path).outcomes(swaps()), found)
    undisturbed = lab(tmp_path / "other", CannedBackend({})).outcomes(swaps())
    np.testing.assert_array_equal(np.delete(found, 2), np.delete(undisturbed, 2))


def test_pairs_are_those_of_a_split_that_did_not_fail(tmp_path: Path) -> None:
    here = lab(tmp_path, CannedBackend({}, refuses=["p2"]))
    splits = here.study.splits()
    assert set(splits.values()) == {"discovery", "heldout"}
    here.outcomes(swaps())
    for split in ("discovery", "heldout"):
        assert {pair.id for pair in here.pairs(split)} == {name for name in splits if splits[name] == split} - {"p2"}
    assert {pair.id for pair in here.pairs()} == set(splits) - {"p2"}


def test_bare_rows_asked_for_alone_are_measured(tmp_path: Path) -> None:
    backend = CannedBackend({})
    here = lab(tmp_path, backend)
    found = here.outcomes(BARE)
    assert np.isfinite(found).all()
    assert [job.rows for job in backend.collected] == [0]
    keys = Keys(here.study.setting, PAIRS)
    assert found.tolist() == [LOGITS.value(PAIRS[0], canned(keys(row), 3)) for row in BARE]
    assert len(set(found)) == len(BARE)


def test_nothing_is_measured_twice(tmp_path: Path) -> None:
    first, second = CannedBackend({}), CannedBackend({})
    before = lab(tmp_path, first).indirect([SITE], PAIRS)
    after = lab(tmp_path, second).indirect([SITE], PAIRS)
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(one, other)
    assert first.collected
    assert second.collected == []


def test_joint_effects_are_differences_of_outcomes_and_no_effects_of_the_study(tmp_path: Path) -> None:
    here = lab(tmp_path, CannedBackend({}))
    found = here.indirect([SITE], PAIRS)
    y0, y1 = (here.outcomes([Row(pair.id, side) for pair in PAIRS]) for side in (0, 1))
    with_x1, with_x0 = (here.outcomes([swap(pair, SITE, side, INFO) for pair in PAIRS]) for side in (0, 1))
    np.testing.assert_array_equal(found.nie, [with_x1 - y0])
    np.testing.assert_array_equal(found.tie, [y1 - with_x0])
    np.testing.assert_array_equal(found.te, y1 - y0)
    assert found.clusters.tolist() == [pair.cluster for pair in PAIRS]
    assert here.effects.empty
    here.measure([Request("modules", pair, SITE) for pair in PAIRS])
    assert here.effects["nie"].tolist() == pytest.approx(found.nie[0].tolist())


def test_joint_effects_take_one_run_of_each_prompt(tmp_path: Path) -> None:
    backend = CannedBackend({})
    here = lab(tmp_path, backend)
    here.indirect([SITE, Site("mlp_output", 3, "last")], PAIRS)
    keys = Keys(here.study.setting, PAIRS)
    run = Counter(key for job in backend.collected for key in job.keys)
    assert [run[keys(row)] for row in BARE] == [1] * len(BARE)


def test_what_is_measured_ahead_takes_one_run_of_each_prompt(tmp_path: Path) -> None:
    backend = CannedBackend({})
    here = lab(tmp_path, backend)
    here.measure_ahead(lambda: [*BARE, *swaps()])
    here.outcomes(swaps())
    here.outcomes(BARE)
    run = Counter(key for job in backend.collected for key in job.keys)
    keys = Keys(here.study.setting, PAIRS)
    assert [run[keys(row)] for row in (*BARE, *swaps())] == [1] * (len(BARE) + len(PAIRS))


def test_without_a_backend_nothing_is_made_ahead(tmp_path: Path) -> None:
    made = list[str]()

    def rows() -> list[Row]:
        made.append("rows")
        return BARE

    lab(tmp_path / "report").measure_ahead(rows)
    assert made == []
    lab(tmp_path / "run", CannedBackend({})).measure_ahead(rows)
    assert made == ["rows"]


def test_without_a_backend_what_is_missing_is_said(tmp_path: Path) -> None:
    here = lab(tmp_path)
    assert not here.can_measure
    task, *_ = screenings(here)
    for ask in (
        lambda: here.outcomes(swaps()),
        lambda: here.outcomes(BARE),
        lambda: here.indirect([SITE], PAIRS),
        lambda: here.measure([Request("modules", PAIRS[0], SITE)]),
        lambda: here.run([task]),
        lambda: here.noted("note", lambda tokenizer: 1, ANY),
        lambda: here.tokenised("texts", lambda: []),
    ):
        with pytest.raises(UnmeasuredError):
            ask()
    assert list(tmp_path.iterdir()) == []


def test_tasks_are_run_once_and_in_the_order_asked_for(tmp_path: Path) -> None:
    backend, again = CannedBackend({}), CannedBackend({})
    here = lab(tmp_path, backend)
    tasks = screenings(here)
    some = here.run(tasks[:2])
    found = here.run(tasks[::-1])[::-1]
    for one, task in zip(found, tasks, strict=True):
        np.testing.assert_array_equal(one, canned(task.keys[0], 2 * INFO.layers * INFO.d_ff))
    for one, other in zip(some, found, strict=False):
        np.testing.assert_array_equal(one, other)
    ran = [key for job in backend.collected for key in job.keys]
    assert sorted(ran) == sorted(task.keys[0] for task in tasks)
    for other in (lab(tmp_path, again), lab(tmp_path)):  # another process, and a report
        for one, two in zip(other.run(tasks), found, strict=True):
            np.testing.assert_array_equal(one, two)
    assert again.collected == []


def test_the_same_task_twice_is_one(tmp_path: Path) -> None:
    backend = CannedBackend({})
    here = lab(tmp_path, backend)
    task, *_ = screenings(here)
    first, second = here.run([task, task])
    np.testing.assert_array_equal(first, second)
    assert sum(len(job.keys) for job in backend.collected) == 1


def test_a_failed_task_is_no_pairs_fault(tmp_path: Path) -> None:
    here = lab(tmp_path, CannedBackend({}, refuses_tasks=["screen"]))
    tasks = screenings(here)
    with pytest.raises(JobError, match="screen is not allowed"):
        here.run(tasks)
    assert Store(tmp_path).failures() == {}
    assert Store(tmp_path).submitted() == []
    assert here.pairs() == PAIRS
    with pytest.raises(UnmeasuredError):
        lab(tmp_path).run(tasks)


def test_notes_are_made_once_with_the_tokenizer_and_kept(tmp_path: Path) -> None:
    made: list[int] = []

    def note(tokenizer: Any) -> dict[str, Any]:
        made.append(len(tokenizer))
        return {"ids": [1, 2], "of": None}

    backend = CannedBackend({})
    here = lab(tmp_path, backend)
    first = here.noted("one", note, ANY)
    again = (here.noted("one", note, ANY), lab(tmp_path).noted("one", note, ANY))
    assert [first, *again] == [{"ids": [1, 2], "of": None}] * 3
    assert made == [len(backend.tokenizer)]
    here.noted("other", note, ANY)
    assert len(made) == 2


def test_an_empty_note_is_a_note(tmp_path: Path) -> None:
    assert lab(tmp_path, CannedBackend({})).noted("empty", lambda tokenizer: [], ANY) == []
    assert lab(tmp_path).noted("empty", lambda tokenizer: [1], ANY) == []


def test_other_texts_are_tokenised_once_and_kept(tmp_path: Path) -> None:
    made = []

    def texts() -> list[PromptPair]:
        made.append(1)
        return [PromptPair(**record) for record in records()]

    here = lab(tmp_path, CannedBackend({}))
    first = here.tokenised("texts", texts)
    assert [pair.id for pair in first.pairs] == [record["id"] for record in records()]
    assert first == here.tokenised("texts", texts) == lab(tmp_path).tokenised("texts", texts)
    assert made == [1]
    assert {pair.id for pair in here.pairs()} == {pair.id for pair in PAIRS}


def test_beside_the_study_splits_stay(tmp_path: Path) -> None:
    backend = CannedBackend({})
    here = lab(tmp_path, backend)
    # Of their own, these three pairs of one cluster could not even be split.
    others = tuple(replace(pair, cluster="one", x1=(1, 2, 20 + i, 4, 5)) for i, pair in enumerate(PAIRS[1:4]))
    beside = here.beside(pairs=others)
    splits = here.study.splits()
    for split in ("discovery", "heldout"):
        assert [pair.id for pair in beside.pairs(split)] == [p.id for p in others if splits[p.id] == split]
    assert beside.pairs() == others
    plain, rewrapped = here.outcomes(swaps(PAIRS[1:4])), beside.outcomes(swaps(others))
    assert np.isfinite(rewrapped).all()
    assert set(plain).isdisjoint(rewrapped)  # other tokens are other rows
    assert here.beside().outcomes(swaps(PAIRS[1:4])).tolist() == plain.tolist()


def test_another_model_beside_the_study_is_measured_by_its_own_backend(tmp_path: Path) -> None:
    tuned = replace(INFO, name="tuned")
    base, other = CannedBackend({}), CannedBackend({}, info=tuned)
    here = lab(tmp_path, base)
    plain = here.outcomes(swaps())
    before = len(base.collected)
    found = here.beside(info=tuned, backend=other).outcomes(swaps())
    assert len(base.collected) == before
    assert other.collected
    assert set(plain).isdisjoint(found)
    with pytest.raises(UnmeasuredError):  # a checkpoint without a backend is not asked of the model
        here.beside(info=replace(INFO, name="third")).outcomes(swaps())


# --- answers that are not those to the job --------------------------------------------------------------------------

SPOILT: dict[str, Callable[[list[np.ndarray]], list[np.ndarray]]] = {
    "one too few": lambda values: values[:-1],
    "one too many": lambda values: [*values, values[0]],
    "none": lambda values: [],
    "one is longer": lambda values: [*values[:-1], np.append(values[-1], values[-1])],
    "one is shorter": lambda values: [values[0][:-1], *values[1:]],
    "all are shorter": lambda values: [value[:-1] for value in values],
    "one is empty": lambda values: [values[0][:0], *values[1:]],
    "float64": lambda values: [value.astype(np.float64) for value in values],
    "integers": lambda values: [value.astype(np.int32) for value in values],
    "nested": lambda values: [value[None] for value in values],
}


@pytest.mark.parametrize("fault", list(SPOILT))
def test_a_wrong_answer_is_asked_for_again(tmp_path: Path, fault: str) -> None:
    jobs: list[Job] = []

    def spoil(job: Job, values: list[np.ndarray]) -> list[np.ndarray]:
        jobs.append(job)
        return SPOILT[fault](values) if len(jobs) == 1 else values

    found = lab(tmp_path / "spoilt", CannedBackend({}, spoils=spoil)).outcomes(swaps())
    np.testing.assert_array_equal(found, lab(tmp_path / "whole", CannedBackend({})).outcomes(swaps()))
    assert [job.id for job in jobs] == [jobs[0].id] * 2
    assert Store(tmp_path / "spoilt").failures() == {}


@pytest.mark.parametrize("fault", list(SPOILT))
def test_an_answer_that_stays_wrong_ends_in_one_line_and_is_not_kept(tmp_path: Path, fault: str) -> None:
    backend = CannedBackend({}, spoils=lambda job, values: SPOILT[fault](values))
    with pytest.raises(LostJobError, match=r"^a job (of \d+ keys )?brought back [^\n]*$"):
        lab(tmp_path, backend).outcomes(swaps())
    assert len(backend.collected) == MOST_TRIES
    store = Store(tmp_path)
    assert (store.values(), store.submitted(), store.failures()) == ({}, [], {})
    undisturbed = lab(tmp_path / "whole", CannedBackend({})).outcomes(swaps())
    np.testing.assert_array_equal(lab(tmp_path, CannedBackend({})).outcomes(swaps()), undisturbed)


@pytest.mark.parametrize("fault", [*SPOILT, "not finite"])
def test_a_wrong_answer_to_an_earlier_process_is_measured_anew(tmp_path: Path, fault: str) -> None:
    shelf: dict[str, Job] = {}
    with pytest.raises(KeyboardInterrupt):
        lab(tmp_path, CannedBackend(shelf, dies_after=0)).outcomes(swaps())
    seen: list[Job] = []

    def spoil(job: Job, values: list[np.ndarray]) -> list[np.ndarray]:
        seen.append(job)
        spoilt = SPOILT.get(fault, lambda values: [value * np.float32(np.nan) for value in values])
        return spoilt(values) if len(seen) == 1 else values

    found = lab(tmp_path, CannedBackend(shelf, spoils=spoil)).outcomes(swaps())
    np.testing.assert_array_equal(found, lab(tmp_path / "whole", CannedBackend({})).outcomes(swaps()))
    assert len(seen) == 2


def not_finite_of(*pairs: str) -> Callable[[Job, list[np.ndarray]], list[np.ndarray]]:
    def spoil(job: Job, values: list[np.ndarray]) -> list[np.ndarray]:
        rows = [row for context in job.contexts for row in context.rows]
        return [
            np.full_like(value, np.inf) if row.pair in pairs and row.writes else value
            for row, value in zip(rows, values, strict=True)
        ]

    return spoil


def test_pairs_whose_outcomes_are_no_numbers_fail_and_the_others_do_not(tmp_path: Path) -> None:
    found = lab(tmp_path, CannedBackend({}, spoils=not_finite_of("p1", "p4"))).outcomes(swaps())
    whole = lab(tmp_path / "whole", CannedBackend({})).outcomes(swaps())
    assert np.isnan(found).tolist() == [pair.id in ("p1", "p4") for pair in PAIRS]
    np.testing.assert_array_equal(np.delete(found, [1, 4]), np.delete(whole, [1, 4]))
    assert Store(tmp_path).failures() == dict.fromkeys(("p1", "p4"), "no finite outcome; try bfloat16")
    again = CannedBackend({})
    np.testing.assert_array_equal(lab(tmp_path, again).outcomes(swaps()), found)
    assert again.collected == []


@pytest.mark.parametrize("settings", [{}, {"job_seconds": 1e-9}], ids=["one job", "a job per pair"])
def test_a_study_without_any_finite_outcome_stops_at_once(tmp_path: Path, settings: dict[str, Any]) -> None:
    backend = CannedBackend({}, spoils=lambda job, values: [value * np.float32(np.nan) for value in values])
    with pytest.raises(JobError, match="no finite outcome; try bfloat16"):
        lab(tmp_path, backend, **settings).outcomes(swaps())
    assert len(backend.collected) == (6 if settings else 2)  # each job once more
    assert Store(tmp_path).values() == {}


def test_a_task_without_finite_values_fails(tmp_path: Path) -> None:
    here = lab(tmp_path, CannedBackend({}, spoils=lambda job, values: [value / np.float32(0) for value in values]))
    with np.errstate(divide="ignore"), pytest.raises(JobError, match="screen brought back values that are not finite"):
        here.run(screenings(here))
    assert (Store(tmp_path).values(), Store(tmp_path).submitted()) == ({}, [])
