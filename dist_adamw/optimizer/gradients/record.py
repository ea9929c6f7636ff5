"""Record which gradients of an attached optimizer are local, averaged, filled in or freed."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor

from dist_adamw.optimizer.gradients.change_watch import GradientWatch
from dist_adamw.optimizer.sharding.shard import Shard


class GradientRecord:
    """The state of gradients between two updates. The sets hold ids of parameters.

    A gradient is local until it is sent; then each rank has the average of the elements that it owns.

    Attributes:
        watch: The gradients as backward, or the last accepted change, left them.
        has_begun: Whether a backward pass has produced gradients.
        is_whole: Whether every ``param.grad`` is the average over all ranks, which the update uses as it is.
        is_reopened: Whether averages have been turned back into sums of local gradients.
        was_changed: Whether a forward pass has found that the user changed gradients. The update tells all ranks.
        refusal: Why the update must be refused, as `UpdateReport.change`; 0 if nothing is known.
        is_accepted: Whether the user accepted changes before unannounced gradients were compared.
        is_compared: Whether unannounced gradients were compared over ranks since the last backward pass.
        has_let_go: Whether an update has used gradients and freed them, so that no ``param.grad`` has them.
        filled: Parameters that were given zeros, because only other ranks have a gradient.
        in_shard: Parameters with a gradient, if gradients are kept in the shard.
        used: Parameters whose gradient the last update used, if gradients are kept in the shard.
        local: Unannounced ones, whose gradients differ over ranks.
        late: Unannounced ones, averaged in an update since they were last set to zero.
        kept: Unannounced ones, averaged into the shard: their ``param.grad`` is None.
    """

    def __init__(self) -> None:
        self.watch = GradientWatch()
        self.has_begun = self.is_whole = self.is_reopened = False
        self.was_changed = self.is_accepted = self.is_compared = self.has_let_go = False
        self.refusal = 0
        self.filled: set[int] = set()
        self.in_shard: set[int] = set()
        self.used: set[int] = set()
        self.local: set[int] = set()
        self.late: set[int] = set()
        self.kept: set[int] = set()

    def clear_round(self) -> None:
        """Forget gradients that were used or discarded. ``param.grad`` still holds averages until it is set to zero."""
        self.has_begun = self.is_accepted = self.is_reopened = False
        self.refusal = 0
        self.filled.clear()
        self.in_shard.clear()
        self.kept.clear()


class OptimizerLink:
    """The optimizer of a path, held weakly.

    The optimizer owns the path. A strong reference back would leave both, and with them the process group, to the
    garbage collector, which may not run before the interpreter exits.

    Args:
        params: The optimizer's method that returns every parameter, in order.
        shards: Its method that returns the shards, and builds them if there are none yet.
        gather: Its method that makes every gradient whole. Collective.
    """

    def __init__(
        self, params: Callable[[], list[Tensor]], shards: Callable[[], list[Shard]], gather: Callable[[], None]
    ) -> None:
        self._params, self._shards = weakref.WeakMethod(params), weakref.WeakMethod(shards)
        self._gather = weakref.WeakMethod(gather)

    def params(self) -> list[Tensor]:
        """Return every parameter; none if the optimizer no longer exists."""
        method = self._params()
        return [] if method is None else method()

    def shards(self) -> list[Shard]:
        """Return the shards, built if there are none yet; none if the optimizer no longer exists."""
        method = self._shards()
        return [] if method is None else method()

    def gather(self) -> None:
        """Make every gradient whole. Collective."""
        if (method := self._gather()) is not None:
            method()

    def keep_alive(self) -> Any:
        """Return an object that keeps the optimizer alive."""
        return self._gather()
