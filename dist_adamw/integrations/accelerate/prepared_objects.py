"""Remember what one ``prepare`` returned, without keeping it alive."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dist_adamw.integrations.accelerate.position import Position
from dist_adamw.integrations.accelerate.state_folder import FOLDER
from dist_adamw.optimizer.replicas import ReplicaWatch
from dist_adamw.wrappers import bare


class Prepared:
    """The objects of one `prepare`. It holds them weakly: Accelerate keeps them, for as long as it knows them.

    Args:
        model: As prepared; Accelerate has it, or what is in it.
        optimizer: As prepared.
        stepped: What Accelerate has among its schedulers.
        scheduler: Itself.
        position: In the data.
        watch: What compares ranks; None for one rank.
        group: For messages on the host.
        clipping: To which norm DeepSpeed clips; None where it does not run.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        stepped: Any,
        scheduler: LRScheduler,
        position: Position,
        watch: ReplicaWatch | None,
        group: dist.ProcessGroup | None,
        clipping: float | None,
    ) -> None:
        self._model, self._bare = weakref.ref(model), weakref.ref(bare(model))
        self._optimizer, self._stepped, self._scheduler = map(weakref.ref, (optimizer, stepped, scheduler))
        self._watch = None if watch is None else weakref.ref(watch)
        self.position, self.group, self.clipping = position, group, clipping
        self.loaded_at: int | None = None  # the schedule's clock at the last load

    def is_of(self, optimizer: Optimizer | None) -> bool:
        """Return whether this goes with ``optimizer``; with None: with one that is gone. Local."""
        return self._optimizer() is optimizer

    def replaced_by(self, newer: Prepared) -> bool:
        """Return whether ``newer`` is of the same optimizer. Local."""
        return self._optimizer() is newer._optimizer()

    def known(self, number: int) -> Known | None:
        """Return the objects of the ``number``-th optimizer; None where one of them is gone. Local."""
        model, optimizer, scheduler = self._model(), self._optimizer(), self._scheduler()
        model = self._bare() if model is None else model  # of a wrapper that is gone
        if model is None or optimizer is None or scheduler is None:
            return None
        name = FOLDER if number == 0 else f"{FOLDER}_{number}"
        watch = None if self._watch is None else self._watch()
        return Known(self, name, model, optimizer, scheduler, watch, (model, self._bare(), optimizer, self._stepped()))


@dataclass(frozen=True, slots=True)
class Known:
    """The prepared objects that Accelerate still knows.

    Attributes:
        of: The record.
        name: Of its folder in a checkpoint.
        model: As prepared.
        optimizer: As prepared.
        scheduler: Itself.
        watch: What compares ranks.
        listed: What Accelerate has in its lists.
    """

    of: Prepared
    name: str
    model: nn.Module
    optimizer: Optimizer
    scheduler: LRScheduler
    watch: ReplicaWatch | None
    listed: tuple[Any, ...]


def samples_or_steps(scheduler: LRScheduler) -> int:
    """Return how far a schedule has come: samples of ours, steps of others. Local."""
    return int(getattr(scheduler, "samples", scheduler.last_epoch))
