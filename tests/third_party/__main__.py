"""Run other projects' tests with DistAdamW and CyclicLRWithRestarts in place of their classes; print a table.

    python -m tests.third_party                               # what Accelerate and torch ship, on 1, 2 and 3 ranks
    python -m tests.third_party --only accelerate --ranks 2
    python -m tests.third_party --torch-tests ~/pytorch       # also the test files of a checkout of torch

Nothing is downloaded. docs/third_party_tests.md has the results and explains what cannot pass.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests import ranks
from tests.third_party import accelerate_scripts, torch_files

TIMEOUT = 1800.0  # seconds for one row


class Row(NamedTuple):
    """One line of the table."""

    suite: str
    part: str
    ranks: str
    passed: str
    details: list[str]  # what did not pass, one line each
    is_good: bool = True


def main() -> int:
    """Print one row after the other; the status is 1 if one that must pass did not."""
    parser = argparse.ArgumentParser(prog="python -m tests.third_party", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 3], help="numbers of ranks")
    parser.add_argument("--only", choices=["accelerate", "optim_db", "torch"], help="one part")
    parser.add_argument("--torch-tests", type=Path, help="a checkout of torch, or its folder test")
    options = parser.parse_args()
    parts = {
        "accelerate": lambda: of_accelerate(options.ranks),
        "optim_db": lambda: of_optim_db(options.ranks),
        "torch": lambda: of_torch(options.torch_tests, options.ranks) if options.torch_tests else iter(()),
    }
    is_good = True
    print("| tests | part | ranks | passed |\n|---|---|---|---|")
    for name, rows in parts.items():
        if options.only not in (None, name):
            continue
        for row in rows():
            print(f"| {row.suite} | {row.part} | {row.ranks} | {row.passed} |", flush=True)
            for line in row.details:
                print(f"    {line}", file=sys.stderr, flush=True)
            is_good &= row.is_good
    for name, why in accelerate_scripts.CANNOT.items() if options.only in (None, "accelerate") else ():
        print(f"| accelerate {name} | | | cannot: {why} |")
    ranks.close_all()
    return 0 if is_good else 1


def of_accelerate(world_sizes: list[int]) -> Iterator[Row]:
    """Accelerate's scripts, with both ways to prepare."""
    for index in range(len(accelerate_scripts.SCRIPTS)):
        for mode in accelerate_scripts.SCRIPTS[index].modes:
            for world_size in world_sizes:
                yield accelerate_row(index, mode, world_size)


def accelerate_row(index: int, mode: accelerate_scripts.Mode, world_size: int) -> Row:
    """Run a script, and if it fails, again with torch's optimizers: it may not be made for this number of ranks."""
    script, begin = accelerate_scripts.SCRIPTS[index], time.monotonic()
    problem = run_accelerate(index, mode, world_size)
    row = Row(f"accelerate {script.name}", mode, f"{world_size}", f"yes ({time.monotonic() - begin:.0f} s)", problem)
    if script.refused is not None and mode == "accelerator.prepare" and world_size > 1:
        is_refused = len(problem) == world_size and all(script.refused in line for line in problem)
        return row._replace(passed="refused on every rank" if is_refused else "not refused", is_good=is_refused)
    if not problem:
        return row
    if theirs := run_accelerate(index, "torch's", world_size):
        return row._replace(passed="no, nor with torch's optimizers", details=[*problem, *theirs])
    return row._replace(passed="no", is_good=False)


def run_accelerate(index: int, mode: accelerate_scripts.Mode, world_size: int) -> list[str]:
    """Run a script on ranks; return the errors."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            ranks.run_ranks_within(TIMEOUT, world_size, accelerate_scripts.run_script, index, mode, folder)
        except ranks.RankError as error:
            return [f"rank {rank}: {text}" for rank, text in error.errors.items()]
    return []


def of_optim_db(world_sizes: list[int]) -> Iterator[Row]:
    """The checks with torch's database."""
    from tests.third_party import optimizer_info

    for world_size in world_sizes:
        by_rank = ranks.run_ranks_within(TIMEOUT, world_size, optimizer_info.run_checks)
        errors = ranks.run_ranks_within(TIMEOUT, world_size, optimizer_info.run_error_inputs)
        for part, results in (("inputs x checks", by_rank), ("error inputs", errors)):
            merged = merge(results)
            failed = problems(merged)
            yield Row("torch optim_db", part, f"{world_size}", count(merged), failed, not failed)


def of_torch(checkout: Path, world_sizes: list[int]) -> Iterator[Row]:
    """The files of a checkout: with torch's classes first, to know which tests fit the installed torch at all."""
    for file in torch_files.FILES:
        path = torch_files.find(checkout, file)
        if path is None:
            yield Row(f"torch {file.paths[0]}", "", "", "not in this checkout", [])
            continue
        for world_size in [0] if file.makes_ranks else world_sizes:
            theirs, mine = (run_torch(path, file, swaps, world_size) for swaps in ("none", file.swaps))
            fitting = {name: mine.get(name, "not run") for name, outcome in theirs.items() if outcome == "passed"}
            others = len(theirs) - len(fitting)
            unfit = f"; {others} more do not pass with torch's own classes" if others else ""
            where = "2, by itself" if file.makes_ranks else f"{world_size}"
            yield Row(f"torch {path.name}", "", where, count(fitting) + unfit, problems(fitting))


def run_torch(path: Path, file: torch_files.TestFile, swaps: str, world_size: int) -> dict[str, str]:
    """Run a file on ranks; one whose tests start ranks, in a process."""
    if file.makes_ranks:
        return torch_files.run_in_process(path, file, swaps)
    return torch_files.run_on_ranks(path, file, swaps, world_size)


def merge(by_rank: list[dict[str, str]]) -> dict[str, str]:
    """Return the outcome of each check: that of the first rank that did not pass it."""
    return {name: torch_files.first_problem([results[name] for results in by_rank]) for name in by_rank[0]}


def count(results: dict[str, str]) -> str:
    """Return how many passed."""
    return f"{sum(outcome == 'passed' for outcome in results.values())} of {len(results)}"


def problems(results: dict[str, str]) -> list[str]:
    """Return what did not pass."""
    return [f"{name}: {outcome}" for name, outcome in results.items() if outcome != "passed"]


if __name__ == "__main__":
    sys.exit(main())
