"""DeepSpeed alone and through Accelerate: JSON, clipping, skipped updates, several groups, traps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.utils import DummyOptim, DummyScheduler
from torch import nn
from torch.utils.data import DataLoader

from dist_adamw import CyclicLRWithRestarts, DistAdamW, prepare, register_deepspeed
from tests.distributed.engines import ZERO, accelerator_on
from tests.distributed.test_engines import (
    BATCH,
    EPOCH,
    EPOCHS,
    RECIPE,
    UPDATES,
    Curve,
    data,
    difference,
    network,
    reference,
)
from tests.known import unwrap
from tests.ranks import run_ranks

OPTIMIZER: dict[str, Any] = {"type": "DistAdamW", "params": {"lr": 1e-2, "weight_decay": 0.1, "eps": 0.1}}
SCHEDULER = {"type": "CyclicLRWithRestarts", "params": {"batch_size": "auto", "epoch_size": "auto", **RECIPE}}


def rows_of(step: Callable[[Any, Any], Any], loader: Any, optimizer: Any, scheduler: Any, accumulation: int) -> Curve:
    """Train with ``step(x, y)``; what the optimizer steps with, and the loss over the global batch."""
    values: dict[int, tuple[float, float]] = {}

    def note(inner: Any, *_: Any) -> None:
        group = inner.param_groups[0]
        values[scheduler.samples] = (group["lr"], group["weight_decay"])

    optimizer.register_step_pre_hook(note)
    rows, losses = [], []
    for _ in range(EPOCHS):
        for x, y in loader:
            before = scheduler.samples
            losses.append(step(x, y))
            if len(losses) == accumulation:
                total = torch.stack(losses).sum()
                dist.all_reduce(total)
                rows.append((before, *values[before], float(total) / (dist.get_world_size() * accumulation)))
                losses = []
    return rows


def initialize(config: dict[str, Any], model: nn.Module, **objects: Any) -> Any:
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    return deepspeed.initialize(model=model, config=config, **objects)[0]


def check_alone(stage: str, accumulation: int, written: bool) -> Curve:
    """deepspeed.initialize, no Accelerate: objects of the user's, or a JSON."""
    size = dist.get_world_size()
    model = network()
    config = {
        "train_batch_size": BATCH,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": ZERO[stage],
    }
    if written:
        register_deepspeed()
        scheduler = {**SCHEDULER, "params": {**RECIPE, "batch_size": BATCH, "epoch_size": EPOCH}}
        engine = initialize(
            {**config, "optimizer": OPTIMIZER, "scheduler": scheduler}, model, model_parameters=model.parameters()
        )
    else:
        optimizer = DistAdamW(model.parameters(), **OPTIMIZER["params"])
        made = CyclicLRWithRestarts(optimizer, BATCH, EPOCH, **RECIPE)
        engine = initialize(config, model, optimizer=optimizer, lr_scheduler=made)
    scheduler = engine.lr_scheduler
    assert isinstance(scheduler, CyclicLRWithRestarts)

    def step(x: Any, y: Any) -> Any:
        loss = nn.functional.mse_loss(engine(x), y)
        engine.backward(loss)
        engine.step()
        return loss.detach()

    micro = BATCH // (size * accumulation)
    mine = torch.utils.data.DataLoader(
        data(), batch_sampler=[list(range(i, i + micro)) for i in range(dist.get_rank() * micro, EPOCH, size * micro)]
    )
    rows = rows_of(step, mine, scheduler.optimizer, scheduler, accumulation)
    assert unwrap(scheduler.optimizer).updates == UPDATES
    return rows


@pytest.mark.parametrize("written", [False, True], ids=["objects", "json"])
@pytest.mark.parametrize("stage", ZERO)
def test_initialize_alone(stage: str, written: bool) -> None:
    for rows in run_ranks(2, check_alone, stage, 3, written):
        assert difference(rows, reference("lr", 0.1)) < 1e-5


def check_dummies(stage: str, accumulation: int) -> Curve:
    told = {"optimizer": OPTIMIZER, "scheduler": SCHEDULER}
    with accelerator_on(stage, accumulation, **told) as accelerator:
        model = network()
        optimizer = DummyOptim(model.parameters())
        loader = DataLoader(data(), batch_size=BATCH // (accelerator.num_processes * accumulation))
        model, wrapped, loader, scheduler = prepare(
            accelerator,
            model,
            optimizer,
            loader,
            DummyScheduler(optimizer),
        )
        assert scheduler.batch_size == BATCH
        assert scheduler.epoch_size == EPOCH

        def step(x: Any, y: Any) -> Any:
            with accelerator.accumulate(model):
                loss = nn.functional.mse_loss(model(x), y)
                accelerator.backward(loss)
                wrapped.step()
                scheduler.step()
                wrapped.zero_grad()
            return loss.detach()

        return rows_of(step, loader, scheduler.optimizer, scheduler, accumulation)


@pytest.mark.parametrize("stage", ["ZeRO-1", "ZeRO-3"])
def test_a_json_through_accelerate(stage: str) -> None:
    for rows in run_ranks(2, check_dummies, stage, 3):
        assert difference(rows, reference("lr", 0.1)) < 1e-5


def check_groups(stage: str) -> tuple[int, int, list[float]]:
    """ZeRO steps one group after the other: one update, of the clock too."""
    with accelerator_on(stage) as accelerator:
        model = network()
        matrices = [p for p in model.parameters() if p.ndim == 2]
        vectors = [p for p in model.parameters() if p.ndim == 1]
        groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "lr": 1e-3, "weight_decay": 0.0}]
        optimizer = DistAdamW(groups, lr=1e-2, weight_decay=0.1)
        scheduler = CyclicLRWithRestarts(optimizer, **RECIPE)
        loader = DataLoader(data(), batch_size=6)
        model, _, loader, scheduler = prepare(accelerator, model, optimizer, loader, scheduler)
        for x, y in loader:
            with accelerator.accumulate(model):
                accelerator.backward(nn.functional.mse_loss(model(x), y))
                scheduler.step()
        lrs = [float(lr) for lr in scheduler.get_last_lr()]
        return optimizer.updates, scheduler.samples, lrs


@pytest.mark.parametrize("stage", ZERO)
def test_several_groups_are_one_update(stage: str) -> None:
    for updates, samples, (first, second) in run_ranks(2, check_groups, stage):
        assert (updates, samples) == (5, 60)
        assert first > second > 0


def check_bf16(stage: str) -> tuple[list[float], list[int], int]:
    """bf16 weights, whose fp32 masters are ZeRO's."""
    told: dict[str, Any] = {"bf16": {"enabled": True}}
    with accelerator_on(stage, **told) as accelerator:
        model = network()
        optimizer = DistAdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
        scheduler = CyclicLRWithRestarts(optimizer, **RECIPE)
        loader = DataLoader(data(), batch_size=6)
        model, _, loader, scheduler = prepare(accelerator, model, optimizer, loader, scheduler)
        losses, samples = [], []
        for _ in range(4):
            for x, y in loader:
                with accelerator.accumulate(model):
                    loss = nn.functional.mse_loss(model(x.bfloat16()).float(), y)
                    accelerator.backward(loss)
                    scheduler.step()
                    losses.append(float(loss))
                    samples.append(scheduler.samples)
        return losses, samples, optimizer.updates


@pytest.mark.parametrize("stage", ["ZeRO-1", "ZeRO-2", "ZeRO-3"])
def test_bf16(stage: str) -> None:
    for losses, samples, updates in run_ranks(2, check_bf16, stage):
        assert samples == list(range(12, 241, 12))
        assert updates == 20
        assert sum(losses[-5:]) < sum(losses[:5])
