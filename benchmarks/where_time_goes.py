"""Where DistAdamW's update phase spends its time, part by part.

Run ``python -m benchmarks.where_time_goes --out results.jsonl``. Two ranks on gloo by default.

Functions of dist_adamw are wrapped with timers for this run; one that is not there any more is
reported as such. Times are wall clock on rank 0, exclusive of timed functions called inside, and the
medians of the parts add up to about the median of the whole. Without timers the window is the same as `update_phase`'s.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import ranks, records
from benchmarks.engines import OURS, build
from benchmarks.workloads import WORKLOADS, Workload
from dist_adamw import collectives, optimizer, shard

# What is wrapped: label, owner, attribute.
PARTS: list[tuple[str, Any, str]] = [
    ("owned_grads", shard.Shard, "owned_grads"),
    ("prepare_shards", optimizer.DistAdamW, "_prepare_shards"),
    ("kernel", optimizer, "adamw_update_"),
    ("pack", shard.Shard, "send"),
    ("broadcast: launch", collectives, "start_all_gather"),
    ("unpack, waits apart", shard.Shard, "receive"),
    ("broadcast: wait", dist.Work, "wait"),
    ("rest of step", optimizer.DistAdamW, "step"),
]


class Clock:
    """Exclusive times by label of what is running."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._running: list[str] = []
        self._since = 0.0

    def _charge(self) -> None:
        now = time.perf_counter()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now

    def __call__(self, label: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, charged to ``label``."""

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._charge()
            self._running.append(label)
            try:
                return function(*args, **kwargs)
            finally:
                self._charge()
                self._running.pop()

        return timed


def wrap(clock: Clock) -> list[str]:
    """Put timers on PARTS; returns the labels of those that are not there."""
    absent = []
    for label, owner, attribute in PARTS:
        function = getattr(owner, attribute, None)
        if function is None:
            absent.append(label)
            continue
        try:
            setattr(owner, attribute, clock(label, function))
        except (AttributeError, TypeError):
            absent.append(label)
    return absent


def measure(workload_name: str, rounds: int, rank: int, clock: Clock) -> dict[str, list[float]]:
    """Seconds by part and round. Collective."""
    workload = Workload.named(workload_name, rank=rank)
    engine = build(OURS, workload)
    found: dict[str, list[float]] = defaultdict(list)
    for k in range(3 + rounds):
        workload.gradients.refill(k)
        clock.seconds.clear()
        dist.barrier()
        began = time.perf_counter()
        clock("backward: hand-over, DDP's copies and all-reduce", engine.backward)()
        engine.optimizer.step()
        clock("zero_grad", engine.optimizer.zero_grad)()
        clock("forward of the next update", engine.forward)()
        whole = time.perf_counter() - began
        if k >= 3:
            for label, seconds in clock.seconds.items():
                found[label].append(seconds)
            found["whole"].append(whole)
    return found


def hand_over(workload_name: str, rounds: int, rank: int) -> list[float]:
    """Seconds of a backward and forward pass of the bare model: what no engine can avoid. Local."""
    workload = Workload.named(workload_name, rank=rank)
    model = workload.model()
    loss = model(torch.zeros(()))
    found = []
    for _ in range(rounds):
        began = time.perf_counter()
        loss.backward()
        for param in model.parameters():
            param.grad = None
        loss = model(torch.zeros(()))
        found.append(time.perf_counter() - began)
    return found


def main() -> None:
    """Start ranks, or be one."""
    parser = argparse.ArgumentParser(description="Where DistAdamW's update phase spends its time.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--timeout", type=float, default=300.0)
    options = parser.parse_args()
    if not ranks.is_rank():
        ranks.start("benchmarks.where_time_goes", sys.argv[1:], ranks=options.ranks, timeout=options.timeout)
        return
    clock = Clock()
    absent = wrap(clock)
    with ranks.joined() as (rank, _):
        for name in WORKLOADS:
            parts = measure(name, options.rounds, rank, clock)
            parts["(a bare model's backward and forward)"] = hand_over(name, options.rounds, rank)
            numel = Workload.named(name, rank=rank, kept=False).numel
            if rank == 0:
                medians = {label: median(times) for label, times in parts.items()}
                record = {"kind": "where", "workload": name, "numel": numel, "seconds": medians, "absent": absent}
                records.append(options.out, [record])
                print(f"\n{name}: {numel:,} elements" + (f"; no longer there: {absent}" if absent else ""))
                for label, seconds in sorted(medians.items(), key=lambda item: -item[1]):
                    part = seconds / medians["whole"]
                    print(f"  {label:52} {seconds * 1e3:8.1f} ms {part:6.1%} {seconds / numel * 1e9:8.2f} ns/element")


if __name__ == "__main__":
    main()
