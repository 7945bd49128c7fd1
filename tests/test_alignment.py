"""What training changed, in two models that differ in weights of which it is known what they do."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from fakes import records, write_pairs
from oracle import MODULES, Oracle, Subject, token_pair

import remote_mediation as rm
from remote_mediation.analyses.alignment.ask import ALIGNMENT_COLUMNS, mediator_sets
from remote_mediation.engine.local import LocalBackend
from remote_mediation.engine.rows import Given, Row, Write
from remote_mediation.errors import SettingsError
from remote_mediation.outcomes import LogitOutcome
from remote_mediation.result import Result

Subjects = Callable[[str], Subject]


def test_given_values_are_written_as_they_are(subject: Subjects) -> None:
    """Rows that hold a site at another row's activation, read by plain hooks, are rows that take it from there."""
    model, pair, outcome = subject("gemma2_window"), token_pair("pair", (4)), LogitOutcome((5,), (6, 7))
    recorded = Oracle(model.plain, pair)._recorded[1, 0]["mlp_output", 1]
    places, calls = tuple(range(len(pair.x0))), []

    def load() -> np.ndarray:
        calls.append(1)
        return recorded.numpy()

    rows = [Row("pair", 0, (Write("mlp_output", 1, places, (), Given(name, load)),)) for name in ("a", "a", "b")]
    assert rows[0] == rows[1] != rows[2]
    keys = model.keys([pair], outcome)
    assert keys(rows[0]) == keys(rows[1]) != keys(rows[2])
    assert not calls  # a row that is known needs no values
    found = model.measure([pair], rows, outcome)

    def hook(*_: Any) -> torch.Tensor:
        return recorded[None]

    handle = model.plain.get_submodule(MODULES["gemma2"]["mlp_output"].format(1)).register_forward_hook(hook)
    with torch.no_grad():
        logits = model.plain(input_ids=torch.tensor([pair.x0])).logits[0, -1]
    handle.remove()
    np.testing.assert_allclose(found, float(logits[5] - logits[[6, 7]].mean()), rtol=0, atol=1e-4)
    assert abs(found[0] - model.measure([pair], [Row("pair", 0)], outcome)[0]) > 1e-2


@pytest.fixture
def trained(subject: Subjects, tmp_path: Path) -> Callable[[str, int], Path]:
    """A copy of the tiny model with other weights in one module of one layer."""

    def make(module: str, layer: int) -> Path:
        model, folder = subject("llama_chat"), tmp_path / f"{module}{layer}"
        changed = type(model.plain)(model.plain.config)
        changed.load_state_dict(model.plain.state_dict())
        generator = torch.Generator().manual_seed(5)
        part = getattr(changed.model.layers[layer], module)
        with torch.no_grad():
            for weight in part.parameters():
                weight.add_(torch.empty(weight.shape).normal_(0, 0.3, generator=generator))
        changed.save_pretrained(folder)
        model.backend.tokenizer.save_pretrained(folder)
        return folder

    return make


def study(trained: Path, base: str, tmp_path: Path) -> rm.StudyConfig:
    return rm.StudyConfig(
        model=str(trained),
        pairs=str(write_pairs(tmp_path / "pairs.jsonl", records())),
        analyses=["alignment"],
        alignment={"base": base},
        outcome="logit_diff",
        logit_diff={"plus": ["sure", "yes"], "minus": ["sorry"]},
        statistics={"resamples": 100},
    )


def shares(result: Result, prompts: str, quantity: str) -> pd.Series:
    table = result.tables["alignment.csv"]
    part = table[(table["prompts"] == prompts) & (table["quantity"] == quantity)]
    return part.set_index("mediators")["share"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "layer", "where"),
    [("mlp", 2, "late MLPs"), ("self_attn", 1, "middle attention"), ("mlp", 0, "early MLPs")],
)
def test_the_module_that_was_trained_carries_the_whole_change(
    subject: Subjects, trained: Callable[[str, int], Path], tmp_path: Path, module: str, layer: int, where: str
) -> None:
    """One module alone differs, so its values are the whole difference; what comes before it is the same in both."""
    base, folder = subject("llama_chat").backend, trained(module, layer)
    config = study(folder, base.info.name, tmp_path)
    backend = LocalBackend.load(str(folder))
    with rm.open_lab(config, out=tmp_path / "run", backend=backend) as lab:
        result = lab.run({base.info.name: base})
        report = lab.report().read_text("utf-8")
    table = result.tables["alignment.csv"]
    assert list(table.columns) == list(ALIGNMENT_COLUMNS)
    thirds = ("early", "middle", "late")
    for prompts in ("harmful", "harmless"):
        change = table[(table["prompts"] == prompts) & (table["quantity"] == "change")].iloc[0]
        assert abs(change["mean"]) > 0.1
        for quantity in ("undone", "brought"):
            means = table[(table["prompts"] == prompts) & (table["quantity"] == quantity)].set_index("mediators")[
                "mean"
            ]
            assert means[where] == pytest.approx(change["mean"], abs=1e-3)
            before = [name for name in means.index if name.split()[0] in thirds[:layer]]
            np.testing.assert_allclose(means[before], 0, atol=1e-3)
            streams = {at: means.get(f"stream after the {third} third", np.nan) for at, third in enumerate(thirds[:2])}
            for at, mean in streams.items():
                assert mean == pytest.approx(change["mean"] if at >= layer else 0, abs=1e-3)
    assert "## What training changed" in report
    idle = re.findall(r"^- (.*): 0 in both directions$", report, re.M)
    assert len(idle) == 2  # on harmful and on harmless prompts
    nothing = {"early attention", *(["early MLPs"] if layer else [])}
    assert all(nothing <= set(names.split(", ")) for names in idle)
    for prompts in ("harmful", "harmless"):
        undone = shares(result, prompts, "undone").dropna()
        said = report.split(f"On {prompts} prompts training changed")[1].split(". ")[0]
        assert (f"of all modules the {where} do most" in report) == bool(len(undone)) or "not told apart" in said
        assert undone.get(where, 1) == pytest.approx(1, abs=1e-3)
    again = rm.open_run(tmp_path / "run").result().tables["alignment.csv"]
    pd.testing.assert_frame_equal(again, table, check_exact=True)
    kept = sum(path.stat().st_size for path in (tmp_path / "run/readouts").iterdir())
    assert kept < 200_000  # no activations


def test_sets_cover_every_layer_once_by_kind() -> None:
    sets = mediator_sets(7)
    modules = [one for name, mediators in sets.items() if "stream" not in name for one in mediators]
    assert sorted(modules) == sorted((kind, layer) for kind in ("mlp_output", "attention_output") for layer in range(7))
    assert sets["stream after the early third"] == (("layer_output", 2),)
    assert sets["stream after the middle third"] == (("layer_output", 4),)


def test_a_base_is_asked_for() -> None:
    with pytest.raises(ValueError, match=r"alignment needs \[alignment\] with `base`"):
        rm.StudyConfig(model="m", analyses=["alignment"])


def test_a_base_without_a_backend_is_refused(subject: Subjects, tmp_path: Path) -> None:
    model = subject("llama_chat").backend
    config = study(Path(model.info.name), "tuned", tmp_path)
    with (
        rm.open_lab(config, out=tmp_path / "run", backend=model) as lab,
        pytest.raises(
            SettingsError, match=r"alignment\.base names 'tuned', and no backend of it is among the variants"
        ),
    ):
        lab.run({})
