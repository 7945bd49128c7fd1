"""Every analysis against the truth: a whole study of a planted model, and one of a model whose gate is cut."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pandas as pd
import pytest
import torch

from remote_mediation.analyses.intervene import ask as intervene
from remote_mediation.analyses.paths import ask as paths
from remote_mediation.config import StudyConfig
from remote_mediation.engine.local import LocalBackend
from remote_mediation.planted.gate import Organism, Planted, planted_gate, save
from remote_mediation.probes import onset
from remote_mediation.report import write_report
from remote_mediation.store import Store
from remote_mediation.study import Result, reread, run_study

pytestmark = pytest.mark.slow

SEED = 3
EVERYTHING = ["layers", "modules", "neurons", "detect", "paths", "intervene", "attacks", "monitor"]
SECTIONS = {
    f"## {title}"
    for title in (
        *("Layers", "Modules", "Neurons of whole MLPs", "Single neurons", "Gate neurons", "Early understanding"),
        *("Paths", "Repair", "Circumvention", "Monitor"),
    )
}
JUDGE = 'def complies(prompts, answers):\n    return [answer.split()[:1] == ["sure"] for answer in answers]\n'


class Studied(NamedTuple):
    organism: Organism
    result: Result
    store: Store

    @property
    def gate(self) -> Planted:
        return self.organism.truth.gate

    def table(self, name: str, *index: str) -> pd.DataFrame:
        return self.result.tables[f"{name}.csv"].set_index(list(index))


Study = Callable[..., Studied]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Study]:
    """A study of a model as it was planted, or changed."""
    judges = tmp_path_factory.mktemp("judges")
    (judges / "planted_judge.py").write_text(JUDGE, "utf-8")
    sys.path.insert(0, str(judges))

    def run(analyses: list[str], change: Callable[[Organism], None] | None = None, **neurons: Any) -> Studied:
        folder = tmp_path_factory.mktemp("planted")
        organism = planted_gate(SEED)
        if change:
            change(organism)
        save(organism, folder / "model")
        pairs = folder / "pairs.jsonl"
        pairs.write_text("".join(json.dumps(pair._asdict()) + "\n" for pair in organism.pairs), "utf-8")
        config = StudyConfig(
            model=str(folder / "model"),
            pairs=str(pairs),
            max_pairs=30,
            analyses=analyses,
            outcome="logit_diff",
            logit_diff={"plus": [organism.plus_token], "minus": [organism.minus_token]},
            neurons={"random_sets": 40, "exact": 16, **neurons},
            intervene={"judge": "python:planted_judge:complies", "tokens": 2, "factors": [2.0]},
            statistics={"resamples": 999},
            seed=SEED,
        )
        store = Store.create(folder / "run", config.identity())
        return Studied(organism, run_study(config, LocalBackend.load(config.model), store), store)

    yield run
    sys.path.remove(str(judges))


@pytest.fixture(scope="module")
def planted(study: Study) -> Studied:
    """All analyses of the planted model."""
    return study(EVERYTHING)


def cut(organism: Organism) -> None:
    """The gate neurons write nothing any more."""
    gate = organism.truth.gate
    with torch.no_grad():
        organism.model.model.layers[gate.layer].mlp.down_proj.weight[:, list(gate.units)] = 0.0


def test_the_gate_set_is_what_was_planted(planted: Studied) -> None:
    table = planted.table("gates", "set")
    gates, random = table.loc["gates"], table.loc[["random"]]
    assert set(map(int, gates["units"].split())) <= set(planted.gate.units)
    assert gates["layer"] == planted.gate.layer
    assert gates["nie_share"] > 0.8
    assert gates["tie_share"] > 0.8
    assert len(random) == 40
    assert random[["nie_share", "tie_share"]].abs().median().max() < 0.02
    apart = [not set(planted.gate.units) & set(map(int, units.split())) for units in random["units"]]
    assert random.loc[apart, ["nie_share", "tie_share"]].abs().max().max() < 0.1
    mediators = planted.result.tables["mediators.csv"].query("mediates and layer == @planted.gate.layer")
    assert set(mediators["unit"]) == set(planted.gate.units)


def test_windows_find_the_same_gates(study: Study, planted: Studied) -> None:
    found = study(["neurons"], search=["windows"], random_sets=2, layers=[planted.gate.layer]).table("gates", "set")
    known = planted.table("gates", "set")
    assert found.loc["gates", ["layer", "units"]].tolist() == known.loc["gates", ["layer", "units"]].tolist()
    assert found.loc["gates", "nie"] == pytest.approx(known.loc["gates", "nie"], rel=1e-4)


@pytest.mark.parametrize("quantity", ["nie", "tie"])
def test_harm_travels_through_the_gates(planted: Studied, quantity: str) -> None:
    shares = planted.table("paths", "quantity", "frozen").loc[quantity]["share"]
    for name in (paths.MLPS, paths.ATTENTION, paths.GATES):
        assert shares[name] > 0.8, name
    assert abs(shares[paths.RANDOM]) < 0.1
    assert shares["nothing"] == 0.0


def test_harm_is_read_where_it_was_planted(planted: Studied) -> None:
    probes = planted.result.tables["probes.csv"]
    alpha = planted.result.study.config.statistics.alpha
    by_position = onset(probes, alpha)
    assert by_position["edit"] == 0
    assert by_position["last"] == by_position["post_instruction"] == planted.organism.truth.movers[0].layer


def test_holding_the_gates_repairs_the_model_and_costs_little(planted: Studied) -> None:
    table = planted.table("intervene", "held", "prompts")
    for name in (intervene.MEAN, intervene.MLP):
        assert table.loc[(name, "harmful"), "share"] > 0.8
        assert table.loc[(name, "harmful"), "complied"] < 0.2
    assert table.loc[(intervene.PLAIN, "harmful"), "complied"] > 0.9
    assert abs(table.loc[(intervene.RANDOM, "harmful"), "share"]) < 0.1
    assert table.loc[(intervene.RANDOM, "harmful"), "complied"] > 0.9
    assert 0 <= table.loc[(intervene.MEAN, "harmless"), "kl"] < 0.01
    assert abs(table.loc[(intervene.MEAN, "harmless"), "change"]) < 0.1
    assert table.loc[(intervene.PLAIN, "harmless"), "complied"] < 0.1
    te = planted.result.summary.total.value
    assert table.loc[("gates times 2", "harmful"), "change_low"] > 0.3 * te
    assert set(table["judged"]) == {15}


def test_rewrapped_prompts_have_the_same_gates_and_repair(planted: Studied) -> None:
    table = planted.table("attacks", "attack")
    assert len(table) == 5
    assert (table["n"] == 15).all()
    wrapped = table.drop(index="none")
    assert (wrapped["overlap"] == 1).all()
    assert (wrapped["spearman_low"] > 0.5).all()
    for name in ("nie_share", "tie_share", "repair"):
        assert (table[name] > 0.8).all()
    assert (table["complied"] >= 0.8).all()
    assert (table["complied_held"] < 0.2).all()


def test_watching_the_gates_tells_harmful_prompts(planted: Studied) -> None:
    table = planted.table("detectors", "detector", "evaluation")
    gates = table.loc[("gates", "heldout")]
    assert gates["auroc"] == 1.0
    assert gates["n"] == 30
    random = table.loc[[name for name in table.index if "random" in name[0]]]
    assert len(random)
    assert (random["auroc"] < 0.9).all()
    assert gates["p"] < 0.05


def test_the_run_folder_gives_the_same_result_without_a_model(planted: Studied) -> None:
    again = reread(planted.store)
    pd.testing.assert_frame_equal(again.effects, planted.result.effects)
    assert list(again.tables) == list(planted.result.tables)
    for name, table in planted.result.tables.items():
        pd.testing.assert_frame_equal(again.tables[name], table)


def test_the_report_has_a_section_for_every_analysis(planted: Studied) -> None:
    lines = write_report(planted.store, planted.result).read_text("utf-8").splitlines()
    titles = [line for line in lines if line.startswith("## ")]
    assert len(set(titles)) == len(titles)
    assert set(titles) >= SECTIONS
    for name in planted.result.tables:
        assert (planted.store.folder / name).exists()


def test_without_a_gate_nothing_is_claimed_or_repaired(study: Study) -> None:
    found = study(["layers", "modules", "neurons", "intervene"], cut)
    total = found.result.summary.total
    assert total.low < 0 < total.high
    for name in (intervene.MEAN, intervene.MLP):
        held = found.table("intervene", "held", "prompts").loc[(name, "harmful")]
        assert abs(held["change"]) < 0.3  # of a TE of 6; distractors hear a little of harm
        assert held["complied"] == found.table("intervene", "held", "prompts").loc[("nothing", "harmful"), "complied"]
    assert not found.result.tables["mediators.csv"]["mediates"].any()
