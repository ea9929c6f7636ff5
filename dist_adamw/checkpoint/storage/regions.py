"""Convert runs of a tensor's elements to rectangular regions of its shape."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple


class Region(NamedTuple):
    """A rectangle of a tensor's elements: offset and size along each dim."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.sizes)


def regions_of(start: int, stop: int, shape: Sequence[int]) -> Iterator[Region]:
    """Yield elements ``start`` to ``stop`` of a tensor, counted in C order, as regions in that order.

    At most ``2 * ndim - 1`` regions: the rest of a row, whole rows, and the beginning of another row, dim by dim.
    """
    if start >= stop:
        return
    if len(shape) <= 1:
        yield Region((start,) * len(shape), (stop - start,) * len(shape))
        return
    row = math.prod(shape[1:])
    first, into = divmod(start, row)
    last, beyond = divmod(stop, row)
    ends_with_row = into and first + 1 == last and not beyond
    if first == last or ends_with_row:
        yield from _inside(first, regions_of(into, stop - first * row, shape[1:]))
        return
    if into:
        yield from _inside(first, regions_of(into, row, shape[1:]))
        first += 1
    if first < last:
        yield Region((first, *[0] * len(shape[1:])), (last - first, *shape[1:]))
    if beyond:
        yield from _inside(last, regions_of(0, beyond, shape[1:]))


def _inside(index: int, found: Iterator[Region]) -> Iterator[Region]:
    return (Region((index, *region.offsets), (1, *region.sizes)) for region in found)


def overlap_anywhere(found: Sequence[Region], ndim: int) -> bool:
    """Return whether two of these regions share an element.

    A sweep along the dim with the most distinct offsets keeps few regions active: comparing all pairs is quadratic.
    """
    found = [region for region in found if region.numel]
    if len(found) < 2 or ndim == 0:
        return len(found) > 1
    dim = max(range(ndim), key=lambda d: _distinct_offsets(found, d))
    active: list[Region] = []
    for region in sorted(found, key=lambda region: region.offsets[dim]):
        active = [other for other in active if other.offsets[dim] + other.sizes[dim] > region.offsets[dim]]
        if any(_overlap(region, other) for other in active):
            return True
        active.append(region)
    return False


def _distinct_offsets(found: Sequence[Region], dim: int) -> int:
    return len({region.offsets[dim] for region in found})


def _overlap(one: Region, other: Region) -> bool:
    return all(
        a < b + m and b < a + n for a, n, b, m in zip(one.offsets, one.sizes, other.offsets, other.sizes, strict=True)
    )
