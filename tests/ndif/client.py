"""A remote study in a process of its own: `client.py MODEL FOLDER` prints what it took as one line of JSON."""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

from remote_mediation.backends import NdifBackend
from remote_mediation.config import StudyConfig
from remote_mediation.ndif import server_from_environment
from remote_mediation.store import Store
from remote_mediation.study import run_study


def main(model: str, folder: str) -> None:
    """Run a study of two pairs and say at what price."""
    study = StudyConfig(
        model=model,
        backend="ndif",
        max_pairs=2,
        granularity=["layers"],
        positions={"layers": ["last"]},
        response_logprob={"tokens": 3},
        statistics={"resamples": 100},
    )
    backend = NdifBackend(model, "", server_from_environment(), lambda line: None, dtype="float32")
    store = Store.create(Path(folder), study.identity())
    run_study(study, backend, store)
    said = {
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "devices": sorted({weight.device.type for weight in backend._model._module.parameters()}),
        "values": len(store.values()),
        "traffic": vars(backend.traffic),
    }
    print(json.dumps(said))  # noqa: T201


if __name__ == "__main__":
    main(*sys.argv[1:])
