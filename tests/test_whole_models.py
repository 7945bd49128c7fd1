"""A model that is not whole is refused, and one that has changed is another."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from fakes import Counting, records, write_pairs
from oracle import Subject
from safetensors.torch import load_file, save_file

from remote_mediation.config import StudyConfig
from remote_mediation.contents import unchanged_files
from remote_mediation.engine.local import LocalBackend
from remote_mediation.errors import ModelError, StoreError
from remote_mediation.models import dated_fingerprint, folder_at_hand, load_info, load_tokenizer
from remote_mediation.store import Store
from remote_mediation.study import run_study

Subjects = Callable[[str], Subject]


def copy(subject: Subject, folder: Path) -> Path:
    subject.plain.save_pretrained(folder)
    subject.backend.tokenizer.save_pretrained(folder)
    return folder


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "lm_head.weight"])
def test_missing_weights_are_refused_by_name(subject: Subjects, tmp_path: Path, name: str) -> None:
    folder = copy(subject("llama"), tmp_path)
    change(folder, lambda tensors: tensors.pop(name))
    with pytest.raises(ModelError, match=f"its files lack {name}, which would be random; give"):
        LocalBackend.load(str(folder))


def test_tied_weights_are_not_missing(subject: Subjects, tmp_path: Path) -> None:
    assert LocalBackend.load(str(copy(subject("llama_chat"), tmp_path))).info.tied


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.3.mlp.down_proj.weight",
        "model.layers.1.mlp.down_proj.weight_scale_inv",
        "model.layers.1.mlp.down_proj.lora_A.default.weight",
        "lm_head.weight_scale",
        "lm_head.bias",
        "lm_head.lora_B.weight",
        "model.norm.bias",
    ],
)
def test_weights_for_which_the_configuration_has_no_place_are_refused(
    subject: Subjects, tmp_path: Path, name: str
) -> None:
    """Biases that are switched off, layers that are cut off, scales and adapters that are not applied."""
    folder = copy(subject("llama"), tmp_path)
    change(folder, lambda tensors: tensors.update({name: torch.ones(1)}))
    with pytest.raises(ModelError, match=f"its files hold {name}, for which its config.json has no place"):
        LocalBackend.load(str(folder))


@pytest.mark.parametrize("name", ["v_head.summary.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"])
def test_weights_beside_the_language_model_may_be_there(subject: Subjects, tmp_path: Path, name: str) -> None:
    folder = copy(subject("llama"), tmp_path)
    change(folder, lambda tensors: tensors.update({name: torch.ones(1)}))
    assert LocalBackend.load(str(folder)).info.layers == 3


def test_masks_of_older_checkpoints_may_be_there(subject: Subjects, tmp_path: Path) -> None:
    folder = copy(subject("gptj"), tmp_path)
    masks = {f"transformer.h.0.attn.{name}": torch.ones(1) for name in ("bias", "masked_bias")}
    change(folder, lambda tensors: tensors.update(masks))
    assert LocalBackend.load(str(folder)).info.layers == 3


def test_an_adapter_is_no_model(subject: Subjects, tmp_path: Path) -> None:
    """Transformers would read its base from the folder that it names, and no fingerprint would know."""
    folder = copy(subject("llama"), tmp_path)
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "elsewhere"}', "utf-8")
    with pytest.raises(ModelError, match="is a PEFT adapter and no whole model; merge it into its base"):
        LocalBackend.load(str(folder))


def test_no_code_of_a_checkpoint_is_run_and_nobody_is_asked(
    subject: Subjects, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy(subject("llama"), tmp_path)
    configured(model_type="mine", auto_map={"AutoConfig": "mine.Mine"})(folder)
    (folder / "mine.py").write_text("raise AssertionError('this was run')\n", "utf-8")
    monkeypatch.setattr("builtins.input", lambda *text: "y")
    with pytest.raises(ModelError, match=r"cannot load model .* contains custom code which must be executed"):
        LocalBackend.load(str(folder))


def test_a_configuration_without_names_of_outputs_changes_nothing(subject: Subjects, tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs.jsonl", records())
    effects = []
    for name, more in (("plain", {}), ("tuples", {"return_dict": False})):
        folder = copy(subject("llama"), tmp_path / name)
        configured(**more)(folder)
        config = study_of(folder, pairs)
        store = Store.create(tmp_path / f"run-{name}", config.identity())
        effects.append(run_study(config, LocalBackend.load(str(folder)), store).effects)
    pd.testing.assert_frame_equal(*effects)


def test_weights_of_another_shape_are_refused(subject: Subjects, tmp_path: Path) -> None:
    folder = copy(subject("llama"), tmp_path)
    change(folder, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(3, 32)}))
    with pytest.raises(ModelError, match="cannot load") as raised:
        LocalBackend.load(str(folder))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_files_that_git_has_not_fetched_are_named(subject: Subjects, tmp_path: Path, name: str) -> None:
    folder = copy(subject("llama"), tmp_path)
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    with pytest.raises(ModelError, match=f"{name} is a git-LFS pointer; run `git lfs pull`") as raised:
        LocalBackend.load(str(folder))
    assert "\n" not in str(raised.value)


def shard_lost(folder: Path) -> None:
    names = list(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").unlink()
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def configured(**settings: Any) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text("utf-8")), **settings}), "utf-8")

    return write


@pytest.mark.parametrize(
    ("spoil", "cause"),
    [
        (configured(_attn_implementation="flash_attention_2"), "FlashAttention2 has been toggled on"),
        (configured(_attn_implementation="flex_attention"), "asks for the attention 'flex_attention', which takes no"),
        (configured(quantization_config={"quant_method": "gptq", "bits": 4}), "GPTQ quantized model requires"),
        (configured(quantization_config={"quant_method": "awq", "bits": 4}), "AWQ quantized model requires"),
        (configured(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}), "bitsandbytes"),
        (configured(hidden_act="nonsense"), "KeyError: 'nonsense'"),
        (configured(num_attention_heads=5), "attention heads"),
        (
            lambda folder: (folder / "generation_config.json").write_text('{"compile_config": {}}'),
            "'cpu': You provided `compile_config`",
        ),
        (lambda folder: (folder / "model.safetensors").unlink(), "no file named model.safetensors"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 2000), "SafetensorError"),
        (shard_lost, "model-00001-of-00001.safetensors"),
        (lambda folder: (folder / "config.json").write_text("[1]"), ""),
    ],
)
def test_what_cannot_be_loaded_is_one_line_with_its_cause(
    subject: Subjects, tmp_path: Path, spoil: Callable[[Path], object], cause: str
) -> None:
    folder = copy(subject("llama"), tmp_path)
    spoil(folder)
    with pytest.raises(ModelError, match="cannot load ") as raised:
        LocalBackend.load(str(folder))
    assert cause in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_tokenizer_whose_file_makes_rust_panic_is_refused_in_one_line(subject: Subjects, tmp_path: Path) -> None:
    """A panic is no `Exception`."""
    folder = copy(subject("llama"), tmp_path)
    content = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    content["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": ""}
    (folder / "tokenizer.json").write_text(json.dumps(content), "utf-8")
    with pytest.raises(ModelError, match=r"cannot load .*Cannot parse precompiled_charsmap") as raised:
        load_tokenizer(str(folder))
    assert "\n" not in str(raised.value)


def test_a_broken_tokenizer_is_refused_in_one_line(subject: Subjects, tmp_path: Path) -> None:
    folder = copy(subject("llama"), tmp_path)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="cannot load model") as raised:
        load_tokenizer(str(folder))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("instead", "content", "cause"),
    [
        ("", "", "Couldn't instantiate the backend tokenizer"),
        ("tekken.json", '{"config": {}, "vocab": []}', "(KeyError|mistral-common)"),
    ],
)
def test_without_a_fast_tokenizer_every_command_says_the_same(
    subject: Subjects, tmp_path: Path, instead: str, content: str, cause: str
) -> None:
    """As Mistral's own folders have it: never a prompt without its template."""
    folder = copy(subject("llama"), tmp_path)
    for path in folder.glob("token*"):
        path.unlink()
    if instead:
        (folder / instead).write_text(content, "utf-8")
    for load in (load_tokenizer, LocalBackend.load):
        with pytest.raises(ModelError, match=f"cannot load .*{cause}") as raised:
            load(str(folder))
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "chat_template.jinja", "generation_config.json", "pytorch_model.bin"]
)
def test_every_file_that_matters_is_in_the_fingerprint(subject: Subjects, tmp_path: Path, name: str) -> None:
    folder = copy(subject("llama"), tmp_path)
    (folder / name).touch()
    before = load_info(str(folder)).weights
    with (folder / name).open("a", encoding="utf-8") as opened:
        opened.write(" ")
    assert load_info(str(folder)).weights != before


def test_time_alone_makes_no_other_model(subject: Subjects, tmp_path: Path) -> None:
    one, two = copy(subject("llama"), tmp_path / "one"), copy(subject("llama"), tmp_path / "two")
    assert load_info(str(one)).weights == load_info(str(two)).weights


def study_of(folder: Path, pairs: Path, **settings: Any) -> StudyConfig:
    asked = {"analyses": ["modules"], "outcome": "logit_diff", "logit_diff": {"plus": ["sure"], "minus": ["sorry"]}}
    return StudyConfig(model=str(folder), pairs=str(pairs), **{**asked, **settings})


@pytest.fixture
def begun(subject: Subjects, tmp_path: Path) -> tuple[StudyConfig, Store]:
    """A finished run on a copy of a model."""
    folder = copy(subject("llama"), tmp_path / "model")
    config = study_of(folder, write_pairs(tmp_path / "pairs.jsonl", records()))
    store = Store.create(tmp_path / "run", config.identity())
    run_study(config, LocalBackend.load(str(folder)), store)
    return config, store


def noted(store: Store, **changes: Any) -> None:
    """Let the run folder hold what an older version would have written."""
    record = {key: value for key, value in store.record().items() if key not in ("content", "files")}
    store.save_record({**record, "model": {**record["model"], **changes}})


def again(config: StudyConfig, store: Store) -> tuple[pd.DataFrame, int]:
    """Effects of the same command given again, and rows that it measured."""
    backend = Counting(LocalBackend.load(config.model))
    return run_study(config, backend, Store.create(store.folder, config.identity())).effects, backend.rows


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: change(folder, lambda tensors: tensors["lm_head.weight"].mul_(2)),
        lambda folder: (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}", "utf-8"),
    ],
    ids=["weights", "template"],
)
def test_a_changed_model_does_not_go_on(begun: tuple[StudyConfig, Store], change: Callable[[Path], object]) -> None:
    config, store = begun
    change(Path(config.model))
    with pytest.raises(StoreError, match=r"holds a run on other files of .*model': .* changed since; choose another"):
        again(config, store)


def test_the_folder_of_an_older_version_goes_on(begun: tuple[StudyConfig, Store]) -> None:
    config, store = begun
    noted(store, weights=dated_fingerprint(config.model))
    for path in store.folder.glob("readouts/*"):  # measured under the keys of then
        path.unlink()
    first, rows = again(config, store)
    assert rows > 0
    second, rows = again(config, store)
    assert rows == 0
    pd.testing.assert_frame_equal(first, second)
    change(Path(config.model), lambda tensors: tensors["lm_head.weight"].mul_(2))
    with pytest.raises(StoreError, match="holds a run on other files"):
        again(config, store)


def test_the_folder_of_an_older_version_refuses_changed_weights(begun: tuple[StudyConfig, Store]) -> None:
    config, store = begun
    noted(store, weights=dated_fingerprint(config.model))
    change(Path(config.model), lambda tensors: tensors["lm_head.weight"].mul_(2))
    with pytest.raises(StoreError, match="holds a run on other files"):
        again(config, store)


def test_a_folder_without_any_fingerprint_goes_on(begun: tuple[StudyConfig, Store]) -> None:
    config, store = begun
    noted(store, weights="")
    again(config, store)
    assert Store.open(store.folder).record()["content"] == load_info(config.model).weights


def test_other_files_that_a_study_reads_are_known_by_content(tmp_path: Path) -> None:
    hard = write_pairs(tmp_path / "hard.jsonl", records())
    config = study_of(tmp_path, hard, analyses=["neurons", "monitor"], monitor={"hard_negatives": str(hard)})
    files = unchanged_files(config, {}, tmp_path)
    assert unchanged_files(config, {"files": files}, tmp_path) == files
    write_pairs(hard, records()[1:])
    with pytest.raises(StoreError, match=r"another monitor.hard_negatives .*hard.jsonl': its content has changed"):
        unchanged_files(config, {"files": files}, tmp_path)
    assert unchanged_files(config, {}, tmp_path) != files  # an older folder has none


def test_a_hub_s_model_that_has_moved_is_another(
    subject: Subjects, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files that come or change beside it do not matter; a folder of an older version has none noted."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    cached = tmp_path / "models--me--tiny"
    (cached / "refs").mkdir(parents=True)
    for commit in ("one", "two", "three"):
        copy(subject("llama"), cached / "snapshots" / commit)
    (cached / "snapshots/two/README.md").write_text("news")
    change(cached / "snapshots/three", lambda tensors: tensors["lm_head.weight"].mul_(2))
    config = StudyConfig(model="me/tiny")

    def begun_at(commit: str, files: dict[str, str]) -> dict[str, str]:
        (cached / "refs/main").write_text(commit)
        return unchanged_files(config, {"files": files} if files else {}, tmp_path)

    files = begun_at("one", {})
    assert "model.safetensors of 'me/tiny'" in files
    assert begun_at("two", files) == files
    with pytest.raises(StoreError, match=r"another model\.safetensors of 'me/tiny': its content has changed since"):
        begun_at("three", files)
    pinned = config.model_copy(update={"revision": "one"})
    assert unchanged_files(pinned, {"files": files}, tmp_path) == files


def test_a_hub_s_model_on_this_machine_is_had_with_its_weights_alone(
    subject: Subjects, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    cached = tmp_path / "models--me--tiny"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs/main").write_text("one")
    assert folder_at_hand("me/tiny") is None
    folder = copy(subject("llama"), cached / "snapshots/one")
    assert folder_at_hand("me/tiny") == folder
    (folder / "model.safetensors").unlink()
    assert folder_at_hand("me/tiny") is None
    assert folder_at_hand(str(folder)) == folder  # what is wrong with a folder of one's own is for its loader to say


def test_checkpoints_and_judges_are_known_by_content(
    subject: Subjects, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy(subject("llama"), tmp_path / "tuned")
    (tmp_path / "my_judge.py").write_text("def judge(prompts, answers): return [True] * len(answers)\n", "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    asked = {"analyses": ["neurons", "intervene", "attacks"], "attacks": {"checkpoints": [str(folder)]}}
    for judge, file in (("python:my_judge:judge", tmp_path / "my_judge.py"), ("phrases", folder / "config.json")):
        config = study_of(tmp_path, tmp_path, **asked, intervene={"judge": judge})
        files = unchanged_files(config, {}, tmp_path)
        file.write_text(file.read_text("utf-8") + "\n", "utf-8")
        with pytest.raises(StoreError, match="its content has changed since"):
            unchanged_files(config, {"files": files}, tmp_path)
