"""What crosses the wire: a job's payload must run where this package is not installed."""

from __future__ import annotations

import pickletools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import cloudpickle
import numpy as np
import pytest
from cloudpickle import register_pickle_by_value, unregister_pickle_by_value
from nnsight.ndif import pull_env
from nnsight.schema.request import RequestModel
from oracle import Subject, token_pair

from remote_mediation.config import Screen
from remote_mediation.engine import program
from remote_mediation.engine.budget import Budget, Setting
from remote_mediation.engine.jobs import Job
from remote_mediation.engine.rows import Row, swap, swap_all
from remote_mediation.engine.samples import Manner, bare, plan_samples
from remote_mediation.engine.tasks import Ablated, Added, generate_task, plan_tasks, screen_tasks
from remote_mediation.outcomes import ResponseOutcome
from remote_mediation.sites import Site
from remote_mediation.subspaces import Basis, Subspace

# Runs a payload with `remote_mediation` made impossible to import, as on a server that does not have it.
SERVER = """
import sys
import numpy as np, torch
from nnsight import TransformersModel
from nnsight.schema.request import RequestModel

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "remote_mediation":
            raise ModuleNotFoundError(f"No module named {name!r}")

sys.meta_path.insert(0, Absent())
sys.path[:] = [entry for entry in sys.path if not entry.endswith("main")]
folder, blob, out = sys.argv[1:]
model = TransformersModel(folder, task="text-generation", dispatch=True, dtype=torch.float32)
tracer = RequestModel.deserialize(open(blob, "rb").read(), model._remoteable_persistent_objects())
from nnsight.tracing import tracer as tracing
tracing.inc()
tracer.execute(tracer.info.code)
*contexts, weights, witness, checksum = tracer.info.frame.f_locals["values"]
np.savez(out, *[values.numpy() for values in contexts])
assert "remote_mediation" not in sys.modules
"""


class Capture:
    """An nnsight backend that keeps the request instead of sending it."""

    blob = b""

    def __call__(self, tracer: Any) -> None:
        pull_env()
        self.blob = RequestModel.serialize(tracer)


@pytest.fixture
def by_value() -> Any:
    """What `NdifBackend` does before its first job."""
    register_pickle_by_value(program)
    yield
    unregister_pickle_by_value(program)


def _job(subject: Subject) -> Job:
    pair = token_pair("wire", answers=(3, 2))
    neurons, attention = Site("mlp_neurons", 0, "all", (1, 5)), Site("attention_output", 2, "edit")
    basis = Basis.random(1, subject.info.d_model, np.random.default_rng(0))
    direction = Subspace("layer_output", 2, "last", basis=basis)
    sites = [Site("layer_output", 1, "last"), neurons, attention, direction]
    rows = [swap(pair, site, side, subject.info) for site in sites for side in (0, 1)]
    return subject.plan([pair], rows, ResponseOutcome())[0]


def _samples(subject: Subject) -> Job:
    pair, manner = bare(token_pair("wire")), Manner(2, 3, held=True)
    sites = [Site("mlp_output", 1, "all"), Site("mlp_neurons", 2, "last", (1, 5))]
    rows = [Row(pair.id, 0), *(swap_all(pair, sites, side, subject.info) for side in (0, 1))]
    setting, budget = Setting(subject.info, "float32", ResponseOutcome()), Budget(lambda: 1e18, 1e9)
    return next(plan_samples(rows, {pair.id: pair}, manner, 0, setting, budget))


def _experts(subject: Subject) -> Job:
    pair = token_pair("wire", answers=(3, 2))
    parts = [
        Site("router", 1, "all"),
        Site("expert_output", 2, "last", (1, 3)),
        Site("expert_neurons", 2, "last", (1, 5, 30)),
        Site("shared_expert_output", 1, "edit"),
    ]
    rows = [swap(pair, site, side, subject.info) for site in parts for side in (0, 1)]
    return subject.plan([pair], rows, ResponseOutcome())[0]


def _hybrid(subject: Subject) -> Job:
    pair = token_pair("wire", answers=(3, 2))
    sites = [Site("attention_output", 1, "all"), Site("attention_heads", 2, "last", (1,))]
    rows = [swap(pair, site, side, subject.info) for site in sites for side in (0, 1)]
    return subject.plan([pair], rows, ResponseOutcome())[0]


def _steered(subject: Subject) -> Job:
    setting = Setting(subject.info, "float32", ResponseOutcome())
    basis = Basis.random(1, subject.info.d_model, np.random.default_rng(0))
    prompts, added = ((7, 8, 9), (10, 11)), Added(1, tuple(basis.vectors[0].tolist()))
    tasks = [generate_task(prompts, 3, held, setting) for held in (Ablated(basis), added)]
    return next(plan_tasks(tasks, setting, Budget(lambda: 1e18, 1e9)))


def _screened(subject: Subject) -> Job:
    setting = Setting(subject.info, "float32", ResponseOutcome())
    pair = token_pair("wire", answers=(3, 2))
    tasks = [screen for way in get_args(Screen) for screen in screen_tasks([pair], "mlp_neurons", "last", setting, way)]
    return next(plan_tasks(tasks, setting, Budget(lambda: 1e18, 1e9)))


JOBS = pytest.mark.parametrize(
    ("name", "job_of"),
    [
        ("llama", _job),
        ("llama", _samples),
        ("llama", _steered),
        ("llama", _screened),
        ("qwen2_moe", _experts),
        ("lfm2", _hybrid),
    ],
)


def _blob(subject: Subject, job: Job) -> bytes:
    capture = Capture()
    program.execute(subject.backend._model, job.payload, capture)
    return capture.blob


def _modules(blob: bytes) -> set[str]:
    """Modules that a pickle imports from: the string two below each STACK_GLOBAL, memoised strings followed."""
    strings: list[str] = []
    memo: dict[int, str] = {}
    found = set()
    for opcode, argument, _ in pickletools.genops(blob):
        if "UNICODE" in opcode.name:
            strings.append(str(argument))
        elif opcode.name == "MEMOIZE":
            memo[len(memo)] = strings[-1] if strings else ""
        elif opcode.name in ("BINGET", "LONG_BINGET"):
            strings.append(memo[int(argument)])
        elif opcode.name == "STACK_GLOBAL":
            found.update(strings[-2:])
        elif opcode.name == "GLOBAL":
            found.add(str(argument).split(" ")[0])
    return found


@JOBS
def test_no_module_of_this_package_is_named(
    subject: Callable[[str], Subject], by_value: None, name: str, job_of: Callable[[Subject], Job]
) -> None:
    blob = _blob(subject(name), job_of(subject(name)))
    modules = _modules(blob)
    assert "torch" in " ".join(modules)  # the reading of the pickle works
    assert not [one for one in modules if one.split(".")[0] == "remote_mediation"]


def test_without_registering_the_package_would_be_named(
    subject: Callable[[str], Subject], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cloudpickle.cloudpickle, "_PICKLE_BY_VALUE_MODULES", set())  # other tests register, too
    monkeypatch.setattr(f"{__name__}.pull_env", lambda: None)  # as for a package in site-packages
    modules = _modules(_blob(subject("llama"), _job(subject("llama"))))
    assert "remote_mediation.engine.program" in modules


def test_a_payload_is_small(subject: Callable[[str], Subject], by_value: None) -> None:
    blob = _blob(subject("llama"), _job(subject("llama")))
    assert len(blob) < 128_000  # the program's source is most of it


@pytest.mark.slow
@JOBS
def test_a_payload_runs_without_this_package(
    subject: Callable[[str], Subject], by_value: None, tmp_path: Path, name: str, job_of: Callable[[Subject], Job]
) -> None:
    model = subject(name)
    job = job_of(model)
    (tmp_path / "blob").write_bytes(_blob(model, job))
    command = [sys.executable, "-c", SERVER, model.info.name, str(tmp_path / "blob"), str(tmp_path / "out.npz")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "out.npz") as data:
        there = np.concatenate([data[name] for name in data.files])
    here = np.stack(list(model.run([job]).values()))
    np.testing.assert_allclose(there, here, rtol=0, atol=1e-5)
