"""The notebook with the schedule's pictures: every cell runs, and prints what the committed one shows."""

from __future__ import annotations

import os

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode

from tests.conftest import ROOT

NOTEBOOK = ROOT / "docs/schedule_pictures.ipynb"


def printed(notebook: NotebookNode) -> list[str]:
    """Return what each cell printed, and "picture" for each picture."""
    found = []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            found.append(output.text if output.output_type == "stream" else "picture")
    return found


def test_every_cell_runs_and_prints_what_is_committed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    committed = nbformat.read(NOTEBOOK, as_version=4)
    again = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(
        again, timeout=100, startup_timeout=100, resources={"metadata": {"path": str(ROOT / "docs")}}
    ).execute()
    assert printed(again) == printed(committed)
    assert printed(committed).count("picture") >= 8
