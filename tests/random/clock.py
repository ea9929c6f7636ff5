"""``python -m tests.random.clock``: random training loops, and whether the clock counts what they trained on.

The truth is kept by the ids of the rows that reached an applied update (`clock_truth`). The exit status is 1 when a
clock was wrong on any rank after any update, or a program ended in an error.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import shutil
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("ACCELERATE_USE_CPU", "true")

import torch
from tqdm import tqdm

from tests.random.clock_jobs import run_job
from tests.random.clock_programs import Program, jobs_of, make, script, shrink, world_of
from tests.random.clock_truth import Log, Truth
from tests.ranks import RankError, run_ranks, run_ranks_within

AT_ONCE = 50  # programs that a pool of ranks is given in one job


@dataclass
class Found:
    """A program that went wrong, and what of it."""

    program: Program
    seed: int | None
    problems: list[str]

    def __str__(self) -> str:
        return f"--- seed {self.seed}\n{script(self.program)}\n" + "\n".join(self.problems[:3])


@dataclass(frozen=True)
class Outcome:
    """A program's result: what was wrong, its updates, and their rows."""

    problems: list[str]
    updates: int = 0
    samples: int = 0


@dataclass
class Tally:
    """Counts of results."""

    loops: int = 0
    updates: int = 0
    found: list[Found] = field(default_factory=list)


def job_or_error(program: Program, number: int, folder: str) -> Log | str:
    """A rank's log of one job, or the error that ended it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return run_job(program, number, folder)
    except Exception as error:  # whatever it is, it is reported
        if "gloo" in str(error) or "pair closure" in str(error):
            raise  # nothing can be sent any more: the pool of ranks is replaced
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {error} ({where.name}, line {where.lineno})"


def first_jobs(programs: list[Program], folders: list[str]) -> list[Log | str]:
    """Run the first job of each program; in a pool of ranks."""
    return [job_or_error(program, 0, folder) for program, folder in zip(programs, folders, strict=True)]


def on_ranks(world: int, programs: list[Program], folders: list[str], number: int) -> list[list[Log | str]]:
    """Logs of one job of each program: a list of one for each rank."""
    if world == 1:
        return [[job_or_error(p, number, f)] for p, f in zip(programs, folders, strict=True)]
    if number == 0:
        # Each loop starts its workers, which import torch.
        with_workers = sum(bool(p["data"].get("workers")) for p in programs)
        limit = 60 + len(programs) + 120 * with_workers
        answers = run_ranks_within(limit, world, first_jobs, programs, folders)
        return [list(logs) for logs in zip(*answers, strict=True)]
    return [run_ranks(world, job_or_error, p, number, f) for p, f in zip(programs, folders, strict=True)]


def outcomes(programs: list[Program]) -> list[Outcome]:
    """Run programs whose first jobs have one number of ranks, and judge them."""
    results = []
    with tempfile.TemporaryDirectory(dir=_memory()) as root:
        folders = [f"{root}/{i}" for i in range(len(programs))]
        firsts = on_ranks(programs[0]["world"], programs, folders, 0)
        for program, folder, first in zip(programs, folders, firsts, strict=True):
            results.append(_judge(program, folder, first))
            shutil.rmtree(folder, ignore_errors=True)
    return results


def _judge(program: Program, folder: str, logs: list[Log | str]) -> Outcome:
    truth, updates = Truth(skips=program["max_norm"] is not None), 0
    problems: list[str] = []
    for number in range(len(jobs_of(program))):
        if number:
            (logs,) = on_ranks(world_of(program, number), [program], [folder], number)
        errors = [f"job {number + 1}, rank {r}: {log}" for r, log in enumerate(logs) if isinstance(log, str)]
        if errors:
            return Outcome(problems + errors, updates, truth.samples)
        try:
            problems += map(str, truth.judge(logs))  # type: ignore[arg-type]
        except AssertionError as error:
            return Outcome([*problems, f"job {number + 1}: no truth: {error}"], updates, truth.samples)
        updates += sum(event[0] == "step" for event in logs[0])
    return Outcome(problems, updates, truth.samples)


def _memory() -> str | None:
    return "/dev/shm" if os.path.isdir("/dev/shm") else None


def judge(seeds: Iterable[int], world: int, tally: Tally, *, shrinks: bool = True) -> Iterator[None]:
    """Make, run and judge a program of each seed; yields after each."""
    waiting = list(seeds)
    at_once = AT_ONCE if world > 1 else 1
    while waiting:
        now, waiting = waiting[:at_once], waiting[at_once:]
        programs = [make(seed, world) for seed in now]
        try:
            results = outcomes(programs)
        except RankError as error:
            if len(now) > 1:  # which one was it?
                yield from (None for seed in now for _ in judge([seed], world, tally, shrinks=shrinks))
                continue
            results = [Outcome([f"ranks: RankError: {str(error)[-1500:]}"])]
        for seed, program, outcome in zip(now, programs, results, strict=True):
            tally.loops += 1
            tally.updates += outcome.updates
            if problems := outcome.problems:
                kind = _kind_of(problems)
                if shrinks:

                    def fails(p: Program, kind: str = kind) -> bool:
                        return kind == _kind_of(_problems(p))

                    program = shrink(program, fails)
                    problems = _problems(program) or problems
                tally.found.append(Found(program, seed, problems))
            yield


def _problems(program: Program) -> list[str]:
    """Return what goes wrong with a program from the shrinker; nothing if it is not legal."""
    try:
        return outcomes([program])[0].problems
    except (RankError, AssertionError, KeyError, IndexError, TypeError):
        return []


def _kind_of(problems: list[str]) -> str:
    """An error stays an error of its type while it is shrunk, and a difference a difference."""
    if not problems:
        return ""
    if "the clock says" in problems[0]:
        return "difference"
    return "".join(c for c in problems[0].split(": ", 1)[1] if not c.isdigit())[:60]


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.random.clock", description=__doc__)
    parser.add_argument("--loops", type=int, default=10_000, help="how many programs")
    parser.add_argument("--seed", type=int, default=1, help="of the first one; the others follow")
    parser.add_argument("--ranks", type=int, default=1, choices=[1, 2])
    parser.add_argument("--shrink", type=int, default=5, help="so many of the programs that fail")
    parser.add_argument("--show", action="store_true", help="print the program of --seed, and run nothing")
    options = parser.parse_args()
    if options.show:
        print(script(make(options.seed, options.ranks)))
        return 0
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # what is imported stays: a collection looks at what programs leave
    tally, began = Tally(), time.monotonic()
    with contextlib.suppress(KeyboardInterrupt), tqdm(total=options.loops, unit=" loops") as bar:
        seeds = range(options.seed, options.seed + options.loops)
        for first in range(0, options.loops, AT_ONCE):
            for _ in judge(
                seeds[first : first + AT_ONCE], options.ranks, tally, shrinks=len(tally.found) < options.shrink
            ):
                bar.update()
            bar.set_postfix(wrong=len(tally.found))
    for found in tally.found[:20]:
        print(found)
    seconds = time.monotonic() - began
    print(f"{tally.loops:,} loops, {tally.updates:,} updates, {len(tally.found):,} loops wrong, {seconds:.0f} s")
    return int(bool(tally.found))


if __name__ == "__main__":
    raise SystemExit(main())
