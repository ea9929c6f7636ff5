"""How many messages an update sends under prepare: one of 64 bytes, with any number of groups."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader

from dist_adamw import CyclicLRWithRestarts, prepare
from tests.distributed.jobs import data
from tests.ranks import run_ranks


def messages(num_groups: int, ours: bool) -> tuple[list[int], int]:
    """Return the bytes of the all-reduces that are not DDP's, in four updates, and the clock."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 1))
    params = [*model.parameters()]
    optimizer = torch.optim.AdamW([{"params": params[i::num_groups], "lr": 1e-3 * (i + 1)} for i in range(num_groups)])
    scheduler: Any = CyclicLRWithRestarts(optimizer) if ours else torch.optim.lr_scheduler.StepLR(optimizer, 3)
    accelerator, loader = Accelerator(cpu=True), DataLoader(data(48), batch_size=4)
    prepared = prepare(accelerator, model, optimizer, loader, scheduler, check_weights_every=0)
    model, optimizer, loader, scheduler = prepared
    sent: list[int] = []
    all_reduce = dist.all_reduce

    def counted(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sent.append(tensor.nbytes)
        return all_reduce(tensor, *args, **kwargs)

    for n, (x, y) in enumerate(loader):
        if n == 2:  # the first update compares options
            dist.all_reduce = counted
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    dist.all_reduce = all_reduce
    return sent, scheduler.samples if ours else 0


@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize("num_groups", [1, 8])
def test_an_update_sends_one_small_message(num_groups: int, ours: bool) -> None:
    for sent, samples in run_ranks(2, messages, num_groups, ours):
        assert sent == [64] * 4
        assert samples == (48 if ours else 0)
