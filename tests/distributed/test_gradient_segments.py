"""Segments: large gradients are sent from where autograd has put them, small ones together from the shard's memory."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dist_adamw import DistAdamW
from tests.gradient_pair import WAYS, Pair, backward, large_from, lent, model_of
from tests.ranks import run_ranks


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


def check_no_copies() -> None:
    """Buckets that have only large gradients take no memory for copies of small ones."""
    with large_from(1000):
        model = nn.Sequential(*[nn.Linear(40, 40, bias=False) for _ in range(3)])
        optimizer = DistAdamW(model.parameters())
        optimizer.attach(model, reduce_every_backward=True)
        for step in range(2):
            backward(model, step)
            optimizer.step()
        (shard,) = optimizer.shards
        packer = shard.gradients._made_packer
        assert packer is not None
        assert len(packer.large) == 3
        assert packer._lent == []


def test_large_gradients_alone_take_no_memory_for_copies() -> None:
    run_ranks(2, check_no_copies)


def check_missing_on_one_rank() -> None:
    """A large gradient that one rank lacks counts as zeros there."""
    with large_from(1000):
        model = nn.ModuleList(nn.Linear(40, 40, bias=False) for _ in range(2))
        twin = nn.ModuleList(nn.Linear(40, 40, bias=False) for _ in range(2))
        twin.load_state_dict(model.state_dict())
        optimizer = DistAdamW(model.parameters(), lr=1e-2, eps=0.1)
        reference = torch.optim.AdamW(twin.parameters(), lr=1e-2, eps=0.1)
        optimizer.attach(model, reduce_every_backward=True)
        layers = 2 if dist.get_rank() == 0 else 1
        for modules in (model, twin):
            sum(layer(torch.ones(2, 40)).square().sum() for layer in list(modules)[:layers]).backward()
        for param in twin.parameters():
            grad = torch.zeros_like(param) if param.grad is None else param.grad
            dist.all_reduce(grad)
            param.grad = grad / 2
        optimizer.step()
        reference.step()
        for param, expected in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(param, expected, rtol=1e-5, atol=1e-6)


def test_a_large_gradient_that_one_rank_lacks_counts_as_zeros() -> None:
    run_ranks(2, check_missing_on_one_rank)


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
