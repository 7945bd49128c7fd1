"""Every model family against the oracle: every component, position, direction and outcome; and what the table says."""

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from oracle import LOGIT_DIFF, RESPONSE_LOGPROB, TOLERANCE, WINDOWED, Subject, token_pair
from packaging.version import Version
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from remote_mediation.engine.local import LocalBackend
from remote_mediation.engine.program import module_at
from remote_mediation.engine.rows import Constant, Row, Source, Write, swap
from remote_mediation.errors import SiteError
from remote_mediation.models import info_of, load_info
from remote_mediation.outcomes import Outcome
from remote_mediation.sites import (
    FAMILIES,
    HEAD_COMPONENTS,
    NOT_COVERED,
    PROJECTED_HEADS,
    Columns,
    Component,
    Hook,
    ModelInfo,
    Site,
    check_site,
)
from remote_mediation.tokens import SPANS, TokenPair

Subjects = Callable[[str], Subject]

# Variants whose blocks are wired in another way; the others differ in what the engine gives them.
WIRED = ("gpt_neox_sequential", "falcon_sequential", "falcon_new", "stablelm_parallel")
VARIANTS = (
    "llama_chat",
    "gpt2_narrow",
    "gpt_neox_sequential",
    "qwen2_window",
    "phi3_window",
    "gemma2_window",
    "gemma3_text_window",
    "exaone4_window",
    "stablelm_parallel",
    "falcon_sequential",
    "falcon_new",
)
MIXTURES = tuple(name for name, family in FAMILIES.items() if family.mixture)
# Models that write attention out: gemma2 caps its logits, gpt_oss adds sinks to them, and gptj had nothing else.
WRITTEN_OUT = ("gemma2", "gpt_oss", *(("gptj",) if Version(transformers.__version__) < Version("5.24") else ()))
UNITS: tuple[tuple[Component, tuple[int, ...]], ...] = (
    ("layer_output", ()),
    ("attention_output", ()),
    ("mlp_output", ()),
    ("mlp_neurons", tuple(range(8, 32))),
    ("mlp_neurons", (0, 3, 5, 6, 17, 30, 39)),
    ("attention_heads", (1,)),
    ("attention_heads", (0, 3)),
    ("query_heads", ()),
    ("query_heads", (1,)),
    ("key_heads", ()),
    ("key_heads", (1,)),
    ("value_heads", ()),
    ("value_heads", (1,)),
)
POSITIONS = (*SPANS, "edit[-1]", "after_edit[0]", "post_instruction[-1]")
# Positions that hold the token where the answer is read; elsewhere the last layer's values reach no answer.
READ = ("last", "all", "post_instruction", "post_instruction[-1]")


def grid(pair: TokenPair, subject: Subject) -> list[Row]:
    """Every choice of units at every position, in both directions; the layer changes from site to site."""
    rows = []
    there = FAMILIES[subject.info.family].hooks
    units_here = [
        (name, units) for name, units in UNITS if name in there and max((0, *units)) < subject.info.width(name)
    ]
    for number, ((component, units), position) in enumerate(product(units_here, POSITIONS)):
        below = subject.info.layers - (position not in READ)
        layers = [layer for layer in subject.info.layers_with(component) if layer < below]
        layer = layers[number % len(layers)]
        rows += [swap(pair, Site(component, layer, position, units), base, subject.info) for base in (0, 1)]
    return rows


@pytest.mark.parametrize("edits", [(2, 2), (2, 4)], ids=["equal", "unequal"])
@pytest.mark.parametrize(
    ("outcome", "answers"), [(LOGIT_DIFF, (0, 0)), (RESPONSE_LOGPROB, (4, 1))], ids=["logit_diff", "response_logprob"]
)
@pytest.mark.parametrize("family", [*FAMILIES, *WIRED])
def test_every_site_is_measured_as_the_oracle_does(
    subject: Subjects, family: str, outcome: Outcome, answers: tuple[int, int], edits: tuple[int, int]
) -> None:
    model, pair = subject(family), token_pair("pair", edits=edits, answers=answers)
    measured = model.compare([pair], grid(pair, model), outcome)
    largest = np.abs(measured.effects).max()
    assert largest >= 0.1
    assert measured.deviation < TOLERANCE * largest
    assert measured.felt() > 0.5  # queries and keys of some tokens do little


@pytest.mark.parametrize("family", [*FAMILIES, *WIRED])
def test_effects_in_bfloat16_are_those_of_float32(subject: Subjects, family: str) -> None:
    whole = FAMILIES[subject(family).info.family].mixture is None  # else a token may go to another expert in bfloat16
    assert bfloat16_correlation(subject(family)) > (0.97 if whole else 0.9)


def bfloat16_correlation(model: Subject) -> float:
    """Correlation over all sites of the engine's effects in bfloat16 with the oracle's in float32."""
    low = Subject(LocalBackend.load(model.info.name, dtype="bfloat16"), model.plain, "bfloat16")
    pair = token_pair("pair", edits=(2, 4), answers=(4, 1))
    rows = grid(pair, model)
    measured = low.compare([pair], [Row("pair", 0), Row("pair", 1), *rows], RESPONSE_LOGPROB)
    effects = measured.engine[2:] - measured.engine[[row.base for row in rows]]
    return float(np.corrcoef(effects, measured.effects[2:])[0, 1])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_hook_moved_by_one_module_is_noticed(subject: Subjects, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, pair, row = subject(family), token_pair("pair", edits=(2, 4)), FAMILIES[family]
    layers = [layer for layer in model.info.layers_with("attention_heads") if layer < 2]
    block = module_at(model.plain, row.blocks)[-1]
    moved: dict[Component, Hook] = {
        "attention_output": row.mlp_output,
        "mlp_output": row.attention_output,
        "attention_heads": Hook(wide_module(block, row.attention_heads, model.info.heads * model.info.d_head)),
    }
    if row.mlp_neurons is not None:
        moved["mlp_neurons"] = Hook(wide_module(block, row.mlp_neurons, model.info.d_ff))
    if row.key_heads is not None and row.projection in ("apart", "gated"):
        moved |= {"key_heads": row.value_heads, "value_heads": row.key_heads}
    if row.query_heads is not None and row.projection == "apart":
        moved["query_heads"] = row.attention_heads
    # Constants: a whole vector exchanged before the activation function is the same as exchanged after it, and a
    # vector scaled before a post-norm leaves it as it was.
    for component, hook in moved.items():
        columns = tuple(range(model.info.tensor_width(component)))
        value = Constant(tuple(map(float, np.random.default_rng(0).normal(size=len(columns)))))
        writes = [Write(component, layer, (4, 5), columns, value) for layer in layers]
        rows = [Row("pair", base, (write,)) for write in writes for base in (0, 1)]
        right = model.compare([pair], rows, LOGIT_DIFF)
        monkeypatch.setitem(FAMILIES, family, replace(row, **{component: hook}))
        wrong = model.compare([pair], rows, LOGIT_DIFF)
        monkeypatch.setitem(FAMILIES, family, row)
        largest = np.abs(right.effects).max()
        assert right.deviation < TOLERANCE * largest
        assert wrong.deviation > 100 * TOLERANCE * largest


def beside_others() -> list[tuple[str, Component]]:
    """Families and what shares the output of a module in them."""
    parts = {"apart": (), "joined": PROJECTED_HEADS, "grouped": PROJECTED_HEADS, "gated": PROJECTED_HEADS[:1]}
    families = {name: row.projection for name, row in FAMILIES.items()} | {"falcon_new": FAMILIES["falcon"].projection}
    return [(name, component) for name, projection in families.items() for component in parts[projection]]


@pytest.mark.parametrize(("family", "component"), beside_others())
def test_columns_moved_within_a_projection_are_noticed(
    subject: Subjects, family: str, component: Component, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, pair = subject(family), token_pair("pair", edits=(2, 4))
    layer, columns = model.info.layers_with(component)[0], ModelInfo.columns_within
    rows = [swap(pair, Site(component, layer, "all"), base, model.info) for base in (0, 1)]
    right = model.compare([pair], rows, LOGIT_DIFF)

    def by_a_head(info: ModelInfo, name: Component) -> Columns | None:
        found = columns(info, name)
        shift = -info.d_head if name == "value_heads" else info.d_head
        return found._replace(first=found.first + shift) if found else None

    monkeypatch.setattr(ModelInfo, "columns_within", by_a_head)
    wrong = model.compare([pair], rows, LOGIT_DIFF)
    largest = np.abs(right.effects).max()
    assert right.deviation < TOLERANCE * largest
    assert wrong.deviation > 100 * TOLERANCE * largest


@pytest.mark.parametrize("family", ["olmo2", "olmo3", "olmoe"])
def test_a_key_head_under_a_norm_of_all_heads_leaves_the_others_as_they_are(subject: Subjects, family: str) -> None:
    """A head's keys as attention gets them: those of head 0, by its query heads, do not change with those of head 1."""
    model, pair = subject(family), token_pair("pair")
    found = []
    for value in (0.0, 100.0):
        constant = Constant((value,) * model.info.d_head)
        columns = model.info.columns("key_heads", (1,))
        write = Write("key_heads", 0, pair.places("all")[0], columns, constant)
        found.append(Row("pair", 0, (write, hold_others(pair, model))))
    first, second = model.measure([pair], found, LOGIT_DIFF)
    assert first == second


def hold_others(pair: TokenPair, model: Subject) -> Write:
    """The query heads of key head 1 as they are in the base run."""
    group = range(model.info.heads // 2, model.info.heads)
    columns, places = model.info.columns("attention_heads", tuple(group)), pair.places("all")[0]
    return Write("attention_heads", 0, places, columns, Source(0, places))


def wide_module(block: nn.Module, hook: Hook, width: int) -> str:
    """The first projection beside a hook's module that is at least as wide as what the hook reads."""
    parent, _, own = hook.path.rpartition(".")
    for name, module in block.get_submodule(parent).named_children():
        weight = getattr(module, "weight", None)
        if name != own and weight is not None and weight.dim() == 2 and max(weight.shape) >= width:
            return f"{parent}.{name}"
    raise AssertionError(f"nothing beside {hook.path} is {width} wide")


@pytest.mark.parametrize("family", FAMILIES)
def test_default_attention_is_the_fused_one_unless_logits_are_capped(subject: Subjects, family: str) -> None:
    # What the engine's additive mask meets: scaled_dot_product_attention, or for gemma2 attention written out, with
    # the mask added after the soft cap. The tiny gemma2 caps at 3, so its logits are far into the bend.
    model = subject(family)
    assert model.backend._model.config._attn_implementation == ("eager" if family in WRITTEN_OUT else "sdpa")
    assert model.plain.config._attn_implementation == "eager"


@pytest.mark.parametrize("name", [*FAMILIES, *VARIANTS])
def test_attention_and_mlp_add_up_to_the_layer(subject: Subjects, name: str) -> None:
    """Stream in, plus what attention and MLP add to it, is stream out: the table's components are whole."""
    model = subject(name).plain
    for block in module_at(model, FAMILIES[model.config.model_type].blocks):
        assert missing_share(seen_in(model, block), subject(name).info.multiplier) < 1e-5


@pytest.mark.parametrize("name", [*FAMILIES, *VARIANTS])
def test_info_is_the_shape_of_the_weights(subject: Subjects, name: str) -> None:
    model, info = subject(name).plain, subject(name).info
    blocks = module_at(model, FAMILIES[info.family].blocks)
    seen, head = seen_in(model, blocks[0]), model.get_output_embeddings().weight
    keys = model(input_ids=torch.tensor([[7, 8, 9]])).past_key_values.layers[0].keys
    assert info.layers == len(blocks)
    assert (info.vocab, info.d_model) == tuple(head.shape)
    assert info.heads * info.d_head == seen["attention_heads"].shape[-1]
    if "key_heads" in seen and FAMILIES[info.family].projection == "apart":
        assert info.shared_heads * info.d_head == seen["key_heads"].shape[-1] == seen["value_heads"].shape[-1]
        assert info.heads * info.d_head == seen["query_heads"].shape[-1]
    if not name.startswith("deepseek"):  # keeps one compressed vector in place of keys and values
        assert (info.kv_heads, info.d_head) == (keys.shape[1], keys.shape[3])
    if name not in MIXTURES:
        mlp = blocks[0].feed_forward if name == "lfm2" else blocks[0].mlp
        matrices = sum(weight.numel() for weight in mlp.parameters() if weight.dim() == 2)
        assert info.d_ff == seen["mlp_neurons"].shape[-1]
        assert matrices == (3 if info.gated else 2) * info.d_model * info.d_ff
    assert info.tied == (head.data_ptr() == model.get_input_embeddings().weight.data_ptr())


@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_knows_what_runs_from_what_is_stored(subject: Subjects, name: str) -> None:
    model, info = subject(name).plain, subject(name).info
    weights = dict(module_at(model, FAMILIES[name].blocks)[-1].named_parameters())
    experts, stored = 0, 0
    for path, weight in weights.items():
        if path.endswith("experts.down_proj"):
            experts, _, width = weight.shape if name != "gpt_oss" else (len(weight), None, weight.shape[1])
            stored += experts * width
        elif "shared" in path and path.endswith("down_proj.weight"):
            stored += weight.shape[1]
    assert info.stored_ff == stored
    assert info.d_ff == stored - (experts - model.config.num_experts_per_tok) * width


@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_has_no_neurons_and_says_so(subject: Subjects, name: str) -> None:
    info, pair = subject(name).info, token_pair("pair")
    site = Site("mlp_neurons", 1, "last", (3,))
    for ask in (lambda: check_site(site, info), lambda: swap(pair, site, 0, info)):
        with pytest.raises(SiteError, match=f"has no mlp_neurons: a layer of a mixture of experts .{name}"):
            ask()


@pytest.mark.parametrize("component", PROJECTED_HEADS)
@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3"])
def test_what_latent_attention_reads_is_no_head(subject: Subjects, name: str, component: Component) -> None:
    info, pair = subject(name).info, token_pair("pair")
    site = Site(component, 1, "last", (0,))
    for ask in (lambda: check_site(site, info), lambda: swap(pair, site, 0, info)):
        with pytest.raises(SiteError, match=f"has no {component}: (attention|a query) of {name} (makes|is wider)"):
            ask()


def missing_share(seen: dict[str, Tensor], multiplier: float) -> float:
    """How far a block's output is from its input and contributions, relative to the output's largest entry."""
    added = (seen["attention_output"] + seen["mlp_output"]) * multiplier
    missing = seen["layer_input"] + added - seen["layer_output"]
    return float(missing.abs().max() / seen["layer_output"].abs().max())


def seen_in(model: PreTrainedModel, block: nn.Module) -> dict[str, Tensor]:
    """Every component of one block by the package's table, and the block's input, on a plain run."""
    family, seen = FAMILIES[model.config.model_type], {}

    def watch(name: str, hook: Hook) -> Any:
        def see(_: nn.Module, args: tuple[Any, ...], output: Any = None) -> None:
            value = args[0] if hook.side == "input" else output
            seen[name] = (value if hook.item is None else value[hook.item]).clone()  # Falcon adds to it in place

        module = module_at(block, hook.path)
        return module.register_forward_pre_hook(see) if hook.side == "input" else module.register_forward_hook(see)

    hooks: dict[str, Hook] = {**family.hooks, "layer_input": Hook("", "input")}
    if family.mixer is not None and not hasattr(block, "self_attn"):
        hooks["attention_output"] = family.mixer
        for name in HEAD_COMPONENTS:
            del hooks[name]
    handles = [watch(name, hook) for name, hook in hooks.items()]
    with torch.no_grad():
        model(input_ids=torch.tensor([[7, 8, 9, 10, 11, 12, 13, 14]]), use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def test_sliding_layers_are_those_of_the_configuration(subject: Subjects) -> None:
    found = {name: (subject(name).info.sliding, subject(name).info.window) for name in [*FAMILIES, *VARIANTS]}
    assert found["qwen2"] == found["qwen3"] == found["phi3"] == found["llama"] == found["gpt2"] == ((), None)
    assert found["mistral"] == found["gemma3_text"] == ((0, 1, 2), 4096)
    assert found["gemma2"] == ((0, 2), 4096)
    assert found["qwen2_window"] == ((1, 2), 6)
    assert found["phi3_window"] == ((0, 1, 2), 6)
    windowed = {name: subject(name).info.sliding for name in WINDOWED}
    assert windowed["smollm3_window"] == (1,)
    assert windowed["qwen2_moe_window"] == (0, 2)
    assert windowed["ministral3_window"] == windowed["mixtral_window"] == windowed["qwen3_moe_window"] == (0, 1, 2)
    assert found["gemma2_window"] == found["gemma3_text_window"] == ((0, 2), 6)


def test_a_window_that_transformers_does_not_read_is_none() -> None:
    config = AutoConfig.for_model("llama", sliding_window=6, layer_types=["sliding_attention"] * 32)
    assert (info_of(config, "some/llama").sliding, info_of(config, "some/llama").window) == ((), None)


def test_unknown_family_names_the_row_to_add(tmp_path: Path) -> None:
    config = AutoConfig.for_model("xglm")
    config.save_pretrained(tmp_path)
    for ask in (lambda: info_of(config, "some/xglm"), lambda: load_info(str(tmp_path))):
        with pytest.raises(
            SiteError, match=r"'xglm'.*known: apertus, .*add a row FAMILIES\['xglm'\] = Family\(.*sites\.py"
        ):
            ask()


@pytest.mark.parametrize("family", NOT_COVERED)
def test_a_family_that_cannot_be_studied_says_why(family: str) -> None:
    with pytest.raises(SiteError, match=f"'{family}' cannot be studied: its "):
        info_of(AutoConfig.for_model(family), "some/model")
    assert family not in FAMILIES


def test_a_variant_that_cannot_be_studied_says_why() -> None:
    with pytest.raises(SiteError, match="some/falcon has alibi = True and cannot be studied: its attention biases"):
        info_of(AutoConfig.for_model("falcon", alibi=True), "some/falcon")


def test_a_model_that_looks_ahead_is_refused() -> None:
    config = AutoConfig.for_model("gemma3_text", use_bidirectional_attention=True)
    with pytest.raises(SiteError, match="both directions"):
        info_of(config, "some/encoder")
