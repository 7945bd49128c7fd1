"""A remote study in a process of its own: `client.py MODEL FOLDER` prints what it took as one line of JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from remote_mediation.config import StudyConfig
from remote_mediation.engine.remote import NdifBackend
from remote_mediation.engine.server import server_from_environment
from remote_mediation.store import Store
from remote_mediation.study import run_study


def peak_gib() -> float:
    """Peak memory of this program alone; `ru_maxrss` would count the process that started it too."""
    status = Path("/proc/self/status").read_text("utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) / 2**20


def main(model: str, folder: str) -> None:
    """Run a study of two pairs and say at what price."""
    study = StudyConfig(
        model=model,
        backend="ndif",
        max_pairs=2,
        analyses=["layers"],
        positions={"layers": ["last"]},
        outcome="response_logprob",
        response_logprob={"tokens": 3},
        statistics={"resamples": 100},
    )
    backend = NdifBackend(model, "", server_from_environment(), lambda line: None, dtype="float32")
    store = Store.create(Path(folder), study.identity())
    run_study(study, backend, store)
    said = {
        "peak_gib": peak_gib(),
        "devices": sorted({weight.device.type for weight in backend._model._module.parameters()}),
        "values": len(store.values()),
        "traffic": vars(backend.traffic),
    }
    print(json.dumps(said))  # noqa: T201


if __name__ == "__main__":
    main(*sys.argv[1:])
