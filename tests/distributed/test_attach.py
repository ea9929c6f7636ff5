"""Gradients reduced to their owners: the bits of whole averages, in every way that it can be done."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from dist_adamw import DistAdamW
from tests.distributed.test_optimizer import Network
from tests.ranks import expect_error_on_all, run_ranks

WORLDS = [1, 2, 3, 4]
WAYS: dict[str, dict[str, Any]] = {
    "ddp": {"ddp": True},
    "ddp, no overlap": {"ddp": True, "overlap": False},
    "ddp, own buffers": {"ddp": True, "view": False},
    "plain": {},
    "plain, no overlap": {"overlap": False},
    "every backward": {"reduce_every_backward": True},
    "every backward, no overlap": {"reduce_every_backward": True, "overlap": False},
}


def loss_of(model: nn.Module, step: int) -> Tensor:
    """On data that differ by rank and micro-batch."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return model(torch.randn(4, 3, 8, 8, generator=generator)).square().mean()  # type: ignore[no-any-return]


def averaged(grads: list[Tensor | None]) -> list[Tensor | None]:
    """The average over ranks, added in rank order; None where no rank has a gradient."""
    size = dist.get_world_size()
    all_grads: list[Any] = [None] * size
    dist.all_gather_object(all_grads, grads)
    result: list[Tensor | None] = []
    for column in zip(*all_grads, strict=True):
        if all(grad is None for grad in column):
            result.append(None)
            continue
        like = next(grad for grad in column if grad is not None)
        total = torch.zeros_like(like)
        for grad in column:
            total += torch.zeros_like(like) if grad is None else grad
        result.append(total / size)
    return result


class Job:
    """A model trained by DistAdamW, and a twin trained by torch.optim.AdamW that is fed the same averages."""

    def __init__(self, way: dict[str, Any], options: dict[str, Any] | None = None, model: nn.Module | None = None) -> None:
        way = dict(way)
        self.model = Network() if model is None else model
        self.twin = copy.deepcopy(self.model)
        self.wrapped: Any = self.model
        if way.pop("ddp", False):
            self.wrapped = DistributedDataParallel(
                self.model, find_unused_parameters=True, gradient_as_bucket_view=way.pop("view", True)
            )
        options = options or {}
        self.optimizer = DistAdamW(self.model.parameters(), lr=1e-2, bucket_numel=1000, **options)
        theirs = {k: v for k, v in options.items() if k in ("eps", "amsgrad", "maximize")}
        self.reference = torch.optim.AdamW(self.twin.parameters(), lr=1e-2, fused=True, **theirs)
        self.every = way.get("reduce_every_backward", False)
        self.optimizer.attach(self.wrapped, **way)

    def train(self, steps: range, accumulation: int = 1) -> None:
        for step in steps:
            self.accumulate(step, accumulation)
            self.update()

    def accumulate(self, step: int, accumulation: int) -> None:
        for micro in range(accumulation):
            last = micro == accumulation - 1
            no_sync = getattr(self.wrapped, "no_sync", contextlib.nullcontext)
            with contextlib.nullcontext() if last else no_sync():
                loss_of(self.wrapped, 10 * step + micro).backward()
            self.twin_backward(10 * step + micro, last=last)

    def twin_backward(self, seed: int, *, last: bool) -> None:
        """Into the shard, every micro-batch is averaged; else their sum is."""
        params = list(self.twin.parameters())
        if self.every:
            kept = [p.grad for p in params]
            for p in params:
                p.grad = None
            loss_of(self.twin, seed).backward()
            for p, before, now in zip(params, kept, averaged([p.grad for p in params]), strict=True):
                p.grad = now if before is None else before if now is None else before + now
            return
        loss_of(self.twin, seed).backward()
        if last:
            for p, average in zip(params, averaged([p.grad for p in params]), strict=True):
                p.grad = average

    def update(self) -> None:
        self.optimizer.step()
        self.reference.step()
        self.optimizer.zero_grad()
        self.reference.zero_grad()

    def check(self) -> None:
        for (name, p), q in zip(self.model.named_parameters(), self.twin.parameters(), strict=True):
            assert torch.equal(p, q), f"{name} differs by {(p - q).abs().max()}"


def check_same_bits(way: dict[str, Any], accumulation: int, options: dict[str, Any]) -> None:
    job = Job(way, options)
    job.train(range(50), accumulation)
    job.check()


@pytest.mark.parametrize("options", [{}, {"eps": 0.1}], ids=["eps 1e-8", "eps 0.1"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("world_size", WORLDS)
def test_same_bits_as_unsharded_adamw_fed_the_averages(world_size: int, way: str, options: dict[str, Any]) -> None:
    run_ranks(world_size, check_same_bits, WAYS[way], 2, options)
