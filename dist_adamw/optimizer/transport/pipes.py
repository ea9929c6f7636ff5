"""Short messages between the ranks of one host, through pipes.

A message over gloo wakes a thread of gloo on both sides, which on a busy machine takes more processor time than the
rest of a small update. A rank writes to a pipe itself, and the reader wakes up from it.
"""

from __future__ import annotations

import contextlib
import os
import select
import stat
import struct
import time
import weakref
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dist_adamw.ranks import collectives

WIDTH = 24  # integers in a message; far below PIPE_BUF, so a message is written and read as a whole
_FORMAT = struct.Struct(f"={WIDTH}q")
_SLICE_MS = 1000
_all_open: weakref.WeakSet[Pipes] = weakref.WeakSet()


def _close_all() -> None:
    for pipes in list(_all_open):
        pipes.close()


# A child that is forked, such as a data loader's worker, would keep the pipes of a rank open that has been killed.
os.register_at_fork(after_in_child=_close_all)


class Pipes:
    """A pipe from each of the ranks to each other one. Messages arrive in the order in which they were posted.

    Args:
        timeout: Seconds to wait for a rank.

    Attributes:
        readers: By rank, the file descriptor from which its messages are read.
        writers: By rank, that to which messages for it are written.
    """

    def __init__(self, timeout: float) -> None:
        self.readers: dict[int, int] = {}
        self.writers: dict[int, int] = {}
        self._timeout = timeout
        self._posted = 0
        self._read: Counter[int] = Counter()
        self._rows: dict[tuple[int, int], tuple[int, ...]] = {}  # messages that were read early, by sender and number
        _all_open.add(self)

    def close(self) -> None:
        """Close the descriptors of this process. Local."""
        for fds in (self.readers, self.writers):
            while fds:
                os.close(fds.popitem()[1])

    def __del__(self) -> None:
        self.close()

    def post(self, numbers: Sequence[int]) -> int:
        """Send ``numbers``, at most WIDTH, to every other rank; return the number of the message. Local."""
        message = _FORMAT.pack(*numbers, *[0] * (WIDTH - len(numbers)))
        for fd in self.writers.values():
            # `wait` raises if the reader has gone; but first it reads what that rank has sent, which may say why.
            with contextlib.suppress(BrokenPipeError):
                os.write(fd, message)
        self._posted += 1
        return self._posted - 1

    def wait(self, number: int) -> dict[int, tuple[int, ...]]:
        """Wait for the messages with this number; return the integers of the other ranks. Collective; once for each.

        Raises:
            RuntimeError: a rank has exited, or sent nothing within the process group's timeout.
        """
        for there in self.readers:
            while self._read[there] <= number:
                self._rows[there, self._read[there]] = self._next(there)
                self._read[there] += 1
        return {there: self._rows.pop((there, number)) for there in self.readers}

    def _next(self, there: int) -> tuple[int, ...]:
        fd, deadline = self.readers[there], time.monotonic() + self._timeout
        arrives = select.poll()
        arrives.register(fd, select.POLLIN)
        while not arrives.poll(_SLICE_MS):
            if time.monotonic() > deadline:
                raise RuntimeError(f"rank {there} sent nothing for {self._timeout:g} s.")
        message = os.read(fd, _FORMAT.size)
        if not message:
            raise RuntimeError(f"rank {there} has exited, or its optimizer no longer exists.")
        return _FORMAT.unpack(message)


def open_pipes(group: dist.ProcessGroup) -> Pipes | None:
    """Open pipes between the ranks of ``group``; return None, on every rank, if one of them cannot. Collective."""
    rank, size = collectives.rank(group), collectives.world_size(group)
    others = [there for there in range(size) if there != rank]
    # First of all, since ranks on thousands of hosts should not make pipes to each other.
    places = set(collectives.all_gather_objects(place() if is_wanted() else None, group))
    if not others or len(places) > 1 or None in places:
        return None
    pipes = Pipes(_timeout_of(group))
    ends: dict[int, int] = {}  # that the others open and write to
    try:
        with contextlib.suppress(OSError):  # no descriptors are left
            for there in others:
                pipes.readers[there], ends[there] = os.pipe()
        paths = {there: (f"/proc/{os.getpid()}/fd/{fd}", os.fstat(fd).st_ino) for there, fd in ends.items()}
        table = collectives.all_gather_objects(paths, group)
        with contextlib.suppress(OSError, KeyError):  # another user's process; or a rank had no descriptors
            for there in others:
                pipes.writers[there] = _open(*table[there][rank])
        can = collectives.all_gather_objects(len(pipes.writers) == len(others), group)
    finally:
        for fd in ends.values():
            os.close(fd)
    return pipes if all(can) else None


def place() -> int | None:
    """Return a number that is the same on ranks that can see each other's processes; None: no others can."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        return int(boot.replace("-", ""), 16) % (1 << 31) << 31 | os.stat("/proc/self/ns/pid").st_ino % (1 << 31)
    except (OSError, ValueError):  # not Linux
        return None


def is_wanted() -> bool:
    """Return whether ranks of one host may share pipes and memory. Local."""
    return os.environ.get("DIST_ADAMW_SHARED_MEMORY") != "0"


def _open(path: str, inode: int) -> int:
    found = os.stat(path)
    if not stat.S_ISFIFO(found.st_mode) or found.st_ino != inode:  # before it is opened, which may have effects
        raise OSError(f"{path} is not the pipe of a rank.")
    return os.open(path, os.O_WRONLY | os.O_CLOEXEC)


def _timeout_of(group: dist.ProcessGroup) -> float:
    options: Any = getattr(group._get_backend(torch.device("cpu")), "options", None)
    timeout = getattr(options, "_timeout", None)
    return 1800.0 if timeout is None else float(timeout.total_seconds())
