"""The run folder: whole files or none, found again by key, and kept apart from everything else."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import INFO, LOGITS, token_pair
from pydantic import TypeAdapter
from typer.testing import CliRunner

from remote_mediation.checkup import check_run
from remote_mediation.cli import app
from remote_mediation.engine.jobs import Context, Job, Readout
from remote_mediation.engine.rows import Row, Scale, Write
from remote_mediation.errors import StoreError
from remote_mediation.runfiles import DamagedError, _digest_of, pairs_text, read_pairs
from remote_mediation.store import Store
from remote_mediation.tokens import Prepared, Refusal

ANY = TypeAdapter(Any)
ROW = Row("p", 0, (Write("mlp_output", 0, (0,), (), Scale(0.0)),))


def job(*keys: str) -> Job:
    stacks = {"stacks": ({"queries": (0,)},)}
    rows = (ROW, replace(ROW, writes=()), replace(ROW, writes=()))
    return Job({}, (Context("measure", ("p",), keys, stacks, 10.0, rows),))


def readout(*values: list[float]) -> Readout:
    return Readout([np.array(v, np.float32) for v in values], 2.5)


def begun(folder: Path, **identity: Any) -> Store:
    store = Store.create(folder, identity)
    store.save_record({"study": identity})
    return store


def test_create_writes_nothing(tmp_path: Path) -> None:
    store = Store.create(tmp_path / "a/b", {"model": "m"})
    assert list(tmp_path.iterdir()) == []
    assert store.record() == {}
    assert store.prepared() is None
    assert store.values() == {}
    assert store.failures() == {}
    assert store.submitted() == []


def test_the_same_study_goes_on_and_another_is_refused(tmp_path: Path) -> None:
    begun(tmp_path / "run", model="m", seed=0)
    assert Store.create(tmp_path / "run", {"model": "m", "seed": 0}).record()["study"] == {"model": "m", "seed": 0}
    with pytest.raises(
        StoreError, match=r"holds another study: its seed is 0, not 1; choose another folder with --out"
    ):
        Store.create(tmp_path / "run", {"model": "m", "seed": 1})
    with pytest.raises(StoreError, match="its seed is 0, not None"):
        Store.create(tmp_path / "run", {"model": "m"})
    with pytest.raises(StoreError, match="its extra is None, not 2"):
        Store.create(tmp_path / "run", {"model": "m", "seed": 0, "extra": 2})


def test_an_empty_folder_will_do(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    begun(tmp_path / "run", model="m")


def test_folders_in_use(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for folder in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(StoreError, match=r"is in use and is no run folder; choose another with --out"):
            Store.create(folder, {})
    with pytest.raises(StoreError, match=r"notes.txt is a file; choose another --out"):
        Store.create(tmp_path / "notes.txt" / "run", {})
    with pytest.raises(StoreError, match=r"cannot use .*File name too long; choose another --out"):
        Store.create(tmp_path / ("x" * 300), {})
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"epochs": 3}', "\xff"])
def test_a_run_json_of_something_else(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_bytes(content.encode("latin-1"))
    for use in (lambda: Store.create(tmp_path, {}), lambda: Store.open(tmp_path)):
        with pytest.raises(StoreError, match=r"run\.json.*choose another folder"):
            use()


def test_open_needs_a_run(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(StoreError, match=r"is no run folder \(it has no run.json\); give the folder of a finished"):
            Store.open(folder)
    begun(tmp_path / "run", model="m")
    assert Store.open(tmp_path / "run").record() == {"study": {"model": "m"}}


def test_prepared_pairs_round_trip(tmp_path: Path) -> None:
    store = begun(tmp_path / "run")
    prepared = Prepared((token_pair("a"), token_pair("b", answers=((1, 2), (3,)))), (Refusal("c", "why"),))
    store.save_prepared(prepared)
    assert store.prepared() == prepared


def test_values_are_found_by_key(tmp_path: Path) -> None:
    store = begun(tmp_path / "run")
    store.save_readout(job("k1", "k2"), readout([1.5, 2.5], [3.5]))
    store.save_readout(job("k3"), readout([4.5, 5.5, 6.5]))
    store.save_readout(job("k1", "k4"), readout([1.5, 2.5], [7.5]))
    values = store.values()
    assert {key: value.tolist() for key, value in values.items()} == {
        "k1": [1.5, 2.5],
        "k2": [3.5],
        "k3": [4.5, 5.5, 6.5],
        "k4": [7.5],
    }
    assert all(value.dtype == np.float32 for value in values.values())
    assert Store.open(tmp_path / "run").values().keys() == values.keys()


def test_many_readouts_become_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("remote_mediation.store.MERGED", 4)
    store, folder = begun(tmp_path / "run"), tmp_path / "run/readouts"
    for number in range(10):
        store.save_readout(job(f"a{number}", f"b{number}"), readout([number], [number, 0.5]))
        assert store.values().keys() == {f"{side}{n}" for n in range(number + 1) for side in "ab"}
    assert sorted(path.name.startswith("merged-") for path in folder.iterdir()) == [False, False, True, True]
    assert {key: value.tolist() for key, value in Store.open(store.folder).values().items()} == {
        key: value for n in range(10) for key, value in ((f"a{n}", [n]), (f"b{n}", [n, 0.5]))
    }
    assert all(state.whole for state in check_run(store.folder))
    again = Store.open(store.folder)  # of a process that goes on
    again.save_readout(job("c"), readout([7]))
    assert len(list(folder.iterdir())) == 5
    again.save_readout(job("d"), readout([8]))
    assert len(list(folder.iterdir())) == 3


def test_a_merge_that_is_stopped_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = begun(tmp_path / "run")
    for number in range(3):
        store.save_readout(job(f"a{number}"), readout([number]))
    known = {key: value.tolist() for key, value in store.values().items()}

    def stop(path: Path, missing_ok: bool = False) -> None:
        if path.suffix == ".npz":
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", stop)
        with pytest.raises(KeyboardInterrupt):
            store._merge()
    assert len(list((tmp_path / "run/readouts").iterdir())) == 4
    assert {key: value.tolist() for key, value in Store.open(store.folder).values().items()} == known
    store._merge()
    assert len(list((tmp_path / "run/readouts").iterdir())) == 1
    assert {key: value.tolist() for key, value in store.values().items()} == known


def test_a_damaged_readout_is_not_merged(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("remote_mediation.store.MERGED", 3)
    file.write_bytes(file.read_bytes()[:50])
    store = Store.open(file.parents[1])
    store.save_readout(job("k4"), readout([5.5]))
    assert {key: value.tolist() for key, value in store.values().items()} == {"k3": [4.5], "k4": [5.5]}
    assert len(list(file.parent.glob("*.npz"))) == 1
    assert file.with_name(f"{file.name}.bad").exists()


def test_tickets_are_kept_until_the_values_are_here(tmp_path: Path) -> None:
    store = begun(tmp_path / "run")
    first, second = job("k1", "k2", "k3"), job("k4", "k5")
    store.save_ticket("t1", first)
    store.save_ticket("t2", second)
    waiting = {entry.ticket: entry for entry in Store.open(tmp_path / "run").submitted()}
    assert waiting.keys() == {"t1", "t2"}
    assert waiting["t1"] == (first.id, "t1", ["k1", "k2", "k3"], 1, 10.0, [1, 1, 1], "measure")
    store.save_readout(waiting["t1"], readout([1.0], [2.0], [3.0]))
    assert [entry.ticket for entry in store.submitted()] == ["t2"]
    store.forget(second.id)
    store.forget(second.id)
    assert store.submitted() == []
    assert store.values().keys() == {"k1", "k2", "k3"}


def test_failures_add_up(tmp_path: Path) -> None:
    store = begun(tmp_path / "run")
    store.save_failure("a", "no memory")
    store.save_failure("b", "no luck")
    store.save_failure("a", "no memory again")
    assert Store.open(tmp_path / "run").failures() == {"a": "no memory again", "b": "no luck"}


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = begun(tmp_path / "run", model="m")
    before = (tmp_path / "run/run.json").read_bytes()

    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StoreError, match=r"cannot write .*run.json.copy: No space left on device; free some space"):
        store.save_record({"study": {}})
    with pytest.raises(StoreError, match="No space left on device"):
        store.save_readout(job("k"), readout([1.0]))
    with pytest.raises(StoreError, match="No space left on device"):
        Store.create(tmp_path / "new", {}).save_record({"study": {}})
    left = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*"))
    assert left == ["run", "run/.lock", "run/.run.json.copy", "run/run.json"], left
    Store.create(tmp_path / "new", {})  # can still be used
    assert (tmp_path / "run/run.json").read_bytes() == before


def test_unfinished_files_are_not_read(tmp_path: Path) -> None:
    store = begun(tmp_path / "run")
    store.save_readout(job("k"), readout([1.0]))
    (tmp_path / "run/readouts/.other.npz.partial").write_bytes(b"half")
    assert store.values().keys() == {"k"}


@pytest.mark.skipif(os.name == "nt", reason="has no such modes")
def test_what_holds_prompts_or_answers_is_for_its_owner_alone(tmp_path: Path) -> None:
    before = os.umask(0o002)
    try:
        store = begun(tmp_path / "run")
        (tmp_path / "run/.pairs.jsonl.partial").touch(0o666)  # left behind by a version that let everyone read
        store.save_prepared(Prepared((token_pair("a"),), ()))
        store.save_ticket("ticket", job("k"))
        store.save_readout(job("k2"), readout([1.0]))
        store.save_failure("b", "why")
        store.save_note("matching", ["a prompt"])
        store.write("report.md", "text", private=True)
        store.write("effects.csv", "te\n")
        modes = {path.relative_to(store.folder).as_posix(): path.stat().st_mode & 0o777 for path in files(store)}
    finally:
        os.umask(before)
    assert {name for name, mode in modes.items() if mode == 0o664} == {"run.json", ".run.json.copy", "effects.csv"}
    private = {"pairs.jsonl", f"submitted/{job('k').id}.json", f"readouts/{job('k2').id}.npz", "failures.json"}
    private |= {"notes/matching.json", "report.md", ".lock"}
    assert {name for name, mode in modes.items() if mode == 0o600} == private
    store.write("report.md", "no text")
    assert (tmp_path / "run/report.md").stat().st_mode & 0o077


@pytest.mark.skipif(os.name == "nt", reason="has no such modes")
@pytest.mark.parametrize("begin", [Store.open, lambda folder: Store.create(folder, {"model": "m", "seed": 0})])
def test_what_an_older_version_let_others_read_is_hidden_on_opening(full: Path, begin: Any) -> None:
    old = {path for path in full.rglob("*") if path.is_file()}
    (full / "effects.csv").touch()
    (full / "report.md").touch()
    for path in (*old, full / "effects.csv", full / "report.md"):
        path.chmod(0o644)
    begin(full)
    shared = {path.name for path in full.rglob("*") if path.is_file() and path.stat().st_mode & 0o077}
    assert shared == {"run.json", ".run.json.copy", "effects.csv", "report.md", ".lock"}
    assert len(old) == 9


@pytest.mark.skipif(os.name == "nt", reason="has no such modes")
def test_a_mode_that_cannot_be_mended_is_named(
    full: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def denied(path: Path, mode: int) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    (full / "pairs.jsonl").chmod(0o644)
    monkeypatch.setattr(Path, "chmod", denied)
    Store.open(full)
    (record,) = caplog.records
    assert record.getMessage() == (
        f"{full / 'pairs.jsonl'} can be read by others, and not be changed: Operation not permitted"
    )


def files(store: Store) -> list[Path]:
    return [path for path in store.folder.rglob("*") if path.is_file()]


def test_the_record_is_readable_json(tmp_path: Path) -> None:
    store = Store.create(tmp_path / "run", {})
    store.save_record({"study": {"b": 1, "a": INFO.name}, "outcome": LOGITS.plus})
    text = (tmp_path / "run/run.json").read_text("utf-8")
    found = json.loads(text)
    assert {name: found[name] for name in ("study", "outcome")} == {"study": {"b": 1, "a": "tiny"}, "outcome": [5, 6]}
    assert text.endswith("}\n")
    assert text.index('"a"') < text.index('"b"')


# --- one process per folder -------------------------------------------------------------------------------------------

HOLDER = """
import sys
from pathlib import Path
from remote_mediation.store import Store
store = Store.create(Path(sys.argv[1]), {"model": "m"})
store.save_record({"study": {"model": "m"}})
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that measures into `run`."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_process_is_told_who_measures(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    store = Store.create(tmp_path / "run", {"model": "m"})
    assert (store.record(), store.values(), store.failures()) == ({"study": {"model": "m"}}, {}, {})
    store.write("report.md", "so far")  # a report needs no lock
    who = rf"run is being measured by process {holder.pid} on {re.escape(os.uname().nodename)} since 20\d\d-.*; wait"
    for use in (
        lambda: store.save_record({"study": {}}),
        lambda: store.save_ticket("t", job("k")),
        lambda: store.save_readout(job("k"), readout([1.0])),
        lambda: store.save_failure("p", "why"),
        lambda: store.save_note("n", 1),
        lambda: store.save_prepared(Prepared((), ())),
    ):
        with pytest.raises(StoreError, match=who):
            use()
    assert {path.name for path in (tmp_path / "run").iterdir()} == {".lock", ".run.json.copy", "run.json", "report.md"}


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_a_process_that_ended_holds_nothing(tmp_path: Path, holder: subprocess.Popen[str], end: int) -> None:
    holder.send_signal(end)
    holder.wait(10)
    Store.create(tmp_path / "run", {"model": "m"}).save_failure("p", "why")


def test_a_folder_is_free_once_its_store_is_gone(tmp_path: Path) -> None:
    store = begun(tmp_path / "run", model="m")
    begun(tmp_path / "run", model="m")  # the same process may
    use = "Store.open(Path(sys.argv[1])).save_failure('p', 'why')"
    command = [
        sys.executable,
        "-c",
        f"import sys; from pathlib import Path; from remote_mediation.store import *; {use}",
    ]
    refused = subprocess.run([*command, str(tmp_path / "run")], capture_output=True, text=True, check=False)
    assert f"is being measured by process {os.getpid()} on" in refused.stderr
    del store
    subprocess.run([*command, str(tmp_path / "run")], check=True)


def test_where_there_are_no_locks_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def none(file: int, kind: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", none)
    store = begun(tmp_path / "run", model="m")
    store.save_failure("p", "why")
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / 'run'} cannot be locked ([Errno 37] No locks available): let no other process measure into it"
    ]


# --- readouts are doubted ---------------------------------------------------------------------------------------------


def damaged(path: Path, caplog: pytest.LogCaptureFixture) -> Store:
    """A folder of which this readout must be found to be damaged and the other must not."""
    store = Store.open(path.parents[1])
    assert store.values().keys() == {"k3"}
    assert caplog.records[0].getMessage().startswith(f"{path} is damaged (")
    assert (path.exists(), path.with_name(f"{path.name}.bad").exists()) == (False, True)
    caplog.clear()
    assert store.values().keys() == {"k3"}
    assert not caplog.records
    return store


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A readout of two, in which values of two keys are."""
    store = begun(tmp_path / "run")
    store.save_readout(job("k1", "k2"), readout([1.5, 2.5], [3.5]))
    store.save_readout(job("k3"), readout([4.5]))
    return tmp_path / f"run/readouts/{job('k1', 'k2').id}.npz"


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04", b"\x93NUMPY", b"\x80\x04N.", b"0" * 5000])
def test_garbage_is_set_aside_and_measured_anew(file: Path, caplog: pytest.LogCaptureFixture, content: bytes) -> None:
    file.write_bytes(content)
    store = damaged(file, caplog)
    store.save_readout(job("k1", "k2"), readout([1.5, 2.5], [3.5]))
    assert store.values().keys() == {"k1", "k2", "k3"}


def test_a_cut_readout_is_set_aside(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = file.read_bytes()
    for length in range(0, len(whole), 37):
        file.write_bytes(whole[:length])
        damaged(file, caplog)


def test_no_flipped_bit_changes_a_value(file: Path) -> None:
    whole, before = file.read_bytes(), Store.open(file.parents[1]).values()
    for place in range(0, len(whole), 5):
        changed = bytearray(whole)
        changed[place] ^= 0x40
        file.write_bytes(changed)
        for key, value in Store.open(file.parents[1]).values().items():
            np.testing.assert_array_equal(value, before[key], err_msg=f"byte {place}")


@pytest.mark.parametrize("change", ["values", "lengths", "keys"])
def test_an_edited_readout_is_set_aside(file: Path, caplog: pytest.LogCaptureFixture, change: str) -> None:
    with np.load(file) as data:
        content = dict(data)
    edited = {"values": content["values"] * 2, "lengths": content["lengths"][::-1], "keys": content["keys"][::-1]}
    np.savez(file, **{**content, change: edited[change]})
    damaged(file, caplog)


def test_a_readout_of_an_older_version_is_read(file: Path) -> None:
    store = Store.open(file.parents[1])
    for name in ("run.json", ".run.json.copy"):
        (store.folder / name).write_text('{"study": {}}')
    before = store.values()
    with np.load(file) as data:
        content = {name: data[name] for name in data.files if name != "checksum"}
    np.savez(file, **content)
    after = store.values()
    assert {key: value.tolist() for key, value in after.items()} == {k: v.tolist() for k, v in before.items()}


def test_a_readout_is_never_unpickled(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    with np.load(file) as data:
        content = {**data, "keys": data["keys"].astype(object)}
    np.savez(file, **content)
    damaged(file, caplog)


# --- and so are all other files ---------------------------------------------------------------------------------------

SPOILS = {
    "empty": lambda whole: b"",
    "blank": lambda whole: b" \n",
    "cut": lambda whole: whole[: len(whole) // 2],
    "garbage": lambda whole: b"\x80\x04N.",
    "no UTF-8": lambda whole: whole[:9] + b"\xff" + whole[9:],
    "null": lambda whole: b"null",
    "list": lambda whole: b"[1]",
    "number": lambda whole: b"3",
    "deep": lambda whole: b"[" * 100_000,
    "another program's": lambda whole: b'{"epochs": 3}',
}
spoilt = pytest.mark.parametrize("spoil", SPOILS.values(), ids=SPOILS)


SEALS = ("digest", "digests", "form")


def flips(whole: bytes) -> Iterator[bytes]:
    """A file with one bit flipped, in turn all over it."""
    for place in range(0, len(whole), max(1, len(whole) // 60)):
        changed = bytearray(whole)
        changed[place] ^= 0x04
        yield bytes(changed)


@pytest.fixture
def full(tmp_path: Path) -> Path:
    """A run folder with a file of every kind."""
    store = begun(tmp_path / "run", model="m", seed=0)
    store.save_record({**store.record(), "config": {"seed": 0}, "seconds": 1.5})
    store.save_prepared(Prepared((token_pair("a"), token_pair("b")), (Refusal("c", "why"),)))
    store.save_prepared(Prepared((token_pair("a~placebo"),), ()), "placebos")
    store.save_ticket("t1", job("k1", "k2", "k3"))
    store.save_readout(job("k4", "k5"), readout([1.0], [2.0]))
    store.save_failure("a", "no memory")
    store.save_note("openings", [[1, 2], [3.5]])
    return tmp_path / "run"


@spoilt
def test_a_spoilt_record_is_refused_where_it_has_no_copy(full: Path, spoil: Any) -> None:
    path = full / "run.json"
    for name in ("run.json", ".run.json.copy"):
        (full / name).write_bytes(spoil(path.read_bytes()))
    for use in (lambda: Store.open(full), lambda: Store.create(full, {"model": "m", "seed": 0})):
        with pytest.raises(StoreError, match=r"run\.json.*choose another folder$"):
            use()


@spoilt
def test_the_copy_stands_in_for_a_spoilt_record(full: Path, caplog: pytest.LogCaptureFixture, spoil: Any) -> None:
    path, known = full / "run.json", Store.open(full).record()
    before = path.read_bytes()
    path.write_bytes(spoil(before))
    assert [state.name for state in check_run(full) if not state.whole] == ["run.json"]
    store = Store.create(full, {"model": "m", "seed": 0})
    assert (store.record(), Store.open(full).prepared()) == (known, Store.open(full).prepared())
    assert f"{path} cannot be used (" in caplog.text
    with pytest.raises(StoreError, match="its seed is 0, not 1"):
        Store.create(full, {"model": "m", "seed": 1})
    store.save_record(store.record())
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[(name, value) for name in ("seconds", "memory", "values") for value in ("x", [], float("nan"), True)],
        *[(name, value) for name in ("model", "files", "served", "prompts", "study") for value in (None, "x", [], 5)],
        *[
            ("git", "x"),
            ("git", 5),
            ("continued", []),
            ("seconds", None),
            ("digests", []),
            ("digests", {"pairs.jsonl": "x"}),
            ("form", "2"),
            ("form", -1),
            ("form", 3),
        ],
    ],
)
def test_what_no_run_writes_is_refused_though_its_digest_is_right(full: Path, name: str, value: Any) -> None:
    for file in ("run.json", ".run.json.copy"):
        record = json.loads((full / file).read_text("utf-8")) | {name: value}
        del record["digest"]
        (full / file).write_text(json.dumps({**record, "digest": _digest_of(record)}), "utf-8")
    with pytest.raises(StoreError, match=rf"^cannot use .*run\.json: its {name} (is|are) .*; put it back as it was"):
        Store.open(full)


def test_the_copy_stands_in_for_a_record_that_is_gone(full: Path) -> None:
    known = Store.open(full).record()
    (full / "run.json").unlink()
    assert [state.detail for state in check_run(full) if not state.whole] == [
        "gone; its copy is used, and the next run writes it anew"
    ]
    assert Store.open(full).record() == Store.create(full, {"model": "m", "seed": 0}).record() == known


def test_a_record_that_was_killed_before_its_file_is_gone_on_from(tmp_path: Path, monkeypatch: Any) -> None:
    store = Store.create(tmp_path / "run", {"model": "m"})
    write = store.write

    def killed(name: str, *content: Any, **how: Any) -> None:
        if name == "run.json":
            raise KeyboardInterrupt
        write(name, *content, **how)

    monkeypatch.setattr(store, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        store.save_record({"study": {"model": "m"}})
    assert Store.create(tmp_path / "run", {"model": "m"}).record() == {"study": {"model": "m"}}
    with pytest.raises(StoreError, match="holds another study"):
        Store.create(tmp_path / "run", {"model": "other"})


def test_no_flipped_bit_and_no_edit_of_a_record_passes(full: Path) -> None:
    (full / ".run.json.copy").unlink()
    path = full / "run.json"
    whole, known = path.read_bytes(), Store.open(full).record()
    unsealed = {name: value for name, value in json.loads(whole).items() if name not in ("digest", "digests")}
    edits = [whole.replace(b'"seed": 0', b'"seed": 1'), whole.replace(b'"digest"', b'"other"')]
    for changed in [*flips(whole), *edits, json.dumps(unsealed).encode()]:
        path.write_bytes(changed)
        with pytest.raises(StoreError, match=r"choose another folder$"):
            Store.open(full)
    path.write_bytes(json.dumps(json.loads(whole)).encode())  # laid out otherwise
    assert Store.open(full).record() == known


@pytest.mark.parametrize("config", [None, {}, {"model": "m", "colour": 1}, {"model": "m", "seed": "x"}, [], "text"])
def test_settings_of_another_version_are_refused_in_one_line(full: Path, config: Any) -> None:
    store = Store.open(full)
    store.save_record({**store.record(), "config": config} if config is not None else {"study": {"model": "m"}})
    other = shutil.copytree(full, full.with_name("other"))
    commands = [["report", full], ["show", full], ["extend", full, "layers"], ["export", full, full / "to"]]
    commands += [["view", full], ["compare", full, other]]
    (full / "effects.csv").write_text("unit\nlogits\n")
    for command in commands:
        found = CliRunner().invoke(app, [str(word) for word in command])
        assert isinstance(found.exception, StoreError), command
        assert re.search(r"holds a run of another version, .*; use that version, or run the", str(found.exception))
        assert "\n" not in str(found.exception)


@spoilt
@pytest.mark.parametrize("name", ["pairs", "placebos"])
def test_spoilt_pairs_are_refused(full: Path, name: str, spoil: Any) -> None:
    path = full / f"{name}.jsonl"
    whole, known = path.read_bytes(), Store.open(full).prepared(name)
    path.write_bytes(spoil(whole))
    with pytest.raises(StoreError, match=rf"{name}.jsonl is not as this run wrote it .*; put it back, or delete it"):
        Store.open(full).prepared(name)
    path.unlink()
    assert Store.open(full).prepared(name) is None
    assert Store.open(full).missing() == [path.name]
    path.write_bytes(whole)
    assert Store.open(full).prepared(name) == known


def test_no_edit_of_pairs_passes(full: Path) -> None:
    path = full / "pairs.jsonl"
    whole = path.read_bytes()
    for changed in [*flips(whole), whole + whole, b"".join(whole.splitlines(True)[1:])]:
        path.write_bytes(changed)
        with pytest.raises(StoreError, match="is not as this run wrote it"):
            Store.open(full).prepared()


@pytest.mark.parametrize(
    "edit",
    [
        *({"first": wrong} for wrong in (None, "2", 2.0, True, [], -1, 4)),
        *({"post": wrong} for wrong in (None, -1, 3)),
        *({"x0": wrong} for wrong in (None, 3, "abcde", [1.5, 2, 3, 4, 5], [[1], [2], [3], [4], [5]], [])),
        *({"answers": wrong} for wrong in (None, [[1]], [1, 2], [["a"], []])),
        *({"openings": wrong} for wrong in (None, [1], [[[1]]])),
        *({"notes": wrong} for wrong in (None, [["a"]], [["a", 1]])),
        *({name: wrong} for name in ("id", "cluster", "category") for wrong in (None, 3, ["a"])),
        *({"reason": wrong} for wrong in (None, 3)),
        {"aligned": "no"},
    ],
    ids=str,
)
def test_pairs_of_another_kind_are_damaged(edit: dict[str, Any]) -> None:
    whole = pairs_text(Prepared((token_pair("a"),), (Refusal("c", "why"),)))
    pair, refusal = map(json.loads, whole.splitlines())
    edited = [pair, {**refusal, **edit}] if "reason" in edit else [{**pair, **edit}, refusal]
    assert read_pairs(whole.encode(), ())
    with pytest.raises(DamagedError, match=r"^a line of it is no pair \([^\n]+\)$"):
        read_pairs("".join(json.dumps(one) + "\n" for one in edited).encode(), ())


@pytest.mark.parametrize("name", ["pairs", "placebos"])
@pytest.mark.parametrize("token", [INFO.vocab, 10**9, -1])
@pytest.mark.parametrize("place", ["x0", "answers", "openings"])
def test_tokens_that_the_model_does_not_have_are_refused(full: Path, name: str, place: str, token: int) -> None:
    """Whoever edits pairs may mend their digest, too: such a token ended in a traceback where it was embedded."""
    pair = token_pair("a")
    within = {"x0": (token, *pair.x0[1:]), "answers": ((1, token), (2,)), "openings": ((1,), (2, token))}[place]
    store = Store.open(full)
    store.save_record({**store.record(), "model": asdict(INFO)})
    store.save_prepared(Prepared((replace(pair, **{place: within}), token_pair("b")), ()), name)
    with pytest.raises(StoreError, match=rf"'a' has the token {token}, and the model has {INFO.vocab}"):
        Store.open(full).prepared(name)
    assert [state.name for state in check_run(full) if not state.whole] == [f"{name}.jsonl"]


@pytest.mark.parametrize(
    "prepared",
    [Prepared((token_pair("a"), token_pair("a")), ()), Prepared((token_pair("a"),), (Refusal("a", "why"),))],
    ids=["two pairs", "a pair and a refusal"],
)
def test_an_id_that_stands_twice_in_pairs_is_refused(full: Path, prepared: Prepared) -> None:
    """It counted twice in every mean."""
    Store.open(full).save_prepared(prepared)
    with pytest.raises(StoreError, match="'a' stands in it twice"):
        Store.open(full).prepared()


def test_pairs_of_a_run_that_was_killed_between_two_files_are_read(full: Path) -> None:
    store, before = Store.open(full), (full / "pairs.jsonl").read_bytes()
    later = Prepared((token_pair("a", answers=((1,), (2,))), token_pair("b")), ())
    store.save_prepared(later)
    assert store.prepared() == later
    (full / "pairs.jsonl").write_bytes(before)  # `run.json` was written, and these were not
    assert Store.open(full).prepared() == Prepared((token_pair("a"), token_pair("b")), (Refusal("c", "why"),))


@spoilt
def test_a_folder_of_an_older_version_is_read_and_its_pairs_are_doubted(full: Path, spoil: Any) -> None:
    record = json.loads((full / "run.json").read_text("utf-8"))
    (full / "run.json").write_text(json.dumps({k: v for k, v in record.items() if k not in SEALS}))
    (full / ".run.json.copy").unlink()
    (full / "notes/openings.json").write_text("[[1, 2], [3.5]]")
    store = Store.create(full, {"model": "m", "seed": 0})
    assert store.note("openings", ANY) == [[1, 2], [3.5]]
    prepared = store.prepared()
    assert prepared
    store.save_prepared(prepared)
    assert Store.open(full).bound().keys() == {"pairs.jsonl"}
    path = full / "placebos.jsonl"
    path.write_bytes(spoil(path.read_bytes()))
    if path.read_bytes().strip():
        with pytest.raises(StoreError, match=r"placebos.jsonl is not as this run wrote it"):
            store.prepared("placebos")


@spoilt
def test_a_spoilt_ticket_is_set_aside(full: Path, caplog: pytest.LogCaptureFixture, spoil: Any) -> None:
    path = full / f"submitted/{job('k1', 'k2', 'k3').id}.json"
    path.write_bytes(spoil(path.read_bytes()))
    assert Store.open(full).submitted() == []
    assert path.with_name(f"{path.name}.bad").exists()
    assert "to be made anew" in caplog.text


@pytest.mark.parametrize(
    "edit",
    [
        {"keys": ["k1"]},
        {"keys": ["k1", "k2", "k4"]},
        {"keys": 3},
        {"ticket": 3},
        {"rows": "x"},
        {"lengths": ["1"]},
        {"lengths": None},
        {"lengths": 3},
        {"task": 3},
        {"x": 1},
    ],
    ids=str,
)
def test_an_edited_ticket_is_set_aside(full: Path, edit: dict[str, Any]) -> None:
    path = full / f"submitted/{job('k1', 'k2', 'k3').id}.json"
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **edit}))
    assert Store.open(full).submitted() == []


@spoilt
def test_spoilt_failures_are_set_aside(full: Path, spoil: Any) -> None:
    path = full / "failures.json"
    path.write_bytes(spoil(path.read_bytes()))
    store = Store.open(full)
    assert store.failures() == {}
    store.save_failure("b", "why")
    assert store.failures() == {"b": "why"}


@pytest.mark.parametrize("name", ["empty", "blank", "cut", "garbage", "no UTF-8", "deep"])
def test_a_spoilt_note_is_set_aside(full: Path, name: str) -> None:
    path = full / "notes/openings.json"
    path.write_bytes(SPOILS[name](path.read_bytes()))
    assert Store.open(full).note("openings", ANY) is None
    assert path.with_name(f"{path.name}.bad").exists()


@pytest.mark.parametrize("kind", [list[int], list[list[int]], dict[str, int], str, list[list[bool]]], ids=str)
def test_a_note_of_another_kind_is_set_aside(full: Path, caplog: pytest.LogCaptureFixture, kind: Any) -> None:
    store, path = Store.open(full), full / "notes/openings.json"
    assert store.note("openings", TypeAdapter(list[list[float]])) == [[1, 2], [3.5]]
    assert store.note("openings", TypeAdapter(kind)) is None
    (line,) = caplog.messages
    assert line.startswith(f"{path} is damaged (it holds something else (")
    assert "\n" not in line
    assert not path.exists()


def test_no_flipped_bit_changes_a_note(full: Path) -> None:
    path = full / "notes/openings.json"
    whole = path.read_bytes()
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 0x01
        path.write_bytes(changed)
        found = Store.open(full).note("openings", ANY)
        # A name that is no longer "note" or "checksum" makes it a note of an older version, of another form.
        assert found in (None, [[1, 2], [3.5]]) or set(found) != {"note", "checksum"}


@pytest.mark.parametrize("kind", ["pairs.jsonl", "readouts", "notes", "submitted", "failures.json"])
def test_a_file_that_may_not_be_read_is_named(full: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: Path) -> bytes:
        if kind in path.as_posix():
            raise PermissionError(errno.EACCES, "Permission denied")
        return read(path)

    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", denied)
    store = Store.open(full)
    reads = {"pairs.jsonl": store.prepared, "readouts": store.values, "submitted": store.submitted}
    reads |= {"notes": lambda: store.note("openings", ANY), "failures.json": store.failures}
    with pytest.raises(StoreError, match=rf"{kind}.*Permission denied"):
        reads[kind]()
    assert not list(full.rglob("*.bad"))


# --- what is whole --------------------------------------------------------------------------------------------------


def test_a_whole_run(full: Path) -> None:
    states = check_run(full)
    assert all(state.whole for state in states)
    assert {state.name.split("/")[0] for state in states} == {
        *("run.json", "pairs.jsonl", "placebos.jsonl", "failures.json"),
        *("submitted", "readouts", "notes"),
    }
    found = CliRunner().invoke(app, ["check-run", str(full)])
    assert (found.exit_code, found.output) == (0, "7 of 7 files are whole\n")


@pytest.mark.parametrize("name", ["pairs.jsonl", "failures.json", "submitted", "readouts", "notes"])
def test_a_run_that_is_not_whole(full: Path, name: str) -> None:
    path = full / name if "." in name else next((full / name).iterdir())
    path.write_bytes(path.read_bytes()[:20])
    before = {path: path.read_bytes() for path in full.rglob("*.*")}
    (bad,) = [state for state in check_run(full) if not state.whole]
    assert bad.name == path.relative_to(full).as_posix()
    found = CliRunner().invoke(app, ["check-run", str(full)])
    assert found.exit_code == 1
    assert f"FAIL {bad.name}: " in found.output
    assert "6 of 7 files are whole" in found.output
    assert before == {path: path.read_bytes() for path in full.rglob("*.*")}


def test_files_that_are_gone_or_set_aside(full: Path) -> None:
    (full / "placebos.jsonl").unlink()
    (full / "notes/openings.json").write_bytes(b"")
    Store.open(full).note("openings", ANY)
    told = {state.name: state for state in check_run(full)}
    assert not told["placebos.jsonl"].whole
    assert told["placebos.jsonl"].detail == "gone; run the study again, which makes it anew"
    assert told["notes/openings.json.bad"].detail == "damaged, set aside and no longer used"


# --- what stands in the place of a file, and folders that are not where they were ------------------------------------

PLACES = ["pairs.jsonl", "failures.json", "submitted", "readouts", "notes"]


def in_the_place_of(full: Path, name: str) -> Path:
    return full / name if "." in name else next((full / name).glob("*"))


@pytest.mark.skipif(os.name == "nt", reason="has no pipes")
@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo], ids=["folder", "pipe"])
@pytest.mark.parametrize("name", PLACES)
def test_what_is_no_file_is_damaged(full: Path, name: str, make: Any) -> None:
    path = in_the_place_of(full, name)
    path.unlink()
    make(path)
    (bad,) = [state for state in check_run(full) if not state.whole]
    assert "it is no file" in bad.detail
    store = Store.open(full)
    if name == "pairs.jsonl":
        with pytest.raises(StoreError, match=r"it is no file\); put it back, or delete it"):
            store.prepared()
        return
    reads = (store.failures(), store.submitted(), store.values(), store.note("openings", ANY))
    assert not reads[PLACES.index(name) - 1]
    assert not path.exists()
    assert path.with_name(f"{path.name}.bad").exists()


@pytest.mark.skipif(os.name == "nt", reason="has no such links")
@pytest.mark.parametrize("name", PLACES)
def test_links_that_lead_nowhere_are_files_that_are_not_there(full: Path, name: str) -> None:
    path = in_the_place_of(full, name)
    path.unlink()
    path.symlink_to(full / "nowhere")
    store = Store.open(full)
    reads = (store.prepared(), store.failures(), store.submitted(), store.values(), store.note("openings", ANY))
    assert not reads[PLACES.index(name)]


def test_a_note_without_its_checksum_is_made_anew(full: Path, caplog: pytest.LogCaptureFixture) -> None:
    (full / "notes/openings.json").write_text("[[1], [2]]")
    assert Store.open(full).note("openings", ANY) is None
    assert "it has no checksum" in caplog.text


def test_a_readout_without_its_checksum_is_measured_anew(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    with np.load(file) as data:
        content = {name: data[name] for name in data.files if name != "checksum"}
    np.savez(file, **{**content, "values": content["values"] * 2})
    damaged(file, caplog)


@pytest.mark.parametrize("change", ["moved", "deleted", "replaced", "lock taken out"])
def test_a_run_whose_folder_is_no_longer_there_ends(full: Path, change: str) -> None:
    """Not in a second folder of the same name that has the rest of its values."""
    store = Store.open(full)
    store.save_readout(job("k6"), readout([1.0]))
    elsewhere = full.with_name("elsewhere")
    {"moved": full.rename, "replaced": full.rename, "deleted": lambda to: shutil.move(full, to)}.get(
        change, (full / ".lock").rename
    )(elsewhere)
    if change == "replaced":
        begun(full, model="m", seed=0)
    before = {path: path.read_bytes() for path in full.parent.rglob("*") if path.is_file()}
    for use in (
        lambda: store.save_readout(job("k7"), readout([1.0])),
        lambda: store.save_record(store.record()),
        lambda: store.save_note("more", 1),
    ):
        with pytest.raises(StoreError, match=r"run is no longer what this run measures into: .* give the same command"):
            use()
    assert before == {path: path.read_bytes() for path in full.parent.rglob("*") if path.is_file()}
    if change in ("moved", "deleted"):
        store = None  # as if its process had ended
        Store.open(elsewhere).save_readout(job("k7"), readout([1.0]))
        assert Store.open(elsewhere).values().keys() == {"k4", "k5", "k6", "k7"}
        begun(full, model="m", seed=0).save_readout(job("k8"), readout([1.0]))


def test_where_there_are_no_locks_the_first_of_two_processes_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(file: int, kind: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", none)
    first = begun(tmp_path / "run", model="m")
    monkeypatch.setattr("os.getpid", lambda: 1)  # as another process is
    Store.open(tmp_path / "run").save_failure("p", "why")
    with pytest.raises(StoreError, match="or taken by another process"):
        first.save_readout(job("k"), readout([1.0]))


@pytest.mark.skipif(os.name == "nt", reason="has no such links")
def test_a_lock_that_leads_to_another_file_empties_nothing(tmp_path: Path) -> None:
    (tmp_path / "letter").write_text("dear")
    begun(tmp_path / "run", model="m")
    (tmp_path / "run/.lock").unlink()
    (tmp_path / "run/.lock").symlink_to(tmp_path / "letter")
    with pytest.raises(StoreError, match=r"cannot write .*run: Too many levels of symbolic links"):
        Store.open(tmp_path / "run").save_failure("p", "why")
    assert (tmp_path / "letter").read_text() == "dear"
