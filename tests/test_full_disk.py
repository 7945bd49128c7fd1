"""A disk that is full, and a folder that can no longer be written, at any write: one line, and the same run after."""

from __future__ import annotations

import builtins
import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fakes import CannedBackend, records, words_tokenizer, write_pairs
from transformers import LlamaConfig, LlamaForCausalLM

from remote_mediation import store as store_module
from remote_mediation.checkup import check_run
from remote_mediation.config import StudyConfig
from remote_mediation.errors import PairsError, StoreError
from remote_mediation.export import export
from remote_mediation.pairs import load_pairs
from remote_mediation.report import write_report
from remote_mediation.saving import save_model
from remote_mediation.store import Store
from remote_mediation.study import reread, run_study
from remote_mediation.texts import write_texts


class Disk:
    """Counts what is written below a folder, and from some write on refuses all of it."""

    def __init__(self, folder: Path, code: int, last: float) -> None:
        """code: of the error. last: so many writes go well."""
        self.folder, self.code, self.last, self.writes = folder, code, last, 0

    def write(self, path: Any) -> None:
        if self.folder in Path(os.fsdecode(path)).parents or Path(os.fsdecode(path)) == self.folder:
            self.count(path)

    def count(self, *path: Any) -> None:
        self.writes += 1
        if self.writes > self.last:
            raise OSError(self.code, os.strerror(self.code), *map(str, path))

    @contextmanager
    def in_place(self) -> Iterator[Disk]:
        """While it is the only disk: a full one takes no content and no folder, a read-only one no change at all."""
        opens, fsync = builtins.open, os.fsync
        changes = ("mkdir",) if self.code == errno.ENOSPC else ("mkdir", "replace", "unlink", "rmdir")

        def opened(path: Any, mode: str = "r", *others: Any, **more: Any) -> Any:
            if self.code == errno.EROFS and set(mode) & set("wax+"):
                self.write(path)
            return opens(path, mode, *others, **more)

        def synced(file: int) -> None:
            if self.code == errno.ENOSPC:
                self.count()
            fsync(file)

        def refusing(change: Callable[..., Any]) -> Callable[..., Any]:
            def changed(path: Any, *others: Any, **more: Any) -> Any:
                self.write(path)
                return change(path, *others, **more)

            return changed

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(builtins, "open", opened)
            patch.setattr(os, "fsync", synced)
            for name in changes:
                patch.setattr(os, name, refusing(getattr(os, name)))
            yield self


@pytest.fixture
def study(tmp_path: Path) -> StudyConfig:
    return StudyConfig(
        model="tiny",
        pairs=str(write_pairs(tmp_path / "pairs.jsonl", records())),
        analyses=["layers"],
        outcome="response_logprob",
        positions={"layers": ["last"]},
        job_seconds=1e-9,  # a job for each batch
        statistics={"resamples": 100},
    )


def command(study: StudyConfig, folder: Path) -> dict[str, bytes]:
    """Measure and report; tables and figures."""
    run_study(study, CannedBackend({}), Store.create(folder, study.identity()))
    store = Store.open(folder)
    write_report(store, reread(store))
    found = [*folder.glob("*.csv"), *folder.glob("figures/*.png")]
    return {path.name: path.read_bytes() for path in found}


@pytest.mark.slow
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS], ids=["full", "read-only"])
def test_a_disk_that_takes_no_more_costs_one_line_and_no_value(
    study: StudyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    monkeypatch.setattr(store_module, "MERGED", 4)
    with Disk(tmp_path / "whole", code, float("inf")).in_place() as disk:
        whole = command(study, tmp_path / "whole")
    assert disk.writes > 80
    for last in range(0, disk.writes, disk.writes // 5):
        folder = tmp_path / f"run-{last}"
        with Disk(folder, code, last).in_place(), pytest.raises(StoreError) as stopped:
            command(study, folder)
        assert str(stopped.value).startswith((f"cannot write {folder}", f"cannot delete {folder}"))
        assert f": {os.strerror(code)}; " in str(stopped.value)
        assert "\n" not in str(stopped.value)
        if (folder / "run.json").exists():
            assert [one for one in check_run(folder) if not (one.whole or one.detail.startswith("gone; "))] == []
        if code == errno.ENOSPC:
            assert list(folder.rglob("*.partial")) == []
        assert command(study, folder) == whole, last


def test_a_ticket_that_cannot_be_deleted_is_named(tmp_path: Path) -> None:
    store = Store.create(tmp_path / "run", {})
    store.save_record({"study": {}})
    with Disk(tmp_path / "run", errno.EROFS, 0).in_place(), pytest.raises(StoreError) as stopped:
        store.forget("job")
    assert str(stopped.value).startswith(f"cannot delete {tmp_path}/run/submitted/job.json: Read-only file system; ")


def test_what_is_exported_in_part_is_not_left(study: StudyConfig, tmp_path: Path) -> None:
    command(study, tmp_path / "run")
    store, target = Store.open(tmp_path / "run"), tmp_path / "shared"
    with Disk(target, errno.ENOSPC, 9).in_place(), pytest.raises(StoreError, match="No space left on device"):
        export(store, target)
    assert not target.exists()
    assert target / "report.md" in export(store, target)


def test_pairs_that_are_written_in_part_are_not_left(full_disk: Path, tmp_path: Path) -> None:
    pairs, target = load_pairs(str(write_pairs(tmp_path / "pairs.jsonl", records()))), full_disk / "pairs.jsonl"
    with pytest.raises(PairsError, match="No space left on device; name another file"):
        write_texts(pairs, target)
    assert not target.exists()
    (full_disk / "filler").unlink()
    write_texts(pairs, target)
    assert load_pairs(str(target)) == pairs


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file can be longer than a model's configuration is."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_model_that_does_not_fit_is_told_as_files_are(tmp_path: Path, small_files: None) -> None:
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "vocab_size": 64}
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=3, **shape))
    with pytest.raises(OSError, match=r"cannot write a model into .*File too large"):
        save_model(model, words_tokenizer(), tmp_path / "model")
