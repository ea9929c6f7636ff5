"""A model under DistAdamW beside a twin under DDP and torch's AdamW, for tests of gradient memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dist_adamw import DistAdamW
from dist_adamw.optimizer.gradients import sources
from dist_adamw.optimizer.transport import gloo


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
