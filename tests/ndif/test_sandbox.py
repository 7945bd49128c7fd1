"""A server as untrusted users meet it: each job runs in a process apart from the model, without weights or gradients.

    scripts/ndif/up --sandbox .ndif/models/tiny=tests/tiny-llama

Skipped on the server that the other tests use.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from tiny import ROOT

from remote_mediation.config import StudyConfig
from remote_mediation.engine.budget import Budget, Setting
from remote_mediation.engine.exchange import Server
from remote_mediation.engine.local import LocalBackend
from remote_mediation.engine.remote import NdifBackend
from remote_mediation.engine.rows import Row, swap_all
from remote_mediation.engine.samples import Manner, bare, plan_samples
from remote_mediation.engine.tasks import Ablated, Added, drift_task, generate_task, plan_tasks
from remote_mediation.errors import SiteError
from remote_mediation.outcomes import ResponseOutcome
from remote_mediation.pairs import load_pairs
from remote_mediation.sites import Site, band
from remote_mediation.store import Store
from remote_mediation.study import run_study
from remote_mediation.subspaces import Basis
from remote_mediation.tokens import tokenise

TOLERANCE = 1e-4


@pytest.fixture(scope="module", autouse=True)
def sandboxed(server: Server) -> None:
    """Skip the tests where blocks run beside the model."""
    if not json.loads((ROOT / ".ndif/run/settings.json").read_text("utf-8"))["sandbox"]:
        pytest.skip("the server is not sandboxed; see the head of this file")


@pytest.fixture(scope="module")
def backend(server: Server, tiny: StudyConfig) -> NdifBackend:
    return NdifBackend(tiny.model, "", server, lambda line: None, dtype="float32")


@pytest.fixture(scope="module")
def local(backend: NdifBackend) -> LocalBackend:
    """The same model on this machine, under the server's name for it."""
    found = LocalBackend.load(str(ROOT / ".ndif/models/tiny"))
    found.info = backend.info
    return found


def changed(study: StudyConfig, **settings: Any) -> StudyConfig:
    """Starting a process for each job takes a second, so jobs here are few and large."""
    defaults = {"logit_diff": {"plus": ["sure"], "minus": ["sorry"]}, "job_seconds": 1e6}
    return StudyConfig(**{**study.model_dump(exclude={"logit_diff"}), **defaults, **settings})


def values(study: StudyConfig, backend: Any, folder: Path) -> dict[str, np.ndarray]:
    store = Store.create(folder, study.identity())
    run_study(study, backend, store)
    assert store.failures() == {}
    return store.values()


@pytest.mark.parametrize("outcome", ["response_logprob", "logit_diff"])
def test_every_potential_outcome_is_the_local_one(
    outcome: str, backend: NdifBackend, local: LocalBackend, tiny: StudyConfig, tmp_path: Path
) -> None:
    study = changed(tiny, outcome=outcome, analyses=["layers", "modules", "tokens", "heads"])
    here = values(study.model_copy(update={"backend": "local"}), local, tmp_path / "here")
    there = values(study, backend, tmp_path / "there")
    assert here.keys() == there.keys()
    assert np.ptp(np.concatenate(list(here.values()))) > 1
    assert max(float(np.abs(here[key] - there[key]).max()) for key in here) < TOLERANCE


@pytest.mark.parametrize("held", [False, True])
def test_sampled_answers_are_the_local_ones(held: bool, backend: NdifBackend, local: LocalBackend, pairs: Path) -> None:
    texts = tokenise(load_pairs(str(pairs))[:2], backend.tokenizer).pairs
    by_id = {pair.id: bare(pair) for pair in texts}
    sites = [*band("mlp_output", range(1, 3), "all"), Site("attention_heads", 1, "last", (0, 2))]
    rows = [Row(pair.id, 1) for pair in texts]
    rows += [swap_all(pair, sites, side, backend.info) for pair in by_id.values() for side in (0, 1)]
    setting = Setting(backend.info, "float32", ResponseOutcome())
    (job,) = plan_samples(rows, by_id, Manner(3, 6, 1.5, held), 0, setting, Budget(lambda: 1e18, 1e9))
    there, here = (np.array(one.collect(one.submit(job)).values) for one in (backend, local))
    np.testing.assert_allclose(there, here, rtol=0, atol=TOLERANCE)  # token ids and logits
    assert len(np.unique(here, axis=0)) == len(rows)


@pytest.mark.parametrize("kind", ["ablated", "added"])
def test_steered_answers_are_the_local_ones(kind: str, backend: NdifBackend, local: LocalBackend) -> None:
    rng, width = np.random.default_rng(0), backend.info.d_model
    steered = {
        "ablated": Ablated(Basis.random(2, width, rng)),
        "added": Added(1, tuple(map(float, 3 * rng.normal(size=width)))),
    }[kind]
    prompts, setting = ((7, 8, 9, 10, 11), (12, 13, 14)), Setting(backend.info, "float32", ResponseOutcome())
    tasks = [generate_task(prompts, 5, held, setting) for held in ((), steered)]
    tasks.append(drift_task("a", prompts[0], (20, 21), steered, setting))
    jobs = list(plan_tasks(tasks, setting, Budget(lambda: 1e18, 1e9)))
    there, here = (
        [np.array(value) for job in jobs for value in one.collect(one.submit(job)).values] for one in (backend, local)
    )
    for far, near in zip(there, here, strict=True):
        np.testing.assert_allclose(far, near, rtol=0, atol=TOLERANCE)  # token ids, divergences
    (plain, answers), drift = sorted(here, key=len)[1:], min(here, key=len)
    assert (plain != answers).any()
    assert drift[0] > 10 * TOLERANCE


def test_screening_by_gradients_is_refused_with_the_reason(
    backend: NdifBackend, tiny: StudyConfig, tmp_path: Path
) -> None:
    study = changed(tiny, analyses=["neurons"], neurons={"search": ["gradient"]})
    with pytest.raises(SiteError, match=r"\(gradient: .* gives no gradients\); allow another way") as caught:
        run_study(study, backend, Store.create(tmp_path / "run", study.identity()))
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_windows_replace_gradients_where_the_study_allows_it(
    backend: NdifBackend, tiny: StudyConfig, tmp_path: Path
) -> None:
    study = changed(
        tiny, analyses=["neurons"], neurons={"search": ["gradient", "windows"], "max_windows": 1, "random_sets": 2}
    )
    tables = run_study(study, backend, Store.create(tmp_path / "run", study.identity())).tables
    search: pd.DataFrame = tables["search.csv"]
    assert search["step"].str.startswith("windows of up to").all()
    assert len(search) > 0
