"""The part of a plan that a recipe determines: global batch, updates, restarts, and the optimizer's options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.optim import Optimizer

from dist_adamw.optimizer.adamw import DistAdamW
from dist_adamw.planning.memory import Setup
from dist_adamw.recipes.recipe import TrainingRecipe
from dist_adamw.schedule.batch import GlobalBatch, check_positive_int
from dist_adamw.schedule.batch_schedule import BatchSchedule, BatchSizes
from dist_adamw.schedule.lengths import Length, parse
from dist_adamw.schedule.preview import Preview
from dist_adamw.schedule.scheduler import CyclicLRWithRestarts


@dataclass(frozen=True, slots=True)
class SchedulePlan:
    """What is known of a job's batches and its schedule.

    Attributes:
        batches: The global batches; None: not known.
        micro_batch_size: Samples of a rank in one forward pass; None: not known.
        total_samples: Of the whole training; None: not known.
        preview: The table of restarts; None without a schedule.
    """

    batches: BatchSchedule | None = None
    micro_batch_size: int | None = None
    total_samples: int | None = None
    preview: Preview | None = None

    @property
    def updates(self) -> int | None:
        """The number of updates of the whole training; None: not known."""
        if self.batches is None or self.total_samples is None:
            return None
        return self.batches.updates(0, self.total_samples)[0]

    def largest(self, ranks: int) -> GlobalBatch | None:
        """Return the largest global batch, divided among ``ranks``; None: not known. Local.

        Raises:
            ValueError: a global batch is not a multiple of the micro-batches of all ranks.
        """
        if self.batches is None or self.micro_batch_size is None:
            return None
        micro = self.micro_batch_size
        solved = [
            GlobalBatch.solve(size=size, micro_batch_size=micro, data_parallel_size=ranks)
            for size in self.batches.sizes
        ]
        return max(solved, key=lambda batch: batch.size)


@dataclass(frozen=True, slots=True)
class Given:
    """What the caller says of the schedule, before it is put together.

    Attributes:
        optimizer: Its options say which state there is; None: as `Setup` says.
    """

    scheduler: CyclicLRWithRestarts | None = None
    optimizer: Optimizer | None = None
    batch_size: int | BatchSizes | None = None
    micro_batch_size: int | None = None
    total_samples: Length | None = None


def from_recipe(recipe: TrainingRecipe, model: nn.Module | None) -> Given:
    """Return what a recipe says. Local.

    Args:
        recipe: With all sizes.
        model: On the meta device, for recipes whose groups depend on the names of parameters; None: a stand-in.
    """
    with torch.device("meta"):
        module = nn.Linear(1, 1) if model is None else model
    optimizer = recipe.make_optimizer(module)
    scheduler = recipe.make_scheduler(optimizer)
    return Given(
        scheduler=scheduler,
        optimizer=optimizer,
        batch_size=recipe.batch.get("size"),
        micro_batch_size=recipe.batch.get("micro_batch_size"),
        total_samples=recipe.total_samples,
    )


def setup_of(optimizer: Optimizer | None, setup: Setup) -> Setup:
    """Return ``setup`` with the options of ``optimizer``, if that is a `DistAdamW`. Local.

    Raises:
        ValueError: its mesh has two axes.
    """
    if not isinstance(optimizer, DistAdamW):
        return setup
    mesh = optimizer._mesh
    if mesh is not None and mesh.ndim > 1:
        raise ValueError(
            f"a mesh of two axes (HSDP) is not planned, got {mesh}. Leave mesh out, and plan the ranks of the second "
            "axis, over which state is sharded."
        )
    return replace(
        setup,
        master_dtype=optimizer.master_dtype,
        state_dtype=optimizer.state_dtype,
        reduce_dtype=optimizer.reduce_dtype,
        averages=optimizer.averages,
        amsgrad=any(group["amsgrad"] for group in optimizer.param_groups),
        reproducible=optimizer.reproducible,
    )


def schedule_plan(given: Given) -> SchedulePlan:
    """Put a schedule together. Local.

    Raises:
        ValueError: a size is not a whole number above 0, a length has a unit without a schedule, or the schedule does
            not know its batch or epoch.
    """
    micro = given.micro_batch_size
    if micro is not None:
        micro = check_positive_int("micro_batch_size", micro)
    if given.scheduler is not None:
        preview = given.scheduler.preview(total_samples=given.total_samples)
        total = None if preview.end is None else preview.end.total_samples
        return SchedulePlan(preview.batches, micro, total, preview)
    size = given.batch_size
    if isinstance(size, Mapping):
        raise ValueError("a batch-size schedule needs a recipe or a CyclicLRWithRestarts; pass one number.")
    batches = None if size is None else BatchSchedule((0,), (check_positive_int("batch_size", size),))
    total_samples = given.total_samples
    if isinstance(total_samples, str):
        amount, unit = parse("total_samples", total_samples.replace(",", ""), "samples")
        if unit != "samples" or amount.denominator != 1:
            raise ValueError(
                f"total_samples={total_samples!r} needs a recipe, which knows its units; pass a number of samples."
            )
        total_samples = int(amount)
    total = None if total_samples is None else check_positive_int("total_samples", total_samples)
    return SchedulePlan(batches, micro, total)
