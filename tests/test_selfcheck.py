"""The whole pipeline against the truth: what was planted is found, and a wrong truth is not."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from remote_mediation import cli
from remote_mediation.planted import selfcheck
from remote_mediation.planted.gate import Organism, Planted, planted_gate
from remote_mediation.planted.selfcheck import SelfCheck


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Exit code and standard output of the command line."""
    monkeypatch.setattr("sys.argv", ["remote-mediation", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0), capsys.readouterr().out


def checked(planted: tuple[tuple[int, int], ...], found: tuple[tuple[int, int], ...], layer: int = 9) -> SelfCheck:
    return SelfCheck(seed=0, planted=planted, found=found, module=("mlp_output", layer), gate_layer=9)


def test_precision_and_recall_by_hand() -> None:
    result = checked(planted=((9, 1), (9, 2)), found=((9, 2), (9, 3), (9, 4), (9, 5)))
    assert (result.precision, result.recall, result.passed) == (0.25, 0.5, False)
    assert checked(((9, 1),), ((9, 1),)).passed
    assert not checked(((9, 1),), ((9, 1),), layer=8).passed
    assert str(checked(((9, 1),), ()).precision) == "nan"


@pytest.mark.slow
@pytest.mark.parametrize("seed", [3, 4, 5])
def test_what_is_planted_is_found(
    seed: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out = run(monkeypatch, capsys, "selfcheck", "--seed", str(seed), "--json")
    result = json.loads(out)
    gate = planted_gate(seed).truth.gate
    assert result["found"] == [[gate.layer, unit] for unit in gate.units]
    assert (result["precision"], result["recall"], result["passed"], code) == (1.0, 1.0, True, 0)


@pytest.mark.slow
def test_a_wrong_truth_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def misinformed(seed: int, **shape: Any) -> Organism:
        organism = planted_gate(seed, **shape)
        gate = organism.truth.gate
        other = next(unit for unit in range(256) if unit not in gate.units)
        wrong = Planted(gate.layer, tuple(sorted((other, *gate.units[1:]))))
        return replace(organism, truth=replace(organism.truth, gate=wrong))

    monkeypatch.setattr(selfcheck, "planted_gate", misinformed)
    code, out = run(monkeypatch, capsys, "selfcheck", "--seed", "3")
    assert code == 1
    assert "failed" in out
