"""Profile DistAdamW's update phase, part by part.

Run ``python -m benchmarks.where_time_goes --out results.jsonl``. Two ranks on gloo by default.

Functions of dist_adamw are wrapped with timers for this run; missing ones are reported. Times are rank 0's, without
those of timed functions called inside, so the medians of the parts add up to about the median of the whole. Without
timers the window is the same as `update_phase`'s.

Wall is what passes; CPU is what all threads of the process use meanwhile (`time.process_time`),
so what gloo's threads do to move messages is counted where the main thread happens to be. A part whose CPU
time is longer ran in parallel with transport; one whose CPU time is much shorter waited. Messages are freed
with a bucket's last reference, after ``finish``: that is in the rest of step, or in the hooks.
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
from benchmarks.engines import OURS, OURS_WITHOUT_DDP, build
from benchmarks.groups import GROUPS
from benchmarks.workloads import ALLOCATED, KEPT, TITLES, WORKLOADS, Workload
from dist_adamw.optimizer import adamw, sharded_optimizer, update_bucket
from dist_adamw.optimizer.gradients import backward, ddp, gradients_for_update, update_agreement
from dist_adamw.optimizer.sharding import owned_gradients
from dist_adamw.optimizer.transport.shared_memory import SharedMemoryTransport

ENGINES = (OURS, OURS_WITHOUT_DDP)
WHOLE, BARE = "whole", "(a bare model's backward and forward)"
WAIT = "wait"
# What is wrapped: label, owner, attribute. Waiting is told apart by who waits.
PARTS: list[tuple[str, Any, str]] = [
    ("backward: DDP's hook", ddp.DDPReducer, "reduce"),
    ("backward: hooks of parameters", backward.BackwardPasses, "look_at_arrivals"),
    ("backward: its end", backward.BackwardPasses, "_after_backward"),
    ("backward: watch for changes", backward.BackwardPasses, "_begin_watch"),
    ("reduce: start", SharedMemoryTransport, "start_reduce"),
    ("reduce: finish", SharedMemoryTransport, "finish_reduce"),
    ("reduce: averaging", SharedMemoryTransport, "_average"),
    ("step: complete", update_agreement.UpdateAgreement, "complete"),
    ("step: arrive", gradients_for_update.GradientsForUpdate, "arrive"),
    ("step: follow the user", sharded_optimizer.ShardedOptimizer, "_follow"),
    ("step: owned gradients", owned_gradients.OwnedGradients, "owned"),
    ("step: AdamW", update_bucket, "adamw_update_"),
    ("gather: start", SharedMemoryTransport, "start_gather"),
    ("gather: finish", SharedMemoryTransport, "finish_gather"),
    ("discard", backward.BackwardPasses, "discard"),
    (WAIT, dist.Work, "wait"),
    ("step: rest", adamw.DistAdamW, "step"),
]
Times = dict[str, tuple[float, float]]  # by label: wall, CPU


class Clock:
    """Exclusive times by label of what is running."""

    def __init__(self) -> None:
        self.wall: dict[str, float] = defaultdict(float)
        self.cpu: dict[str, float] = defaultdict(float)
        self._running: list[str] = []
        self._since = (0.0, 0.0)

    def clear(self) -> None:
        """Reset the times."""
        self.wall.clear()
        self.cpu.clear()

    def _charge(self) -> None:
        now = (time.perf_counter(), time.process_time())
        if self._running:
            self.wall[self._running[-1]] += now[0] - self._since[0]
            self.cpu[self._running[-1]] += now[1] - self._since[1]
        self._since = now

    def __call__(self, label: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap ``function``, and charge its time to ``label``."""

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._charge()
            within = self._running[-1] if self._running else "nothing"
            self._running.append(f"{within}: waiting" if label == WAIT else label)
            try:
                return function(*args, **kwargs)
            finally:
                self._charge()
                self._running.pop()

        return timed


def wrap(clock: Clock) -> list[str]:
    """Put timers on PARTS; return the labels of missing ones."""
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


def measure(engine_name: str, workload: Workload, rounds: int, clock: Clock) -> list[Times]:
    """Return wall and CPU seconds of every part, by round. Collective."""
    engine = build(engine_name, workload)
    found: list[Times] = []
    for k in range(3 + rounds):
        workload.gradients.refill(k)
        clock.clear()
        dist.barrier()
        began, cpu = time.perf_counter(), time.process_time()
        clock("backward: autograd, hand-over" + (", DDP" if engine_name == OURS else ""), engine.backward)()
        engine.optimizer.step()
        clock("zero_grad", engine.optimizer.zero_grad)()
        clock("forward of the next update", engine.forward)()
        whole = (time.perf_counter() - began, time.process_time() - cpu)
        if k >= 3:
            found.append({WHOLE: whole, **{k: (clock.wall[k], clock.cpu[k]) for k in clock.wall}})
    return found


def hand_over(workload: Workload, rounds: int) -> Times:
    """Time a backward and forward pass of the bare model, which no engine can avoid. Local."""
    model = workload.model()
    loss = model(torch.zeros(()))
    walls, cpus = [], []
    for _ in range(rounds):
        began, cpu = time.perf_counter(), time.process_time()
        loss.backward()
        for param in model.parameters():
            param.grad = None
        loss = model(torch.zeros(()))
        walls.append(time.perf_counter() - began)
        cpus.append(time.process_time() - cpu)
    return {BARE: (median(walls), median(cpus))}


def medians(found: list[Times]) -> Times:
    """Return the medians of each part over the rounds; a part that did not run in a round counts 0."""
    labels = list(dict.fromkeys(label for times in found for label in times))
    columns = {label: [times.get(label, (0.0, 0.0)) for times in found] for label in labels}
    return {label: (median(w for w, _ in times), median(c for _, c in times)) for label, times in columns.items()}


def show(times: Times, numel: int) -> None:
    """Print a table, longest part first."""
    whole = times[WHOLE][0]
    for label, (wall, cpu) in sorted(times.items(), key=lambda item: -item[1][0]):
        print(
            f"  {label:44} wall {wall * 1e3:8.1f} ms {wall / whole:6.1%} {wall / numel * 1e9:7.2f} ns/element"
            f"   CPU {cpu * 1e3:8.1f} ms {cpu / whole:6.1%}",
            flush=True,
        )


def main() -> None:
    """Start the ranks, or run as one."""
    parser = argparse.ArgumentParser(description="Where DistAdamW's update phase spends its time.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(TITLES))
    parser.add_argument("--groups", choices=GROUPS, default="one")
    parser.add_argument("--gradients", choices=(ALLOCATED, KEPT), default=ALLOCATED)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--timeout", type=float, default=300.0)
    options = parser.parse_args()
    if not ranks.is_rank():
        ranks.start("benchmarks.where_time_goes", sys.argv[1:], ranks=options.ranks, timeout=options.timeout)
        return
    clock = Clock()
    absent = wrap(clock)
    with ranks.joined() as (rank, size):
        if rank == 0:
            records.append(options.out, [records.environment()])
        for name in options.workloads:
            workload = Workload.named(name, rank=rank, gradients=options.gradients, groups=options.groups)
            numel = workload.numel
            for engine_name in options.engines:
                times = medians(measure(engine_name, workload, options.rounds, clock))
                times |= hand_over(workload, options.rounds)
                if rank:
                    continue
                record = {"kind": "where", "workload": name, "engine": engine_name, "ranks": size, "numel": numel}
                record |= {"gradients": options.gradients, "groups": options.groups}
                record |= {"seconds": times, "columns": ["wall", "CPU"], "absent": absent}
                records.append(options.out, [record])
                case = f"{name}, {options.gradients} gradients, groups: {options.groups}"
                print(f"\n{case}, {engine_name}: {numel:,} elements", flush=True)
                show(times, numel)
        if rank == 0 and absent:
            print(f"no longer there: {absent}")


if __name__ == "__main__":
    main()
