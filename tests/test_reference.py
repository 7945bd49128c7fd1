"""A run on a server in bfloat16 says how far it lies from float32, where this machine can tell; else why it cannot."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes import INFO, records, write_pairs
from nnsight.modeling import huggingface
from oracle import Subject
from small_ndif import SmallNdif

from remote_mediation import open_lab, open_run
from remote_mediation.config import StudyConfig
from remote_mediation.engine.local import LocalBackend
from remote_mediation.engine.remote import NdifBackend
from remote_mediation.reference import compare_with_float32
from remote_mediation.store import Store

Measure = Callable[[str, Path, Path], dict[str, Any]]


@pytest.fixture
def low(subject: Callable[[str], Subject], tmp_path: Path) -> LocalBackend:
    """The model in bfloat16, as a server holds it; its folder is this test's own."""
    folder = tmp_path / "model"
    shutil.copytree(subject("llama_chat").info.name, folder)
    return LocalBackend.load(str(folder), dtype="bfloat16")


@pytest.fixture
def measure(low: LocalBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Measure]:
    """What `run.json` says of the precision after a run of the model on a server or here."""
    small = SmallNdif(low.model)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setitem(huggingface._ID_CACHE, low.info.name, "org/tiny")

    def run(place: str, out: str, **settings: Any) -> dict[str, Any]:
        study = StudyConfig(
            model=low.info.name,
            pairs=str(write_pairs(tmp_path / "pairs.jsonl", records()[:4])),
            backend=place,
            dtype="bfloat16",
            analyses=["layers"],
            positions={"layers": ["last"]},
            outcome="logit_diff",
            logit_diff={"plus": ["sure"], "minus": ["sorry"]},
            statistics={"resamples": 100},
            **settings,
        )
        remote = NdifBackend(study.model, "", small.server, lambda line: None) if place == "ndif" else low
        with open_lab(study, out=tmp_path / out, backend=remote) as lab:
            lab.run()
        report = open_run(tmp_path / out).report().read_text("utf-8")
        found = open_run(tmp_path / out)._store.record()["deviation_from_float32"]
        assert all(f"deviation_from_float32.{name}" in report for name in found)
        return found

    yield run
    small.close()


def test_a_remote_run_lies_as_far_from_float32_as_a_local_one(measure: Measure) -> None:
    there, here = measure("ndif", "there"), measure("local", "here")
    assert there["largest"] == pytest.approx(here["largest"], abs=1e-6)
    assert there["mean"] == pytest.approx(here["mean"], abs=1e-6)
    assert {name: there[name] for name in ("outcomes", "unit")} == {"outcomes": here["outcomes"], "unit": "logits"}
    assert there["largest"] > 1e-4


def test_why_a_remote_run_is_not_compared(measure: Measure, low: LocalBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("remote_mediation.reference.memory_here", lambda: 1e5)
    assert measure("ndif", "large")["missing"].startswith("in float32 its weights take 0.0 GB, and 0.0 GB may be")
    monkeypatch.undo()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setitem(huggingface._ID_CACHE, low.info.name, "org/tiny")
    weights = Path(low.info.name) / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert measure("ndif", "cut")["missing"].startswith(f"cannot load '{low.info.name}' as float32")
    weights.unlink()
    assert measure("ndif", "gone") == {"missing": "its weights are not on this machine"}


def test_other_weights_are_no_reference(measure: Measure, low: LocalBackend) -> None:
    other = LocalBackend.load(low.info.name)
    other.model._module.model.layers[0].mlp.down_proj.weight.data[0, 0] += 1
    other.model._module.save_pretrained(low.info.name)
    assert measure("ndif", "other") == {"missing": "the weights on this machine are others than the server's"}


@pytest.mark.parametrize(
    ("quantization", "dtype", "why"),
    [
        ("int8", "float16", "weights in int8 are multiplied in int8, so that there are no products in float32"),
        ("nf4", "float32", "products are in float32; what weights in nf4 change is not measured"),
    ],
)
def test_why_quantised_weights_are_not_compared(tmp_path: Path, quantization: str, dtype: str, why: str) -> None:
    study = StudyConfig(model="org/tiny", dtype=dtype, load={"quantization": quantization})
    store = Store.create(tmp_path / "run", study.identity())
    store.save_record({"study": study.identity()})

    def load(settings: StudyConfig) -> Any:
        raise AssertionError("a second model is loaded")

    compare_with_float32(store, study, INFO, load)
    assert store.record()["deviation_from_float32"] == {"missing": why}
