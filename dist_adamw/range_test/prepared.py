"""An optimizer's accelerator and scheduler, from `dist_adamw.prepare`, and watchers of ``accelerator.backward``."""

from __future__ import annotations

import weakref
from typing import Any, Protocol

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

_known: weakref.WeakKeyDictionary[Optimizer, tuple[weakref.ref[Any], weakref.ref[LRScheduler]]] = (
    weakref.WeakKeyDictionary()
)


class Watcher(Protocol):
    """The range test of a whole script."""

    def prepared(self, accelerator: Any, optimizer: Optimizer, scheduler: LRScheduler) -> None:
        """Handle the end of ``prepare``. Collective."""

    def backward(self, accelerator: Any, loss: Any) -> None:
        """Handle the start of ``accelerator.backward(loss)``. Collective."""


_watchers: list[Watcher] = []


def watch(watcher: Watcher) -> None:
    """Call ``watcher`` from now on. Local."""
    _watchers.append(watcher)


def stop_watching(watcher: Watcher) -> None:
    """Call ``watcher`` no longer. Local."""
    _watchers.remove(watcher)


def is_watched() -> bool:
    """Return whether the script runs under a test of the whole script. Local."""
    return bool(_watchers)


def note_prepared(accelerator: Any, optimizer: Optimizer, scheduler: LRScheduler) -> None:
    """Note what belongs to ``optimizer``, without wrappers. Held weakly. Local without a watcher."""
    _known[optimizer] = weakref.ref(accelerator), weakref.ref(scheduler)
    for watcher in [*_watchers]:
        watcher.prepared(accelerator, optimizer, scheduler)


def note_backward(accelerator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Pass on the loss of ``accelerator.backward(*args, **kwargs)``. Local without a watcher."""
    for watcher in [*_watchers]:
        watcher.backward(accelerator, args[0] if args else kwargs.get("loss"))


def accelerator_of(optimizer: Optimizer) -> Any:
    """Return the optimizer's accelerator; None without `prepare`. Local."""
    known = _known.get(optimizer)
    return None if known is None else known[0]()


def scheduler_of(optimizer: Optimizer) -> LRScheduler | None:
    """Return the optimizer's scheduler; None without `prepare`. Local."""
    known = _known.get(optimizer)
    return None if known is None else known[1]()
