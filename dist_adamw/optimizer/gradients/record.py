"""Record which gradients of an attached optimizer are local, averaged, filled in or freed."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor

from dist_adamw.optimizer.gradients.change_watch import GradientWatch
from dist_adamw.optimizer.sharding.shard import Shard


class GradientRecord:
    """The state of gradients between two updates. Sets hold ids of parameters.

    A gradient is local until it is sent; then its owner has the average, and the others have what they sent.

    Attributes:
        watch: The gradients as backward, or the last accepted change, left them.
        has_begun: Whether gradients have come.
        is_whole: Whether every ``param.grad`` is the average over all ranks, to be taken as it is.
        is_reopened: Whether averages have become sums of local gradients again.
        was_changed: Whether a forward pass has seen that the user changed gradients. The update tells all ranks.
        is_accepted: Whether the user accepted changes before unannounced gradients were compared.
        is_compared: Whether unannounced gradients were compared over ranks since the last backward pass.
        has_let_go: Whether an update has used gradients that are in no ``param.grad``.
        filled: Given zeros, because only other ranks have a gradient.
        in_shard: With a gradient, where gradients are kept in the shard.
        used: Whose gradient the last update used, where gradients are kept in the shard.
        local: Unannounced, and seen to differ over ranks.
        late: Unannounced, and averaged in an update since they were last set to zero.
        kept: Unannounced, and averaged into the shard: their ``param.grad`` is None.
    """

    def __init__(self) -> None:
        self.watch = GradientWatch()
        self.has_begun = self.is_whole = self.is_reopened = False
        self.was_changed = self.is_accepted = self.is_compared = self.has_let_go = False
        self.filled: set[int] = set()
        self.in_shard: set[int] = set()
        self.used: set[int] = set()
        self.local: set[int] = set()
        self.late: set[int] = set()
        self.kept: set[int] = set()

    def clear_round(self) -> None:
        """Forget gradients that were used or discarded. ``param.grad`` still holds averages until it is set to zero."""
        self.has_begun = self.is_accepted = self.is_reopened = False
        self.filled.clear()
        self.in_shard.clear()
        self.kept.clear()


class OptimizerLink:
    """The optimizer of a path, held weakly.

    The optimizer owns the path: a strong reference back would leave both to the garbage collector, and with them the
    process group, perhaps until the interpreter ends.

    Args:
        params: The optimizer's method that gives every parameter, in order.
        shards: Its method that gives the shards, and builds them if there are none yet.
        gather: Its method that makes every gradient whole. Collective.
    """

    def __init__(
        self, params: Callable[[], list[Tensor]], shards: Callable[[], list[Shard]], gather: Callable[[], None]
    ) -> None:
        self._params, self._shards = weakref.WeakMethod(params), weakref.WeakMethod(shards)
        self._gather = weakref.WeakMethod(gather)

    def params(self) -> list[Tensor]:
        """Every parameter; none of an optimizer that is gone."""
        method = self._params()
        return [] if method is None else method()

    def shards(self) -> list[Shard]:
        """The shards, built if there are none yet; none of an optimizer that is gone."""
        method = self._shards()
        return [] if method is None else method()

    def gather(self) -> None:
        """Make every gradient whole. Collective."""
        if (method := self._gather()) is not None:
            method()

    def keep_alive(self) -> Any:
        """Return an object that keeps the optimizer alive."""
        return self._gather()
