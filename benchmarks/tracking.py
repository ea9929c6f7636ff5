"""Time `Tracking.log` that is due inside of a whole training step of a GPT, with several trackers.

Run ``python -m benchmarks.tracking --out results.jsonl``. One process, one thread: only the main rank logs.

A window is forward, backward, the update with clipping, ``scheduler.step()``, ``zero_grad()`` and, except for "none",
``tracking.log({"loss": loss})``, after which a row is on disk (CSV) or in the queue of the writer's thread
(TensorBoard). All trackers are used in the same job: rounds go over them in a new random order each. Times are
processor time of the whole process, the writer's thread included, which other programs lengthen less. What a log takes
is timed inside of the window, since it is less than what two windows differ by.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from benchmarks import records
from benchmarks.models import GPT, VOCABULARY
from dist_adamw import CyclicLRWithRestarts, DistAdamW, Tracking, csv_tracker, prepare

TRACKERS = {"none": (), "csv": ("csv",), "tensorboard": ("tensorboard",), "both": ("csv", "tensorboard")}


def main(args: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    options = parser.parse_args(args)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(options, Path(folder))
    records.append(options.out, [records.environment(), *found])
    for record in found:
        share = f"log: {1e6 * median(record['log_seconds']):.0f} us, {100 * record['share']:.2f}% of a step"
        print(f"{record['trackers']:12} step: {1e3 * median(record['seconds']):.1f} ms  {share}", file=sys.stderr)


def measure(options: argparse.Namespace, folder: Path) -> list[records.Record]:
    """Return a record for each choice of trackers."""
    accelerator = Accelerator(
        cpu=True, log_with=["tensorboard", csv_tracker(folder / "log.csv")], project_dir=str(folder)
    )
    accelerator.init_trackers("job")
    trackers = {tracker.name: tracker for tracker in accelerator.trackers}
    torch.manual_seed(0)
    model = GPT(options.layers, options.width, options.context)
    numel = sum(param.numel() for param in model.parameters())
    optimizer = DistAdamW(model.parameters(), 1e-4, weight_decay=0.05, max_grad_norm=1.0)
    scheduler = CyclicLRWithRestarts(optimizer, restart_period=1)
    warm = 3
    rows = (options.rounds + warm) * len(TRACKERS) * options.batch
    data: Any = torch.randint(VOCABULARY, (rows, options.context + 1))
    loader = DataLoader(data, options.batch)
    model, optimizer, loader, scheduler = prepare(accelerator, model, optimizer, loader, scheduler)
    tracking = Tracking(optimizer, scheduler, accelerator)
    batches, order = iter(loader), random.Random(0)
    steps: dict[str, list[float]] = {name: [] for name in TRACKERS}
    logs: dict[str, list[float]] = {name: [] for name in TRACKERS}
    for _ in range(options.rounds + warm):
        for name in order.sample(sorted(TRACKERS), len(TRACKERS)):
            accelerator.trackers = [trackers[one] for one in TRACKERS[name]]
            began = time.process_time()
            with accelerator.accumulate(model):
                loss = model(next(batches))
                accelerator.backward(loss)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            trained = time.process_time()
            if name != "none":
                tracking.log({"loss": loss})
            ended = time.process_time()
            steps[name].append(ended - began)
            logs[name].append(ended - trained)
    return [
        {
            "kind": "tracking",
            "trackers": name,
            "numel": numel,
            "layers": options.layers,
            "width": options.width,
            "context": options.context,
            "batch": options.batch,
            "seconds": steps[name][warm:],
            "log_seconds": logs[name][warm:],
            "share": median(log / step for log, step in zip(logs[name][warm:], steps[name][warm:], strict=True)),
        }
        for name in TRACKERS
    ]


if __name__ == "__main__":
    main()
