"""Lock folders and files against other jobs, until this process ends."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import itertools
import os
import weakref
from pathlib import Path

from dist_adamw.errors import CheckpointError


class Lock:
    """Keep other jobs from saving to a folder, until it is released or forgotten, or the process ends. Local.

    Raises:
        CheckpointError: another job saves there.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self.release = weakref.finalize(self, unlock, own(handle))
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(f"another job is saving to {folder}. Choose another folder.") from None
        except OSError:
            pass  # some file systems of networks cannot; `CheckpointFolder` says so, once


_handles: dict[int, int] = {}  # by numbers that are never used again
_numbers = itertools.count()


def own(handle: int) -> int:
    """Register a file that is to be locked; return what `unlock` takes. Local.

    Forked processes close their copy of it. A data loader's worker would otherwise release the lock when it exits, or
    hold it after this process ends.
    """
    _close_in_forks()
    number = next(_numbers)
    _handles[number] = handle
    return number


def unlock(number: int) -> None:
    """Release the lock and close the file. Local; does nothing in a forked process."""
    if (handle := _handles.pop(number, None)) is not None:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)
        os.close(handle)


@functools.cache
def _close_in_forks() -> None:
    os.register_at_fork(after_in_child=_close_all)


def _close_all() -> None:
    while _handles:
        os.close(_handles.popitem()[1])
