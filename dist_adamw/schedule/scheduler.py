"""CyclicLRWithRestarts: an ``LRScheduler`` over the clock and the schedule.

Works with any torch optimizer; knows nothing of Accelerate, DeepSpeed or files.
"""

from __future__ import annotations

import copy
import inspect
import sys
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ChainedScheduler, LRScheduler, SequentialLR

from dist_adamw.plain_data import plain
from dist_adamw.ranks import collectives
from dist_adamw.schedule.base_values import BaseValues, GroupCheck, ScheduledGroup, ScheduledGroups, copy_value
from dist_adamw.schedule.batch import GlobalBatch, check_positive_int, check_whole
from dist_adamw.schedule.clock import SampleClock, SampleSource, crosses_epoch
from dist_adamw.schedule.describe import describe_clock, describe_recipe, describe_values
from dist_adamw.schedule.policies import Policy
from dist_adamw.schedule.preview import Preview
from dist_adamw.schedule.recipe import Recipe
from dist_adamw.schedule.restarts import IterationCallback, Period, RestartCallback, RestartSchedule, SchedulePoint
from dist_adamw.schedule.saved import (
    GROUPS,
    STATE_VERSION,
    OnDifference,
    check_on_difference,
    check_state,
    check_takeable,
    compare_configurations,
)
from dist_adamw.schedule.weight_decay import check_decoupled
from dist_adamw.wrappers import unwrap

_CONTAINERS = {cls.__init__.__code__: cls.__name__ for cls in (SequentialLR, ChainedScheduler)}
_NOT_ONE_OF_SEVERAL = (
    "{} cannot drive CyclicLRWithRestarts, which writes lr by its count of samples: factors of other schedulers would "
    "be lost, and updates from before a milestone counted at once. Use it alone: it has a warm-up (warmup_samples, "
    "warmup_start_lr), decays (eta_on_restart_cb, eta_on_iteration_cb) and takes a curve of yours (policy_fn)."
)


class CyclicLRWithRestarts(LRScheduler):
    """Cyclic learning rates with warm restarts and normalised weight decay, in samples (AdamWR).

    The clock, ``samples``, counts the real global samples of applied updates. Call `step` after
    every ``optimizer.step()``; calls without an update in between (Accelerate makes one per
    process, and users one per micro-batch) change nothing, and neither does a skipped update.

    A parameter group's own ``lr``, ``weight_decay`` and ``min_lr`` are its base values; where another
    scheduler has been before, ``initial_lr`` is. They follow the group, which may be added, deleted, moved, or replaced
    by a copy (``dict(group, params=[...])``) between updates. A group's ``lr_scale`` (timm's layer-wise decay)
    multiplies the scheduled lr, ``min_lr`` and warm-up included, as under timm's schedulers; a
    normalised weight decay does not follow it, as it follows no base lr.

    Args:
        optimizer: Any torch optimizer, also one that a library has wrapped.
        batch_size: Global batch, in samples, or a `GlobalBatch`. None: ``prepare`` fills it in.
        epoch_size: Samples that one epoch of the loop really trains on: with ``drop_last=True`` that is
            ``len(dataset) // batch_size * batch_size``. None: ``prepare`` takes it from the data loader.
        restart_period: Length of the first cycle in epochs; may be a fraction.
        t_mult: Each cycle is this many times as long as the one before.
        policy: "cosine", "arccosine", "triangular", "triangular2" or "exp_range".
        policy_fn: Your own function of tau, the position in the cycle, instead of ``policy``.
        min_lr: lr at the end of a cycle, for groups without their own.
        gamma: Amplitude of exp_range: gamma ** (samples after warm-up / batch_size).
        triangular_step: Where in the cycle the triangular policies peak.
        min_restart_period: Epochs below which no cycle shrinks.
        warmup_samples: lr rises from ``warmup_start_lr`` to its base over so many samples, once.
        eta_on_restart_cb: (eta_min, eta_max) -> (eta_min, eta_max), folded once per restart.
        eta_on_iteration_cb: (eta_min, eta_max, iterations) -> (eta_min, eta_max), never compounded.
            Both must be pure functions: they are evaluated again after a resume.
        normalize_weight_decay: "auto" normalises where the optimizer decouples the decay and leaves
            weight_decay alone elsewhere; True insists; False leaves it alone everywhere.
        weight_decay_exponent: 1/2 is AdamWR's.
        lr_scaling: "sqrt" or "linear" scales lr (not the decay) when the global batch is changed
            in mid-run; Malladi et al., arXiv:2205.10287.
        stream: Data without epochs: updates run across epoch ends. Otherwise the last update of
            an epoch counts what is left of it.
        verbose: Print one line per restart, on the main rank.
        on_difference: When the configuration of a loaded state is not this one: "strict" raises, "checkpoint" takes
            the saved one, "new" keeps this one. An attribute of the same name can be set later.

    Raises:
        ValueError: an argument is out of its range; the message has the value and what to do.

    Local: no collectives. Every rank calls `step`.

    It writes lr (and the weight decay) into the groups itself, so it cannot be one of several schedulers: torch's
    ``SequentialLR`` and ``ChainedScheduler`` are refused, and a change of lr by others is named by a warning.

    Source: Loshchilov & Hutter, arXiv:1608.03983 (restarts) and arXiv:1711.05101 (AdamWR, and its
    appendix on normalised weight decay). Departs from the paper in counting samples, not batches.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        batch_size: int | GlobalBatch | None = None,
        epoch_size: int | None = None,
        restart_period: Period = 100,
        t_mult: Period = 2,
        *,
        policy: str = "cosine",
        policy_fn: Policy | None = None,
        min_lr: float = 1e-7,
        gamma: float = 1.0,
        triangular_step: float = 0.5,
        min_restart_period: Period | None = None,
        warmup_samples: int = 0,
        warmup_start_lr: float = 0.0,
        eta_on_restart_cb: RestartCallback | None = None,
        eta_on_iteration_cb: IterationCallback | None = None,
        normalize_weight_decay: bool | Literal["auto"] = "auto",
        weight_decay_exponent: float = 0.5,
        lr_scaling: Literal["sqrt", "linear"] | None = None,
        stream: bool = False,
        verbose: bool = False,
        on_difference: OnDifference = "strict",
    ) -> None:
        check_on_difference(on_difference)
        if epoch_size is not None:
            epoch_size = check_positive_int("epoch_size", epoch_size)
        batch = None if batch_size is None else _batch_samples(batch_size)
        self._recipe = Recipe(
            options={
                "restart_period": restart_period,
                "t_mult": t_mult,
                "policy": policy,
                "policy_fn": policy_fn,
                "gamma": gamma,
                "triangular_step": triangular_step,
                "min_restart_period": min_restart_period,
                "warmup_samples": check_whole("warmup_samples", warmup_samples),
                "warmup_start_lr": warmup_start_lr,
                "eta_on_restart_cb": eta_on_restart_cb,
                "eta_on_iteration_cb": eta_on_iteration_cb,
                "weight_decay_exponent": weight_decay_exponent,
            },
            epoch_size=epoch_size,
            batch_size=batch,
            reference_batch_size=batch,
            normalize=normalize_weight_decay,
            lr_scaling=lr_scaling,
            stream=stream,
        )
        self._min_lr = min_lr
        self._verbose = verbose
        self.on_difference: OnDifference = on_difference
        self._has_crossed = False  # whether a warning has said that updates run across epoch ends
        self._clock = SampleClock()
        self.optimizer = unwrap(optimizer)
        self._groups = ScheduledGroups(self._optimizer, min_lr, _check_of(self._recipe))
        self._groups.follow()
        self._listen()
        super().__init__(self.optimizer)

    def _listen(self) -> None:
        """Hear of every update and load of the optimizer."""

        def weakly(method: Callable[..., None]) -> Callable[..., None]:
            # A hook must not keep a scheduler alive that the user has dropped.
            reference = weakref.WeakMethod(method)

            def hook(_: object, *call: Any) -> None:
                if (alive := reference()) is not None:
                    alive(*call)

            return hook

        self.optimizer.register_step_pre_hook(weakly(self._before_update))
        self.optimizer.register_step_post_hook(weakly(self._after_update))
        # A loaded optimizer brings the lr and weight decay of the job that saved it, in new groups.
        self.optimizer.register_load_state_dict_pre_hook(weakly(self._before_load))
        self.optimizer.register_load_state_dict_post_hook(weakly(self._after_load))

    def __getstate__(self) -> dict[str, Any]:
        # The groups keep the base values, and a copied tensor counts its versions from 0.
        state = {name: value for name, value in self.__dict__.items() if name != "_groups"}
        return {**state, "_clock": copy.copy(self._clock)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state if "_clock" in state else _from_first_version(state))
        self._groups = ScheduledGroups(self._optimizer, self._min_lr, _check_of(self._recipe))
        self._listen()

    @property
    def optimizer(self) -> Optimizer:
        """The torch optimizer whose groups are written, without its wrappers.

        Raises:
            ValueError: torch's SequentialLR or ChainedScheduler asks, which would call this as one of several.
        """
        # Their constructors touch nothing else of a scheduler before they change lr.
        container = _CONTAINERS.get(sys._getframe(1).f_code)
        if container is not None:
            raise ValueError(_NOT_ONE_OF_SEVERAL.format(container))
        return self._optimizer

    @optimizer.setter
    def optimizer(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        if "_groups" in self.__dict__:
            self._groups.optimizer = optimizer

    # ---------------------------------------------------------------- configuration

    @property
    def batch_size(self) -> int | None:
        """The global batch, in samples. Setting it moves the weight decay's norm, not lr's clock."""
        return self._recipe.batch_size

    @batch_size.setter
    def batch_size(self, batch_size: int | GlobalBatch) -> None:
        self._recipe = self._recipe.with_batch_size(_batch_samples(batch_size))
        self._write_groups()

    @property
    def epoch_size(self) -> int | None:
        """Samples in an epoch. It can be set once, when the data is known."""
        return self._recipe.epoch_size

    @epoch_size.setter
    def epoch_size(self, epoch_size: int) -> None:
        epoch_size = check_positive_int("epoch_size", epoch_size)
        if self.epoch_size not in (None, epoch_size):
            raise ValueError(f"epoch_size is {self.epoch_size} already, got {epoch_size}: cycles would move.")
        self._recipe = replace(self._recipe, epoch_size=epoch_size)
        self._write_groups()

    @property
    def schedule(self) -> RestartSchedule:
        """The pure function of samples behind this scheduler.

        Raises:
            ValueError: batch_size or epoch_size is not known yet.
        """
        return self._recipe.schedule

    @property
    def cycle(self) -> int:
        """The current cycle, from 0; also how often lr has restarted."""
        return self.schedule.at(self.samples).cycle.index

    # ---------------------------------------------------------------- the clock

    @property
    def samples(self) -> int:
        """Real global samples of the applied updates so far."""
        return self._clock.samples

    @property
    def sample_source(self) -> SampleSource | Callable[[], int | None] | None:
        """The counter of an update's samples, set by ``prepare``; None: the rule for a plain loop."""
        return self._clock.source

    @sample_source.setter
    def sample_source(self, source: SampleSource | Callable[[], int | None] | None) -> None:
        self._clock.source = source

    def _before_load(self, *_: object) -> None:
        self._groups.follow()

    def _after_load(self) -> None:
        # torch has put new dicts in the places of the groups, with the base values of the job that saved them.
        self._groups.take_loaded()
        self._groups.restore()
        self._write_groups()

    def _initial_step(self) -> None:
        """Called by ``LRScheduler.__init__``: write the values of sample 0."""
        self._step_count = 1
        self._write_groups()

    def _before_update(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._groups.are_known():
            self._write_groups()
        _ = self.schedule  # an update at an unknown lr must not happen
        self._retract_skipped()
        self._clock.begin_update(self.optimizer, (*args, *kwargs.values()))

    def _after_update(self, *_: Any) -> None:
        self._clock.end_update(self.optimizer, has_lr=any(self._last_lr))

    def _retract_skipped(self) -> None:
        """Take the last update back if the device turns out to have skipped it."""
        if self._clock.retract_skipped(self.optimizer):
            self._step_count -= 1
            self._write_groups()

    def step(self, *positional: Any, samples: int | None = None, **others: Any) -> None:
        """Advance the clock by the updates applied since the last call, and set lr and weight decay.

        Args:
            samples: Real global samples (over all ranks) of those updates; by keyword only. None: the data
                loader's count under ``prepare``; elsewhere ``batch_size``, but never past the
                end of an epoch unless ``stream=True``.

        Raises:
            ValueError: ``samples`` is not a whole number >= 0, anything else was passed (torch's old
                ``step(epoch)``), or the schedule is not known yet.
        """
        # Never a TypeError, which DeepSpeed's engine answers by step(train_batch_size).
        if others or positional not in ((), (None,)):
            given = ", ".join([*map(repr, positional), *(f"{name}={value!r}" for name, value in others.items())])
            raise ValueError(
                f"step({given}) is not understood: this scheduler counts samples, not epochs. Call step() after every "
                "optimizer.step(), or step(samples=<real samples of these updates, all ranks together>)."
            )
        if samples is not None:
            samples = check_whole("samples", samples)
        if not self._clock.has_applied:
            return
        if samples is None:
            self._clock.settle()
        applied = self._clock.take_applied()
        if (warning := self._groups.find_other_writer(self._leaves_decay_alone)) is not None:
            warnings.warn(warning, stacklevel=2)
        cycle_before = self.cycle
        self._step_count += len(applied)
        if samples is not None and self.sample_source is None:
            self._warn_of_crossing(samples)
        self._clock.advance(applied, samples, self._recipe.samples_of_update)
        self._write_groups()
        if self._verbose and self.cycle != cycle_before and collectives.rank() == 0:
            print(self._restart_line())

    def _warn_of_crossing(self, samples: int) -> None:
        """Say once that updates run across the ends of what was called an epoch."""
        size = self.epoch_size
        if size is None or self._recipe.stream or self._has_crossed:
            return
        if not crosses_epoch(self.samples, samples, size):
            return
        self._has_crossed = True
        warnings.warn(
            f"an update of {samples} samples ends {(self.samples + samples) % size} samples beyond an epoch of {size}, "
            "so restarts and epochs of the loop come apart. epoch_size is the samples that one epoch really trains on "
            "(with drop_last=True whole batches only); for data without epochs pass stream=True.",
            stacklevel=3,
        )

    def go_to(self, *, samples: int) -> None:
        """Set the clock, and write lr and weight decay of that sample into the groups. Local.

        Every rank calls it with the same number, between two updates. Weights, the optimizer's state and the place in
        the data stay where they are.

        Args:
            samples: Real global samples of the updates so far, warm-up included.

        Raises:
            ValueError: ``samples`` is not a whole number >= 0, the schedule is not known yet, or `step` has not been
                called since the last update.
        """
        samples = check_whole("samples", samples)
        _ = self.schedule
        self._retract_skipped()
        if self._clock.has_applied:
            raise ValueError(
                f"go_to(samples={samples}) between optimizer.step() and scheduler.step() would lose the update in "
                "between, or count it on top. Call it after scheduler.step()."
            )
        self._clock.set(samples)
        self._write_groups()

    def _restart_line(self) -> str:
        cycle, epoch_size = self.schedule.at(self.samples).cycle, self.schedule.epoch_size
        return (
            f"warm restart {cycle.index} at sample {self.samples:,} (epoch {self.samples / epoch_size:.2f}): "
            f"the next {float(cycle.length / epoch_size):g} epochs start from lr {self.get_last_lr()[0]:.3g}"
        )

    # ---------------------------------------------------------------- lr and weight decay

    @property
    def _bases(self) -> list[BaseValues]:
        """The base values of the optimizer's groups as they are now."""
        self._groups.follow()
        return [one.base for one in self._groups]

    def _write_groups(self) -> None:
        """Write what the schedule says of ``samples`` into the groups."""
        self._groups.follow()
        if self._recipe.is_known:
            point = self.schedule.at(self.samples)
            self._groups.write(_values_at(point, self._recipe, self._groups, self.optimizer))
            self.last_epoch = self.samples // self.schedule.epoch_size
        self._last_lr = [copy_value(group["lr"]) for group in self.optimizer.param_groups]

    def _leaves_decay_alone(self, group: Mapping[str, Any]) -> bool:
        return self._recipe.decay_convention(self.optimizer, group) == "l2"

    def get_lr(self) -> list[float | Tensor]:
        """The learning rate of each group at ``samples``."""
        point = self.schedule.at(self.samples)
        return [self._recipe.lr(point, base) for base in self._bases]

    def get_last_weight_decay(self) -> list[float]:
        """Return each group's ``weight_decay`` for the next update."""
        return [group.get("weight_decay", 0.0) for group in self.optimizer.param_groups]

    def preview(
        self, cycles: int | None = None, points: int = 1000, group: int = 0, *, total_samples: int | None = None
    ) -> Preview:
        """The table of restarts, and lr and weight decay over samples, before training. Local.

        Args:
            cycles: How many cycles to show. None: 4, or those of ``total_samples``, at most 20.
            points: Samples of the trace, evenly spaced.
            group: Which parameter group.
            total_samples: Samples that will be trained on, such as ``epochs * scheduler.epoch_size``. The preview then
                says where in its cycle training ends, and which period would end there.

        Raises:
            ValueError: batch_size or epoch_size is not known yet, or a number is not whole and above 0.
        """
        self._groups.follow()
        one = list(self._groups)[group]
        params = self.optimizer.param_groups[group]
        fixed = float(params.get("weight_decay", 0.0))

        def values(point: SchedulePoint) -> tuple[float, float]:
            lr, decay = _values_at(point, self._recipe, [one], self.optimizer)[0]
            return lr, fixed if decay is None else decay

        return Preview.compute(self.schedule, values, cycles=cycles, points=points, total_samples=total_samples)

    def __repr__(self) -> str:
        parameters = inspect.signature(type(self).__init__).parameters
        defaults = {name: parameter.default for name, parameter in parameters.items()}
        lines = [
            *describe_recipe(self._recipe, self._min_lr, defaults),
            describe_clock(self._recipe, self.samples),
            describe_values("lr", self.get_last_lr()),
            describe_values("weight_decay", self.get_last_weight_decay()),
        ]
        return "\n    ".join([f"{type(self).__name__}(", *lines]) + "\n)"

    # ---------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """``samples``, and the configuration as plain data; loads with ``weights_only=True``."""
        self._retract_skipped()
        return {
            "version": STATE_VERSION,
            "samples": self.samples,
            "batch_size": self.batch_size,
            "reference_batch_size": self._recipe.reference_batch_size,
            "configuration": self.configuration(),
        }

    def configuration(self) -> dict[str, Any]:
        """Everything that shapes the curve but the clock and the global batch, as plain data."""
        return {**self._recipe.configuration(), GROUPS: [base.plain() for base in self._bases]}

    def load_state_dict(self, state_dict: Mapping[str, Any], on_difference: OnDifference | None = None) -> None:
        """Put the clock where it was, and lr and weight decay into the groups at once.

        The global batch stays the one of this job: lr goes on as it was, the decay is normalised
        by the new one.

        Args:
            on_difference: When the configuration saved is not this one: "strict" raises,
                "checkpoint" takes the saved one, "new" keeps this one. Default: the attribute
                ``on_difference``, as given to the constructor.

        Raises:
            ValueError: not a state of this class, or configurations differ; nothing is changed.
        """
        self._recipe, self._groups = self._loaded(state_dict, on_difference)
        self._clock.set(state_dict["samples"])
        self._groups.restore()
        self._write_groups()

    def check_loadable(self, state_dict: Mapping[str, Any], on_difference: OnDifference | None = None) -> None:
        """Raise what `load_state_dict` would raise, and change nothing. Local."""
        self._loaded(state_dict, on_difference)

    def _loaded(
        self, state_dict: Mapping[str, Any], on_difference: OnDifference | None
    ) -> tuple[Recipe, ScheduledGroups]:
        """Return what a state would be loaded into."""
        check_state(state_dict)
        choice = self.on_difference if on_difference is None else on_difference
        check_on_difference(choice)
        saved, differing = compare_configurations(state_dict["configuration"], self.configuration(), choice)
        groups = self._groups
        try:
            recipe = replace(
                self._recipe,
                epoch_size=self.epoch_size or saved["epoch_size"],
                batch_size=self.batch_size or state_dict["batch_size"],
                reference_batch_size=state_dict["reference_batch_size"] or self._recipe.reference_batch_size,
            )
            if choice == "checkpoint" and differing:
                check_takeable(saved, differing, len(groups))
                recipe = recipe.with_configuration(saved, differing)
                groups = groups.with_bases([BaseValues(*values) for values in saved[GROUPS]], _check_of(recipe))
            if recipe.is_known:
                _values_at(recipe.schedule.at(state_dict["samples"]), recipe, groups, self.optimizer)
        except (TypeError, KeyError, ArithmeticError) as error:
            what = f"{type(error).__name__}: {error}"
            raise ValueError(f"the schedule of the checkpoint cannot be computed: {what}.") from error
        return recipe, groups

    def agreement_record(self) -> dict[str, Any]:
        """Return what all ranks must have alike at this update, as plain data."""
        hyper = [
            {k: plain(v) for k, v in group.items() if k not in ("params", "param_names", "lr", "weight_decay")}
            for group in self.optimizer.param_groups
        ]
        return {
            "samples": self.samples,
            "batch_size": self.batch_size,
            "lr": [float(group["lr"]) for group in self.optimizer.param_groups],
            "weight_decay": self.get_last_weight_decay(),
            "group hyper-parameters": hyper,
        }


def _values_at(
    point: SchedulePoint, recipe: Recipe, groups: Iterable[ScheduledGroup], optimizer: Optimizer
) -> list[tuple[float, float | None]]:
    """lr and weight decay of each group; None where the decay is left alone."""
    return [(recipe.lr(point, one.base), recipe.weight_decay(point, one.base, optimizer, one.group)) for one in groups]


def _check_of(recipe: Recipe) -> GroupCheck | None:
    """Return the check that new parameter groups must pass."""
    return check_decoupled if recipe.normalize is True else None


def _from_first_version(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the attributes of a scheduler that 0.1.0 pickled."""
    clock = SampleClock()
    clock.samples, clock._applied, clock._stepped = state["samples"], state["_applied"], state["_stepped"]
    clock._is_unconfirmed, clock._counted_last = state["_unconfirmed"], state["_counted_last"]
    recipe = Recipe(
        options=state["_options"],
        epoch_size=state["_epoch_size"],
        batch_size=state["_batch_size"],
        reference_batch_size=state["_reference_batch_size"],
        normalize=state["_normalize"],
        lr_scaling=state["_lr_scaling"],
        stream=state["_stream"],
    )
    taken = {"samples", "sample_source", "_applied", "_stepped", "_under_way", "_unconfirmed", "_counted_last"}
    taken |= {"_options", "_epoch_size", "_batch_size", "_reference_batch_size", "_normalize", "_lr_scaling", "_stream"}
    taken |= {"_schedule", "_known", "_has_warned", "_began_without_state"}
    attributes = {name: value for name, value in state.items() if name not in taken}
    return {**attributes, "_clock": clock, "_recipe": recipe}


def _batch_samples(batch_size: int | GlobalBatch) -> int:
    return batch_size.size if isinstance(batch_size, GlobalBatch) else check_positive_int("batch_size", batch_size)
