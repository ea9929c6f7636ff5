"""The same bits under FSDP2 on any number of ranks as in one process without it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from dist_adamw import DistAdamW
from tests.distributed.test_reproducible import CASES, UPDATES, K, Model, digest, in_one_process, loss_of
from tests.ranks import run_ranks


def sharded(wrapping: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """Return the model of `test_reproducible`; its layers have rows that no number of ranks divides."""
    model = Model(dtype)
    if wrapping == "layers":
        for layer in (model.embedding, *model.layers):
            if next(layer.parameters(), None) is not None:
                fully_shard(layer, **options)
    fully_shard(model, **options)
    return model


def whole(model: nn.Module) -> nn.Module:
    """Return a copy of ``model`` that is not sharded."""
    first = next(model.parameters())
    copy = Model(first.dtype)
    for ours, theirs in zip(copy.parameters(), model.parameters(), strict=True):
        full: Any = theirs.detach()
        ours.data = full.full_tensor()
    return copy


def train(wrapping: str, options: dict[str, Any], dtype: torch.dtype = torch.float32, **more: Any) -> list[str]:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model = sharded(wrapping, dtype, **more)
    optimizer = DistAdamW(model.parameters(), 1e-2, weight_decay=0.1, **options)
    optimizer.attach(model)
    digests = []
    for update in range(UPDATES):
        for j in range(K // ranks):
            loss_of(model, update, j * ranks + rank).backward()
        optimizer.step()
        optimizer.zero_grad()
        digests.append(digest(whole(model)))
    return digests


@pytest.mark.parametrize("wrapping", ["root", "layers"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6, 8])
def test_one_digest_for_every_number_of_ranks(ranks: int, case: str, wrapping: str) -> None:
    options, dtype = CASES[case]
    assert run_ranks(ranks, train, wrapping, options, dtype) == [in_one_process(options, dtype)] * ranks
