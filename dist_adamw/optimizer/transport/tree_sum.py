"""Sum the micro-batches of an update in an order that does not depend on the number of ranks.

The order is that of a binary tree over all micro-batches of the update: 0 + 1, 2 + 3, then the sums of these pairs, and
so on; what is left over is added from the last micro-batch to the first. Micro-batches arrive in their order, any
number at a time, so the tree is a binary counter: for each bit of the number of micro-batches so far that is set, one
partial sum. Micro-batches of zeros at the end change no bit, except that -0 becomes +0.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

BLOCK_NUMEL = 1 << 16  # elements summed at a time, few enough to stay in a core's cache between passes

_Kind = Literal["term", "level", "scratch"]


@dataclass(frozen=True, slots=True)
class _Place:
    """A term by its index, the partial sum of a level, or a block of scratch memory."""

    kind: _Kind
    index: int


@dataclass(frozen=True, slots=True)
class _Addition:
    left: _Place
    right: _Place
    out: _Place


@dataclass(frozen=True, slots=True)
class _Plan:
    """What to add when ``terms`` terms follow ``count`` earlier ones, and which terms to store then, by level."""

    additions: tuple[_Addition, ...]
    stored: tuple[tuple[int, _Place], ...]


@functools.lru_cache(maxsize=4096)
def _plan(count: int, terms: int) -> _Plan:
    # The stack has the level and the place of each partial sum, the largest first.
    stack = [(level, _Place("level", level)) for level in reversed(range(count.bit_length())) if count >> level & 1]
    additions: list[_Addition] = []
    for n in range(terms):
        level, place = 0, _Place("term", n)
        while stack and stack[-1][0] == level:
            _, left = stack.pop()
            level += 1
            # One block of scratch memory per level: a second sum of that level is added to the first at once.
            out = _Place("scratch", 2 * level + (bool(stack) and stack[-1] == (level, _Place("scratch", 2 * level))))
            additions.append(_Addition(left, place, out))
            place = out
        stack.append((level, place))
    return _renamed(additions, stack)


def _renamed(additions: list[_Addition], stack: list[tuple[int, _Place]]) -> _Plan:
    """Return the plan in which sums that remain are written to their level, and not to scratch memory."""
    # The last addition that writes a place is the one whose sum remains. By then its level's earlier sum was used.
    last_of = {addition.out: n for n, addition in enumerate(additions)}
    stored = []
    for level, place in stack:
        if place.kind == "scratch":
            n = last_of[place]
            additions[n] = _Addition(additions[n].left, additions[n].right, _Place("level", level))
        elif place.kind == "term":
            stored.append((level, place))
    return _Plan(tuple(additions), tuple(stored))


class TreeSum:
    """The sum of 1-D terms of ``numel`` elements each. Local.

    Args:
        numel: The number of elements of a term.
        dtype: The dtype of the sums: at least fp32.
        device: The device of the terms.
        home: Memory of ``numel`` elements that `write` will write to, for one of the partial sums. With it, `write` may
            be called once, and `clear` follows.

    Attributes:
        count: The number of terms so far.
    """

    def __init__(self, numel: int, *, dtype: torch.dtype, device: torch.device, home: Tensor | None = None) -> None:
        self.count = 0
        self._home = home if home is not None and home.dtype == dtype else None
        self._numel, self._dtype, self._device = numel, dtype, device
        self._levels: dict[int, Tensor] = {}
        self._scratch: dict[int, Tensor] = {}
        # On a GPU each operation is a launch, and nothing is gained by small ones.
        self._block = BLOCK_NUMEL if device.type == "cpu" else max(numel, 1)

    def add(self, number: int, parts: Sequence[tuple[int, Sequence[Tensor]]]) -> None:
        """Add the next ``number`` terms.

        Args:
            number: The number of new terms.
            parts: Runs of elements, which together are all that have a meaning: where each begins in a term, and the
                run of every new term, in order. The terms are not changed.
        """
        plan = _plan(self.count, number)
        for level in sorted(self._written(plan) - self._levels.keys()):
            # Of all levels, the lowest that is needed first: with one round of 2^n ranks it is the only one.
            is_first = self._home is not None and not self._levels
            self._levels[level] = self._home if is_first else self._empty()  # type: ignore[assignment]
        for offset, terms in parts:
            for start in range(0, terms[0].numel(), self._block):
                blocks = [term[start : start + self._block] for term in terms]
                self._add_block(plan, blocks, offset + start)
        self.count += number

    def _empty(self) -> Tensor:
        return torch.zeros(self._numel, dtype=self._dtype, device=self._device)

    @staticmethod
    def _written(plan: _Plan) -> set[int]:
        sums = {addition.out.index for addition in plan.additions if addition.out.kind == "level"}
        return sums | {level for level, _ in plan.stored}

    def _add_block(self, plan: _Plan, terms: Sequence[Tensor], start: int) -> None:
        numel = terms[0].numel()

        def at(place: _Place) -> Tensor:
            if place.kind == "term":
                return terms[place.index]
            if place.kind == "level":
                return self._levels[place.index][start : start + numel]
            return self._block_of_scratch(place.index, numel)

        for addition in plan.additions:
            out, left = at(addition.out), at(addition.left)
            if left.dtype != self._dtype:  # the sum of two 16-bit terms would be rounded to 16 bits
                left = out.copy_(left)
            torch.add(left, at(addition.right), out=out)
        for level, place in plan.stored:
            at(_Place("level", level)).copy_(at(place))

    def write(self, runs: Sequence[tuple[int, Tensor]], divisor: int) -> None:
        """Write the sum of all terms so far, divided by ``divisor``.

        Args:
            runs: Where each run begins in a term, and the 1-D tensor to write it to.
            divisor: The number of terms that are not zeros.
        """
        levels = [self._levels[level] for level in range(self.count.bit_length()) if self.count >> level & 1]
        for offset, out in runs:
            for start in range(0, out.numel(), self._block):
                block = out[start : start + self._block]
                here = slice(offset + start, offset + start + block.numel())
                self._write_block([level[here] for level in levels], block, divisor)

    def _write_block(self, levels: Sequence[Tensor], out: Tensor, divisor: int) -> None:
        """Add the partial sums from the lowest level to the highest, and divide."""
        total = levels[0]
        for level in levels[1:]:
            total = torch.add(level, total, out=self._block_of_scratch(0, total.numel()))
        if out.dtype == self._dtype:
            torch.div(total, float(divisor), out=out)
        else:
            out.copy_(torch.div(total, float(divisor), out=self._block_of_scratch(0, total.numel())))

    def _block_of_scratch(self, index: int, numel: int) -> Tensor:
        if index not in self._scratch:
            self._scratch[index] = torch.empty(self._block, dtype=self._dtype, device=self._device)
        return self._scratch[index][:numel]

    def move(self, device: torch.device) -> None:
        """Follow the terms to another device."""
        self._device, self._home, self._scratch = device, None, {}
        self._levels = {level: total.to(device) for level, total in self._levels.items()}

    @property
    def num_sums(self) -> tuple[int, int]:
        """The number of partial sums in memory, ``home`` included, and that of blocks of scratch memory."""
        return len(self._levels), len(self._scratch)

    def clear(self) -> None:
        """Forget all terms."""
        self.count = 0
