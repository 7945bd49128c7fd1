"""Files are known by all of their bytes; hashes of large ones are remembered, and not believed where a file changed."""

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from fakes import write_pairs
from oracle import Subject
from test_whole_models import change, copy, study_of

from remote_mediation import digests
from remote_mediation.contents import as_begun, unchanged_files
from remote_mediation.digests import content, sampled
from remote_mediation.errors import StoreError
from remote_mediation.models import fingerprint, load_info

Subjects = Callable[[str], Subject]


def expected(path: Path) -> str:
    """As the fingerprints of stored runs have it."""
    whole = path.read_bytes()
    return hashlib.blake2b(str(len(whole)).encode() + whole, digest_size=16).hexdigest()


@pytest.fixture
def remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[Path]]:
    """The notes of what is remembered, of a file that counts as large and was written long ago."""
    monkeypatch.setenv("REMOTE_MEDIATION_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(digests, "_LARGE", 1000)
    monkeypatch.setattr(digests, "_TICK", 0)
    digests._content.cache_clear()
    return lambda: sorted((tmp_path / "cache/remote_mediation/digests").glob("*"))


def again(path: Path) -> str:
    """What another process would find."""
    digests._content.cache_clear()
    return content(path)


def test_the_hash_of_a_file_is_that_of_all_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for size in (0, 1, 2**20, 2**20 + 1):
        path.write_bytes(os.urandom(size))
        assert content(path) == sampled(path) == expected(path)


def test_the_hash_of_a_large_file_is_remembered(tmp_path: Path, remembered: Callable[[], list[Path]]) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(2000))
    time.sleep(0.01)
    assert content(path) == expected(path)
    (note,) = remembered()
    note.write_text("0" * 32, "ascii")  # is read
    assert again(path) == "0" * 32
    (tmp_path / "link").symlink_to(path)
    assert content(tmp_path / "link") == "0" * 32


def test_what_is_remembered_of_a_file_that_changed_is_not_believed(
    tmp_path: Path, remembered: Callable[[], list[Path]]
) -> None:
    """In place, of the same size, with its time put back."""
    path = tmp_path / "file"
    path.write_bytes(os.urandom(2000))
    time.sleep(0.01)
    before, fact = content(path), path.stat()
    with path.open("r+b") as opened:
        opened.seek(1000)
        opened.write(b"new")
    os.utime(path, ns=(fact.st_atime_ns, fact.st_mtime_ns))
    assert path.stat().st_mtime_ns == fact.st_mtime_ns
    assert content(path) == again(path) == expected(path) != before


def test_what_has_only_just_been_written_is_not_remembered(
    tmp_path: Path, remembered: Callable[[], list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another change might have the same time."""
    monkeypatch.setattr(digests, "_TICK", 10**12)
    path = tmp_path / "file"
    path.write_bytes(os.urandom(2000))
    assert content(path) == expected(path)
    assert remembered() == []


@pytest.mark.parametrize("damage", [b"", b"\0" * 32, b"\xff" * 32, b"0" * 31, b"0" * 33, b"0" * 32 + b"\n"])
def test_damaged_notes_are_passed_over(tmp_path: Path, remembered: Callable[[], list[Path]], damage: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(2000))
    time.sleep(0.01)
    assert content(path) == expected(path)
    (note,) = remembered()
    note.write_bytes(damage)
    assert again(path) == expected(path)
    assert note.read_text("ascii") == expected(path)


def test_a_cache_that_cannot_be_written_changes_nothing(tmp_path: Path, remembered: Callable[[], list[Path]]) -> None:
    (tmp_path / "cache").write_text("a file where the folder would be")
    path = tmp_path / "file"
    path.write_bytes(os.urandom(2000))
    time.sleep(0.01)
    assert content(path) == again(path) == expected(path)


@pytest.fixture
def sparse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that older versions would have taken samples of."""
    monkeypatch.setattr(digests, "_WHOLE", 10**6)
    monkeypatch.setattr(digests, "_SAMPLES", 2)
    monkeypatch.setattr(digests, "_BLOCK", 100)
    path = tmp_path / "model/more.safetensors"
    path.parent.mkdir()
    path.write_bytes(bytes(10**6 + 1))
    return path


def edit(path: Path, place: int) -> None:
    with path.open("r+b") as opened:
        opened.seek(place)
        opened.write(b"new")


def test_an_edit_between_the_samples_of_older_versions_is_seen(sparse: Path) -> None:
    before = sampled(sparse), fingerprint(str(sparse.parent))
    edit(sparse, 5 * 10**5)
    assert sampled(sparse) == before[0]
    assert fingerprint(str(sparse.parent)) != before[1]


def test_a_run_known_by_samples_goes_on_and_says_so(
    subject: Subjects, sparse: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Once: what is noted then is known by all of its bytes."""
    folder = copy(subject("llama"), sparse.parent)
    begun = {"model": {"weights": fingerprint(str(folder), sampled)}}
    begun["content"] = begun["model"]["weights"]
    info = load_info(str(folder))
    assert info.weights != begun["content"]
    assert as_begun(info, begun, sparse).weights == begun["content"]
    (record,) = caplog.records
    assert "begun by a version that looked at samples of files of more than 2 GB" in record.getMessage()
    assert as_begun(info, {**begun, "content": info.weights}, sparse).weights == begun["content"]
    assert len(caplog.records) == 1
    edit(sparse, 5 * 10**5)
    with pytest.raises(StoreError, match="holds a run on other files"):
        as_begun(load_info(str(folder)), {**begun, "content": info.weights}, sparse)
    edit(sparse, 0)
    with pytest.raises(StoreError, match="holds a run on other files"):
        as_begun(load_info(str(folder)), begun, sparse)


def test_a_checkpoint_known_by_samples_goes_on_and_says_so(
    tmp_path: Path, sparse: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name = str(sparse.parent)
    pairs = write_pairs(tmp_path / "pairs.jsonl", [])
    config = study_of(tmp_path, pairs, analyses=["attacks"], attacks={"checkpoints": [name]})
    known = {f"attacks.checkpoints {name!r}": fingerprint(name, sampled)}
    files = unchanged_files(config, {"files": known}, tmp_path)
    assert files == {f"attacks.checkpoints {name!r}": fingerprint(name)} != known
    assert "samples of files of more than 2 GB" in caplog.text
    edit(sparse, 0)
    for before in (known, files):
        with pytest.raises(StoreError, match="its content has changed since"):
            unchanged_files(config, {"files": before}, tmp_path)


@pytest.mark.slow
def test_a_changed_byte_in_two_gigabytes_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with path.open("wb") as opened:
        opened.truncate(2 * 10**9 + 2**20)
    before = sampled(path), content(path)
    edit(path, 10**9)
    assert sampled(path) == before[0]
    assert content(path) != before[1]


def test_chat_judges_are_known_by_content(subject: Subjects, tmp_path: Path) -> None:
    folder = copy(subject("llama_chat"), tmp_path / "judge")
    config = study_of(tmp_path, tmp_path, analyses=["verify"], verify={"judge": f"model:{folder}"})
    files = unchanged_files(config, {}, tmp_path)
    change(folder, lambda tensors: tensors["model.norm.weight"].mul_(2))
    with pytest.raises(StoreError, match=r"another verify.judge 'model:.*judge': its content has changed"):
        unchanged_files(config, {"files": files}, tmp_path)


def test_files_where_a_command_is_given_are_no_judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The encoder of `embedding` is the package's, and no folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REMOTE_MEDIATION_CACHE", str(tmp_path / "cache"))
    (tmp_path / "notes.txt").write_text("one", "utf-8")
    config = study_of(tmp_path, tmp_path, analyses=["verify"], verify={"judge": "openings+embedding"})
    files = unchanged_files(config, {}, tmp_path)
    (tmp_path / "notes.txt").write_text("two", "utf-8")
    assert unchanged_files(config, {"files": files}, tmp_path) == files == {}
