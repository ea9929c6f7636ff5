"""Sum squares so that the result does not depend on how the elements are divided among ranks.

Squares are added within blocks of 32 elements, counted from the start of each parameter: no rank has only a part of
one. The sums of blocks are then written in base 2**20, and digits are added as whole numbers, which is exact in any
order. The four highest digits count: of 2**32 blocks, what the others add up to is below 2**-28 of the largest.

Source: the idea of sums in fixed bins is that of Demmel & Nguyen, "Parallel Reproducible Summation", IEEE Transactions
on Computers 64 (2015).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

BLOCK = 32
_BITS = 20  # of a digit; the sum of 2**33 digits has at most 53 bits, those of fp64
_LOWEST = -51  # exponent of the lowest digit, in digits: scales of 2**1020 are still finite
_DIGITS = 103
_KEPT = 4
_TOGETHER = 1 << 16  # elements at a time, few enough to stay in a core's cache


def digits_of_squares(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Return the digits of the sum of squares of all elements, 1-D fp64. Local; add those of other ranks.

    Args:
        tensors: 1-D; each begins at a multiple of `BLOCK` in its parameter, and ends at one or at the parameter's end.
        device: Where the result is.
    """
    parts: list[Tensor] = []
    small: dict[tuple[int, torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in (tensor for tensor in tensors if tensor.numel()):
        if tensor.numel() < _TOGETHER // 4:
            small.setdefault((tensor.numel(), tensor.dtype, tensor.device), []).append(tensor)
        else:
            parts += map(_block_squares, torch.split(tensor, _TOGETHER) if tensor.device.type == "cpu" else [tensor])
    for (numel, _, _), alike in small.items():
        for first in range(0, len(alike), max(_TOGETHER // max(numel, 1), 1)):
            together = torch.stack(alike[first : first + max(_TOGETHER // max(numel, 1), 1)])
            parts.append(_block_squares(torch.nn.functional.pad(together, (0, -numel % BLOCK)).flatten()))
    if not parts:
        return torch.zeros(_DIGITS + 1, dtype=torch.float64, device=device)
    return _digits(torch.cat([part.to(device) for part in parts]))


def _block_squares(flat: Tensor) -> Tensor:
    """Return the sum of squares of each block of a 1-D tensor, fp64, with zeros after its end."""
    if flat.numel() % BLOCK:
        flat = torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK))
    sums = flat.view(-1, BLOCK).to(torch.float64, copy=True)
    sums.mul_(sums)  # exact for dtypes of up to 32 bits
    while sums.shape[1] > 1:  # elementwise, so that the order of additions is the same everywhere
        half = sums.shape[1] // 2
        sums = sums[:, :half] + sums[:, half:]
    return sums.flatten()


def _digits(values: Tensor) -> Tensor:
    """Return the digits of the sum of 1-D ``values``, which are not negative; last, their sum if it is inf or nan."""
    largest = values.max()
    is_finite = torch.isfinite(largest)
    rest = torch.where(is_finite, values, 0.0)
    result = values.new_zeros(_DIGITS + 1)
    result[-1] = torch.where(is_finite, 0.0, values.sum())
    # frexp: largest = mantissa * 2**exponent with a mantissa below 1.
    _, exponent = torch.frexp(torch.where(is_finite, largest, 0.0))
    top = torch.div(exponent - 1, _BITS, rounding_mode="floor").clamp(_LOWEST + _KEPT - 1, _LOWEST + _DIGITS - 1)
    for place in range(_KEPT):
        power = (top - place) * _BITS
        digits = torch.ldexp(rest, -power).floor_()
        rest = rest - torch.ldexp(digits, power)
        result.index_add_(0, (top - place - _LOWEST).view(1).long(), digits.sum().view(1))
    return result


def value_of(digits: Tensor) -> Tensor:
    """Return the number that the sum of all ranks' ``digits`` stands for, 0-d fp64. Local."""
    digits, special = digits[:-1], digits[-1]
    index = torch.arange(_DIGITS, device=digits.device)
    top = torch.where(digits != 0, index, -1).max()
    kept = torch.where(index > top - _KEPT, digits, 0.0)
    return torch.ldexp(kept, (index + _LOWEST) * _BITS).sum() + special
