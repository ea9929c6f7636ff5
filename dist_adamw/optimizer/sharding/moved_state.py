"""Move optimizer state from shards to the shards that replace them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from dist_adamw.optimizer.sharding.shard import Shard
from dist_adamw.optimizer.transport.layout import FlatLayout

CHUNK_NUMEL = 1 << 23  # elements of whole parameters that are put together at a time


def carry_state(old: Sequence[Shard], new: Sequence[Shard]) -> None:
    """Give the shards ``new`` the state that their parameters have in ``old``. Collective over the old shards' ranks.

    As many elements of whole parameters are in memory at a time as fit `CHUNK_NUMEL`, or one parameter.
    """
    targets = {id(param): (shard, j) for shard in new for j, param in enumerate(shard.params)}
    for shard in old:
        moved = [(i, *targets[id(param)]) for i, param in enumerate(shard.params) if id(param) in targets]
        for i, target, j in moved:
            target.steps[j] = shard.steps[i]
        for name in shard.moments:
            for (i, target, j), flat in _whole(shard, moved, [shard.owned_moment(i, name) for i, *_ in moved]):
                if name in target.moments:
                    target.fill(j, name, reorder(flat, shard, i, target, j))


def reorder(flat: Tensor, shard: Shard, i: int, target: Shard, j: int) -> Tensor:
    """A parameter's elements in the order of its memory in ``shard``, brought to that in ``target``. Local."""
    if shard.order.of(i) == target.order.of(j):
        return flat
    return target.order.flatten(j, shard.order.unflatten(i, flat))


Move = tuple[int, Shard, int]


def _whole(shard: Shard, moved: Sequence[Move], values: Sequence[Tensor]) -> Iterator[tuple[Move, Tensor]]:
    """All elements of some parameters of ``shard``, 1-D, of which every rank has its own in ``values``. Collective."""
    if shard.process_group is None:
        yield from zip(moved, values, strict=True)
        return
    ranges = [shard.layout.ranges(rank) for rank in range(shard.layout.world_size)]
    for members in _chunks(shard.layout, [i for i, *_ in moved]):
        wholes = [values[n].new_empty(shard.layout.numels[moved[n][0]]) for n in members]
        for rank, of_rank in enumerate(ranges):
            runs = [
                whole[start:stop]
                for n, whole in zip(members, wholes, strict=True)
                for start, stop in of_rank[moved[n][0]]
            ]
            if not runs:
                continue
            sent = torch.cat([values[n] for n in members]) if rank == shard.rank else torch.cat(runs)
            # As bytes: gloo has no int16, which remainders are.
            dist.broadcast(
                sent.view(torch.uint8), src=dist.get_global_rank(shard.process_group, rank), group=shard.process_group
            )
            torch._foreach_copy_(runs, list(torch.split(sent, [run.numel() for run in runs])))
        yield from zip([moved[n] for n in members], wholes, strict=True)


def _chunks(layout: FlatLayout, indices: Sequence[int]) -> Iterator[list[int]]:
    """Places in ``indices`` whose parameters are put together at a time."""
    members: list[int] = []
    total = 0
    for n, i in enumerate(indices):
        if members and total + layout.numels[i] > CHUNK_NUMEL:
            yield members
            members, total = [], 0
        members.append(n)
        total += layout.numels[i]
    if members:
        yield members
