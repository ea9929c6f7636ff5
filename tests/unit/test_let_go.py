"""What prepare returned is freed with the last reference: its memory, and its loaders' workers."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo  # torch imports it with the first optimizer; its frames stay until garbage is collected
from accelerate import Accelerator, DataLoaderConfiguration
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

from dist_adamw import CyclicLRWithRestarts, DistAdamW, position, prepare, rest_of_epoch
from tests.known import unwrap


@pytest.fixture
def uncollected() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def objects() -> tuple[nn.Module, DistAdamW, DataLoader[Any], CyclicLRWithRestarts]:
    optimizer = DistAdamW((model := nn.Linear(1, 1)).parameters())
    scheduler = CyclicLRWithRestarts(optimizer, restart_period=1)
    return model, optimizer, DataLoader(TensorDataset(torch.arange(8.0).view(-1, 1)), 2, shuffle=True), scheduler


def update(accelerator: Accelerator, model: nn.Module, optimizer: Optimizer, batch: list[Tensor]) -> None:
    accelerator.backward(model(batch[0]).square().mean())
    accelerator.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def trained(accelerator: Accelerator, updates: int) -> dict[str, weakref.ref[Any]]:
    model, optimizer, loader, scheduler = prepare(accelerator, *objects())
    for batch, _ in zip(rest_of_epoch(loader), range(updates), strict=False):
        update(accelerator, model, optimizer, batch)
        scheduler.step()
    made = {"model": model, "optimizer": optimizer, "loader": loader, "scheduler": scheduler}
    return {name: weakref.ref(one) for name, one in made.items()}


@pytest.mark.parametrize("updates", [0, 2, 4])
@pytest.mark.usefixtures("uncollected")
def test_nothing_waits_for_the_collector(updates: int) -> None:
    accelerator = Accelerator(cpu=True)
    known = weakref.ref(accelerator)
    left = trained(accelerator, updates)
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
    *_, loader, _ = prepare(accelerator, *objects())
    place, loop = position(loader), rest_of_epoch(loader)
    del accelerator, loader
    gc.collect()
    assert sorted(int(x) for (batch,) in loop for x in batch) == [*range(8)]
    del loop
    gc.collect()
    with pytest.raises(ValueError, match=r"loader .*position is gone"):
        place.state_dict()


def test_what_keeps_itself_goes_with_the_next_collection() -> None:
    accelerator = Accelerator(cpu=True)
    model, optimizer, *_ = prepare(accelerator, *objects())
    model.optimizer = optimizer
    known = weakref.ref(model)
    del model, optimizer, _
    accelerator.free_memory()
    gc.collect()
    assert known() is None


def test_another_loader_after_free_memory(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True))
    model, optimizer, loader, scheduler = prepare(accelerator, *objects())
    saved = []
    for folder in ("before", "after"):
        batch = next(rest_of_epoch(loader) if folder == "before" else iter(loader))
        update(accelerator, model, optimizer, batch)
        scheduler.step()
        accelerator.save_state(str(tmp_path / folder))
        saved.append([p.detach().clone() for p in model.parameters()])
        if folder == "before":
            del loader
            accelerator.free_memory()
            gc.collect()
            model, optimizer, loader = accelerator.prepare(model, optimizer, objects()[2])
    for folder, expected in zip(("before", "after"), saved, strict=True):
        accelerator.load_state(str(tmp_path / folder))
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), expected, strict=True))


def test_methods_that_somebody_has_replaced(tmp_path: Path) -> None:
    """Before: they are called where Accelerate's would be. After: they call ours."""
    accelerator, calls = Accelerator(cpu=True), []
    for when in ("before", "after"):
        before = accelerator.save_state

        def told(*args: Any, when: str = when, before: Any = before, **kwargs: Any) -> Any:
            calls.append(when)
            return before(*args, **kwargs)

        accelerator.save_state = told
        prepare(accelerator, *objects())
    accelerator.save_state(str(tmp_path))
    assert calls == ["after", "before"]
    assert sorted(path.name for path in tmp_path.glob("dist_adamw*")) == ["dist_adamw", "dist_adamw_1"]


def test_a_method_alone_does_not_keep_its_accelerator() -> None:
    accelerator = Accelerator(cpu=True)
    prepare(accelerator, *objects())
    method = accelerator.save_state
    del accelerator
    with pytest.raises(RuntimeError, match=r"this save_state is gone"):
        method("anywhere")


def test_clipping_of_a_subclass_has_arguments_of_its_own() -> None:
    class Ours(Accelerator):  # type: ignore[misc]
        def clip_grad_norm_(self, model: nn.Module, *, log: bool) -> str:
            return f"{type(model).__name__}, {log}"

    accelerator = Ours(cpu=True)
    model, *_ = prepare(accelerator, *objects())
    assert accelerator.clip_grad_norm_(model, log=True) == "Linear, True"


def test_an_optimizer_can_be_copied() -> None:
    _, optimizer, *_ = prepare(Accelerator(cpu=True), *objects())
    copied = copy.deepcopy(optimizer)
    for group in copied.param_groups:
        for param in group["params"]:
            param.grad = torch.ones_like(param)
    copied.step()
    assert [unwrap(one).updates for one in (optimizer, copied)] == [0, 1]


def test_a_copied_loader_has_a_position_of_its_own() -> None:
    *_, loader, _ = prepare(Accelerator(cpu=True), *objects())
    next(rest := rest_of_epoch(loader))
    copied = copy.deepcopy(loader)
    assert position(copied).loader is copied
    assert position(loader).loader is loader
    next(rest)
    assert (position(loader).samples, position(copied).samples) == (4, 2)
