"""Watch an optimizer's updates: the lr and weight decay that each used, and which were skipped."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from dist_adamw.optimizer.outcome import is_capturing
from dist_adamw.schedule.sample_scheduler import SampleScheduler
from dist_adamw.wrappers import unwrap


class WatchedUpdates:
    """What hooks on ``optimizer.step`` have seen of its updates. They read nothing from a device. Local.

    Args:
        optimizer: With or without its wrapper.
        clock: Counts its samples; None: another scheduler, which does not.
        accelerator: Has DeepSpeed's engine, if that makes the updates; or None.

    Attributes:
        optimizer: Without its wrapper.
        before: Samples before the last update, which determine its lr; None before the first one.
        unlogged: Samples before the first update since the owner last logged one; None: there was none.
        since: Samples before the first update since the owner last set this to None; None: there was none.
        is_new: Whether there was an update, applied or skipped, since the owner last set this to False.
        calls: How often ``step`` has returned.
        seconds: Time of the end of the last update; None before the first one.
    """

    def __init__(self, optimizer: Optimizer, clock: SampleScheduler | None, accelerator: Any) -> None:
        self.optimizer = unwrap(optimizer)
        self.before: int | None = None
        self.since: int | None = None
        self.unlogged: int | None = None
        self.is_new = False
        self.seconds: float | None = None
        self._wrapped: Any = optimizer
        self._clock, self._accelerator = clock, accelerator
        self._used: dict[int, tuple[float | Tensor, float]] = {}  # lr and weight decay, by id of the group
        self.calls = 0
        self._skipped = 0
        self._may_be_skipped = False
        self._skipped_before = 0 if self.engine is None else int(self.engine.skipped_steps)
        self.optimizer.register_step_pre_hook(_weak_hook(self._before_step))
        self.optimizer.register_step_post_hook(_weak_hook(self._after_step))

    @property
    def engine(self) -> Any:
        """DeepSpeed's engine, which Accelerate has after ``prepare``; None under other engines. Local."""
        return getattr(getattr(self._accelerator, "deepspeed_engine_wrapped", None), "engine", None)

    def _before_step(self) -> None:
        self._note_skipped()
        self.before = None if self._clock is None else self._clock.samples
        if self.since is None:
            self.since = self.before
        if self.unlogged is None:
            self.unlogged = self.before
        # ZeRO steps its groups one by one, and shows only one group in each call.
        for group in self.optimizer.param_groups:
            lr = group["lr"]
            # A scheduler writes the next lr into the same tensor.
            self._used[id(group)] = (lr.detach().clone() if isinstance(lr, Tensor) else lr), _decay_of(group)

    def _after_step(self) -> None:
        self.calls += 1
        self._may_be_skipped = self.is_new = True
        self.seconds = time.perf_counter()

    def _note_skipped(self) -> None:
        """Count the last update if it was skipped. Waits for the device if the host does not know yet.

        ``step`` itself asks before it begins, so in a hook before it nothing is waited for in addition.
        """
        if self._may_be_skipped and not is_capturing():
            self._may_be_skipped = False
            self._skipped += bool(getattr(self.optimizer, "step_was_skipped", False))

    def note_left_out(self) -> None:
        """Count an update for which Accelerate's GradScaler has not called ``step``. Call it once for each update."""
        state = getattr(self._wrapped, "gradient_state", None)
        if self.is_new or self.engine is not None or state is None or not state.sync_gradients:
            return
        self._skipped += bool(self._wrapped.scaler is not None and self._wrapped.step_was_skipped)

    def skipped(self) -> int:
        """Return how many updates were skipped so far. Waits for the device if the host does not know yet."""
        if (engine := self.engine) is not None:
            return max(0, int(engine.skipped_steps) - self._skipped_before)
        self._note_skipped()
        return self._skipped

    def applied(self) -> int:
        """Return how many updates were applied. Waits for the device if the host does not know yet."""
        updates = getattr(self.optimizer, "updates", None)
        if isinstance(updates, int):  # a DistAdamW, which also counts those before a resume
            return updates
        for state in self.optimizer.state.values():
            if "step" in state:
                return int(state["step"])
            break
        return self.calls

    def used(self, group: dict[str, Any]) -> tuple[float, float]:
        """Return the lr and weight decay with which the last update changed a group; before the first, the present."""
        lr, decay = self._used.get(id(group), (group["lr"], _decay_of(group)))
        return float(lr), decay


def _decay_of(group: dict[str, Any]) -> float:
    return group.get("weight_decay", 0.0)  # type: ignore[no-any-return]


def _weak_hook(method: Callable[[], None]) -> Callable[..., None]:
    """Return a hook on ``step`` that holds the method's object weakly."""
    known = weakref.WeakMethod(method)

    def hook(*_: Any) -> None:
        if (alive := known()) is not None:
            alive()

    return hook
