"""Messages of a few integers between all ranks, on the channel of an optimizer's buckets."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from dist_adamw.optimizer.transport.base import GONE, InFlightBucket
from dist_adamw.optimizer.transport.pipes import Pipes
from dist_adamw.ranks import collectives


@dataclass(frozen=True, slots=True)
class Channel:
    """What distinguishes the messages of an optimizer from those of others.

    Attributes:
        tag: The tag of its messages over gloo; the same on all ranks.
        pipes: What its short messages go through; None: gloo.
        may_share: Whether ranks may try to share memory. Not if they were found on several hosts: a rank that lays
            out its state again, alone, would try again alone.
    """

    tag: int = 0
    pipes: Pipes | None = None
    may_share: bool = True


class Rollcall:
    """An all-gather of a few integers, on the channel of the buckets. Collective.

    Messages of a channel arrive in the order in which they were sent. If one rank starts to send gradients while
    another one updates, each therefore receives the other's numbers, and both detect the difference.

    Args:
        group: A gloo process group.
        channel: The optimizer's.
        width: The number of integers in a message.
    """

    def __init__(self, group: dist.ProcessGroup, channel: Channel, width: int) -> None:
        self.group, self.channel, self._width = group, channel, width
        self._rank, self._size = collectives.rank(group), collectives.world_size(group)
        self._under_way: deque[_Posted] = deque()

    def post(self, numbers: Sequence[int]) -> None:
        """Start to send ``numbers``, padded with zeros, and to receive those of the other ranks."""
        mine = [*map(int, numbers), *[0] * (self._width - len(numbers))]
        if self.channel.pipes is None:
            self._under_way.append(_Posted(mine, self._send(mine), None, 0))
        else:
            pipes = self.channel.pipes
            self._under_way.append(_Posted(mine, None, pipes, pipes.post(mine)))

    def _send(self, mine: list[int]) -> tuple[InFlightBucket, torch.Tensor]:
        table = torch.zeros(self._size, self._width, dtype=torch.int64)
        table[self._rank] = torch.tensor(mine, dtype=torch.int64)
        sent = InFlightBucket(0, [], None)
        for distance in range(1, self._size):
            to, source = (self._rank + distance) % self._size, (self._rank - distance) % self._size
            for work in (
                dist.irecv(table[source], group=self.group, group_src=source, tag=self.channel.tag),
                dist.isend(table[self._rank], group=self.group, group_dst=to, tag=self.channel.tag),
            ):
                assert work is not None
                sent.works.append(work)
        return sent, table

    @property
    def is_under_way(self) -> bool:
        """Whether the `answer` of some `post` has not been read yet."""
        return bool(self._under_way)

    def answer(self) -> list[list[int]]:
        """Wait for the oldest `post`; return the numbers of every rank.

        Raises:
            RuntimeError: a rank has exited, or did not take part within the process group's timeout.
        """
        rows = self._under_way[0].wait(self._rank, self._size, self._width)
        self._under_way.popleft()  # only now, since the transfer needs the memory
        return rows


@dataclass(frozen=True, slots=True)
class _Posted:
    mine: list[int]
    by_gloo: tuple[InFlightBucket, torch.Tensor] | None
    pipes: Pipes | None
    number: int

    def wait(self, rank: int, size: int, width: int) -> list[list[int]]:
        if self.by_gloo is not None:
            sent, table = self.by_gloo
            sent.wait()
            rows: list[list[int]] = table.tolist()
            return rows
        assert self.pipes is not None
        try:
            theirs = self.pipes.wait(self.number)
        except RuntimeError as error:
            raise RuntimeError(f"{error}\n{GONE}") from error
        return [self.mine if there == rank else list(theirs[there][:width]) for there in range(size)]
