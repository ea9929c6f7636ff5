"""The averages of the weights in a checkpoint."""

from __future__ import annotations

from collections.abc import Callable

from torch.optim import Optimizer

from dist_adamw.checkpoint.local_state import MASTER, MODEL, LocalState
from dist_adamw.checkpoint.storage.index import Index
from dist_adamw.errors import CheckpointError
from dist_adamw.optimizer.averages import SavedAverage, described, from_groups
from dist_adamw.schedule.saved import OnDifference


def averages_in(index: Index) -> dict[str, SavedAverage]:
    """Return the averages in a checkpoint by name. Local.

    Raises:
        CheckpointError: what it says of them is damaged.
    """
    try:
        return from_groups(index.about["groups"])
    except ValueError as error:
        raise CheckpointError(f"{index.folder} is damaged: {error}") from error


def check_averages(index: Index, optimizer: Optimizer, choice: OnDifference) -> None:
    """Raise if a checkpoint has other averages than ``optimizer``, unless ``choice`` is "new". Local.

    Raises:
        CheckpointError: names both.
    """
    there = {name: saved.options for name, saved in averages_in(index).items()}
    averages = getattr(optimizer, "averages", {})
    here = {name: described(name, average, 0).options for name, average in averages.items()}
    if there != here and choice != "new":
        was, now = (", ".join(f"{n}: {options}" for n, options in sorted(of.items())) or "none" for of in (there, here))
        raise CheckpointError(
            f"{index.folder} has these averages of the weights: {was}; and this optimizer keeps: {now}. Pass the same "
            "to DistAdamW, or on_difference='new': those that the checkpoint lacks begin then, and others are dropped."
        )


def slots_of(index: Index, average: str) -> list[str]:
    """Return the kinds of the tensors whose mean an average is, oldest first. Local.

    Raises:
        CheckpointError: the checkpoint has no such average, or nothing was added to it yet.
    """
    known = averages_in(index)
    if average not in known:
        raise CheckpointError(
            f"{index.folder} has no average {average!r} of the weights; it has {', '.join(known) or 'none'}."
        )
    if not known[average].count:
        raise CheckpointError(f"{index.folder} has the average {average!r}, to which no weights were added yet.")
    return known[average].oldest_first()


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
