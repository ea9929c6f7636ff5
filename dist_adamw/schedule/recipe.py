"""Compute a parameter group's lr and weight decay from the options of a schedule.

It is stateless: ``scheduled_optimizer.py`` has the clock and writes the values.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch.optim import Optimizer

from dist_adamw.plain_data import plain
from dist_adamw.schedule.base_values import BaseValues, GroupCheck, ScheduledGroup
from dist_adamw.schedule.batch import GlobalBatch, check_positive_int, check_whole
from dist_adamw.schedule.batch_schedule import (
    BatchSchedule,
    BatchSizes,
    GivenBatches,
    read_batch,
    read_saved_batches,
    resolve,
)
from dist_adamw.schedule.cooldown import Cooldown
from dist_adamw.schedule.cycles import Cycle
from dist_adamw.schedule.lengths import check_length
from dist_adamw.schedule.restarts import RestartSchedule, SchedulePoint
from dist_adamw.schedule.saved import BATCHES, LATER_OPTIONS
from dist_adamw.schedule.weight_decay import (
    DecayConvention,
    DecayReading,
    check_beside_timescale,
    check_decoupled,
    check_one_decay,
    decay_by_lr,
    decay_convention,
    decay_factors,
)

_NOT_KNOWN = (
    "{} is not known, so the schedule cannot be computed. Pass it to CyclicLRWithRestarts, or let "
    "dist_adamw.prepare (Accelerate), prepare_trainer or prepare_lightning fill it in."
)
_LENGTHS = (
    "restart_period",
    "min_restart_period",
    "warmup_samples",
    "decay_length",
    "rewarmup",
    "cycle_ends",
    "total_samples",
    "weight_decay_timescale",
)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The options that shape lr and weight decay, without the clock and the groups' base values.

    Attributes:
        options: Options of `RestartSchedule` other than ``epoch_size`` and ``batch_size``.
        epoch_size: Samples in an epoch; None: not known yet.
        batch_size: The global batch of this job, in samples, or the first one of its schedule; None: not known yet.
        reference_batch_size: The global batch that the run began with. Iterations are counted in it, so that a job
            with another global batch continues on the same curve.
        normalize: Whether to normalise weight decay; "auto": if the optimizer decouples it.
        lr_scaling: How lr scales with the global batch.
        stream: Whether updates run across the ends of epochs.
        decay_norm: What weight decays are: "paper", AdamWR's normalised ones, or "first_cycle", torch's in that cycle.
        cooldown: A fall of the lr that ends the run; not part of the configuration.
        batch_schedule: Global batches, each from some sample on; None: all updates have ``batch_size``.
    """

    options: Mapping[str, Any]
    epoch_size: int | None
    batch_size: int | None
    reference_batch_size: int | None
    normalize: bool | Literal["auto"]
    lr_scaling: Literal["sqrt", "linear"] | None
    stream: bool
    decay_norm: Literal["paper", "first_cycle"] = "paper"
    cooldown: Cooldown | None = None
    batch_schedule: GivenBatches | None = None
    _schedule: RestartSchedule | None = field(init=False, repr=False, compare=False)
    # Of the batch schedule, once the schedule is known.
    _batches: BatchSchedule | None = field(init=False, repr=False, compare=False, default=None)

    def __post_init__(self) -> None:
        if not isinstance(self.normalize, bool) and self.normalize != "auto":
            raise ValueError(f"normalize_weight_decay must be True, False or 'auto', got {self.normalize!r}.")
        if self.lr_scaling not in (None, "sqrt", "linear"):
            raise ValueError(f"lr_scaling must be 'sqrt', 'linear' or None, got {self.lr_scaling!r}.")
        if not isinstance(self.stream, bool):
            raise ValueError(f"stream must be True or False, got {self.stream!r}.")
        if self.decay_norm not in ("paper", "first_cycle"):
            raise ValueError(f"weight_decay_norm must be 'paper' or 'first_cycle', got {self.decay_norm!r}.")
        chosen = [name for name, is_set in self._chosen_readings() if is_set]
        if len(chosen) > 1:
            raise ValueError(f"pass {' or '.join(chosen)}, not both.")
        if chosen and self.normalize is False:
            raise ValueError(
                f"{chosen[0]} normalises weight decay, and normalize_weight_decay is False: leave one out."
            )
        object.__setattr__(self, "_schedule", self._make_schedule())
        object.__setattr__(self, "_batches", self._make_batches())

    def _chosen_readings(self) -> list[tuple[str, bool]]:
        return [
            ("weight_decay_norm", self.decay_norm != "paper"),
            ("weight_decay_timescale", self.options.get("weight_decay_timescale") is not None),
        ]

    def _make_schedule(self) -> RestartSchedule | None:
        """Return the schedule, or None if a size is not known yet; bad options raise in any case."""
        if self.epoch_size is not None and self.reference_batch_size is not None:
            schedule = RestartSchedule(
                epoch_size=self.epoch_size,
                batch_size=self.reference_batch_size,
                cooldown=self.cooldown,
                **self.options,
            )
            if self.batch_size is not None and self.batch_schedule is None:
                schedule.check_timescale(self.batch_size)
            return schedule
        # With placeholder sizes lengths may contradict each other, so each is only checked alone.
        lengths = {name: self.options[name] for name in _LENGTHS if self.options.get(name) is not None}
        for name, length in lengths.items():
            check_length(name, length)
        numbers = {name: length for name, length in lengths.items() if isinstance(length, int | float)}
        checked: dict[str, Any] = {name: value for name, value in self.options.items() if name not in _LENGTHS}
        checked |= {name: numbers[name] for name in ("restart_period", "min_restart_period") if name in numbers}
        if "total_samples" in lengths:
            checked.pop("fit", None)
        RestartSchedule(epoch_size=1 << 40, batch_size=1, **checked)
        return None

    def _make_batches(self) -> BatchSchedule | None:
        """Return the batch schedule in samples; None if there is none, or its lengths cannot be converted yet."""
        if self.batch_schedule is None or self._schedule is None:
            return None
        batches = resolve(self.batch_schedule, self._schedule.sizes)
        for size, first, after in zip(batches.sizes, batches.starts, (*batches.starts[1:], None), strict=True):
            self._schedule.check_timescale(size, first, after)
        return batches

    @classmethod
    def from_arguments(
        cls,
        batch_size: int | GlobalBatch | BatchSizes | None,
        epoch_size: int | None,
        *,
        normalize_weight_decay: bool | Literal["auto"],
        lr_scaling: Literal["sqrt", "linear"] | None,
        stream: bool,
        weight_decay_norm: Literal["paper", "first_cycle"] = "paper",
        **options: Any,
    ) -> Recipe:
        """Return the recipe for the arguments of `CyclicLRWithRestarts`.

        Raises:
            ValueError: an argument is out of its range.
        """
        if epoch_size is not None:
            epoch_size = check_positive_int("epoch_size", epoch_size)
        batch, batch_schedule = (None, None) if batch_size is None else read_batch(batch_size)
        # Assigned in place, which keeps the order of options in the configuration and in repr.
        if not isinstance(options["warmup_samples"], str):
            options["warmup_samples"] = check_whole("warmup_samples", options["warmup_samples"])
        return cls(
            options=options,
            epoch_size=epoch_size,
            batch_size=batch,
            reference_batch_size=batch,
            normalize=normalize_weight_decay,
            lr_scaling=lr_scaling,
            stream=stream,
            decay_norm=weight_decay_norm,
            batch_schedule=batch_schedule,
        )

    @property
    def is_known(self) -> bool:
        """Whether epoch size and global batch are known, so that there is a schedule."""
        return self._schedule is not None

    @property
    def schedule(self) -> RestartSchedule:
        """The schedule as a function of samples.

        Raises:
            ValueError: the epoch size or the global batch is not known yet.
        """
        if self._schedule is None:
            raise ValueError(_NOT_KNOWN.format("batch_size" if self.reference_batch_size is None else "epoch_size"))
        return self._schedule

    def with_batch_size(self, batch_size: int | GlobalBatch | BatchSizes) -> Recipe:
        """Return the recipe with other global batches; the first becomes the reference if there was none."""
        first, given = read_batch(batch_size)
        reference = self.reference_batch_size or first
        return replace(self, batch_size=first, batch_schedule=given, reference_batch_size=reference)

    @property
    def batches(self) -> BatchSchedule:
        """The global batches of all updates; the recipe is known."""
        assert self.batch_size is not None
        return BatchSchedule((0,), (self.batch_size,)) if self._batches is None else self._batches

    def batch_at(self, samples: int) -> int | None:
        """Return the global batch of the update that begins at ``samples``; None: not known yet."""
        return self.batch_size if self._batches is None else self._batches.at(samples)

    def samples_of_update(self, samples: int) -> int:
        """Return the samples of the update that begins at ``samples``, by the plain-loop rule."""
        batch_size = self.batch_at(samples)
        assert batch_size is not None
        assert self.epoch_size is not None
        if self.stream:
            return batch_size
        return min(batch_size, self.epoch_size - samples % self.epoch_size)  # an epoch's last batch may be short

    # ---------------------------------------------------------------- lr and weight decay

    def lr(self, point: SchedulePoint, base: BaseValues) -> float:
        """Return the lr of a group."""
        return self.schedule.lr(point, base.lr, base.min_lr) * base.lr_scale * self.batch_scale(point.samples)

    def weight_decay(
        self, point: SchedulePoint, base: BaseValues, optimizer: Optimizer, group: Mapping[str, Any]
    ) -> float | None:
        """Return the value for ``group["weight_decay"]``; None to leave it unchanged."""
        convention = self.decay_convention(optimizer, group)
        if convention == "l2":
            return None
        norm, reading = self.decay_norm_in(point.cycle, point.samples), self.decay_reading
        if convention == "schedule":
            a, b = decay_factors(base, reading, norm=norm)
            return a * self.schedule.lr(point, base.lr, base.min_lr) / b
        return decay_by_lr(base, reading, norm=norm, batch_scale=self.batch_scale(point.samples))

    def given_decay(self, point: SchedulePoint, base: BaseValues) -> float:
        """Return a group's weight decay in this recipe's reading; `GIVEN_DECAYS` has what that is."""
        reading, batch_size = self.decay_reading, self.batch_at(point.samples)
        assert batch_size is not None
        norm = self.decay_norm_in(point.cycle, point.samples)
        if reading != "timescale":
            return base.weight_decay * norm
        return batch_size / norm / self.schedule.epoch_size if base.weight_decay else math.inf

    @property
    def decay_reading(self) -> DecayReading:
        """What the groups' weight decays are."""
        return "timescale" if self.options.get("weight_decay_timescale") is not None else self.decay_norm

    def decay_norm_in(self, cycle: Cycle, samples: int) -> float:
        """Return the norm for `decay_factors` of the update that begins at ``samples``, in ``cycle``."""
        batch_size = self.batch_at(samples)
        assert batch_size is not None
        return self.schedule._norm_in(cycle, batch_size, since_first=self.decay_norm == "first_cycle")

    def check_bases(self, bases: Iterable[BaseValues]) -> None:
        """Raise ValueError if groups have different weight decays above 0, or none, beside a time scale."""
        if self.decay_reading == "timescale":
            check_one_decay([base.weight_decay for base in bases])

    def group_values(
        self, point: SchedulePoint, groups: Iterable[ScheduledGroup], optimizer: Optimizer
    ) -> list[tuple[float, float | None]]:
        """Return lr and weight decay of each group; None to leave the decay unchanged."""
        values = []
        for one in groups:
            values.append((self.lr(point, one.base), self.weight_decay(point, one.base, optimizer, one.group)))
        return values

    @property
    def group_check(self) -> GroupCheck | None:
        """The check that new parameter groups must pass."""
        if self.decay_reading == "timescale":
            return check_beside_timescale
        return check_decoupled if self.normalize is True or self.decay_reading == "first_cycle" else None

    def decay_convention(self, optimizer: Optimizer, group: Mapping[str, Any]) -> DecayConvention:
        """Return the convention for the weight decay of ``group``; "l2" leaves it unchanged."""
        return "l2" if self.normalize is False else decay_convention(optimizer, group)

    def batch_scale(self, samples: int) -> float:
        """Return the factor on every lr at ``samples``, for another global batch than the reference."""
        batch_size = self.batch_at(samples)
        if self.lr_scaling is None or batch_size == self.reference_batch_size:
            return 1.0
        assert batch_size is not None
        assert self.reference_batch_size is not None
        growth = batch_size / self.reference_batch_size
        return growth if self.lr_scaling == "linear" else math.sqrt(growth)

    # ---------------------------------------------------------------- as plain data

    def configuration(self) -> dict[str, Any]:
        """Return everything except a constant global batch as plain data, for `with_configuration`."""
        configuration = {
            **{name: plain(value) for name, value in self.options.items()},
            "epoch_size": self.epoch_size,
            "normalize_weight_decay": self.normalize,
            "lr_scaling": self.lr_scaling,
            "stream": self.stream,
            "weight_decay_norm": self.decay_norm,
            BATCHES: plain(self.batch_schedule),
        }
        return {
            name: value
            for name, value in configuration.items()
            if name not in LATER_OPTIONS or value != LATER_OPTIONS[name]
        }

    def with_configuration(self, saved: Mapping[str, Any], differing: list[str], batch_size: int | None) -> Recipe:
        """Return the recipe with the values of ``saved``; options that do not differ are kept.

        Args:
            saved: From `configuration`.
            differing: The keys whose values differ.
            batch_size: The saved job's global batch, in case it had no schedule of them; None: it was not known.

        Raises:
            ValueError: a value is out of its range.
        """
        batch_schedule = self.batch_schedule
        if BATCHES in differing:
            batch_schedule = None if saved[BATCHES] is None else read_saved_batches(saved[BATCHES])
            batch_size = batch_size if batch_schedule is None else batch_schedule[0][1]
        else:
            batch_size = self.batch_size
        # Equal options are kept as objects: `saved` has functions only as text.
        return replace(
            self,
            options={key: saved[key] if key in differing else value for key, value in self.options.items()},
            epoch_size=saved["epoch_size"],
            normalize=saved["normalize_weight_decay"],
            lr_scaling=saved["lr_scaling"],
            stream=saved["stream"],
            decay_norm=saved["weight_decay_norm"],
            batch_size=batch_size or self.batch_size,
            batch_schedule=batch_schedule,
        )
