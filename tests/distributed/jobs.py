"""The five objects of a small Accelerate job, and the loop every Accelerate user has."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import GradientAccumulationPlugin
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from dist_adamw import CyclicLRWithRestarts, DistAdamW, ReduceMaxLROnRestart

WORLDS = [1, 2, 3, 4]
RECIPE: dict[str, Any] = {
    "restart_period": 0.7,
    "t_mult": 1.5,
    "min_lr": 1e-5,
    "warmup_samples": 30,
    "eta_on_restart_cb": ReduceMaxLROnRestart(0.9),
}
Row = tuple[int, float, float]
Objects = tuple[nn.Module, DistAdamW, DataLoader[Any], CyclicLRWithRestarts]  # what Accelerate prepares


def data(length: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(3)
    return TensorDataset(torch.randn(length, 6, generator=generator), torch.randn(length, 2, generator=generator))


def model_of_two_layers(width: int = 20) -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 2))


def job(
    accumulation: int = 1,
    length: int = 100,
    *,
    loader: dict[str, Any] | None = None,
    dataset: Dataset[Any] | None = None,
    recipe: dict[str, Any] | None = None,
    optimizer: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
    plugin: dict[str, Any] | None = None,
    width: int = 20,
) -> tuple[Accelerator, Objects]:
    """The five objects, with a micro-batch of one sample unless ``loader`` says otherwise."""
    accelerator = Accelerator(
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=accumulation, **(plugin or {})),
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, **(config or {})),
    )
    model = model_of_two_layers(width)
    adamw = DistAdamW(model.parameters(), **{"lr": 1e-2, "weight_decay": 0.05, **(optimizer or {})})
    scheduler = CyclicLRWithRestarts(adamw, **{**RECIPE, **(recipe or {})})
    source = data(length) if dataset is None else dataset
    batches: DataLoader[Any] = DataLoader(source, **{"batch_size": 1, **(loader or {})})
    return accelerator, (model, adamw, batches, scheduler)


def epochs(
    accelerator: Accelerator, model: nn.Module, optimizer: Any, loader: Any, scheduler: Any, count: int
) -> Iterator[Row]:
    """The loop every Accelerate user has; yields the clock, lr and decay of each update."""
    clock = getattr(scheduler, "scheduler", scheduler)  # accelerator.prepare wraps, prepare does not
    for _ in range(count):
        for x, y in loader:
            with accelerator.accumulate(model):
                accelerator.backward(nn.functional.mse_loss(model(x), y))
                group = optimizer.param_groups[0]
                row = (clock.samples, group["lr"], group["weight_decay"])
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
                if accelerator.sync_gradients:
                    yield row
