"""Compare this code with an earlier commit's, in the same processes and the same rounds.

Run ``python -m benchmarks.before_after <commit> --out results.jsonl``, with nothing else on the machine. Two
consecutive runs differ by 10% on a shared machine; rounds within a second of each other do not.

The commit's ``dist_adamw`` is unpacked next to this code under another name, and both are measured with this
code's ``benchmarks``. Measurements:

    update phase   as in `update_phase`: the slowest rank's seconds
    masters        a step of bf16 weights with fp32 masters, not sharded: seconds of processor time on each rank

The ratio of a round is this code's time over the commit's; printed are the median and the quartiles of all rounds.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import io
import random
import re
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

import dist_adamw
from benchmarks import engines, ranks, records, update_phase, workloads
from benchmarks.groups import GROUPS

BEFORE = "_before"
MASTERS = "masters"
CASES = (engines.OURS, engines.OURS_WITHOUT_DDP, MASTERS)
WARM_UP = 5
Turn = Callable[[int], float]  # seconds of one round


def unpack(commit: str, folder: Path) -> None:
    """Write the package of ``commit`` into ``folder``, under its name and ``_before``.

    Raises:
        subprocess.CalledProcessError: there is no such commit.
    """
    command = ["git", "archive", commit, "dist_adamw"]
    archive = subprocess.run(command, cwd=ranks.ROOT, check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(folder, filter="data")
    (folder / "dist_adamw").rename(folder / f"dist_adamw{BEFORE}")
    for path in folder.rglob("*.py"):
        path.write_text(re.sub(r"\bdist_adamw\b", f"dist_adamw{BEFORE}", path.read_text()))


def update_turn(package: Any, workload: workloads.Workload, *, ddp: bool) -> Turn:
    """Run one update with ``package``'s optimizer. Collective."""
    built = engines.dist_adamw_engine(workload, ddp=ddp, package=package)
    built.forward()
    return lambda update: max(ranks.gathered(update_phase.advance(built, workload, update)))


def masters_turn(package: Any, name: str) -> Turn:
    """Run one step of bf16 weights with fp32 masters. Local."""
    params = [
        torch.nn.Parameter(torch.randn(shape).bfloat16()) for layer in workloads.WORKLOADS[name] for shape in layer
    ]
    optimizer = package.DistAdamW(params, lr=1e-3, shard=False, master_dtype=torch.float32)
    for param in params:
        param.grad = torch.randn_like(param)

    def turn(update: int) -> float:
        start = time.process_time()
        optimizer.step()
        return time.process_time() - start

    return turn


def compare(before: Turn, after: Turn, rounds: int) -> tuple[list[float], list[float]]:
    """Return seconds of each round, before and after. Collective: the order is the same on every rank."""
    turns = {0: before, 1: after}
    seconds: tuple[list[float], list[float]] = ([], [])
    shuffle = random.Random(0)
    for update in range(WARM_UP + rounds):
        for which in shuffle.sample([0, 1], 2):
            took = turns[which](update)
            if update >= WARM_UP:
                seconds[which].append(took)
    return seconds


def work(options: argparse.Namespace) -> None:
    """Run one rank."""
    sys.path.append(str(options.folder))
    packages = importlib.import_module(f"dist_adamw{BEFORE}"), dist_adamw
    with ranks.joined() as (rank, size):
        if rank == 0:
            records.append(options.out, [records.environment()])
        for name in options.workloads:
            workload = workloads.Workload.named(name, rank=rank, gradients=options.gradients, groups=options.groups)
            for case in options.cases:
                before, after = (
                    masters_turn(package, name)
                    if case == MASTERS
                    else update_turn(package, workload, ddp=case == engines.OURS)
                    for package in packages
                )
                seconds = compare(before, after, options.rounds)
                del before, after
                gc.collect()
                if rank == 0:
                    report(options, name, case, size, *seconds)


def report(
    options: argparse.Namespace, workload: str, case: str, size: int, before: list[float], after: list[float]
) -> None:
    """Save and print the measurements."""
    ratios = [b / a for a, b in zip(before, after, strict=True)]
    low, middle, high = quantiles(ratios, n=4)
    record = {"kind": "before_after", "commit_before": options.commit, "workload": workload, "case": case}
    record |= {"gradients": options.gradients, "groups": options.groups}
    records.append(options.out, [{**record, "ranks": size, "before": before, "after": after}])
    print(
        f"{workload:10} {case:22} before {median(before):.4f} s, after {median(after):.4f} s, "
        f"ratio {middle:.3f} [{low:.3f} {high:.3f}]",
        flush=True,
    )


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options of this script."""
    parser = argparse.ArgumentParser(description="This code beside an earlier commit's.")
    parser.add_argument("commit")
    parser.add_argument("--out", type=Path, required=True, help="JSON-lines file to append to")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--workloads", nargs="+", choices=workloads.WORKLOADS, default=list(workloads.TITLES))
    parser.add_argument("--groups", choices=GROUPS, default="one")
    parser.add_argument("--gradients", choices=(workloads.ALLOCATED, workloads.KEPT), default=workloads.ALLOCATED)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # where ranks find the commit's packages
    options = parser.parse_args(argv)
    options.out = options.out.resolve()
    return options


def main() -> None:
    """Start the ranks, or run as one."""
    options = parse()
    if ranks.is_rank():
        work(options)
        return
    with tempfile.TemporaryDirectory() as folder:
        unpack(options.commit, Path(folder))
        args = [*sys.argv[1:], "--folder", folder]
        ranks.start("benchmarks.before_after", args, ranks=options.ranks, timeout=options.timeout)


if __name__ == "__main__":
    main()
