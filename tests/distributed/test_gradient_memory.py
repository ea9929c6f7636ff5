"""Gradients live in memory of the shards from update to update, and no gradient that the user holds changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_adamw import DistAdamW
from tests.gradient_pair import WAYS, Pair, backward, large_from, lent, model_of
from tests.ranks import run_ranks


def check_stays(ddp: bool, set_to_none: bool) -> None:
    pair = Pair(ddp=ddp)
    seen = set()
    for step in range(5):
        pair.both(step)
        if step:
            seen.add(tuple(pair.addresses()))
        pair.step(set_to_none=set_to_none)
    pair.check()
    assert len(seen) == 1
    assert len(next(iter(seen))) == 8


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("ddp", WAYS)
def test_gradients_stay_where_they_are(ddp: bool, set_to_none: bool) -> None:
    run_ranks(2, check_stays, ddp, set_to_none)


def check_accumulated(ddp: bool) -> None:
    """The passes inside no_sync add to the same memory."""
    pair = Pair(ddp=ddp)
    seen = set()
    for step in range(4):
        for wrapped in (pair.wrapped, pair.twin_wrapped):
            with wrapped.no_sync():  # type: ignore[operator]
                backward(wrapped, 10 * step)
                backward(wrapped, 10 * step + 1)
        pair.both(10 * step + 2)
        if step:
            seen.add(tuple(pair.addresses()))
        pair.step()
    pair.check()
    assert len(seen) == 1
    assert not lent(pair), "a bucket was copied"


@pytest.mark.parametrize("ddp", WAYS)
def test_accumulation_adds_in_place(ddp: bool) -> None:
    run_ranks(2, check_accumulated, ddp)


HOLDS: dict[str, Callable[[Tensor], Any]] = {
    "itself": lambda grad: grad,
    "detached": lambda grad: grad.detach(),
    "as numpy": lambda grad: grad.numpy(),
    "a view": lambda grad: grad.view(-1)[3:9],
    "its storage": lambda grad: (grad.untyped_storage(), grad.storage_offset()),
    "an iterator": lambda grad: iter([grad]),
}


def check_held(ddp: bool, how: str) -> None:
    """Gradients that are kept over updates, for a log or a comparison, keep their values."""
    pair = Pair(ddp=ddp)
    held, values = [], []
    for step in range(4):
        pair.both(step)
        if step < 3:
            grads = [param.grad for param in pair.model.parameters() if param.grad is not None]
            held.append([HOLDS[how](grad) for grad in grads[:1]])
            values.append([grad.clone() for grad in grads[:1]])
            del grads
            if step == 2:
                held.pop(0)
                values.pop(0)
        pair.step()
    pair.check()
    for kept, expected in zip(held, values, strict=True):
        for one, value in zip(kept, expected, strict=True):
            assert torch.equal(_values(one, how), HOLDS["a view"](value) if how == "a view" else value)


def _values(held: Any, how: str) -> Tensor:
    if how == "as numpy":
        return torch.from_numpy(held)
    if how == "an iterator":
        return next(held)
    if how == "its storage":
        storage, offset = held
        return torch.empty(0).set_(storage, offset, torch.Size((40, 40)), (40, 1))
    return held


@pytest.mark.parametrize("how", HOLDS)
@pytest.mark.parametrize("ddp", WAYS)
def test_a_gradient_that_is_held_keeps_its_values(ddp: bool, how: str) -> None:
    run_ranks(2, check_held, ddp, how)


def check_own_gradients(kind: str, direct_numel: int) -> None:
    """Scripts that give gradients memory of their own, and set that to zero, keep it."""
    with large_from(direct_numel):
        model, _ = model_of(ddp=False)
        twin, twin_wrapped = model_of(ddp=True)
        optimizer = DistAdamW(model.parameters(), lr=1e-2, eps=0.1)
        reference = torch.optim.AdamW(twin.parameters(), lr=1e-2, eps=0.1)
        params = list(model.parameters())
        if kind == "one buffer":
            numels = [param.numel() for param in params]
            parts = torch.zeros(sum(numels)).split(numels)
            given = [part.view_as(param) for part, param in zip(parts, params, strict=True)]
        else:
            given = [torch.zeros_like(param) for param in params]
        for param, grad in zip(params, given, strict=True):
            param.grad = grad
        optimizer.attach(model)
        for step in range(4):
            for grad in given:
                grad.zero_()
            backward(model, step)
            backward(twin_wrapped, step)
            assert all(param.grad is grad for param, grad in zip(params, given, strict=True))
            optimizer.step()
            reference.step()
            reference.zero_grad()
            for param, expected in zip(params, twin.parameters(), strict=True):
                torch.testing.assert_close(param, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("direct_numel", [1 << 14, 1000])
@pytest.mark.parametrize("kind", ["one buffer", "a tensor each"])
def test_gradients_of_the_users_stay_where_they_are(kind: str, direct_numel: int) -> None:
    run_ranks(2, check_own_gradients, kind, direct_numel)


def _swap(model: nn.Module) -> None:
    first, second = model[0], model[2]  # type: ignore[index]
    first.weight.grad, second.weight.grad = second.weight.grad, first.weight.grad


def _move(model: nn.Module) -> None:
    grad = model[1].weight.grad  # type: ignore[index]
    grad.data = grad.data * 2


def _transpose(model: nn.Module) -> None:
    weight = model[1].weight  # type: ignore[index]
    weight.grad = weight.grad.t()


def _replace(model: nn.Module) -> None:
    weight = model[3].weight  # type: ignore[index]
    weight.grad = weight.grad.clone()


CHANGES = {"swapped": _swap, "moved": _move, "transposed": _transpose, "replaced": _replace}


@pytest.mark.parametrize("change", CHANGES)
def test_gradients_changed_between_micro_batches(change: str) -> None:
    run_ranks(2, check_changed_alone, change)


def check_changed_alone(change: str) -> None:
    """Compared with averages of a twin's local gradients: DDP refuses gradients that have left its buckets."""
    pair = Pair(ddp=False)
    for step in range(4):
        with pair.wrapped.no_sync():  # type: ignore[operator]
            backward(pair.wrapped, 10 * step)
        CHANGES[change](pair.model)
        backward(pair.wrapped, 10 * step + 1)
        backward(pair.twin, 10 * step)
        CHANGES[change](pair.twin)
        backward(pair.twin, 10 * step + 1)
        for param in pair.twin.parameters():
            assert param.grad is not None
            grad = param.grad.contiguous()
            dist.all_reduce(grad)
            param.grad = grad / dist.get_world_size()
        pair.step()
    pair.check()


def check_moved_all() -> None:
    """``module.to()`` and ``grad.data = x`` move gradients between micro-batches, all of them at once."""
    pair = Pair(ddp=False)
    moved: list[Tensor] = []
    values: list[Tensor] = []
    for step in range(3):
        with pair.wrapped.no_sync():  # type: ignore[operator]
            backward(pair.wrapped, 10 * step)
        assert all(map(torch.equal, moved, values)), "memory of the user's was overwritten"
        moved = []
        for param in pair.model.parameters():
            assert param.grad is not None
            moved.append(param.grad.data.clone())
            param.grad.data = moved[-1]
        backward(pair.wrapped, 10 * step + 1)
        values = [memory.clone() for memory in moved]
        with pair.twin_wrapped.no_sync():  # type: ignore[operator]
            backward(pair.twin_wrapped, 10 * step)
        backward(pair.twin_wrapped, 10 * step + 1)
        pair.step()
        pair.check()


def test_all_gradients_moved_between_micro_batches() -> None:
    run_ranks(2, check_moved_all)


def check_held_without_a_pass() -> None:
    """One rank has no backward pass in an update, and holds a gradient of the last one."""
    model, _ = model_of(ddp=False)
    optimizer = DistAdamW(model.parameters())
    optimizer.attach(model)
    backward(model, 0)
    held = next(model.parameters()).grad
    assert held is not None
    value = held.clone()
    optimizer.step()
    optimizer.zero_grad()
    if dist.get_rank() == 0:
        backward(model, 1)
    optimizer.step()
    assert torch.equal(held[: 20 if dist.get_rank() == 0 else 40], value[: 20 if dist.get_rank() == 0 else 40])


def test_a_gradient_held_by_a_rank_without_a_pass_keeps_its_values() -> None:
    run_ranks(2, check_held_without_a_pass)


def check_taken_over() -> None:
    """Another optimizer takes some parameters over, while their gradients lie in the first one's memory."""
    model, _ = model_of(ddp=False)
    twin, twin_wrapped = model_of(ddp=True)
    first = DistAdamW(model.parameters())
    first.attach(model)
    backward(model, 0)
    first.step()
    first.zero_grad(set_to_none=False)
    theirs = [*model.get_submodule("1").parameters(), *model.get_submodule("3").parameters()]
    second = DistAdamW(theirs)
    second.attach(model)
    twin.load_state_dict(model.state_dict())
    backward(model, 1)
    backward(twin_wrapped, 1)
    first.gather_gradients()
    second.gather_gradients()
    for param, expected in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(param.grad, expected.grad, rtol=1e-5, atol=1e-6)


def test_parameters_that_another_optimizer_takes_over() -> None:
    run_ranks(2, check_taken_over)
