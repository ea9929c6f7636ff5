"""Move optimizer state from shards to the shards that replace them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from dist_adamw.optimizer.sharding.shard import Shard
from dist_adamw.optimizer.transport.layout import FlatLayout

Move = tuple[int, Shard, int]  # place in the old shard, new shard, place in it
CHUNK_NUMEL = 1 << 23  # elements of whole moments in memory at a time


def carry_state(old: Sequence[Shard], new: Sequence[Shard]) -> None:
    """Give the shards ``new`` the state that their parameters have in ``old``. Collective over the old shards' ranks.

    At most `CHUNK_NUMEL` elements of whole moments are in memory at a time, or one parameter's.
    """
    targets = {id(param): (shard, j) for shard in new for j, param in enumerate(shard.params)}
    for shard in old:
        moved = [(i, *targets[id(param)]) for i, param in enumerate(shard.params) if id(param) in targets]
        for i, target, j in moved:
            target.steps[j] = shard.steps[i]
        for name in shard.moments:
            _carry_moment(shard, name, moved)


def carry_averages(old: Sequence[Shard], new: Sequence[Shard]) -> None:
    """Give the shards ``new`` the averages that ``old`` have accumulated. Collective; as `carry_state`."""
    targets = {id(param): (shard, j) for shard in new for j, param in enumerate(shard.params)}
    for shard in old:
        moved = [(i, *targets[id(param)]) for i, param in enumerate(shard.params) if id(param) in targets]
        owned = [_accumulated(shard, i) for i, *_ in moved]
        for (i, target, j), flat in _whole(shard, moved, owned):
            flat = reorder(flat, shard, i, target, j)
            runs = [flat[start:stop] for start, stop in target.owned.ranges_of(j)]
            if runs:
                torch.cat(runs, out=_accumulated(target, j))


def _accumulated(shard: Shard, i: int) -> Tensor:
    """Return this rank's elements of the accumulated average of parameter ``i``, 1-D. Local."""
    start = shard.owned.offset_of(i)  # they are adjacent, as those of moments are
    return shard.gradients.all_accumulated()[start : start + shard.owned.numel_of(i)]


def _carry_moment(shard: Shard, name: str, moved: Sequence[Move]) -> None:
    owned = [shard.owned_moment(i, name) for i, *_ in moved]
    # Every rank must iterate, since `_whole` is collective, even if the target has no such moment.
    for (i, target, j), flat in _whole(shard, moved, owned):
        if name in target.moments:
            target.fill(j, name, reorder(flat, shard, i, target, j))


def reorder(flat: Tensor, shard: Shard, i: int, target: Shard, j: int) -> Tensor:
    """Reorder a parameter's elements from the memory order in ``shard`` to that in ``target``. Local."""
    if shard.order.of(i) == target.order.of(j):
        return flat
    return target.order.flatten(j, shard.order.unflatten(i, flat))


def _whole(shard: Shard, moved: Sequence[Move], values: Sequence[Tensor]) -> Iterator[tuple[Move, Tensor]]:
    """Yield all elements, 1-D, of each moment whose owned elements are in ``values``. Collective."""
    if shard.process_group is None:
        yield from zip(moved, values, strict=True)
        return
    # Every rank assembles whole moments and keeps the runs that it owns in the new layout, which may be any.
    ranges = [shard.layout.ranges(rank) for rank in range(shard.layout.world_size)]
    all_indices = [i for i, *_ in moved]
    for chunk in _chunks(shard.layout, all_indices):
        indices = all_indices[chunk]
        wholes = [own.new_empty(shard.layout.numels[i]) for i, own in zip(indices, values[chunk], strict=True)]
        for rank, of_rank in enumerate(ranges):
            runs = [whole[start:stop] for i, whole in zip(indices, wholes, strict=True) for start, stop in of_rank[i]]
            if runs:
                _broadcast_runs(shard, rank, values[chunk], runs)
        yield from zip(moved[chunk], wholes, strict=True)


def _broadcast_runs(shard: Shard, rank: int, own: Sequence[Tensor], runs: list[Tensor]) -> None:
    """Write the elements that ``rank`` owns to ``runs``. Collective.

    Args:
        own: This rank's elements, which are those of ``runs`` if it is ``rank``.
    """
    group = shard.process_group
    assert group is not None
    sent = torch.cat(list(own)) if rank == shard.rank else torch.cat(runs)
    # Sent as bytes: gloo does not support int16, the dtype of remainders.
    dist.broadcast(sent.view(torch.uint8), src=dist.get_global_rank(group, rank), group=group)
    torch._foreach_copy_(runs, list(torch.split(sent, [run.numel() for run in runs])))


def _chunks(layout: FlatLayout, indices: Sequence[int]) -> Iterator[slice]:
    """Yield slices of ``indices`` whose parameters have at most `CHUNK_NUMEL` elements together."""
    first, total = 0, 0
    for n, i in enumerate(indices):
        if n > first and total + layout.numels[i] > CHUNK_NUMEL:
            yield slice(first, n)
            first, total = n, 0
        total += layout.numels[i]
    if first < len(indices):
        yield slice(first, len(indices))
