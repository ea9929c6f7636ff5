"""The benchmarks run, in a tiny form, check what they compare, and write what the report reads.

Nothing here is about speed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import records, report, workloads
from benchmarks.engines import OURS
from benchmarks.groups import GROUPS, RECIPE, equal_groups, parameter_groups
from benchmarks.models import GPT
from benchmarks.ranks import ROOT
from benchmarks.trainers import ACCELERATE

PEER = "DDP + AdamW"
TIMEOUT = ["--timeout", "250"]  # of the ranks, which the benchmark then ends itself


def run(out: Path, module: str, *args: str) -> list[records.Record]:
    """Run a benchmark; return its records without the environment."""
    command = [sys.executable, "-m", f"benchmarks.{module}", "--out", str(out), *args]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return [record for record in records.read([out]) if record["kind"] != "environment"]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_update_phase(tmp_path: Path) -> None:
    args = ["--only", "time", "--workloads", "tiny", "--rounds", "2", "--groups", "one", "layerwise"]
    found = run(tmp_path / "r.jsonl", "update_phase", *args, *TIMEOUT, "--engines", OURS, PEER)
    cases = [(r["groups"], r["gradients"], r["engine"], r["number_of_groups"]) for r in found]
    counts = {"one": 1, "layerwise": 6}
    assert cases == [(g, k, e, counts[g]) for g in counts for k in ("allocated", "kept") for e in (OURS, PEER)]
    assert all(len(r["seconds"]) == 2 for r in found)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_training_step(tmp_path: Path) -> None:
    args = ["--small", "--rounds", "2", "--accumulation", "2", "--groups", "one", "decay", "--clip", "0.5"]
    found = run(tmp_path / "r.jsonl", "training_step", *args, *TIMEOUT)
    assert {OURS, ACCELERATE, "DDP + ZeroRedundancyOptimizer", "FSDP2 + AdamW"} <= {
        r["engine"] for r in found if "seconds" in r
    }
    assert [r["number_of_groups"] for r in found if r["engine"] == OURS] == [1, 2]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_small_model(tmp_path: Path) -> None:
    found = run(tmp_path / "r.jsonl", "small_model", "--rounds", "2", "--groups", "1", "2", *TIMEOUT)
    assert [(r["number_of_groups"], r["engine"]) for r in found] == [
        (count, engine) for count in (1, 2) for engine in (ACCELERATE, OURS)
    ]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_host_cost(tmp_path: Path) -> None:
    args = ["--rounds", "2", "--tensors", "60", "--groups", "1", "2", "--ranks", "1", "16", "--scheduled-groups", "3"]
    found = run(tmp_path / "r.jsonl", "host_cost", *args)
    assert [r["engine"] for r in found[:2]] == ["CyclicLRWithRestarts", "CosineAnnealingWarmRestarts"]
    assert len([r for r in found if r["kind"] == "host_cost"]) == 2 * (3 + 4)


def test_groups_hold_every_parameter_once() -> None:
    layers = GPT(2, 64, 16).layers()
    params = [param for layer in layers for param in layer]
    for groups in (*(parameter_groups(layers, way) for way in GROUPS), equal_groups(params, 5)):
        held = [id(param) for group in groups for param in group["params"]]
        assert sorted(held) == sorted(map(id, params))
    layerwise = parameter_groups(layers, "layerwise")
    assert [group["weight_decay"] for group in layerwise[-2:]] == [RECIPE["weight_decay"], 0.0]
    assert layerwise[-1]["lr"] == RECIPE["lr"] > layerwise[0]["lr"]


@pytest.mark.parametrize("kind", [workloads.ALLOCATED, workloads.KEPT, workloads.CONSTANT])
def test_gradients_are_taken_without_a_copy(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    workload = workloads.Workload.named("tiny", rank=0, gradients=kind)
    made: set[int] = set()
    of = workload.gradients.of

    def observed(layer: int, places: slice) -> list[torch.Tensor]:
        grads = of(layer, places)
        made.update(grad.data_ptr() for grad in grads)
        return grads

    monkeypatch.setattr(workload.gradients, "of", observed)
    model = workload.model()
    model(torch.zeros(())).backward()
    assert {param.grad.data_ptr() for param in model.parameters() if param.grad is not None} == made


def record(**fields: object) -> records.Record:
    common = {"kind": "update_phase", "workload": "gpt", "numel": 1, "ranks": 2, "load_average": 0.0, "run": "r"}
    return {**common, "commit": "c", "sharded": True, "largest_difference": 0.0, "engine": OURS, **fields}


def test_the_report_keeps_gradients_and_groups_apart() -> None:
    found = [
        record(seconds=[1.0, 1.0]),  # of before there were such fields
        record(seconds=[2.0, 2.0], gradients="kept", groups="layerwise"),
        record(seconds=[3.0, 3.0], gradients="allocated", groups="one"),
    ]
    tables = [line for line in report.update_phase(found) if line.startswith(f"| {OURS}")]
    assert [line.split("|")[2].strip() for line in tables] == ["3.000", "1.000", "2.000"]
