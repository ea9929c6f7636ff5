"""The collectives that a sharded update needs.

Every function is collective over ``group`` unless its docstring says otherwise.
"""

from __future__ import annotations

import atexit
import functools
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def initialized() -> bool:
    """Return whether a process group exists. Local."""
    return dist.is_available() and dist.is_initialized()


def world_size(group: dist.ProcessGroup | None = None) -> int:
    """Return the number of ranks in ``group``; 1 without a process group. Local."""
    return dist.get_world_size(group) if initialized() else 1


def rank(group: dist.ProcessGroup | None = None) -> int:
    """Return this process's rank in ``group``; 0 without a process group. Local."""
    return dist.get_rank(group) if initialized() else 0


def exists(group: dist.ProcessGroup) -> bool:
    """Return whether ``group`` has not been destroyed. Local."""
    try:
        dist.get_process_group_ranks(group)
    except (KeyError, ValueError):
        return False
    return True


@functools.cache
def end_quietly() -> None:
    """Prevent an abort when the process exits right after a collective. Local; call it once ranks start to communicate.

    gloo's threads release a collective's tensors shortly after it has finished, and need the GIL to do so. If the
    interpreter is already shutting down, the thread cannot get it and the process aborts: "terminate called without an
    active exception". Seen at the end of 1 in 10 plain torch jobs.
    """
    atexit.register(time.sleep, 0.02)


# Pairs of a default group and the gloo group of the same ranks. A job may destroy its default group and make another.
_hosts: list[tuple[dist.ProcessGroup, dist.ProcessGroup]] = []


def host_group() -> dist.ProcessGroup | None:
    """Return a group of all ranks that can send host tensors; None if the default group can (gloo).

    The group is made once per job, with the default group's timeout. Collective the first time.
    """
    if not initialized():
        return None
    default = dist.group.WORLD
    assert default is not None
    if serves_host(default):
        return None
    for known, group in _hosts:
        if known is default:
            return group
    options = getattr(default._get_backend(torch.device("cuda")), "options", None)
    made: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=getattr(options, "_timeout", None))
    _hosts.append((default, made))
    return made


def serves_host(group: dist.ProcessGroup) -> bool:
    """Return whether ``group`` can reduce tensors in host memory. Local."""
    try:
        group._get_backend(torch.device("cpu"))
    except RuntimeError:  # NCCL alone
        return False
    return True


def backend_of(group: dist.ProcessGroup, device: torch.device) -> str:
    """Return the name of the backend, such as "gloo", by which ``group`` sends tensors on ``device``. Local.

    Without a backend in ``init_process_group``, a group has one for each kind of device (``cpu:gloo,cuda:nccl``), and
    ``dist.get_backend`` names none of them. "" if the group cannot send such tensors.
    """
    try:
        return str(group._get_backend(device).name())
    except RuntimeError:
        return ""


def all_reduce_sum(value: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Sum ``value`` over the ranks, in place."""
    if world_size(group) > 1:
        dist.all_reduce(value, group=group)
    return value


def broadcast_from_first(tensors: list[Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Broadcast ``tensors`` from the first rank of ``group``, in place, as DDP's constructor does."""
    if tensors and world_size(group) > 1:
        group = dist.group.WORLD if group is None else group
        assert group is not None
        # 250 MiB is the buffer size that DDP's constructor passes.
        dist._broadcast_coalesced(group, tensors, 250 << 20, 0)  # type: ignore[attr-defined]


def all_gather_objects(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Return every rank's ``value`` (small and picklable), in rank order. For set-up, never per update."""
    values: list[Any] = [None] * world_size(group)
    if len(values) == 1:
        return [value]
    dist.all_gather_object(values, value, group=group)
    return values


def broadcast_object(value: Any, rank_in_group: int, group: dist.ProcessGroup | None = None) -> Any:
    """Return one rank's ``value`` on all ranks of ``group``. For errors and set-up, never per update."""
    holder = [value]
    dist.broadcast_object_list(holder, group=group, group_src=rank_in_group)
    return holder[0]
