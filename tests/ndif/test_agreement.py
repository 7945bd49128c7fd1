"""The same study here and on the server: same numbers, same source, and nothing but a few numbers on the wire."""

from __future__ import annotations

import inspect
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import zstandard

from remote_mediation.config import StudyConfig
from remote_mediation.engine import program
from remote_mediation.engine.budget import Budget, Setting
from remote_mediation.engine.exchange import Server
from remote_mediation.engine.local import LocalBackend
from remote_mediation.engine.remote import NdifBackend
from remote_mediation.engine.rows import Row, swap_all
from remote_mediation.engine.samples import Manner, bare, plan_samples
from remote_mediation.engine.tasks import generate_task, plan_tasks
from remote_mediation.errors import PreflightError
from remote_mediation.outcomes import ResponseOutcome
from remote_mediation.pairs import load_pairs
from remote_mediation.sites import band
from remote_mediation.store import Store
from remote_mediation.study import run_study
from remote_mediation.tokens import tokenise

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
TOLERANCE = 1e-4
OUTCOMES: dict[str, dict[str, Any]] = {
    "response_logprob": {"response_logprob": {"tokens": 4}},
    "logit_diff": {"logit_diff": {"plus": ["Sure", "Here"], "minus": ["I", "Sorry"]}},
}


def config(outcome: str, **settings: Any) -> StudyConfig:
    defaults = {
        "model": SMOLLM2,
        "max_pairs": 2,
        "analyses": ["layers", "modules", "neurons"],
        "positions": {"layers": ["edit", "last"], "modules": ["last"]},
        "neurons": {"search": ["windows"], "max_windows": 1, "layers": [15, 29]},
        "statistics": {"resamples": 100},
        "outcome": outcome,
    }
    return StudyConfig(**{**defaults, **OUTCOMES[outcome], **settings})


def remote(server: Server, model: str = SMOLLM2, **settings: Any) -> NdifBackend:
    return NdifBackend(model, "", server, lambda line: None, **settings)


class Both(NamedTuple):
    """One study, measured in both places."""

    local: dict[str, np.ndarray]
    remote: dict[str, np.ndarray]
    backend: NdifBackend
    measured: int
    """Numbers that were brought back."""


@pytest.fixture(scope="module", params=list(OUTCOMES))
def both(request: pytest.FixtureRequest, server: Server, tmp_path_factory: pytest.TempPathFactory) -> Both:
    values = {}
    backend = remote(server, dtype="float32")
    backend.traffic.down = 0
    for name, place in (("local", LocalBackend.load(SMOLLM2)), ("ndif", backend)):
        study = config(request.param, backend=name)
        store = Store.create(tmp_path_factory.mktemp(request.param) / name, study.identity())
        run_study(study, place, store)
        values[name] = store.values()
    count = sum(len(row) for row in values["ndif"].values())
    return Both(values["local"], values["ndif"], backend, count)


@pytest.mark.slow
def test_every_potential_outcome_is_the_same(both: Both) -> None:
    first_wave = set(both.local) & set(both.remote)
    # Which windows are resolved may hang on the last digit; all else was measured in both places.
    assert len(first_wave) >= 0.9 * max(len(both.local), len(both.remote))
    worst = max(float(np.abs(both.local[key] - both.remote[key]).max()) for key in first_wave)
    assert worst < TOLERANCE
    assert np.ptp(np.concatenate(list(both.local.values()))) > 1


@pytest.mark.slow
def test_only_the_outcomes_come_back(both: Both) -> None:
    traffic = both.backend.traffic
    # Four bytes per number; every job measures both base prompts again and has a kilobyte or two of file around it.
    assert traffic.down < 8 * both.measured + 4000 * traffic.jobs
    assert traffic.up < 60_000 * traffic.jobs


@pytest.mark.slow
def test_greedy_answers_are_equal(server: Server) -> None:
    backend = remote(server)
    texts = ("Write a tutorial on how to bake bread.", "Tell me a joke.")
    prompts = [
        tuple(
            backend.tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
            )
        )
        for text in texts
    ]
    setting = Setting(backend.info, "float32", ResponseOutcome())
    (job,) = plan_tasks([generate_task(prompts, 12, (), setting)], setting, Budget(lambda: 1e18, 1e9))
    (there,), (here,) = (one.collect(one.submit(job)).values for one in (backend, LocalBackend.load(SMOLLM2)))
    np.testing.assert_array_equal(there, here)
    assert len(set(there.astype(int).tolist())) > 8


@pytest.mark.slow
@pytest.mark.parametrize("held", [False, True])
def test_sampled_answers_are_equal(server: Server, held: bool) -> None:
    """The same random numbers in both places, and the same swapped mediators."""
    backend, manner = remote(server), Manner(2, 8, 1.0, held)
    pairs = {pair.id: bare(pair) for pair in tokenise(load_pairs("builtin")[:2], backend.tokenizer).pairs}
    sites = band("mlp_output", range(10, 14), "all")
    rows = [Row(name, 0) for name in pairs]
    rows += [swap_all(pair, sites, side, backend.info) for pair in pairs.values() for side in (0, 1)]
    setting = Setting(backend.info, "float32", ResponseOutcome())
    (job,) = plan_samples(rows, pairs, manner, 0, setting, Budget(lambda: 1e18, 1e9))
    both = [one.collect(one.submit(job)).values for one in (backend, LocalBackend.load(SMOLLM2))]
    (ids, logits), (ids_here, logits_here) = (
        np.array(values).reshape(len(rows), 2, -1).transpose(1, 0, 2) for values in both
    )
    np.testing.assert_array_equal(ids, ids_here)
    np.testing.assert_allclose(logits, logits_here, rtol=0, atol=TOLERANCE)
    assert len({tuple(row) for row in ids}) == len(rows)


def test_bytes_down_grow_with_outcomes_and_not_with_the_model(
    server: Server, tiny: StudyConfig, tmp_path: Path
) -> None:
    settings = {"analyses": ["layers"], "outcome": "logit_diff", "job_seconds": 1e6}
    small = remote(server, tiny.model)
    per_model = {}
    for model, words in (
        (tiny.model, {"plus": ["sure"], "minus": ["sorry"]}),
        (SMOLLM2, {"plus": ["Sure"], "minus": ["I"]}),
    ):
        study = tiny.model_copy(update={})
        study = StudyConfig(
            **{**study.model_dump(exclude={"logit_diff"}), **settings, "model": model, "logit_diff": words}
        )
        backend = small if model == tiny.model else remote(server, model)
        backend.traffic.down = 0
        store = Store.create(tmp_path / model.replace("/", "-"), study.identity())
        run_study(study, backend, store)
        per_model[model] = backend.traffic.down / sum(len(row) for row in store.values().values())
    # 18 times the width and 10 times the layers, and no more bytes per number.
    assert per_model[SMOLLM2] < 1.5 * per_model[tiny.model]


def test_the_payload_carries_the_source_of_program_py(
    server: Server, tiny: StudyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = remote(server, tiny.model)
    blobs: list[bytes] = []
    monkeypatch.setattr("remote_mediation.engine.remote.exchange", _keep(blobs))
    with pytest.raises(_KeptError):
        backend._send({"task": "probe", "blocks": "model.layers"})
    content = zstandard.ZstdDecompressor().decompress(blobs[0], max_output_size=10_000_000)
    # nnsight ships functions by their source: each of program.py's is in the payload as it stands in the file.
    for function in (program.measure, program.climb, program.write, program.additive_mask):
        body = inspect.getsource(function).split('"""')[-1].strip()
        assert body.encode() in content, function.__name__
    assert b"remote_mediation.engine.remote" not in content


def test_the_client_needs_little_memory_and_no_weights(pairs: Path, tmp_path: Path) -> None:
    command = [sys.executable, Path(__file__).with_name("client.py"), SMOLLM2, str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["devices"] == ["meta"]
    assert said["peak_gib"] < 1.5
    assert said["values"] > 0


def test_a_study_in_another_precision_than_the_server_is_refused(server: Server, tiny: StudyConfig) -> None:
    with pytest.raises(PreflightError, match=r'in float32, the study says bfloat16; set dtype = "float32"'):
        remote(server, tiny.model, dtype="bfloat16")


def test_saved_values_own_their_storage(server: Server, tiny: StudyConfig, tmp_path: Path) -> None:
    """A saved view would ship all of the tensor that it looks at."""
    seen: list[torch.Tensor] = []

    class Watched(NdifBackend):
        def _wait(self, ticket: str) -> Any:
            values, seconds = super()._wait(ticket)
            seen.extend(values)
            return values, seconds

    backend = Watched(tiny.model, "", server, lambda line: None)
    run_study(tiny, backend, Store.create(tmp_path / "run", tiny.identity()))
    assert len(seen) > 10
    for tensor in seen:
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        buffer = io.BytesIO()
        torch.save(tensor, buffer)
        assert len(buffer.getvalue()) < 8 * tensor.numel() + 3000


class _KeptError(Exception):
    pass


def _keep(blobs: list[bytes]) -> Any:
    def exchange(*asked: Any, files: dict[str, Any], **more: Any) -> Any:
        blobs.append(files["blob"][1])
        raise _KeptError

    return exchange
