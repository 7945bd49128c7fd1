"""The notebook runs as it is committed, and what it shows is what it printed then."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from oracle import Subject

ROOT = Path(__file__).parents[1]
TOUR = ROOT / "reports/notebook/tour.ipynb"
SECONDS = 900
"""For one cell, so that one that hangs ends the test."""


def printed(notebook: Any) -> str:
    """All text that a notebook's cells left."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    texts = [output.get("text", "") or output.get("data", {}).get("text/plain", "") for output in outputs]
    return "\n".join("".join(text) for text in texts)


def test_the_outputs_are_committed_and_name_no_machine() -> None:
    notebook = nbformat.read(TOUR, as_version=4)
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
    assert any("image/png" in output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", []))
    outputs = json.dumps([cell.get("outputs", []) for cell in notebook.cells])
    assert not [name for name in ("/home/", "/root", "/work", "/tmp", "site-packages", str(ROOT)) if name in outputs]
    assert "stderr" not in outputs


@pytest.mark.slow
def test_the_notebook_runs(smollm2: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    committed = nbformat.read(TOUR, as_version=4)
    notebook = nbformat.read(TOUR, as_version=4)
    NotebookClient(notebook, timeout=SECONDS, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert (tmp_path / "runs/tour/run.json").is_file()
    assert "tensor: (1, 5, 576)" in printed(notebook)
    assert "'backend': ('local', 'ndif')" in printed(notebook)
    assert [len(cell.get("outputs", [])) for cell in notebook.cells] == [
        len(cell.get("outputs", [])) for cell in committed.cells
    ]
