"""Judged answers of models in which it is known what a mediator does to them."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import pytest
from pydantic import TypeAdapter

import remote_mediation as rm
from remote_mediation.analyses.verify.ask import JUDGED_COLUMNS, VERIFY_COLUMNS, found_sets, strongest_sites
from remote_mediation.analyses.verify.show import sections
from remote_mediation.engine.local import LocalBackend
from remote_mediation.planted.gate import Organism, planted_gate, save
from remote_mediation.result import Analysis, Finding, Result
from remote_mediation.sites import Site
from remote_mediation.store import Store

# It errs on purpose: of the labelled answers it finds 3 of 4 that comply, and lets 4 of 5 others pass.
JUDGE = """
def complies(prompts, answers):
    return [answer.split()[:1] == ["sure"] for answer in answers]
"""
LABELLED = [("sure", 1)] * 15 + [("sorry", 1)] * 5 + [("sure", 0)] * 4 + [("sorry", 0)] * 16


class Verified(NamedTuple):
    organism: Organism
    result: Result
    folder: Path

    def row(self, mediator: str, quantity: str) -> pd.Series:
        table = self.result.tables["verify.csv"]
        return table[(table["mediator"] == mediator) & (table["quantity"] == quantity)].iloc[0]


def known(organism: Organism) -> Analysis:
    """An analysis from outside the package that finds the gate, and as many neurons that are none."""
    gate = organism.truth.gate
    others = tuple(unit for unit in range(len(gate.units) + 6) if unit not in gate.units)[: len(gate.units)]
    sets = {
        "the gate": (Site("mlp_neurons", gate.layer, "last", gate.units),),
        "other neurons": (Site("mlp_neurons", gate.layer, "last", others),),
        "late MLPs": tuple(rm.band("mlp_output", range(gate.layer, organism.model.config.num_hidden_layers), "all")),
    }
    return Analysis("known", analyse=lambda lab, before: Finding(sets=sets))


@pytest.fixture(scope="module")
def verified(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Verified]:
    """A planted gate whose harmful prompts are answered "sure" and whose harmless ones "sorry", most of the time."""
    folder, organism = tmp_path_factory.mktemp("verify"), planted_gate(3)
    (folder / "answer_judge.py").write_text(JUDGE, "utf-8")
    sys.path.insert(0, str(folder))
    save(organism, folder / "model")
    lines = [json.dumps(pair._asdict()) for pair in organism.pairs]
    (folder / "pairs.jsonl").write_text("\n".join(lines), "utf-8")
    labelled = [f'how do i {number},"{answer}",{label}' for number, (answer, label) in enumerate(LABELLED)]
    (folder / "labelled.csv").write_text("\n".join(["prompt,answer,harmful", *labelled]), "utf-8")
    study = rm.StudyConfig(
        model=str(folder / "model"),
        pairs=str(folder / "pairs.jsonl"),
        max_pairs=40,
        outcome="logit_diff",
        logit_diff={"plus": [organism.plus_token], "minus": [organism.minus_token]},
        verify={
            "judge": "python:answer_judge:complies",
            "labelled": str(folder / "labelled.csv"),
            "samples": 6,
            "tokens": 2,
            "temperature": 0.7,
            "pairs": 16,
            "sites": 2,
        },
        statistics={"resamples": 499},
        seed=3,
    )
    backend = LocalBackend.load(study.model)
    with rm.open_lab(
        study, out=folder / "run", backend=backend, analyses=["modules", known(organism), "verify"]
    ) as lab:
        result = lab.run()
        lab.report()
    yield Verified(organism, result, folder / "run")
    sys.path.remove(str(folder))


@pytest.mark.slow
def test_the_gate_is_found_in_what_the_model_says_and_other_neurons_are_not(verified: Verified) -> None:
    te = verified.row("", "te")
    assert te["judged_low"] > 0.4
    for quantity in ("nie", "tie"):
        gate, others = (verified.row(name, quantity) for name in ("the gate", "other neurons"))
        assert gate["judged_share_low"] > 0.5
        assert gate["cheap_share_low"] > 0.5
        assert abs(others["judged"]) < 0.1
        assert gate["n"] == 16
        assert verified.row("late MLPs", quantity)["judged"] >= gate["judged"] - 0.1


def test_numbers_are_differences_of_counted_answers(verified: Verified) -> None:
    table, counted = verified.result.tables["verify.csv"], verified.result.tables["judged.csv"]
    assert list(table.columns) == list(VERIFY_COLUMNS)
    assert list(counted.columns) == list(JUDGED_COLUMNS)
    shares = counted.assign(share=counted["complied"] / counted["samples"]).pivot_table(
        index="pair_id", columns=["mediator", "prompts"], values="share"
    )
    plain = shares[""]
    assert verified.row("", "rate_harmful")["judged"] == pytest.approx(plain["harmful"].mean())
    assert verified.row("", "te")["judged"] == pytest.approx((plain["harmful"] - plain["harmless"]).mean())
    gate = shares["the gate"]
    assert verified.row("the gate", "nie")["judged"] == pytest.approx((gate["harmless"] - plain["harmless"]).mean())
    assert verified.row("the gate", "tie")["judged"] == pytest.approx((plain["harmful"] - gate["harmful"]).mean())


def test_the_judge_s_errors_are_allowed_for(verified: Verified) -> None:
    quality = verified.result.tables["verify_judge.csv"].set_index("measure")["value"]
    assert (quality["recall"], quality["specificity"]) == (0.75, 0.8)
    rate, te = verified.row("", "rate_harmful"), verified.row("", "te")
    assert rate["corrected"] == pytest.approx(min((rate["judged"] + 0.8 - 1) / 0.55, 1))
    assert te["corrected"] == pytest.approx(min(te["judged"] / 0.55, 1))
    others = verified.row("other neurons", "nie")
    assert others["corrected_high"] - others["corrected_low"] >= others["judged_high"] - others["judged_low"]


def test_the_strongest_site_of_each_kind_is_put_to_the_judge(verified: Verified) -> None:
    names = [name for name in verified.result.tables["verify.csv"]["mediator"].unique() if name]
    gate = verified.organism.truth.gate.layer
    assert names[0] == f"mlp_output of layer {gate} at 'all'"
    assert names[1].startswith("attention_output of layer ")
    assert names[2:] == ["the gate", "other neurons", "late MLPs"]


def test_the_report_says_it_and_is_made_again_without_a_model(verified: Verified) -> None:
    report = (verified.folder / "report.md").read_text("utf-8")
    assert "## Verified in answers" in report
    assert "the gate: judged NIE" in report
    assert "both go the way of the judged TE" in report
    assert "neither is shown to go the way of the judged TE" in report
    assert "removes refusal" not in report  # harm raises what is said here
    again = rm.open_run(verified.folder, analyses=[known(verified.organism)])
    pd.testing.assert_frame_equal(again.result().tables["verify.csv"], verified.result.tables["verify.csv"])
    assert again.report().read_text("utf-8") == report


def test_the_run_folder_has_verdicts_and_no_texts(verified: Verified) -> None:
    store = Store.open(verified.folder)
    notes = [store.note(path.stem, TypeAdapter(list[bool])) for path in verified.folder.glob("notes/judged-*.json")]
    assert 2 <= len(notes) <= 2 * 6  # rows with the same answers share their verdicts
    assert all(set(note) <= {True, False} and len(note) == 16 * 6 for note in notes)


def turned(found: Verified) -> Result:
    """The same run had compliance and refusal been exchanged: every judged number has the other sign."""
    table = found.result.tables["verify.csv"].copy()
    effects = table["quantity"].isin(["te", "nie", "tie"])
    low, high = -table.loc[effects, "judged_high"], -table.loc[effects, "judged_low"]
    table.loc[effects, "judged"] *= -1
    table.loc[effects, "judged_low"], table.loc[effects, "judged_high"] = low, high
    return replace(found.result, tables={**found.result.tables, "verify.csv": table})


def test_removes_refusal_is_said_where_harm_lowers_compliance_and_the_swap_raises_it(verified: Verified) -> None:
    (section,) = sections(turned(verified))
    gate, others = section.finding.split(" the gate: ")[1].split(" other neurons: ")
    assert "more answers to harmful prompts comply: it removes refusal." in gate
    assert "removes refusal" not in others.split(" late MLPs: ")[0]


def effects(**means: tuple[float, float]) -> pd.DataFrame:
    """Sites `component layer position` and their discovery means of NIE and TIE, where TE is -2."""
    rows = []
    for number, (site, (nie, tie)) in enumerate(means.items()):
        component, layer, position = site.rsplit("_", 2)
        shared: dict[str, Any] = {"split": "discovery", "analysis": f"a{number}", "te": -2.0, "nie": nie, "tie": tie}
        rows.append({**shared, "component": component, "layer": int(layer), "position": position})
    return pd.DataFrame(rows).assign(unit_start=pd.NA, unit_stop=pd.NA)


def test_sites_that_follow_by_construction_or_act_against_te_are_left_out() -> None:
    class Asked:
        effects = effects(
            layer_output_1_all=(-2.0, -2.0),
            layer_output_3_last=(-2.0, -2.0),
            layer_output_2_last=(-1.5, -1.2),
            layer_output_1_last=(-1.9, -0.2),
            mlp_output_1_all=(-1.3, -1.3),
            attention_output_0_all=(0.5, 0.4),
        )
        study = type("Study", (), {"info": type("Info", (), {"layers": 4})})

    found = strongest_sites(Asked(), 5)  # type: ignore[arg-type]
    assert [one.sites for one in found] == [
        (Site("mlp_output", 1, "all"),),
        (Site("layer_output", 2, "last"),),
    ]
    assert strongest_sites(Asked(), 1) == found[:1]  # type: ignore[arg-type]


def test_a_set_that_two_analyses_found_is_put_to_the_judge_once() -> None:
    gate, late = (Site("mlp_neurons", 3, "last", (1,)),), tuple(rm.band("mlp_output", range(2), "all"))
    before = {"a": Finding(sets={"gate": gate}), "b": Finding(sets={"the same": gate, "late": late})}
    assert [(one.name, one.sites) for one in found_sets(before)] == [("gate", gate), ("late", late)]
