"""Compare whole training steps of a GPT: data, forward, backward, clipping, update, schedule, zero_grad.

Run ``python -m benchmarks.training_step --out results.jsonl``, with nothing else on the machine. Two ranks on gloo by
default, one thread each. The engines are used as scripts use them: see `benchmarks.trainers`.

One measured step includes fetching its micro-batches from a loader (samples lie in memory), forward and backward of
each micro-batch with ``.item()`` of its loss, with ``--clip`` clipping the global norm, the optimizer's step, the
schedule's, and ``zero_grad()``. A barrier starts it; its length is that of the slowest rank. Records have the processor
time of all ranks too, which other programs on the machine lengthen less. No engine leaves work for later: all
parameters are there at the end of ``step``, and FSDP2 gathers them in the forward that it is timed with.

All engines live in the same processes and train on the same batches. Rounds go over them in a new random order each;
ratios are taken within a round. Each combination of ``--ranks``, ``--precision`` and ``--accumulation`` runs in
separate processes.

Checked first: the losses of the first CHECKED updates of every engine, as means over micro-batches and ranks, are those
of DDP with torch.optim.AdamW in fp32 to LOSS_TOLERANCE. eps is 1e-3, about the size of a gradient, so that a wrong
scale of gradients changes the weights; with 1e-8 AdamW would not see it. Under bf16 the tolerance is wider.
"""

from __future__ import annotations

import argparse
import functools
import gc
import itertools
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import ranks, records
from benchmarks.engines import OURS
from benchmarks.groups import GROUPS, parameter_groups
from benchmarks.models import GPT, VOCABULARY
from benchmarks.trainers import (
    ACCELERATE,
    BUILDERS,
    Rows,
    Task,
    Trainer,
    build_all,
    interleaved,
    mean_over_ranks,
    numel,
    recipe,
    seeded,
)

CHECKED = 4  # updates whose losses are compared
# In bf16 a last bit of a weight, which depends on the order of sums, may round an activation the other way.
LOSS_TOLERANCE = {"fp32": 1e-5, "bf16": 1e-3}
WARM = 2  # rounds
EPS = 1e-3
PRECISIONS = ("fp32", "bf16")


def task(options: argparse.Namespace, groups: str) -> Task:
    """Return what the engines train, with fixed random tokens."""
    updates = CHECKED + WARM + options.rounds + 2  # Accelerate's loader looks one batch ahead
    samples = options.batch * options.accumulation * dist.get_world_size() * updates
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(VOCABULARY, (samples, options.context + 1), generator=generator)

    def groups_of(model: Any) -> Any:
        return parameter_groups(model.layers(), groups)

    return Task(
        model=seeded(functools.partial(GPT, options.layers, options.width, options.context)),
        groups=groups_of,
        dataset=Rows(tokens),
        batch=options.batch,
        accumulation=options.accumulation,
        bf16=options.precision == "bf16",
        clip=options.clip,
        recipe=recipe(eps=EPS),
    )


def losses(trainers: dict[str, Trainer], skipped: dict[str, str]) -> dict[str, list[float]]:
    """Return the losses of the first updates by engine; move engines that fail to ``skipped``. Collective."""
    found: dict[str, list[float]] = {}
    for name in list(trainers):
        try:
            found[name] = [mean_over_ranks(trainers[name].update()) for _ in range(CHECKED)]
        except Exception as problem:  # a peer that does not run is left out, saying so
            if name in (OURS, ACCELERATE):
                raise
            skipped[name] = f"{type(problem).__name__}: {problem}"
            del trainers[name]
    return found


def largest_differences(found: dict[str, list[float]], tolerance: float) -> dict[str, float]:
    """Return by how much losses differ at most from those of DDP with AdamW.

    Raises:
        RuntimeError: by more than ``tolerance``.
    """
    expected = found[ACCELERATE]
    differences = {name: max(abs(a - b) for a, b in zip(own, expected, strict=True)) for name, own in found.items()}
    for name, difference in differences.items():
        if not difference <= tolerance:
            raise RuntimeError(
                f"{name} has other losses than {ACCELERATE}: {found[name]} and {expected}, largest difference "
                f"{difference:.3g}, tolerance {tolerance}"
            )
    return differences


def measure(options: argparse.Namespace, groups: str) -> list[records.Record]:
    """Build, check and time the engines with one choice of groups; return the records. Collective."""
    todo = task(options, groups)
    trainers, skipped = build_all(options.engines, todo)
    found = losses(trainers, skipped)
    differences = largest_differences(found, LOSS_TOLERANCE[options.precision])
    times = interleaved(trainers, warm_up=WARM, rounds=options.rounds)
    common = {
        "kind": "training_step",
        "ranks": dist.get_world_size(),
        "precision": options.precision,
        "accumulation": options.accumulation,
        "groups": groups,
        "clip": options.clip,
        "numel": numel(todo.model()),
        "tokens": todo.global_batch * options.context,
        "shape": {name: getattr(options, name) for name in ("layers", "width", "context", "batch")},
        "load_average": os.getloadavg()[0],
    }
    measured: list[records.Record] = [
        {
            **common,
            "engine": name,
            "detail": trainers[name].detail,
            "number_of_groups": len(trainers[name].optimizer.param_groups),
            "losses": found[name],
            "largest_difference": differences[name],
            **took.fields(),
        }
        for name, took in times.items()
    ]
    return measured + [{**common, "engine": name, "skipped": reason} for name, reason in skipped.items()]


def show(found: Sequence[records.Record]) -> None:
    """Print a table of one choice of groups."""
    first = found[0]
    print(
        f"\n{first['numel']:,} parameters, {first['ranks']} ranks, {first['precision']}, accumulation "
        f"{first['accumulation']}, groups: {first['groups']}, {first['tokens']:,} tokens a step"
    )
    ours = next((record["seconds"] for record in found if record["engine"] == OURS), None)
    for record in sorted(found, key=lambda record: median(record.get("seconds", [float("inf")]))):
        if "skipped" in record:
            print(f"  {record['engine']:32} left out: {record['skipped']}")
            continue
        took = median(record["seconds"])
        line = f"  {record['engine']:32} {took:8.4f} s/step {record['tokens'] / took:9.0f} tokens/s"
        line += f" {median(record['cpu_seconds']):8.4f} s of processors"
        if ours is not None and len(ours) > 1:
            within = quantiles([a / b for a, b in zip(record["seconds"], ours, strict=True)], n=4)
            line += f"   x DistAdamW within rounds {within[1]:.3f} [{within[0]:.3f} {within[2]:.3f}]"
        print(f"{line}   losses differ by {record['largest_difference']:.1e}", flush=True)


def work(options: argparse.Namespace) -> None:
    """Run one rank."""
    with ranks.joined() as (rank, _):
        if rank == 0:
            records.append(options.out, [records.environment()])
        for groups in options.groups:
            found = measure(options, groups)
            gc.collect()
            if rank == 0:
                records.append(options.out, found)
                show(found)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options of this script."""
    parser = argparse.ArgumentParser(description="Whole training steps, side by side.")
    parser.add_argument("--out", type=Path, required=True, help="JSON-lines file to append to")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--engines", nargs="+", choices=BUILDERS, default=list(BUILDERS))
    parser.add_argument("--ranks", nargs="+", type=int, default=[2])
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=["fp32"])
    parser.add_argument("--accumulation", nargs="+", type=int, default=[1])
    parser.add_argument("--clip", type=float, help="the largest norm of gradients; default: they are not clipped")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--batch", type=int, default=2, help="sequences of a micro-batch on one rank")
    parser.add_argument("--small", action="store_true", help="a tiny model and few rounds, to try things out")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds, of each combination")
    options = parser.parse_args(argv)
    options.out = options.out.resolve()
    if ACCELERATE not in options.engines:
        parser.error(f"--engines needs {ACCELERATE!r}, whose losses the others are compared with")
    if options.small:
        options.layers, options.width, options.context, options.rounds = 2, 64, 16, 3
    return options


def main() -> None:
    """Start the ranks of each combination, or run as one."""
    options = parse()
    if ranks.is_rank():
        options.precision, options.accumulation = options.precision[0], options.accumulation[0]
        work(options)
        return
    for size, precision, accumulation in itertools.product(options.ranks, options.precision, options.accumulation):
        chosen = ["--ranks", str(size), "--precision", precision, "--accumulation", str(accumulation)]
        args = [*sys.argv[1:], *chosen]
        ranks.start("benchmarks.training_step", args, ranks=size, timeout=options.timeout)


if __name__ == "__main__":
    main()
