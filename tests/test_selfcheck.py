"""The whole pipeline against the truth: what is planted is said, a wrong truth is not, and the exit code tells them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from remote_mediation import cli
from remote_mediation.planted import selfcheck
from remote_mediation.planted.cases import CASES, NO, OR, YES, Specimen, build
from remote_mediation.planted.selfcheck import SelfCheck

Run = Callable[..., tuple[int, str]]
ALL = (YES,) * 5


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Exit code and output of the command line."""

    def call(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["remote-mediation", "selfcheck", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out or captured.err  # which has progress, too

    return call


def checked(said: tuple[str, ...] = ALL, missed: tuple[tuple[int, int], ...] = ()) -> SelfCheck:
    gates = ((9, 1), (9, 2))
    return SelfCheck("gate", "a gate", 0, tuple("12345"), ALL, said, ("because",) * 5, gates, missed)


def test_all_verdicts_and_all_gates_count() -> None:
    assert checked().passed
    assert not checked((*ALL[:4], NO)).passed
    assert not checked(missed=((9, 2),)).passed
    assert checked((*ALL[:4], NO)).line() == "FAILED  gate, seed 0: 4 of 5 verdicts true"
    assert checked(missed=((9, 2),)).line().endswith("5 of 5 verdicts true, 1 of 2 gate neurons missed")
    assert checked().line().startswith("passed")


def test_either_of_two_verdicts_may_be_true() -> None:
    either = replace(checked(), truth=(ALL[0], f"{YES}{OR}undecided", *ALL[2:]))
    assert either.passed
    assert replace(either, said=(ALL[0], "undecided", *ALL[2:])).passed
    assert not replace(either, said=(ALL[0], NO, *ALL[2:])).passed


def test_one_wrong_case_of_several_fails(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        selfcheck,
        "run_selfcheck",
        lambda name, seed, watch: replace(
            checked((*ALL[:4], NO) if name == "late-head" else ALL), case=name, seed=seed
        ),
    )
    code, out = run("--case", "gate", "--case", "many", "--seed", "3")
    assert (code, out.splitlines()[0]) == (0, "passed  gate, seed 3: 5 of 5 verdicts true")
    code, out = run("--all")
    assert code == 1
    assert [line.split()[1].strip(",") for line in out.splitlines() if "verdicts true" in line] == list(CASES)
    assert sum(line.startswith("FAILED") for line in out.splitlines()) == 1
    code, out = run("--case", "late-head", "--json")
    assert (code, json.loads(out)["cases"][0]["passed"]) == (1, False)


def test_an_unknown_case_is_named(run: Run) -> None:
    code, out = run("--case", "none")
    assert code == 2
    assert "'none'" in out
    assert "late-head" in out


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_what_is_true_is_said(name: str, run: Run) -> None:
    code, out = run("--case", name, "--json")
    (found,) = json.loads(out)["cases"]
    assert len(found["claims"]) == len(found["truth"]) == 5 + len(CASES[name].rivals)
    assert all(said in true.split(OR) for said, true in zip(found["said"], found["truth"], strict=True))
    assert (found["missed"], code) == ([], 0)


@torch.no_grad()
def states_at_last(specimen: Specimen, text: str) -> Tensor:
    """The stream at the last prompt token after every layer: (layer, d_model)."""
    asked = [{"role": "user", "content": text}]
    batch = specimen.tokenizer.apply_chat_template(
        asked, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    _, *states = specimen.model(**batch, output_hidden_states=True).hidden_states
    return torch.stack(states)[:, 0, -1]


def test_every_rival_holds_in_some_model_and_fails_in_another() -> None:
    known = [case.rivals for case in CASES.values() if case.rivals]
    assert all({YES, NO} & set(OR.join(verdicts).split(OR)) == {YES, NO} for verdicts in zip(*known, strict=True))


@pytest.mark.parametrize("name", ["late-head", "gate-at-edit"])
def test_a_direction_is_true_where_the_answer_arrives_below_80_percent_of_the_depth(name: str) -> None:
    """Where it arrives is read from a plain run: the stream of the last token moves along the answer from there on."""
    seen = set()
    for seed in range(6):
        specimen = build(CASES[name], seed)
        pair = specimen.pairs[0]
        harmful, harmless = (states_at_last(specimen, text) for text in (pair.harmful, pair.harmless))
        answer = specimen.model.lm_head.weight[specimen.tokenizer.convert_tokens_to_ids(specimen.plus)].detach()
        moved = (harmful - harmless) @ answer
        arrives = int((moved > moved[-1] / 2).nonzero()[0])
        assert specimen.rivals[0] == (YES if arrives <= 9 else NO)
        seen.add(specimen.rivals[0])
    assert seen == {YES, NO}


@pytest.mark.slow
def test_a_wrong_truth_fails(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CASES, "gate", replace(CASES["gate"], said=(YES, NO, YES, YES, YES)))
    code, out = run()
    assert code == 1
    assert "4 of 5 verdicts true" in out
