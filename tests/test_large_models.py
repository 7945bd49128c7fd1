"""Models that no test machine could hold: `plan` from their configuration, and the program on shapes alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import WORDS, records, token_pair, words_tokenizer, write_pairs
from nnsight import TransformersModel
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM

from remote_mediation.config import StudyConfig
from remote_mediation.cost import estimate
from remote_mediation.engine import program
from remote_mediation.engine.budget import Budget, Setting, weight_bytes
from remote_mediation.engine.jobs import Keys, plan_jobs
from remote_mediation.engine.rows import swap
from remote_mediation.models import load_info
from remote_mediation.outcomes import ResponseOutcome
from remote_mediation.sites import Site

LLAMA_3_1 = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}
# Published shapes (the models' config.json) and parameter counts.
SIZES: dict[str, tuple[dict[str, int], float]] = {
    "70B": (
        {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
        70.55e9,
    ),
    "405B": (
        {"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "num_attention_heads": 128},
        405.85e9,
    ),
}


@pytest.fixture(params=list(SIZES))
def large(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, float]:
    """A folder with a configuration and a tokenizer, and the parameter count."""
    shape, parameters = SIZES[request.param]
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA_3_1, **shape}))
    words_tokenizer(chat=True).save_pretrained(tmp_path)
    return tmp_path, parameters


def study(folder: Path, **settings: Any) -> StudyConfig:
    pairs = write_pairs(folder / "pairs.jsonl", records())
    defaults = {
        "analyses": ["layers", "modules", "neurons"],
        "outcome": "response_logprob",
        "neurons": {"exact": 256},
    }
    return StudyConfig(
        model=str(folder), pairs=str(pairs), backend="ndif", dtype="bfloat16", **{**defaults, **settings}
    )


@pytest.mark.slow
def test_the_plan_of_a_large_model(large: tuple[Path, float]) -> None:
    folder, parameters = large
    found = estimate(study(folder))
    info = load_info(str(folder))
    # Two bytes per parameter; norms (one part in 10,000) are not counted.
    assert found.weights == pytest.approx(2 * parameters, rel=1e-3)
    assert weight_bytes(info, "float32") == 2 * found.weights
    checks, sites = 3, 3 + 2 + 1  # per layer: the stream at 3 positions, 2 modules, all neurons
    assert found.rows == 6 * 2 * (info.layers * sites + checks)
    # Every row runs its part of the model: no fewer operations than half of the layers, no more than all of them.
    tokens = len(WORDS.split())
    assert (
        found.rows * parameters * 0.2
        < found.flops
        < (found.rows + found.later["neurons"].rows) * 2 * parameters * tokens * 2
    )
    assert found.jobs > 1
    # What crosses the wire grows with rows, not with the model.
    screened = 4 * 4 * info.layers * info.d_ff  # one sum over all pairs
    assert found.later["neurons"].down > screened
    assert found.down < screened + 4 * 16 * (found.rows + found.later["neurons"].rows) + 5000 * found.jobs
    assert found.up < 60_000 * found.jobs + 400 * found.rows
    described = dict(found.described())
    assert "MB down" in described["over NDIF"]
    assert "any size" in described["client memory"]


@pytest.mark.slow
def test_the_program_fits_the_shapes_of_a_large_model(large: tuple[Path, float]) -> None:
    """The whole program, every component and both kinds of base run, on tensors that have shapes and no memory."""
    folder, parameters = large
    info, pair = load_info(str(folder)), token_pair(answers=((5, 6, 7), (8, 9)))
    top = info.layers - 1
    sites = [
        Site("layer_output", 10, "last"),
        Site("mlp_output", 20, "all"),
        Site("mlp_neurons", top // 2, "all", (1, info.d_ff - 1)),
        Site("attention_output", top - 1, "edit"),
        Site("attention_heads", top, "last", (info.heads - 1,)),
    ]
    rows = [swap(pair, site, side, info) for site in sites for side in (0, 1)]
    setting = Setting(info, "bfloat16", ResponseOutcome())
    budget = Budget(lambda: 1e30, 1e15)
    (job,) = plan_jobs(rows, {pair.id: pair}, setting, budget, Keys(setting, [pair]))
    with FakeTensorMode(allow_non_fake_inputs=True):
        weights = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16).eval()
        model = TransformersModel(weights, tokenizer=words_tokenizer(chat=True), task="text-generation")
        values, *_ = program.execute(model, job.payload)
        kind, *_ = program.execute(model, {"task": "probe", "blocks": "model.layers"})
    assert sum(weight.numel() for weight in weights.parameters()) == pytest.approx(parameters, rel=1e-3)
    assert values.shape == (2 + len(rows), 5)
    assert (values.dtype, kind.dtype) == (torch.float32, torch.bfloat16)
