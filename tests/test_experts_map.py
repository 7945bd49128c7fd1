"""The map of experts: what it measures, what it leaves out because it is 0, its tables, figure, section and cost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fakes import Counting, records, write_pairs
from mixture_oracle import MixtureOracle
from oracle import Subject, token_pair
from test_tasks import run, setting
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import remote_mediation as rm
from remote_mediation.analyses.experts import ask, show
from remote_mediation.cost import estimate
from remote_mediation.engine.tasks import routing_task
from remote_mediation.errors import SiteError

Subjects = Callable[[str], Subject]


def study(folder: Path, model: Subject, **settings: object) -> rm.StudyConfig:
    pairs = write_pairs(folder / "pairs.jsonl", records())
    openings = {"compliant": ["sure", "yes"], "refusing": ["sorry", "no"]}
    return rm.StudyConfig(
        model=model.info.name,
        pairs=str(pairs),
        refusal=openings,
        statistics={"resamples": 100},
        analyses=["experts"],
        **settings,
    )


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
@pytest.mark.parametrize("position", ["last", "edit", "all"])
def test_the_routing_is_that_of_the_plain_model(subject: Subjects, family: str, position: str) -> None:
    model, pair = subject(family), token_pair("pair", edits=(2, 4))
    (found,) = run(model, [routing_task(pair, position, setting(model))])
    oracle, info = MixtureOracle(model.plain, pair), model.info
    for side, layers in enumerate(found.reshape(2, len(info.routed), info.experts)):
        for layer, weights in zip(info.routed, layers, strict=True):
            at = list(pair.places(position)[side])
            expected = oracle._recorded[side, 0]["parts", layer].routing[at].mean(0)
            np.testing.assert_allclose(weights, expected, atol=1e-5)


@pytest.mark.parametrize("family", ["mixtral_chat", "qwen2_moe_chat"])
def test_a_run_has_every_expert_that_runs_and_the_others_do_nothing(
    subject: Subjects, tmp_path: Path, family: str
) -> None:
    model = subject(family)
    with rm.open_lab(study(tmp_path, model), out=tmp_path / "run", backend=model.backend) as lab:
        result = lab.run()
        report = lab.report().read_text("utf-8")
        every = [rm.Site("expert_output", 1, "last", (number,)) for number in range(4)]
        size = model.info.expert_ff
        neurons = [tuple(range(number * size, (number + 1) * size)) for number in range(4)]
        by_neurons = lab.effects([rm.Site("expert_neurons", 1, "last", units) for units in neurons])
        measured = lab.effects(every)
    effects = result.effects[result.effects["analysis"] == "experts"]
    single = effects[effects["component"] == "expert_output"]
    kinds = {"router", "expert_output"} | ({"shared_expert_output"} if "qwen2" in family else set())
    assert set(effects["component"]) == kinds
    assert set(single.groupby(["layer", "unit_start"])["pair_id"].nunique()) == {len(lab.pairs())}

    key = ["pair_id", "layer", "unit_start"]
    both = measured.merge(single, on=key, how="left", suffixes=("", "_map"))
    for name in ("nie", "tie"):
        np.testing.assert_allclose(both[name], both[f"{name}_map"].fillna(0), atol=1e-4)
    assert both["nie"].abs().max() > 0.01
    assert set(by_neurons["unit_stop"]) == {size, 2 * size, 3 * size, 4 * size}
    for name in ("nie", "tie"):
        np.testing.assert_allclose(by_neurons[name], measured[name], atol=1e-4)
    routing = pd.read_csv(tmp_path / "run/experts.csv")
    assert list(routing.columns) == list(ask.EXPERT_COLUMNS)
    assert len(routing) == len(single[["layer", "unit_start"]].drop_duplicates())
    assert (tmp_path / "run/figures/experts.png").is_file()
    assert "## Experts" in report
    assert "A token is routed to 2 of 4 experts in each of 3 layers; at 'last'" in report
    assert rm.open_run(tmp_path / "run").result().tables["experts.csv"].equals(result.tables["experts.csv"])


def test_experts_that_no_prompt_is_routed_to_are_not_run(subject: Subjects, tmp_path: Path) -> None:
    model = subject("mixtral_chat")
    with rm.open_lab(study(tmp_path, model), out=tmp_path / "run", backend=model.backend) as lab:
        result = lab.run()
    single = result.effects[result.effects["component"] == "expert_output"]
    idle = single[(single["y_base_patched"] == single["y_base"]) & (single["y_source_patched"] == single["y_source"])]
    assert 0 < len(idle) < len(single)


def test_the_cost_is_an_upper_bound_and_tells_what_runs_from_what_is_stored(subject: Subjects, tmp_path: Path) -> None:
    model = subject("mixtral_chat")
    config = study(tmp_path, model)
    planned = estimate(config)
    counting = Counting(model.backend)
    with rm.open_lab(config, out=tmp_path / "run", backend=counting) as lab:
        lab.run()
    assert planned.rows < counting.rows <= planned.rows + planned.later["experts"].rows
    assert counting.flops <= planned.flops
    assert planned.running < planned.weights
    weights = dict(planned.described())["weights"]
    assert weights.endswith("GB run for a token")


def test_a_model_without_experts_is_refused_by_name(subject: Subjects, tmp_path: Path) -> None:
    model = subject("llama_chat")
    with (
        rm.open_lab(study(tmp_path, model), out=tmp_path / "run", backend=model.backend) as lab,
        pytest.raises(SiteError, match="has no expert_output: llama is no mixture of experts"),
    ):
        lab.run()


def test_all_claims_but_that_of_neurons_are_put_to_a_mixture(subject: Subjects, tmp_path: Path) -> None:
    shallow, deep = subject("qwen2_moe_chat"), tmp_path / "deep"
    shape = AutoConfig.from_pretrained(shallow.info.name)
    shape.num_hidden_layers, shape.layer_types = 6, ["full_attention"] * 6
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(shape).save_pretrained(deep)
    AutoTokenizer.from_pretrained(shallow.info.name).save_pretrained(deep)
    config = study(tmp_path, shallow).model_copy(update={"model": str(deep), "analyses": ["claims", "rivals"]})
    planned, counting = estimate(config), Counting(rm.LocalBackend.load(str(deep)))
    with rm.open_lab(config, out=tmp_path / "run", backend=counting) as lab:
        result = lab.run()
        report = lab.report().read_text("utf-8")
    why = "a mixture of experts has no MLP whose neurons could be named"
    claims = result.tables["claims.csv"].set_index("number")
    assert list(claims.index[claims["why"] == why]) == [3]
    assert claims.loc[3, "said"] == "not tested"
    assert set(result.tables["sets.csv"]["number"]) == {1, 2, 4, 5}
    assert why in report
    assert "gate_sets.csv" not in result.tables
    assert counting.flops <= planned.flops


def test_the_routing_table_has_those_whose_routing_changes_most() -> None:
    rows = [
        ("last", 1, expert, 8, x0, x1, x0 / 16, x1 / 16) for expert, (x0, x1) in enumerate([(4, 4), (1, 7), (3, 5)])
    ]
    table = show.routing_table(pd.DataFrame(rows, columns=list(ask.EXPERT_COLUMNS)))
    assert [row[0] for row in table.rows] == [f"expert {number}, layer 1 at 'last'" for number in (1, 2, 0)]
    assert table.rows[0][1:] == ("1 of 8", "7 of 8", "0.062", "0.438")
