"""Who tells a run log which batches an update had, if the loop does not."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Protocol

from torch.optim import Optimizer


class BatchSource(Protocol):
    """An observer of a loop's batches.

    Attributes:
        batch_digests: Functions that return the digests of this rank's batches of the last update that was begun, one
            per micro-batch, in order.
    """

    batch_digests: Sequence[Callable[[], int]]


_SOURCES: weakref.WeakKeyDictionary[Optimizer, weakref.ref[BatchSource]] = weakref.WeakKeyDictionary()
_READERS: weakref.WeakSet[object] = weakref.WeakSet()


def provide(optimizer: Optimizer, source: BatchSource) -> None:
    """Let ``source``, held weakly, tell the batches of this optimizer's updates. Local."""
    _SOURCES[optimizer] = weakref.ref(source)


def source_of(optimizer: Optimizer) -> BatchSource | None:
    """Return what tells the batches of this optimizer's updates. Local."""
    found = _SOURCES.get(optimizer)
    return None if found is None else found()


def add_reader(reader: object) -> None:
    """Have batches hashed as long as ``reader`` lives, or until `remove_reader`. Local."""
    _READERS.add(reader)


def remove_reader(reader: object) -> None:
    """End what `add_reader` began. Local."""
    _READERS.discard(reader)


def are_read() -> bool:
    """Return whether batches have to be hashed. Local."""
    return bool(_READERS)
