"""Measure the local AdamW pass over large shards, relative to copy bandwidth.

Run ``python -m benchmarks.local_step --out results.jsonl``. One process, no process group, so the
pass is alone: no traffic, and the shard is whole parameters.

The limit: an fp32 AdamW pass reads weight, gradient and two moments and writes all but the gradient,
28 bytes an element. Copy bandwidth is that of `Tensor.copy_` between two tensors as large as the weights, counted
as 8 bytes an element. The fraction of the limit is 28 N / bandwidth over the measured time.
Copies and passes alternate; the fraction is the median over rounds of each round's own.

A copy may have to read the lines that it writes (12 bytes an element move then, and 8 are counted), which
a pass in place has not: fractions above 1 are possible. So bandwidth in place (`Tensor.mul_`, 8 bytes an
element) is reported too, with the fraction of that.

Clipping reads the gradients once more, and multiplies them into memory of its own where the norm is above
its limit; the limit here stays that of the pass alone, so these fractions say what clipping costs.

It runs on the CPU with one thread and with one per core, and on a CUDA device if there is one.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor

from benchmarks import records
from benchmarks.groups import RECIPE
from dist_adamw import DistAdamW

PASS_BYTES, COPY_BYTES = 28, 8  # per fp32 element
LIMITS = {"nothing to clip": 1e9, "clipped": 1e-3}  # of the norm
NO_GPU = "no CUDA device here, so the CUDA half was not measured"


def _weights(numel: int, pieces: int, device: str) -> list[Tensor]:
    params = [torch.nn.Parameter(part.clone()) for part in torch.randn(numel, device=device).chunk(pieces)]
    for param in params:
        param.grad = torch.randn_like(param)
    return list(params)


def _cases(numel: int, device: str) -> dict[str, Callable[[], Any]]:
    """Return the timed cases. "nothing to clip": the measured norm is below its limit. "clipped": far above it."""
    cases: dict[str, Callable[[], Any]] = {}
    whole = _weights(numel, 1, device)
    cases["DistAdamW"] = DistAdamW(whole, **RECIPE).step
    cases["DistAdamW, 64 parameters"] = DistAdamW(_weights(numel, 64, device), **RECIPE).step
    cases["torch AdamW, fused"] = torch.optim.AdamW(_weights(numel, 1, device), fused=True, **RECIPE).step
    for what, max_norm in LIMITS.items():
        clipping = DistAdamW(_weights(numel, 1, device), max_grad_norm=max_norm, **RECIPE)
        clipping.step()
        norm = clipping.grad_norm
        assert norm is not None
        assert (float(norm) > max_norm) == (what == "clipped"), f"norm {float(norm)}, limit {max_norm}"
        cases[f"DistAdamW, max_grad_norm, {what}"] = clipping.step
        cases[f"torch clip_grad_norm_, then AdamW, fused, {what}"] = _clip_then_step(numel, device, max_norm)
    return cases


def _clip_then_step(numel: int, device: str, max_norm: float) -> Callable[[], Any]:
    """Clip with torch, which multiplies even if it need not, so that every call takes the same time."""
    clipped = _weights(numel, 1, device)
    fused = torch.optim.AdamW(clipped, fused=True, **RECIPE)

    def run() -> None:
        torch.nn.utils.clip_grad_norm_(clipped, max_norm)
        fused.step()

    return run


def _seconds(call: Callable[[], Any], device: str) -> float:
    if device == "cuda":
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(stop)) / 1e3
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def measure(numel: int, *, device: str, threads: int, rounds: int) -> Iterator[records.Record]:
    """Return one record per case."""
    torch.set_num_threads(threads)
    source, target = torch.randn(numel, device=device), torch.empty(numel, device=device)
    cases = _cases(numel, device)
    copies: list[float] = []
    scalings: list[float] = []
    passes: dict[str, list[float]] = {name: [] for name in cases}
    fractions: dict[str, list[float]] = {name: [] for name in cases}
    in_place: dict[str, list[float]] = {name: [] for name in cases}
    for k in range(2 + rounds):
        for name, call in cases.items():
            copied = [_seconds(lambda: target.copy_(source), device)]
            took = _seconds(call, device)
            copied.append(_seconds(lambda: target.copy_(source), device))
            scaled = _seconds(lambda: target.mul_(1.0), device)
            if k >= 2:
                copies += copied
                scalings.append(scaled)
                in_place[name].append(scaled / COPY_BYTES * PASS_BYTES / took)
                passes[name].append(took)
                fractions[name].append(min(copied) / COPY_BYTES * PASS_BYTES / took)
    for name in cases:
        low, middle, high = quantiles(fractions[name], n=4)
        yield {
            "kind": "local_step",
            "case": name,
            "device": device,
            "threads": threads,
            "numel": numel,
            "copy_gb_per_s": COPY_BYTES * numel / median(copies) / 1e9,
            "in_place_gb_per_s": COPY_BYTES * numel / median(scalings) / 1e9,
            "fraction_in_place": median(in_place[name]),
            "pass_gb_per_s": PASS_BYTES * numel / median(passes[name]) / 1e9,
            "fraction": middle,
            "fraction_quartiles": [low, high],
        }


def main() -> None:
    """Measure on every available device."""
    parser = argparse.ArgumentParser(description="The local AdamW pass against copy bandwidth.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--numel", type=int, default=1 << 25)
    parser.add_argument("--rounds", type=int, default=11)
    options = parser.parse_args()
    places = [("cpu", threads) for threads in sorted({1, os.cpu_count() or 1})]
    if torch.cuda.is_available():
        places.append(("cuda", 1))
    records.append(options.out, [records.environment()])
    for device, threads in places:
        for record in measure(options.numel, device=device, threads=threads, rounds=options.rounds):
            records.append(options.out, [record])
            print(f"{device} x{threads} {record['case']:60} {record['fraction']:.0%} of copy bandwidth", flush=True)
    if not torch.cuda.is_available():
        records.append(options.out, [{"kind": "local_step", "device": "cuda", "skipped": NO_GPU}])
        print(NO_GPU)


if __name__ == "__main__":
    main()
