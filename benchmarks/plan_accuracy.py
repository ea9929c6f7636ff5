"""Compare `plan` with what engines allocate and send, on real ranks over gloo.

    python -m benchmarks.plan_accuracy --out r.jsonl --ranks 1 2 3 4

Memory: bytes that torch's allocator hands out, as its profiler reports every allocation, so that tensors of C++ count
too (DDP's buckets). The level is that of the tensors that Python sees after a backward pass; the peak is that of the
update that follows. The models see two tokens, or one row, so that activations are next to nothing; the largest level
of one process that only runs forward and backward passes says how much.

Traffic: as `benchmarks.bytes_sent` counts it. A reduce-scatter counts (W - 1)/W of its input.

The engines run as on GPUs, although on a CPU: see `benchmarks.as_on_gpus`. FSDP2 and DeepSpeed are used through their
own interfaces.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import os
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

from benchmarks import markdown, ranks, records
from benchmarks.as_on_gpus import Counting
from benchmarks.plan_models import MODELS
from dist_adamw import EMA, DistAdamW
from dist_adamw.planning.engines import cost_of
from dist_adamw.planning.fsdp2 import FSDP2
from dist_adamw.planning.memory import Setup
from dist_adamw.planning.model import shapes_of
from dist_adamw.planning.own import DDP, ONE, TORCH_DDP

WARM = 3  # updates
SIZES = (1, 2, 3, 4)


# ---------------------------------------------------------------- engines


class Job:
    """A model, an optimizer and what makes an update of it. Collective to build.

    Args:
        engine: Its name in the plan.
        model: On this rank.
        batch: What the model is called with.
        setup: What is planned.
        counting: Counts its traffic.
    """

    def __init__(self, engine: str, model: Any, batch: Tensor, setup: Setup, counting: Counting) -> None:
        self._engine, self._setup, self._batch, self.module = engine, setup, batch, model
        self._deepspeed: Any = None
        if engine == FSDP2:
            self._shard(model, setup)
        params = [param for param in model.parameters() if param.requires_grad]
        if engine == TORCH_DDP:
            self.module = DistributedDataParallel(model, gradient_as_bucket_view=True)
            self.module.register_comm_hook(None, default_hooks.allreduce_hook)  # what DDP does, seen by the counter
            self.optimizer: Any = torch.optim.AdamW(params, fused=True, amsgrad=setup.amsgrad)
            return
        self.optimizer = DistAdamW(
            params,
            amsgrad=setup.amsgrad,
            master_dtype=setup.master_dtype,
            state_dtype=setup.state_dtype,
            reduce_dtype=setup.reduce_dtype,
            averages=setup.averages,
            reproducible=setup.reproducible,
        )
        if engine == DDP:
            if not setup.reproducible:
                self.module = DistributedDataParallel(model, gradient_as_bucket_view=True)
            self.optimizer.attach(self.module)
        elif engine in (ONE, FSDP2) and setup.reproducible:
            self.optimizer.attach(model)
        elif engine.startswith("ZeRO"):
            self._start_deepspeed(int(engine[-1]), counting)

    def _shard(self, model: Any, setup: Setup) -> None:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        half = torch.bfloat16
        policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=half) if setup.bf16 else MixedPrecisionPolicy()
        options: Any = {"mesh": mesh, "mp_policy": policy, "reshard_after_forward": setup.reshard_after_forward}
        for block in model.blocks:
            fully_shard(block, **options)
        fully_shard(model, mesh=mesh, mp_policy=policy)

    def _start_deepspeed(self, stage: int, counting: Counting) -> None:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        import deepspeed
        from deepspeed.utils import logger

        logger.setLevel("ERROR")
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed("gloo", verbose=False)
        backend = deepspeed.comm.comm.cdb
        backend.all_gather_function, backend.reduce_scatter_function = counting.gather, counting.scatter
        setup = self._setup
        zero = {
            "stage": stage,
            "reduce_bucket_size": setup.reduce_bucket_size,
            "allgather_bucket_size": setup.reduce_bucket_size,
            "stage3_param_persistence_threshold": setup.param_persistence_threshold,
            "stage3_max_live_parameters": setup.max_live_parameters,
            "stage3_max_reuse_distance": setup.max_live_parameters,
            "stage3_prefetch_bucket_size": setup.prefetch_bucket_size,
        }
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": setup.accumulation,
            "gradient_clipping": 0.0,
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": setup.bf16},
            "zero_optimization": zero,
        }
        self.module, self._deepspeed, *_ = deepspeed.initialize(
            model=self.module, optimizer=self.optimizer, config=config, dist_init_required=False
        )
        if setup.bf16 and self._batch.is_floating_point():
            self._batch = self._batch.to(torch.bfloat16)

    def backward(self) -> None:
        """Run all forward and backward passes of an update. Collective."""
        for n in range(self._setup.accumulation):
            is_last = n == self._setup.accumulation - 1
            if self._deepspeed is not None:
                self.module.backward(self.module(self._batch))
                if not is_last:
                    self.module.step()
                continue
            context: Any = contextlib.nullcontext()
            if self._engine == FSDP2:
                self.module.set_requires_gradient_sync(is_last)
            elif not is_last and hasattr(self.module, "no_sync"):
                context = self.module.no_sync()
            with context:
                self.module(self._batch).backward()

    def step(self) -> None:
        """Update, and let go of the gradients. Collective."""
        if self._deepspeed is not None:
            self.module.step()
        else:
            self.optimizer.step()
            self.optimizer.zero_grad()

    def close(self) -> None:
        """Let go of everything."""
        if self._deepspeed is not None:
            self._deepspeed.destroy()
        self.__dict__.clear()


# ---------------------------------------------------------------- measuring


def tensors() -> list[Tensor]:
    """Return all tensors on the CPU that Python has."""
    gc.collect()
    return [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor) and thing.device.type == "cpu"]


def bytes_of(tensors: Iterable[Any]) -> int:
    """Return the bytes of the storages of ``tensors``."""
    found = {}
    for tensor in tensors:
        if isinstance(tensor, Tensor):
            storage = getattr(tensor, "_local_tensor", tensor).untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


@dataclass
class Levels:
    """The bytes that the allocator had handed out at each allocation, since the profiler was started."""

    times: list[int]
    levels: list[int]

    @classmethod
    def of(cls, profiler: Any) -> Levels:
        """Return the levels of a profiler that has ended."""
        events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
        events.sort(key=lambda event: event.start_ns())
        levels = list(itertools.accumulate(event.nbytes() for event in events))
        return cls([event.start_ns() for event in events], levels)

    def above_the_end(self, since: int) -> int:
        """Return the largest level since a time in ns, above the last one."""
        return (
            max(level for time, level in zip(self.times, self.levels, strict=True) if time >= since) - self.levels[-1]
        )


def measure(engine: str, name: str, setup: Setup) -> records.Record:
    """Measure an engine. Collective.

    Args:
        engine: Its name in the plan.
        name: Of the model.
        setup: What is planned.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # it prints when a profiler starts and stops
    make, batch = MODELS[name]
    counting = Counting()
    earlier = tensors()  # kept, so that they are there at the end too
    torch.manual_seed(0)
    with counting.as_on_gpus(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model = make()
        shapes = shapes_of(model, name)
        job = Job(engine, model, batch(), setup, counting)
        for _ in range(WARM):
            job.backward()
            job.step()
        counting.sent.clear()
        since = time.time_ns()
        job.backward()
        job.step()
        sent = dict(counting.sent)
        job.backward()
        # Python has no object for a gradient that autograd made, until it is asked for.
        level = bytes_of([*tensors(), *(param.grad for param in model.parameters())]) - bytes_of(earlier)
    peak = level + Levels.of(profiler).above_the_end(since)
    params = list(model.parameters())
    state = bytes_of(value for entry in job.optimizer.state.values() for value in entry.values())
    gradients = bytes_of(param.grad for param in params)
    size = dist.get_world_size() if dist.is_initialized() else 1
    job.close()
    del model, params
    planned = cost_of(engine, shapes, size, setup)
    return {
        "kind": "plan_accuracy",
        "engine": engine,
        "model": name,
        "ranks": size,
        "setup": {key: str(value) for key, value in asdict(setup).items() if value != getattr(Setup(), key)},
        "numel": shapes.numel,
        "measured": {"peak": peak, "level": level, "state": state, "gradients": gradients, "sent": sent},
        "planned": {"peak": planned.memory.total, "sent": planned.sent, **asdict(planned.memory)},
    }


def ratios(record: records.Record) -> dict[str, float]:
    """Return planned over measured: the peak, and the bytes sent."""
    planned, measured = record["planned"], record["measured"]
    found = {"peak": planned["peak"] / measured["peak"]}
    if sent := sum(measured["sent"].values()):
        found["sent"] = planned["sent"] / sent
    return found


def largest(of_ranks: Sequence[records.Record]) -> records.Record:
    """Return the record of the rank that needed most, with the most bytes that a rank has sent."""
    most = max(of_ranks, key=lambda record: record["measured"]["peak"])
    sent = max((record["measured"]["sent"] for record in of_ranks), key=lambda sent: sum(sent.values()))
    return {**most, "measured": {**most["measured"], "sent": sent}}


SMALL_BUCKETS = {
    "reduce_bucket_size": 200_000,
    "param_persistence_threshold": 1000,
    "max_live_parameters": 1_000_000,
    "prefetch_bucket_size": 100_000,
}
# By number of ranks: engine and options. DeepSpeed's buckets are smaller than these models.
ALONE: list[tuple[str, dict[str, Any]]] = [
    (ONE, {}),
    (ONE, {"accumulation": 3}),
    (ONE, {"reproducible": True, "accumulation": 3}),
    (ONE, {"averages": {"ema": EMA(decay=0.999)}}),
]
TOGETHER: list[tuple[str, dict[str, Any]]] = [
    (DDP, {}),
    (DDP, {"accumulation": 3}),
    (DDP, {"accumulation": 3, "reproducible": True}),
    (TORCH_DDP, {}),
    (TORCH_DDP, {"accumulation": 3}),
    (FSDP2, {}),
    (FSDP2, {"accumulation": 3}),
    (FSDP2, {"accumulation": 3, "reproducible": True}),
    (FSDP2, {"bf16": True}),
    (FSDP2, {"reshard_after_forward": False}),
    *((f"ZeRO-{stage}", {**SMALL_BUCKETS, "bf16": bf16}) for stage in (1, 2, 3) for bf16 in (False, True)),
    *((f"ZeRO-{stage}", {**SMALL_BUCKETS, "accumulation": 3}) for stage in (1, 2, 3)),
    (DDP, {"averages": {"ema": EMA(decay=0.999)}}),
    (DDP, {"reduce_dtype": torch.bfloat16}),
]


def work(options: argparse.Namespace) -> None:
    """Run one rank."""
    with ranks.joined() as (rank, size):
        for engine, given in ALONE if size == 1 else TOGETHER:
            if options.engines and engine not in options.engines:
                continue
            for name in options.models:
                try:
                    found = ranks.gathered(measure(engine, name, Setup(**given)))
                except Exception as problem:
                    if not engine.startswith("ZeRO"):
                        raise
                    found = []
                    reason = f"{type(problem).__name__}: {problem}"
                    left_out = {"kind": "plan_accuracy", "engine": engine, "model": name, "ranks": size}
                    records.append(options.out, [{**left_out, "skipped": reason}] * (rank == 0))
                if rank == 0 and found:
                    records.append(options.out, [largest(found)])
                    print(*line(largest(found)), sep="  ", flush=True)


def line(record: records.Record) -> list[str]:
    """Return a record as cells of a table: sizes in MiB."""
    peaks = [f"{record[side]['peak'] / (1 << 20):.2f}" for side in ("planned", "measured")]
    of = ratios(record)
    options = ", ".join(f"{name}={value}" for name, value in record["setup"].items() if name not in SMALL_BUCKETS)
    named = [str(record["ranks"]), record["engine"], record["model"], options]
    return [*named, *peaks, f"{of['peak']:.3f}", f"{of['sent']:.3f}" if "sent" in of else ""]


def table(found: Sequence[records.Record]) -> list[str]:
    """Return the comparison in Markdown."""
    head = ["ranks", "engine", "model", "options", "planned, MiB", "measured, MiB", "peak", "sent"]
    return markdown.table(head, [line(record) for record in found if "skipped" not in record])


def main() -> None:
    """Start the ranks, or run as one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON-lines file to append to")
    parser.add_argument("--ranks", nargs="+", type=int, default=list(SIZES))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--engines", nargs="+", help="default: all")
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds, for each number of ranks")
    options = parser.parse_args()
    options.out = options.out.resolve()
    if ranks.is_rank():
        work(options)
        return
    before = len(records.read([options.out])) if options.out.exists() else 0
    records.append(options.out, [records.environment()])
    for size in options.ranks:
        ranks.start("benchmarks.plan_accuracy", sys.argv[1:], ranks=size, timeout=options.timeout)
    found = [record for record in records.read([options.out])[before:] if record["kind"] == "plan_accuracy"]
    print("\n".join(table(found)))


if __name__ == "__main__":
    main()
