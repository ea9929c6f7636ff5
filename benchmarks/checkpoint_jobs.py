"""Jobs whose checkpoints are measured: a model in training, on each engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from benchmarks.groups import RECIPE
from benchmarks.workloads import CONSTANT, Workload
from dist_adamw import DistAdamW
from dist_adamw.optimizer.sharding.dtensors import local_of
from launch.gpt import GPT, ModelConfig, next_byte_losses

WIDTH, CONTEXT = 512, 64


@dataclass
class Job:
    """A model in training: the same weights and different samples on every rank."""

    module: Any
    optimizer: Any
    loss: Callable[[], Tensor]

    def update(self) -> None:
        """Collective."""
        self.optimizer.zero_grad()
        self.loss().backward()
        self.optimizer.step()

    def locals(self) -> Iterator[Tensor]:
        """Return the local part of the weights."""
        for param in self.module.parameters():
            yield local_of(param).detach()


def build(workload: str, params: int, wrap: str, make: Callable[[Any], Optimizer], rank: int) -> Job:
    """Create a job whose model is wrapped by ``wrap``. Collective."""
    torch.manual_seed(0)
    model: Any
    if workload == "gpt":
        layers = max(1, round(params / (12 * WIDTH**2)))
        model = GPT(ModelConfig(layers=layers, heads=8, width=WIDTH, context=CONTEXT))
        blocks = model.blocks
    else:
        model = Workload.named(workload, rank=rank, gradients=CONSTANT).model()
        blocks = model.layers
    module: nn.Module = model
    if wrap == "DDP":
        module = DistributedDataParallel(model, gradient_as_bucket_view=True)
    elif wrap == "FSDP2":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for block in blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    windows = torch.randint(256, (1, CONTEXT + 1), generator=torch.Generator().manual_seed(1 + rank))

    def loss() -> Tensor:
        return next_byte_losses(module, windows).mean() if workload == "gpt" else module(torch.zeros(()))

    optimizer = make(model)
    if isinstance(optimizer, DistAdamW) and wrap != "FSDP2":
        optimizer.attach(module)
    return Job(module, optimizer, loss)


def make_dist_adamw(model: nn.Module) -> Optimizer:
    return DistAdamW(model.parameters(), **RECIPE)
