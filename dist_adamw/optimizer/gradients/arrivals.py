"""Collect the parameters whose gradients have arrived, as hooks report them."""

from __future__ import annotations

import itertools
from collections import deque

from torch import Tensor

from dist_adamw.optimizer.gradients.record import GradientRecord


class Arrivals:
    """Parameters whose gradients arrived since `take` was last called.

    The hooks of most parameters only append to an inbox, which runs in C; a few also check what can be sent.
    """

    def __init__(self, record: GradientRecord) -> None:
        self._record = record
        self._inboxes: list[deque[Tensor]] = []
        self._last: list[Tensor] = []  # the parameter whose hook last checked what can be sent

    def new_inbox(self, size: int) -> deque[Tensor]:
        """Return an inbox for ``size`` parameters."""
        # Bounded, because hooks of a module that outlives the optimizer would append to it forever.
        self._inboxes.append(deque(maxlen=size))
        return self._inboxes[-1]

    def note(self, param: Tensor) -> None:
        """Include ``param`` in the next `take`; until then, hooks registered later may still change its gradient."""
        self._last.append(param)

    @property
    def has_any(self) -> bool:
        """Whether some inbox has a parameter."""
        return any(self._inboxes)

    def take(self) -> list[Tensor]:
        """Return the parameters that have arrived, and clear the record of them. Local."""
        params = list(itertools.chain(self._last, *self._inboxes))
        if self._record.filled:  # backward has added to zeros that were filled in, so these are gradients now
            self._record.filled.difference_update(map(id, params))
        self._last.clear()
        for inbox in self._inboxes:
            inbox.clear()
        return params
