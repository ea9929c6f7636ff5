"""Time whole training steps of a model so small that only overhead counts, through ``dist_adamw.prepare``.

Run ``python -m benchmarks.small_model --out results.jsonl``. Two ranks on gloo by default, one thread each.

The model is a chain of 32 linear layers of width 8, a batch is two rows, and the optimizer has 1, 8 or 32 groups of
equal settings. The loop is Accelerate's, once through ``dist_adamw.prepare`` and once through ``accelerator.prepare``
with DDP, torch's AdamW and ``CosineAnnealingWarmRestarts``: the two Accelerate trainers of `benchmarks.trainers`, whose
step is what `benchmarks.training_step` measures. Both live in the same processes; a round is UPDATES consecutive
updates of each, in random order, from a barrier to the slowest rank's end. Their losses are compared first.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import ranks, records
from benchmarks.engines import OURS
from benchmarks.groups import equal_groups
from benchmarks.models import Perceptron
from benchmarks.trainers import ACCELERATE, Rows, Task, build_all, interleaved, mean_over_ranks, recipe, seeded

LAYERS, WIDTH, BATCH = 32, 8, 2
GROUP_COUNTS = (1, 8, 32)
CHECKED = 3  # updates whose losses are compared
LOSS_TOLERANCE = 1e-6
WARM, UPDATES = 2, 10
EPS = 1e-3  # so that a wrong scale of gradients changes the weights


def task(options: argparse.Namespace, count: int) -> Task:
    """Return what both train: random rows."""
    updates = CHECKED + (WARM + options.rounds) * UPDATES + 2
    samples = BATCH * dist.get_world_size() * updates

    def groups_of(model: Any) -> Any:
        return equal_groups(list(model.parameters()), count)

    return Task(
        model=seeded(functools.partial(Perceptron, LAYERS, WIDTH)),
        groups=groups_of,
        dataset=Rows(torch.randn(samples, WIDTH, generator=torch.Generator().manual_seed(1))),
        batch=BATCH,
        recipe=recipe(eps=EPS),
    )


def measure(options: argparse.Namespace, count: int) -> list[records.Record]:
    """Build, check and time both with ``count`` groups; return the records. Collective."""
    trainers, _ = build_all((OURS, ACCELERATE), task(options, count))
    losses = {name: [mean_over_ranks(one.update()) for _ in range(CHECKED)] for name, one in trainers.items()}
    difference = max(abs(a - b) for a, b in zip(*losses.values(), strict=True))
    if not difference <= LOSS_TOLERANCE:
        raise RuntimeError(f"losses differ by {difference:.3g}, tolerance {LOSS_TOLERANCE}: {losses}")
    times = interleaved(trainers, warm_up=WARM, rounds=options.rounds, updates=UPDATES)
    common = {"kind": "small_model", "ranks": dist.get_world_size(), "number_of_groups": count}
    common |= {"tensors": 2 * LAYERS, "largest_difference": difference}
    return [{**common, "engine": name, **took.fields()} for name, took in times.items()]


def show(found: Sequence[records.Record]) -> None:
    """Print milliseconds of an update."""
    seconds = {record["engine"]: record["seconds"] for record in found}
    within = [a / b for a, b in zip(seconds[OURS], seconds[ACCELERATE], strict=True)]
    low, middle, high = quantiles(within, n=4)
    ms = {name: median(times) * 1e3 for name, times in seconds.items()}
    print(
        f"{found[0]['number_of_groups']:4} groups: DistAdamW {ms[OURS]:.2f} ms an update, Accelerate "
        f"{ms[ACCELERATE]:.2f} ms; ratio within rounds {middle:.2f} [{low:.2f} {high:.2f}]",
        flush=True,
    )


def main() -> None:
    """Start the ranks, or run as one."""
    parser = argparse.ArgumentParser(description="Overhead of a whole step of a small model.")
    parser.add_argument("--out", type=Path, required=True, help="JSON-lines file to append to")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--groups", nargs="+", type=int, default=list(GROUP_COUNTS))
    parser.add_argument("--timeout", type=float, default=300.0)
    options = parser.parse_args()
    options.out = options.out.resolve()
    if not ranks.is_rank():
        ranks.start("benchmarks.small_model", sys.argv[1:], ranks=options.ranks, timeout=options.timeout)
        return
    with ranks.joined() as (rank, _):
        if rank == 0:
            records.append(options.out, [records.environment()])
        for count in options.groups:
            found = measure(options, count)
            if rank == 0:
                records.append(options.out, found)
                show(found)


if __name__ == "__main__":
    main()
