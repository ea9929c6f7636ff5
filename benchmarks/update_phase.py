"""Compare the update phase of every engine: gradient sync + AdamW + parameter sync.

Run ``python -m benchmarks.update_phase --out results.jsonl``, or the same under ``torchrun``.

One measured window includes, for every engine:

    backward   each layer's backward makes its gradients, and the engine's own hooks take each as autograd hands
               it over, and reduce it
    step       AdamW, then whatever synchronisation of parameters belongs to it
    zero_grad  to None: gradients are freed, and the memory may go back to the system, to be faulted in by the
               next backward
    forward    of the next update: engines that gather parameters here (FSDP2) or that wait here
               for a gather still under way do so inside the window, so none ends it with work
               left over

``--gradients`` says how a layer's backward makes them:

    allocated  an ordinary autograd node multiplies a stored tensor by a number, into a new tensor, per parameter.
               So gradients are fresh memory in every update and live until `zero_grad` or until the engine drops them,
               as in training. The multiplication is in the window, the same for every engine.
    kept       backward returns gradients that lie in memory already, as new tensor objects, so that autograd takes
               them without a copy. Nothing is allocated, so this hides what fresh gradients cost an engine that keeps
               them. They are rewritten before each window, since engines overwrite them; the rewriting is not in it.

It does not include the rest of a model's arithmetic: a layer's forward is the copy of one number, and its backward
computes nothing else. What Python and autograd spend on that is in the window, nothing is subtracted. So communication
has next to no computation to overlap with: this compares the work that engines do, not how well they overlap it, for
which there are `overlap` and `training_step`. Not included either: the scheduler, clipping, the data.

A barrier starts each window; its length is that of the slowest rank. Records have the processor time of all ranks too
(from before the barrier on), which other programs on the machine lengthen less. ``--groups`` are the optimizer's
parameter groups, the same for every engine: see `benchmarks.groups`.

All engines live in the same processes. Rounds go over them in a new random order each; ratios are
taken within a round. Before anything is timed every engine makes 3 updates with eps=0.1 and 3 with
eps=1e-8, and its weights must then be those of a local torch.optim.AdamW that is fed the averaged
gradients; otherwise nothing is measured. Gradients differ on each rank and in each update.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import os
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist

from benchmarks import isolated, ranks, records
from benchmarks.engines import BUILDERS, OURS, Engine, Skip, build
from benchmarks.groups import GROUPS, RECIPE
from benchmarks.times import Stopwatch, Took, of_all_ranks
from benchmarks.workloads import ALLOCATED, KEPT, TITLES, WORKLOADS, Workload

WARM_UP = 2  # rounds
UPDATES_CHECKED = 3
# The weights move by about lr = 1e-3 an update; a wrong gradient scale shows as 1e-4 and more.
TOLERANCE = 2e-6


def advance(engine: Engine, workload: Workload, update: int, accumulation: int = 1) -> float:
    """Run one update of ``accumulation`` backward passes; return the seconds of the window on this rank."""
    workload.gradients.refill(update)
    dist.barrier()
    start = time.perf_counter()
    engine.backward_passes(accumulation)
    engine.step()
    engine.forward()
    return time.perf_counter() - start


class Reference:
    """Return the weights that every engine must have: AdamW on one rank, given the averaged gradients."""

    def __init__(self, workload: Workload) -> None:
        self._workload = workload
        self._model = workload.model()
        self._optimizer = torch.optim.AdamW(workload.parameter_groups(self._model), fused=True, **RECIPE)

    def advance(self, eps: float, updates: range) -> list[torch.Tensor]:
        """Return the weights after ``updates``. Collective."""
        for group in self._optimizer.param_groups:
            group["eps"] = eps
        for update in updates:
            self._workload.gradients.refill(update)
            average = self._workload.gradients.flat()
            dist.all_reduce(average)
            average /= dist.get_world_size()
            start = 0
            for param in self._model.parameters():
                param.grad = average[start : start + param.numel()].view_as(param)
                start += param.numel()
            self._optimizer.step()
        return [param.detach().clone() for param in self._model.parameters()]


def check(engines: dict[str, Engine], workload: Workload) -> tuple[dict[str, float], dict[str, str]]:
    """Compare every engine's weights with the reference; remove engines that cannot run. Collective.

    Returns:
        Largest difference by engine, and why engines were taken out.

    Raises:
        RuntimeError: an engine's weights differ.
    """
    reference = Reference(workload)
    differences: dict[str, float] = {}
    failed: dict[str, str] = {}
    # On more than two ranks engines add in different orders. Where terms cancel, AdamW with a small eps makes updates
    # as large as lr of what is left, so that eps compares nothing there.
    for number, eps in enumerate((0.1, 1e-8) if dist.get_world_size() <= 2 else (0.1,)):
        updates = range(number * UPDATES_CHECKED, (number + 1) * UPDATES_CHECKED)
        expected = reference.advance(eps, updates)
        for name, engine in list(engines.items()):
            try:
                engine.set_eps(eps)
                for update in updates:
                    advance(engine, workload, update)
            except Exception as problem:  # a peer that does not run is left out, saying so
                if name.startswith(OURS):
                    raise
                failed[name] = f"{type(problem).__name__}: {problem}"
                del engines[name]
                continue
            difference = max(float((a - b).abs().max()) for a, b in zip(engine.weights(), expected, strict=True))
            difference = max(ranks.gathered(difference))
            if not difference <= TOLERANCE:
                raise RuntimeError(
                    f"{name} has other weights than AdamW on one rank after {updates.stop} updates, "
                    f"the last with eps={eps}: largest difference {difference:.3g}, tolerance {TOLERANCE}"
                )
            differences[name] = max(difference, differences.get(name, 0.0))
    return differences, failed


def time_workload(workload: Workload, chosen: Sequence[str], *, rounds: int, accumulation: int) -> list[records.Record]:
    """Build, check and time the engines on one workload; return the records. Collective."""
    engines: dict[str, Engine] = {}
    skipped: dict[str, str] = {}
    for engine_name in chosen:
        try:
            engines[engine_name] = build(engine_name, workload)
        except Skip as reason:
            skipped[engine_name] = str(reason)
    differences, failed = check(engines, workload)
    skipped |= failed
    mine: dict[str, list[Took]] = {engine_name: [] for engine_name in engines}
    order = list(engines)
    shuffle = random.Random(0)
    for update in range(WARM_UP + rounds):
        shuffle.shuffle(order)
        for engine_name in order:
            watch = Stopwatch()
            wall = advance(engines[engine_name], workload, update, accumulation)
            mine[engine_name].append((wall, watch.read()[1]))
    times = of_all_ranks({engine_name: took[WARM_UP:] for engine_name, took in mine.items()})
    common = {
        "kind": "update_phase",
        "workload": workload.name,
        "gradients": workload.gradients.kind,
        "groups": workload.groups,
        "numel": workload.numel,
        "ranks": dist.get_world_size(),
        "accumulation": accumulation,
        "load_average": os.getloadavg()[0],  # what is above the number of ranks is other people's work
    }
    found: list[records.Record] = [
        {
            **common,
            "engine": engine_name,
            "number_of_groups": len(engines[engine_name].optimizer.param_groups),
            "detail": engines[engine_name].detail,
            "sharded": engines[engine_name].sharded,
            "largest_difference": differences[engine_name],
            **took.fields(),
        }
        for engine_name, took in times.items()
    ]
    return found + [{**common, "engine": k, "skipped": reason} for k, reason in skipped.items()]


def work(options: argparse.Namespace) -> None:
    """Run one rank."""
    with ranks.joined() as (rank, _):
        if rank == 0:
            records.append(options.out, [records.environment()])
        for name, groups, gradients in itertools.product(options.workloads, options.groups, options.gradients):
            workload = Workload.named(name, rank=rank, gradients=gradients, groups=groups)
            found = time_workload(workload, options.engines, rounds=options.rounds, accumulation=options.accumulation)
            gc.collect()
            if rank == 0:
                records.append(options.out, found)
                show(found)


def show(found: Sequence[records.Record]) -> None:
    """Print the medians of one workload."""
    for record in found:
        case = f"{record['workload']}, {record['gradients']}, groups: {record['groups']}"
        took = f"{median(record['seconds']):.4f} s" if "seconds" in record else record["skipped"]
        print(f"{case:36} {record['engine']:32} {took}", flush=True)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options of this script."""
    parser = argparse.ArgumentParser(description="The update phase of every engine, side by side.")
    parser.add_argument("--out", type=Path, required=True, help="JSON-lines file to append to")
    parser.add_argument("--ranks", type=int, default=2, help="when not started by torchrun")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(TITLES))
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=["one", "layerwise"])
    parser.add_argument("--gradients", nargs="+", choices=(ALLOCATED, KEPT), default=[ALLOCATED, KEPT])
    parser.add_argument("--engines", nargs="+", choices=BUILDERS, default=list(BUILDERS))
    parser.add_argument("--accumulation", type=int, default=1, help="backward passes of an update")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds, of each part")
    parser.add_argument("--only", choices=("time", "isolated"), help="time, or memory and traffic; default: both")
    options = parser.parse_args(argv)
    options.out = options.out.resolve()
    return options


def main() -> None:
    """Start the ranks, or run as one."""
    options = parse()
    if ranks.is_rank():
        work(options)
        return
    if options.only != "isolated":
        ranks.start("benchmarks.update_phase", sys.argv[1:], ranks=options.ranks, timeout=options.timeout)
    if options.only != "time":
        isolated.measure(
            options.out,
            options.workloads,
            options.engines,
            world_size=options.ranks,
            timeout=options.timeout,
            accumulation=options.accumulation,
        )


if __name__ == "__main__":
    main()
