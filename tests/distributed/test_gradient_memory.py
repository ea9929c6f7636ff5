"""Gradients live in memory of the shards from update to update, and no gradient that the user holds changes."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dist_adamw import DistAdamW
from dist_adamw.optimizer.gradients import sources
from dist_adamw.optimizer.transport import gloo
from tests.ranks import run_ranks


@contextlib.contextmanager
def large_from(numel: int) -> Iterator[None]:
    """Treat parameters of that many elements as large, and look for full buckets at every gradient."""
    before = gloo.DIRECT_NUMEL, sources._LOOK_EVERY
    gloo.DIRECT_NUMEL, sources._LOOK_EVERY = numel, 1
    try:
        yield
    finally:
        gloo.DIRECT_NUMEL, sources._LOOK_EVERY = before


WAYS = [True, False]  # in DDP, or a plain module


def model_of(*, ddp: bool, layers: int = 4) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(40, 40) for _ in range(layers)])
    return model, DistributedDataParallel(model, gradient_as_bucket_view=True) if ddp else model


def backward(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(100 * step + dist.get_rank())
    model(torch.randn(8, 40, generator=generator)).square().mean().backward()


class Pair:
    """A model under DistAdamW, and a twin under DDP and torch.optim.AdamW. Some bits differ: sums in another order."""

    def __init__(self, *, ddp: bool, **options: Any) -> None:
        self.model, self.wrapped = model_of(ddp=ddp)
        self.twin, self.twin_wrapped = model_of(ddp=True)
        self.optimizer = DistAdamW(self.model.parameters(), lr=1e-2, eps=0.1)
        self.reference = torch.optim.AdamW(self.twin.parameters(), lr=1e-2, eps=0.1)
        self.optimizer.attach(self.wrapped, **options)

    def both(self, step: int, change: Callable[[nn.Module], None] = lambda model: None) -> None:
        for model, wrapped in ((self.model, self.wrapped), (self.twin, self.twin_wrapped)):
            backward(wrapped, step)
            change(model)

    def step(self, *, set_to_none: bool = True) -> None:
        for optimizer in (self.optimizer, self.reference):
            optimizer.step()
            optimizer.zero_grad(set_to_none)

    def check(self) -> None:
        for param, expected in zip(self.model.parameters(), self.twin.parameters(), strict=True):
            torch.testing.assert_close(param, expected, rtol=1e-5, atol=1e-6)

    def addresses(self) -> list[int]:
        """Where the gradients lie."""
        return [param.grad.data_ptr() for param in self.model.parameters() if param.grad is not None]


def lent(pair: Pair) -> list[Tensor]:
    packers: list[Any] = [shard.gradients._made_packer for shard in pair.optimizer.shards]
    return [memory for packer in packers for memory in packer._lent]


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


def check_large(accumulate: bool) -> None:
    """A large gradient is sent from where autograd has put it, and let go."""
    with large_from(1000):
        pair = Pair(ddp=True)
        seen: list[int] = []
        for step in range(4):
            if accumulate:
                for wrapped in (pair.wrapped, pair.twin_wrapped):
                    with wrapped.no_sync():  # type: ignore[operator]
                        backward(wrapped, 10 * step + 5)
            pair.both(10 * step)
            assert seen in ([], pair.addresses())
            seen = pair.addresses()
            pair.step()
        pair.check()
        assert not lent(pair), "a bucket was copied"


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("world_size", [2, 3])
def test_a_large_gradient_is_sent_without_a_copy(world_size: int, accumulate: bool) -> None:
    run_ranks(world_size, check_large, accumulate)


def check_groups(count: int) -> list[int]:
    """Groups share one layout, and each has its own hyper-parameters."""
    model, wrapped = model_of(ddp=True)
    twin, twin_wrapped = model_of(ddp=True)
    optimizers: list[Any] = []
    for one, kind in ((model, DistAdamW), (twin, torch.optim.AdamW)):
        params = list(one.parameters())
        groups = [
            {"params": params[i::count], "lr": 1e-2 / (i + 1), "weight_decay": 0.1 * i, "betas": (0.9 - 0.1 * i, 0.99)}
            for i in range(count)
        ]
        optimizers.append(kind(groups, eps=0.1))
    optimizers[0].attach(wrapped)
    for step in range(4):
        for one in (wrapped, twin_wrapped):
            backward(one, step)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
            optimizer.param_groups[-1]["lr"] *= 0.5
    for param, expected in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(param, expected, rtol=1e-5, atol=1e-6)
    return [len(shard.params) for shard in optimizers[0].shards]


@pytest.mark.parametrize("count", [1, 2, 8])
def test_groups_share_one_layout(count: int) -> None:
    assert run_ranks(2, check_groups, count) == [[8], [8]]


def check_order() -> None:
    """The layout has the parameters in the order of the module, whatever the groups."""
    model, wrapped = model_of(ddp=True)
    params = list(model.parameters())
    groups: list[dict[str, Any]] = [{"params": params[1::2], "weight_decay": 0.0}, {"params": params[::2]}]
    optimizer = DistAdamW(groups)
    optimizer.attach(wrapped)
    backward(wrapped, 0)
    optimizer.step()
    (shard,) = optimizer.shards
    assert all(map(operator.is_, shard.params, params))


def test_the_layout_follows_the_module() -> None:
    run_ranks(2, check_order)


# ---------------------------------------------------------------- small and large gradients, here and elsewhere


class Mixed(nn.Module):
    """A large matrix in several buckets, and small tensors, one of which has a gradient that is a part of another."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(40, 40)
        self.large = nn.Linear(40, 200)
        self.q, self.v = nn.Parameter(torch.zeros(100)), nn.Parameter(torch.zeros(100))
        self.unused = nn.Parameter(torch.ones(7))

    def forward(self, x: Tensor) -> Tensor:
        return self.large(self.first(x)) + torch.cat([self.q, self.v])


def _gather(pair: Any, step: int) -> None:
    if step % 2:
        pair.optimizer.gather_gradients()
        total = torch.stack([p.grad.norm() for p in pair.model.parameters() if p.grad is not None]).norm()
        expected = torch.stack([p.grad.norm() for p in pair.twin.parameters() if p.grad is not None]).norm()
        torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-6)


def _clamp(pair: Any, step: int) -> None:
    for model in (pair.model, pair.twin):
        for param in model.parameters():
            if param.grad is not None:
                param.grad.clamp_(-1e-3, 1e-3)
    pair.optimizer.accept_gradients()


def _twice(pair: Any, step: int) -> None:
    """A second pass without no_sync adds to averages."""
    backward(pair.wrapped, 100 + step)
    for param in pair.twin.parameters():
        param.grad = None
    with pair.twin_wrapped.no_sync():
        backward(pair.twin_wrapped, step)
    backward(pair.twin_wrapped, 100 + step)


USES: dict[str, Any] = {"plainly": None, "gathered": _gather, "clamped": _clamp, "twice": _twice}


def check_mixed(ddp: bool, use: str, spoil: str, overlap: bool) -> None:
    with large_from(1000):
        torch.manual_seed(0)
        pair = Pair.__new__(Pair)
        pair.model, pair.twin = Mixed(), Mixed()
        pair.twin.load_state_dict(pair.model.state_dict())
        options: Any = {"gradient_as_bucket_view": True, "find_unused_parameters": True}
        pair.wrapped = DistributedDataParallel(pair.model, **options) if ddp else pair.model
        pair.twin_wrapped = DistributedDataParallel(pair.twin, find_unused_parameters=True)
        pair.optimizer = DistAdamW(pair.model.parameters(), lr=1e-2, eps=0.1, bucket_numel=3000)
        pair.reference = torch.optim.AdamW(pair.twin.parameters(), lr=1e-2, eps=0.1)
        pair.optimizer.attach(pair.wrapped, overlap=overlap)
        for step in range(6):
            if spoil == "given":  # a gradient that was there before the pass
                for model in (pair.model, pair.twin):
                    model.first.bias.grad = torch.zeros(40)
            pair.both(step)
            if USES[use] is not None:
                USES[use](pair, step)
            pair.step(set_to_none=step != 3)
            pair.check()


# A change of gradients that are local until step() is refused.
CASES = [(use, overlap) for use in USES for overlap in (True, False) if overlap or use != "clamped"]


@pytest.mark.parametrize("spoil", ["part", "given"])
@pytest.mark.parametrize(("use", "overlap"), CASES)
@pytest.mark.parametrize("ddp", WAYS)
def test_small_gradients_elsewhere_beside_a_large_one(ddp: bool, use: str, spoil: str, overlap: bool) -> None:
    run_ranks(2, check_mixed, ddp, use, spoil, overlap)


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


def check_no_stale_values() -> None:
    """Local values of a pass that copied a large gradient do not stay in elements of other ranks."""
    with large_from(1000):
        model, _ = model_of(ddp=False)
        optimizer = DistAdamW(model.parameters(), max_grad_norm=1.0)
        optimizer.attach(model)
        with model.no_sync():  # type: ignore[operator]
            (model(torch.full((2, 40), float("inf"))).sum()).backward()
        backward(model, 0)
        optimizer.step()
        assert optimizer.step_was_skipped
        optimizer.zero_grad()
        for step in range(2):
            backward(model, step)
            assert all(param.grad is not None and param.grad.isfinite().all() for param in model.parameters())
            optimizer.step()
            assert not optimizer.step_was_skipped
            optimizer.zero_grad()


def test_values_of_a_skipped_update_do_not_stay() -> None:
    run_ranks(2, check_no_stale_values)


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


def check_broken_pass() -> None:
    """Gradients from before an error in backward count, as in torch; some have been averaged by then."""
    with large_from(1000):
        model, _ = model_of(ddp=False)
        twin, _ = model_of(ddp=False)
        optimizer = DistAdamW(model.parameters(), lr=1e-2, eps=0.1, bucket_numel=700)
        reference = torch.optim.AdamW(twin.parameters(), lr=1e-2, eps=0.1)
        optimizer.attach(model)
        for step in range(3):
            for one in (model, twin):
                handle = one.get_parameter("1.weight").register_hook(_fail)
                with pytest.raises(RuntimeError, match="planned"):
                    backward(one, 10 * step)
                handle.remove()
                backward(one, 10 * step + 1)
            for param in twin.parameters():
                assert param.grad is not None
                dist.all_reduce(param.grad)
                param.grad /= dist.get_world_size()
            for adamw in (optimizer, reference):
                adamw.step()
                adamw.zero_grad()
            for param, expected in zip(model.parameters(), twin.parameters(), strict=True):
                torch.testing.assert_close(param, expected, rtol=1e-5, atol=1e-6)


def _fail(grad: Tensor) -> None:
    raise RuntimeError("planned")


def test_gradients_from_before_an_error_count() -> None:
    run_ranks(2, check_broken_pass)


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
