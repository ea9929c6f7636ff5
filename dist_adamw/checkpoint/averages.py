"""The averages of the weights in a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from dist_adamw.checkpoint.local_state import MASTER, MODEL, LocalState
from dist_adamw.checkpoint.storage.index import Index
from dist_adamw.errors import CheckpointError
from dist_adamw.optimizer.averages import AVERAGED
from dist_adamw.optimizer.sharding.bucket_views import MOMENTS


def averages_in(index: Index) -> set[str]:
    """Return the kinds of the saved tensors that are averages of weights. Local."""
    if not any(AVERAGED in group for group in index.about["groups"]):
        return set()
    trained = {name for group in index.about["groups"] for name in group["names"]}
    parts = (key.partition(".") for key in index.tensors)
    return {kind for kind, _, name in parts if name in trained} - {MODEL, MASTER, *MOMENTS}


def slots_of(index: Index, average: str) -> list[str]:
    """Return the kinds of the tensors whose mean an average is, oldest first. Local.

    Raises:
        CheckpointError: the checkpoint has no such average, or nothing was added to it yet.
    """
    found = (group[AVERAGED] for group in index.about["groups"] if isinstance(group.get(AVERAGED), Mapping))
    counts: Mapping[str, Any] = next(found, {})
    kinds = averages_in(index)
    if average not in counts:
        raise CheckpointError(
            f"{index.folder} has no average {average!r} of the weights; it has {', '.join(counts) or 'none'}."
        )
    if not (count := counts[average]):
        raise CheckpointError(f"{index.folder} has the average {average!r}, to which no weights were added yet.")
    if average in kinds:
        return [average]
    kept = sum(f"{average}_{i}" in kinds for i in range(len(kinds)))
    return [f"{average}_{i % kept}" for i in range(max(0, count - kept), count)]


def instead_of_weights(index: Index, average: str, make_room: Callable[[], LocalState]) -> Callable[[], LocalState]:
    """Return ``make_room``, whose weights are read from an average. Local; changes nothing.

    Raises:
        CheckpointError: the checkpoint has no such average, or it is a mean of several tensors.
    """
    slots = slots_of(index, average)
    if len(slots) > 1:
        raise CheckpointError(
            f"{index.folder} has {average!r} as {len(slots)} tensors, whose mean it is. Export that: dist-adamw export "
            f"--kind safetensors --average {average}."
        )

    def make() -> LocalState:
        local_state = make_room()
        for key in local_state.tensors:
            kind, _, name = key.partition(".")
            if kind in (MODEL, MASTER) and (source := f"{slots[0]}.{name}") in index.tensors:
                local_state.sources[key] = source
        return local_state

    return make
