"""Keep lr and weight decay of an optimizer's groups at what a recipe says of its clock."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dist_adamw.plain_data import plain
from dist_adamw.schedule.base_values import BaseValues, ScheduledGroups, copy_value
from dist_adamw.schedule.clock import SampleClock, crosses_epoch, crossing_warning
from dist_adamw.schedule.recipe import Recipe
from dist_adamw.schedule.restarts import SchedulePoint
from dist_adamw.schedule.saved import GROUPS, STATE_VERSION

_NOT_HYPER_PARAMETERS = ("params", "param_names", "lr", "weight_decay")


class ScheduledOptimizer:
    """An optimizer, the recipe for its parameter groups, and the clock of its updates. Local.

    It counts the optimizer's updates by hooks, once `listen` was called, and writes lr and weight decay into the
    groups whenever the clock or the recipe has changed.

    Args:
        optimizer: A torch optimizer, without wrappers.
        recipe: The options of the schedule.
        min_lr: Of groups without their own.
        clock: By default, one at sample 0.

    Attributes:
        groups: The parameter groups with their base values.
        last_lr: Of each group, as it was last written.
        has_crossed: Whether a warning has said that updates run across epoch ends.
    """

    def __init__(self, optimizer: Optimizer, recipe: Recipe, min_lr: float, clock: SampleClock | None = None) -> None:
        self.recipe = recipe
        self.min_lr = min_lr
        self.clock = SampleClock() if clock is None else clock
        self.groups = ScheduledGroups(optimizer, min_lr, recipe.group_check)
        self.last_lr: list[float | Tensor] = []
        self.has_crossed = False
        self._scheduler: weakref.ref[LRScheduler] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # The param groups keep the base values, and a copied tensor counts its versions from 0.
        return {
            "optimizer": self.optimizer,
            "recipe": self.recipe,
            "min_lr": self.min_lr,
            "clock": copy.copy(self.clock),
            "last_lr": self.last_lr,
            "has_crossed": self.has_crossed,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["optimizer"], state["recipe"], state["min_lr"], state["clock"])  # type: ignore[misc]
        self.last_lr = state["last_lr"]
        self.has_crossed = state["has_crossed"]

    @property
    def optimizer(self) -> Optimizer:
        """The torch optimizer whose groups are written."""
        return self.groups.optimizer

    @optimizer.setter
    def optimizer(self, optimizer: Optimizer) -> None:
        self.groups.optimizer = optimizer

    # ---------------------------------------------------------------- what the optimizer does

    def listen(self, scheduler: LRScheduler) -> None:
        """Register hooks that follow every update and load of the optimizer.

        Args:
            scheduler: What torch's schedulers keep of a step is kept up in it. It is not kept alive.
        """
        self._scheduler = weakref.ref(scheduler)
        optimizer = self.optimizer
        optimizer.register_step_pre_hook(_weak_hook(self._before_update))
        optimizer.register_step_post_hook(_weak_hook(self._after_update))
        # A loaded optimizer brings the lr and weight decay of the job that saved it, in new groups.
        optimizer.register_load_state_dict_pre_hook(_weak_hook(self._before_load))
        optimizer.register_load_state_dict_post_hook(_weak_hook(self._after_load))

    def _before_update(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.groups.are_known():
            self.write()
        _ = self.recipe.schedule  # an update at an unknown lr must not happen
        self.retract_skipped()
        self.clock.begin_update(self.optimizer, (*args, *kwargs.values()))

    def _after_update(self, *_: Any) -> None:
        self.clock.end_update(self.optimizer, has_lr=any(self.last_lr))

    def _before_load(self, *_: object) -> None:
        self.groups.follow()

    def _after_load(self) -> None:
        # torch has put new dicts in the places of the groups, with the base values of the job that saved them.
        self.groups.take_loaded()
        self.groups.restore()
        self.write()

    # ---------------------------------------------------------------- the clock

    def retract_skipped(self) -> None:
        """Take the last update back if the device turns out to have skipped it."""
        if self.clock.retract_skipped(self.optimizer):
            self.write(updates=-1)

    def go_to(self, samples: int) -> None:
        """Set the clock, and write what the schedule says of that sample."""
        self.clock.set(samples)
        self.write()

    def load(self, recipe: Recipe, groups: ScheduledGroups, samples: int) -> None:
        """Take over what `prepare_load` has made of a saved schedule."""
        self.recipe, self.groups = recipe, groups
        self.clock.set(samples)
        self.groups.restore()
        self.write()

    def find_crossing(self, samples: int | None) -> str | None:
        """Return a warning where the user counted an update of ``samples`` beyond what was called an epoch; once."""
        epoch_size = self.recipe.epoch_size
        if samples is None or epoch_size is None or self.clock.source is not None:
            return None
        if self.recipe.stream or self.has_crossed or not crosses_epoch(self.clock.samples, samples, epoch_size):
            return None
        self.has_crossed = True
        return crossing_warning(self.clock.samples, samples, epoch_size)

    # ---------------------------------------------------------------- lr and weight decay

    def write(self, updates: int = 0) -> None:
        """Write what the schedule says of the clock into the groups.

        Args:
            updates: How many the clock has counted since the last time; -1: it has taken one back.
        """
        self.groups.follow()
        if self.recipe.is_known:
            point = self.recipe.schedule.at(self.clock.samples)
            self.groups.write(self.recipe.group_values(point, self.groups, self.optimizer))
        self.last_lr = [copy_value(group["lr"]) for group in self.optimizer.param_groups]
        scheduler = None if self._scheduler is None else self._scheduler()
        if scheduler is not None:
            _keep_for_torch(scheduler, self, updates)

    def use(self, recipe: Recipe) -> None:
        """Go on by another recipe, from the same sample."""
        self.recipe = recipe
        self.write()

    def bases(self) -> list[BaseValues]:
        """Return the base values of the optimizer's groups as they are now."""
        self.groups.follow()
        return [one.base for one in self.groups]

    def lr(self) -> list[float]:
        """Return the lr of each group at the clock's sample."""
        point = self.recipe.schedule.at(self.clock.samples)
        return [self.recipe.lr(point, base) for base in self.bases()]

    def weight_decay(self) -> list[float]:
        """Return the weight decay that stands in each group."""
        return [group.get("weight_decay", 0.0) for group in self.optimizer.param_groups]

    def find_other_writer(self) -> str | None:
        """Return a warning where lr or weight decay is not what was written; once."""
        return self.groups.find_other_writer(self._leaves_decay_alone)

    def _leaves_decay_alone(self, group: Mapping[str, Any]) -> bool:
        return self.recipe.decay_convention(self.optimizer, group) == "l2"

    def values_of(self, index: int) -> Callable[[SchedulePoint], tuple[float, float]]:
        """Return the function from a point of the schedule to lr and weight decay of one group."""
        self.groups.follow()
        one = list(self.groups)[index]
        fixed_decay = float(self.optimizer.param_groups[index].get("weight_decay", 0.0))

        def values(point: SchedulePoint) -> tuple[float, float]:
            lr, decay = self.recipe.group_values(point, [one], self.optimizer)[0]
            return lr, fixed_decay if decay is None else decay

        return values

    # ---------------------------------------------------------------- as plain data

    def state_dict(self) -> dict[str, Any]:
        """Return the state of a schedule, which `prepare_load` reads."""
        self.retract_skipped()
        return {
            "version": STATE_VERSION,
            "samples": self.clock.samples,
            "batch_size": self.recipe.batch_size,
            "reference_batch_size": self.recipe.reference_batch_size,
            "configuration": self.configuration(),
        }

    def configuration(self) -> dict[str, Any]:
        """Return everything that shapes the curve but the clock and the global batch."""
        return {**self.recipe.configuration(), GROUPS: [base.plain() for base in self.bases()]}

    def agreement_record(self) -> dict[str, Any]:
        """Return what all ranks must have alike at this update."""
        groups = self.optimizer.param_groups
        return {
            "samples": self.clock.samples,
            "batch_size": self.recipe.batch_size,
            "lr": [float(group["lr"]) for group in groups],
            "weight_decay": self.weight_decay(),
            "group hyper-parameters": [_hyper_parameters(group) for group in groups],
        }


def _keep_for_torch(scheduler: LRScheduler, scheduled: ScheduledOptimizer, updates: int) -> None:
    """Keep up the attributes that torch's schedulers have: users and libraries read them."""
    scheduler._step_count += updates
    scheduler._last_lr = scheduled.last_lr
    if scheduled.recipe.is_known:
        scheduler.last_epoch = scheduled.clock.samples // scheduled.recipe.schedule.epoch_size


def _hyper_parameters(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return a group's values that no schedule writes, as plain data."""
    return {name: plain(value) for name, value in group.items() if name not in _NOT_HYPER_PARAMETERS}


def _weak_hook(method: Callable[..., None]) -> Callable[..., None]:
    """Return a hook that calls ``method`` without the optimizer, and does not keep the method's object alive."""
    reference = weakref.WeakMethod(method)

    def hook(_: object, *call: Any) -> None:
        if (alive := reference()) is not None:
            alive(*call)

    return hook
