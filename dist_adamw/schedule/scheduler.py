"""CyclicLRWithRestarts: the clock, and what it writes into the parameter groups.

A thin ``LRScheduler`` over ``restarts.py``. Works with any torch optimizer; knows nothing
of Accelerate, DeepSpeed or files.
"""

from __future__ import annotations

import inspect
import math
import sys
import warnings
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ChainedScheduler, LRScheduler, SequentialLR

from dist_adamw.plain_data import plain
from dist_adamw.ranks import collectives
from dist_adamw.schedule.batch import GlobalBatch, check_positive_int, check_whole, shown
from dist_adamw.schedule.policies import Policy
from dist_adamw.schedule.preview import Preview
from dist_adamw.schedule.restarts import IterationCallback, Period, RestartCallback, RestartSchedule, SchedulePoint
from dist_adamw.schedule.third_party import decay_convention, skip_is_known, unwrap, was_applied

OnDifference = Literal["strict", "checkpoint", "new"]
_STATE_VERSION = 1
_GROUPS_SHOWN = 4  # values of parameter groups in repr()
_NOT_KNOWN = (
    "{} is not known, so the schedule cannot be computed. Pass it to CyclicLRWithRestarts, or let "
    "dist_adamw.prepare(accelerator, model, optimizer, dataloader, scheduler) fill it in."
)
_CONTAINERS = {cls.__init__.__code__: cls.__name__ for cls in (SequentialLR, ChainedScheduler)}
_NOT_ONE_OF_SEVERAL = (
    "{} cannot drive CyclicLRWithRestarts, which writes lr by its count of samples: factors of other schedulers would "
    "be lost, and updates from before a milestone counted at once. Use it alone: it has a warm-up (warmup_samples, "
    "warmup_start_lr), decays (eta_on_restart_cb, eta_on_iteration_cb) and takes a curve of yours (policy_fn)."
)


class SampleSource(Protocol):
    """What counts the real samples of updates in place of the rule for a plain loop.

    A function that returns a number, or None for that rule, serves too.
    """

    def before_update(self, *, has_closure: bool) -> None:
        """``optimizer.step`` begins. Ranks may begin to exchange what they counted."""

    def returned_unapplied(self) -> None:
        """The update was skipped."""

    def __call__(self) -> Callable[[], int | None]:
        """The update was applied. The function returned is called in `CyclicLRWithRestarts.step`."""


# Samples of an update: a number, what will tell it, or None for the rule for a plain loop.
_Count = int | None | Callable[[], int | None]


@dataclass(frozen=True, slots=True)
class _Base:
    """What a parameter group had before any schedule touched it."""

    lr: float
    min_lr: float
    weight_decay: float
    lr_scale: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.lr < math.inf:
            raise ValueError(f"lr must be a finite number >= 0, got {self.lr!r}.")
        if not 0.0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay must be a finite number >= 0, got {self.weight_decay!r}.")
        if not 0.0 <= self.min_lr <= self.lr:
            raise ValueError(
                f"min_lr must lie between 0 and the group's lr {self.lr!r}, got {self.min_lr!r}. "
                "Set min_lr in the parameter group, or pass a smaller one."
            )
        if not 0.0 <= self.lr_scale < math.inf:
            raise ValueError(f"lr_scale must be a finite number >= 0, got {self.lr_scale!r}.")

    def plain(self) -> list[float]:
        """The numbers, as plain data; a scale only where there is one."""
        scale = [] if self.lr_scale == 1.0 else [self.lr_scale]
        return [self.lr, self.min_lr, self.weight_decay, *scale]


@dataclass(slots=True)
class _Known:
    """A parameter group of the optimizer and its base values.

    It refers to the group, so that no other dict can have the group's ``id`` meanwhile.
    """

    group: dict[str, Any]
    base: _Base
    marks: tuple[object, object] | None = None  # of the lr and weight decay that the schedule wrote last


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
            Both must be pure functions: they are evaluated anew after a resume.
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
        _check_choices(normalize_weight_decay, lr_scaling, stream)
        _check_on_difference(on_difference)
        if epoch_size is not None:
            epoch_size = check_positive_int("epoch_size", epoch_size)
        self._options: dict[str, Any] = {
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
        }
        self._epoch_size = epoch_size
        self._batch_size = None if batch_size is None else _batch_samples(batch_size)
        self._reference_batch_size = self._batch_size
        self._min_lr = min_lr
        self._normalize = normalize_weight_decay
        self._lr_scaling = lr_scaling
        self._stream = stream
        self._verbose = verbose
        self.samples = 0
        self.on_difference: OnDifference = on_difference
        # prepare's report of an update's real samples, in place of the rule for a plain loop.
        self.sample_source: SampleSource | Callable[[], int | None] | None = None
        self._applied: list[_Count] = []  # updates since the last step(), as the source counted them
        self._stepped: set[int] = set()  # first parameters of the groups that the last of them was made of
        self._under_way = False  # whether an update has begun that has not been looked at
        self._unconfirmed = False  # whether the last of them may yet turn out to have been skipped
        self._has_crossed = False  # whether a warning has said that updates run across epoch ends
        self._counted_last = 0  # samples of the last update that the clock counted
        self._schedule = self._make_schedule()
        self._known: list[_Known] = []  # in the order of the optimizer's groups, when last looked at
        self._has_warned = False  # of values that others have written
        self.optimizer = unwrap(optimizer)
        self._follow_groups()
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
        # prepare's source belongs to this process; the copy's job prepares anew.
        self._settle()
        # The groups keep the base values, and a copied tensor counts its versions from 0.
        return {**self.__dict__, "sample_source": None, "_known": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
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

    # ---------------------------------------------------------------- configuration

    def _make_schedule(self) -> RestartSchedule | None:
        return _make_schedule(self._epoch_size, self._reference_batch_size, self._options)

    @property
    def batch_size(self) -> int | None:
        """The global batch, in samples. Setting it moves the weight decay's norm, not lr's clock."""
        return self._batch_size

    @batch_size.setter
    def batch_size(self, batch_size: int | GlobalBatch) -> None:
        self._batch_size = _batch_samples(batch_size)
        if self._reference_batch_size is None:
            self._reference_batch_size = self._batch_size
            self._schedule = self._make_schedule()
        self._push()

    @property
    def epoch_size(self) -> int | None:
        """Samples in an epoch. It can be set once, by whoever knows the data."""
        return self._epoch_size

    @epoch_size.setter
    def epoch_size(self, epoch_size: int) -> None:
        epoch_size = check_positive_int("epoch_size", epoch_size)
        if self._epoch_size not in (None, epoch_size):
            raise ValueError(f"epoch_size is {self._epoch_size} already, got {epoch_size}: cycles would move.")
        self._epoch_size = epoch_size
        self._schedule = self._make_schedule()
        self._push()

    @property
    def schedule(self) -> RestartSchedule:
        """The pure function of samples behind this scheduler.

        Raises:
            ValueError: batch_size or epoch_size is not known yet.
        """
        if self._schedule is None:
            missing = "batch_size" if self._reference_batch_size is None else "epoch_size"
            raise ValueError(_NOT_KNOWN.format(missing))
        return self._schedule

    @property
    def cycle(self) -> int:
        """The current cycle, from 0; also how often lr has restarted."""
        return self.schedule.at(self.samples).cycle.index

    @property
    def _bases(self) -> list[_Base]:
        """The base values of the optimizer's groups as they are now."""
        self._follow_groups()
        return [known.base for known in self._known]

    def _follow_groups(self) -> None:
        """Bring ``_known`` in line with the optimizer's groups, which users add, delete, reorder and replace."""
        known = {id(one.group): one for one in self._known}
        groups = self.optimizer.param_groups
        self._known = [known.get(id(group)) or self._learn(i, group) for i, group in enumerate(groups)]

    def _learn(self, index: int, group: dict[str, Any]) -> _Known:
        """Take down the base values of a group, in the group as well, where copies of it find them."""
        # torch's own convention for lr: what a scheduler has annealed is never taken for a base.
        for name in ("lr", "weight_decay"):
            if f"initial_{name}" not in group:
                self._check_not_annealed(index, name, _number(name, group.get(name, 0.0)))
                group[f"initial_{name}"] = _copied(group.get(name, 0.0))
        base = _Base(
            lr=_number("lr", group["initial_lr"]),
            min_lr=_number("min_lr", group.get("min_lr", self._min_lr)),
            weight_decay=_number("weight_decay", group["initial_weight_decay"]),
            lr_scale=_number("lr_scale", group.get("lr_scale", 1.0)),
        )
        if self._normalize is True and base.weight_decay > 0 and decay_convention(self.optimizer, group) == "l2":
            raise ValueError(
                f"normalize_weight_decay=True, but {type(self.optimizer).__name__} adds weight_decay="
                f"{base.weight_decay!r} to the gradient (L2), where the norm means nothing. Use an optimizer with "
                "decoupled decay, such as DistAdamW or torch.optim.AdamW, or leave normalize_weight_decay='auto'."
            )
        return _Known(group, base)

    def _check_not_annealed(self, index: int, name: str, value: float) -> None:
        """Raise where a new group has a value that the schedule wrote into another group: its base value is unknown."""
        for one in self._known:
            base = getattr(one.base, name)
            current = _number(name, one.group.get(name, 0.0))
            # A decay of 0 is what groups of biases have.
            if current == value != base and (value or name == "lr"):
                raise ValueError(
                    f"parameter group {index} has no 'initial_{name}', and its {name} {value!r} is the current {name} "
                    f"of a group whose base {name} is {base!r}. To replace a group, copy it whole: "
                    f"dict(group, params=[...]). Otherwise set group['initial_{name}'] to its base {name}."
                )

    def _before_load(self, *_: object) -> None:
        self._follow_groups()

    def _after_load(self) -> None:
        # torch has put new dicts in the places of the groups, with the base values of the job that saved them.
        for known, group in zip(self._known, self.optimizer.param_groups, strict=True):
            known.group = group
        self._put_bases()
        self._push()

    def _put_bases(self) -> None:
        """Write the base values into the groups."""
        for one in self._known:
            one.group["initial_lr"], one.group["initial_weight_decay"] = one.base.lr, one.base.weight_decay
            for name, default in (("min_lr", self._min_lr), ("lr_scale", 1.0)):
                if one.group.get(name, default) != getattr(one.base, name):
                    one.group[name] = getattr(one.base, name)

    # ---------------------------------------------------------------- the clock

    def _initial_step(self) -> None:
        """Called by ``LRScheduler.__init__``: write the values of sample 0."""
        self._step_count = 1
        self._push()

    def _before_update(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        known = {id(one.group) for one in self._known}
        if any(id(group) not in known for group in self.optimizer.param_groups):
            self._push()
        _ = self.schedule  # an update at an unknown lr must not happen
        self._confirm()
        is_nested, self._under_way = self._under_way, True
        self._began_without_state = not self.optimizer.state
        begin = getattr(self.sample_source, "before_update", None)
        if begin is not None and not is_nested and not self._goes_on(self._first_params()):
            begin(has_closure=any(map(callable, (*args, *kwargs.values()))))

    def _after_update(self, *_: Any) -> None:
        # torch runs the hooks of a class and again of a parent whose step() it calls: one update.
        if not self._under_way:
            return
        self._under_way = False
        # torch's get_optimizer_state_dict makes an optimizer without state step once with lr 0.
        silent = all(g["lr"] == 0 for g in self.optimizer.param_groups) and any(self._last_lr)
        initialising = self._began_without_state and silent
        if initialising:
            return
        # To ask a device now would make the host wait for it at every update. So the update counts as applied
        # until the next one begins; by then the device has answered.
        known = skip_is_known(self.optimizer)
        if not known or was_applied(self.optimizer):
            stepped = self._first_params()
            if self._goes_on(stepped):
                self._stepped |= stepped
            else:
                self._stepped = stepped
                self._applied.append(None if self.sample_source is None else self.sample_source())
        elif (unapplied := getattr(self.sample_source, "returned_unapplied", None)) is not None:
            unapplied()
        self._unconfirmed = not known

    def _first_params(self) -> set[int]:
        return {id(group["params"][0]) for group in self.optimizer.param_groups if group["params"]}

    def _goes_on(self, stepped: set[int]) -> bool:
        """Whether a call that steps these goes on with the update before it, and steps nothing a second time.

        ZeRO calls its optimizer once for each group, or part of one, and shows it only those: one update.
        """
        return bool(self._applied) and stepped.isdisjoint(self._stepped)

    def _confirm(self) -> None:
        """Take the last update back if it turns out that the device skipped it."""
        unconfirmed, self._unconfirmed = self._unconfirmed, False
        if not unconfirmed or was_applied(self.optimizer):
            return
        if self._applied:  # step() has not been called since
            self._applied.pop()
        else:
            self.samples -= self._counted_last
            self._step_count -= 1
            self._push()

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
        if not self._applied:
            return
        if samples is None:
            self._settle()
        applied, self._applied = self._applied, []
        self._look_for_other_writers()
        before = self.cycle
        self._step_count += len(applied)
        if samples is not None:
            if self.sample_source is None:
                self._warn_of_crossing(samples)
            self.samples += samples
            self._counted_last = samples // len(applied)
        else:
            for counted in applied:
                self._counted_last = counted if isinstance(counted, int) else self._nominal_samples()
                self.samples += self._counted_last
        self._push()
        if self._verbose and self.cycle != before and collectives.rank() == 0:
            print(self._restart_line())

    def _warn_of_crossing(self, samples: int) -> None:
        """Say once that updates run across the ends of what was called an epoch."""
        size, after = self._epoch_size, self.samples + samples
        if size is None or self._stream or self._has_crossed:
            return
        if after % size == 0 or after // size == self.samples // size:
            return
        self._has_crossed = True
        warnings.warn(
            f"an update of {samples} samples ends {after % size} samples beyond an epoch of {size}, so restarts and "
            "epochs of the loop come apart. epoch_size is the samples that one epoch really trains on (with "
            "drop_last=True whole batches only); for data without epochs pass stream=True.",
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
        self._confirm()
        if self._applied:
            raise ValueError(
                f"go_to(samples={samples}) between optimizer.step() and scheduler.step() would lose the update in "
                "between, or count it on top. Call it after scheduler.step()."
            )
        self.samples, self._unconfirmed, self._counted_last = samples, False, 0
        self._push()

    def _settle(self) -> None:
        """Have the numbers of what was counted; other ranks may have to send theirs."""
        self._applied = [counted() if callable(counted) else counted for counted in self._applied]

    def _nominal_samples(self) -> int:
        assert self._batch_size is not None
        assert self._epoch_size is not None
        if self._stream:
            return self._batch_size
        return min(self._batch_size, self._epoch_size - self.samples % self._epoch_size)

    def _restart_line(self) -> str:
        assert self._epoch_size is not None
        cycle = self.schedule.at(self.samples).cycle
        return (
            f"warm restart {cycle.index} at sample {self.samples:,} (epoch {self.samples / self._epoch_size:.2f}): "
            f"the next {float(cycle.length / self._epoch_size):g} epochs start from lr {self.get_last_lr()[0]:.3g}"
        )

    # ---------------------------------------------------------------- lr and weight decay

    def _push(self) -> None:
        """Write what the schedule says of ``samples`` into the groups."""
        self._follow_groups()
        if self._schedule is not None:
            for known, (lr, decay) in zip(self._known, self._values(), strict=True):
                group = known.group
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(lr)
                else:
                    group["lr"] = lr
                if decay is not None:
                    group["weight_decay"] = decay
                known.marks = _marks(group)
            self.last_epoch = self.samples // self._schedule.epoch_size
        self._last_lr = [_copied(group["lr"]) for group in self.optimizer.param_groups]

    def _look_for_other_writers(self) -> None:
        """Warn, once, where lr or weight decay is not what this scheduler has written."""
        if self._has_warned:
            return
        self._follow_groups()
        for i, known in enumerate(self._known):
            if known.marks is None:
                continue
            group = known.group
            for name, wrote, found in zip(("lr", "weight_decay"), known.marks, _marks(group), strict=True):
                if wrote == found or (name == "weight_decay" and self._leaves_decay_alone(group)):
                    continue
                self._has_warned = True
                value = group[name] if isinstance(group[name], float | int) else "another tensor or value"
                warnings.warn(
                    f"{name} of parameter group {i} is {value}, which CyclicLRWithRestarts has not written: another "
                    "scheduler or your own code has. That held for the last update; from here on the schedule's own "
                    "value is written again. Let one of them write it: shape the curve by policy_fn or callbacks, "
                    "leave the decay alone by normalize_weight_decay=False, or drop this scheduler.",
                    stacklevel=3,
                )
                return

    def _leaves_decay_alone(self, group: Mapping[str, Any]) -> bool:
        return self._normalize is False or decay_convention(self.optimizer, group) == "l2"

    def _values(self) -> list[tuple[float, float | None]]:
        """lr and weight decay of each group at ``samples``; None where the decay is left alone."""
        point = self.schedule.at(self.samples)
        values = []
        for one in self._known:
            convention = decay_convention(self.optimizer, one.group)
            values.append((self._lr(point, one.base), self._weight_decay(point, one.base, convention)))
        return values

    def _lr(self, point: SchedulePoint, base: _Base) -> float:
        return self.schedule.lr(point, base.lr, base.min_lr) * base.lr_scale * self._batch_scale()

    def _batch_scale(self) -> float:
        if self._lr_scaling is None or self._batch_size == self._reference_batch_size:
            return 1.0
        assert self._batch_size is not None
        assert self._reference_batch_size is not None
        growth = self._batch_size / self._reference_batch_size
        return growth if self._lr_scaling == "linear" else math.sqrt(growth)

    def _weight_decay(self, point: SchedulePoint, base: _Base, convention: str) -> float | None:
        """The value for ``group["weight_decay"]``; None where it is left alone."""
        if self._normalize is False or convention == "l2":
            return None
        assert self._batch_size is not None
        if base.lr * base.lr_scale == 0:
            return 0.0  # the decay follows lr, and this group's never leaves 0
        lambda_i = base.weight_decay * self.schedule.weight_decay_norm(point, self._batch_size)
        if convention == "schedule":
            return lambda_i * self.schedule.lr(point, base.lr, base.min_lr) / base.lr
        decay = lambda_i / (base.lr * base.lr_scale * self._batch_scale())
        if not decay < math.inf:
            raise ValueError(
                f"weight_decay={base.weight_decay!r} over lr={base.lr * base.lr_scale!r} is no finite number. "
                "Raise lr, or pass decay_by='schedule' to DistAdamW."
            )
        return decay

    def get_lr(self) -> list[float | Tensor]:
        """The learning rate of each group at ``samples``."""
        point = self.schedule.at(self.samples)
        return [self._lr(point, base) for base in self._bases]

    def get_last_weight_decay(self) -> list[float]:
        """What each group's ``weight_decay`` holds for the next update."""
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
        base = self._bases[group]
        convention = decay_convention(self.optimizer, self.optimizer.param_groups[group])
        fixed = float(self.optimizer.param_groups[group].get("weight_decay", 0.0))

        def values(point: SchedulePoint) -> tuple[float, float]:
            decay = self._weight_decay(point, base, convention)
            return self._lr(point, base), fixed if decay is None else decay

        return Preview.compute(self.schedule, values, cycles=cycles, points=points, total_samples=total_samples)

    def __repr__(self) -> str:
        defaults = inspect.signature(type(self).__init__).parameters
        chosen = {**self._options, "min_lr": self._min_lr, "normalize_weight_decay": self._normalize}
        chosen |= {"lr_scaling": self._lr_scaling, "stream": self._stream}
        kept = ("restart_period", "t_mult", "policy")
        shown_options = [
            f"{name}={plain(value)!r}"
            for name, value in chosen.items()
            if name in kept or (name in defaults and value != defaults[name].default)
        ]
        lines = [f"recipe: {', '.join(shown_options)}"]
        for name, value in (("epoch_size", self._epoch_size), ("batch_size", self._batch_size)):
            lines.append(f"{name}: {'not known yet' if value is None else f'{value:,} samples'}")
        if self._schedule is None:
            lines.append(f"clock: {self.samples:,} samples")
        else:
            point = self._schedule.at(self.samples)
            where = f"{point.tau:.1%} into cycle {point.cycle.index}"
            if point.warmup is not None:
                where = f"{point.warmup:.1%} of the warm-up"
            epoch = self.samples / self._schedule.epoch_size
            lines.append(f"clock: {self.samples:,} samples (epoch {epoch:.4g}), {where}")
        for name, values in (("lr", self.get_last_lr()), ("weight_decay", self.get_last_weight_decay())):
            groups = ", ".join(f"{float(value):.4g}" for value in values[:_GROUPS_SHOWN])
            more = f" and {len(values) - _GROUPS_SHOWN} more groups" if len(values) > _GROUPS_SHOWN else ""
            lines.append(f"{name}: {groups}{more}")
        return "\n    ".join([f"{type(self).__name__}(", *lines]) + "\n)"

    # ---------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """``samples``, and the configuration as plain data; loads with ``weights_only=True``."""
        self._confirm()
        return {
            "version": _STATE_VERSION,
            "samples": self.samples,
            "batch_size": self._batch_size,
            "reference_batch_size": self._reference_batch_size,
            "configuration": self.configuration(),
        }

    def configuration(self) -> dict[str, Any]:
        """Everything that shapes the curve but the clock and the global batch, as plain data."""
        options = {name: plain(value) for name, value in self._options.items()}
        groups = [base.plain() for base in self._bases]
        return {
            **options,
            "epoch_size": self._epoch_size,
            "normalize_weight_decay": self._normalize,
            "lr_scaling": self._lr_scaling,
            "stream": self._stream,
            "groups (lr, min_lr, weight_decay)": groups,
        }

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
        self.__dict__.update(self.check_loadable(state_dict, on_difference))
        self._applied, self._unconfirmed = [], False
        self._put_bases()
        self._push()

    def check_loadable(
        self, state_dict: Mapping[str, Any], on_difference: OnDifference | None = None
    ) -> dict[str, Any]:
        """What `load_state_dict` would raise, and nothing else of what it does. Local.

        Returns:
            The attributes that it would set.
        """
        needed = {"samples", "batch_size", "reference_batch_size", "configuration"}
        if state_dict.get("version") != _STATE_VERSION or not needed <= state_dict.keys():
            raise ValueError(
                f"not a state of CyclicLRWithRestarts version {_STATE_VERSION}: its keys are {sorted(state_dict)}."
            )
        _check_clock(state_dict)
        choice = self.on_difference if on_difference is None else on_difference
        _check_on_difference(choice)
        saved, ours = state_dict["configuration"], self.configuration()
        if odd := sorted(map(str, saved.keys() ^ ours.keys())):
            raise ValueError(
                f"the configuration of a saved schedule must have the keys {', '.join(sorted(ours))}; missing or "
                f"unknown: {shown(odd)}. The state was changed, or is of another version of dist_adamw."
            )
        # An epoch size that is not known yet is no difference, on either side.
        saved = {**saved, "epoch_size": saved["epoch_size"] or ours["epoch_size"]}
        ours["epoch_size"] = ours["epoch_size"] or saved["epoch_size"]
        differing = [k for k in sorted(ours) if saved[k] != ours[k]]
        if differing and choice == "strict":
            lines = "; ".join(f"{k} was {saved[k]!r} and is {ours[k]!r}" for k in differing)
            raise ValueError(
                f"the schedule of the checkpoint is another one: {lines}. Pass the same arguments, or "
                "choose by CyclicLRWithRestarts(on_difference='checkpoint') or 'new'."
            )
        new = {
            "samples": state_dict["samples"],
            "_epoch_size": ours["epoch_size"],
            "_batch_size": self._batch_size or state_dict["batch_size"],
            "_reference_batch_size": state_dict["reference_batch_size"] or self._reference_batch_size,
            "_options": self._options,
        }
        try:
            if choice == "checkpoint" and differing:
                new |= self._of_checkpoint(saved, differing)
            new["_schedule"] = _make_schedule(new["_epoch_size"], new["_reference_batch_size"], new["_options"])
            if new["_schedule"] is not None:
                loaded = object.__new__(type(self))  # one without hooks on the optimizer, to ask and drop
                loaded.__dict__.update(self.__dict__, **new)
                loaded._values()
        except (TypeError, KeyError, ArithmeticError) as error:
            what = f"{type(error).__name__}: {error}"
            raise ValueError(f"the schedule of the checkpoint cannot be computed: {what}.") from error
        return new

    def _of_checkpoint(self, saved: Mapping[str, Any], differing: list[str]) -> dict[str, Any]:
        callables = ("policy_fn", "eta_on_restart_cb", "eta_on_iteration_cb")
        functions = [k for k in differing if k in callables and saved[k] is not None]
        if functions:
            raise ValueError(
                f"the checkpoint used {functions[0]}={saved[functions[0]]!r}; a function cannot be loaded from a "
                "checkpoint. Pass it to CyclicLRWithRestarts."
            )
        groups = saved["groups (lr, min_lr, weight_decay)"]
        if len(groups) != len(self._known):
            raise ValueError(f"the checkpoint has {len(groups)} parameter groups, this optimizer {len(self._known)}.")
        _check_choices(saved["normalize_weight_decay"], saved["lr_scaling"], saved["stream"])
        return {
            "_options": {k: saved[k] if k in differing else v for k, v in self._options.items()},
            "_epoch_size": saved["epoch_size"],
            "_normalize": saved["normalize_weight_decay"],
            "_lr_scaling": saved["lr_scaling"],
            "_stream": saved["stream"],
            "_known": [replace(one, base=_Base(*group)) for one, group in zip(self._known, groups, strict=True)],
        }

    def agreement_record(self) -> dict[str, Any]:
        """What all ranks must have alike at this update, as plain data."""
        hyper = [
            {k: plain(v) for k, v in group.items() if k not in ("params", "param_names", "lr", "weight_decay")}
            for group in self.optimizer.param_groups
        ]
        return {
            "samples": self.samples,
            "batch_size": self._batch_size,
            "lr": [float(group["lr"]) for group in self.optimizer.param_groups],
            "weight_decay": self.get_last_weight_decay(),
            "group hyper-parameters": hyper,
        }


def _make_schedule(
    epoch_size: int | None, batch_size: int | None, options: Mapping[str, Any]
) -> RestartSchedule | None:
    # Bad arguments fail here and now, also when prepare is to fill in the rest.
    schedule = RestartSchedule(
        epoch_size=1 << 40 if epoch_size is None else epoch_size,
        batch_size=1 if batch_size is None else batch_size,
        **options,
    )
    return None if epoch_size is None or batch_size is None else schedule


def _check_choices(normalize_weight_decay: object, lr_scaling: object, stream: object) -> None:
    if not isinstance(normalize_weight_decay, bool) and normalize_weight_decay != "auto":
        raise ValueError(f"normalize_weight_decay must be True, False or 'auto', got {normalize_weight_decay!r}.")
    if lr_scaling not in (None, "sqrt", "linear"):
        raise ValueError(f"lr_scaling must be 'sqrt', 'linear' or None, got {lr_scaling!r}.")
    if not isinstance(stream, bool):
        raise ValueError(f"stream must be True or False, got {stream!r}.")


def _check_on_difference(choice: object) -> None:
    if choice not in ("strict", "checkpoint", "new"):
        raise ValueError(f"on_difference must be 'strict', 'checkpoint' or 'new', got {choice!r}.")


def _marks(group: Mapping[str, Any]) -> tuple[object, object]:
    """What tells a change of lr and weight decay of a group, without waiting for a device."""
    return _mark(group["lr"]), _mark(group.get("weight_decay"))


def _mark(value: object) -> object:
    """A number itself; of a tensor which one it is, and how often it was written to."""
    return (id(value), value._version) if isinstance(value, Tensor) else value


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{name} must be a number, got {shown(value)}.") from error


def _check_clock(state_dict: Mapping[str, Any]) -> None:
    """The numbers of a saved state, which may come from anywhere."""
    samples = state_dict["samples"]
    if type(samples) is not int or not 0 <= samples < 1 << 62:
        raise ValueError(f"samples of a saved schedule must be a whole number from 0 to 2**62, got {samples!r}.")
    for name in ("batch_size", "reference_batch_size"):
        if state_dict[name] is not None:
            check_positive_int(f"{name} of a saved schedule", state_dict[name])
    configuration = state_dict["configuration"]
    if not isinstance(configuration, Mapping):
        raise ValueError(f"configuration of a saved schedule must be a dict, got {configuration!r}.")
    if configuration.get("epoch_size") is not None:
        check_positive_int("epoch_size of a saved schedule", configuration["epoch_size"])


def _batch_samples(batch_size: int | GlobalBatch) -> int:
    return batch_size.size if isinstance(batch_size, GlobalBatch) else check_positive_int("batch_size", batch_size)


def _copied(value: float | Tensor) -> float | Tensor:
    return value.detach().clone() if isinstance(value, Tensor) else value
