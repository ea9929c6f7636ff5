"""Numbers that the messages of another component take along, so that they need no message of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Piggyback(Protocol):
    """A few integers to send with an exchange.

    Attributes:
        numbers: This rank's integers, at most `MAX_NUMBERS`, each of 63 bits.
    """

    numbers: Sequence[int]

    def received(self, of_ranks: Sequence[Sequence[int]]) -> None:
        """Take the numbers of every rank, in rank order. Local."""

    def check(self) -> None:
        """Raise what the numbers show, on every rank. Collective; after `received`."""


MAX_NUMBERS = 3


class Exchange(Protocol):
    """An exchange of messages between ranks at every update."""

    def carry(self, piggyback: Piggyback) -> None:
        """Take ``piggyback`` along in the next exchange, in place of one that was not sent. Local; on every rank."""

    def is_between(self, ranks: int) -> bool:
        """Return whether it is an exchange between all of ``ranks`` ranks. Local."""
