"""Compute the global norm of sharded gradients, and clip gradients by it."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dist_adamw.optimizer.kernels.exact_squares import digits_of_squares, value_of
from dist_adamw.optimizer.kernels.foreach import norm_parts, sum_of_squares
from dist_adamw.optimizer.sharding.memory_order import storage_order
from dist_adamw.optimizer.sharding.schemes import ShardingRanks
from dist_adamw.optimizer.sharding.shard import Shard
from dist_adamw.ranks import collectives

BucketGradients = list[list[Tensor | None]]  # of one shard: for each bucket, the gradients of this rank's pieces
ByAxes = dict[Any, Tensor]  # by `Shard.shard_axes`: shards with equal axes are sharded over the same ranks


def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """Return the factor for gradients, 0-d fp32."""
    # The constant is that of torch.nn.utils.clip_grad_norm_, so that results agree.
    return (max_norm / (norm + 1e-6)).clamp(max=1.0).to(torch.float32)


def squares_on_this_rank(
    shards: Sequence[Shard], grads: Sequence[BucketGradients], *, reproducible: bool = False
) -> ByAxes:
    """Return the sum of squares of this rank's gradients, 0-d fp64. Local, except for `Shard.cut_blocks`.

    Args:
        reproducible: Return the digits of the sum instead, see `exact_squares`.
    """
    device = shards[0].steps.device
    owned: dict[Any, list[Tensor]] = {}
    for shard, buckets in zip(shards, grads, strict=True):
        if shard.cut_blocks is not None:
            found = shard.cut_blocks.gradients()
        else:
            found = [grad for bucket in buckets for grad in bucket if grad is not None]
        owned.setdefault(shard.shard_axes, []).extend(found)
    if reproducible:
        return {axes: digits_of_squares([grad.flatten() for grad in found], device) for axes, found in owned.items()}
    return {
        axes: sum_of_squares(found).to(device) if found else torch.zeros((), dtype=torch.float64, device=device)
        for axes, found in owned.items()
    }


def global_norm(squares: ByAxes, ranks: ShardingRanks, *, reproducible: bool = False) -> Tensor:
    """Return the norm of all elements of all gradients, each counted once, 0-d fp64. Collective.

    Args:
        squares: The result of `squares_on_this_rank`, with the same ``reproducible``; changed in place.
    """
    # Each sum is reduced only over the ranks that divide its elements, so replicas count once.
    for axes, of_these in squares.items():
        for group in ranks.dividing(axes):
            collectives.all_reduce_sum(of_these, group)
    first, *others = squares.values()
    total = sum(others, first)
    return (value_of(total) if reproducible else total).sqrt()


def non_zeros_on_this_rank(shards: Sequence[Shard], grads: Sequence[BucketGradients]) -> ByAxes:
    """Return whether any of this rank's gradients has an element that is not 0, 0-d int32. Local."""
    found_of: ByAxes = {}
    for shard, buckets in zip(shards, grads, strict=True):
        zero = torch.zeros((), dtype=torch.int32, device=shard.steps.device)
        found = found_of.setdefault(shard.shard_axes, zero)
        for bucket in buckets:
            for grad in bucket:
                if grad is not None:
                    torch.maximum(found, grad.any().to(found), out=found)
    return found_of


def are_all_zero(non_zeros: ByAxes, ranks: ShardingRanks) -> bool:
    """Return whether every element of every rank's gradients is 0. Collective.

    Args:
        non_zeros: The result of `non_zeros_on_this_rank`; changed in place.
    """
    for axes, found in non_zeros.items():
        for group in ranks.dividing(axes):
            dist.all_reduce(found, op=dist.ReduceOp.MAX, group=group)
    return not any(map(bool, non_zeros.values()))


def clip_owned_(
    owned: list[Tensor],
    others: list[Tensor],
    *,
    max_norm: float,
    norm_type: float,
    group: dist.ProcessGroup | None,
    device: torch.device,
    reproducible: bool = False,
) -> Tensor:
    """Clip gradients in place by their norm over all ranks. Collective over ``group``.

    Args:
        owned: This rank's gradients, 1-D; see `owned_gradients`.
        others: Gradients that are whole on every rank, clipped together with these.
        max_norm: A larger norm is scaled down to this.
        norm_type: The p of the norm; may be inf.
        group: The ranks that gradients are sharded over; None: one process has all.
        device: Where to compute if this rank has no gradient.
        reproducible: Compute a norm that does not depend on how elements are divided.

    Returns:
        The norm before clipping, 0-d fp32.
    """
    # A rank without gradients still takes part, with zero. ``others`` are whole on every rank, so add them afterwards.
    is_largest = norm_type == math.inf
    if reproducible and norm_type == 2.0:
        total = digits_of_squares(owned, device)
    else:
        total = norm_parts(owned, norm_type) if owned else torch.zeros((), dtype=torch.float64, device=device)
    if group is not None:
        dist.all_reduce(total, op=dist.ReduceOp.MAX if is_largest else dist.ReduceOp.SUM, group=group)
    if reproducible and norm_type == 2.0:
        total = value_of(total + digits_of_squares([storage_order(grad) for grad in others], device))
    elif others:
        theirs = norm_parts(others, norm_type).to(total.device)
        total = torch.maximum(total, theirs) if is_largest else total + theirs
    norm = total if is_largest else total.pow(1.0 / norm_type)
    _scale_(owned + others, clip_factor(norm, max_norm))
    return norm.to(torch.float32)


def _scale_(grads: list[Tensor], factor: Tensor) -> None:
    """Multiply gradients in place, on whichever devices they are."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for grad in grads:
        by_device.setdefault(grad.device, []).append(grad)
    for device, together in by_device.items():
        torch._foreach_mul_(together, factor.to(device, non_blocking=True))


def owned_gradients(shards: Sequence[Shard], chosen: Collection[int]) -> list[Tensor]:
    """Return this rank's gradients of the parameters with an id in ``chosen``. Local."""
    owned = []
    for shard in shards:
        for k, bucket in enumerate(shard.gradients.owned()):
            for piece, grad in zip(shard.owned.pieces[k], bucket, strict=True):
                if grad is not None and id(shard.params[piece.param]) in chosen:
                    owned.append(grad)
    return owned
