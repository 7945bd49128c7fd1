"""A study whose jobs fail, get lost or outlive their process, on a backend of canned values."""

import contextlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from fakes import WORDS, CannedBackend, Watcher, records, write_pairs

from remote_mediation import study as study_module
from remote_mediation.config import StudyConfig
from remote_mediation.engine.jobs import Job
from remote_mediation.errors import JobError, LostJobError, PairsError, SiteError, StoreError, TransportError
from remote_mediation.store import Store
from remote_mediation.study import Result, reread, run_study

EACH_BATCH = {"job_seconds": 1e-9}  # one batch per job
FIRST = ("checks", "layers", "neurons")  # what is asked for before any search
FURTHER = {"windows": "neurons:windows", "gradient": "neurons:sample"}
SMALL = {"max_windows": 2, "exact": 3, "random_sets": 3}


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    return write_pairs(tmp_path / "pairs.jsonl", records())


@pytest.fixture(params=list(FURTHER))
def searched(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Settings of a search for neurons."""
    return {"neurons": {"search": [request.param], **SMALL}}


def config(pairs: Path, **settings: Any) -> StudyConfig:
    defaults = {
        "model": "tiny",
        "pairs": str(pairs),
        "analyses": ["layers", "neurons"],
        "outcome": "response_logprob",
        "neurons": {"search": ["windows"], **SMALL},
        "statistics": {"resamples": 100},
    }
    return StudyConfig(**{**defaults, **settings})


def run(settings: StudyConfig, backend: CannedBackend, folder: Path, watch: Watcher | None = None) -> Result:
    return run_study(settings, backend, Store.create(folder, settings.identity()), watch or Watcher())


def undisturbed(settings: StudyConfig, tmp_path: Path) -> pd.DataFrame:
    effects = run(settings, CannedBackend({}), tmp_path / "undisturbed").effects
    assert set(effects["analysis"]) == {*FIRST, "neurons:units", FURTHER[settings.neurons.search[0]]}
    return effects


@pytest.mark.parametrize("settings", [{}, EACH_BATCH], ids=["one job", "a job per batch"])
def test_a_pair_whose_jobs_fail_is_left_out(pairs: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    study, folder = config(pairs, **settings), tmp_path / "run"
    backend = CannedBackend({}, refuses=["wreck-bike"])
    effects = run(study, backend, folder).effects
    assert json.loads((folder / "failures.json").read_text("utf-8")) == {"wreck-bike": "no memory for wreck-bike"}
    assert set(effects["pair_id"]) == {record["id"] for record in records()} - {"wreck-bike"}
    first = effects[effects["analysis"].isin(FIRST)].reset_index(drop=True)
    expected = undisturbed(study, tmp_path)
    expected = expected[(expected["pair_id"] != "wreck-bike") & expected["analysis"].isin(FIRST)]
    pd.testing.assert_frame_equal(first, expected.reset_index(drop=True))
    assert Store.open(folder).submitted() == []


def test_a_failed_pair_is_not_tried_again(pairs: Path, tmp_path: Path, searched: dict[str, Any]) -> None:
    study, folder = config(pairs, **searched), tmp_path / "run"
    effects = run(study, CannedBackend({}, refuses=["wreck-bike"]), folder).effects
    later = CannedBackend({})
    pd.testing.assert_frame_equal(run(study, later, folder).effects, effects)
    assert later.collected == []


def test_the_commits_that_went_on_with_a_run_are_recorded_by_time(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, folder = config(pairs), tmp_path / "run"
    sittings = [("first", "1"), ("first", "2"), ("second", "3"), ("third", "4"), ("second", "5"), (None, "6")]
    found = []
    for commit, started in sittings:
        git = {"commit": commit, "dirty": False} if commit else None
        monkeypatch.setattr(study_module, "provenance", lambda git=git, at=started: {"git": git, "started": at})
        run(study, CannedBackend({}), folder)
        record = Store.open(folder).record()
        found.append({time: of["commit"] for time, of in record.get("continued", {}).items()})
    assert (record["git"]["commit"], record["started"]) == ("first", "1")
    assert found == [{}, {}, {"3": "second"}, *[{"3": "second", "4": "third"}] * 3]


def test_a_study_in_which_every_job_fails_stops_and_leaves_no_pair_out(pairs: Path, tmp_path: Path) -> None:
    study, folder = config(pairs, **EACH_BATCH), tmp_path / "run"
    names = [record["id"] for record in records()]
    said = r"^no pair could be measured so far \(burn-car, flood-house, rob-house failed\): no memory for rob-house$"
    with pytest.raises(JobError, match=said):
        run(study, CannedBackend({}, refuses=names), folder)
    assert (Store.open(folder).failures(), Store.open(folder).submitted()) == ({}, [])
    pd.testing.assert_frame_equal(run(study, CannedBackend({}), folder).effects, undisturbed(study, tmp_path))


class Breaking(CannedBackend):
    """A backend on which every job fails, or brings back no numbers, when so many are done."""

    def __init__(self, after: int, *, silently: bool) -> None:
        super().__init__({}, spoils=self._spoil)
        self._after, self._silently = after, silently

    def _spoil(self, job: Job, values: list[np.ndarray]) -> list[np.ndarray]:
        if len(self.collected) <= self._after:
            return values
        if self._silently:
            return [value * np.float32(np.nan) for value in values]
        raise JobError("CUDA out of memory")


@pytest.mark.parametrize("silently", [False, True], ids=["error", "NaN"])
@pytest.mark.parametrize("settings", [EACH_BATCH, {"job_seconds": 1e-7}], ids=["a job per batch", "larger jobs"])
def test_a_server_that_fails_for_good_stops_the_study_and_leaves_no_pair_out(
    pairs: Path, tmp_path: Path, settings: dict[str, Any], silently: bool
) -> None:
    """What was measured before is asked for once more, and fails, too."""
    study, folder = config(pairs, analyses=["layers"], **settings), tmp_path / "run"
    backend = Breaking(5, silently=silently)
    said = r"^what was measured before fails now, too, .* run the same command again once this is mended: "
    with pytest.raises(JobError, match=said + ("no finite outcome" if silently else "CUDA out of memory$")):
        run(study, backend, folder)
    assert (Store.open(folder).failures(), Store.open(folder).submitted()) == ({}, [])
    whole, later = CannedBackend({}), CannedBackend({})
    expected = run(study, whole, tmp_path / "whole").effects
    pd.testing.assert_frame_equal(run(study, later, folder).effects, expected)
    assert len(later.collected) == len(whole.collected) - 5


@pytest.mark.parametrize("settings", [{}, EACH_BATCH], ids=["one job", "a job per batch"])
def test_many_pairs_that_fail_in_a_row_are_left_out_where_another_can_be_measured(
    pairs: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    study, folder = config(pairs, analyses=["layers"], **settings), tmp_path / "run"
    good, *bad = sorted(record["id"] for record in records())
    with contextlib.suppress(KeyboardInterrupt):
        run(study, CannedBackend({}, refuses=bad), folder, Watcher(stop_after=1))
    effects = run(study, CannedBackend({}, refuses=bad), folder).effects
    assert set(effects["pair_id"]) == {good}
    assert Store.open(folder).failures() == {name: f"no memory for {name}" for name in bad}
    later = CannedBackend({})
    pd.testing.assert_frame_equal(run(study, later, folder).effects, effects)
    assert later.collected == []


def test_a_pair_that_failed_is_asked_for_nothing_more_in_its_step(pairs: Path, tmp_path: Path) -> None:
    shelf: dict[str, Job] = {}
    run(
        config(pairs, analyses=["layers"], **EACH_BATCH), CannedBackend(shelf, refuses=["wreck-bike"]), tmp_path / "run"
    )
    assert sum(job.task == "measure" and job.pairs == ("wreck-bike",) for job in shelf.values()) == 2


def test_a_lost_job_is_run_again(pairs: Path, tmp_path: Path) -> None:
    study, shelf = config(pairs, **EACH_BATCH), {}
    backend = CannedBackend(shelf, loses=1)
    result = run(study, backend, tmp_path / "run")
    pd.testing.assert_frame_equal(result.effects, undisturbed(study, tmp_path))
    assert len(shelf) == len(backend.collected) + 1
    assert [job.id for job in list(shelf.values())[:2]] == [backend.collected[0].id] * 2
    assert Store.open(tmp_path / "run").submitted() == []
    assert Store.open(tmp_path / "run").failures() == {}


@pytest.mark.slow
@pytest.mark.parametrize("before", [2, -3], ids=["early", "late"])
def test_a_job_handed_over_by_an_earlier_process_is_collected_and_not_run_again(
    pairs: Path, tmp_path: Path, searched: dict[str, Any], before: int
) -> None:
    study, folder = config(pairs, **EACH_BATCH, **searched), tmp_path / "run"
    shelf: dict[str, Job] = {}
    whole = CannedBackend({})
    run(study, whole, tmp_path / "whole")
    before %= len(whole.collected)
    with pytest.raises(KeyboardInterrupt):
        run(study, CannedBackend(shelf, dies_after=before), folder)
    assert [entry.ticket for entry in Store.open(folder).submitted()] == [f"ticket {before}"]
    assert len(shelf) == before + 1

    later = CannedBackend(shelf)
    pd.testing.assert_frame_equal(run(study, later, folder).effects, undisturbed(study, tmp_path))
    assert later.collected[0].id == shelf[f"ticket {before}"].id
    assert len(later.collected) == len(whole.collected) - before
    ids = [job.id for job in shelf.values()]
    assert len(set(ids)) == len(ids)  # nothing was handed over twice
    assert Store.open(folder).submitted() == []


@pytest.mark.parametrize("trouble", [{"loses": 1}, {"refuses": ["burn-car"]}], ids=["lost", "failed"])
def test_an_earlier_job_that_is_lost_or_failed_is_planned_anew(
    pairs: Path, tmp_path: Path, trouble: dict[str, Any]
) -> None:
    study, folder = config(pairs, **EACH_BATCH), tmp_path / "run"
    shelf: dict[str, Job] = {}
    with pytest.raises(KeyboardInterrupt):
        run(study, CannedBackend(shelf, dies_after=1), folder)  # in the first job after that of the answers
    later = CannedBackend(shelf, **trouble)
    effects = run(study, later, folder).effects
    assert Store.open(folder).submitted() == []
    if "loses" in trouble:
        pd.testing.assert_frame_equal(effects, undisturbed(study, tmp_path))
        assert shelf["ticket 2"].id == shelf["ticket 1"].id
    else:
        assert shelf["ticket 1"].pairs == ("burn-car",)
        assert "burn-car" not in set(effects["pair_id"])


def test_a_lost_connection_keeps_what_is_done(pairs: Path, tmp_path: Path) -> None:
    class Offline(CannedBackend):
        def submit(self, job: Job) -> str:
            if len(self.collected) == 3:
                raise TransportError("connection lost")
            return super().submit(job)

    study, folder, shelf = config(pairs, **EACH_BATCH), tmp_path / "run", {}
    with pytest.raises(TransportError):
        run(study, Offline(shelf), folder)
    later = CannedBackend(shelf)
    pd.testing.assert_frame_equal(run(study, later, folder).effects, undisturbed(study, tmp_path))
    assert len({job.id for job in shelf.values()}) == len(shelf)


@pytest.mark.parametrize("stop_after", [1, 5])
def test_an_interrupted_study_goes_on(pairs: Path, tmp_path: Path, searched: dict[str, Any], stop_after: int) -> None:
    study, folder, watch = config(pairs, **EACH_BATCH, **searched), tmp_path / "run", Watcher()
    with pytest.raises(KeyboardInterrupt):
        run(study, CannedBackend({}), folder, Watcher(stop_after))
    done = sum(len(values) > 0 for values in Store.open(folder).values().values())
    assert done > 0
    assert reread(Store.open(folder)).effects["pair_id"].nunique() <= 1 + stop_after

    backend = CannedBackend({})
    result = run(study, backend, folder, watch)
    pd.testing.assert_frame_equal(result.effects, undisturbed(study, tmp_path))
    total = Watcher()
    run(study, CannedBackend({}), tmp_path / "again", total)
    assert sum(watch.totals) < sum(total.totals)
    assert sum(watch.done) == sum(watch.totals)


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [0, 7, 40, 80])
def test_a_run_that_ends_anywhere_can_be_reported_and_goes_on(
    pairs: Path, tmp_path: Path, searched: dict[str, Any], jobs: int
) -> None:
    study, folder = config(pairs, job_seconds=1e-7, **searched), tmp_path / "run"
    shelf: dict[str, Job] = {}
    with contextlib.suppress(KeyboardInterrupt):
        run(study, CannedBackend(shelf, dies_after=jobs), folder)
    partial = reread(Store.open(folder))
    assert "search.csv" not in partial.tables or "gates.csv" in partial.tables
    whole = run(study, CannedBackend(shelf), folder)
    expected = run(study, CannedBackend({}), tmp_path / "undisturbed")
    pd.testing.assert_frame_equal(whole.effects, expected.effects)
    assert whole.tables.keys() == expected.tables.keys()
    for name, table in expected.tables.items():
        pd.testing.assert_frame_equal(whole.tables[name], table)


def test_a_folder_that_is_moved_while_it_is_measured_into_goes_on_at_its_new_place(pairs: Path, tmp_path: Path) -> None:
    study, folder, moved = config(pairs, analyses=["layers"], **EACH_BATCH), tmp_path / "run", tmp_path / "moved"

    def move(job: Job, values: list[np.ndarray]) -> list[np.ndarray]:
        if len(backend.collected) == 3:
            folder.rename(moved)
        return values

    backend = CannedBackend({}, spoils=move)
    with pytest.raises(StoreError, match=r"moved or deleted.*name its new place with --out, and give the same command"):
        run(study, backend, folder)
    assert not folder.exists()
    effects = run(study, CannedBackend({}), moved).effects
    pd.testing.assert_frame_equal(effects, run(study, CannedBackend({}), tmp_path / "whole").effects)


def test_a_finished_study_measures_nothing_new(pairs: Path, tmp_path: Path, searched: dict[str, Any]) -> None:
    study, folder, watch = config(pairs, **searched), tmp_path / "run", Watcher()
    first = run(study, CannedBackend({}), folder)
    backend = CannedBackend({})
    again = run(study, backend, folder, watch)
    assert "neurons:units" in set(first.effects["analysis"])
    assert (watch.totals, backend.collected) == ([], [])
    for later in (again, reread(Store.open(folder))):
        pd.testing.assert_frame_equal(later.effects, first.effects)
        assert later.tables.keys() == first.tables.keys()
        for name, table in first.tables.items():
            pd.testing.assert_frame_equal(later.tables[name], table)


@pytest.mark.parametrize(
    "edit",
    [
        *(
            {"model": {name: wrong}}
            for name, wrong in (("layers", "6"), ("sliding", 3), ("window", [1]), ("vocab", None))
        ),
        *({"outcome": {"name": wrong}} for wrong in (None, [], "another")),
        *({"outcome": {"name": "logit_diff", "plus": wrong}} for wrong in ("x", ["x"], [[1]], None)),
    ],
    ids=str,
)
def test_a_record_of_another_kind_is_refused_in_one_line(
    pairs: Path, tmp_path: Path, edit: dict[str, dict[str, Any]]
) -> None:
    study = config(pairs, analyses=["layers"])
    run(study, CannedBackend({}), tmp_path / "run")
    store = Store.open(tmp_path / "run")
    record = store.record()
    store.save_record({**record, **{name: {**record[name], **changed} for name, changed in edit.items()}})
    with pytest.raises(StoreError, match=r"^.*run holds a run of another version \([^\n]+\); run the study anew$"):
        reread(store)


def test_a_finished_study_may_be_asked_for_more(pairs: Path, tmp_path: Path) -> None:
    backend = CannedBackend({})
    run(config(pairs, analyses=["layers"]), CannedBackend({}), tmp_path / "run")
    more = run(config(pairs), backend, tmp_path / "run")
    pd.testing.assert_frame_equal(more.effects, undisturbed(config(pairs), tmp_path))
    asked = row_keys(backend)
    kept = CannedBackend({})
    run(config(pairs, analyses=["layers"]), kept, tmp_path / "other")
    assert asked
    assert asked.isdisjoint(row_keys(kept))


def row_keys(backend: CannedBackend) -> set[str]:
    """Of everything measured but the base prompts, which belong to every job of a pair."""
    contexts = [context for job in backend.collected if job.task == "measure" for context in job.contexts]
    return {key for context in contexts for key, row in zip(context.keys, context.rows, strict=True) if row.writes}


def test_another_place_to_run_is_the_same_study(pairs: Path, tmp_path: Path) -> None:
    run(config(pairs), CannedBackend({}), tmp_path / "run")
    backend = CannedBackend({})
    elsewhere = config(pairs, backend="ndif", device="cuda", job_seconds=1.0, max_memory=2.0)
    run(elsewhere, backend, tmp_path / "run")
    assert backend.collected == []


def test_changed_pairs_are_another_study(pairs: Path, tmp_path: Path) -> None:
    study, folder = config(pairs), tmp_path / "run"
    run(study, CannedBackend({}), folder)
    before = (folder / "run.json").read_bytes()
    write_pairs(pairs, [{**record, "harmful": record["harmful"] + " now"} for record in records()])
    with pytest.raises(
        StoreError, match=r"holds a run on other pairs, .*pairs.jsonl has changed; choose another --out"
    ):
        run(study, CannedBackend({}), folder)
    assert (folder / "run.json").read_bytes() == before


def test_responses_are_taken_from_the_file_or_from_the_model(tmp_path: Path) -> None:
    sure, sorry = {"harmful_response": "sure here is why"}, {"harmless_response": "sorry no"}
    given = [{**sure, **sorry}, {}, sure, sorry, {}, {**sure, "harmless_response": sure["harmful_response"]}]
    content = [{**record, **extra} for record, extra in zip(records(), given, strict=True)]
    study = config(write_pairs(tmp_path / "pairs.jsonl", content), response_logprob={"tokens": 3})
    result = run(study, CannedBackend({}), tmp_path / "run")
    encoded = {"sure": (21, 25, 26), "sorry": (23, 24)}
    # The canned answer repeats the prompt: "steal a car", "wash a car".
    assert {pair.id: pair.answers for pair in result.study.pairs} == {
        "steal-car": (encoded["sure"], encoded["sorry"]),
        "take-bike": ((30, 10, 14), (31, 10, 14)),
        "rob-house": (encoded["sure"], (35, 10, 15)),
        "burn-car": ((28, 10, 13), encoded["sorry"]),
        "wreck-bike": ((32, 10, 14), (33, 10, 14)),
    }
    assert [refusal.id for refusal in result.study.refusals] == ["flood-house"]
    assert "same answer" in result.study.refusals[0].reason


@pytest.mark.parametrize(
    ("settings", "kept", "error", "message"),
    [
        ({}, slice(0, 1), PairsError, r"1 of 1 pairs can be run, a study needs two \(none was refused\); add pairs"),
        ({}, slice(0, 6, 3), PairsError, r"need pairs from two templates or more; these 2 come from 1"),
        ({"positions": {"layers": ["nowhere"]}}, slice(0, 6), SiteError, "unknown position 'nowhere'"),
        ({"analyses": ["heads"], "positions": {"heads": ["after_edit[9]"]}}, slice(0, 6), SiteError, "no pair has"),
        ({"neurons": {"layers": [6]}}, slice(0, 6), SiteError, "layer 6 is out of range"),
    ],
)
def test_what_cannot_be_measured_leaves_no_run_folder(
    tmp_path: Path, settings: dict[str, Any], kept: slice, error: type[Exception], message: str
) -> None:
    responses = {"harmful_response": "sure", "harmless_response": "sorry"}
    file = write_pairs(tmp_path / "pairs.jsonl", records(**responses)[kept])
    with pytest.raises(error, match=message):
        run(config(file, **settings), CannedBackend({}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("outcome", ["response_logprob", "refusal"])
def test_pairs_that_were_changed_are_refused_and_made_anew_where_they_are_gone(
    pairs: Path, tmp_path: Path, outcome: str
) -> None:
    study, folder = config(pairs, outcome=outcome, analyses=["layers"]), tmp_path / "run"
    effects = run(study, CannedBackend({}), folder).effects
    written = (folder / "pairs.jsonl").read_text("utf-8")
    (folder / "pairs.jsonl").write_text(written.replace("steal-car", "steal-van"))
    for use in (lambda: run(study, CannedBackend({}), folder), lambda: reread(Store.open(folder))):
        with pytest.raises(StoreError, match=r"pairs.jsonl is not as this run wrote it .*; put it back, or delete it"):
            use()
    (folder / "pairs.jsonl").unlink()
    with pytest.raises(StoreError, match=r"pairs.jsonl is gone; run the study again, which makes it anew"):
        reread(Store.open(folder))
    later = CannedBackend({})
    pd.testing.assert_frame_equal(run(study, later, folder).effects, effects)
    assert later.collected == []
    assert (folder / "pairs.jsonl").read_text("utf-8") == written
    pd.testing.assert_frame_equal(reread(Store.open(folder)).effects, effects)


# --- answers that are none, and one that was wrong from the start -----------------------------------------------------


@pytest.mark.parametrize("wrong", [-1.0, 0.5, 1e9, 3e38, float(len(WORDS.split()) + 10)])
def test_tokens_that_are_none_are_asked_for_again(pairs: Path, tmp_path: Path, wrong: float) -> None:
    spoilt: list[str] = []

    def spoil(job: Job, values: list[np.ndarray]) -> list[np.ndarray]:
        if job.task != "generate" or job.id in spoilt:
            return values
        spoilt.append(job.id)
        return [np.where(np.arange(len(value)) == 1, np.float32(wrong), value) for value in values]

    study = config(pairs)
    result = run(study, CannedBackend({}, spoils=spoil), tmp_path / "run")
    pd.testing.assert_frame_equal(result.effects, undisturbed(study, tmp_path))
    assert spoilt


def test_a_first_answer_that_was_wrong_does_not_end_a_folder_for_good(pairs: Path, tmp_path: Path) -> None:
    """All later ones contradict it; which file it lies in is said."""
    study, folder, wrong = config(pairs, analyses=["layers"], **EACH_BATCH), tmp_path / "run", list[str]()

    def spoil(job: Job, values: list[np.ndarray]) -> list[np.ndarray]:
        if job.task != "measure" or wrong:
            return values
        wrong.append(job.id)
        return [value + np.float32(1) for value in values]

    with pytest.raises(LostJobError, match=r"choose another --out, or delete (\S+) if that is what is wrong") as caught:
        run(study, CannedBackend({}, spoils=spoil), folder)
    named = re.search(r"delete (\S+) if", str(caught.value))
    assert named
    assert Path(named[1]) == folder / f"readouts/{wrong[0]}.npz"
    Path(named[1]).unlink()
    result = run(study, CannedBackend({}), folder)
    pd.testing.assert_frame_equal(result.effects, run(study, CannedBackend({}), tmp_path / "whole").effects)
