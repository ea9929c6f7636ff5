"""Collect the parameters whose gradients have arrived, as hooks report them."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Mapping

from torch import Tensor

from dist_adamw.optimizer.gradients.record import GradientRecord


class Arrivals:
    """Parameters whose gradients arrived since `take` was last called.

    The hooks of most parameters only append to an inbox, which runs in C; a few also check what can be sent.

    Attributes:
        updates_to_record: Updates until the order of arrival is no longer recorded.
    """

    def __init__(self, record: GradientRecord) -> None:
        self._record = record
        self._inboxes: list[deque[Tensor]] = []
        self._last: list[Tensor] = []  # the parameter whose hook last checked what can be sent
        self.updates_to_record = 0
        self._order: dict[int, None] = {}  # ids, in the order of the first arrival in this update

    def new_inbox(self, size: int) -> deque[Tensor]:
        """Return an inbox for ``size`` parameters."""
        # Bounded, because hooks of a module that outlives the optimizer would append to it forever.
        self._inboxes.append(deque(maxlen=size))
        return self._inboxes[-1]

    def note(self, param: Tensor) -> None:
        """Include ``param`` in the next `take`; until then, hooks registered later may still change its gradient."""
        self._last.append(param)

    def record_order(self, updates: int) -> None:
        """Record in which order gradients arrive, for at least ``updates`` updates. Local."""
        self.updates_to_record = max(updates, self.updates_to_record)

    def bucket_arrived(self, params: Iterable[Tensor], order: Mapping[int, int]) -> None:
        """Record that the gradients of one of DDP's buckets have arrived. Local.

        Args:
            order: The place of parameters in the layout, by id. Its end is sent first.
        """
        if self.updates_to_record:  # all at the same time, so they keep the order that they have in the layout
            self._note_order(sorted(params, key=lambda param: order.get(id(param), len(order)), reverse=True))

    def _note_order(self, params: Iterable[Tensor]) -> None:
        if self.updates_to_record:
            self._order.update(dict.fromkeys(map(id, params)))

    def end_update(self) -> list[int]:
        """Return ids in the order in which gradients arrived in this update, and record that of the next one. Local."""
        self._note_order(self._all())
        order, self._order = list(self._order), {}
        self.updates_to_record -= 1
        return order

    @property
    def has_any(self) -> bool:
        """Whether some inbox has a parameter."""
        return any(self._inboxes)

    def take(self) -> list[Tensor]:
        """Return the parameters that have arrived, and clear the record of them. Local."""
        params = self._all()
        self._note_order(params)
        if self._record.filled:  # backward has added to zeros that were filled in, so these are gradients now
            self._record.filled.difference_update(map(id, params))
        self._last.clear()
        for inbox in self._inboxes:
            inbox.clear()
        return params

    def _all(self) -> list[Tensor]:
        # In the order of arrival, unless hooks of several modules have taken turns since the last check.
        return list(itertools.chain(self._last, *self._inboxes))
