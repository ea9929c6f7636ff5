"""Real launches: the main job on DeepSpeed, and a recipe that is only a JSON."""

from __future__ import annotations

import csv
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.integration.test_train import environment

TINY = ["--config", str(ROOT / "configs/train/tiny.yaml")]
JSON_JOB = [str(ROOT / "launch/train_json.py"), str(ROOT / "configs/deepspeed/adamwr_zero2.json"), "--updates", "6"]
ACCELERATE = [
    *["accelerate", "launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"],
    *["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"],
]
Row = tuple[str, str, str, float]


def launch(command: list[str], **variables: str) -> str:
    # Without what the tests of one process set for themselves.
    env = {k: v for k, v in environment().items() if not k.startswith("ACCELERATE_")}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **variables}
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, env=env, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def history(out: Path) -> list[Row]:
    with (out / "history.csv").open() as file:
        return [(r["samples"], r["lr"], r["weight_decay"], float(r["loss"])) for r in csv.DictReader(file)]


@pytest.fixture(scope="module")
def ddp(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    out = tmp_path_factory.mktemp("ddp")
    launch([str(ROOT / "launch/accelerate.sh"), *TINY, "--out", str(out)], CONFIG="cpu_2")
    return history(out)


@pytest.mark.parametrize(
    ("launcher", "variables"),
    [
        ("accelerate.sh", {"CONFIG": "cpu_2_zero2"}),
        ("torchrun.sh", {"ZERO": "zero1"}),
        ("deepspeed.sh", {"ZERO": "zero3"}),
    ],
)
def test_the_main_job_runs_unchanged(launcher: str, variables: dict[str, str], ddp: list[Row], tmp_path: Path) -> None:
    launch([str(ROOT / "launch" / launcher), *TINY, "--out", str(tmp_path)], **variables)
    rows = history(tmp_path)
    assert [row[:3] for row in rows] == [row[:3] for row in ddp]
    assert max(abs(a[3] - b[3]) / b[3] for a, b in zip(rows, ddp, strict=True)) < 1e-5


def test_a_json_is_the_whole_recipe(tmp_path: Path) -> None:
    """Through two launchers: the same curve, and the recipe's; a lock that a killed build left does not matter."""
    lock = tmp_path / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir()
    lock.touch()
    extensions = {"TORCH_EXTENSIONS_DIR": str(tmp_path)}
    curves = [
        [line for line in launch(command, **extensions).splitlines() if line.startswith("samples ")]
        for command in ([*ACCELERATE, *JSON_JOB], ["deepspeed", "--num_accelerators", "2", *JSON_JOB])
    ]
    assert curves[0] == curves[1]
    assert [line.split(" weight_decay")[0] for line in curves[0][:3]] == [
        "samples 0 lr 0.0",
        "samples 16 lr 0.0001",
        "samples 32 lr 0.0002",
    ]
    assert len(curves[0]) == 6
