"""The same bits on any number of ranks: hashes of the weights after every update."""

from __future__ import annotations

import hashlib
import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dist_adamw import DistAdamW
from dist_adamw.optimizer import transport
from tests.distributed.test_attach import constants
from tests.ranks import run_ranks

K = 24  # micro-batches of an update
UPDATES = 3


class Model(nn.Module):
    """Large and small parameters, one of them not used in every micro-batch."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(300, 97, dtype=dtype)
        self.layers = nn.Sequential(
            nn.Linear(97, 181, dtype=dtype), nn.LayerNorm(181, dtype=dtype), nn.GELU(), nn.Linear(181, 300, dtype=dtype)
        )
        self.scale = nn.Parameter(torch.ones(3, dtype=dtype))

    def forward(self, tokens: Tensor, scaled: bool) -> Tensor:
        x: Tensor = self.layers(self.embedding(tokens))
        return x * self.scale[0] if scaled else x


def loss_of(model: nn.Module, update: int, number: int) -> Tensor:
    """Return the loss of micro-batch ``number`` of an update."""
    generator = torch.Generator().manual_seed(1000 * update + number)
    tokens = torch.randint(0, 300, (4, 9), generator=generator)
    logits = model(tokens[:, :-1], number % 5 == 0)
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def digest(model: nn.Module) -> str:
    sums = hashlib.sha256()
    for param in model.parameters():
        sums.update(param.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return sums.hexdigest()[:16]


def train(
    way: str, options: dict[str, Any], dtype: torch.dtype = torch.float32, by: str = "shared memory"
) -> list[str]:
    """Train for some updates of K micro-batches; return a digest of the weights after each."""
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if by == "messages":
        os.environ["DIST_ADAMW_SHARED_MEMORY"] = "0"
    try:
        with constants(transport, **({"sends_from_host": lambda *_: False} if by == "collectives" else {})):
            model: nn.Module = Model(dtype)
            if way == "ddp":
                model = DistributedDataParallel(model, gradient_as_bucket_view=True, find_unused_parameters=True)
            optimizer = DistAdamW(model.parameters(), 1e-2, weight_decay=0.1, **options)
            optimizer.attach(model)
            digests = []
            for update in range(UPDATES):
                for j in range(-(-K // ranks)):
                    if j * ranks + rank < K:
                        loss_of(model, update, j * ranks + rank).backward()
                    else:
                        optimizer.join_backward()
                optimizer.step()
                optimizer.zero_grad()
                digests.append(digest(model))
            return digests
    finally:
        os.environ.pop("DIST_ADAMW_SHARED_MEMORY", None)


def in_one_process(options: dict[str, Any], dtype: torch.dtype = torch.float32) -> list[str]:
    return run_ranks(1, train, "plain", options, dtype)[0]


BF16: dict[str, Any] = {"reproducible": True, "master_dtype": torch.float32, "max_grad_norm": 0.5}
CASES: dict[str, tuple[dict[str, Any], torch.dtype]] = {
    "fp32": ({"reproducible": True}, torch.float32),
    "fp32, clipped": ({"reproducible": True, "max_grad_norm": 0.5}, torch.float32),
    "bf16, clipped": (BF16, torch.bfloat16),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("ranks", [2, 3, 4, 5, 6, 7, 8])
def test_one_digest_for_every_number_of_ranks(ranks: int, case: str) -> None:
    options, dtype = CASES[case]
    expected = in_one_process(options, dtype)
    assert len(set(expected)) == UPDATES
    assert run_ranks(ranks, train, "plain", options, dtype) == [expected] * ranks


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("by", ["messages", "collectives"])
def test_one_digest_for_every_transport(by: str, ranks: int) -> None:
    options, dtype = CASES["bf16, clipped"]
    assert run_ranks(ranks, train, "plain", options, dtype, by) == [in_one_process(options, dtype)] * ranks


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_one_digest_with_ddp(ranks: int, case: str) -> None:
    options, dtype = CASES[case]
    assert run_ranks(ranks, train, "ddp", options, dtype) == [in_one_process(options, dtype)] * ranks
