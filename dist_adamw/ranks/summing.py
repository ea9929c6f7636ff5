"""Sums of a few integers over all ranks, several of which share one message per update."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed as dist

WIDTH = 8  # integers in every message, so that messages of ranks that are out of step fit each other


class Sums(Protocol):
    """Sums over all ranks, which may be under way."""

    def wait(self) -> Sequence[int]:
        """Wait for the sums, and return them."""


class KnownSums:
    """Sums over all ranks that this rank knows already."""

    def __init__(self, sums: Sequence[int]) -> None:
        self._sums = sums

    def wait(self) -> Sequence[int]:
        """Return the sums. Local."""
        return self._sums


class Message:
    """A sum over all ranks that is under way. Collective.

    Args:
        numbers: At most `WIDTH` integers, whose sums fit into 64 bits.
        group: A group that can reduce CPU tensors (gloo).
    """

    def __init__(self, numbers: Sequence[int], group: dist.ProcessGroup | None) -> None:
        self._sums = torch.tensor([*numbers, *[0] * (WIDTH - len(numbers))], dtype=torch.int64)
        self._work = dist.all_reduce(self._sums, group=group, async_op=True)
        self._answer: list[int] | None = None

    def wait(self) -> list[int]:
        """Wait for the sums, and return them."""
        if self._answer is None:
            assert self._work is not None
            self._work.wait()
            self._answer = self._sums.tolist()
            self._work = None
        return self._answer


class Passenger:
    """Integers to sum over all ranks, which another message may take along.

    Args:
        numbers: This rank's integers.
        group: As for `Message`.
    """

    def __init__(self, numbers: Sequence[int], group: dist.ProcessGroup | None) -> None:
        self.numbers = numbers
        self._group = group
        self._message: Sums | None = None
        self._place = 0

    @property
    def is_waiting(self) -> bool:
        """Whether the integers were not sent yet."""
        return self._message is None

    def board(self, message: Sums, place: int) -> None:
        """Note that ``message`` has these integers from its number ``place`` on. Local."""
        self._message, self._place = message, place

    def send(self) -> None:
        """Send the integers by themselves. Collective."""
        self.board(Message(self.numbers, self._group), 0)

    def sums(self) -> Sequence[int]:
        """Wait for the sums, and return them."""
        assert self._message is not None
        return self._message.wait()[self._place : self._place + len(self.numbers)]
