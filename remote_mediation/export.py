"""What of a run can be given to others: its report, tables, figures and `run.json`, without prompts and answers.

Where others are to run it again, its prompts go with it, in a folder of their own (`replicate`).
"""

from __future__ import annotations

import shutil
from pathlib import Path

from remote_mediation.errors import StoreError
from remote_mediation.replicate import replica
from remote_mediation.report import write_report
from remote_mediation.store import Store
from remote_mediation.study import reread


def export(store: Store, folder: Path, *, replicate: bool = False) -> list[Path]:
    """Write that into a new or empty folder, from what was measured and not from the files that lie there.

    replicate: also write what it takes to run the study again, into `replicate/` there. Returns what was written.

    Raises:
        StoreError: the folder is in use or cannot be written, or the run cannot be run again without its answers.
        ModelError: as `replica`.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise StoreError(f"{folder} is in use; name a folder that is new or empty")
    further = replica(store) if replicate else {}
    result, target = reread(store), Store(folder)
    try:
        write_report(store, result, shared=folder)
        target.write("run.json", store.record_text())
        for name, content in further.items():
            target.write(f"replicate/{name}", content)
    except BaseException:  # a part of it would be in the way of the next try, and looks like the whole
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return sorted(path for path in folder.rglob("*") if path.is_file())
