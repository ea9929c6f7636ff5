"""Let engines allocate and send on CPUs as they do on GPUs, and count what they send.

DistAdamW sends by the backend's collectives, and DDP's reducer fills its buckets. gloo's own reduce-scatter and
all-gather allocate copies, which NCCL's do not: they are done by collectives in place here, with the same results.
FSDP2 copies gradients to its bucket as CUDA's kernel does, without padding each of them first.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp._fully_shard import _fsdp_collectives

from dist_adamw.optimizer import transport
from dist_adamw.optimizer.gradients import ddp
from dist_adamw.optimizer.sharding import shard
from dist_adamw.optimizer.transport.tree_sum import TreeSum


class _Done:
    """A transfer that is over."""

    def wait(self) -> None:
        """Do nothing."""


def _reduce_scatter(output: Tensor, input: Tensor, op: Any = None, group: Any = None, async_op: bool = False) -> Any:
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    dist.all_reduce(input, group=group)
    own = input.view(-1).chunk(size)[rank].view_as(output)
    if op == dist.ReduceOp.AVG:
        own.div_(size)
    if own.data_ptr() != output.data_ptr():
        output.copy_(own)
    return _Done() if async_op else None


def _all_gather(output: Tensor, input: Tensor, group: Any = None, async_op: bool = False) -> Any:
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    chunks = output.view(-1).view(torch.uint8).chunk(size)
    if chunks[rank].data_ptr() != input.data_ptr():
        chunks[rank].copy_(input.view(-1).view(torch.uint8))
    for source, chunk in enumerate(chunks):
        dist.broadcast(chunk, group=group, group_src=source)
    return _Done() if async_op else None


def _copy_in(gradients: list[Tensor], output: Tensor, ranks: int) -> None:
    """Fill the input of FSDP2's reduce-scatter as CUDA's kernel does; the CPU's pads a copy of each gradient first."""
    rows, start = output.view(ranks, -1).zero_(), 0
    for gradient in gradients:
        chunk = -(-gradient.size(0) // ranks)
        stop = start + chunk * gradient[0].numel()
        for rank, part in enumerate(gradient.split(chunk)):
            rows[rank, start : start + part.numel()].copy_(part.reshape(-1))
        start = stop


_make_sum = TreeSum.__init__


def _with_whole_blocks(self: TreeSum, numel: int, **options: Any) -> None:
    _make_sum(self, numel, **options)
    self._block = max(numel, 1)


class Counting:
    """Bytes that this rank sends, by collective; with ``in_place`` in place of those that copy."""

    def __init__(self) -> None:
        self.sent: Counter[str] = Counter()
        self._depth = 0
        self._size = dist.get_world_size() if dist.is_initialized() else 1
        self.scatter = self._counting("reduce-scatter", _reduce_scatter, 1)
        self.gather = self._counting("all-gather", _all_gather, 0)
        self.all_reduce = self._counting("all-reduce", dist.all_reduce, 0, times=2)
        self.all_to_all = self._counting("all-to-all", dist.all_to_all_single, 0)

    def _counting(self, name: str, function: Callable[..., Any], place: int, *, times: int = 1) -> Any:
        def called(*args: Any, **kwargs: Any) -> Any:
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            named = kwargs.get(("output", "input")[place])
            if named is None:
                named = kwargs.get(("output_tensor", "input_tensor")[place])
            tensor = tensors[place] if named is None else named
            if self._depth == 0:
                self.sent[name] += times * tensor.nbytes * (self._size - 1) // self._size
            self._depth += 1
            try:
                return function(*args, **{key.removesuffix("_tensor"): value for key, value in kwargs.items()})
            finally:
                self._depth -= 1

        return called

    @contextlib.contextmanager
    def as_on_gpus(self) -> Iterator[None]:
        """Let DistAdamW, DDP and FSDP2 send as on GPUs."""
        with contextlib.ExitStack() as stack:
            for module in (transport, shard):
                stack.enter_context(mock.patch.object(module, "sends_from_host", return_value=False))
            stack.enter_context(mock.patch.object(ddp, "_ASIDE", frozenset()))
            stack.enter_context(mock.patch.object(dist, "all_reduce", self.all_reduce))
            stack.enter_context(mock.patch.object(dist, "all_to_all_single", self.all_to_all))
            stack.enter_context(mock.patch.object(_fsdp_collectives, "foreach_reduce_scatter_copy_in", _copy_in))
            stack.enter_context(mock.patch.object(TreeSum, "__init__", _with_whole_blocks))
            for name in filter(lambda name: hasattr(dist, name), ("reduce_scatter_single", "reduce_scatter_tensor")):
                stack.enter_context(mock.patch.object(dist, name, self.scatter))
            for name in filter(lambda name: hasattr(dist, name), ("all_gather_single", "all_gather_into_tensor")):
                stack.enter_context(mock.patch.object(dist, name, self.gather))
            yield
