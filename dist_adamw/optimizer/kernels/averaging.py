"""Move averages of weights toward the weights, element by element."""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK = 1 << 17  # elements widened at a time: 512 KiB of fp32


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

    On equal dtypes with a number ``by`` it is torch's foreach lerp, whose result for an element does not depend on
    where a tensor is cut. An average of less precision is widened, and rounded to nearest even at the end.

    Args:
        averages: 1-D tensors, all of one dtype.
        weights: As many tensors of the same lengths, all of one dtype. Not changed.
        by: 1 copies. A 0-d tensor on the averages' device may be 0, so that the host need not know whether there is
            anything to add; its last bit may differ from that of a number.
    """
    if not averages:
        return
    if not isinstance(by, Tensor) and by == 1:
        torch._foreach_copy_(averages, weights)
    elif averages[0].dtype != weights[0].dtype:
        for average, weight in zip(averages, weights, strict=True):
            for kept, given in zip(torch.split(average, _BLOCK), torch.split(weight, _BLOCK), strict=True):
                wide = torch.promote_types(kept.dtype, given.dtype)
                widened = kept.to(wide)
                move_toward_([widened], [given.to(wide)], by)
                kept.copy_(widened)
    elif isinstance(by, Tensor):
        differences = torch._foreach_sub(weights, averages)
        torch._foreach_mul_(differences, by)
        torch._foreach_add_(averages, differences)
    else:
        torch._foreach_lerp_(averages, weights, by)
