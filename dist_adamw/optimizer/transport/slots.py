"""Memory that the ranks of one host share, divided into slots that are used in turn.

A transfer overwrites what its rank wrote SLOTS transfers ago, which every peer has read by then: a rank starts transfer
j after it has finished j - 2, for which it has received its peers' messages of j - 2, and a peer sends that message
after it has finished j - 4.

The memory has no name in the file system, so ``/dev/shm`` does not limit it, and nothing is left behind when a rank is
killed. It cannot be shared by ranks on several hosts or in several containers, nor outside Linux; then no rank shares
it. The environment variable DIST_ADAMW_SHARED_MEMORY=0, on any rank, asks for that too.
"""

from __future__ import annotations

import mmap
import os
import secrets
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from dist_adamw.errors import AgreementError
from dist_adamw.optimizer.transport.base import MAX_IN_FLIGHT
from dist_adamw.optimizer.transport.pipes import is_wanted, place
from dist_adamw.optimizer.transport.rollcall import Channel, Rollcall

SLOTS = 2 * MAX_IN_FLIGHT
_NAME = "dist_adamw"
_HEADER = mmap.PAGESIZE  # before the slots; begins with the key
_OPENS, _HAS_MAPPED, _HAS_WRITTEN = 11, 12, 13  # the first number of a message, which no other message has


class Slots:
    """The memory of all ranks, opened. At most MAX_IN_FLIGHT transfers are under way, and end in their order.

    Attributes:
        of: By rank, its slots, 1-D.
    """

    def __init__(self, of: list[list[Tensor]], messages: Rollcall) -> None:
        self.of, self._messages = of, messages
        self._begun = self._ended = 0

    def begin(self) -> int:
        """Return the slot of the next transfer. Local."""
        if self._begun - self._ended == MAX_IN_FLIGHT:
            raise RuntimeError(f"{MAX_IN_FLIGHT} buckets are in flight: finish one of them before another is sent.")
        self._begun += 1
        return self._begun % SLOTS

    def tell(self, channel: Channel) -> None:
        """Tell the peers that this rank has written to the slot that `begin` returned. Local."""
        self._messages.channel = channel
        self._messages.post([_HAS_WRITTEN, self._begun])

    def wait(self) -> None:
        """Wait until every peer has written to the oldest slot. Collective.

        Raises:
            AgreementError: a rank does something else. On every rank.
        """
        self._ended += 1
        _check(self._messages.answer(), [_HAS_WRITTEN, self._ended])


def open_slots(numel: int, dtype: torch.dtype, *, group: dist.ProcessGroup, channel: Channel) -> Slots | None:
    """Share memory with the ranks of ``group``; return None, on every rank, if one of them cannot. Collective.

    Args:
        numel: Elements of a slot, of ``dtype``; the same on every rank.
        group: A gloo group.
        channel: Distinguishes the messages of several optimizers.
    """
    messages = Rollcall(group, channel, width=6)
    nbytes = _HEADER + SLOTS * numel * dtype.itemsize
    key = secrets.randbits(62) + 1  # not 0, which says that there is no memory
    with _Memory(nbytes, key) as mine:
        messages.post([_OPENS, nbytes, key if mine.fd is not None else 0, place() or 0, os.getpid(), mine.fd or 0])
        table = _check(messages.answer(), [_OPENS, nbytes])
        maps = _map_all(table, nbytes, mine)
        messages.post([_HAS_MAPPED, nbytes, maps is not None])
        has_all = all(row[2] for row in _check(messages.answer(), [_HAS_MAPPED, nbytes]))
    if maps is None or not has_all:
        return None
    return Slots([list(torch.split(memory[_HEADER:].view(dtype), numel)) for memory in maps], messages)


class _Memory:
    """Memory of this rank, which others can map while the context lasts.

    Attributes:
        fd: Its file descriptor, and ``bytes``, the memory; None if the system gave none, or the user wants none.
    """

    def __init__(self, nbytes: int, key: int) -> None:
        self.fd: int | None = None
        self.bytes: Tensor | None = None
        if not is_wanted() or not hasattr(os, "memfd_create"):
            return
        try:
            self.fd = os.memfd_create(_NAME)
            self.bytes = _map(f"/proc/self/fd/{self.fd}", nbytes)
        except (OSError, RuntimeError):  # no descriptors or address space are left
            self.close()
        else:
            self.bytes[:8].view(torch.int64).fill_(key)

    def __enter__(self) -> _Memory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the descriptor; ``bytes`` remain."""
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None


def _map_all(table: Sequence[Sequence[int]], nbytes: int, mine: _Memory) -> list[Tensor] | None:
    """Map the memory of every rank, by its row of ``table``; None if that is not possible. Local."""
    places = {where for _, _, _, where, _, _ in table}
    if mine.bytes is None or len(places) > 1 or not all(key for _, _, key, *_ in table):
        return None
    try:
        return [
            mine.bytes if pid == os.getpid() else _map_peer(f"/proc/{pid}/fd/{fd}", nbytes, key)
            for _, _, key, _, pid, fd in table
        ]
    except (OSError, RuntimeError):  # another user's process, or not enough address space
        return None


def _map_peer(path: str, nbytes: int, key: int) -> Tensor:
    # Looked at before it is opened, which may have effects; and torch enlarges a file that is too short.
    if not os.readlink(path).startswith(f"/memfd:{_NAME}") or os.stat(path).st_size != nbytes:
        raise OSError(f"{path} is not the memory of a rank.")
    memory = _map(path, nbytes)
    if int(memory[:8].view(torch.int64)) != key:
        raise OSError(f"{path} is the memory of another job.")
    return memory


def _map(path: str, nbytes: int) -> Tensor:
    return torch.from_file(path, shared=True, size=nbytes, dtype=torch.uint8)


def _check(table: list[list[int]], expected: list[int]) -> list[list[int]]:
    """Return ``table``; raise if some rank's message does not begin with ``expected``."""
    for there, row in enumerate(table):
        if row[: len(expected)] != expected:
            raise AgreementError(
                f"rank {there} has laid out the optimizer's state otherwise than the other ranks, or at another time. "
                "Call load_state_dict, and change parameters, on every rank between the same two updates."
            )
    return table
