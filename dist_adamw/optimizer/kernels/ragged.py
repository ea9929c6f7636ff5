"""Update runs that begin or end within a vector with the bits of an update of the whole parameter.

torch's CPU kernels compute whole vectors and then single elements, and the two round differently. Whether an element
is in a whole vector depends on its place in the whole parameter. A run that is cut elsewhere than at a multiple of
`BLOCK` elements is therefore divided: what fills blocks is updated in place, and each ragged end in a copy that is
padded with zeros to the block that it has in the whole parameter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 32  # elements: a multiple of the widest vector


class Run(NamedTuple):
    """Elements ``[start, stop)`` of a parameter that has ``numel`` elements."""

    start: int
    stop: int
    numel: int


class _Part(NamedTuple):
    """Elements ``[start, stop)`` of a run; at ``offset`` of a copy of ``padded`` elements, or in place if that is 0."""

    run: int
    start: int
    stop: int
    offset: int
    padded: int


def _parts(index: int, run: Run) -> list[_Part]:
    parts = []
    head_stop = min(-(-run.start // BLOCK) * BLOCK, run.stop)
    if head_stop > run.start:
        parts.append(_end(index, run, run.start, head_stop))
    # The last block of a parameter may be short, and then it is so here too.
    tail_start = run.stop if run.stop == run.numel else max(run.stop // BLOCK * BLOCK, head_stop)
    if tail_start > head_stop:
        parts.append(_Part(index, head_stop - run.start, tail_start - run.start, 0, 0))
    if run.stop > tail_start:
        parts.append(_end(index, run, tail_start, run.stop))
    return parts


def _end(index: int, run: Run, start: int, stop: int) -> _Part:
    block = start // BLOCK * BLOCK
    return _Part(index, start - run.start, stop - run.start, start - block, min(BLOCK, run.numel - block))


class RaggedRuns:
    """Runs of parameters, divided for an update. Local.

    Args:
        runs: Which elements of its parameter each run has.
    """

    def __init__(self, runs: Sequence[Run]) -> None:
        self._parts = [part for index, run in enumerate(runs) for part in _parts(index, run)]
        self._ends = [part for part in self._parts if part.padded]
        self._copies: list[tuple[list[Tensor], list[Tensor]]] = []

    def divide(self, column: list[Tensor]) -> list[Tensor]:
        """Return the parts of ``column``, which has a 1-D tensor for each run, or is empty."""
        if not column:
            return []
        padded = iter(self._padded(column))
        return [next(padded) if part.padded else column[part.run][part.start : part.stop] for part in self._parts]

    def divide_to_change(self, column: list[Tensor]) -> list[Tensor]:
        """Return the parts of ``column`` for a kernel that changes them; `write_back` copies the ends back."""
        parts = self.divide(column)
        if column and self._ends:
            copies = [tensor for tensor, part in zip(parts, self._parts, strict=True) if part.padded]
            inner = [t[p.offset : p.offset + p.stop - p.start] for t, p in zip(copies, self._ends, strict=True)]
            self._copies.append((self._ends_of(column), inner))
        return parts

    def repeat(self, column: list[Tensor]) -> list[Tensor]:
        """Return the 0-d tensor of each part's run."""
        return [column[part.run] for part in self._parts]

    def write_back(self) -> None:
        """Copy the changed ends to the runs."""
        for ends, copies in self._copies:
            torch._foreach_copy_(ends, copies)
        self._copies.clear()

    def _ends_of(self, column: list[Tensor]) -> list[Tensor]:
        return [column[part.run][part.start : part.stop] for part in self._ends]

    def _padded(self, column: list[Tensor]) -> list[Tensor]:
        if not self._ends:
            return []
        memory = column[0].new_zeros(len(self._ends) * BLOCK)
        blocks = torch.split(memory, BLOCK)
        inner = [b[p.offset : p.offset + p.stop - p.start] for b, p in zip(blocks, self._ends, strict=True)]
        torch._foreach_copy_(inner, self._ends_of(column))
        return [block[: part.padded] for block, part in zip(blocks, self._ends, strict=True)]
