"""Whoever lets go of what prepare returned has it go at once: its memory, and its loaders' workers."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dist_adamw import CyclicLRWithRestarts, DistAdamW, position, prepare, rest_of_epoch


@pytest.fixture
def uncollected() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def trained(accelerator: Accelerator, steps: int) -> dict[str, weakref.ref[Any]]:
    model = nn.Linear(1, 1)
    optimizer = DistAdamW(model.parameters())
    scheduler = CyclicLRWithRestarts(optimizer, restart_period=1)
    data = DataLoader(TensorDataset(torch.arange(8.0).view(-1, 1)), 2)
    objects = prepare(accelerator, model, optimizer, data, scheduler)
    for (x,), _ in zip(rest_of_epoch(objects[2]), range(steps), strict=False):
        accelerator.backward(objects[0](x).square().mean())
        accelerator.clip_grad_norm_(objects[0].parameters(), 1.0)
        for one in (objects[1], objects[3]):
            one.step()
        objects[1].zero_grad()
    return dict(zip(("model", "optimizer", "loader", "scheduler"), map(weakref.ref, objects), strict=True))


@pytest.mark.parametrize("steps", [0, 2, 4])
@pytest.mark.usefixtures("uncollected")
def test_nothing_waits_for_the_collector(steps: int) -> None:
    accelerator = Accelerator(cpu=True)
    known = weakref.ref(accelerator)
    left = trained(accelerator, steps)
    assert all(one() is not None for one in left.values())  # Accelerate has them
    del accelerator
    assert known() is None
    assert [name for name, one in left.items() if one() is not None] == []


def test_free_memory_frees_the_memory() -> None:
    accelerator = Accelerator(cpu=True)
    left = trained(accelerator, 2)
    accelerator.free_memory()
    assert [name for name, one in left.items() if one() is not None] == []
    trained(accelerator, 2)  # and another


def test_a_loop_keeps_its_loader() -> None:
    accelerator = Accelerator(cpu=True)
    optimizer = DistAdamW((model := nn.Linear(1, 1)).parameters())
    scheduler = CyclicLRWithRestarts(optimizer, restart_period=1)
    data = DataLoader(TensorDataset(torch.arange(8.0).view(-1, 1)), 2)
    *_, loader, _ = prepare(accelerator, model, optimizer, data, scheduler)
    place, loop = position(loader), rest_of_epoch(loader)
    del accelerator, loader
    gc.collect()
    assert [int(x) for (batch,) in loop for x in batch] == [*range(8)]
    del loop
    gc.collect()
    with pytest.raises(ValueError, match=r"the loader of this position is gone\. Keep what prepare returned"):
        place.state_dict()


def test_methods_that_somebody_has_replaced_are_refused() -> None:
    accelerator = Accelerator(cpu=True)
    accelerator.save_state = print
    optimizer = DistAdamW((model := nn.Linear(1, 1)).parameters())
    scheduler = CyclicLRWithRestarts(optimizer, restart_period=1)
    data = DataLoader(TensorDataset(torch.arange(8.0).view(-1, 1)), 2)
    with pytest.raises(ValueError, match=r"accelerator.save_state was replaced by .* Replace it after prepare"):
        prepare(accelerator, model, optimizer, data, scheduler)
