"""What of a run can be given to others: its report, tables, figures and `run.json`, without prompts and answers."""

from __future__ import annotations

from pathlib import Path

from remote_mediation.errors import StoreError
from remote_mediation.report import write_report
from remote_mediation.store import Store
from remote_mediation.study import reread


def export(store: Store, folder: Path) -> list[Path]:
    """Write that into a new or empty folder, from what was measured and not from the files that lie there.

    Returns what was written.

    Raises:
        StoreError: the folder is in use or cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise StoreError(f"{folder} is in use; name a folder that is new or empty")
    write_report(store, reread(store), shared=folder)
    Store(folder).write("run.json", (store.folder / "run.json").read_bytes())
    return sorted(path for path in folder.rglob("*") if path.is_file())
