"""The five claims on a model whose mechanism is planted, with a placebo, and on the same model with its gate cut."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import NamedTuple

import pandas as pd
import pytest
import torch
from fakes import Counting

from remote_mediation.analyses.claims import ask, sparse, specification, understanding
from remote_mediation.config import StudyConfig
from remote_mediation.cost import estimate
from remote_mediation.engine.jobs import Job
from remote_mediation.engine.local import LocalBackend
from remote_mediation.errors import JobError
from remote_mediation.planted.gate import Organism, planted_gate, save
from remote_mediation.report import write_report
from remote_mediation.store import Store
from remote_mediation.study import Result, reread, run_study

pytestmark = pytest.mark.slow

SEED = 4
LAYERS = 12  # thirds of four layers, as they were planted
PAIRS = 16


class Studied(NamedTuple):
    organism: Organism
    result: Result
    store: Store
    backend: Counting

    @property
    def claims(self) -> pd.DataFrame:
        return self.result.tables["claims.csv"].set_index("number")

    def measures(self, number: int) -> pd.DataFrame:
        table = self.result.tables["sets.csv"].query("number == @number")
        return table.set_index(["measure", "direction"])


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Studied]:
    def run(change: Callable[[Organism], None] = lambda organism: None) -> Studied:
        folder = tmp_path_factory.mktemp("claims")
        organism = planted_gate(SEED, layers=LAYERS)
        change(organism)
        save(organism, folder / "model")
        lines = [json.dumps(pair._asdict()) for pair in organism.pairs[:PAIRS]]
        (folder / "pairs.jsonl").write_text("\n".join(lines), "utf-8")
        config = StudyConfig(
            model=str(folder / "model"),
            pairs=str(folder / "pairs.jsonl"),
            analyses=["claims"],
            outcome="logit_diff",
            logit_diff={"plus": [organism.plus_token], "minus": [organism.minus_token]},
            statistics={"resamples": 199},
            seed=SEED,
        )
        store = Store.create(folder / "run", config.identity())
        backend = Counting(LocalBackend.load(config.model))
        result = run_study(config, backend, store)
        return Studied(organism, result, store, backend)

    return run


@pytest.fixture(scope="module")
def planted(study: Callable[..., Studied]) -> Studied:
    return study()


def cut(organism: Organism) -> None:
    """The gate neurons write nothing any more, and what distractors hear of harm is harmless in every other pair."""
    gate = organism.truth.gate
    with torch.no_grad():
        organism.model.model.layers[gate.layer].mlp.down_proj.weight[:, list(gate.units)] = 0.0
        embedding = organism.model.model.embed_tokens.weight
        for pair in organism.pairs[:PAIRS:2]:
            both = organism.tokenizer([pair.harmful, pair.harmless])["input_ids"]
            nouns = next([one, other] for one, other in zip(*both, strict=True) if one != other)
            embedding[nouns] = embedding[nouns[::-1]]


def test_what_was_planted_is_supported(planted: Studied) -> None:
    verdicts = planted.claims["verdict"]
    assert [verdicts[number] for number in (1, 2, 3, 5)] == ["supported"] * 4
    assert (planted.claims["gate"] == "").all()
    # The planted noun is a direction of the embeddings: no layer reads it better, and 8 components prove no absence.
    assert verdicts[4] == "undecided"


def test_the_shares_are_those_that_were_written(planted: Studied) -> None:
    gates = planted.organism.truth.gate.units
    third = planted.measures(1).loc["direct effect of the late third"]["harm"]
    assert third.to_numpy() == pytest.approx(1.0, abs=0.1)
    curve = planted.result.tables["gate_sets.csv"].set_index("size")
    assert curve.index[curve["chosen"]].item() <= 2 * len(gates)
    assert curve.loc[1, "nie"] < curve.loc[len(gates), "nie"]
    handed = planted.measures(5).loc[("early effect through the middle MLPs", "both"), "harm"]
    assert handed == pytest.approx(0.55, abs=0.1)  # what the gate hears of relays; the movers give it the rest


def test_all_neurons_are_the_band_and_both_directions_agree_over_all_layers(
    planted: Studied,
) -> None:
    curve = planted.result.tables["gate_sets.csv"].iloc[-1]
    band = planted.measures(3).loc["late MLPs together"]["harm"]
    assert curve[["nie", "tie"]].to_numpy(float) == pytest.approx(band[["nie", "tie"]].to_numpy(), abs=1e-4)
    both = planted.measures(2).loc["MLPs minus attention, all layers"]["harm"]
    assert both["nie"] == pytest.approx(both["tie"], abs=1e-4)  # a Shapley difference of two players


def test_the_placebo_stands_beside_it(planted: Studied) -> None:
    sets = planted.result.tables["sets.csv"]
    assert sets[["beta_harm", "beta_placebo"]].notna().all().all()
    gate = planted.measures(3)
    chosen = gate.index[0][0]
    assert chosen.startswith("first")
    assert abs(gate.loc[chosen]["beta_placebo"]).max() < 0.2  # another noun does not pass the gate
    assert planted.claims.loc[3, "said"] == "supported"


def test_every_share_can_be_made_again_from_its_pairs(planted: Studied) -> None:
    number = ["number", "measure", "direction"]
    pairs = planted.result.tables["set_pairs.csv"].groupby(number, sort=False)
    sets = planted.result.tables["sets.csv"].drop_duplicates(number).set_index(number)
    assert set(pairs.groups) == set(sets.index)
    assert (pairs["pair_id"].nunique() == sets["n"].reindex(pairs.groups)).all()
    shares = pairs["harm"].mean() / pairs["te_harm"].mean()
    gains = pairs["harm"].mean()
    expected = sets["harm"].reindex(shares.index)
    made = shares.where(sets["of"].reindex(shares.index) == "TE", gains)
    assert made.to_numpy() == pytest.approx(expected.to_numpy(), abs=1e-9)


def test_the_tables_have_their_documented_columns(planted: Studied) -> None:
    documented = {
        "claims.csv": ask.CLAIM_COLUMNS,
        "sets.csv": ask.SET_COLUMNS,
        "specification.csv": specification.SPECIFICATION_COLUMNS,
        "gate_sets.csv": sparse.GATE_SET_COLUMNS,
        "readable.csv": understanding.READABLE_COLUMNS,
    }
    assert {name: list(planted.result.tables[name]) for name in documented} == {
        name: list(columns) for name, columns in documented.items()
    }


def test_a_run_folder_gives_the_same_claims_without_a_model(planted: Studied) -> None:
    again = reread(planted.store)
    for name, table in planted.result.tables.items():
        pd.testing.assert_frame_equal(again.tables[name], table)


def test_it_costs_no_more_than_planned(planted: Studied) -> None:
    planned, measured = estimate(planted.result.study.config), planted.backend
    assert (
        measured.rows <= planned.rows + planned.later["claims"].rows < 3 * measured.rows
    )  # sets drawn twice are measured once
    assert measured.flops <= planned.flops < 4 * measured.flops


def test_the_report_shows_the_claims(planted: Studied) -> None:
    lines = write_report(planted.store, planted.result).read_text("utf-8").splitlines()
    assert "## The five claims" in lines
    (row,) = (line for line in lines if line.startswith("| 3. a sparse set") and "β" in line)
    assert row.endswith("| supported |")
    for name in planted.result.tables:
        assert (planted.store.folder / name).exists()


def test_without_a_gate_there_is_no_effect(study: Callable[..., Studied]) -> None:
    found = study(cut).claims
    assert set(found["said"]) == {"no effect"}
    assert set(found["verdict"]) == {"not tested"}


def test_what_a_backend_cannot_do_is_not_tested(study: Callable[..., Studied], monkeypatch: pytest.MonkeyPatch) -> None:
    """As a server that shows neither weights nor gradients."""

    def refuse(self: Counting, job: Job) -> str:
        if job.task in ("direct", "screen"):
            raise JobError(f"this server does no {job.task}")
        return str(self.backend.submit(job))

    monkeypatch.setattr(Counting, "submit", refuse)
    found = study()
    assert [found.claims.loc[number, "verdict"] for number in (1, 2, 3)] == ["not tested"] * 3
    assert "does no direct" in found.claims.loc[1, "why"]
    assert "does no screen" in found.claims.loc[3, "why"]
    assert found.claims.loc[5, "verdict"] == "supported"
    assert "## The five claims" in write_report(found.store, found.result).read_text("utf-8")
    pd.testing.assert_frame_equal(reread(found.store).tables["claims.csv"], found.result.tables["claims.csv"])
