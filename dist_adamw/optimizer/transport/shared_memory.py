"""Transport between ranks of one host: slices go through memory that all of them map, and short messages say when.

gloo copies every message into the system and out of it again, which is about half of an update on a CPU. Here a rank
writes what its peers need to its own memory, sends each of them a short message, and they read it there. The sums,
their order and so their bits are those of `GlooTransport`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dist_adamw.optimizer.transport.base import Flat, InFlightBucket, Transport
from dist_adamw.optimizer.transport.gloo import GlooTransport
from dist_adamw.optimizer.transport.slots import Slots, open_slots


class SharedMemoryTransport(GlooTransport):
    """Slices through shared memory if all ranks can map it, else messages as in the base class; see `Transport`.

    Args:
        replaces: The transport of the same layout before parameters moved.
    """

    def __init__(self, *args: Any, replaces: Transport | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._slots: Slots | None = None
        self._was_opened = False
        if isinstance(replaces, SharedMemoryTransport) and replaces._like.dtype == self._like.dtype:
            # Parameters may have moved on this rank alone, and then no other rank would open its memory again.
            self._slots, self._was_opened = replaces._slots, replaces._was_opened

    @property
    def is_open(self) -> bool:
        """Whether ranks have agreed on how they send."""
        return self._was_opened or self._size == 1 or not self.channel.may_share

    def _opened(self) -> Slots | None:
        """Return the shared memory, opened at the first transfer; None if some rank cannot share. Collective."""
        if not self.is_open:
            numel = self._slot_numel * (self._size - 1)
            self._slots = open_slots(numel, self._like.dtype, group=self._group, channel=self.channel)
            self._was_opened = True
        return self._slots

    def _region(self, slots: Slots, slot: int, owner: int, reader: int) -> Tensor:
        """Return the part of ``owner``'s slot that is for ``reader``, 1-D."""
        first = (reader - owner - 1) % self._size * self._slot_numel
        return slots.of[owner][slot][first : first + self._slot_numel]

    def start_reduce(self, k: int, parts: Sequence[Tensor]) -> InFlightBucket:
        """See `Transport`."""
        slots = self._opened()
        if slots is None:
            return super().start_reduce(k, parts)
        slot = slots.begin()
        for to, _ in self._peers:
            if theirs := self._parts[k][to]:
                torch._foreach_copy_(self._outgoing(slots, slot, k, to), [part.of(parts) for part in theirs])
        slots.tell(self.channel)
        received = {source: self._region(slots, slot, source, self._rank) for _, source in self._peers}
        return InFlightBucket(k, [], (received, slots), parts)

    def _outgoing(self, slots: Slots, slot: int, k: int, to: int) -> list[Tensor]:
        """Return the places for parts of bucket ``k`` that ``to`` owns."""
        return self._kept(
            ("outgoing", slot, k, to),
            lambda: [
                part.in_slice(self._region(slots, slot, self._rank, to).view(self._sent_dtype))
                for part in self._parts[k][to]
            ],
        )

    def start_gather(self, k: int, flat: Flat | None = None) -> InFlightBucket:
        """See `Transport`."""
        slots = self._opened()
        if slots is None:
            return super().start_gather(k, flat)
        slot = slots.begin()
        received = {source: slots.of[source][slot] for _, source in self._peers}
        sent = InFlightBucket(k, [], (received, slots), gathered=flat)
        mine = _present(self._gathered(sent, (k, self._rank), self._slices[k][self._rank].pieces))
        if mine:
            torch.cat(mine, out=slots.of[self._rank][slot][: sum(map(Tensor.numel, mine))])
        slots.tell(self.channel)
        return sent

    def finish_gather(self, sent: InFlightBucket) -> None:
        """See `Transport`."""
        received, slots = sent.staging
        if not isinstance(slots, Slots):
            super().finish_gather(sent)
            return
        slots.wait()
        for _, source in self._peers:
            pieces = self._slices[sent.bucket][source].pieces
            targets = _present(self._gathered(sent, (sent.bucket, source), pieces))
            if targets:
                sizes = list(map(Tensor.numel, targets))
                torch._foreach_copy_(targets, list(torch.split(received[source][: sum(sizes)], sizes)))

    def _await_parts(self, sent: InFlightBucket) -> None:
        slots = sent.staging[1]
        if isinstance(slots, Slots):
            slots.wait()
        else:
            super()._await_parts(sent)

    def _give_back(self, sent: InFlightBucket) -> None:
        if not isinstance(sent.staging[1], Slots):
            super()._give_back(sent)


def _present(runs: Sequence[Tensor | None]) -> list[Tensor]:
    return [run for run in runs if run is not None]
