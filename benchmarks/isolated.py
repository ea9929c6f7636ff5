"""Measure one engine's peak memory and bytes sent per rank, in separate processes and a separate network.

`update_phase` calls `measure` for every engine and workload. By hand:
``python -m benchmarks.isolated --out results.jsonl --workload gpt --engine "DDP + AdamW"``.

Memory: the largest resident set between building the model and the end of the last update, above
the resident set after imports, set-up of the process group and a first collective. Here backward
allocates new gradients, as training does, and malloc gives memory back to the system
as soon as it is freed (MALLOC_MMAP_THRESHOLD_), so the peak is what lives at once.

The peak after the first WARM updates is given too, since in those DDP rebuilds its buckets and state is laid out.
Both are compared with the minimum: 4N bytes of parameters, 4N of gradients and 8N/W of state; an engine that shards
gradients too, with 4N/W of those and 4L of the largest parameter's, since autograd returns a gradient whole. What is
above that is staging, buckets, gradients that live only until they have been sent, and objects: a tensor costs
kilobytes beyond its elements. What those of plain torch cost (a parameter, its gradient and AdamW's state, on one rank
without DDP) is measured in a separate process, and taken off the peak in ``beyond_objects_over_formula``.

Traffic: what the loopback interface says that it sent, over the ranks and the updates. That is
counted by the kernel, headers and acknowledgements included; what ranks of one host send through shared memory, as
DistAdamW does, is not (see `bytes_sent`, or set DIST_ADAMW_SHARED_MEMORY=0). Where the kernel permits, the ranks have a
network namespace of their own, so that nothing else is counted. It is compared with f N (b_g + b_p),
f = (W - 1) / W: gradients sent to their owners, and parameters sent back, once.
"""

from __future__ import annotations

import argparse
import gc
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks import ranks, records
from benchmarks.engines import BUILDERS, OURS, Engine, Skip, build
from benchmarks.groups import RECIPE
from benchmarks.workloads import CONSTANT, WORKLOADS, Workload

WARM, COUNTED = 3, 5  # updates; DDP packs its buckets anew after the first
_OBJECTS = "many"  # the workload whose tensors are counted


def measure(
    out: Path,
    workloads: Sequence[str],
    engines: Sequence[str],
    *,
    world_size: int,
    timeout: float,
    accumulation: int = 1,
) -> None:
    """Measure every engine on every workload, one after the other."""
    records.append(out, [records.environment()])
    prefix, network = ranks.private_network()
    objects = str(object_bytes())
    for workload in workloads:
        for engine in engines:
            command = [sys.executable, "-m", "benchmarks.isolated", "--out", str(out), "--ranks", str(world_size)]
            command += ["--workload", workload, "--engine", engine, "--network", network, "--timeout", str(timeout)]
            command += ["--object-bytes", objects, "--accumulation", str(accumulation)]
            env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
            ended = subprocess.run([*prefix, *command], env=env, cwd=ranks.ROOT, check=False).returncode
            if ended:  # a peer's processes may not end well; the others are still worth measuring
                lost = {"kind": "isolated", "workload": workload, "engine": engine, "ranks": world_size}
                records.append(out, [{**lost, "skipped": f"its processes ended with exit status {ended}"}])


def status(field: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def forget_peak() -> None:
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM becomes VmRSS


def object_bytes() -> float:
    """Return what the objects of a parameter, its gradient and its state cost in torch, without their elements."""
    command = [sys.executable, "-c", "from benchmarks import isolated; isolated._print_object_bytes()"]
    # The least of three, since a heap with gaps holds more than the objects.
    runs = [subprocess.run(command, cwd=ranks.ROOT, check=True, capture_output=True, text=True) for _ in range(3)]
    return min(float(done.stdout) for done in runs)


def _print_object_bytes() -> None:
    def trained(workload: Workload) -> object:
        model = workload.model()
        optimizer = torch.optim.AdamW(workload.parameter_groups(model), fused=True, **RECIPE)
        model(torch.zeros(())).backward()
        optimizer.step()
        return model, optimizer

    trained(Workload.of("warm-up", [[(4096,)]] * 2, rank=0, gradients=CONSTANT))
    forget_peak()
    baseline = status("VmRSS")
    workload = Workload.named(_OBJECTS, rank=0, gradients=CONSTANT)
    kept = trained(workload)
    print((status("VmHWM") - baseline - 16 * workload.numel) / sum(map(len, workload.layers)))
    del kept


def one(
    engine_name: str,
    workload_name: str,
    network: str,
    rank: int,
    size: int,
    *,
    object_bytes: float,
    accumulation: int = 1,
) -> records.Record:
    """Measure one engine on one workload. Collective.

    Args:
        object_bytes: See the function.
        accumulation: Backward passes of an update.
    """
    record: records.Record = {
        "kind": "isolated",
        "workload": workload_name,
        "engine": engine_name,
        "ranks": size,
        "accumulation": accumulation,
        "network": network,
    }
    try:
        # Everything lazy of the libraries and of gloo happens before the baseline is taken.
        warm = build(engine_name, Workload.of("warm-up", [[(4096,)]] * 2, rank=rank, gradients=CONSTANT))
        for _ in range(2):
            warm.backward()
            warm.step()
            warm.forward()
        del warm
    except Skip as reason:
        return {**record, "skipped": str(reason)}
    except Exception as problem:
        if engine_name.startswith(OURS):
            raise
        return {**record, "skipped": f"{type(problem).__name__}: {problem}"}
    dist.all_reduce(torch.ones(1 << 10))
    forget_peak()
    baseline = status("VmRSS")
    workload = Workload.named(workload_name, rank=rank, gradients=CONSTANT)
    engine = build(engine_name, workload)
    grad_bytes = before = first = 0
    for update in range(WARM + COUNTED):
        if update == WARM:
            first = status("VmHWM") - baseline
            forget_peak()
            before = _sent(rank)
        engine.backward_passes(accumulation)
        grad_bytes = max(grad_bytes, engine.grad_bytes())
        engine.step()
        engine.forward()
    sent = (_sent(rank) - before) / COUNTED / size
    later = status("VmHWM") - baseline
    facts = ranks.gathered({"peak": max(first, later), "later_peak": later, **engine.sizes(), "gradients": grad_bytes})
    formula, ideal = ideal_memory(engine, workload, size)
    objects = object_bytes * sum(map(len, workload.layers))
    peak = max(one["peak"] for one in facts)
    traffic = (size - 1) / size * workload.numel * 8
    return {
        **record,
        "numel": workload.numel,
        "sharded": engine.sharded,
        "detail": engine.detail,
        "bytes_by_rank": facts,
        "formula": formula,
        "objects": objects,
        "peak_over_formula": peak / ideal,
        "beyond_objects_over_formula": (peak - objects) / ideal,
        "later_peak_over_formula": max(one["later_peak"] for one in facts) / ideal,
        "sent_per_rank": (of_all := ranks.gathered(sent)[0]),
        "sent_over_formula": of_all / traffic if traffic else 0.0,
    }


def ideal_memory(engine: Engine, workload: Workload, size: int) -> tuple[str, float]:
    """Return the memory that an engine needs at least, as text and in bytes."""
    numel = workload.numel
    if engine.shards_gradients:
        largest = max(param.numel() for param in engine.model.parameters())
        return "4N + 4N/W + 4L + 8N/W", numel * (4 + 4 / size + 8 / size) + 4 * largest
    return "4N + 4N + 8N/W", numel * (4 + 4 + 8 / size)


def _sent(rank: int) -> int:
    """Return the counter, read by rank 0 while every rank waits. Collective."""
    dist.barrier()
    sent = ranks.loopback_sent() if rank == 0 else 0
    dist.barrier()
    return sent


def show(record: records.Record) -> None:
    """Print the measurements relative to the minimum."""
    print(
        f"{record['workload']:10} {record['engine']:32} "
        f"peak {record['peak_over_formula']:.2f} x ({record['formula']}), "
        f"{record['later_peak_over_formula']:.2f} after {WARM} updates, "
        f"{record['beyond_objects_over_formula']:.2f} without objects; "
        f"sent {record['sent_over_formula']:.3f} x f N (b_g + b_p)",
        flush=True,
    )


def main() -> None:
    """Start the ranks, or run as one."""
    parser = argparse.ArgumentParser(description="Peak memory and bytes sent of one engine.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--workload", choices=WORKLOADS, required=True)
    parser.add_argument("--engine", choices=BUILDERS, required=True)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--accumulation", type=int, default=1, help="backward passes of an update")
    parser.add_argument("--network", default=ranks.SHARED)
    parser.add_argument("--timeout", type=float, default=300.0)
    parser.add_argument("--object-bytes", type=float, help="of a parameter; default: they are measured")
    options = parser.parse_args()
    if not ranks.is_rank():
        args = [*sys.argv[1:], "--object-bytes", str(options.object_bytes or object_bytes())]
        ranks.start("benchmarks.isolated", args, ranks=options.ranks, timeout=options.timeout)
        return
    with ranks.joined() as (rank, size):
        which = options.engine, options.workload, options.network
        record = one(*which, rank, size, object_bytes=options.object_bytes, accumulation=options.accumulation)
        if rank == 0:
            records.append(options.out, [record])
            print({k: v for k, v in record.items() if k != "kind"})
            if "formula" in record:
                show(record)


if __name__ == "__main__":
    main()
