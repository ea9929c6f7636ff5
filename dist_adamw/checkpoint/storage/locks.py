"""Lock folders and files against other jobs, at most until this process ends."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import itertools
import os
import socket
import time
import warnings
import weakref
from pathlib import Path

from dist_adamw.errors import CheckpointError

_JOB_LOCK = "lock"


class Lock:
    """Lock a folder against saves of other jobs, until released or garbage-collected. Local.

    Raises:
        CheckpointError: another job saves there.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self.release = weakref.finalize(self, unlock, own(handle))
        try:
            is_locked = _try_lock(handle)
        except OSError:
            return  # some network file systems have no locks; `JobLock` warns of it, once
        if not is_locked:
            raise CheckpointError(f"another job is saving to {folder}. Choose another folder.")


class JobLock:
    """Lock a folder of checkpoints against other jobs, until released or garbage-collected. Local.

    The lock is a file in the folder, which names the process that holds it.

    Args:
        root: The folder.
        patience: Seconds to wait until another job ends.

    Raises:
        CheckpointError: another job, or another lock of this process, holds the folder.
    """

    def __init__(self, root: Path, patience: float) -> None:
        # O_NOFOLLOW: through a symlink, the write below would overwrite some other file.
        handle = os.open(root / _JOB_LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        self.release = weakref.finalize(self, unlock, own(handle))
        try:
            is_locked = _lock_patiently(handle, patience)
        except OSError as error:
            # Level 5 is the constructor of `CheckpointFolder`, from here through `Ranks.run`.
            warnings.warn(f"{root} cannot be locked ({error}): make sure that only one job saves there.", stacklevel=5)
            is_locked = True
        if not is_locked:
            holder = os.read(handle, 200).decode(errors="replace").strip()
            self.release()
            raise CheckpointError(_taken(root, holder))
        os.ftruncate(handle, 0)
        os.write(handle, _this_process().encode())


def _lock_patiently(handle: int, patience: float) -> bool:
    until = time.monotonic() + patience
    while not _try_lock(handle):
        if time.monotonic() > until:
            return False
        time.sleep(0.1)
    return True


def _taken(root: Path, holder: str) -> str:
    if holder == _this_process():
        return f"this process has a CheckpointFolder of {root} already. Use that, or close() it."
    who = holder or "it does not say which"
    return f"another job saves to {root} ({who}). Wait for its end, or choose another folder."


def _this_process() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def _try_lock(handle: int) -> bool:
    """Lock an open file; return False if another job has it locked.

    Raises:
        OSError: the file system has no locks.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


# File descriptors, by numbers of our own: the system reuses descriptors, and a late `unlock` would close another file.
_handles: dict[int, int] = {}
_numbers = itertools.count()


def own(handle: int) -> int:
    """Register a file before it is locked; return the number for `unlock`. Local.

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
