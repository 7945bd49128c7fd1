"""Ablation and addition while generating, in a model in which a direction is known to gate refusal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch
from fakes import Counting
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import remote_mediation as rm
from remote_mediation import cost
from remote_mediation.analyses.ablation.ask import ABLATION_COLUMNS, beside, conditions_of
from remote_mediation.analyses.ablation.show import sections
from remote_mediation.config import StudyConfig
from remote_mediation.cost import estimate
from remote_mediation.engine.local import LocalBackend
from remote_mediation.engine.tasks import Ablated, Added
from remote_mediation.planted.cases import CASES, Specimen, build
from remote_mediation.planted.selfcheck import written
from remote_mediation.planted.words import MINUS, PLUS, VOCABULARY
from remote_mediation.result import Result
from remote_mediation.subspaces import Basis, Direction

# It errs on purpose: of the labelled answers it finds 3 of 4 that comply, and lets 4 of 5 others pass.
JUDGE = """
def complies(prompts, answers):
    return [answer.split()[:1] == ["sure"] for answer in answers]
"""
LABELLED = [("sure", 1)] * 15 + [("sorry", 1)] * 5 + [("sure", 0)] * 4 + [("sorry", 0)] * 16
FOUND = "the direction"


class Ran(NamedTuple):
    result: Result
    folder: Path
    study: StudyConfig
    backend: Counting

    def row(self, direction: str, done: str, prompts: str) -> pd.Series:
        table = self.result.tables["ablation.csv"]
        found = (table["direction"] == direction) & (table["done"] == done) & (table["prompts"] == prompts)
        return table[found].iloc[0]


def refusing(specimen: Specimen) -> Specimen:
    """The same model, but what it said to harmful prompts it says to harmless ones: harm is now refused."""
    weight, both = specimen.model.lm_head.weight, [VOCABULARY[PLUS], VOCABULARY[MINUS]]
    with torch.no_grad():
        weight[both] = weight[both[::-1]].clone()
    return specimen


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ran]:
    """Heads bring a direction of harm to the last token, where a late gate hears it and refuses."""
    folder = tmp_path_factory.mktemp("ablation")
    (folder / "ablation_judge.py").write_text(JUDGE, "utf-8")
    sys.path.insert(0, str(folder))
    labelled = [f'how do i {number},"{answer}",{label}' for number, (answer, label) in enumerate(LABELLED)]
    (folder / "labelled.csv").write_text("\n".join(["prompt,answer,harmful", *labelled]), "utf-8")
    study = written(refusing(build(CASES["heads-to-gate"], 0)), folder, 0).model_dump() | {
        "analyses": ["directions", "ablation"],
        "max_pairs": 24,
        "ablation": {
            "judge": "python:ablation_judge:complies",
            "labelled": str(folder / "labelled.csv"),
            "tokens": 3,
        },
    }
    config = StudyConfig(**study)
    backend = Counting(LocalBackend.load(config.model))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("remote_mediation.analyses.claims.beside.RANDOM_SETS", (4, 4))  # of swaps, not asked of here
        with rm.open_lab(config, out=folder / "run", backend=backend) as lab:
            result = lab.run()
            lab.report()
        yield Ran(result, folder / "run", config, backend)
    sys.path.remove(str(folder))


@pytest.mark.slow
def test_the_direction_gates_refusal_and_one_at_random_does_not(ran: Ran) -> None:
    table = ran.result.tables["ablation.csv"]
    assert list(table) == list(ABLATION_COLUMNS)
    plain, harmless = (ran.row("", "", side)["refused"] for side in ("harmful", "harmless"))
    assert plain > 0.8
    assert harmless < 0.2
    assert ran.row(FOUND, "ablated", "harmful")["refused"] < 0.2
    assert ran.row(FOUND, "added", "harmless")["refused"] > 0.8
    assert ran.row(beside(FOUND), "ablated", "harmful")["refused"] > 0.8
    assert ran.row(beside(FOUND), "added", "harmless")["refused"] < 0.2


@contextmanager
def by_hooks(model: LlamaForCausalLM, saved: Direction, done: str) -> Iterator[None]:
    """The saved direction at every token, by plain hooks on inputs of blocks, attention and MLP outputs."""
    unit, handles = torch.tensor(saved.basis.vectors[0]), []

    def out(tensor: torch.Tensor) -> torch.Tensor:
        return tensor - (tensor @ unit)[..., None] * unit

    if done == "added":
        handles.append(
            model.model.layers[saved.layer].register_forward_hook(lambda *call: call[-1] + saved.length * unit)
        )
    for block in model.model.layers if done == "ablated" else ():
        handles.append(block.register_forward_pre_hook(lambda _, args: (out(args[0]), *args[1:])))
        handles.append(block.self_attn.register_forward_hook(lambda *call: (out(call[-1][0]), *call[-1][1:])))
        handles.append(block.mlp.register_forward_hook(lambda *call: out(call[-1])))
    yield
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("done", ["ablated", "added"])
def test_it_is_the_saved_direction_at_every_layer_and_token(ran: Ran, done: str) -> None:
    saved = Direction.load(ran.folder / "direction.safetensors")
    model = AutoModelForCausalLM.from_pretrained(ran.study.model).eval()
    with rm.open_lab(ran.study, out=ran.folder, backend=ran.backend) as lab:
        pairs = lab._chosen("heldout")
    refused: dict[str, list[bool]] = {"harmful": [], "harmless": []}
    divergence = []
    for pair in pairs:
        for side, prompts in enumerate(("harmless", "harmful")):
            ids = torch.tensor([pair.prompts[side]])
            with torch.no_grad():
                plain = model(input_ids=ids).logits[0, -1].double().log_softmax(-1)
                with by_hooks(model, saved, done):
                    steered = model(input_ids=ids).logits[0, -1].double().log_softmax(-1)
            refused[prompts].append(int(steered.argmax()) != VOCABULARY[PLUS])
            if side == 0:
                divergence.append(float((plain.exp() * (plain - steered)).sum()))
    row = ran.row(FOUND, done, "harmless")
    assert row["refused"] == np.mean(refused["harmless"])
    assert row["kl_first"] == pytest.approx(np.mean(divergence), abs=1e-4)
    assert row["kl_first"] > 0.01
    if done == "ablated":
        assert ran.row(FOUND, done, "harmful")["refused"] == np.mean(refused["harmful"])


def test_the_judge_s_errors_are_allowed_for(ran: Ran) -> None:
    quality = ran.result.tables["ablation_judge.csv"].set_index("measure")["value"]
    assert (quality["recall"], quality["specificity"]) == (0.75, 0.8)
    for side in (
        "harmful",
        "harmless",
    ):  # of refusals the judge finds 80%, and it takes a quarter of compliance for one
        row = ran.row("", "", side)
        assert row["corrected"] == pytest.approx(np.clip((row["refused"] + 0.75 - 1) / 0.55, 0, 1))
        assert row["corrected_high"] - row["corrected_low"] > 0


def test_changes_are_those_of_the_same_prompts(ran: Ran) -> None:
    for direction, done, prompts in (
        (FOUND, "ablated", "harmful"),
        (FOUND, "added", "harmless"),
        (beside(FOUND), "ablated", "harmless"),
    ):
        row = ran.row(direction, done, prompts)
        assert row["change"] == pytest.approx(row["refused"] - ran.row("", "", prompts)["refused"])
    assert ran.row(FOUND, "ablated", "harmful")[["kl_first", "kl_next"]].isna().all()
    assert ran.row("", "", "harmless")[["change", "kl_first", "kl_next"]].isna().all()


def test_the_report_says_it_and_is_made_again_without_a_model(ran: Ran) -> None:
    report = (ran.folder / "report.md").read_text("utf-8")
    (section,) = sections(ran.result)
    assert section.title in report
    best = ran.result.tables["directions.csv"].query("chosen").iloc[0]
    assert section.finding.startswith(f"The direction (layer {best['layer']} at '{best['position']}', length ")
    assert "harmful prompts refused, ablated: 100%" in section.finding
    assert "taking it out removes refusals, and for one at random that is not shown" in section.finding
    assert "adding it brings refusals about, and for one at random that is not shown" in section.finding
    assert (ran.folder / section.figure_path).is_file()
    again = rm.open_run(ran.folder)
    pd.testing.assert_frame_equal(again.result().tables["ablation.csv"], ran.result.tables["ablation.csv"])
    assert again.report().read_text("utf-8") == report


def test_what_a_random_direction_does_as_well_is_said(ran: Ran) -> None:
    table = ran.result.tables["ablation.csv"].copy()
    other = (table["direction"] == beside(FOUND)) & (table["done"] == "ablated")
    table.loc[other, ["change_low", "change_high"]] = -0.9, -0.1
    own = (table["direction"] == FOUND) & (table["done"] == "added")
    table.loc[own, ["change_low", "change_high"]] = -0.1, 0.9
    (section,) = sections(replace(ran.result, tables={**ran.result.tables, "ablation.csv": table}))
    assert "taking it out removes refusals, and so does one at random" in section.finding
    assert "no such change is shown" in section.finding


def test_it_costs_no_more_than_planned(ran: Ran, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "matmul_rate", lambda _: 1e10)
    planned = estimate(ran.study)
    assert planned.later["ablation"].rows == 0
    assert ran.backend.flops <= planned.flops
    longer = StudyConfig(**{**ran.study.model_dump(), "ablation": {"tokens": 30}})
    assert estimate(longer).later["ablation"].flops > 1.5 * planned.later["ablation"].flops


def test_without_the_directions_it_says_so(ran: Ran) -> None:
    alone = ran.study.model_copy(update={"analyses": ["ablation"]})
    study = replace(ran.result.study, config=alone)
    bare = replace(ran.result, study=study, tables={})
    (section,) = sections(bare)
    assert "the analysis `directions`, which finds it, was not part of this study" in section.finding
    (unfinished,) = sections(replace(ran.result, tables={}))
    assert "Not measured yet" in unfinished.finding


def test_directions_are_added_as_long_as_they_are_and_where_they_lie() -> None:
    rng = np.random.default_rng(0)
    one = Direction(Basis.random(1, 6, rng), 2, "last", 5.0)
    several = Direction(Basis.random(3, 6, rng), 1, "last")
    found = list(conditions_of({"one": one, "several": several}, rng))
    assert [(each.direction, each.done, each.sides) for each in found] == [
        ("one", "ablated", (1, 0)),
        (beside("one"), "ablated", (1, 0)),
        ("one", "added", (0,)),
        (beside("one"), "added", (0,)),
        ("several", "ablated", (1, 0)),
        (beside("several"), "ablated", (1, 0)),
    ]
    assert found[0].intervention == Ablated(one.basis)
    added, random = found[2].intervention, found[3].intervention
    assert isinstance(added, Added)
    assert isinstance(random, Added)
    np.testing.assert_allclose(added.vector, one.vector, atol=1e-6)
    assert np.linalg.norm(random.vector) == pytest.approx(5.0)
    assert added.layer == random.layer == 2
    assert isinstance(found[5].intervention, Ablated)
    assert found[5].intervention.basis.size == 3
