"""Convert runs of a tensor's elements to rectangular regions of its shape.

Numbers only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple


class Box(NamedTuple):
    """A rectangle in a tensor: where it begins and how long it is along each dim."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Elements in it."""
        return math.prod(self.sizes)


def boxes(start: int, stop: int, shape: Sequence[int]) -> Iterator[Box]:
    """Elements ``start`` to ``stop`` of a tensor, counted in C order, as boxes in that order.

    At most ``2 * ndim - 1`` of them: what is left of a row, whole rows, and the beginning of one more, dim by dim.
    """
    if start >= stop:
        return
    if len(shape) <= 1:
        yield Box((start,) * len(shape), (stop - start,) * len(shape))
        return
    row = math.prod(shape[1:])
    first, into = divmod(start, row)
    last, beyond = divmod(stop, row)
    ends_with_row = into and first + 1 == last and not beyond
    if first == last or ends_with_row:
        yield from _inside(first, boxes(into, stop - first * row, shape[1:]))
        return
    if into:
        yield from _inside(first, boxes(into, row, shape[1:]))
        first += 1
    if first < last:
        yield Box((first, *[0] * len(shape[1:])), (last - first, *shape[1:]))
    if beyond:
        yield from _inside(last, boxes(0, beyond, shape[1:]))


def _inside(index: int, found: Iterator[Box]) -> Iterator[Box]:
    return (Box((index, *box.offsets), (1, *box.sizes)) for box in found)


def overlap_anywhere(found: Sequence[Box], ndim: int) -> bool:
    """Return whether two of these boxes share an element. A sweep along the dim in which most begin apart."""
    found = [box for box in found if box.numel]
    if len(found) < 2 or ndim == 0:
        return len(found) > 1
    dim = max(range(ndim), key=lambda d: _distinct_offsets(found, d))
    active: list[Box] = []
    for box in sorted(found, key=lambda box: box.offsets[dim]):
        active = [other for other in active if other.offsets[dim] + other.sizes[dim] > box.offsets[dim]]
        if any(_overlap(box, other) for other in active):
            return True
        active.append(box)
    return False


def _distinct_offsets(found: Sequence[Box], dim: int) -> int:
    return len({box.offsets[dim] for box in found})


def _overlap(one: Box, other: Box) -> bool:
    return all(
        a < b + m and b < a + n for a, n, b, m in zip(one.offsets, one.sizes, other.offsets, other.sizes, strict=True)
    )
