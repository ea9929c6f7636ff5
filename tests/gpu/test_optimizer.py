"""DistAdamW on a CUDA device: torch's bits, masters, and a training step in which the host never waits."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from dist_adamw import CyclicLRWithRestarts, DistAdamW

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: torch.cuda.is_available() is False"),
]


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(65, 129), nn.GELU(), nn.Linear(129, 7)).to("cuda", dtype)


def backward(model: nn.Module, seed: int) -> None:
    x = torch.randn(16, 65, generator=torch.Generator().manual_seed(seed)).to("cuda", next(model.parameters()).dtype)
    model(x).float().square().mean().backward()


@pytest.mark.parametrize("options", [{}, {"eps": 0.1}, {"amsgrad": True}])
def test_same_bits_as_torch(options: dict[str, Any]) -> None:
    ours, theirs = network(), network()
    optimizer = DistAdamW(ours.parameters(), **options)
    reference = torch.optim.AdamW(theirs.parameters(), fused=True, **options)
    for step in range(20):
        for model, o in ((ours, optimizer), (theirs, reference)):
            backward(model, step)
            o.step()
            o.zero_grad()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("master_dtype", [torch.float32, torch.int16])
def test_masters_follow_fp32_training(master_dtype: torch.dtype) -> None:
    model = network(torch.bfloat16)
    weights = [nn.Parameter(p.detach().float()) for p in model.parameters()]
    optimizer = DistAdamW(model.parameters(), master_dtype=master_dtype, max_grad_norm=0.1)
    reference = torch.optim.AdamW(weights, fused=True)
    for step in range(20):
        backward(copy_of := copy.deepcopy(model), step)
        for weight, p in zip(weights, copy_of.parameters(), strict=True):
            assert p.grad is not None
            weight.grad = p.grad.float()
        torch.nn.utils.clip_grad_norm_(weights, 0.1)
        reference.step()
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
    for p, weight in zip(model.parameters(), weights, strict=True):
        torch.testing.assert_close(p.float(), weight.detach(), rtol=2**-7, atol=1e-5)


@pytest.mark.parametrize("master_dtype", [None, torch.float32, torch.int16])
def test_a_training_step_never_waits_for_the_device(master_dtype: torch.dtype | None) -> None:
    model = network(torch.float32 if master_dtype is None else torch.bfloat16)
    optimizer = DistAdamW(model.parameters(), master_dtype=master_dtype, max_grad_norm=1.0)
    scheduler = CyclicLRWithRestarts(optimizer, 16, 100, restart_period=2)
    x = torch.randn(16, 65, device="cuda", dtype=next(model.parameters()).dtype)

    def update() -> None:
        model(x).float().square().mean().backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()

    update()  # lays out, and compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            update()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert optimizer.updates == 4
    assert scheduler.samples == 64


def test_a_skipped_update_holds_the_schedule() -> None:
    param = nn.Parameter(torch.ones(1000, device="cuda"))
    optimizer = DistAdamW([param], max_grad_norm=1.0)
    scheduler = CyclicLRWithRestarts(optimizer, 16, 100, restart_period=2)
    for step in range(6):
        param.grad = torch.full_like(param, float("nan") if step in (1, 4) else 1.0)
        optimizer.step()
        scheduler.step()
    assert scheduler.state_dict()["samples"] == 4 * 16
    assert optimizer.updates == 4


@pytest.mark.parametrize("master_dtype", [None, torch.float32, torch.int16])
def test_a_captured_step_is_the_step(master_dtype: torch.dtype | None) -> None:
    """Replays take new gradients and a new lr, skip an overflow, and are counted afterwards."""
    dtype = torch.float32 if master_dtype is None else torch.bfloat16
    models = [network(dtype), network(dtype)]
    options: dict[str, Any] = {"master_dtype": master_dtype, "max_grad_norm": 0.5}
    captured, plain = (
        DistAdamW(model.parameters(), lr=torch.tensor(1e-2, device="cuda"), **options) for model in models
    )
    generator = torch.Generator("cuda").manual_seed(1)
    for model in models:
        for p in model.parameters():
            p.grad = torch.ones_like(p)
    for optimizer in (captured, plain):
        optimizer.step()  # lays out, and compiles
        assert optimizer.updates == 1
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    assert captured.updates == 1
    for step in range(5):
        for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
            assert p.grad is not None
            assert q.grad is not None
            p.grad.normal_(generator=generator)
            if step == 2:
                p.grad.view(-1)[0] = float("inf")
            q.grad.copy_(p.grad)
        for optimizer in (captured, plain):
            optimizer.param_groups[0]["lr"].fill_(1e-2 / (1 + step))
        graph.replay()
        plain.step()
    captured.recount()
    assert captured.updates == plain.updates == 5
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(p, q)


def test_capturing_waits_until_the_last_update_is_known() -> None:
    param = nn.Parameter(torch.ones(1000, device="cuda"))
    param.grad = torch.ones_like(param)
    optimizer = DistAdamW([param], max_grad_norm=1.0)
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"Read optimizer\.updates"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()
    assert optimizer.updates == 1
