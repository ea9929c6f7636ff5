"""The benchmarks run, in a tiny form, check what they compare, and write what the report reads.

Nothing here is about speed. Most run as ranks of the pool, since starting ranks is what takes time.
"""

from __future__ import annotations

import gc
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import bytes_sent, host_cost, host_tables, records, report, reproducible_table, tracking, workloads
from benchmarks.engines import OURS, REPRODUCIBLE
from benchmarks.groups import GROUPS, RECIPE, equal_groups, parameter_groups
from benchmarks.models import GPT
from benchmarks.ranks import ROOT
from benchmarks.trainers import ACCELERATE
from tests.ranks import run_ranks

PEER, INTO_SHARD = "DDP + AdamW", "DistAdamW, reduce every backward"


def run(out: Path, module: str, *args: str) -> list[records.Record]:
    """Run a benchmark on two ranks; return its records."""
    run_ranks(2, as_a_rank, f"benchmarks.{module}", ["--out", str(out), *args])
    return measured(out)


def measured(out: Path) -> list[records.Record]:
    """Return the records without the environment."""
    return [record for record in records.read([out]) if record["kind"] != "environment"]


def as_a_rank(module: str, args: list[str]) -> None:
    before, sys.argv = sys.argv, [module, *args]
    try:
        importlib.import_module(module).main()
    finally:
        sys.argv = before
        gc.collect()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_update_phase(tmp_path: Path) -> None:
    """As a program, which starts its ranks."""
    out = tmp_path / "r.jsonl"
    args = ["--out", str(out), "--only", "time", "--workloads", "tiny", "--rounds", "2", "--groups", "one", "layerwise"]
    command = [sys.executable, "-m", "benchmarks.update_phase", *args, "--timeout", "250", "--engines", OURS, PEER]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = measured(out)
    cases = [(r["groups"], r["gradients"], r["engine"], r["number_of_groups"]) for r in found]
    counts = {"one": 1, "layerwise": 6}
    assert cases == [(g, k, e, counts[g]) for g in counts for k in ("allocated", "kept") for e in (OURS, PEER)]
    assert all(len(r["seconds"]) == 2 for r in found)


@pytest.mark.slow
@pytest.mark.parametrize("engine", [OURS, INTO_SHARD])
def test_isolated(engine: str, tmp_path: Path) -> None:
    args = ["--workload", "tiny", "--engine", engine, "--object-bytes", "3000"]
    (found,) = run(tmp_path / "r.jsonl", "isolated", *args)
    owned = found["numel"] * 4 // 2
    assert (found["bytes_by_rank"][0]["gradients"] >= 2 * owned) == (engine == OURS)
    assert found["bytes_by_rank"][0]["gradients"] >= owned


def sent_with(engine: str, by: str, accumulation: int) -> records.Record:
    workload = workloads.Workload.named("tiny", rank=0, gradients=workloads.CONSTANT)
    return bytes_sent.measure(engine, workload, by, accumulation)


@pytest.mark.filterwarnings("ignore:reproducible=True")  # nothing divides the loss
@pytest.mark.parametrize("by", [bytes_sent.SHARED, bytes_sent.MESSAGES, bytes_sent.COLLECTIVES])
def test_a_reproducible_update_sends_a_gradient_for_every_backward_pass_and_no_more(by: str) -> None:
    for accumulation in (1, 2):
        plain, ours = (run_ranks(2, sent_with, engine, by, accumulation)[0] for engine in (OURS, REPRODUCIBLE))
        assert plain["sent"] == pytest.approx(1.0, rel=0.01)
        assert ours["sent"] == pytest.approx((accumulation + 1) / 2, rel=0.01)


@pytest.mark.slow
def test_training_step(tmp_path: Path) -> None:
    args = ["--small", "--rounds", "2", "--accumulation", "2", "--groups", "decay", "--clip", "0.5"]
    found = run(tmp_path / "r.jsonl", "training_step", *args)
    assert {OURS, ACCELERATE, "DDP + ZeroRedundancyOptimizer", "FSDP2 + AdamW"} <= {
        r["engine"] for r in found if "seconds" in r
    }
    assert [r["number_of_groups"] for r in found if r["engine"] == OURS] == [2]


@pytest.mark.slow
def test_small_model(tmp_path: Path) -> None:
    found = run(tmp_path / "r.jsonl", "small_model", "--rounds", "2", "--groups", "1", "2")
    assert [(r["number_of_groups"], r["engine"]) for r in found] == [
        (count, engine) for count in (1, 2) for engine in (ACCELERATE, OURS)
    ]


@pytest.mark.slow
def test_host_cost(tmp_path: Path) -> None:
    out = tmp_path / "r.jsonl"
    args = ["--rounds", "2", "--tensors", "60", "--groups", "1", "2", "--ranks", "1", "16", "--scheduled-groups", "3"]
    try:
        host_cost.main(["--out", str(out), *args])
    finally:
        gc.unfreeze()
    found = measured(out)
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


def test_the_report_has_a_row_for_each_number_of_tensors_groups_and_ranks() -> None:
    parts = {"backward": [0.001, 0.003, 0.002], "step": [0.004] * 3, "zero_grad": [0.001] * 3}
    cost = {"kind": "host_cost", "tensors": 60, "groups": 2, "ranks": 16, "seconds": parts, "run": "r"}
    found = [
        {**cost, "engine": "left out of the next run"},
        {**cost, "engine": "A", "ranks": 1},
        {**cost, "engine": "A", "run": "next"},
    ]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in host_tables.host_cost(found)]
    assert rows[0] == ["ms, tensors / groups / ranks", "A"]
    assert rows[2:4] == [["60 / 2 / 1", "2.00 + 5.00"], ["60 / 2 / 16", "2.00 + 5.00"]]


def test_the_report_compares_small_models_within_rounds() -> None:
    step = {"kind": "small_model", "number_of_groups": 8, "ranks": 2, "run": "r"}
    found = [
        {**step, "engine": ACCELERATE, "seconds": [0.001, 0.002], "cpu_seconds": [0.001, 0.001]},
        {**step, "engine": OURS, "seconds": [0.003, 0.006], "cpu_seconds": [0.002, 0.002]},
    ]
    cells = [cell.strip() for cell in list(host_tables.small_model(found))[2].split("|")[1:-1]]
    ratio, of_processors = "3.00 / 3.00 / 3.00", "2.00 / 2.00 / 2.00"
    assert cells == ["8, 2 ranks", "4.50", "1.50", ratio, "2.00", "1.00", of_processors]


def test_a_hash_that_differs_where_it_must_not_is_reported_and_one_that_agrees_where_it_must_not() -> None:
    def run(engine: str, ranks: int, *digests: str) -> records.Record:
        on = engine != reproducible_table.OFF
        rows = list(enumerate(digests, 1))
        return {"engine": engine, "ranks": ranks, "dtype": "fp32", "reproducible": on, "digests": rows}

    right = [
        run("DDP", 1, "a", "b"),
        run("DDP", 2, "a", "b"),
        *(run(reproducible_table.OFF, n, str(n)) for n in (1, 2)),
    ]
    assert reproducible_table.problems_of(right) == []
    wrong = [*right, run("plain", 3, "a", "c"), run("FSDP2", 2, "a"), run(reproducible_table.OFF, 3, "2")]
    assert reproducible_table.problems_of(wrong) == [
        "plain, 3 ranks, fp32: another hash than in one process, first after update 2",
        "FSDP2, 2 ranks, fp32: no hash of update 2",
        f"{reproducible_table.OFF}, 3 ranks, fp32: the hash of 2 ranks, without the option",
    ]


def test_tracking(tmp_path: Path) -> None:
    out = tmp_path / "r.jsonl"
    tracking.main(["--out", str(out), "--rounds", "2", "--layers", "1", "--width", "64", "--context", "8"])
    found = measured(out)
    assert [record["trackers"] for record in found] == ["none", "csv", "tensorboard", "both"]
    assert all(len(record["seconds"]) == len(record["log_seconds"]) == 2 for record in found)
