"""The few collectives that a sharded update needs, and agreement checks.

Floor 1: knows tensors, process groups and ``torch.distributed``; nothing of optimizers.
Every function is collective over ``group`` unless it says otherwise.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import json
import time
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Record = Mapping[str, Any]


def initialized() -> bool:
    """Whether a process group exists. Local."""
    return dist.is_available() and dist.is_initialized()


def world_size(group: dist.ProcessGroup | None = None) -> int:
    """Ranks in ``group``; 1 without a process group. Local."""
    return dist.get_world_size(group) if initialized() else 1


def rank(group: dist.ProcessGroup | None = None) -> int:
    """This rank in ``group``; 0 without a process group. Local."""
    return dist.get_rank(group) if initialized() else 0


@functools.cache
def end_quietly() -> None:
    """Let a process that ends right after a collective end well. Local; call it wherever ranks begin to work together.

    gloo's threads let go of a collective's tensors a moment after it is over, and need Python for that. One that
    is refused it, because the interpreter is ending, aborts the process: "terminate called without an active
    exception". Seen at the end of 1 of 10 plain torch jobs.
    """
    atexit.register(time.sleep, 0.02)


_hosts: list[tuple[dist.ProcessGroup, dist.ProcessGroup]] = []  # default groups, and gloo groups of the same ranks


def host_group() -> dist.ProcessGroup | None:
    """All ranks, in a group for messages on the host: None, the default group, where that can (gloo).

    Made once in a job, with the default group's timeout. Collective the first time.
    """
    if not initialized():
        return None
    default = dist.group.WORLD
    assert default is not None
    try:
        default._get_backend(torch.device("cpu"))
    except RuntimeError:  # NCCL alone
        pass
    else:
        return None
    for known, group in _hosts:
        if known is default:
            return group
    options = getattr(default._get_backend(torch.device("cuda")), "options", None)
    made: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=getattr(options, "_timeout", None))
    _hosts.append((default, made))
    return made


def all_reduce_sum(value: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Sum ``value`` over the ranks, in place."""
    if world_size(group) > 1:
        dist.all_reduce(value, group=group)
    return value


def all_gather_objects(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Every rank's ``value`` (small and picklable), in rank order. For set-up, never per update."""
    values: list[Any] = [None] * world_size(group)
    if len(values) == 1:
        return [value]
    dist.all_gather_object(values, value, group=group)
    return values


class AgreementError(RuntimeError):
    """Ranks that must be in the same state are not. Raised on every rank alike."""


def check_agreement(record: Record, group: dist.ProcessGroup | None = None) -> None:
    """Raise on every rank when ``record`` is not the same on all of them.

    Args:
        record: Plain, JSON-like values by field name.

    Raises:
        AgreementError: names the first rank that differs from rank 0, its fields and both values.
    """
    records = all_gather_objects(dict(record), group)
    for other, theirs in enumerate(records[1:], start=1):
        if canonical(theirs) != canonical(records[0]):
            raise AgreementError(_describe(records[0], other, theirs))


def fingerprint(record: Record) -> int:
    """A 62-bit digest of ``record``. Local."""
    return int.from_bytes(hashlib.blake2b(canonical(record).encode(), digest_size=8).digest(), "big") >> 2


def canonical(record: Record) -> str:
    """``record`` as text that is equal for equal values; floats keep every bit. Local."""
    return json.dumps(record, sort_keys=True, default=repr)


def _describe(ours: Record, other: int, theirs: Record) -> str:
    fields = [
        f"{name} is {_show(ours.get(name))} on rank 0 and {_show(theirs.get(name))} on rank {other}"
        for name in sorted({*ours, *theirs})
        if canonical({"": ours.get(name)}) != canonical({"": theirs.get(name)})
    ]
    return (
        f"rank {other} disagrees with rank 0: {'; '.join(fields)}. "
        "Build the model, the optimizer and the scheduler alike on every rank, and pass "
        "the same values to step() everywhere."
    )


def _show(value: object) -> str:
    text = "missing" if value is None else repr(value)
    return text if len(text) <= 200 else text[:200] + "..."


class AgreementWatch:
    """Compares a record over the ranks at every update, one update behind.

    `check` posts this update's fingerprint and looks at the previous update's answer, so the
    message travels while the ranks compute, and every rank learns of a difference at the same
    call. Collective: every rank calls `check` equally often.

    Args:
        group: A group that can reduce CPU tensors (gloo).
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        end_quietly()
        self._group = group
        self._posted: tuple[dist.Work, Tensor, Record] | None = None

    def check(self, record: Record) -> None:
        """Look at the last record's answer, then post ``record``.

        Raises:
            AgreementError: the last record was not the same on all ranks.
        """
        self.settle()
        digest = fingerprint(record)
        lowest = torch.tensor([digest, -digest], dtype=torch.int64)
        work = dist.all_reduce(lowest, op=dist.ReduceOp.MIN, group=self._group, async_op=True)
        assert work is not None
        self._posted = (work, lowest, dict(record))

    def settle(self) -> None:
        """Wait for the last answer. Call it before anything that must not keep a wrong state."""
        if self._posted is None:
            return
        work, lowest, record = self._posted
        self._posted = None
        work.wait()
        low, minus_high = lowest.tolist()
        if low != -minus_high:
            check_agreement(record, self._group)
