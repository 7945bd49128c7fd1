"""What `plan` promises against what a study of a tiny model then measures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fakes import Counting, records, write_pairs
from oracle import Subject

from remote_mediation import cost as module
from remote_mediation.config import StudyConfig
from remote_mediation.cost import estimate
from remote_mediation.store import Store
from remote_mediation.study import run_study


@pytest.fixture(autouse=True)
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """The speed of this machine is not asked for."""
    monkeypatch.setattr(module, "matmul_rate", lambda _: 1e10)


def config(folder: Path, model: str, **settings: Any) -> StudyConfig:
    return StudyConfig(
        model=model,
        pairs=str(write_pairs(folder / "pairs.jsonl", records())),
        outcome="logit_diff",
        logit_diff={"plus": ["sure", "yes"], "minus": ["sorry", "no"]},
        statistics={"resamples": 100},
        seed=1,  # of a split on which neurons of the random model pass for gates
        **settings,
    )


@pytest.mark.parametrize("search", ["gradient", "windows", "all"])
def test_no_more_rows_are_measured_than_planned(subject: Callable[[str], Subject], tmp_path: Path, search: str) -> None:
    few = {"exact": 2, "max_windows": 1, "random_sets": 60, "layers": [1, 2] if search == "all" else None}
    study = config(tmp_path, subject("llama_chat").info.name, analyses=["neurons"], neurons={"search": [search], **few})
    planned = estimate(study)
    backend = Counting(subject("llama_chat").backend)
    result = run_study(study, backend, Store.create(tmp_path / "run", study.identity()))
    assert len(result.tables["gates.csv"]) >= 62
    bound = planned.later["neurons"].rows
    assert planned.rows < backend.rows <= planned.rows + bound
    assert bound < 3 * (backend.rows - planned.rows)  # a bound that says something


MORE = ("detect", "paths", "intervene", "attacks", "monitor")


@pytest.mark.parametrize(
    "asked",
    [("detect",), ("paths",), ("neurons", *MORE), ("neurons", "verify")],
    ids=["detect", "paths", "all", "verify"],
)
def test_what_follows_costs_no_more_than_planned(
    subject: Callable[[str], Subject], tmp_path: Path, asked: tuple[str, ...]
) -> None:
    few = {"neurons": {"exact": 3, "random_sets": 25}, "intervene": {"tokens": 4}}
    hard = {"monitor": {"hard_negatives": str(write_pairs(tmp_path / "hard.jsonl", records()))}}
    study = config(tmp_path, subject("llama_chat").info.name, analyses=["layers", *asked], **few, **hard)
    planned = estimate(study)
    assert planned.later.keys() == set(asked)
    backend = Counting(subject("llama_chat").backend)
    result = run_study(study, backend, Store.create(tmp_path / "run", study.identity()))
    if "attacks" in asked:
        assert {"attacks.csv", "intervene.csv", "detectors.csv", "paths.csv", "probes.csv"} <= result.tables.keys()
    more = sum(one.rows for one in planned.later.values())
    assert planned.rows <= backend.rows <= planned.rows + more
    assert more <= 3 * (backend.rows - planned.rows)
    assert planned.flops / 4 < backend.flops <= planned.flops
    assert planned.down / 3 < 4 * backend.numbers <= planned.down


@pytest.mark.parametrize("name", ["neurons", *MORE])
def test_every_cost_is_in_the_sums_and_in_the_table(
    subject: Callable[[str], Subject], tmp_path: Path, name: str
) -> None:
    model = subject("llama_chat").info.name
    without, with_it = (
        estimate(config(tmp_path, model, analyses=list(dict.fromkeys(asked))))
        for asked in (("layers",), ("layers", name))
    )
    later = with_it.later[name]
    assert later.flops > 0
    assert later.down > 0
    assert (later.rows > 0) == (name not in ("detect", "monitor"))
    assert with_it.flops - without.flops >= later.flops * (1 - 1e-9)
    assert with_it.down - without.down >= later.down * (1 - 1e-9)
    assert f"{later.rows:,} rows" in dict(with_it.described())[f"then {name}"]


def test_the_bound_holds_for_whichever_way_is_gone(subject: Callable[[str], Subject], tmp_path: Path) -> None:
    def rows(*search: str) -> int:
        neurons = {"search": list(search), "exact": 2, "max_windows": 3}
        return (
            estimate(config(tmp_path, subject("llama_chat").info.name, analyses=["neurons"], neurons=neurons))
            .later["neurons"]
            .rows
        )

    assert rows("gradient") < rows("windows") < rows("all")
    assert rows("gradient", "windows") == rows("windows")


def test_a_study_without_neurons_has_no_rows_for_them(subject: Callable[[str], Subject], tmp_path: Path) -> None:
    name = subject("llama_chat").info.name
    assert estimate(config(tmp_path, name, analyses=["layers"])).later == {}
    more, fewer = (
        estimate(config(tmp_path, name, analyses=["neurons"], neurons={"random_sets": number})) for number in (50, 40)
    )
    assert more.later["neurons"].rows - fewer.later["neurons"].rows in {
        10 * 2 * heldout for heldout in (2, 4)
    }  # whole templates of two pairs
    assert more.flops > fewer.flops
    assert more.rows == fewer.rows
