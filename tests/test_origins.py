"""Whose a readout is: renamed, copied from another run, deleted; and jobs that were mixed up or overtaken."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from fakes import CannedBackend, records, write_pairs

from remote_mediation.checkup import check_run
from remote_mediation.config import StudyConfig
from remote_mediation.engine.answers import check_answer
from remote_mediation.engine.jobs import Job, Readout
from remote_mediation.errors import LostJobError, StoreError
from remote_mediation.report import write_report
from remote_mediation.runfiles import Sealed, record_text
from remote_mediation.store import Store
from remote_mediation.study import Result, reread, run_study


def measured(study: StudyConfig, folder: Path, backend: CannedBackend | None = None) -> Result:
    return run_study(study, backend or CannedBackend({}), Store.create(folder, study.identity()))


@pytest.fixture
def study(tmp_path: Path) -> StudyConfig:
    """One batch a job, so that its folder has many readouts."""
    return StudyConfig(
        model="tiny",
        pairs=str(write_pairs(tmp_path / "pairs.jsonl", records()[:4])),
        analyses=["layers"],
        positions={"layers": ["last"]},
        outcome="response_logprob",
        statistics={"resamples": 100},
        job_seconds=1e-9,
    )


@pytest.fixture
def run(study: StudyConfig, tmp_path: Path) -> Path:
    """A finished run."""
    measured(study, tmp_path / "run")
    return tmp_path / "run"


def readouts(folder: Path) -> list[Path]:
    return sorted((folder / "readouts").glob("*.npz"))


def as_by_an_older_version(folder: Path) -> None:
    """Without what says of which job and run a readout is, as checksummed files were before."""
    record = {name: value for name, value in Store(folder).record().items() if name not in ("origin", "values")}
    text = record_text(Sealed(record, Store(folder).bound(), 1))
    for name in ("run.json", ".run.json.copy"):
        (folder / name).write_text(text, "utf-8")
    for path in readouts(folder):
        with np.load(path) as data:
            content = {name: data[name] for name in ("keys", "lengths", "values", "seconds", "flops")}
        whole = [content[name].tobytes() for name in ("keys", "lengths", "values")]
        np.savez(path, **content, checksum=hashlib.sha256(b"".join(whole)).hexdigest())


def test_a_run_does_not_record_where_it_lies(study: StudyConfig, tmp_path: Path) -> None:
    """`run.json` is given to others, and the path of a folder names its owner."""
    folder = tmp_path / "someone's"
    measured(study.model_copy(update={"out": folder}), folder)
    assert folder.name not in (folder / "run.json").read_text("utf-8")
    assert Store.open(folder).config().out is None


def test_a_renamed_readout_is_put_back_under_its_name(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = reread(Store.open(run)).effects
    first, second, *_ = readouts(run)
    first.replace(first.with_name("by-hand.npz"))
    (state,) = [state for state in check_run(run) if not state.whole]
    assert state.name == "readouts/by-hand.npz"
    assert f"it holds the values of job {first.stem}, so it was renamed or copied" in state.detail
    pd.testing.assert_frame_equal(reread(Store.open(run)).effects, before)
    assert first.exists()
    assert "is put back under the name of" in caplog.text
    shutil.copy(first, first.with_name("copy.npz"))
    pd.testing.assert_frame_equal(reread(Store.open(run)).effects, before)
    assert (first.exists(), first.with_name("copy.npz.bad").exists()) == (True, True)
    assert second.exists()


def test_a_readout_renamed_onto_another_is_told_and_measured_anew(run: Path, study: StudyConfig) -> None:
    whole = reread(Store.open(run))
    first, second, *_ = readouts(run)
    first.replace(second)
    short = reread(Store.open(run))
    assert len(short.effects) < len(whole.effects)
    assert (first.exists(), second.exists()) == (True, False)  # put back; the other one's values are gone
    assert short.lost
    text = write_report(Store.open(run), short).read_text("utf-8")
    assert f"**{short.lost} values of this run are gone**" in text
    again = measured(study, run)
    pd.testing.assert_frame_equal(again.effects, whole.effects)
    assert "values of this run are gone" not in write_report(Store.open(run), reread(Store.open(run))).read_text()


def test_a_readout_that_was_deleted_is_missed_in_the_report(run: Path) -> None:
    assert reread(Store.open(run)).lost == 0
    with np.load(readouts(run)[0]) as data:
        count = len(data["keys"])
    readouts(run)[0].unlink()
    assert reread(Store.open(run)).lost == count


def test_a_report_without_any_value_does_not_take_the_place_of_the_one_there(run: Path, study: StudyConfig) -> None:
    """As where a folder was copied without its readouts."""
    whole = reread(Store.open(run))
    write_report(Store.open(run), whole)
    kept = (run / "effects.csv").read_bytes()
    for path in readouts(run):
        path.unlink()
    with pytest.raises(StoreError, match=r"has none of the \d+ values that it measured; put its readouts back, or run"):
        reread(Store.open(run))
    assert (run / "effects.csv").read_bytes() == kept
    pd.testing.assert_frame_equal(measured(study, run).effects, whole.effects)


class Served(CannedBackend):
    """On a server whose weights have this hash."""

    def __init__(self, weights: str) -> None:
        def other(job: Job, values: list[np.ndarray]) -> list[np.ndarray]:
            return [value + 1 for value in values] if weights == "bb" and job.task == "measure" else values

        super().__init__({}, spoils=other)
        self.served = {"weights": weights, "torch": "2"}


def test_a_readout_of_other_weights_is_refused(
    study: StudyConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = measured(study, tmp_path / "one", Served("aa"))
    measured(study, tmp_path / "two", Served("bb"))
    for path in readouts(tmp_path / "two")[:3]:
        shutil.copy(path, tmp_path / "one/readouts" / path.name)
    assert sum(not state.whole for state in check_run(tmp_path / "one")) == 3
    found = reread(Store.open(tmp_path / "one"))
    assert found.lost
    assert caplog.text.count("it was measured in another run: of another study, or on other weights") == 3
    assert len(found.effects) < len(whole.effects)
    again = measured(study, tmp_path / "one", Served("aa"))
    pd.testing.assert_frame_equal(again.effects, whole.effects)


def test_a_readout_of_the_same_study_on_the_same_weights_is_taken(study: StudyConfig, tmp_path: Path) -> None:
    whole = measured(study, tmp_path / "one", Served("aa"))
    measured(study, tmp_path / "two", Served("aa"))
    path = readouts(tmp_path / "one")[0]
    shutil.copy(tmp_path / "two/readouts" / path.name, path)
    pd.testing.assert_frame_equal(reread(Store.open(tmp_path / "one")).effects, whole.effects)


def test_a_run_of_an_older_version_is_read_with_a_note(
    run: Path, study: StudyConfig, caplog: pytest.LogCaptureFixture
) -> None:
    before = reread(Store.open(run)).effects
    as_by_an_older_version(run)
    count = len(readouts(run))
    pd.testing.assert_frame_equal(reread(Store.open(run)).effects, before, check_exact=True)
    (line,) = caplog.messages
    assert line == (
        f"{run} has {count} readouts of an older version, which do not say of which job and weights they are: "
        "they are read as they stand"
    )
    assert all(state.whole for state in check_run(run))
    readouts(run)[0].unlink()
    pd.testing.assert_frame_equal(measured(study, run).effects, before, check_exact=True)
    with np.load(readouts(run)[0]) as data:
        assert str(data["run"]) == Store.open(run).record()["origin"]


def test_values_of_one_row_that_differ_within_a_job_are_noticed() -> None:
    values = [np.array([value], np.float32) for value in (1.0, 2.0, 1.0)]
    check_answer("j", ["a", "b", "a"], [1, 1, 1], Readout(values, 0.0), {}, "float32")
    mixed = [values[1], values[0], values[2]]
    with pytest.raises(LostJobError, match=r"two values for one row that lie \S+ times as far apart as float32 allows"):
        check_answer("j", ["a", "b", "a"], [1, 1, 1], Readout(mixed, 0.0), {}, "float32")
