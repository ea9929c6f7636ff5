"""``python -m tests.fuzz``: see ``--help``. Its exit status is 1 when an input ended in another way than it may."""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from tqdm import tqdm

from tests.fuzz import recipes
from tests.fuzz.checkpoints import Checkpoints
from tests.fuzz.judge import REFUSED, RIGHT, Tally

# Of 10,000 inputs.
SHARES = {"checkpoints": 6000, "ranks": 300, "recipes": 1700, "json": 1000, "configs": 1000}


def run(kind: str, count: int, seed: int, first: int, bar: tqdm) -> Tally:
    """Judge ``count`` inputs of a kind."""

    def numbers() -> Iterator[int]:
        for i in range(first, first + count):
            yield i
            bar.update()

    with tempfile.TemporaryDirectory() as folder:
        if kind == "checkpoints":
            return Checkpoints(Path(folder), seed).judge(numbers())
        if kind == "ranks":
            return Checkpoints(Path(folder), seed).judge_on_ranks(numbers())
        if kind == "configs":
            return recipes.judge_configurations(count, seed, first, Path(folder), bar.update)
        return recipes.judge(kind, count, seed, bar.update)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Mutated inputs, and how each ends.")
    parser.add_argument("--inputs", type=int, default=10_000, help="how many, over all kinds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=SHARES, help="one kind")
    parser.add_argument("--first", type=int, default=0, help="number of the first input of a kind")
    options = parser.parse_args()
    shares = {options.only: 1} if options.only else SHARES
    counts = {kind: round(options.inputs * share / sum(shares.values())) for kind, share in shares.items()}
    tallies = []
    for kind, count in counts.items():
        with tqdm(total=count, desc=kind, unit=" inputs") as bar:
            tallies.append(run(kind, count, options.seed, options.first, bar))
    print("| kind | inputs | loaded right | refused with a sentence | failures | slowest |\n|---|---|---|---|---|---|")
    for tally in tallies:
        ends = tally.ends
        print(
            f"| {tally.kind} | {ends.total():,} | {ends[RIGHT]:,} | {ends[REFUSED]:,} | {ends['failed']:,} | "
            f"{tally.slowest:.2f} s |"
        )
    for failure in (failure for tally in tallies for failure in tally.failures):
        print(failure)
    return int(any(tally.failures for tally in tallies))


if __name__ == "__main__":
    raise SystemExit(main())
