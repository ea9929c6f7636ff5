"""The dtype in which gradients are averaged."""

from __future__ import annotations

import os
import pickle
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from dist_adamw import DistAdamW
from dist_adamw.optimizer import transport
from tests.distributed.test_attach import WORLDS, attach, constants
from tests.ranks import expect_error_on_all, run_ranks

BF16, FP32 = torch.bfloat16, torch.float32
TRANSPORTS = ("shared memory", "messages", "collectives")
WAYS: dict[str, dict[str, Any]] = {
    "ddp": {"ddp": True},
    "ddp, buckets": {"ddp": True, "aside": False},
    "plain": {},
    "every backward": {"reduce_every_backward": True},
}


def gradient_of(rank: int, seed: int, numel: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(100 * seed + rank)
    return torch.randn(numel, generator=generator).to(dtype)


class Dot(nn.Module):
    """A large and a small parameter, whose gradients are the inputs."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.large = nn.Parameter(torch.zeros(40_000, dtype=dtype))
        self.small = nn.Parameter(torch.zeros(300, dtype=dtype))

    def forward(self, seed: int) -> Tensor:
        rank, dtype = dist.get_rank(), self.large.dtype
        large, small = (gradient_of(rank, seed + n, p.numel(), dtype) for n, p in enumerate((self.large, self.small)))
        return (self.large * large).sum() + (self.small * small).sum()


def averages(
    way: dict[str, Any], by: str, dtype: torch.dtype, reduce_dtype: torch.dtype | None, accumulation: int = 1
) -> list[Tensor]:
    """Return whole averages, from an optimizer that has been pickled."""
    way = dict(way)
    is_ddp = way.pop("ddp", False)
    if by == "messages":
        os.environ["DIST_ADAMW_SHARED_MEMORY"] = "0"
    try:
        with constants(transport, **({"sends_from_host": lambda *_: False} if by == "collectives" else {})):
            torch.manual_seed(0)
            made = Dot(dtype)
            optimizer = DistAdamW(made.parameters(), lr=1e-3, bucket_numel=10_000, reduce_dtype=reduce_dtype)
            model, optimizer = pickle.loads(pickle.dumps((made, optimizer)))
            wrapped: Any = DistributedDataParallel(model, gradient_as_bucket_view=True) if is_ddp else model
            attach(optimizer, wrapped, **way)
            optimizer.step()
            for micro in range(accumulation):
                if micro < accumulation - 1:
                    with wrapped.no_sync():
                        wrapped(10 * micro).backward()
                else:
                    wrapped(10 * micro).backward()
            optimizer.gather_gradients()
            return [param.grad for param in model.parameters()]
    finally:
        os.environ.pop("DIST_ADAMW_SHARED_MEMORY", None)


def expected(dtype: torch.dtype, sent: torch.dtype, seed: int = 0) -> list[Tensor]:
    """Return averages in fp32 of gradients rounded to ``sent``, added in rank order, then rounded to ``dtype``."""
    size = dist.get_world_size()
    found = []
    for n, numel in enumerate((40_000, 300)):
        grads = [gradient_of(rank, seed + n, numel, dtype).to(sent).float() for rank in range(size)]
        total = grads[0]
        for grad in grads[1:]:
            total = total + grad
        found.append((total / size).to(dtype))
    return found


def check_average(way: dict[str, Any], by: str, dtype: torch.dtype, reduce_dtype: torch.dtype) -> None:
    sent = BF16
    for found, wanted in zip(averages(way, by, dtype, reduce_dtype), expected(dtype, sent), strict=True):
        assert found.dtype == dtype
        if by == "collectives":  # gloo's own sum has another order, and in bf16 other roundings
            torch.testing.assert_close(found, wanted, rtol=2**-6, atol=2**-6)
        else:
            assert torch.equal(found, wanted)


@pytest.mark.parametrize("by", TRANSPORTS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("world_size", WORLDS)
def test_gradients_are_averaged_in_the_dtype(world_size: int, way: str, by: str) -> None:
    run_ranks(world_size, check_average, WAYS[way], by, FP32, BF16)
    run_ranks(world_size, check_average, WAYS[way], by, BF16, FP32)


def errors_of_bf16() -> tuple[float, float]:
    """Return the relative errors of collectives in bf16, without the option and with it."""
    found = []
    exact = expected(torch.float64, BF16)[0]
    for reduce_dtype in (None, FP32):
        average = averages({}, "collectives", BF16, reduce_dtype)[0].double()
        found.append(float((average - exact).norm() / exact.norm()))
    return found[0], found[1]


def test_collectives_of_bf16_are_more_exact_in_fp32() -> None:
    for without, with_it in run_ranks(4, errors_of_bf16):
        assert with_it < 0.002  # 2 ** -9, one rounding
        assert without > 1.2 * with_it


def check_replicas(reduce_dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    dtype = FP32 if reduce_dtype == BF16 else BF16
    model = Dot(dtype)
    mesh = init_device_mesh("cpu", (2, 2))
    optimizer = DistAdamW(model.parameters(), lr=1e-3, mesh=mesh, reduce_dtype=reduce_dtype)
    optimizer.attach(model)
    model(0).backward()
    optimizer.gather_gradients()
    for param, wanted in zip(model.parameters(), expected(dtype, BF16), strict=True):
        assert param.grad is not None
        torch.testing.assert_close(param.grad, wanted, rtol=2**-7, atol=1e-6)  # sums of two, then of two


@pytest.mark.parametrize("reduce_dtype", [FP32, BF16])
def test_with_replicas(reduce_dtype: torch.dtype) -> None:
    run_ranks(4, check_replicas, reduce_dtype)


# ---------------------------------------------------------------- where it would change nothing


def check_unattached() -> None:
    model = Dot(FP32)
    optimizer = DistAdamW(model.parameters(), reduce_dtype=BF16)
    model(0).backward()
    optimizer.step()


def check_engine() -> None:
    model = nn.Linear(8, 8)
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer = DistAdamW(model.parameters(), reduce_dtype=BF16)
    model(torch.ones(2, 8)).sum().backward()
    optimizer.step()


def test_gradients_that_others_average_are_refused() -> None:
    for error in expect_error_on_all(2, check_unattached):
        assert "reduce_dtype=torch.bfloat16" in error
        assert "nothing is attached" in error
    for error in expect_error_on_all(2, check_engine):
        assert "MixedPrecisionPolicy" in error


def test_one_process_averages_nothing() -> None:
    model = nn.Linear(4, 4)
    optimizer = DistAdamW(model.parameters(), reduce_dtype=BF16)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    assert optimizer.updates == 1
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.reduce_dtype == BF16


@pytest.mark.parametrize("value", [torch.float64, "bf16"])
def test_other_dtypes_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="reduce_dtype must be"):
        DistAdamW(nn.Linear(2, 2).parameters(), reduce_dtype=value)
