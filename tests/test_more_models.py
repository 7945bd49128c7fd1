"""Models that are not what their folder says: cases of our own search, each of which once ran in silence."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fakes import records, write_pairs
from oracle import Subject
from safetensors.torch import load_file, save_file
from test_whole_models import configured, copy, study_of
from transformers import AutoConfig

from remote_mediation.engine.local import LocalBackend
from remote_mediation.errors import ModelError
from remote_mediation.models import info_of, load_configuration, load_info
from remote_mediation.store import Store
from remote_mediation.study import run_study

Subjects = Callable[[str], Subject]
INDEX = "model.safetensors.index.json"


def test_two_models_in_one_folder_are_refused(subject: Subjects, tmp_path: Path) -> None:
    """Saved as `pytorch_model.bin` beside older safetensors, the older ones are read."""
    folder = copy(subject("llama"), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"] = tensors["model.layers.1.mlp.down_proj.weight"] * 1.01
    torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.raises(
        ModelError, match=r"two models, model.layers.1.mlp.down_proj.weight of pytorch_model.bin is not"
    ):
        LocalBackend.load(str(folder))


def sharded(model: Subject, folder: Path) -> Path:
    """Its weights in shards, that a folder of their own holds."""
    copy(model, folder)
    (folder / "model.safetensors").unlink()
    model.plain.save_pretrained(folder, max_shard_size="20KB")
    (folder / "weights").mkdir()
    index = json.loads((folder / INDEX).read_text("utf-8"))
    for shard in set(index["weight_map"].values()):
        (folder / shard).rename(folder / "weights" / shard)
    index["weight_map"] = {name: f"weights/{shard}" for name, shard in index["weight_map"].items()}
    (folder / INDEX).write_text(json.dumps(index), "utf-8")
    return folder


def test_shards_in_a_folder_of_their_own_are_in_the_fingerprint(subject: Subjects, tmp_path: Path) -> None:
    folder = sharded(subject("llama"), tmp_path)
    before = load_info(str(folder)).weights
    shard = next((folder / "weights").iterdir())
    save_file({name: tensor / 2 for name, tensor in load_file(shard).items()}, shard, {"format": "pt"})
    assert load_info(str(folder)).weights != before


def two_shards(folder: Path, other: float) -> None:
    """The weights of a folder in two shards, one of them in both, in the second times a factor."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    files = {key: names[place % 2] for place, key in enumerate(sorted(tensors))}
    parts = [{key: tensor for key, tensor in tensors.items() if files[key] == name} for name in names]
    twice = min(parts[0])
    parts[1][twice] = parts[0][twice] * other
    for name, part in zip(names, parts, strict=True):
        save_file(part, folder / name, {"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}), "utf-8")


def test_shards_that_hold_one_weight_otherwise_are_refused(subject: Subjects, tmp_path: Path) -> None:
    """The index names one of them, and the other was read."""
    folders = [copy(subject("llama"), tmp_path / name) for name in ("same", "other")]
    for folder, factor in zip(folders, (1.0, 2.0), strict=True):
        two_shards(folder, factor)
    assert LocalBackend.load(str(folders[0])).info.layers == 3
    with pytest.raises(ModelError, match=r"lm_head.weight in model-00001-of-.* is not that in model-00002-of-"):
        LocalBackend.load(str(folders[1]))


def test_shards_of_another_model_beside_one_file_are_refused(subject: Subjects, tmp_path: Path) -> None:
    """The one file is read, whatever the index says."""
    folder = copy(subject("llama"), tmp_path)
    whole = load_file(folder / "model.safetensors")
    subject("llama").plain.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    for path in (tmp_path / "shards").glob("model-*"):
        path.rename(folder / path.name)
    assert LocalBackend.load(str(folder)).info.layers == 3
    save_file({name: tensor / 2 for name, tensor in whole.items()}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"two models, .* of model-0000\d-of-.*safetensors is not"):
        LocalBackend.load(str(folder))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("zipped", [True, False])
def test_one_model_in_two_formats_is_read(subject: Subjects, tmp_path: Path, dtype: torch.dtype, zipped: bool) -> None:
    folder = copy(subject("llama"), tmp_path)
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(folder / "model.safetensors").items()}
    tensors["counter"] = torch.tensor(1)
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    assert LocalBackend.load(str(folder)).info.layers == 3


def test_a_changed_template_beside_the_first_is_another_model(subject: Subjects, tmp_path: Path) -> None:
    folder = copy(subject("llama"), tmp_path)
    before = load_info(str(folder)).weights
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/rag.jinja").write_text("{{ messages }}", "utf-8")
    assert load_info(str(folder)).weights != before


def test_an_untied_head_is_read_whatever_the_configuration_says(subject: Subjects, tmp_path: Path) -> None:
    """Guards what held: a head that was trained apart, under a configuration that calls it tied."""
    folder = copy(subject("llama"), tmp_path)
    configured(tie_word_embeddings=True)(folder)
    head = load_file(folder / "model.safetensors")["lm_head.weight"]
    assert torch.equal(LocalBackend.load(str(folder)).model._module.lm_head.weight, head)


def long_rope(subject: Subject, folder: Path, original: int) -> Path:
    """A phi3 whose LongRoPE turns sequences of more tokens than `original` otherwise."""
    copy(subject, folder)
    half = subject.backend.info.d_head // 2
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * half, "long_factor": [9.0] * half}
    configured(
        rope_parameters={**rope, "original_max_position_embeddings": original},
        original_max_position_embeddings=original,
        max_position_embeddings=64,
    )(folder)
    return folder


def test_prompts_beyond_the_first_length_of_longrope_are_refused(subject: Subjects, tmp_path: Path) -> None:
    """Beyond it every sequence of a batch is turned otherwise, and keys kept from before are not."""
    folder = long_rope(subject("phi3"), tmp_path / "model", 16)
    assert load_info(str(folder)).context == 16
    long = {"id": "long", "harmful": "please " * 20 + "burn it", "harmless": "please " * 20 + "fix it"}
    rows = [*records(), {**records()[0], **long, "template": "long"}]
    config = study_of(folder, write_pairs(tmp_path / "pairs.jsonl", rows))
    store = Store.create(tmp_path / "run", config.identity())
    effects = run_study(config, LocalBackend.load(str(folder)), store).effects
    assert "long" not in set(effects["pair_id"])


@pytest.mark.parametrize(
    ("other", "value", "refused"),
    [
        ("rope_scaling", {"rope_type": "linear", "factor": 2.0}, True),
        ("rope_theta", 500.0, True),
        ("rope_scaling", None, False),
        ("rope_scaling", {"rope_type": "default", "rope_theta": 1e6}, False),
        ("rope_theta", 1e6, False),
    ],
)
def test_two_settings_of_rotary_embeddings_are_refused_where_they_differ(
    subject: Subjects, tmp_path: Path, other: str, value: object, refused: bool
) -> None:
    """As where `rope_scaling` is added by hand to a checkpoint that transformers 5 saved: its frequency was lost."""
    folder = copy(subject("llama"), tmp_path)
    configured(rope_parameters={"rope_type": "default", "rope_theta": 1e6}, **{other: value})(folder)
    if not refused:
        assert load_configuration(str(folder)).rope_parameters["rope_theta"] == 1e6
        return
    with pytest.raises(ModelError, match=f"has {other} .* beside rope_parameters .*, and both do not hold; write"):
        load_info(str(folder))


def test_older_settings_of_rotary_embeddings_are_read(subject: Subjects, tmp_path: Path) -> None:
    """Guards what held: as checkpoints of before transformers 5 have them."""
    folder = copy(subject("llama"), tmp_path)
    written = json.loads((folder / "config.json").read_text("utf-8"))
    del written["rope_parameters"]
    written |= {"rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 2.0}}
    (folder / "config.json").write_text(json.dumps(written), "utf-8")
    rope = LocalBackend.load(str(folder)).model._module.model.rotary_emb
    width = subject("llama").backend.info.d_head
    expected = 1e6 ** -(torch.arange(0, width, 2) / width) / 2
    torch.testing.assert_close(rope.inv_freq, expected)


def test_other_ropes_leave_the_context_as_it_is(subject: Subjects, tmp_path: Path) -> None:
    folder = long_rope(subject("phi3"), tmp_path, 16)
    configured(rope_parameters={"rope_type": "default", "rope_theta": 10000.0})(folder)
    assert info_of(AutoConfig.from_pretrained(folder), "tiny").context == 64
