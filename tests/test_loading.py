"""Models held in fewer bits, shared out over devices, or fetched from the disk while a layer runs.

The oracle is transformers' own model with plain hooks: whole in memory where only places differ, and quantised by the
same library where weights are.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fakes import records, write_pairs
from oracle import LOGIT_DIFF, REFUSAL, RESPONSE_LOGPROB, TOLERANCE, Subject, random_rows, token_pair
from test_joint_direct import every_contribution, lab, opened
from test_samples import BY_ID, GREEDY, sampled, swaps
from test_tasks import run as run_tasks
from test_tasks import setting as task_setting
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

import remote_mediation as rm
from remote_mediation.config import LoadSettings, load_config
from remote_mediation.engine.budget import Setting, weight_bytes
from remote_mediation.engine.fit import Room, described
from remote_mediation.engine.jobs import Keys
from remote_mediation.engine.local import LocalBackend
from remote_mediation.engine.payload import digest
from remote_mediation.engine.rows import Row, direct_row, swap
from remote_mediation.engine.tasks import columns_task, screen_tasks
from remote_mediation.errors import ModelError, SettingsError, StoreError
from remote_mediation.loading import PLAIN, Loading
from remote_mediation.models import info_of
from remote_mediation.sites import Component, Site
from remote_mediation.tokens import SPANS, TokenPair

Subjects = Callable[[str], Subject]
WHOLE: tuple[Component, ...] = ("layer_output", "attention_output", "mlp_output", "attention_heads")
# The embedding and one layer in memory; two layers, the last norm and the unembedding on the disk.
LLAMA_PLACES = (
    ("lm_head", "disk"),
    ("model.layers.0", "disk"),
    ("model.layers.1", "cpu"),
    ("model.layers.2", "disk"),
    ("model.norm", "disk"),
    ("model.rotary_emb", "cpu"),
    ("model.embed_tokens", "cpu"),
)
GPT2_PLACES = (
    ("transformer.wte", "cpu"),
    ("transformer.wpe", "cpu"),
    ("transformer.h.0", "cpu"),
    ("transformer.h.1", "disk"),
    ("transformer.h.2", "disk"),
    ("transformer.ln_f", "disk"),
    ("lm_head", "cpu"),
)
PLACES = {"llama": LLAMA_PLACES, "mixtral": LLAMA_PLACES, "gpt2": GPT2_PLACES}


def spread(model: Subject, loading: Loading) -> Subject:
    """The same folder, loaded in another way; the oracle stays whole."""
    return Subject(LocalBackend.load(model.info.name, loading=loading), model.plain)


def on_disk(backend: LocalBackend) -> set[str]:
    """Parameters that are in no memory."""
    return {name for name, weight in backend.model._module.named_parameters() if weight.is_meta}


def map_rows(pair: TokenPair, model: Subject) -> list[Row]:
    """Every component at every span of every layer, in both directions."""
    sites = [Site(*which) for which in product(WHOLE, range(model.info.layers), SPANS)]
    return [swap(pair, site, base, model.info) for site in sites for base in (0, 1)]


@pytest.mark.parametrize("name", PLACES)
def test_effects_with_weights_on_the_disk(subject: Subjects, name: str) -> None:
    model = spread(subject(name), Loading(places=PLACES[name]))
    pair, rng = token_pair("pair", edits=(2, 4), answers=(4, 1)), np.random.default_rng(5)
    assert any(".2." in parameter for parameter in on_disk(model.backend))
    for rows, outcome in (
        (map_rows(pair, model), RESPONSE_LOGPROB),
        (random_rows(pair, model.info, rng, 15), LOGIT_DIFF),
    ):
        measured = model.compare([pair], rows, outcome)
        largest = np.abs(measured.effects).max()
        assert largest >= 0.1
        assert measured.deviation < TOLERANCE * largest


def test_the_rest_of_the_engine_with_weights_on_the_disk(subject: Subjects, tmp_path: Path) -> None:
    """Direct effects, gradients, norms of weights and answers: what reads weights or calls modules out of turn."""
    here, there = subject("llama"), spread(subject("llama"), Loading(places=LLAMA_PLACES))
    pair = opened(token_pair("pair", edits=(2, 4)))
    sets = [[Site("mlp_output", 1, "last")], every_contribution(range(here.info.layers))]
    found = lab(tmp_path, there, [pair], REFUSAL).direct(sets, [pair])
    rows = [direct_row(pair, sites, 0, here.info) for sites in sets]
    np.testing.assert_allclose(found.nie[:, 0], there.compare([pair], rows, REFUSAL).effects, atol=1e-4)
    tasks = [
        *screen_tasks([token_pair("pair", edits=(2, 4))], "mlp_neurons", "last", task_setting(here), dropping=True),
        columns_task("mlp_neurons", task_setting(here)),
    ]
    for task in tasks:
        np.testing.assert_allclose(run_tasks(there, [task])[0], run_tasks(here, [task])[0], rtol=1e-5, atol=1e-6)
    rows = [row for pair in BY_ID.values() for row in swaps(here, pair)]
    np.testing.assert_array_equal(sampled(there, rows, GREEDY)[0], sampled(here, rows, GREEDY)[0])


def test_experts_on_the_disk(subject: Subjects) -> None:
    """They are stored one by one and used as one tensor, which is kept in a file of its own meanwhile."""
    here, there = subject("mixtral"), spread(subject("mixtral"), Loading(places=LLAMA_PLACES))
    assert "model.layers.2.mlp.experts.down_proj" in on_disk(there.backend)
    pair = token_pair("pair")
    rows = [
        swap(pair, Site("expert_output", layer, "all", (1,)), base, here.info) for layer in (0, 1, 2) for base in (0, 1)
    ]
    found, expected = (model.measure([pair], rows, LOGIT_DIFF) for model in (there, here))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.ptp(expected) > 0.1
    neurons = swap(pair, Site("expert_neurons", 2, "all", (1,)), 0, here.info)
    with pytest.raises(RuntimeError, match="the experts' weights are packed, or fetched only while they run"):
        there.measure([pair], [neurons], LOGIT_DIFF)


def test_a_limit_of_memory_sends_layers_to_the_disk(subject: Subjects) -> None:
    whole = subject("llama")
    most = sum(weight.numel() * 4 for weight in whole.plain.parameters()) // 1000 * 3 // 4
    model = spread(whole, Loading("auto", max_memory=(("cpu", f"{most}KB"),)))
    assert {name.rpartition(".layers.")[2][:1] for name in on_disk(model.backend)} & {"1", "2"}
    assert "on disk" in model.backend.served["device"]
    pair = token_pair("pair")
    rows = [swap(pair, Site("mlp_output", layer, "all"), 0, model.info) for layer in range(3)]
    assert model.compare([pair], rows, LOGIT_DIFF).deviation < 1e-4


@pytest.mark.parametrize(
    "loading",
    [
        Loading(places=(("", "disk"),)),
        Loading(places=tuple({**dict(LLAMA_PLACES), "model.embed_tokens": "disk"}.items())),
        Loading("auto", max_memory=(("cpu", "1KB"),)),
    ],
)
def test_an_embedding_on_the_disk_is_refused(subject: Subjects, loading: Loading) -> None:
    with pytest.raises(ModelError, match=r"model\.embed_tokens\.weight is on the disk .*; put it on a device"):
        LocalBackend.load(subject("llama").info.name, loading=loading)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_attention_asked_for_runs(subject: Subjects, attention: Any) -> None:
    model = spread(subject("llama"), Loading(attention=attention))
    assert model.backend.model._module.config._attn_implementation == attention
    assert model.backend.served == {"attention": attention}
    pair = token_pair("pair")
    rows = [swap(pair, Site("layer_output", layer, "edit"), 0, model.info) for layer in (0, 1)]
    assert model.compare([pair], rows, LOGIT_DIFF).deviation < 1e-4


def test_a_plain_model_has_nothing_to_tell(subject: Subjects) -> None:
    assert subject("llama").backend.served == {}
    assert subject("llama").backend.loading == PLAIN


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"load": {"attention": "flash_attention_2"}}, "load.attention: Input should be '', 'eager' or 'sdpa'"),
        ({"load": {"max_memory": {"cpu": "1GB"}}}, "max_memory needs a device_map"),
        ({"load": {"device_map": {"": 0}, "max_memory": {"0": "1GB"}}}, "not with a table"),
        ({"load": {"device_map": "auto", "max_memory": {"0": "much"}}}, "should match pattern"),
        ({"load": {"device_map": {"": "disk"}}}, "names no device"),
        ({"load": {"device_map": "auto"}, "device": "cuda"}, "device is 'cuda' and \\[load\\] has a device_map"),
        ({"load": {"quantization": "int8"}}, "int8 multiplies in float16 whatever else is float32"),
        ({"load": {"quantization": "nf4"}, "backend": "ndif"}, "a server loads its own"),
    ],
)
def test_what_cannot_be_is_refused_before_a_model_is_loaded(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(SettingsError, match=reason):
        load_config(None, {"model": "some/model", **settings})


def test_a_study_file_says_how_a_model_is_loaded(tmp_path: Path) -> None:
    file = tmp_path / "study.toml"
    file.write_text(
        'model = "some/model"\n[load]\ndevice_map = "auto"\nquantization = "nf4"\nattention = "eager"\n'
        '[load.max_memory]\n0 = "20GiB"\ncpu = "60 GB"\n',
        "utf-8",
    )
    config = load_config(file, {})
    most = ((0, "20GiB"), ("cpu", "60 GB"))
    assert config.load.loading() == Loading("auto", (), most, "nf4", "eager")
    assert config.identity()["load"]["quantization"] == "nf4"
    assert "load" not in rm.StudyConfig(model="some/model").identity()
    table = load_config(None, {"model": "m"}, ["load.device_map.lm_head=0", "load.device_map.model=cpu"])
    assert table.load.loading().device_map() == {"lm_head": 0, "model": "cpu"}


def test_a_quantised_row_has_a_name_of_its_own(subject: Subjects) -> None:
    info, pair = subject("llama").info, token_pair("pair")
    names = {Keys(Setting(info, "float32", LOGIT_DIFF, held), [pair])(Row("pair", 0)) for held in ("", "nf4", "int8")}
    assert len(names) == 3


def test_rows_and_studies_from_before_there_was_load_keep_their_names() -> None:
    """The hashes are those that the version before `[load]` made of the same pair and study."""
    info = info_of(AutoConfig.for_model("llama", num_hidden_layers=3), "some/llama")
    pair = token_pair("pair")
    keys = Keys(Setting(info, "float32", LOGIT_DIFF), [pair])
    assert keys(swap(pair, Site("mlp_output", 1, "last"), 0, info)) == "6f63c5a0c0dd3138448ffc2d"
    assert digest([rm.StudyConfig(model="some/llama", seed=3).identity()]) == "f50ad458485eeb62b13b0d9a"


def study(model: Subject, folder: Path, **settings: Any) -> rm.StudyConfig:
    return rm.StudyConfig(
        model=model.info.name,
        pairs=str(write_pairs(folder / "pairs.jsonl", records())),
        analyses=["modules"],
        outcome="logit_diff",
        logit_diff={"plus": ["sure"], "minus": ["sorry"]},
        statistics={"resamples": 100},
        **settings,
    )


def test_a_run_knows_how_its_model_was_loaded(subject: Subjects, tmp_path: Path) -> None:
    model = subject("llama")
    config = study(model, tmp_path, load={"device_map": dict(LLAMA_PLACES), "attention": "eager"})
    plain = study(model, tmp_path)
    with rm.open_lab(config, out=tmp_path / "run") as found, rm.open_lab(plain, out=tmp_path / "plain") as expected:
        effects, whole = found.run().effects, expected.run().effects
        report = found.report().read_text("utf-8")
    np.testing.assert_allclose(effects["nie"], whole["nie"], atol=1e-4)
    record = json.loads((tmp_path / "run/run.json").read_text("utf-8"))
    assert record["served"] == {"attention": "eager", "device": "4 modules on disk, 3 on cpu"} or record["served"] == {
        "attention": "eager",
        "device": "3 modules on cpu, 4 on disk",
    }
    assert record["study"]["load"]["attention"] == "eager"
    assert "| loaded | attention eager; 3 modules on cpu, 4 on disk |" in report
    assert "| loaded |" not in (tmp_path / "plain/report.md").read_text("utf-8") if expected.report() else True
    with pytest.raises(StoreError, match="load"):
        rm.open_lab(plain, out=tmp_path / "run")
    with pytest.raises(SettingsError, match=r"the study's \[load\] is .*'eager'.*make them the same"):
        rm.open_lab(config, out=tmp_path / "other", backend=model.backend)


BITS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
    "int8": {"load_in_8bit": True},
}
needs_bitsandbytes = pytest.mark.skipif(not find_spec("bitsandbytes"), reason="bitsandbytes is not installed")
PRECISION = {"nf4": "float32", "int8": "float16"}


def quantised(model: Subject, held: Any) -> Subject:
    """The same folder in fewer bits, twice; the oracle by transformers alone."""
    dtype = PRECISION[held]
    plain = AutoModelForCausalLM.from_pretrained(
        model.info.name,
        quantization_config=BitsAndBytesConfig(**BITS[held]),
        dtype=getattr(torch, dtype),
        device_map={"": "cpu"},
        attn_implementation="eager",
    )
    for module in plain.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    backend = LocalBackend.load(model.info.name, dtype=dtype, loading=Loading(quantization=held))
    return Subject(backend, plain.eval(), dtype)


# A mixture in int8 may send a token to another expert when other rows run beside it.
@needs_bitsandbytes
@pytest.mark.parametrize(("name", "held"), [*product(("llama", "gemma2", "gpt2"), BITS), ("mixtral", "nf4")])
def test_effects_of_quantised_weights(subject: Subjects, name: str, held: Any) -> None:
    model, pair = quantised(subject(name), held), token_pair("pair", edits=(2, 4), answers=(4, 1))
    measured = model.compare([pair], map_rows(pair, model), RESPONSE_LOGPROB)
    largest = np.abs(measured.effects).max()
    assert largest >= 0.1
    assert measured.deviation < (TOLERANCE if held == "nf4" else 0.1) * largest
    whole = subject(name).measure([pair], map_rows(pair, model), RESPONSE_LOGPROB)
    assert np.abs(whole - measured.oracle).max() > 10 * TOLERANCE * largest  # they are other weights


@needs_bitsandbytes
@pytest.mark.parametrize("held", BITS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_quantised_weights_are_read_by_what_they_do(subject: Subjects, name: str, held: Any) -> None:
    """Norms of columns, which packed numbers do not have, and gradients through them."""
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    model = quantised(subject(name), held)
    setting = Setting(model.info, model.dtype, LOGIT_DIFF, held)
    norms = run_tasks(model, [columns_task("mlp_neurons", setting)])[0].reshape(model.info.layers, -1)
    path = "model.layers.{}.mlp.down_proj" if name == "llama" else "transformer.h.{}.mlp.c_proj"
    for layer in range(model.info.layers):
        module = model.plain.get_submodule(path.format(layer))
        weight = dequantize_bnb_weight(module.weight, getattr(module, "state", None)).float()
        expected = weight.reshape(model.info.d_model, model.info.d_ff).norm(dim=0)
        np.testing.assert_allclose(norms[layer], expected, rtol=1e-2 if held == "int8" else 1e-4)
    (screen,) = screen_tasks([token_pair("pair")], "mlp_neurons", "last", setting, dropping=False)
    assert np.abs(run_tasks(model, [screen])[0]).max() > 0


@needs_bitsandbytes
def test_weights_that_are_held_otherwise_are_refused(subject: Subjects, tmp_path: Path) -> None:
    """Of a quantised checkpoint transformers takes its own way and not the one asked for."""
    whole = subject("llama")
    quantised(whole, "nf4").plain.save_pretrained(tmp_path)
    whole.backend.tokenizer.save_pretrained(tmp_path)
    assert LocalBackend.load(str(tmp_path)).served["quantization"] == "nf4"
    with pytest.raises(ModelError, match=r"with quantization int8: it came with nf4|cannot load"):
        LocalBackend.load(str(tmp_path), dtype="float16", loading=Loading(quantization="int8"))


@needs_bitsandbytes
@pytest.mark.parametrize("held", BITS)
def test_memory_of_quantised_weights(tmp_path: Path, held: Any) -> None:
    shape = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model("llama", **shape, num_key_value_heads=2, vocab_size=64)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=BitsAndBytesConfig(**BITS[held]), dtype=torch.float16, device_map={"": "cpu"}
    )
    scales = 0.0
    if held == "nf4":
        scales = sum(
            weight.quant_state.absmax.numel() * 4 for weight in model.parameters() if hasattr(weight, "quant_state")
        )
    expected = sum(weight.numel() * weight.element_size() for weight in model.parameters()) + scales
    assert weight_bytes(info_of(config, "tiny"), "float16", held) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(
    ("room", "said"),
    [
        (Room((), 64e9, 1e12), 'fits this machine with dtype = "float32" (33.7 of 64.0 GB free); weights take 32.1 GB'),
        (Room((), 20e9, 1e12), 'with dtype = "bfloat16" (17.7 of 20.0 GB free)'),
        (Room((), 10e9, 1e12), 'with dtype = "bfloat16", [load] quantization = "nf4" ('),
        (Room((80e9,), 64e9, 1e12), 'with dtype = "bfloat16", device = "cuda" (17.1 of 72.0 GB free)'),
        (Room((12e9, 12e9), 64e9, 1e12), 'with dtype = "bfloat16", [load] device_map = "auto" ('),
        (Room((10e9,), 8e9, 1e12), 'device = "cuda", [load] quantization = "nf4" ('),
        (Room((), 4e9, 1e12), "some of it on the CPU and the disk and slow"),
        (Room((), 2e9, 1e9), "does not fit this machine: weights take 32.1 GB in float32, 16.1 GB in bfloat16, "),
    ],
)
def test_whether_a_model_fits(room: Room, said: str) -> None:
    """Llama 3.1 8B, 8.03 billion weights."""
    shape = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    config = AutoConfig.for_model("llama", **shape, num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=False)
    assert said in described(info_of(config, "8B"), room)


def test_load_settings_are_the_backends() -> None:
    assert LoadSettings().loading() == PLAIN
