"""Collect the parameters whose gradients have arrived, as hooks report them."""

from __future__ import annotations

import itertools
from collections import deque

from torch import Tensor

from dist_adamw.optimizer.gradients.record import GradientRecord


class Arrivals:
    """Parameters noted since `take` was last called.

    Hooks on most parameters only append to an inbox, which runs in C; a few look what has come.
    """

    def __init__(self, record: GradientRecord) -> None:
        self._record = record
        self._inboxes: list[deque[Tensor]] = []
        self._last: list[Tensor] = []  # the parameter at which a hook last looked

    def new_inbox(self, size: int) -> deque[Tensor]:
        """Return an inbox for ``size`` parameters: bounded, because the module may outlive the optimizer."""
        self._inboxes.append(deque(maxlen=size))
        return self._inboxes[-1]

    def note(self, param: Tensor) -> None:
        """Count ``param`` as arrived at the next `take`: hooks registered later may still change its gradient."""
        self._last.append(param)

    @property
    def has_any(self) -> bool:
        """Whether some inbox has a parameter."""
        return any(self._inboxes)

    def take(self) -> list[Tensor]:
        """Return the parameters that were noted, and forget them. Local."""
        params = list(itertools.chain(self._last, *self._inboxes))
        if self._record.filled:  # backward has added to zeros that were filled in: now they are gradients
            self._record.filled.difference_update(map(id, params))
        self._last.clear()
        for inbox in self._inboxes:
            inbox.clear()
        return params
