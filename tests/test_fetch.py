"""Checkpoints: a plain one is itself, an adapter is merged into its base model once."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from oracle import Subject
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from remote_mediation.errors import ModelError
from remote_mediation.fetch import cache_folder, checkpoint
from remote_mediation.models import fingerprint

IDS = torch.tensor([[4, 7, 8, 9, 11, 12, 25], [5, 7, 8, 9, 11, 14, 23]])


@pytest.fixture
def base(subject: Callable[[str], Subject]) -> str:
    return subject("llama_chat").info.name


@pytest.fixture
def adapter(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A LoRA adapter that changes attention and MLPs, with a cache of its own."""
    monkeypatch.setenv("REMOTE_MEDIATION_CACHE", str(tmp_path / "cache"))
    settings = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(IDS).logits
    return found


def test_a_model_is_its_own_checkpoint(base: str, tmp_path: Path) -> None:
    for name in (base, "someone/some-model", str(tmp_path)):
        assert checkpoint(name, "other") == name


def test_a_merged_adapter_computes_what_the_adapter_does(adapter: Path, base: str) -> None:
    plain = AutoModelForCausalLM.from_pretrained(base)
    before = logits(plain)
    expected = logits(PeftModel.from_pretrained(plain, str(adapter)))
    merged = checkpoint(str(adapter), base)
    found = logits(AutoModelForCausalLM.from_pretrained(merged))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (found - before).abs().max() > 0.1
    text = "how do i fix a car"
    tokenizers = [AutoTokenizer.from_pretrained(name) for name in (base, merged)]
    assert tokenizers[0](text).input_ids == tokenizers[1](text).input_ids
    assert tokenizers[0].chat_template == tokenizers[1].chat_template


def test_it_is_merged_once_for_each_base_and_adapter(adapter: Path, base: str) -> None:
    merged = Path(checkpoint(str(adapter), base))
    written = (merged / "config.json").stat().st_mtime_ns
    assert checkpoint(str(adapter), base) == str(merged)
    assert (merged / "config.json").stat().st_mtime_ns == written
    assert merged.parent == cache_folder() / "merged"
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\0")  # other weights in the same place
    assert checkpoint(str(adapter), base) != str(merged)
    assert len(list(merged.parent.iterdir())) == 2


def test_a_base_that_has_changed_is_merged_anew(adapter: Path, base: str, tmp_path: Path) -> None:
    """In the same folder, as where it was trained on."""
    model, folder = AutoModelForCausalLM.from_pretrained(base), tmp_path / "base"
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    first = checkpoint(str(adapter), str(folder), fingerprint(str(folder)))
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    model.save_pretrained(folder)
    second = checkpoint(str(adapter), str(folder), fingerprint(str(folder)))
    expected = logits(PeftModel.from_pretrained(model, str(adapter)))
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(second)), expected, atol=1e-5, rtol=1e-5)
    assert first != second


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")  # peft only warns
def test_an_adapter_that_is_not_whole_is_refused(adapter: Path, base: str) -> None:
    """Under other names its weights would be left out, and the base measured as the checkpoint."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    renamed = {name.replace("layers.0", "blocks.0"): tensor for name, tensor in tensors.items()}
    save_file(renamed, adapter / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"its files lack .*layers\.0\..*, one of 4 that its"):
        checkpoint(str(adapter), base)


def test_an_adapter_of_no_kind_is_refused_in_one_line(adapter: Path, base: str) -> None:
    (adapter / "adapter_config.json").write_text("{}", "utf-8")
    with pytest.raises(ModelError, match=r"cannot merge adapter .*; give one of this model") as raised:
        checkpoint(str(adapter), base)
    assert "\n" not in str(raised.value)


def test_an_adapter_of_another_model_is_refused(adapter: Path, subject: Callable[[str], Subject]) -> None:
    for other in ("gpt2", "llama"):  # without such modules, and with wider heads
        with pytest.raises(ModelError, match=r"(?s)cannot merge adapter .*; give one of this model"):
            checkpoint(str(adapter), subject(other).info.name)
    assert not [path for path in (cache_folder() / "merged").iterdir() if path.is_dir()]


def test_an_adapter_needs_peft(adapter: Path, base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModelError, match="is a PEFT adapter: pip install peft"):
        checkpoint(str(adapter), base)
