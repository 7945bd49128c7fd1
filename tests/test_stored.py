"""What files hold that is no weight as it stands: codes of a quantised checkpoint, under a plain configuration."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from oracle import Subject
from safetensors.torch import load_file, save_file
from test_judges import chat_model, classifier
from test_whole_models import change, configured, copy

from remote_mediation.engine.local import LocalBackend
from remote_mediation.engine.weights import _refuse_codes
from remote_mediation.errors import JudgeError, ModelError
from remote_mediation.judges import load_judge

Subjects = Callable[[str], Subject]
CODED = "model.layers.1.mlp.down_proj.weight"


def coded(tensors: dict[str, torch.Tensor], name: str = CODED, dtype: torch.dtype = torch.int8) -> None:
    """One weight as codes whose scale is thrown away."""
    tensors[name] = (tensors[name] * 40).to(dtype)


def binary(folder: Path, shards: int, *, zipped: bool = True) -> None:
    """The weights of a folder as PyTorch's files in place of safetensors, in so many shards."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = [f"pytorch_model-{number}-of-{shards}.bin" for number in range(shards)]
    files = {key: names[place % shards] for place, key in enumerate(sorted(tensors))}
    for file in names:
        held = {key: tensors[key] for key in files if files[key] == file}
        whole = file if shards > 1 else "pytorch_model.bin"
        torch.save(held, folder / whole, _use_new_zipfile_serialization=zipped)
    if shards > 1:
        index = {"metadata": {}, "weight_map": files}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index), "utf-8")


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "bool", "float8_e4m3fn", "float8_e5m2"])
def test_codes_without_their_scales_are_no_weights(subject: Subjects, tmp_path: Path, dtype: str) -> None:
    folder = copy(subject("llama"), tmp_path)
    change(folder, lambda tensors: coded(tensors, dtype=getattr(torch, dtype)))
    with pytest.raises(ModelError, match=f"hold {CODED} in {dtype}, and its config.json has no quantization_config"):
        LocalBackend.load(str(folder))


@pytest.mark.parametrize("kind", ["bin", "old bin", "bin shards", "shards", "experts"])
def test_codes_are_seen_in_every_kind_of_file(subject: Subjects, tmp_path: Path, kind: str) -> None:
    """Also where transformers puts several of them together."""
    model, name = subject("mixtral" if kind == "experts" else "llama"), CODED
    if kind == "experts":
        name = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
    folder = copy(model, tmp_path)
    change(folder, lambda tensors: coded(tensors, name))
    if "bin" in kind:
        binary(folder, 2 if kind == "bin shards" else 1, zipped=kind != "old bin")
    if kind == "shards":
        in_shards(folder)
    with pytest.raises(ModelError, match=f"hold {name} in int8"):
        LocalBackend.load(str(folder))


def in_shards(folder: Path) -> None:
    """The weights of a folder in two files of safetensors, in a folder of their own."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    (folder / "parts").mkdir()
    files = {key: f"parts/model-{place % 2}.safetensors" for place, key in enumerate(sorted(tensors))}
    for file in set(files.values()):
        save_file({key: tensors[key] for key in files if files[key] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}), "utf-8")


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_masks_and_positions_are_whole_numbers(subject: Subjects, tmp_path: Path, kind: str) -> None:
    """As GPT-2's own checkpoint has them, whose names have nothing in front."""
    folder = copy(subject("gpt2"), tmp_path)

    def older(tensors: dict[str, torch.Tensor]) -> None:
        for key in sorted(tensors):
            tensors[key.removeprefix("transformer.")] = tensors.pop(key)
        mask = torch.ones(1, 1, 8, 8)
        tensors.update({"h.0.attn.bias": mask.to(torch.uint8), "h.1.attn.bias": mask.bool()})
        tensors.update({"position_ids": torch.arange(8)[None], "steps": torch.tensor(7)})

    change(folder, older)
    if kind == "bin":
        binary(folder, 1)
    assert LocalBackend.load(str(folder)).info.layers == 3
    assert all(tensor.is_floating_point() for tensor in LocalBackend.load(str(folder)).model._module.parameters())


def test_what_a_configuration_says_of_codes_is_left_to_transformers(subject: Subjects, tmp_path: Path) -> None:
    """Guards what held: what reads them is not installed here, so the check alone is asked."""
    folder, model = copy(subject("llama"), tmp_path), subject("llama").plain
    change(folder, coded)
    info = replace(subject("llama").info, name=str(folder))
    with pytest.raises(ModelError, match="in int8"):
        _refuse_codes(info, model, {"unexpected_keys": ()})
    configured(quantization_config={"quant_method": "compressed-tensors"})(folder)
    _refuse_codes(info, model, {"unexpected_keys": ()})


def test_what_no_module_reads_may_be_of_any_type(subject: Subjects, tmp_path: Path) -> None:
    folder = copy(subject("llama"), tmp_path)
    change(folder, lambda tensors: tensors.update({"v_head.codes": torch.ones(3, dtype=torch.int8)}))
    assert LocalBackend.load(str(folder)).info.layers == 3


@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.1.mlp.down_proj.weight"])
def test_weights_of_another_shape_are_named_with_both(subject: Subjects, tmp_path: Path, name: str) -> None:
    folder = copy(subject("llama"), tmp_path)
    shape = list(load_file(folder / "model.safetensors")[name].shape)
    change(folder, lambda tensors: tensors.update({name: torch.zeros(3, 7)}))
    with pytest.raises(ModelError, match="its files hold") as raised:
        LocalBackend.load(str(folder))
    assert f"its files hold {name} as [3, 7], and its config.json asks for {shape}; give" in str(raised.value)


def test_judges_of_codes_or_without_weights_are_refused(tmp_path: Path) -> None:
    """Transformers would fill them at random, and judge so."""
    chat_model(tmp_path / "chat", ["Yes", "No"], None)
    change(tmp_path / "chat", lambda tensors: coded(tensors))
    with pytest.raises(JudgeError, match=rf"holds {CODED} in int8, and its config.json has no quantization_config"):
        load_judge(f"model:{tmp_path / 'chat'}")
    change(tmp_path / "chat", lambda tensors: tensors.pop(CODED))
    with pytest.raises(JudgeError, match=rf"lacks {CODED}, which would be random; give the whole model"):
        load_judge(f"model:{tmp_path / 'chat'}")
    classifier(tmp_path / "classifier")
    name = "bert.encoder.layer.0.output.dense.weight"
    for place in ("embedding", "classifier"):
        classifier(tmp_path / place)
        change(tmp_path / place, lambda tensors: coded(tensors, name))
        with pytest.raises(JudgeError, match=r"holds bert.encoder.layer.0.output.dense.weight in int8"):
            load_judge(f"{place}:{tmp_path / place}")
    change(tmp_path / "embedding", lambda tensors: tensors.pop(name))
    with pytest.raises(JudgeError, match=r"lacks encoder.layer.0.output.dense.weight, which would be random"):
        load_judge(f"embedding:{tmp_path / 'embedding'}")
