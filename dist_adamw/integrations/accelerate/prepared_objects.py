"""Remember the objects that one ``prepare`` returned, without keeping them alive."""

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
    """The objects of one `prepare`, held weakly: Accelerate keeps them alive.

    Args:
        model: As prepared; Accelerate has this or the module inside it.
        optimizer: As prepared.
        stepped: The scheduler in Accelerate's list, perhaps a wrapper.
        scheduler: The scheduler without a wrapper.
        position: The position in the data.
        watch: Compares ranks; None for one rank.
        group: The process group for messages on the host.
        clipping: The norm to which DeepSpeed clips; None under other engines.
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
        """Return whether this belongs to ``optimizer``; None: whether its optimizer is gone. Local."""
        return self._optimizer() is optimizer

    def replaced_by(self, newer: Prepared) -> bool:
        """Return whether ``newer`` belongs to the same optimizer. Local."""
        return self._optimizer() is newer._optimizer()

    def known(self, number: int) -> Known | None:
        """Return the objects, for Accelerate's ``number``-th optimizer; None if one of them is gone. Local."""
        model, optimizer, scheduler = self._model(), self._optimizer(), self._scheduler()
        model = self._bare() if model is None else model  # the wrapper is gone, and its module is not
        if model is None or optimizer is None or scheduler is None:
            return None
        name = FOLDER if number == 0 else f"{FOLDER}_{number}"
        watch = None if self._watch is None else self._watch()
        return Known(self, name, model, optimizer, scheduler, watch, (model, self._bare(), optimizer, self._stepped()))


@dataclass(frozen=True, slots=True)
class Known:
    """Prepared objects that still exist.

    Attributes:
        of: The record.
        name: The name of its folder in a checkpoint.
        model: As prepared.
        optimizer: As prepared.
        scheduler: The scheduler without a wrapper.
        watch: Compares ranks.
        listed: The objects that may be in Accelerate's lists.
    """

    of: Prepared
    name: str
    model: nn.Module
    optimizer: Optimizer
    scheduler: LRScheduler
    watch: ReplicaWatch | None
    listed: tuple[Any, ...]


def samples_or_steps(scheduler: LRScheduler) -> int:
    """Return the progress of a schedule: samples for ours, steps for others. Local."""
    return int(getattr(scheduler, "samples", scheduler.last_epoch))
