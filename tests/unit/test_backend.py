"""Which backend of a process group sends the parameters: that of their device, not the group's name."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dist_adamw import DistAdamW
from dist_adamw.ranks.collectives import backend_of

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def rank_of(rank: int, store: str) -> None:
    """Run one of two ranks of a group that was initialised without a backend; print how it sends, and a weight."""
    dist.init_process_group(init_method=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    group = dist.group.WORLD
    assert group is not None
    assert dist.get_backend() != "gloo"
    torch.manual_seed(0)
    model = nn.Linear(64, 32)
    optimizer = DistAdamW(model.parameters(), lr=0.1)
    optimizer.attach(model)
    for update in range(2):
        model(torch.full((4, 64), 1.0 + rank + update)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    transport = type(optimizer.shards[0].transport).__name__
    weights = sum(float(param.double().sum()) for param in model.parameters())
    print(backend_of(group, CPU), repr(backend_of(group, torch.device("mps"))), transport, repr(weights))
    dist.destroy_process_group()


def test_a_group_without_a_named_backend_sends_from_the_host_by_messages(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    store = f"file://{tmp_path}/rendezvous"
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.unit.test_backend", str(rank), store],
            env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        found = [rank.communicate(timeout=100) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], found
    said = [out.splitlines()[-1] for out, _ in found]
    assert said[0] == said[1]
    assert said[0].startswith("gloo '' SharedMemoryTransport "), said


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: torch.cuda.is_available() is False")
def test_each_device_has_its_own(tmp_path: Path) -> None:
    dist.init_process_group(init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        group = dist.group.WORLD
        assert group is not None
        assert [backend_of(group, torch.device(kind)) for kind in ("cpu", "cuda")] == ["gloo", "nccl"]
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    rank_of(int(sys.argv[1]), sys.argv[2])
