"""Checkpoints and pickles of earlier versions load, and training continues as it did then."""

from __future__ import annotations

import base64
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_adamw import CyclicLRWithRestarts, load
from tests.earlier import job
from tests.ranks import run_ranks

VERSIONS = sorted(path for path in job.HERE.iterdir() if (path / "pickles.json").exists())
# Where each engine's checkpoint goes on: on the same engine, and on another one or another number of ranks.
TARGETS = {
    "single": [("single", 1), ("DDP", 2)],
    "DDP": [("DDP", 2), ("single", 1)],
    "FSDP2": [("FSDP2", 2), ("DDP", 2)],
    "ZeRO-2": [("ZeRO-2", 2), ("single", 1)],
}
ROUTES = [(source, *target) for source, targets in TARGETS.items() for target in targets]


def rows_of(version: Path, engine: str) -> Any:
    return json.loads((version / engine / "rows.json").read_text())


def assert_same_curve(found: Any, expected: Any, tolerance: float) -> None:
    """The clock and what it gives are the same bits; losses differ by the order of sums between numbers of ranks."""
    assert [row[:3] for row in found] == [row[:3] for row in expected]
    assert [row[3] for row in found] == pytest.approx([row[3] for row in expected], rel=tolerance)


def test_there_is_an_earlier_version() -> None:
    assert VERSIONS


@pytest.mark.parametrize("version", VERSIONS, ids=lambda path: path.name)
@pytest.mark.parametrize(("source", "engine", "ranks"), ROUTES)
def test_save_state_goes_on(version: Path, source: str, engine: str, ranks: int) -> None:
    rows = run_ranks(ranks, job.train, engine, None, version / source / "state")[0]
    assert_same_curve(rows, rows_of(version, source), 1e-6)


@pytest.mark.parametrize("version", VERSIONS, ids=lambda path: path.name)
@pytest.mark.parametrize("source", job.ENGINES)
def test_a_saved_folder_loads(version: Path, source: str) -> None:
    model = job.network(3)
    optimizer = job.optimizer_of(model)
    scheduler = CyclicLRWithRestarts(optimizer, **job.RECIPE, batch_size=job.BATCH, epoch_size=job.EPOCH)
    load(version / source / "saved", model, optimizer, scheduler)
    x, y = job.data().tensors
    rows = []
    for first in (8, 12, 16, 0, 4):  # the rest of the second epoch, and the third
        batch = slice(first, first + job.BATCH)
        rows += job.step(model, optimizer, scheduler, 1, (x[batch], y[batch]))
    assert_same_curve(rows, rows_of(version, source), 1e-6)


@pytest.mark.parametrize("version", VERSIONS, ids=lambda path: path.name)
def test_pickles_load(version: Path) -> None:
    pickles = json.loads((version / "pickles.json").read_text())
    model, optimizer, scheduler = pickle.loads(base64.b64decode(pickles["together"]))
    alone = pickle.loads(base64.b64decode(pickles["optimizer"]))
    for parameter, state in zip(optimizer.state, alone.state.values(), strict=True):
        assert torch.equal(optimizer.state[parameter]["exp_avg"], state["exp_avg"])
    assert_same_curve(job.step(model, optimizer, scheduler, 4), pickles["rows"], 1e-6)
