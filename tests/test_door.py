"""The way in from Python: one-line questions, what is stored, and what does not fit together."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fakes import records, write_pairs
from oracle import Subject

import remote_mediation as rm
from remote_mediation.door import SET_EFFECT_COLUMNS, study_name
from remote_mediation.effects import EFFECT_COLUMNS
from remote_mediation.engine.rows import Scale
from remote_mediation.engine.tasks import Held
from remote_mediation.errors import SettingsError, SiteError

IDS = torch.tensor([[8, 9, 10, 11]])
SITES = [rm.Site("mlp_output", layer, "last") for layer in (1, 2)]


@pytest.fixture
def study(tmp_path: Path, model: Subject) -> rm.StudyConfig:
    pairs = write_pairs(tmp_path / "pairs.jsonl", records())
    openings = {"compliant": ["sure", "yes"], "refusing": ["sorry", "no"]}
    statistics = {"resamples": 100}
    return rm.StudyConfig(
        model=model.info.name, pairs=str(pairs), analyses=["layers"], refusal=openings, statistics=statistics
    )


@pytest.fixture
def model(subject: Callable[[str], Subject]) -> Subject:
    return subject("llama_chat")


def test_questions_are_answered_and_stored(study: rm.StudyConfig, model: Subject, tmp_path: Path) -> None:
    with rm.open_lab(study, out=tmp_path / "run", backend=model.backend) as lab:
        single = lab.effects(SITES)
        joint, direct = lab.joint(SITES), lab.direct(SITES)
        assert list(single.columns) == list(EFFECT_COLUMNS)
        assert list(joint.columns) == list(direct.columns) == list(SET_EFFECT_COLUMNS)
        assert len(single) == 2 * len(joint) == 2 * len(lab.pairs())
        np.testing.assert_allclose(joint["te"], joint["nie"] + joint["nde"] + joint["int"])
        alone = single[single["layer"] == 1].set_index("pair_id").loc[joint["pair_id"]]
        np.testing.assert_array_equal(lab.joint(SITES[:1])["nie"], alone["nie"])
        assert joint["nie"].abs().max() > 0.1
        kept = sorted((tmp_path / "run/readouts").iterdir())
        pd.testing.assert_frame_equal(lab.effects(SITES), single)
    with rm.open_lab(study, out=tmp_path / "run", backend=model.backend) as again:
        pd.testing.assert_frame_equal(again.joint(SITES), joint)
    assert sorted((tmp_path / "run/readouts").iterdir()) == kept


def test_a_run_is_reported_again_without_a_model(study: rm.StudyConfig, model: Subject, tmp_path: Path) -> None:
    with rm.open_lab(study, out=tmp_path / "run", backend=model.backend) as lab:
        result = lab.run()
        report = lab.report().read_text("utf-8")
    opened = rm.open_run(tmp_path / "run")
    pd.testing.assert_frame_equal(opened.result().effects, result.effects)
    assert opened.report().read_text("utf-8") == report
    assert "finished" in repr(opened)


def test_a_trace_of_ones_own_sees_what_rows_swap(study: rm.StudyConfig, model: Subject, tmp_path: Path) -> None:
    lab = rm.open_lab(study, out=tmp_path / "run", backend=model.backend)
    module = model.plain.get_submodule("model.layers.1.mlp")
    seen = []
    handle = module.register_forward_hook(lambda *given: seen.append(given[-1]))
    model.plain(input_ids=IDS)
    handle.remove()
    with lab.model.trace(input_ids=IDS):
        added = lab.site(SITES[0]).output.save()
    np.testing.assert_allclose(added.detach().numpy(), seen[0].detach().numpy(), atol=1e-5)
    with pytest.raises(SiteError, match="layer 9 is out of range"):
        lab.site(rm.Site("mlp_output", 9, "last"))


def test_answers_are_generated_with_neurons_held(study: rm.StudyConfig, model: Subject, tmp_path: Path) -> None:
    with rm.open_lab(study, out=tmp_path / "run", backend=model.backend) as lab:
        plain = lab.generate("steal-car", tokens=4)
        everything = tuple(range(model.info.d_ff))
        held = lab.generate("steal-car", tokens=4, held=[Held(layer, everything, Scale(-9.0)) for layer in range(3)])
    assert plain
    assert plain != held


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dtype": "bfloat16"}, "dtype is 'bfloat16', the backend's is 'float32'"),
        ({"model": "other"}, "the study's model is 'other'"),
        ({"revision": "r"}, "the study's revision is 'r', the backend's is ''"),
    ],
)
def test_what_does_not_fit_together_is_refused(
    study: rm.StudyConfig, model: Subject, tmp_path: Path, change: dict[str, str], said: str
) -> None:
    with pytest.raises(SettingsError, match=said):
        rm.open_lab(study, out=tmp_path / "run", backend=model.backend, **change)
    assert not (tmp_path / "run").exists()


def test_checkpoints_without_backends_are_refused_in_one_line(
    study: rm.StudyConfig, model: Subject, tmp_path: Path
) -> None:
    attacked = study.model_copy(update={"analyses": ["attacks"], "attacks": {"checkpoints": ["tuned"]}})
    lab = rm.open_lab(attacked, out=tmp_path / "run", backend=model.backend)
    with pytest.raises(SettingsError, match="names 'tuned', and no backend of it is among the variants"):
        lab.run(variants={})


def test_an_unknown_pair_is_named(study: rm.StudyConfig, model: Subject, tmp_path: Path) -> None:
    lab = rm.open_lab(study, out=tmp_path / "run", backend=model.backend)
    with pytest.raises(SettingsError, match="no pair 'nobody'"):
        lab.joint(SITES, ["nobody"])


@pytest.mark.parametrize(
    ("file", "name"), [("deep/quickstart/study.toml", "quickstart"), ("my-model.toml", "my-model")]
)
def test_a_study_file_names_its_run_folder(tmp_path: Path, file: str, name: str) -> None:
    assert study_name(tmp_path / file) == name
