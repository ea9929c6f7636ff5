"""Preview a schedule before training: its restarts, its curves, and where training ends in it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

from dist_adamw.schedule.batch import check_positive_int, shown
from dist_adamw.schedule.batch_schedule import BatchSchedule
from dist_adamw.schedule.lengths import Length, in_samples
from dist_adamw.schedule.plot import Axis, Curves, overlay
from dist_adamw.schedule.restarts import RestartSchedule, SchedulePoint

# lr, and the part of the weights that decays in an update; None if decay enters the gradient.
GroupValues = Callable[[SchedulePoint], tuple[float, float | None]]
# Weight decay in the recipe's reading; None as above.
GivenDecay = Callable[[SchedulePoint], float | None]

_CYCLES = 4  # default number of rows in the table
_MOST_CYCLES = 20  # most rows if total_samples determines the number
_MOST_ROWS = 1_000  # of a number that is given
_LARGEST = 1e300  # samples
_NEARLY_DONE = 0.98  # of a cycle, where a cosine is at 0.1% of its peak


@dataclass(frozen=True, slots=True)
class TrainingEnd:
    """The place in a schedule where training of ``total_samples`` ends; ``print`` it.

    Attributes:
        total_samples: Real global samples, warm-up included.
        epochs: The same in epochs.
        cycle: The cycle that training ends in, from 0.
        done: The fraction of that cycle that is trained, in (0, 1]; 0 if training ends during warm-up.
        lr_fraction: The lr at the end, from 0 (min_lr) to 1 (the base lr).
        is_at_cycle_end: Whether training ends with a cycle: within one global batch of its end, or with 98% done.
        cycle_ends: The nearest ends of cycles before and after, in samples; 0 if there is none before.
        restart_periods: The nearest shorter and longer periods, in epochs, with which training ends at a cycle's end,
            as texts that `CyclicLRWithRestarts` reads exactly ("2.857"). May be empty if ``min_restart_period``
            limits some cycles, or cycles are given by their ends.
        cooldown_done: The fraction of the cool-down that is trained; None: it has not begun, or there is none.
    """

    total_samples: int
    epochs: float
    cycle: int
    done: float
    lr_fraction: float
    is_at_cycle_end: bool
    cycle_ends: tuple[int, int]
    restart_periods: tuple[str, ...]
    cooldown_done: float | None
    _epoch_size: int

    def __str__(self) -> str:
        where = f"training ends at sample {self.total_samples:,} (epoch {self.epochs:.6g})"
        if self.cooldown_done is not None:
            is_over = self.cooldown_done == 1.0
            return f"{where}, {'at the end of' if is_over else f'{self.cooldown_done:.1%} into'} its cool-down"
        if self.is_at_cycle_end:
            return f"{where}, at the end of cycle {self.cycle}"
        inside = f"{self.done:.1%} into cycle {self.cycle}" if self.done else "before the warm-up is over"
        before, after = (f"epoch {end / self._epoch_size:.6g} ({end:,} samples)" for end in self.cycle_ends)
        nearest = f"Cycles end at {before} and at {after}" if self.cycle_ends[0] else f"The first cycle ends at {after}"
        fitting = " or ".join(f"restart_period={_as_argument(period)}" for period in self.restart_periods)
        return f"{where}, {inside}, with lr at {self.lr_fraction:.1%} of its base value. {nearest}" + (
            f"; with {fitting} a cycle ends where training does." if fitting else "."
        )


def _as_argument(period: str) -> str:
    return repr(period) if "/" in period else period


def training_end(schedule: RestartSchedule, total_samples: Length, batches: BatchSchedule | None = None) -> TrainingEnd:
    """Find where training of ``total_samples`` ends, and the periods that would end a cycle there. Local.

    Args:
        schedule: ``CyclicLRWithRestarts.schedule``.
        total_samples: Real global samples of all updates, warm-up included: ``epochs * epoch_size``, or "15 epochs".
        batches: The global batches; None: that of ``schedule``.

    Raises:
        ValueError: ``total_samples`` is not a length above 0.
    """
    if isinstance(total_samples, str):
        total_samples = math.ceil(in_samples("total_samples", total_samples, "samples", schedule.sizes))
    total = check_positive_int("total_samples", total_samples)
    batch_size = schedule.batch_size if batches is None else batches.at(total - 1)
    warmup = schedule.warmup_samples
    cycle = schedule.at(total - 1).cycle  # of the last sample
    begin, end = (warmup + _ceil(edge) for edge in (cycle.start, cycle.start + cycle.length))
    done = max(0.0, float((total - warmup - cycle.start) / cycle.length))
    if cycle.index and total - begin < batch_size:
        # The last update began in the previous cycle, with its lr, and only reaches into this one.
        cycle, done = schedule.cycle(cycle.index - 1), 1.0
        begin, end = warmup + _ceil(cycle.start), begin
    is_at_end = done >= _NEARLY_DONE or (total > warmup and abs(end - total) < batch_size)
    return TrainingEnd(
        total_samples=total,
        epochs=total / schedule.epoch_size,
        cycle=cycle.index,
        done=min(done, 1.0),
        lr_fraction=_lr_fraction(schedule, total),
        is_at_cycle_end=is_at_end,
        cycle_ends=(begin if cycle.index else 0, end),
        restart_periods=() if is_at_end else _fitting_periods(schedule, total - warmup, cycle.index + 1),
        cooldown_done=_cooldown_done(schedule, total),
        _epoch_size=schedule.epoch_size,
    )


def _lr_fraction(schedule: RestartSchedule, samples: int) -> float:
    point = schedule.at(samples)
    return point.multiplier if point.warmup is None else point.warmup


def _cooldown_done(schedule: RestartSchedule, total: int) -> float | None:
    cooldown = schedule.cooldown
    if cooldown is None or total <= cooldown.at:
        return None
    return min(1.0, (total - cooldown.at) / cooldown.length)


def _fitting_periods(schedule: RestartSchedule, samples: int, cycles: int) -> tuple[str, ...]:
    """Return the nearest periods below and above ``schedule``'s with which a cycle ends ``samples`` after the warm-up.

    ``samples`` lies in cycle number ``cycles``, counted from 1. With a shorter period that cycle ends there, with a
    longer one the previous cycle does.
    """
    periods: list[str] = []
    if schedule.count is not None or not isinstance(schedule.restart_period, int | float | Fraction):
        return ()  # cycles with given or fitted ends, or a period in another unit than epochs
    for count in (cycles, cycles - 1):
        if samples <= 0 or count < 1:
            continue
        # All ends scale with the first period, unless min_restart_period limits some cycles: `_ends_at` checks.
        period = schedule.cycle(0).length * samples / schedule.cycle(count).start / schedule.epoch_size
        # The shortest decimal that works, or else the exact fraction.
        decimals = [f"{float(period):.{digits}g}" for digits in range(1, 10)]
        for text in (*(one for one in decimals if "e" not in one), str(period)):
            if _ends_at(schedule, text, count, samples):
                periods.append(text)
                break
    return tuple(periods)


def _ends_at(schedule: RestartSchedule, period: str, count: int, samples: int) -> bool:
    """Return whether ``count`` cycles with another period end within one update of ``samples``."""
    try:
        changed = replace(schedule, restart_period=period)
    except ValueError:  # such as cycles too many to count
        return False
    return abs(changed.cycle(count).start - samples) < schedule.batch_size


@dataclass(frozen=True, slots=True)
class CycleRow:
    """One line of the table of restarts.

    Weight decay has three readings, all at the peak lr; None if the optimizer adds it to the gradient.

    Attributes:
        cycle: From 0.
        first_sample: The clock at which the cycle begins.
        samples: In the cycle.
        epochs: The same in epochs.
        updates: The same in updates.
        peak_lr: The largest lr in the cycle.
        decay: The part of the weights that one update takes away.
        weight_decay: What ``torch.optim.AdamW(weight_decay=...)`` would have to be for that.
        timescale: The epochs over which AdamW averages its updates with that decay (arXiv:2405.13698).
    """

    cycle: int
    first_sample: int
    samples: int
    epochs: float
    updates: int
    peak_lr: float
    decay: float | None
    weight_decay: float | None
    timescale: float | None


@dataclass(frozen=True, slots=True)
class Preview:
    """The result of `CyclicLRWithRestarts.preview`; ``print`` it, or `plot` it.

    Attributes:
        rows: One per cycle.
        samples: The samples at which lr and decay were evaluated: evenly spaced ones, and both sides of each jump.
        lr: The learning rate of the update that begins there.
        decay: The part of the weights that decays in that update; None as in `CycleRow`.
        warmup_samples: Samples before the first cycle.
        end: Where training ends; None unless ``total_samples`` was given.
        batches: The global batches; None: one of a size that is not known here.
        epoch_size: Samples in an epoch; None: not known here.
        given_decay: Weight decay of that update in the recipe's reading, which ``decay_label`` names. Empty: not known.
        decay_label: "lambda_i of AdamWR" (the decay of an update at the base lr), "as torch's AdamW", "time scale,
            epochs", or "constant".
    """

    rows: tuple[CycleRow, ...]
    samples: tuple[int, ...]
    lr: tuple[float, ...]
    decay: tuple[float | None, ...]
    warmup_samples: int
    end: TrainingEnd | None = None
    batches: BatchSchedule | None = None
    epoch_size: int | None = None
    given_decay: tuple[float | None, ...] = ()
    decay_label: str = ""

    @classmethod
    def compute(
        cls,
        schedule: RestartSchedule,
        values: GroupValues,
        *,
        batch_size: int | BatchSchedule,
        cycles: int | None,
        points: int,
        total_samples: Length | None = None,
        given_decay: tuple[str, GivenDecay] | None = None,
    ) -> Preview:
        """Evaluate ``values`` over the first ``cycles`` cycles, or over ``total_samples``.

        Args:
            schedule: Of the job.
            values: Of a parameter group.
            batch_size: The global batches.
            cycles: See `CyclicLRWithRestarts.preview`.
            points: See there.
            total_samples: See there.
            given_decay: ``decay_label`` and the values for ``given_decay``; None: the preview has none.
        """
        points = check_positive_int("points", points)
        batches = batch_size if isinstance(batch_size, BatchSchedule) else BatchSchedule((0,), (batch_size,))
        is_constant = len(batches.sizes) == 1
        if total_samples is None and cycles is None:
            total_samples = schedule.last_sample
        end = None if total_samples is None else training_end(schedule, total_samples, None if is_constant else batches)
        if cycles is None:
            cycles = _CYCLES if end is None else min(end.cycle + 1, _MOST_CYCLES)
        cycles = check_positive_int("cycles", cycles)
        if schedule.count is not None:
            cycles = min(cycles, schedule.count)
        warmup = schedule.warmup_samples
        starts = _starts(schedule, cycles)
        last = starts[-1] if end is None else end.total_samples
        samples = _samples(schedule, starts, batches.starts, last, points)
        trace = [values(schedule.at(s)) for s in samples]
        rows = [_row(schedule, values, batches, i, *ends) for i, ends in enumerate(itertools.pairwise(starts))]
        lr, decay = zip(*trace, strict=True)
        label, given = ("", None) if given_decay is None else given_decay
        shown = () if given is None else tuple(given(schedule.at(s)) for s in samples)
        return cls(tuple(rows), samples, lr, decay, warmup, end, batches, schedule.epoch_size, shown, label)

    def __str__(self) -> str:
        titles = ("cycle", "first sample", "samples", "epochs", "updates", "peak lr")
        head = "{:>5}  {:>14}  {:>14}  {:>9}  {:>9}  {:>10}".format(*titles)
        lines = [
            f"{r.cycle:>5}  {r.first_sample:>14,}  {r.samples:>14,}  {r.epochs:>9.4g}  {r.updates:>9,}  "
            f"{r.peak_lr:>10.4g}"
            for r in self.rows
        ]
        if any(row.decay is not None for row in self.rows):
            head += "  {:>12}  {:>12}  {:>18}".format("decay/update", "weight_decay", "time scale, epochs")
            lines = [line + _decays(row) for line, row in zip(lines, self.rows, strict=True)]
        warmup = [f"warm-up over the first {self.warmup_samples:,} samples"] if self.warmup_samples else []
        end = [] if self.end is None else [str(self.end)]
        batches = [f"global batch: {self.batches}"] if self._has_batch_schedule() else []
        return "\n".join([*batches, *warmup, head, *lines, *end])

    def _has_batch_schedule(self) -> bool:
        return self.batches is not None and len(self.batches.sizes) > 1

    def plot(self, path: str | Path, axis: Axis = "samples") -> Path:
        """Draw lr, weight decay in the recipe's reading, and batches that change. Local.

        Args:
            path: A PNG, SVG or PDF, by its suffix.
            axis: What the lower axis shows; the upper one has epochs.

        Raises:
            ValueError: the suffix or the axis is another one.
            ModuleNotFoundError: matplotlib is missing; install dist_adamw[tracking].
        """
        return overlay({"": self.curves(axis)}).save(path)

    def curves(self, axis: Axis = "samples") -> Curves:
        """Return the curves as they are drawn. Local.

        Raises:
            ValueError: the axis is another one, or this preview does not have its sizes.
        """
        if axis not in ("samples", "epochs", "updates"):
            raise ValueError(f"axis must be samples, epochs or updates, got {axis!r}.")
        if self.epoch_size is None or self.batches is None:
            raise ValueError("this preview has no epoch_size or batches. Make it with scheduler.preview().")
        epoch_size, batches = self.epoch_size, self.batches
        convert: dict[str, Callable[[int], float]] = {
            "samples": float,
            "epochs": lambda sample: sample / epoch_size,
            "updates": lambda sample: _updates(batches, sample),
        }
        # The last update reaches the end.
        last = self.rows[-1].first_sample + self.rows[-1].samples if self.end is None else self.end.total_samples
        samples = (*self.samples, last)
        values: dict[str, tuple[float, ...]] = {"lr": self.lr}
        if any(value is not None for value in self.given_decay):
            values[f"weight decay,\n{self.decay_label}"] = tuple(math.nan if v is None else v for v in self.given_decay)
        if self._has_batch_schedule():
            values["global batch"] = tuple(float(batches.at(sample)) for sample in self.samples)
        return Curves(
            axis,
            [convert[axis](sample) for sample in samples],
            [convert["epochs"](sample) for sample in samples],
            {label: (*ys, ys[-1]) for label, ys in values.items()},
            [convert[axis](row.first_sample) for row in self.rows[1:] if row.first_sample < last],
        )


def _starts(schedule: RestartSchedule, cycles: int) -> list[int]:
    """Return the first sample of each of the first ``cycles`` cycles, and the end of the last.

    Raises:
        ValueError: there are too many, or one ends beyond the range of floats.
    """
    if cycles > _MOST_ROWS:
        raise ValueError(f"cycles must be at most {_MOST_ROWS:,}, got {cycles:,}.")
    starts: list[int] = []
    for index in range(cycles + 1):
        starts.append(schedule.first_sample(index))
        if starts[-1] > _LARGEST:
            advice = f"restart_period={shown(schedule.restart_period)}"
            if index > 1:
                advice += f" or t_mult={shown(schedule.t_mult)}, or pass cycles={index - 1}"
            raise ValueError(
                f"cycle {index - 1} would end after more than {_LARGEST:g} samples, which cannot be shown. "
                f"Lower {advice}."
            )
    return starts


def _samples(
    schedule: RestartSchedule, starts: list[int], batch_starts: tuple[int, ...], last: int, points: int
) -> tuple[int, ...]:
    """Return evenly spaced samples below ``last``, and those where a curve has a jump or a peak, in their order."""
    found = {last * k // points for k in range(points)}
    found |= {sample + side for sample in (*starts, *batch_starts, last) for side in (-1, 0)}
    # Where triangular policies peak.
    found |= {start + int((end - start) * schedule.triangular_step) for start, end in itertools.pairwise(starts)}
    return tuple(sorted(sample for sample in found if 0 <= sample < last))


def _updates(batches: BatchSchedule, sample: int) -> float:
    """Return the updates before ``sample``, with fractions, if each has its global batch."""
    ends = (*batches.starts[1:], sample)
    parts = zip(batches.starts, ends, batches.sizes, strict=True)
    return sum(max(0, min(end, sample) - start) / size for start, end, size in parts)


def _row(
    schedule: RestartSchedule, values: GroupValues, batches: BatchSchedule, cycle: int, first: int, after: int
) -> CycleRow:
    """Return the row of the cycle that begins at ``first`` and ends before ``after``."""
    length = after - first
    inside = {first + length * k // 64 for k in range(64)}
    # Where triangular policies peak.
    inside.add(min(first + int(length * schedule.triangular_step), after - 1))
    if schedule.rewarmup is not None:
        inside |= {first + length * k // 1024 for k in range(1024)}  # the peak follows the rise
    # The first of equal peaks: the decay changes with the batch.
    found = {sample: values(schedule.at(sample)) for sample in sorted(inside)}
    peak = max(found, key=lambda sample: found[sample][0])
    peak_lr, decay = found[peak]
    weight_decay = timescale = None
    if decay is not None:
        weight_decay = decay / peak_lr if peak_lr else 0.0
        timescale = batches.at(peak) / decay / schedule.epoch_size if decay else math.inf
    return CycleRow(
        cycle=cycle,
        first_sample=first,
        samples=length,
        epochs=float(schedule.cycle(cycle).length / schedule.epoch_size),
        updates=batches.updates(first, after)[0],
        peak_lr=peak_lr,
        decay=decay,
        weight_decay=weight_decay,
        timescale=timescale,
    )


def _decays(row: CycleRow) -> str:
    if row.decay is None:
        return ""
    return f"  {row.decay:>12.4g}  {row.weight_decay:>12.4g}  {row.timescale:>18.4g}"


def _ceil(value: object) -> int:
    return -int(-value // 1)  # type: ignore[operator]
