"""Engines as scripts use them: a whole training step of a real model, each behind the method ``update``.

Two of them are the same Accelerate loop: ours through ``dist_adamw.prepare``, and ``DistributedDataParallel``, torch's
AdamW and torch's ``CosineAnnealingWarmRestarts`` through ``accelerator.prepare``. The others are loops of plain torch.
All take the same batches, groups and, to 1e-9, the same lr.

Accelerate keeps its state once per process, so all trainers of a process have the same accumulation and precision. Our
sample counters hear every loader of Accelerate whose iteration begins while they live; therefore at most one of our
trainers may live at a time, and it is built last (`build_all` does).
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts
from torch.utils.data import DataLoader, Dataset

from benchmarks.engines import OURS, REPRODUCIBLE, Skip
from benchmarks.groups import RECIPE, Group
from benchmarks.times import Stopwatch, Times, Took, of_all_ranks

ACCELERATE = "Accelerate: DDP + AdamW"
UPDATES_IN_A_CYCLE = 1_000_000  # the schedules run, but lr stays the same to 1e-9 in a few hundred updates


@dataclass(frozen=True, kw_only=True)
class Task:
    """What all trainers do.

    Attributes:
        model: Makes the model, with the same weights each time.
        groups: Makes the optimizer's groups of a model, which an engine may have changed.
        dataset: More global batches than any trainer makes updates.
        batch: Samples of a micro-batch on one rank.
        accumulation: Micro-batches of an update.
        bf16: Whether forward runs under autocast in bfloat16.
        clip: The largest norm of gradients; None: not clipped.
        recipe: What `RECIPE` becomes.
    """

    model: Callable[[], nn.Module]
    groups: Callable[[nn.Module], list[Group]]
    dataset: Dataset[Any]
    batch: int
    accumulation: int = 1
    bf16: bool = False
    clip: float | None = None
    recipe: dict[str, Any]

    @property
    def global_batch(self) -> int:
        """Samples of one update, over all ranks."""
        return self.batch * self.accumulation * dist.get_world_size()


class Trainer(ABC):
    """A model, its optimizer, its schedule and its data."""

    optimizer: Any
    detail = ""

    @abstractmethod
    def update(self) -> float:
        """Run one training step, from fetching its data to ``zero_grad``; return this rank's mean loss. Collective."""


class AccelerateTrainer(Trainer):
    """The usual loop of Accelerate. Collective to build.

    Args:
        task: What to train.
        ours: Through ``dist_adamw.prepare``.
        options: More options of DistAdamW.
    """

    def __init__(self, task: Task, *, ours: bool, **options: Any) -> None:
        from accelerate import Accelerator, DistributedDataParallelKwargs

        self.task = task
        self.accelerator = Accelerator(
            cpu=True,
            gradient_accumulation_steps=task.accumulation,
            mixed_precision="bf16" if task.bf16 else "no",
            kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
        )
        loader = DataLoader(task.dataset, batch_size=task.batch)
        prepared = self._ours(loader, options) if ours else self._torch(loader)
        self.model, self.optimizer, loader, self.scheduler = prepared
        self.batches: Iterator[Any] = iter(loader)

    def _ours(self, loader: DataLoader[Any], options: dict[str, Any]) -> Any:
        from dist_adamw import CyclicLRWithRestarts, DistAdamW, prepare

        self.detail = "dist_adamw.prepare, CyclicLRWithRestarts"
        task = self.task
        model = task.model()
        optimizer = DistAdamW(task.groups(model), **task.recipe, **options)
        epochs = UPDATES_IN_A_CYCLE * task.global_batch / len(task.dataset)  # type: ignore[arg-type]
        scheduler = CyclicLRWithRestarts(optimizer, restart_period=epochs, normalize_weight_decay=False)
        return prepare(self.accelerator, model, optimizer, loader, scheduler)

    def _torch(self, loader: DataLoader[Any]) -> Any:
        self.detail = "accelerator.prepare, AdamW(fused=True), CosineAnnealingWarmRestarts"
        model = self.task.model()
        optimizer = torch.optim.AdamW(self.task.groups(model), fused=True, **self.task.recipe)
        # Accelerate steps the schedule once per rank.
        scheduler = CosineAnnealingWarmRestarts(optimizer, UPDATES_IN_A_CYCLE * dist.get_world_size())
        return self.accelerator.prepare(model, optimizer, loader, scheduler)

    def update(self) -> float:
        losses = []
        for _ in range(self.task.accumulation):
            batch = next(self.batches)
            with self.accelerator.accumulate(self.model):
                loss = self.model(*batch)
                self.accelerator.backward(loss)
                if self.task.clip is not None and self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), self.task.clip)
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()
            losses.append(float(loss.detach()))
        return sum(losses) / len(losses)


class TorchTrainer(Trainer):
    """A loop of plain torch.

    Args:
        task: What to train.
        module: The wrapped model.
        optimizer: Its optimizer.
        accumulate: Returns a context in which backward does not synchronise gradients.
        detail: How it is set up.
        clip: Clips the global norm, if torch's function cannot.
    """

    def __init__(
        self,
        task: Task,
        module: nn.Module,
        optimizer: Optimizer,
        *,
        accumulate: Callable[[], contextlib.AbstractContextManager[None]],
        detail: str,
        clip: Callable[[float], Any] | None = None,
    ) -> None:
        self._clip = clip or functools.partial(torch.nn.utils.clip_grad_norm_, list(module.parameters()))
        self.task, self.module, self.optimizer, self.detail = task, module, optimizer, detail
        self.scheduler = CosineAnnealingWarmRestarts(optimizer, UPDATES_IN_A_CYCLE)
        self._accumulate = accumulate
        self.batches: Iterator[Any] = iter(DataLoader(task.dataset, batch_sampler=own_batches(task)))

    def update(self) -> float:
        losses = []
        for k in range(self.task.accumulation):
            is_last = k == self.task.accumulation - 1
            batch = next(self.batches)
            with contextlib.nullcontext() if is_last else self._accumulate():
                with torch.autocast("cpu", torch.bfloat16, enabled=self.task.bf16):
                    loss = self.module(*batch)
                (loss / self.task.accumulation).backward()
            losses.append(float(loss.detach()))
        if self.task.clip is not None:
            self._clip(self.task.clip)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        return sum(losses) / len(losses)


def own_batches(task: Task) -> list[list[int]]:
    """Return the indices of this rank's micro-batches: every W-th, as Accelerate distributes them."""
    size, rank, batch = dist.get_world_size(), dist.get_rank(), task.batch
    starts = range(rank * batch, len(task.dataset) - batch + 1, size * batch)  # type: ignore[arg-type]
    return [list(range(start, start + batch)) for start in starts]


def _ddp(model: nn.Module) -> DistributedDataParallel:
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


def _zero_redundancy(task: Task) -> Trainer:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    module = _ddp(model := task.model())
    optimizer = ZeroRedundancyOptimizer(
        task.groups(model), torch.optim.AdamW, parameters_as_bucket_view=True, fused=True, **task.recipe
    )
    detail = "parameters_as_bucket_view=True, fused"
    return TorchTrainer(task, module, optimizer, accumulate=module.no_sync, detail=detail)


def _fairscale(task: Task, *, sharded: bool) -> Trainer:
    try:
        oss = importlib.import_module("fairscale.optim.oss")
        data_parallel = importlib.import_module("fairscale.nn.data_parallel")
    except Exception as problem:  # an old package, which fails on new torch in many ways
        raise Skip(f"import fairscale: {type(problem).__name__}: {problem}") from problem
    model = task.model()
    module: Any = None if sharded else _ddp(model)
    optimizer = oss.OSS(task.groups(model), optim=torch.optim.AdamW, fused=True, **task.recipe)
    if sharded:  # with its default buffer the losses are wrong from the third update on (fairscale 0.4.13)
        module = data_parallel.ShardedDataParallel(model, optimizer, reduce_buffer_size=0)
    detail = "fused, reduce_buffer_size=0" if sharded else "fused"
    clip = optimizer.clip_grad_norm if sharded else None  # a rank has gradients only of the parameters that it updates
    return TorchTrainer(task, module, optimizer, accumulate=module.no_sync, detail=detail, clip=clip)


def _fsdp2(task: Task) -> Trainer:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model: Any = task.model()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in (*model.blocks, model):
        fully_shard(block, mesh=mesh, reshard_after_forward=False)

    @contextlib.contextmanager
    def accumulate() -> Iterator[None]:
        model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            model.set_requires_gradient_sync(True)

    optimizer = torch.optim.AdamW(task.groups(model), fused=True, **task.recipe)
    detail = "fully_shard on each block, reshard_after_forward=False, fused"
    return TorchTrainer(task, model, optimizer, accumulate=accumulate, detail=detail)


BUILDERS: dict[str, Callable[[Task], Trainer]] = {
    OURS: lambda task: AccelerateTrainer(task, ours=True),
    REPRODUCIBLE: lambda task: AccelerateTrainer(task, ours=True, reproducible=True),
    ACCELERATE: lambda task: AccelerateTrainer(task, ours=False),
    "DDP + ZeroRedundancyOptimizer": _zero_redundancy,
    "DDP + FairScale OSS": lambda task: _fairscale(task, sharded=False),
    "FairScale ShardedDDP + OSS": lambda task: _fairscale(task, sharded=True),
    "FSDP2 + AdamW": _fsdp2,
}


def build_all(names: Sequence[str], task: Task) -> tuple[dict[str, Trainer], dict[str, str]]:
    """Build trainers and run one update of each, ours last. Collective.

    Returns:
        The trainers by name, and why others are left out.
    """
    gc.collect()  # our last trainer's sample counter
    trainers: dict[str, Trainer] = {}
    skipped: dict[str, str] = {}
    for name in sorted(names, key=lambda name: name == OURS):
        try:
            trainers[name] = BUILDERS[name](task)
        except Exception as problem:  # a peer that does not run is left out, saying so
            if name in (OURS, REPRODUCIBLE, ACCELERATE):
                raise
            skipped[name] = str(problem) if isinstance(problem, Skip) else f"{type(problem).__name__}: {problem}"
    return trainers, skipped


def interleaved(trainers: dict[str, Trainer], *, warm_up: int, rounds: int, updates: int = 1) -> dict[str, Times]:
    """Return the times of an update by trainer. Collective.

    Args:
        trainers: The trainers; their order is random in each round, the same on all ranks.
        warm_up: Rounds that do not count.
        rounds: Rounds that count.
        updates: Consecutive updates in a round.
    """
    mine: dict[str, list[Took]] = {name: [] for name in trainers}
    order, shuffle = list(trainers), random.Random(0)
    for _ in range(warm_up + rounds):
        shuffle.shuffle(order)
        for name in order:
            dist.barrier()
            watch = Stopwatch()
            for _ in range(updates):
                trainers[name].update()
            wall, cpu = watch.read()
            mine[name].append((wall / updates, cpu / updates))
    return of_all_ranks({name: took[warm_up:] for name, took in mine.items()})


def recipe(**changes: Any) -> dict[str, Any]:
    """Return `RECIPE` with changes."""
    return {**RECIPE, **changes}


def mean_over_ranks(value: float) -> float:
    """Return the mean of ``value`` over the ranks. Collective."""
    total = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(total)
    return float(total) / dist.get_world_size()


def numel(model: nn.Module) -> int:
    """Return the number of elements of all parameters."""
    return sum(param.numel() for param in model.parameters())


def seeded(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Return a function that makes a model with the same weights each time."""

    def made() -> nn.Module:
        torch.manual_seed(0)
        return make()

    return made


class Rows(Dataset[tuple[Tensor]]):
    """Samples of one tensor, by index; each is a tuple of one, so that batches are passed as ``model(*batch)``."""

    def __init__(self, samples: Tensor) -> None:
        self.samples = samples

    def __getitem__(self, index: int) -> tuple[Tensor]:
        return (self.samples[index],)

    def __len__(self) -> int:
        return len(self.samples)
