"""Peak memory of real studies: as `plan` states it, as it is measured, and as `--max-memory` allows it."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.grid import MINUS, MODEL, PLUS

LIMITS = (None, 1.3, 1.6, 2.4)
PAIRS = 6
OUTCOMES = ("response_logprob", "logit_diff")
_CHILD = """
import json, resource, sys
from pathlib import Path
from remote_mediation.engine.local import LocalBackend
from remote_mediation.config import StudyConfig
from remote_mediation.store import Store
from remote_mediation.study import run_study
config = StudyConfig(**json.loads(sys.argv[1]))
backend = LocalBackend.load(config.model, limited=config.max_memory is not None)
run_study(config, backend, Store.create(Path(sys.argv[2]), config.identity()))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""
_PLAN = """
import json, sys
from remote_mediation.config import StudyConfig
from remote_mediation.cost import estimate
print(estimate(StudyConfig(**json.loads(sys.argv[1]))).memory)
"""


def main() -> None:
    """Measure every limit under both outcomes, write the report. Each study is a process of its own."""
    points = [_point(outcome, limit) for outcome in OUTCOMES for limit in LIMITS]
    import pandas as pd

    from bench import report
    from bench.machine import facts

    report.save_memory(pd.DataFrame(points), facts())
    report.write()


def _point(outcome: str, limit: float | None) -> dict[str, object]:
    config = {
        "model": MODEL,
        "max_pairs": PAIRS,
        "analyses": ["layers", "modules"],
        "outcome": outcome,
        "logit_diff": {"plus": [PLUS], "minus": [MINUS]},
        "max_memory": limit,
        "job_seconds": 60,
        "statistics": {"resamples": 100},
    }
    with tempfile.TemporaryDirectory() as scratch:
        planned = float(_last(_PLAN, json.dumps(config)))
        peak = float(_last(_CHILD, json.dumps(config), str(Path(scratch) / "run")))
    point = {"outcome": outcome, "limit_gb": limit, "planned_gb": planned / 1e9, "peak_gb": peak / 1e9}
    print(point, flush=True)
    return point


def _last(program: str, *arguments: str) -> str:
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]


if __name__ == "__main__":
    main()
