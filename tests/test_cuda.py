"""The engine on a GPU: the same numbers as on the CPU. `scripts/bench/gpu` runs these and measures more.

All is in float32 without TF32, but where bfloat16 is named, and is compared with plain hooks on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import dispatch_model
from fakes import words_tokenizer
from mixture_oracle import MixtureOracle
from nnsight import TransformersModel
from oracle import LOGIT_DIFF, MODULES, REFUSAL, RESPONSE_LOGPROB, Measured, Subject, random_rows, token_pair
from test_experts import grid, parts_of
from test_joint_direct import every_contribution, lab, opened
from test_samples import BY_ID, GREEDY, SAMPLED, sampled, swaps
from test_tasks import HELD, PROMPTS
from test_tasks import run as run_tasks
from test_tasks import setting as task_setting
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from remote_mediation.engine.local import LocalBackend
from remote_mediation.engine.rows import Row, direct_row, swap, swap_all
from remote_mediation.engine.samples import Manner
from remote_mediation.engine.tasks import Reading, columns_task, drift_task, generate_task, read_task, screen_tasks
from remote_mediation.errors import OutOfMemoryError
from remote_mediation.models import info_of
from remote_mediation.sites import Component, Site
from remote_mediation.tokens import SPANS, TokenPair

Subjects = Callable[[str], Subject]
Say = Callable[[str, object], None]
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device here"),
]
# A plain block, one with windows and norms behind its modules, one with learnt positions, a mixture of experts.
NAMES = ("llama", "gemma2_window", "gpt2", "mixtral")
# Of the largest effect: a GPU adds products up in another order.
CLOSE = 1e-3
LEAST_EFFECT = 0.1
WHOLE: tuple[Component, ...] = ("layer_output", "attention_output", "mlp_output")
OF_HEADS: tuple[Component, ...] = ("query_heads", "key_heads", "value_heads")


@pytest.fixture(autouse=True)
def _own_memory() -> Iterator[None]:
    yield
    torch.cuda.empty_cache()


def on_gpu(model: Subject, dtype: str = "float32") -> Subject:
    """The same folder with the package's backend on the GPU; the oracle stays on the CPU."""
    return Subject(LocalBackend.load(model.info.name, dtype=dtype, device="cuda"), model.plain, dtype)


def agree(measured: Measured, say: Say) -> None:
    """Y of every row within a thousandth of the largest effect, which is large enough to be missed."""
    largest = np.abs(measured.effects).max()
    say("largest deviation from the CPU, of the largest effect", measured.deviation / largest)
    assert largest >= LEAST_EFFECT
    assert measured.deviation < CLOSE * largest


def close(found: Any, expected: Any) -> None:
    """Arrays of any numbers within a thousandth of the largest of them."""
    np.testing.assert_allclose(found, expected, rtol=0, atol=CLOSE * np.abs(expected).max())


def map_rows(pair: TokenPair, model: Subject) -> list[Row]:
    """Every component at every span of every layer, in both directions."""
    layers = range(model.info.layers)
    sites = [Site(*which) for which in product(WHOLE, layers, SPANS)]
    sites += [Site("attention_heads", layer, "last", (1, 3)) for layer in layers]
    sites += [Site(part, layer, "edit", (1,)) for part in OF_HEADS for layer in layers]
    if "mlp_neurons" in MODULES[model.info.family]:
        sites += [Site("mlp_neurons", layer, "all", (0, 3, 17)) for layer in layers]
    return [swap(pair, site, base, model.info) for site in sites for base in (0, 1)]


@pytest.mark.parametrize("name", NAMES)
def test_maps(subject: Subjects, name: str, record_property: Say) -> None:
    model, pair = on_gpu(subject(name)), token_pair("pair", edits=(2, 4), answers=(4, 1))
    agree(model.compare([pair], map_rows(pair, model), RESPONSE_LOGPROB), record_property)


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_many_writes(subject: Subjects, name: str, record_property: Say) -> None:
    """Any places and columns, constant and scaled values too: every kind of index that is sent to the GPU."""
    model, pair, rng = on_gpu(subject(name)), token_pair("pair", edits=(3, 1)), np.random.default_rng(1)
    agree(model.compare([pair], random_rows(pair, model.info, rng, 15), LOGIT_DIFF), record_property)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "qwen2_moe", "deepseek_v3"])
def test_parts_of_mixtures(subject: Subjects, name: str, record_property: Say) -> None:
    """Routing, experts, their neurons and the shared expert, against experts written out by hand on the CPU."""
    model, pair = on_gpu(subject(name)), token_pair("pair", edits=(2, 4), answers=(4, 1))
    for part in parts_of(model):
        measured = model.compare([pair], grid(pair, model, part), RESPONSE_LOGPROB, MixtureOracle)
        agree(measured, partial(_of_part, record_property, part))


def _of_part(say: Say, part: str, said: str, value: object) -> None:
    say(f"{part}: {said}", value)


@pytest.mark.parametrize("name", NAMES)
def test_joint(subject: Subjects, name: str, record_property: Say) -> None:
    model, pair = on_gpu(subject(name)), opened(token_pair("pair", edits=(3, 2)))
    sets = [
        [Site("mlp_output", layer, "all") for layer in range(model.info.layers)],
        [*every_contribution(range(1, 2), "all"), Site("layer_output", 0, "edit")],
    ]
    rows = [swap_all(pair, sites, side, model.info) for sites in sets for side in (0, 1)]
    agree(model.compare([pair], rows, REFUSAL), record_property)


@pytest.mark.parametrize("name", NAMES)
def test_direct(subject: Subjects, name: str, tmp_path: Path, record_property: Say) -> None:
    """Without running a layer, and by runs that hold the rest."""
    model, pair = on_gpu(subject(name)), opened(token_pair("pair"))
    sets = [[Site("mlp_output", 1, "last")], every_contribution(range(model.info.layers))]
    found = lab(tmp_path, model, [pair], REFUSAL).direct(sets, [pair])
    rows = [direct_row(pair, sites, side, model.info) for sites in sets for side in (0, 1)]
    measured = model.compare([pair], rows, REFUSAL)
    agree(measured, record_property)
    close(np.stack([found.nie[:, 0], -found.tie[:, 0]], 1).ravel(), measured.effects)


@pytest.mark.parametrize("manner", [GREEDY, GREEDY._replace(held=True), SAMPLED], ids=["greedy", "held", "sampled"])
@pytest.mark.parametrize("name", NAMES)
def test_generation(subject: Subjects, name: str, manner: Manner) -> None:
    """The tokens of the CPU, and their logits; uniform numbers do not depend on the device."""
    here, there = subject(name), on_gpu(subject(name))
    rows = [row for pair in BY_ID.values() for row in (Row(pair.id, 0), Row(pair.id, 1), *swaps(here, pair))]
    expected, found = np.array(sampled(here, rows, manner)), np.array(sampled(there, rows, manner))
    np.testing.assert_array_equal(found[:, 0], expected[:, 0])
    close(found[:, 1], expected[:, 1])
    assert (expected[0, 0] != expected[2:, 0]).any()  # a write changes what is said


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_tasks(subject: Subjects, name: str) -> None:
    """Gradients, activations, weights, answers and losses while neurons are held."""
    here, there = subject(name), on_gpu(subject(name))
    named = task_setting(here)
    readings = [Reading("layer_input", 0, (1, 3)), Reading("mlp_neurons", 2, (0, 2), (1, 5))]
    tasks = [
        *screen_tasks([token_pair("pair", edits=(2, 4))], "mlp_neurons", "last", named, dropping=True),
        read_task("a", PROMPTS[0], readings, named),
        columns_task("mlp_neurons", named),
        generate_task(PROMPTS, 6, HELD, named),
        drift_task("a", PROMPTS[0], (9, 10, 11), HELD, named),
    ]
    for task in tasks:
        close(run_tasks(there, [task])[0], run_tasks(here, [task])[0])


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_deviates_by_so_much(subject: Subjects, name: str, record_property: Say) -> None:
    model, pair = on_gpu(subject(name), "bfloat16"), token_pair("pair", edits=(2, 4), answers=(4, 1))
    rows = map_rows(pair, model)
    measured = model.compare([pair], [Row("pair", 0), Row("pair", 1), *rows], RESPONSE_LOGPROB)
    effects = measured.engine[2:] - measured.engine[[row.base for row in rows]]
    apart = np.abs(effects - measured.effects[2:]).max() / np.abs(measured.effects).max()
    alike = np.corrcoef(effects, measured.effects[2:])[0, 1]
    record_property("bfloat16, largest deviation of an effect, of the largest effect", apart)
    record_property("bfloat16, correlation of the effects", alike)
    assert alike > 0.97


def test_tf32_of_the_caller_changes_no_value() -> None:
    model, products = wide_model("cuda"), torch.backends.cuda.matmul
    pair = token_pair("pair")
    rows = [swap(pair, Site("mlp_output", 0, "all"), base, model.info) for base in (0, 1)]
    expected = measured_by(model, pair, rows, 1e9)
    left, right = torch.randn(2, 512, 512, device="cuda")
    exact = left @ right
    products.allow_tf32 = True
    try:
        np.testing.assert_array_equal(measured_by(model, pair, rows, 1e9), expected)
        assert (left @ right != exact).any()  # it is on, for the caller
    finally:
        products.allow_tf32 = False


@pytest.mark.parametrize("first", ["cuda", "cpu"])
def test_a_model_in_two_places(subject: Subjects, first: str, tmp_path: Path, record_property: Say) -> None:
    """Some layers run on the GPU and some on the CPU, as they would on two GPUs."""
    model, pair = split(subject("llama"), first), opened(token_pair("pair", edits=(2, 4)))
    agree(model.compare([pair], map_rows(pair, model), REFUSAL), record_property)
    sets = [[Site("mlp_output", 1, "last")], every_contribution(range(model.info.layers))]
    found = lab(tmp_path, model, [pair], REFUSAL).direct(sets, [pair])
    rows = [direct_row(pair, sites, 0, model.info) for sites in sets]
    close(found.nie[:, 0], model.compare([pair], rows, REFUSAL).effects)
    screened = screen_tasks([pair], "mlp_output", "last", task_setting(model), dropping=True)
    close(run_tasks(model, screened)[0], run_tasks(subject("llama"), screened)[0])


def split(model: Subject, first: str) -> Subject:
    """The embedding and the first layer in one place, all that follows in the other."""
    module = AutoModelForCausalLM.from_pretrained(model.info.name, dtype=torch.float32).eval()
    where = {"cuda": 0, "cpu": "cpu"}
    early, late = where[first], where["cpu" if first == "cuda" else "cuda"]
    places = {f"model.layers.{layer}": early if layer == 0 else late for layer in range(model.info.layers)}
    places |= {"model.embed_tokens": early, "model.rotary_emb": early, "model.norm": late, "lm_head": late}
    dispatch_model(module, places, main_device="cpu", skip_keys=module._skip_keys_device_placement)
    kinds = {parameter.device.type for parameter in module.parameters()}
    assert kinds == {"cuda", "cpu"}
    tokenizer = AutoTokenizer.from_pretrained(model.info.name)
    traced = TransformersModel(module, tokenizer=tokenizer, task="text-generation")
    return Subject(LocalBackend(traced, model.info), model.plain)


@pytest.mark.parametrize(("device", "found"), [("auto", "cuda"), ("cuda:0", "cuda"), ("cpu", "cpu")])
def test_the_device_asked_for_is_used(subject: Subjects, device: str, found: str) -> None:
    backend = LocalBackend.load(subject("llama").info.name, device=device)
    assert {weight.device.type for weight in backend.model._module.parameters()} == {found}


def test_a_batch_too_large_says_so_and_a_smaller_one_fits() -> None:
    model, pair = wide_model("cuda"), token_pair("pair", before=20, between=20)
    width = range(model.info.d_ff)
    sites = [Site("mlp_neurons", layer, "all", (unit,)) for layer in (0, 1) for unit in width[:400]]
    rows = [swap(pair, site, base, model.info) for site in sites for base in (0, 1)]
    expected = measured_by(model, pair, rows, 4e9)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 0.5e9) / total)
    try:
        with pytest.raises(OutOfMemoryError, match="smaller --max-memory"):
            measured_by(model, pair, rows, 4e9)
        torch.cuda.empty_cache()
        close(measured_by(model, pair, rows, 0.1e9), expected)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def wide_model(device: str) -> Subject:
    """Two layers wide enough for a batch to be hundreds of MB."""
    torch.manual_seed(0)
    shape = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 2, "num_attention_heads": 8}
    config = AutoConfig.for_model("llama", **shape, num_key_value_heads=8, vocab_size=64)
    with torch.device(device):
        module = AutoModelForCausalLM.from_config(config).eval()
    traced = TransformersModel(module, tokenizer=words_tokenizer(), task="text-generation", device=device)
    return Subject(LocalBackend(traced, info_of(config, "wide")), module)


def measured_by(model: Subject, pair: TokenPair, rows: Sequence[Row], batch_bytes: float) -> np.ndarray:
    return model.measure([pair], rows, LOGIT_DIFF, batch_bytes=batch_bytes)
