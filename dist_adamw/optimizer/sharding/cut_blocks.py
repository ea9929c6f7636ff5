"""Put blocks of gradients together that FSDP2 has cut, for a sum of squares whose bits do not depend on the cuts.

`exact_squares` adds squares within blocks of 32 elements of the whole parameter. A block belongs to the rank that has
its first element; the others send theirs, at most 31 elements of each parameter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dist_adamw.optimizer.kernels.exact_squares import BLOCK
from dist_adamw.optimizer.sharding.cuts import Cut, cut_of
from dist_adamw.optimizer.sharding.dtensors import is_dtensor, local_gradient, local_of
from dist_adamw.optimizer.sharding.memory_order import check_dense, storage_order


class _Own(NamedTuple):
    """This rank's elements of a parameter: ``[0, head)`` are in another rank's block, the last block is at ``tail``."""

    head: int
    tail: int
    numel: int


class CutBlocks:
    """The blocks of parameters that are cut by rows, all of one dtype and mesh. Local to build.

    Args:
        params: DTensors, the same on every rank.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        first = params[0]
        assert is_dtensor(first)
        self._params, self._group = params, first.device_mesh.get_group()
        ranks = first.device_mesh.size()
        cuts = list(map(cut_of, params))
        self._own = [_own(cut) for cut in cuts]
        self._sent: list[list[int]] = [[] for _ in range(ranks)]  # for each rank, the parameters whose head it gets
        received: list[list[range]] = [[] for _ in range(ranks)]  # from each, places in the blocks of this rank
        self._blocks = 0
        for i, (cut, own) in enumerate(zip(cuts, self._own, strict=True)):
            if own.head:
                self._sent[cut.start // BLOCK * BLOCK // cut.chunk].append(i)
            if own.tail < own.numel:
                block = (cut.start + own.tail) // BLOCK * BLOCK
                for rank, start, stop in cut.following(min(block + BLOCK, cut.numel)):
                    place = self._blocks * BLOCK + start - block
                    received[rank].append(range(place, place + stop - start))
                self._blocks += 1
        self._received = [sum(map(len, places)) for places in received]
        places = [place for of_rank in received for run in of_rank for place in run]
        self._places = torch.tensor(places, dtype=torch.int64)

    def gradients(self) -> list[Tensor]:
        """Return the gradients of the blocks that belong to this rank, 1-D. Collective.

        Each begins at a multiple of `BLOCK` elements of its parameter, and ends at one or at the parameter's end, with
        zeros after it. Every rank must have gradients of the same parameters.
        """
        local = list(map(_flat_gradient, self._params))
        runs = [grad[own.head : own.tail] for grad, own in zip(local, self._own, strict=True) if grad is not None]
        return [
            *runs,
            self._cut_blocks([_zeros(p) if g is None else g for g, p in zip(local, self._params, strict=True)]),
        ]

    def _cut_blocks(self, local: list[Tensor]) -> Tensor:
        like = local[0]
        heads = [[local[i][: self._own[i].head] for i in of_rank] for of_rank in self._sent]
        sent = torch.cat([like[:0], *(head for of_rank in heads for head in of_rank)])
        received = like.new_empty(sum(self._received))
        size = like.dtype.itemsize
        dist.all_to_all_single(
            received.view(torch.uint8),
            sent.view(torch.uint8),
            [numel * size for numel in self._received],
            [sum(map(Tensor.numel, of_rank)) * size for of_rank in heads],
            group=self._group,
        )
        blocks = like.new_zeros(self._blocks * BLOCK)
        tails = [grad[own.tail :] for grad, own in zip(local, self._own, strict=True) if own.tail < own.numel]
        if tails:
            inner = [block[: tail.numel()] for block, tail in zip(torch.split(blocks, BLOCK), tails, strict=True)]
            torch._foreach_copy_(inner, tails)
        self._places = self._places.to(like.device)
        blocks[self._places] = received
        return blocks


def _own(cut: Cut) -> _Own:
    start, stop = cut.start, cut.stop
    head = min(-(-start // BLOCK) * BLOCK, stop)
    tail = stop if stop == cut.numel else max(stop // BLOCK * BLOCK, head)
    return _Own(head - start, tail - start, stop - start)


def _flat_gradient(param: Tensor) -> Tensor | None:
    if param.grad is None:
        return None
    grad = local_gradient(param.grad, param)
    check_dense(grad)
    return storage_order(grad, like=local_of(param))


def _zeros(param: Tensor) -> Tensor:
    return torch.zeros_like(local_of(param)).flatten()
