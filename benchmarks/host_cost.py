"""Time what the host spends on one update, by tensors, groups and ranks, and on one ``scheduler.step()``.

Run ``python -m benchmarks.host_cost --out results.jsonl``. One process, one thread, no other rank: torch's fake process
group says that there are as many ranks as are asked for, and its collectives return at once without sending. Tensors
have 8 elements, so arithmetic is next to nothing. What is left is Python, the dispatch of torch's operators, and the
preparation of messages. Waiting for other ranks is not in it, and neither is gloo's own path: with the fake backend the
transport is `CollectiveTransport`, which serves NCCL too, and ranks exchange no messages about their gradients.

A window is one update; its parts are timed one after the other, in processor time (nothing waits here, and processor
time does not grow with what else runs on the machine):

    backward   of a chain of layers with 50 tensors each, whose backward makes the gradients; an attached optimizer's
               hooks run in it. What the layers and autograd take without hooks is what the engines that are not
               attached show.
    step       ``optimizer.step()``
    zero_grad  ``optimizer.zero_grad()``, to None

Engines take turns in random order within each round, each after a garbage collection that is not timed. DistAdamW is
attached to the plain module, or not attached, as under DDP's own all-reduce; torch's AdamW does not depend on the
ranks and is measured in each case beside it.

The schedulers drive torch's AdamW over one tensor per group; each ``scheduler.step()`` follows an update, which is not
in the window.

With ``--before COMMIT``, DistAdamW and the scheduler of that commit take turns with these.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import itertools
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts
from torch.testing._internal.distributed.fake_pg import FakeStore

import dist_adamw
from benchmarks import before_after, records
from benchmarks.groups import RECIPE, equal_groups
from benchmarks.workloads import CONSTANT, Model, Shape, Workload

TENSORS, GROUP_COUNTS, RANKS = (100, 1_000, 10_000), (1, 8, 32, 200), (1, 8, 1_024, 4_096)
SCHEDULED_GROUPS = (1, 10, 100)
SHAPE: Shape = (8,)
IN_LAYER = 50
WARM = 3
PARTS = ("backward", "step", "zero_grad")


@contextmanager
def pretended(ranks: int) -> Iterator[None]:
    """Make this process rank 0 of ``ranks``."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


class Updates:
    """A model and an optimizer, to be updated again and again.

    Args:
        tensors: How many tensors the model has.
        optimizer: Makes the optimizer of groups.
        groups: How many groups.
        attach: Whether the optimizer is attached to the model.
    """

    def __init__(self, tensors: int, optimizer: Callable[[Any], Any], groups: int, *, attach: bool) -> None:
        layers = [[SHAPE] * min(IN_LAYER, tensors - first) for first in range(0, tensors, IN_LAYER)]
        self.model: Model = Workload.of("host", layers, rank=0, gradients=CONSTANT).model()
        self.optimizer = optimizer(equal_groups(list(self.model.parameters()), groups))
        if attach:
            self.optimizer.attach(self.model)

    def update(self) -> tuple[float, ...]:
        """Make one update; return the processor seconds of PARTS."""
        loss = self.model(torch.zeros(()))
        times = [time.process_time()]
        for part in (loss.backward, self.optimizer.step, self.optimizer.zero_grad):
            part()
            times.append(time.process_time())
        return tuple(b - a for a, b in itertools.pairwise(times))


Packages = dict[str, Any]  # versions of dist_adamw, by what is added to the names of engines


def engines(packages: Packages) -> dict[str, tuple[Callable[[Any], Optimizer], bool]]:
    """Return by name what makes the optimizer, and whether it is attached."""

    def ours(package: Any) -> Callable[[Any], Optimizer]:
        return lambda groups: package.DistAdamW(groups, **RECIPE)

    found: dict[str, tuple[Callable[[Any], Optimizer], bool]] = {}
    for version, package in packages.items():
        found[f"DistAdamW{version}, attached"] = (ours(package), True)
        found[f"DistAdamW{version}, not attached"] = (ours(package), False)
    found["AdamW(foreach=True)"] = (lambda groups: AdamW(groups, foreach=True, **RECIPE), False)
    found["AdamW(fused=True)"] = (lambda groups: AdamW(groups, fused=True, **RECIPE), False)
    return found


def time_updates(tensors: int, groups: int, ranks: int, packages: Packages, *, rounds: int) -> list[records.Record]:
    """Time all engines in one case; return the records. Local."""
    with pretended(ranks):
        chosen = {name: how for name, how in engines(packages).items() if ranks > 1 or not how[1]}
        updates = {name: Updates(tensors, make, groups, attach=attach) for name, (make, attach) in chosen.items()}
        found: dict[str, list[tuple[float, ...]]] = {name: [] for name in updates}
        order, shuffle = list(updates), random.Random(0)
        for k in range(WARM + rounds):
            shuffle.shuffle(order)
            for name in order:
                gc.collect()  # it takes milliseconds, in whichever part it happens to start
                took = updates[name].update()
                if k >= WARM:
                    found[name].append(took)
        del updates
    common = {"kind": "host_cost", "tensors": tensors, "groups": groups, "ranks": ranks}
    return [
        {**common, "engine": name, "seconds": dict(zip(PARTS, zip(*times, strict=True), strict=True))}
        for name, times in found.items()
    ]


def time_schedulers(groups: int, packages: Packages, *, rounds: int) -> list[records.Record]:
    """Time ``scheduler.step()`` of the schedulers with ``groups`` groups; return the records. Local."""

    def ours(package: Any) -> Callable[[Optimizer], Any]:
        return lambda optimizer: package.CyclicLRWithRestarts(optimizer, 32, 10_000, restart_period=1)

    makers = {f"CyclicLRWithRestarts{version}": ours(package) for version, package in packages.items()}
    makers["CosineAnnealingWarmRestarts"] = lambda optimizer: CosineAnnealingWarmRestarts(optimizer, 300, 2)
    schedulers = {}
    for name, make in makers.items():
        params = [nn.Parameter(torch.zeros(SHAPE)) for _ in range(groups)]
        optimizer = AdamW(equal_groups(params, groups), fused=True, **RECIPE)
        for param in params:
            param.grad = torch.ones(SHAPE)
        schedulers[name] = (optimizer, make(optimizer))
    seconds: dict[str, list[float]] = {name: [] for name in schedulers}
    for _ in range(WARM + 20 * rounds):
        for name, (optimizer, scheduler) in schedulers.items():
            optimizer.step()
            began = time.process_time()
            scheduler.step()
            seconds[name].append(time.process_time() - began)
    common = {"kind": "scheduler_cost", "groups": groups}
    return [{**common, "engine": name, "seconds": times[WARM:]} for name, times in seconds.items()]


def show_updates(found: Sequence[records.Record]) -> None:
    """Print milliseconds by part."""
    first = found[0]
    print(f"\n{first['tensors']:,} tensors, {first['groups']} groups, {first['ranks']:,} ranks")
    for record in found:
        parts = {part: median(record["seconds"][part]) * 1e3 for part in PARTS}
        text = ", ".join(f"{part} {ms:8.2f}" for part, ms in parts.items())
        print(f"  {record['engine']:31} ms: {text}", flush=True)


def show_schedulers(found: Sequence[records.Record]) -> None:
    """Print microseconds."""
    text = ", ".join(f"{record['engine']} {median(record['seconds']) * 1e6:.1f} us" for record in found)
    print(f"{found[0]['groups']:4} groups: scheduler.step() of {text}", flush=True)


def measure(options: argparse.Namespace, packages: Packages) -> None:
    """Measure every case."""
    torch.set_num_threads(1)
    gc.freeze()  # what was imported, so that the collections between updates are short
    records.append(options.out, [records.environment()])
    for count in options.scheduled_groups:
        found = time_schedulers(count, packages, rounds=options.rounds)
        records.append(options.out, found)
        show_schedulers(found)
    for tensors, groups, ranks in itertools.product(options.tensors, options.groups, options.ranks):
        if groups <= tensors:
            found = time_updates(tensors, groups, ranks, packages, rounds=options.rounds)
            records.append(options.out, found)
            show_updates(found)
            gc.collect()


def main(argv: Sequence[str] | None = None) -> None:
    """Measure this version, and another one beside it."""
    parser = argparse.ArgumentParser(description="What the host spends on an update.")
    parser.add_argument("--out", type=Path, required=True, help="JSON-lines file to append to")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tensors", nargs="+", type=int, default=list(TENSORS))
    parser.add_argument("--groups", nargs="+", type=int, default=list(GROUP_COUNTS))
    parser.add_argument("--ranks", nargs="+", type=int, default=list(RANKS))
    parser.add_argument("--scheduled-groups", nargs="*", type=int, default=list(SCHEDULED_GROUPS))
    parser.add_argument("--before", metavar="COMMIT", help="measure an earlier version too")
    options = parser.parse_args(argv)
    packages: Packages = {"": dist_adamw}
    if options.before is None:
        measure(options, packages)
        return
    with tempfile.TemporaryDirectory() as folder:
        before_after.unpack(options.before, Path(folder))
        sys.path.append(folder)
        packages[f" {options.before}"] = importlib.import_module(f"dist_adamw{before_after.BEFORE}")
        measure(options, packages)


if __name__ == "__main__":
    main()
