"""Bring the digests of an update from all ranks together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from dist_adamw.ranks.run_on_all import Ranks

_SIGN = 1 << 63
_FAILED = -1  # in place of a number of sums


class DigestExchange:
    """Sums digests over the ranks, in one message per update, or two if parameters are sharded.

    Args:
        ranks: All ranks; their group can reduce CPU tensors.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._capacity = 1  # micro-batches of a rank for which the message has room

    def gather(
        self, batches: Sequence[int], sums: Sequence[int], problem: Exception | None = None
    ) -> tuple[list[int], list[int]]:
        """Return the digests of all micro-batches by number, and ``sums`` added up modulo 2**64. Collective.

        Args:
            batches: Digests of this rank's micro-batches: the j-th of rank r on W ranks is number ``j W + r``.
            sums: This rank's terms, as many on every rank.
            problem: Why this rank has no digests.

        Raises:
            RuntimeError: some rank has a problem, or ranks have different numbers of ``sums``; on every rank.
        """
        size = self._ranks.size
        if size == 1 and problem is None:
            return list(batches), list(sums)
        message = self._all_reduce(batches, _FAILED if problem is not None else len(sums))
        counts, widths = message[:size], message[size : 2 * size]
        if _FAILED in widths:
            why = f"{type(problem).__name__}: {problem}" if problem is not None else "see the error of that rank"
            raise RuntimeError(f"rank {widths.index(_FAILED)} could not hash an update for RunLog: {why}.") from problem
        if max(counts) > self._capacity:  # every rank knows, so all send once more
            self._capacity = max(counts)
            message = self._all_reduce(batches, len(sums))
        if len(set(widths)) > 1:
            raise RuntimeError(
                f"ranks log different numbers of parameters: {widths}. Build the model alike on every rank, and pass "
                "the same `every` to RunLog."
            )
        numbers = [0] * max((size * (count - 1) + rank + 1 for rank, count in enumerate(counts) if count), default=0)
        numbers[:] = [value % 2**64 for value in message[2 * size :][: len(numbers)]]
        if not sums:
            return numbers, []
        total = torch.tensor([_signed(value) for value in sums])
        dist.all_reduce(total, group=self._ranks.group)
        return numbers, total.tolist()

    def _all_reduce(self, batches: Sequence[int], width: int) -> list[int]:
        """Return by rank the number of micro-batches and of sums, and then the digests of micro-batches by number."""
        size, rank = self._ranks.size, self._ranks.rank
        message: Tensor = torch.zeros(size * (2 + self._capacity), dtype=torch.int64)
        message[rank] = len(batches)
        message[size + rank] = width
        for j, digest in enumerate(batches[: self._capacity]):
            message[2 * size + j * size + rank] = _signed(digest)
        if size > 1:
            dist.all_reduce(message, group=self._ranks.group)
        numbers: list[int] = message.tolist()
        return numbers


def _signed(value: int) -> int:
    """Return the int64 that is ``value`` modulo 2**64."""
    return (value + _SIGN) % 2**64 - _SIGN
