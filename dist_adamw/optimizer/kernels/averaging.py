"""Move averages of weights toward the weights, element by element."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

# Elements widened at a time: 512 KiB of fp32, for a CPU's cache. On other devices each block costs launches.
_BLOCKS = {"cpu": 1 << 17}
_LARGE_BLOCK = 1 << 23


def mean_of(tensors: list[Tensor]) -> Tensor:
    """Return the mean of tensors of one shape, in fp32 at least, as `move_toward_` adds them up one by one. Local."""
    first, *others = tensors
    if not others:
        return first
    mean = first.to(torch.promote_types(first.dtype, torch.float32), copy=True)
    for n, other in enumerate(others, 2):
        move_toward_([mean], [other.to(mean.dtype)], 1 / n)
    return mean


def move_toward_(averages: list[Tensor], weights: list[Tensor], by: float | Tensor) -> None:
    """Set each average a to a + by (w - a), in place. Local.

    On equal dtypes it is torch's foreach lerp, whose result for an element does not depend on where a tensor is cut. An
    average of less precision is widened, and rounded to nearest even at the end.

    Args:
        averages: 1-D tensors, all of one dtype.
        weights: As many tensors of the same lengths, all of one dtype. Not changed.
        by: 1 copies. A 0-d fp64 tensor on the averages' device may be 0, so that the host need not know whether there
            is anything to add.
    """
    if not averages:
        return
    if not isinstance(by, Tensor) and by == 1:
        torch._foreach_copy_(averages, weights)
    elif averages[0].dtype != weights[0].dtype:
        block = _BLOCKS.get(averages[0].device.type, _LARGE_BLOCK)
        for average, weight in zip(averages, weights, strict=True):
            for kept, given in zip(torch.split(average, block), torch.split(weight, block), strict=True):
                wide = torch.promote_types(kept.dtype, given.dtype)
                widened = kept.to(wide)
                move_toward_([widened], [given.to(wide)], by)
                kept.copy_(widened)
    elif isinstance(by, Tensor):
        torch._foreach_lerp_(averages, weights, [by.to(average.dtype).expand_as(average) for average in averages])
    else:
        torch._foreach_lerp_(averages, weights, by)


def unless_skipped(moves: Mapping[str, float], found_inf: Tensor | None) -> Mapping[str, float | Tensor]:
    """Return how far each average moves: nowhere if ``found_inf`` is 1, which the host reads only on a CPU. Local."""
    if found_inf is None or not moves:
        return moves
    if found_inf.device.type == "cpu":
        return {} if found_inf.item() else moves
    applied = 1 - (found_inf if found_inf.device.type == "mps" else found_inf.double())  # MPS has no fp64
    # Where weights stay, copying them changes nothing: the next update begins the average once more.
    return {name: by if by == 1 else by * applied for name, by in moves.items()}
