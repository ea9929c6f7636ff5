"""Describe, gather and validate state dicts of a sharded optimizer. Checks run before a load changes anything."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dist_adamw.optimizer.sharding.bucket_views import MASTERS, MOMENTS
from dist_adamw.optimizer.sharding.memory_order import shaped_like
from dist_adamw.optimizer.sharding.shard import Shard, peek
from dist_adamw.optimizer.transport.layout import FlatLayout, Piece, earlier_bucket_numel
from dist_adamw.ranks import collectives

_MESSAGE_BYTES = 16 << 20  # of one step of a gather, all ranks together
ELSEWHERE = "elsewhere"  # the key of a note that stands for a state dict: where the state is, and how to load it


def describe_share(shards: Sequence[Shard], params: Sequence[Tensor]) -> dict[str, Any] | None:
    """Describe which elements of the state ``shards`` hold, as plain data; None means all of them.

    Args:
        params: Every parameter of the optimizer; the description refers to them by index.
    """
    if not shards or shards[0].process_group is None:
        return None
    index = {id(param): i for i, param in enumerate(params)}
    ranges = {}
    for shard in shards:
        for i, param in enumerate(shard.params):
            ranges[index[id(param)]] = shard.owned.ranges_of(i)
    return {
        "rank": shards[0].rank,
        "world_size": shards[0].layout.world_size,
        "shards": [[index[id(param)] for param in shard.params] for shard in shards],
        "bucket_numels": [shard.layout.bucket_numel for shard in shards],
        "ranges": ranges,
    }


def check_share(
    share: Mapping[str, Any],
    params: Sequence[Tensor],
    here: tuple[int, int],
    bucket_numel: int | None,
    reduce_every_backward: bool,
) -> None:
    """Refuse the share of another rank, or one that was cut differently.

    Args:
        here: This rank, and the number of ranks that the state is sharded over.
        bucket_numel: The optimizer's option, as is ``reduce_every_backward``.

    Raises:
        ValueError: the share does not fit; names its origin and what would fit.
    """
    rank, world_size = here
    if (share["rank"], share["world_size"]) != here:
        raise ValueError(
            f"this state is the share of rank {share['rank']} of {share['world_size']}, but this is rank {rank} of "
            f"{world_size}. Save and load with accelerator.save_state and load_state after dist_adamw.prepare, or call "
            "consolidate_state_dict() on every rank before state_dict(): both load on any number of ranks."
        )
    numels = bucket_numels_of(share, params, reduce_every_backward=reduce_every_backward)
    for members, saved in zip(share["shards"], numels, strict=True):
        layout = FlatLayout(tuple(params[i].numel() for i in members), world_size, bucket_numel or saved)
        for i, ranges in zip(members, layout.ranges(rank), strict=True):
            if ranges != share["ranges"][i]:
                raise ValueError(
                    f"this share has elements {share['ranges'][i]} of parameter {i}, but this rank owns {ranges}. "
                    "It is from another model or another bucket_numel: load it with those of the job that saved it."
                )


def bucket_numels_of(share: Mapping[str, Any], params: Sequence[Tensor], *, reduce_every_backward: bool) -> list[int]:
    """Return the elements that each shard of a share sends together."""
    saved: list[int] | None = share.get("bucket_numels")
    if saved is not None:
        return saved
    numels = [FlatLayout(tuple(params[i].numel() for i in members)).starts[-1] for members in share["shards"]]
    return [
        earlier_bucket_numel(numel, share["world_size"], reduce_every_backward=reduce_every_backward)
        for numel in numels
    ]


def check_entries(state_dict: Mapping[str, Any], params: Sequence[Tensor], averages: Sequence[str] = ()) -> None:
    """Refuse incomplete state of a parameter, and moments whose shape is not that of the parameter or its share.

    Args:
        averages: The names of averages of the weights, which an entry may have too.

    Raises:
        ValueError: names the parameter and the problem.
    """
    share = state_dict.get("share")
    amsgrad = [group.get("amsgrad", False) for group in state_dict["param_groups"] for _ in group["params"]]
    for i, param in enumerate(params):
        whole = param.shape
        if share is not None:
            whole = torch.Size([sum(stop - start for start, stop in share["ranges"].get(i, []))])
        entry = state_dict["state"].get(i, {})
        has_maxima = any(amsgrad[i : i + 1])  # the state dict may have fewer parameters
        _check_entry(i, entry, MOMENTS if has_maxima else MOMENTS[:2], whole, averages)


def _check_entry(
    i: int, entry: Mapping[str, Any], moments: Sequence[str], shape: torch.Size, averages: Sequence[str]
) -> None:
    """Refuse an entry of parameter ``i`` without all of ``moments``, or with a tensor of another shape."""
    missing = [key for key in ("step", *moments) if key not in entry]
    if entry and missing:
        raise ValueError(
            f"the state of parameter {i} has no {' and no '.join(missing)}. Pass all of it, or an empty entry "
            "to start from zeros."
        )
    for key in (*MOMENTS, *MASTERS, *averages):
        value = entry.get(key)
        if value is not None and value.shape != shape:
            raise ValueError(
                f"{key} of parameter {i} has shape {tuple(value.shape)}, but {tuple(shape)} is needed here. "
                "The state is from another model, or its groups are in another order."
            )


@dataclass(frozen=True, slots=True)
class WholeState:
    """The result of `gather_state`, with stamps that show whether it is out of date.

    Attributes:
        to: The rank that received it, within the process group of the shards; None means every rank.
        states: By parameter, in the parameter's shape, on the CPU; None on ranks that did not receive it.
        stamps: The result of `stamps_of` when it was gathered.
    """

    to: int | None
    states: dict[Tensor, dict[str, Any]] | None
    stamps: list[tuple[Any, ...]]


def stamps_of(shards: Sequence[Shard], state: Mapping[Tensor, Mapping[str, Any]]) -> list[tuple[Any, ...]]:
    """Return identities and versions, of which any write to state or replacement of it changes one. Local.

    Args:
        shards: The shards that hold the state.
        state: ``optimizer.state``, which has views of it.
    """
    memory = [(id(tensor), tensor._version) for shard in shards for tensor in (*shard.moments.values(), shard.steps)]
    params = (param for shard in shards for param in shard.params)
    shown = [
        (name, id(value), getattr(value, "_version", 0))
        for param in params
        for name, value in (peek(state, param) or {}).items()
    ]
    return [*memory, *shown]


@torch.no_grad()
def gather_state(shards: Sequence[Shard], to: int | None, state: Mapping[Tensor, Mapping[str, Any]]) -> WholeState:
    """Copy the state of all ranks to one. Collective over the ranks that it is sharded over.

    The receiving rank needs 16 MB beyond the whole state; the others need 16 MB divided by the number of ranks.

    Args:
        shards: All sharded over the same ranks.
        to: The receiving rank within that process group; None means every rank.
        state: ``optimizer.state``.
    """
    receives = to is None or to == shards[0].rank
    states: dict[Tensor, dict[str, Any]] = {}
    for shard in shards:
        if receives:
            steps = shard.steps.cpu()
            states.update((param, {"step": steps[i].clone()}) for i, param in enumerate(shard.params))
        for name, flat in shard.moments.items():
            whole = _gather_moment(shard, flat, to, receives=receives)
            for param, values in zip(shard.params, whole, strict=receives):
                states[param][name] = shaped_like(values, param)
    if not receives:
        return WholeState(to, None, stamps_of(shards, state))
    # Shards have zeros for parameters without a gradient so far; torch has no state for them.
    states = {param: entry for param, entry in states.items() if _was_updated(entry)}
    return WholeState(to, states, stamps_of(shards, state))


def _gather_moment(shard: Shard, flat: Tensor, to: int | None, *, receives: bool) -> list[Tensor]:
    """Return all elements of one moment, 1-D, by parameter, on the CPU; nothing on ranks that only send. Collective.

    Args:
        flat: This rank's elements.
        to: As for `gather_state`.
        receives: Whether this rank receives.
    """
    assert shard.process_group is not None
    whole: list[Tensor] = []
    pieces_of_ranks: list[list[Piece]] = []
    if receives:
        whole = [torch.empty(p.numel(), dtype=flat.dtype) for p in shard.params]
        pieces_of_ranks = [_in_order(shard.layout.owned(rank)) for rank in range(shard.layout.world_size)]
    for start, parts in _gathered(flat, to, shard.process_group):
        for pieces, part in zip(pieces_of_ranks, parts, strict=True):
            _put(part, start, pieces, whole)
    return whole


def _was_updated(entry: Mapping[str, Any]) -> bool:
    """Return whether the entry has anything but zeros."""
    return bool(entry["step"]) or any(bool(entry[name].any()) for name in MOMENTS if name in entry)


def _in_order(buckets: Sequence[Sequence[Piece]]) -> list[Piece]:
    return [piece for bucket in buckets for piece in bucket]


def _gathered(flat: Tensor, to: int | None, group: dist.ProcessGroup) -> Iterator[tuple[int, list[Tensor]]]:
    """Yield the offset of each message, and every rank's elements of ``flat`` in it; on senders an empty list."""
    world_size, rank = collectives.world_size(group), collectives.rank(group)
    length = max(1, _MESSAGE_BYTES // (world_size * flat.element_size()))
    for start in range(0, len(flat), length):
        mine = flat[start : start + length].contiguous()
        # Sent as bytes, since not every backend supports every dtype.
        sent = mine.view(torch.uint8)
        parts = [torch.empty_like(sent) for _ in range(world_size)] if to in (None, rank) else []
        if to is None:
            dist.all_gather(parts, sent, group=group)
        else:
            dist.gather(sent, parts or None, group=group, group_dst=to)
        yield start, [part.view(flat.dtype).cpu() for part in parts]


def _put(part: Tensor, start: int, pieces: Sequence[Piece], whole: Sequence[Tensor]) -> None:
    """Copy ``part``, the elements of a rank's shard from ``start`` on, to their places in ``whole``."""
    stop = start + len(part)
    for piece in pieces:
        first, last = max(piece.offset, start), min(piece.offset + piece.numel, stop)
        if first < last:
            place = piece.start + first - piece.offset
            whole[piece.param][place : place + last - first] = part[first - start : last - start]


def is_being_wrapped() -> bool:
    """Return whether the call comes from the constructor of Accelerate's wrapper.

    ``AcceleratedOptimizer.__init__`` loads the result of ``state_dict()`` straight back into the same optimizer, to
    move state to its device. A share is enough for that, and consolidating would be wasteful.
    """
    frame = sys._getframe(1)
    while (caller := frame.f_back) is not None:
        frame = caller
        if frame.f_code.co_name == "__init__" and frame.f_globals.get("__name__") == "accelerate.optimizer":
            return True
    return False
