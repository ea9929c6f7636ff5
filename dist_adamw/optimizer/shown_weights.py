"""What shows other weights in a model for a while: its buffers are kept, and FSDP2 forgets unsharded copies."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import TracebackType

import torch
from torch import Tensor, nn

from dist_adamw.optimizer.gradients.fsdp_groups import fsdp_modules
from dist_adamw.optimizer.sharding.shard import Shard

# Writes, for each parameter of each shard, what the function in its argument returns: this rank's elements, 1-D.
WeightsOf = Callable[[Callable[[Shard, int], Tensor]], None]


class KeptBuffers:
    """Restore the buffers of modules at the end of a block, in place. Local."""

    def __init__(self, models: Iterable[nn.Module]) -> None:
        self._buffers = [buffer for model in models for buffer in model.buffers()]

    def __enter__(self) -> None:
        self._before = [buffer.detach().clone() for buffer in self._buffers]

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with torch.no_grad():
            for buffer, before in zip(self._buffers, self._before, strict=True):
                buffer.copy_(before)


def reshard(models: Iterable[nn.Module]) -> None:
    """Have FSDP2 drop the whole weights that it keeps after a forward pass without a backward pass. Local.

    Until then they are the modules' parameters, in place of those that the optimizer updates.
    """
    for model in models:
        for module in fsdp_modules(model):
            module.reshard()
