"""Models built from configurations alone: what is covered, what is not, and a row that names what is not there."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from oracle import Subject
from transformers import AutoConfig

from remote_mediation.engine.coverage import check_model, examine, family_lines
from remote_mediation.models import info_of
from remote_mediation.sites import FAMILIES, NOT_COVERED, Hook

Subjects = Callable[[str], Subject]


def test_every_family_has_a_line() -> None:
    lines = {line.family: line for line in family_lines()}
    assert set(lines) == {*FAMILIES, *NOT_COVERED}
    assert lines["llama"].components == {
        "layer_output": "model.layers[i]",
        "query_heads": "output of self_attn.q_proj",
        "key_heads": "output of self_attn.k_proj",
        "value_heads": "output of self_attn.v_proj",
        "attention_heads": "input of self_attn.o_proj",
        "attention_output": "output of self_attn",
        "mlp_neurons": "input of mlp.down_proj",
        "mlp_output": "output of mlp",
    }
    assert lines["olmo2"].components["key_heads"] == "output of self_attn.k_norm"
    assert lines["phi3"].components["value_heads"] == "its columns of the output of self_attn.qkv_proj"
    assert lines["deepseek_v2"].components["query_heads"] == "none: wider than what a head gives"
    assert lines["qwen3_next"].components["query_heads"].startswith("its columns of the output of self_attn.q_proj;")
    for name in ("key_heads", "value_heads"):
        assert lines["deepseek_v3"].components[name] == "none: attention makes them anew in every pass, of all tokens"
    assert lines["qwen3_next"].components["key_heads"].endswith("k_proj; none in layers without softmax attention")
    assert lines["granite"].components["mlp_output"] == "output of mlp x residual_multiplier"
    assert lines["mixtral"].components["mlp_neurons"] == "none: a mixture of experts"
    assert lines["mixtral"].components["expert_neurons"].startswith("one neuron of an expert of mlp.experts, weighted")
    assert lines["mixtral"].components["router"] == "weights that enter mlp.experts, 0 for experts not chosen"
    assert lines["mixtral"].components["shared_expert_output"] == "none: no expert always runs"
    assert lines["lfm2"].components["attention_heads"] == (
        "input of self_attn.out_proj; none in layers without softmax attention"
    )
    assert lines["lfm2"].components["attention_output"] == (
        "output of self_attn; output of conv in layers without softmax attention"
    )
    shared = lines["qwen2_moe"].components["shared_expert_output"]
    assert shared == "mlp.shared_expert x sigmoid of mlp.shared_expert_gate"
    assert all(line.reason == NOT_COVERED.get(name, "") for name, line in lines.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_is_checked_from_its_configuration(subject: Subjects, family: str) -> None:
    model = subject(family)
    found = check_model(model.info.name)
    assert found.covered, found.reason
    assert found.model_class == type(model.plain).__name__
    assert found.parameters == sum(weight.numel() for weight in model.plain.parameters())
    assert (found.active < found.parameters) == (FAMILIES[family].mixture is not None)


def test_weights_that_run_for_a_token_in_a_mixture() -> None:
    # Mixtral 8x7B as its makers describe it: 46.7 billion parameters, 12.9 billion of them for a token.
    config = AutoConfig.for_model("mixtral", rope_parameters={"rope_theta": 1e6, "rope_type": "default"})
    found = examine(config, info_of(config, "mixtral"))
    assert (round(found.parameters / 1e9, 1), round(found.active / 1e9, 1)) == (46.7, 12.9)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"mlp_output": Hook("feed_forward")}, "layer 0 has no feed_forward, where mlp_output is read"),
        (
            {"mlp_neurons": Hook("self_attn.q_proj", "input")},
            "self_attn.q_proj of layer 0 is (48, 32), and should be 40 wide for mlp_neurons",
        ),
        (
            {"key_heads": Hook("self_attn.q_proj")},
            "self_attn.q_proj of layer 0 is (48, 32), and should be 24 wide for key_heads",
        ),
        (
            {"projection": "joined"},
            "self_attn.q_proj of layer 0 is (48, 32), and should be 96 wide for query_heads",
        ),
    ],
)
def test_a_row_that_names_what_is_not_there(
    subject: Subjects, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], reason: str
) -> None:
    monkeypatch.setitem(FAMILIES, "llama", replace(FAMILIES["llama"], **change))
    found = check_model(subject("llama").info.name)
    assert not found.covered
    assert reason in found.reason


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"module": "mlp.many"}, "layer 1 has no mlp.many, the configuration says otherwise"),
        ({"dense_first": ""}, "layer 0 has no mlp.experts, the configuration says otherwise"),
        ({"experts": "num_hidden_layers"}, "layer 1 has 4 experts, the configuration says 3"),
        ({"width": "hidden_size"}, "experts of layer 1 have 24 neurons, the configuration says 32"),
        ({"shared_gate": "mlp.gates"}, "layer 1 has no mlp.gates, which shared_expert_output is made of"),
    ],
)
def test_a_row_that_names_experts_that_are_not_there(
    subject: Subjects, monkeypatch: pytest.MonkeyPatch, change: dict[str, str], reason: str
) -> None:
    row = FAMILIES["deepseek_v3"]
    assert row.mixture is not None
    monkeypatch.setitem(FAMILIES, "deepseek_v3", replace(row, mixture=row.mixture._replace(**change)))
    found = check_model(subject("deepseek_v3").info.name)
    assert not found.covered
    assert reason in found.reason


def test_a_family_that_is_not_covered(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bloom"}), "utf-8")
    found = check_model(str(tmp_path))
    assert not found.covered
    assert found.lines() == [
        f"{tmp_path} cannot be studied: model family 'bloom' cannot be studied: {NOT_COVERED['bloom']}"
    ]
