"""Keep an optimizer's lr and weight decay at the schedule's values for its clock."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dist_adamw.schedule.all_values import AllValues
from dist_adamw.schedule.averaging import pass_schedule
from dist_adamw.schedule.base_values import BaseValues, ScheduledGroups
from dist_adamw.schedule.clock import SampleClock, crosses_epoch, crossing_warning
from dist_adamw.schedule.group_digests import GroupDigests, other_values
from dist_adamw.schedule.recipe import Recipe
from dist_adamw.schedule.restarts import SchedulePoint
from dist_adamw.schedule.saved import GROUPS, STATE_VERSION
from dist_adamw.schedule.unsupported import refuse_fixed_accumulation
from dist_adamw.schedule.weight_decay import GIVEN_DECAYS, decay_convention, decay_of_update


class ScheduledOptimizer:
    """An optimizer, the recipe for its parameter groups, and the clock of its updates. Local.

    After `listen`, hooks count the optimizer's updates. Whenever the clock or the recipe changes, lr and weight decay
    are written into the groups.

    Args:
        optimizer: A torch optimizer, without wrappers.
        recipe: The options of the schedule.
        min_lr: For groups without their own.
        clock: Default: a clock at sample 0.

    Attributes:
        groups: The parameter groups with their base values.
        last_lr: The last written lr of each group.
        has_crossed: Whether the warning about updates across the end of an epoch was given.
        has_passed_end: Whether the warning about training after the end of the schedule was given.
        has_lagged: Whether the warning about several updates before one ``scheduler.step()`` was given.
        check_batches: Called with a recipe before it is used; raises ValueError if the training loop cannot make its
            global batches.
    """

    def __init__(self, optimizer: Optimizer, recipe: Recipe, min_lr: float, clock: SampleClock | None = None) -> None:
        self.recipe = recipe
        self.min_lr = min_lr
        self.clock = SampleClock() if clock is None else clock
        self.groups = ScheduledGroups(optimizer, min_lr, recipe.group_check)
        self.last_lr: list[float | Tensor] = []
        self._values = AllValues()
        self._digests = GroupDigests()
        self.has_crossed = False
        self.has_passed_end = self.has_lagged = False
        self.check_batches: Callable[[Recipe], None] = _accept
        self._scheduler: weakref.ref[LRScheduler] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Not `groups`: base values are in the param groups too, and marks of tensors are invalid in a copy.
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
            scheduler: Its attributes that torch's schedulers have are kept up to date. Held weakly.
        """
        self._scheduler = weakref.ref(scheduler)
        optimizer = self.optimizer
        # Weak hooks: a scheduler that was replaced must not live on in the optimizer and write its lr.
        optimizer.register_step_pre_hook(_weak_hook(self._before_update))
        optimizer.register_step_post_hook(_weak_hook(self._after_update))
        # Loading an optimizer replaces the groups by new ones, with the saved job's lr and weight decay.
        optimizer.register_load_state_dict_pre_hook(_weak_hook(self._before_load))
        optimizer.register_load_state_dict_post_hook(_weak_hook(self._after_load))

    def _before_update(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.groups.are_known():
            self.write()
        _ = self.recipe.schedule  # raises if it is not known yet: without it the lr would be wrong
        if self.recipe.batch_schedule is not None and self.clock.source is None:
            refuse_fixed_accumulation()
        self.retract_skipped()
        self.clock.begin_update(self.optimizer, (*args, *kwargs.values()))

    def _after_update(self, *_: Any) -> None:
        self.clock.end_update(self.optimizer, has_lr=any(self.last_lr))

    def _before_load(self, *_: object) -> None:
        self.groups.follow()

    def _after_load(self) -> None:
        # The new groups have the saved job's base values too; this job's are kept.
        self.groups.take_loaded()
        self.groups.restore()
        self.write()

    # ---------------------------------------------------------------- the clock

    def retract_skipped(self) -> None:
        """Retract the last update if the device skipped it."""
        if self.clock.retract_skipped(self.optimizer):
            self.write(updates=-1)

    def load(self, recipe: Recipe, groups: ScheduledGroups, samples: int) -> None:
        """Apply the result of `prepare_load`."""
        self.recipe, self.groups = recipe, groups
        self.clock.set(samples)
        self.groups.restore()
        self.write()

    def find_crossing(self, samples: int) -> str | None:
        """Return a warning if an update that the user counted runs past the end of an epoch; only once."""
        epoch_size = self.recipe.epoch_size
        if epoch_size is None or self.clock.source is not None:
            return None
        if self.recipe.stream or self.has_crossed or not crosses_epoch(self.clock.samples, samples, epoch_size):
            return None
        self.has_crossed = True
        return crossing_warning(self.clock.samples, samples, epoch_size)

    def find_end_passed(self) -> str | None:
        """Return a warning if training goes on after the end of the schedule; only once."""
        last = self.recipe.schedule.last_sample
        if last is None or self.has_passed_end or self.clock.samples <= last:
            return None
        if self.clock.samples - last < max(self.recipe.batches.sizes):  # the last update reaches beyond it
            return None
        self.has_passed_end = True
        return (
            f"the schedule ended at sample {last:,}, and training has reached {self.clock.samples:,}: lr stays at its "
            "last value. Stop there, or pass a larger total_samples, more cycle_ends or a longer cool-down."
        )

    # ---------------------------------------------------------------- lr and weight decay

    def write(self, updates: int = 0, *, follow: bool = True) -> None:
        """Write the values for the current sample into the groups.

        Args:
            updates: The number of updates counted since the last call; -1: one was retracted.
            follow: False if the known groups are still the optimizer's.
        """
        if follow:
            self.groups.follow()
        groups, recipe, samples, is_known = self.groups, self.recipe, self.clock.samples, self.recipe.is_known
        if is_known:
            self.last_lr = groups.write(*self._values.at(samples, recipe, groups, groups.optimizer))
            pass_schedule(groups.optimizer, recipe, samples)
        else:
            self.last_lr = groups.current_lr()
        # Attributes of torch's schedulers, which users and libraries read.
        scheduler = None if self._scheduler is None else self._scheduler()
        if scheduler is not None:
            scheduler._step_count += updates
            scheduler._last_lr = self.last_lr
            if is_known and recipe.epoch_size is not None:
                scheduler.last_epoch = samples // recipe.epoch_size

    def use(self, recipe: Recipe) -> None:
        """Continue with another recipe, from the same sample."""
        self.recipe = recipe
        self.write()

    def bases(self) -> list[BaseValues]:
        """Return the base values of the optimizer's current groups."""
        self.groups.follow()
        return [one.base for one in self.groups]

    def lr(self) -> list[float]:
        """Return the lr of each group at the current sample."""
        point = self.recipe.schedule.at(self.clock.samples)
        return [self.recipe.lr(point, base) for base in self.bases()]

    def weight_decay(self) -> list[float]:
        """Return the current weight decay of each group."""
        return [group.get("weight_decay", 0.0) for group in self.optimizer.param_groups]

    def find_other_writer(self) -> str | None:
        """Return a warning if other code has changed lr or weight decay; only once."""
        return self.groups.find_other_writer(self._leaves_decay_alone)

    def _leaves_decay_alone(self, group: Mapping[str, Any]) -> bool:
        return self.recipe.decay_convention(self.optimizer, group) == "l2"

    def values_of(self, index: int) -> Callable[[SchedulePoint], tuple[float, float | None]]:
        """Return a function from a point of the schedule to one group's lr, and the part of its weights that decays in
        an update there; None: decay enters the gradient.
        """
        self.groups.follow()
        one = list(self.groups)[index]
        fixed_decay = float(self.optimizer.param_groups[index].get("weight_decay", 0.0))
        convention = decay_convention(self.optimizer, one.group)

        def values(point: SchedulePoint) -> tuple[float, float | None]:
            lr, decay = self.recipe.group_values(point, [one], self.optimizer)[0]
            decay = fixed_decay if decay is None else decay
            return lr, decay_of_update(convention, lr, decay)

        return values

    # ---------------------------------------------------------------- as plain data

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the schedule, for `prepare_load`."""
        self.retract_skipped()
        cooldown = self.recipe.cooldown
        return {
            "version": STATE_VERSION,
            "samples": self.clock.samples,
            "batch_size": self.recipe.batch_at(self.clock.samples),
            "reference_batch_size": self.recipe.reference_batch_size,
            "configuration": self.configuration(),
            **({} if cooldown is None else {"cooldown": cooldown.plain()}),
        }

    def configuration(self) -> dict[str, Any]:
        """Return everything that shapes the curve, except the clock and a constant global batch."""
        return {**self.recipe.configuration(), GROUPS: [base.plain() for base in self.bases()]}

    def agreement_record(self) -> dict[str, Any]:
        """Return the values that must be equal on all ranks at this update."""
        groups = self.optimizer.param_groups
        return {
            "samples": self.clock.samples,
            "batch_size": self.recipe.batch_at(self.clock.samples),
            "lr": [float(group["lr"]) for group in groups],
            "weight_decay": self.weight_decay(),
            "group hyper-parameters": [other_values(group) for group in groups],
        }

    def digested_record(self) -> dict[str, Any]:
        """Return `agreement_record` with digests of what has a value per group."""
        groups, digests = self.optimizer.param_groups, self._digests
        return {
            "samples": self.clock.samples,
            "batch_size": self.recipe.batch_at(self.clock.samples),
            "lr": digests.lr(groups),
            "weight_decay": digests.weight_decay(groups),
            "group hyper-parameters": digests.others(groups),
        }


def given_decay_of(scheduled: ScheduledOptimizer, index: int) -> tuple[str, Callable[[SchedulePoint], float | None]]:
    """Return the weight decay of one group in the recipe's reading, as a function of a point of the schedule, and
    the reading's name; None: decay enters the gradient.
    """
    scheduled.groups.follow()
    one = list(scheduled.groups)[index]
    if decay_convention(scheduled.optimizer, one.group) == "l2":
        return "", lambda _: None
    if scheduled._leaves_decay_alone(one.group):
        fixed_decay = float(scheduled.optimizer.param_groups[index].get("weight_decay", 0.0))
        return "constant", lambda _: fixed_decay
    return GIVEN_DECAYS[scheduled.recipe.decay_reading], lambda point: scheduled.recipe.given_decay(point, one.base)


def _accept(_: Recipe) -> None:
    """Accept any global batches."""


def _weak_hook(method: Callable[..., None]) -> Callable[..., None]:
    """Return a hook that calls ``method`` without the optimizer argument, and holds its object weakly."""
    owner: weakref.ref[Any] = weakref.ref(method.__self__)  # type: ignore[attr-defined]
    function: Callable[..., None] = method.__func__  # type: ignore[attr-defined]

    def hook(_: object, *call: Any) -> None:
        if (alive := owner()) is not None:
            function(alive, *call)

    return hook
