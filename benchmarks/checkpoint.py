"""Measure the cost of checkpoints: peak memory, and the time for which training stops, compared with the limits.

Run ``python -m benchmarks.checkpoint --out results.jsonl``. ``--workload many`` takes 4,000 tensors of 1,024 elements
in place of a GPT.

Memory: VmHWM, which the kernel keeps exactly and between any two samples, reset before each phase; above VmRSS after
imports, set-up of the process group, and a save and a load of a tiny model. It counts anonymous, shared and mapped
memory of the process, not the page cache that files are written through. Every engine and number of ranks has
processes of its own, where malloc gives back what is freed (MALLOC_MMAP_THRESHOLD_), so a peak is what lives at once.
Gradients live on until the next update begins, so a save or a load finds no room that they have left; the micro-batch
is one sample of 64 bytes, so activations leave little room either. Training's peak is that of later updates than the
first three.

Time: all methods live in the same processes, and rounds go over them in a new random order each. A window begins at a
barrier and ends when the call has returned on the slowest rank. Files are removed after each. In the same
rounds the limits, of which the fastest round counts: as many bytes written in one go by all ranks at once and synced,
copied, and hashed. Loads read what
was just written, so from the page cache, into weights that were zeroed before and must then be those that were saved.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import async_save as dcp_async_save
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.optim import AdamW, Optimizer

import dist_adamw
from benchmarks import ranks, records
from benchmarks.checkpoint_jobs import Job, build, make_dist_adamw
from benchmarks.checkpoint_tables import OURS, report
from benchmarks.groups import RECIPE
from benchmarks.isolated import forget_peak, status
from dist_adamw.checkpoint.async_saver import AsyncSaver

WARM, COUNTED = 3, 3  # updates
BESIDE = 4  # updates without a save, for each save that has updates beside it
BLOCK = 1 << 22
MEMORY = [("single", 1), ("FSDP2", 1), ("DDP", 2), ("FSDP2", 2), ("DDP", 4), ("FSDP2", 4)]
OURS_ASYNC = "AsyncSaver.save"
DCP_ASYNC = "FSDP2: dcp.async_save"


# ---------------------------------------------------------------------------------------------- memory


def memory(options: argparse.Namespace, rank: int, size: int) -> records.Record:
    """Return one engine's peaks above the memory before: of a job that trains and saves, or a new one. Collective."""
    folder, engine = options.folder / "memory", options.engine
    tiny = build("gpt", 0, engine, make_dist_adamw, rank)
    for _ in range(2):
        tiny.update()
        dist_adamw.save(options.folder / "tiny", tiny.module, tiny.optimizer)
        dist_adamw.load(options.folder / "tiny", tiny.module, tiny.optimizer)
    del tiny
    forget_peak()
    baseline = status("VmRSS")
    peaks: dict[str, int] = {}

    @contextmanager
    def peak(of: str) -> Iterator[None]:
        dist.barrier()
        forget_peak()
        yield
        peaks[of] = status("VmHWM") - baseline

    job = build(options.workload, options.params, engine, make_dist_adamw, rank)
    if options.stage == "fresh":
        with peak("load, fresh"):
            dist_adamw.load(folder, job.module, job.optimizer)
    with peak("first updates"):
        for _ in range(WARM):
            job.update()
    with peak("training"):
        for _ in range(COUNTED):
            job.update()
    if options.stage == "train":
        with peak("save"):
            dist_adamw.save(folder, job.module, job.optimizer)
        with peak("load"):
            dist_adamw.load(folder, job.module, job.optimizer)
        with peak("training after that"):
            for _ in range(COUNTED):
                job.update()
        saver = AsyncSaver()
        with peak("AsyncSaver"):
            saver.save(folder, job.module, job.optimizer)
            saver.wait()
        with peak("AsyncSaver, updates beside it"):
            saving = saver.save(folder, job.module, job.optimizer)
            for _ in range(COUNTED):
                job.update()
            saving.wait()
        saver.close()
    by_rank = ranks.gathered(peaks)
    return {
        "kind": "checkpoint memory",
        "workload": options.workload,
        "numel": sum(p.numel() for p in job.module.parameters()),
        "engine": engine,
        "ranks": size,
        "stage": options.stage,
        "baseline_bytes": max(ranks.gathered(baseline)),
        "peak_bytes": {of: max(peaks[of] for peaks in by_rank) for of in peaks},
    }


# ---------------------------------------------------------------------------------------------- time


@dataclass(frozen=True)
class Method:
    """A way to save or load: ``call`` is timed; it may return a function that waits for the rest."""

    call: Callable[[Path], Callable[[], Any] | None]
    job: Job


class Contest:
    """The methods, their jobs and their times. Every method is collective."""

    def __init__(self, options: argparse.Namespace, rank: int) -> None:
        self.options, self.rank = options, rank

        def job(wrap: str, make: Callable[[Any], Optimizer]) -> Job:
            made = build(options.workload, options.params, wrap, make, rank)
            for _ in range(2):
                made.update()
            return made

        ours = job("DDP", make_dist_adamw)
        zero = job("DDP", lambda m: ZeroRedundancyOptimizer(m.parameters(), AdamW, fused=True, **RECIPE))
        fsdp = job("FSDP2", lambda m: AdamW(m.parameters(), fused=True, **RECIPE))
        self.saver = AsyncSaver()
        self.group = dist.new_group(backend="gloo")
        self.stager = DefaultStager(StagingOptions(False, False, False, False))
        self.saves = {
            OURS: Method(lambda path: dist_adamw.save(path, ours.module, ours.optimizer), ours),
            "ZeRO-1: consolidate, torch.save, fsync": Method(lambda path: self._zero_save(zero, path, True), zero),
            "ZeRO-1: consolidate, torch.save": Method(lambda path: self._zero_save(zero, path, False), zero),
            "FSDP2: dcp.save": Method(lambda path: self._dcp_save(fsdp, path), fsdp),
            OURS_ASYNC: Method(lambda path: self.saver.save(path, ours.module, ours.optimizer).wait, ours),
            DCP_ASYNC: Method(lambda path: self._dcp_async(fsdp, path, None), fsdp),
            f"{DCP_ASYNC}, buffers kept": Method(lambda path: self._dcp_async(fsdp, path, self.stager), fsdp),
        }
        self.loads = {
            OURS: ("dist_adamw.load", Method(lambda path: self._our_load(ours, path), ours)),
            "ZeRO-1: consolidate, torch.save": (
                "ZeRO-1: torch.load, load_state_dict",
                Method(lambda path: self._zero_load(zero, path), zero),
            ),
            "FSDP2: dcp.save": ("FSDP2: dcp.load, set_state_dict", Method(lambda p: self._dcp_load(fsdp, p), fsdp)),
        }
        self.numel = sum(p.numel() for p in ours.module.parameters())
        self.nbytes = 12 * self.numel  # fp32 weights and two moments
        share = self.nbytes // dist.get_world_size()
        self._from, self._to = torch.randn(share // 4), torch.empty(share // 4).fill_(1)
        self.limits = {
            "write and fsync": self._write,
            "memcpy": lambda _: self._to.copy_(self._from),
            "sha256": lambda _: hashlib.sha256(self._from.numpy().data).digest(),
        }
        self.seconds: dict[str, list[float]] = {}
        self.whole: dict[str, list[float]] = {}  # of asynchronous ones, until all is written
        self.written: dict[str, int] = {}

    # what is compared

    def _zero_save(self, job: Job, path: Path, synced: bool) -> None:
        job.optimizer.consolidate_state_dict(to=0)
        if self.rank == 0:
            path.mkdir(parents=True)
            with (path / "all.pt").open("wb") as file:
                torch.save({"model": job.module.module.state_dict(), "optimizer": job.optimizer.state_dict()}, file)
                if synced:
                    file.flush()
                    os.fsync(file.fileno())
        dist.barrier()

    def _zero_load(self, job: Job, path: Path) -> None:
        found = torch.load(path / "all.pt", weights_only=True)
        job.module.module.load_state_dict(found["model"])
        job.optimizer.load_state_dict(found["optimizer"])

    def _state(self, job: Job) -> dict[str, Any]:
        model, optimizer = get_state_dict(job.module, job.optimizer)
        return {"model": model, "optimizer": optimizer}

    def _dcp_save(self, job: Job, path: Path) -> None:
        dcp_save(self._state(job), checkpoint_id=path)

    def _dcp_async(self, job: Job, path: Path, stager: DefaultStager | None) -> Callable[[], Any]:
        future: Any = dcp_async_save(
            self._state(job), checkpoint_id=path, process_group=self.group, async_stager=stager
        )
        return future.result

    def _dcp_load(self, job: Job, path: Path) -> None:
        state = self._state(job)
        dcp_load(state, checkpoint_id=path)
        set_state_dict(job.module, job.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])

    def _our_load(self, job: Job, path: Path) -> None:
        dist_adamw.load(path, job.module, job.optimizer)

    def _write(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)
        data = self._from.numpy().data.cast("B")
        with (path / str(self.rank)).open("wb", buffering=0) as file:
            for start in range(0, len(data), BLOCK):
                file.write(data[start : start + BLOCK])
            os.fsync(file.fileno())

    # how it is measured

    def timed(self, name: str, call: Callable[[], Any], keep: bool) -> Any:
        """Run ``call`` on all ranks at once; return the slowest rank's time."""
        gc.collect()
        dist.barrier()
        start = time.perf_counter()
        result = call()
        took = max(ranks.gathered(time.perf_counter() - start))
        if keep:
            self.seconds.setdefault(name, []).append(took)
        return result

    def remove(self, path: Path) -> None:
        """Sync everything, so that no write reaches the disk in another method's window."""
        dist.barrier()
        if self.rank == 0:
            shutil.rmtree(path, ignore_errors=True)
        dist.barrier()

    def save(self, name: str, keep: bool) -> None:
        """Time a save, and a load of its result if the method has one."""
        path = self.options.folder / "time"
        begun = time.perf_counter()
        rest = self.timed(name, lambda: self.saves[name].call(path), keep)
        if rest is not None:
            rest()
            if keep:
                self.whole.setdefault(name, []).append(max(ranks.gathered(time.perf_counter() - begun)))
        dist.barrier()
        self.written[name] = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        if name in self.loads:
            load, method = self.loads[name]
            weights = [part.clone() for part in method.job.locals()]
            for part in method.job.locals():
                part.zero_()
            self.timed(load, lambda: method.call(path), keep)
            if not all(map(torch.equal, weights, method.job.locals())):
                raise RuntimeError(f"{load} did not bring back the weights that were saved")
        self.remove(path)

    def limit(self, name: str, keep: bool) -> None:
        """Time the limits: the work that no save can avoid."""
        path = self.options.folder / "limit"
        self.timed(name, lambda: self.limits[name](path), keep)
        self.remove(path)

    def beside(self, name: str) -> dict[str, Any]:
        """Time updates without a save, then updates during one."""
        job, path = self.saves[name].job, self.options.folder / "time"
        plain = [self._update(job) for _ in range(BESIDE)]
        rest = self.saves[name].call(path)
        assert rest is not None
        future = getattr(rest, "__self__")  # noqa: B009 - of a bound method: what is on its way
        beside = []
        done = torch.zeros(1)
        while not done.item():
            beside.append(self._update(job))
            done.fill_(float(future.done if isinstance(future.done, bool) else future.done()))
            dist.all_reduce(done, op=dist.ReduceOp.MIN)
        rest()
        self.remove(path)
        return {"plain": plain, "beside": beside}

    def _update(self, job: Job) -> float:
        dist.barrier()
        start = time.perf_counter()
        job.update()
        dist.barrier()
        return time.perf_counter() - start


def contest(options: argparse.Namespace, rank: int) -> list[records.Record]:
    """Run all methods in turn. Collective."""
    it = Contest(options, rank)
    shuffle = random.Random(0)
    todo: list[Callable[[bool], None]] = [lambda keep, n=name: it.save(n, keep) for name in it.saves]  # type: ignore[misc]
    todo += [lambda keep, n=name: it.limit(n, keep) for name in it.limits]  # type: ignore[misc]
    for number in range(1 + options.rounds):  # one to warm up
        shuffle.shuffle(todo)
        for one in todo:
            one(number > 0)
        if rank == 0:
            print(f"round {number} of {options.rounds}", file=sys.stderr, flush=True)
    slowed: dict[str, list[dict[str, Any]]] = {OURS_ASYNC: [], DCP_ASYNC: []}
    for _ in range(options.rounds):
        for name in slowed:
            slowed[name].append(it.beside(name))
    common = {
        "kind": "checkpoint time",
        "workload": options.workload,
        "numel": it.numel,
        "ranks": dist.get_world_size(),
        "load_average": os.getloadavg()[0],
        "nbytes": it.nbytes,
    }
    return [
        {
            **common,
            "what": name,
            "is": "limit" if name in it.limits else "save" if name in it.saves else "load",
            "seconds": seconds,
            "written": it.written.get(name),
            "until_written": it.whole.get(name),
            "updates": slowed.get(name),
        }
        for name, seconds in it.seconds.items()
    ]


# ---------------------------------------------------------------------------------------------- running


def work(options: argparse.Namespace) -> None:
    """Run one rank."""
    with ranks.joined() as (rank, size):
        found = contest(options, rank) if options.stage == "time" else [memory(options, rank, size)]
        if rank == 0:
            records.append(options.out, found)


def main() -> None:
    """Start the ranks, stage after stage, or run as one."""
    parser = argparse.ArgumentParser(description="What a checkpoint costs.")
    parser.add_argument("--out", type=Path, required=True, help="JSON-lines file to append to")
    parser.add_argument("--workload", choices=("gpt", "many"), default="gpt")
    parser.add_argument("--params", type=int, default=25_000_000, help="of the GPT")
    parser.add_argument("--ranks", type=int, default=2, help="of the contest")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--folder", type=Path, help="where to save; default: a temporary folder")
    parser.add_argument("--only", choices=("memory", "time"), help="default: both")
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds, of each stage")
    parser.add_argument("--stage", choices=("train", "fresh", "time"), help=argparse.SUPPRESS)
    parser.add_argument("--engine", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.out = options.out.resolve()
    if ranks.is_rank():
        work(options)
        return
    records.append(options.out, [records.environment()])
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        shared = ["--out", str(options.out), "--workload", options.workload, "--params", str(options.params)]
        shared += ["--rounds", str(options.rounds), "--folder", folder]

        def start(stage: str, engine: str, size: int) -> None:
            print(f"{stage} {engine} {size} ranks", file=sys.stderr, flush=True)
            args = [*shared, "--stage", stage, "--engine", engine]
            ranks.start("benchmarks.checkpoint", args, ranks=size, timeout=options.timeout)

        if options.only != "time":
            given_back = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
            os.environ.update(given_back)
            for engine, size in MEMORY:
                start("train", engine, size)
                start("fresh", engine, size)
            for name in given_back:
                del os.environ[name]
        if options.only != "memory":
            start("time", "", options.ranks)
    found = records.read([options.out])
    report([record for record in found if record["run"] == found[-1]["run"]], options.workload)


if __name__ == "__main__":
    main()
