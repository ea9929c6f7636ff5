"""Which of torch's test files `--torch-tests` runs, on how many ranks; results with torch's classes and with ours."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests import ranks

ROOT = Path(__file__).parents[2]
TIMEOUT = 1800.0  # seconds for one file


@dataclass(frozen=True)
class TestFile:
    """A file below torch's ``test``; older and newer releases have it in other places."""

    __test__ = False
    paths: tuple[str, ...]
    swaps: str  # see torch_file.CHANGES
    parts: tuple[str, ...] = ("",)  # of the names of the tests that run: those that use what is replaced
    without: tuple[str, ...] = ()
    makes_ranks: bool = False  # its tests start processes; otherwise it runs on 1, 2 and 3 ranks


FILES = (
    TestFile(("test_optim.py",), "optimizer", parts=("_AdamW_cpu",), without=("_large_tensor",)),  # since torch 2.3
    TestFile(
        ("optim/test_optim.py",),
        "optimizer",
        parts=("adamw", "AdamW", "hook", "noop", "invalid_param", "duplicate_params", "fused", "multi_tensor"),
        without=("_memory", "peak_mem", "_large_tensor"),
    ),
    TestFile(("optim/test_lrscheduler.py",), "optimizer"),
    TestFile(("optim/test_swa_utils.py",), "optimizer", parts=("swa", "update_bn", "averag")),
    TestFile(
        ("distributed/optim/test_zero_redundancy_optimizer.py",),
        "zero",
        without=("gpu", "ddp_zero_overlap"),
        makes_ranks=True,
    ),
)


def find(checkout: Path, file: TestFile) -> Path | None:
    """Return the file in a checkout of torch, or in its folder ``test``."""
    places = [folder / path for folder in (checkout / "test", checkout) for path in file.paths]
    return next((place for place in places if place.is_file()), None)


def run_on_ranks(path: Path, file: TestFile, swaps: str, world_size: int) -> dict[str, str]:
    """Run a file on a number of ranks; a test passes if it does on all of them."""
    try:
        by_rank = ranks.run_ranks_within(TIMEOUT, world_size, run_here, str(path), swaps, file.parts, file.without)
    finally:
        ranks.end_pool(world_size)  # the classes stay replaced
    return {name: first_problem([of_rank.get(name, "not run") for of_rank in by_rank]) for name in by_rank[0]}


def first_problem(outcomes: list[str]) -> str:
    """Return the outcome of the first rank on which a test did not pass."""
    return next((outcome for outcome in outcomes if outcome != "passed"), "passed")


def run_here(path: str, swaps: str, parts: tuple[str, ...], without: tuple[str, ...]) -> dict[str, str]:
    """Run a file in this process, whose classes stay replaced."""
    os.environ.update(THIRD_PARTY_FILE=path, THIRD_PARTY_SWAPS=swaps)
    return importlib.import_module("tests.third_party.torch_file").run_tests(parts, without)


def run_in_process(path: Path, file: TestFile, swaps: str) -> dict[str, str]:
    """Run a file whose tests start their ranks themselves, in a separate process."""
    program = (
        "import json, sys; from tests.third_party.torch_files import run_here\n"
        "if __name__ == '__main__': print('\\n' + json.dumps(run_here(*json.loads(sys.argv[1]))))"
    )
    arguments = json.dumps([str(path), swaps, file.parts, file.without])
    # Torch's tests choose the number of ranks by the devices, and find 2 on a CPU.
    done = subprocess.run(
        [sys.executable, "-c", program, arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=TIMEOUT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
    )
    if done.returncode:
        raise RuntimeError(f"{path} did not run: {done.stderr[-1000:]}")
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found
