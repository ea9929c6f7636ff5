"""Give an optimizer the lr of a range test during each ``step``, and count its applied updates."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dist_adamw.range_test.curve import lr_of
from dist_adamw.schedule.base_values import BaseValues
from dist_adamw.schedule.clock import was_applied
from dist_adamw.schedule.scheduled_optimizer import ScheduledOptimizer
from dist_adamw.schedule.scheduler import CyclicLRWithRestarts
from dist_adamw.schedule.weight_decay import decay_by_lr, decay_factors

_Values = tuple[dict[str, Any], Any, Any]  # a group, and the lr and weight decay that it had


@dataclass(frozen=True, slots=True)
class _Known:
    """A parameter group from the start of the test. The reference keeps its ``id`` from being used for another dict.

    Attributes:
        base: Its lr before any schedule.
        decay_for: Returns its weight decay for an lr; None: unchanged.
    """

    group: dict[str, Any]
    base: float
    decay_for: Callable[[float], float] | None


class LROverride:
    """Sets the lr of a range test in every group during ``step``, by hooks. Local.

    Outside of ``step`` groups have the values of their schedule, which therefore notices nothing.

    Args:
        optimizer: A torch optimizer, without wrappers.
        scheduler: Its scheduler, if known. A `CyclicLRWithRestarts` has the groups' base lr, and computes the weight
            decay for another one.
        lowest: lr of the first update, for the group with the largest base lr. Others keep their ratio to it.
        highest: lr of the last update.
        updates: Number of updates.

    Attributes:
        updates: Applied updates so far.
        skipped: Updates that were skipped since the last applied one.

    Raises:
        ValueError: every group's lr is 0.
    """

    def __init__(
        self, optimizer: Optimizer, scheduler: LRScheduler | None, lowest: float, highest: float, updates: int
    ) -> None:
        self.updates = self.skipped = 0
        self._optimizer, self._lowest, self._highest, self._planned = optimizer, lowest, highest, updates
        groups = optimizer.param_groups
        bases = [float(group.get("initial_lr", group["lr"])) for group in groups]
        decays: list[Callable[[float], float] | None] = [None] * len(groups)
        self._schedule: ScheduledOptimizer | None = None
        if isinstance(scheduler, CyclicLRWithRestarts):
            self._schedule = scheduler._scheduled
            known = scheduler._scheduled.bases()
            bases = [base.lr * base.lr_scale for base in known]
            decays = [_decay_for(scheduler, base, group) for base, group in zip(known, groups, strict=True)]
        self._largest = max(bases, default=0.0)
        if not 0 < self._largest < math.inf:
            raise ValueError(
                f"the largest lr of a parameter group is {self._largest}: give groups a finite lr above 0."
            )
        known_groups = [_Known(*values) for values in zip(groups, bases, decays, strict=True)]
        self._known = {id(one.group): one for one in known_groups}
        # No warning while the test runs on past the end of the schedule.
        self._had_passed_end = self._schedule is not None and self._schedule.has_passed_end
        if self._schedule is not None:
            self._schedule.has_passed_end = True
        self._before: list[_Values] = []
        self._is_in_step = False
        self._stepped: set[int] = set()
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    @property
    def lr(self) -> float:
        """The lr of the next update."""
        return lr_of(self.updates, self._lowest, self._highest, self._planned)

    @property
    def last_lr(self) -> float:
        """The lr of the last applied update; of the first one before that."""
        return lr_of(max(self.updates - 1, 0), self._lowest, self._highest, self._planned)

    def remove(self) -> None:
        """Remove the hooks, and put back the values of a ``step`` that raised. Local."""
        for hook in self._hooks:
            hook.remove()
        if self._schedule is not None:
            self._schedule.has_passed_end = self._had_passed_end
        self._put_back()

    def _before_step(self, optimizer: Optimizer, *_: Any) -> None:
        self._put_back()  # from a step that raised; a nested call sets the same values again
        self._is_in_step = True
        lr = self.last_lr if self._continues() else self.lr
        for group in optimizer.param_groups:
            known = self._known.get(id(group))
            base = float(group.get("initial_lr", group["lr"])) if known is None else known.base
            decay_for = None if known is None else known.decay_for
            self._before.append((group, group["lr"], group.get("weight_decay")))
            own = lr * (base / self._largest)
            # A new tensor: the schedule recognises a change of the tensor that it wrote by its version counter.
            group["lr"] = group["lr"].detach().clone().fill_(own) if isinstance(group["lr"], Tensor) else own
            if decay_for is not None and own > 0:
                group["weight_decay"] = decay_for(own)

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        if not self._is_in_step:  # a step() that calls its parent class's runs the hooks twice
            return
        self._is_in_step = False
        self._put_back()
        if self._continues():
            self._stepped |= self._shown()
        elif was_applied(optimizer):
            self._stepped = self._shown()
            self.updates, self.skipped = self.updates + 1, 0
        else:
            self._stepped = set()
            self.skipped += 1

    def _put_back(self) -> None:
        for group, lr, decay in self._before:
            group["lr"] = lr
            if decay is not None:
                group["weight_decay"] = decay
        self._before.clear()

    def _continues(self) -> bool:
        """Return whether this call is part of the last update: ZeRO steps groups, or parts of them, one by one."""
        return bool(self._stepped) and self._stepped.isdisjoint(self._shown())

    def _shown(self) -> set[int]:
        params = filter(None, map(operator.itemgetter("params"), self._optimizer.param_groups))
        return {id(of_group[0]) for of_group in params}


def _decay_for(
    scheduler: CyclicLRWithRestarts, base: BaseValues, group: dict[str, Any]
) -> Callable[[float], float] | None:
    """Return a function from a group's lr to its weight decay at the peak of the current cycle, if that were its base.

    A normalised decay takes the same part of the weights away whatever the base lr, so that ``weight_decay`` must
    shrink as lr grows: with that of the present base, a large lr would diverge by decay alone. None: the decay stays as
    it is.
    """
    recipe = scheduler._scheduled.recipe
    convention = recipe.decay_convention(scheduler.optimizer, group)
    if convention == "l2":
        return None
    reading, scale = recipe.decay_reading, recipe.batch_scale(scheduler.samples)
    norm = recipe.decay_norm_in(recipe.schedule.at(scheduler.samples).cycle, scheduler.samples)

    def decay(lr: float) -> float:
        other = replace(base, lr=lr / (base.lr_scale * scale), min_lr=0.0)
        if convention == "lr":
            return decay_by_lr(other, reading, norm=norm, batch_scale=scale)
        a, b = decay_factors(other, reading, norm=norm)
        return a * other.lr / b

    return decay
