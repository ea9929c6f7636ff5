"""Exact boundaries of cycles, in samples after warm-up: geometric sequences, lists of ends, and a given total."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal

from dist_adamw.schedule.batch import shown
from dist_adamw.schedule.lengths import Length, Sizes, exact, in_samples

Fit = Literal["last", "scale"]

_SHORTEST = Fraction(1, 1_000_000)  # samples in a cycle
# Bits of an exact power of t_mult that can still be computed in well under a second.
_LARGEST_POWER = 1 << 20


@dataclass(frozen=True, slots=True)
class Cycle:
    """One cycle of the schedule; ``start`` and ``length`` are exact, in samples after warm-up."""

    index: int
    start: Fraction
    length: Fraction


@dataclass(frozen=True, slots=True)
class _Run:
    """Consecutive cycles whose lengths are a geometric sequence (constant when ratio is 1)."""

    index: int
    start: Fraction
    length: Fraction
    ratio: Fraction

    def cycle(self, index: int) -> Cycle:
        return Cycle(index, self.start_of(index), self.length * self.ratio ** (index - self.index))

    def start_of(self, index: int) -> Fraction:
        n = index - self.index
        total = Fraction(n) if self.ratio == 1 else (self.ratio**n - 1) / (self.ratio - 1)
        return self.start + self.length * total

    def find(self, u: int | Fraction) -> int:
        """Return the index of the last cycle with start <= u; u is at or after the run's start."""
        if self.ratio == 1:
            return self.index + (u - self.start) // self.length
        # Logarithms are inexact and only give a first guess; exact comparisons correct it.
        guess = _log_of_one_plus((u - self.start) * (self.ratio - 1) / self.length) / _log_of_one_plus(self.ratio - 1)
        found = self.index + max(0, int(guess))
        while self.start_of(found) > u:
            found -= 1
        while self.start_of(found + 1) <= u:
            found += 1
        return found


@dataclass(frozen=True, slots=True)
class Cycles:
    """A sequence of cycles.

    Attributes:
        runs: In order; the last one has no end unless ``count`` is given.
        count: The number of cycles; None: endless.
    """

    runs: tuple[_Run, ...]
    count: int | None = None

    def cycle(self, index: int) -> Cycle:
        """Return cycle number ``index``, counted from 0.

        Raises:
            ValueError: there are fewer cycles.
        """
        if self.count is not None and index >= self.count:
            raise ValueError(f"cycle {index} does not exist: the schedule ends after {self.count} cycles.")
        return self.runs[bisect_right(self.runs, index, key=lambda run: run.index) - 1].cycle(index)

    def start_of(self, index: int) -> Fraction:
        """Return the start of a cycle, or the end of the last one for ``count``."""
        if index == self.count:
            last = self.cycle(index - 1)
            return last.start + last.length
        return self.cycle(index).start

    def find(self, u: int | Fraction) -> Cycle:
        """Return the last cycle with start <= u, for u >= 0; the last of all if u is past the end."""
        run = self.runs[bisect_right(self.runs, u, key=lambda run: run.start) - 1]
        index = run.find(u)
        return run.cycle(index if self.count is None else min(index, self.count - 1))

    @property
    def end(self) -> Fraction | None:
        """The end of the last cycle, in samples after warm-up; None: endless."""
        return None if self.count is None else self.start_of(self.count)

    @property
    def shortest(self) -> Cycle:
        """The first of the shortest cycles."""
        firsts = [run.cycle(run.index) for run in self.runs]
        if self.count is not None:  # the last of a run that shrinks
            following = [run.index for run in self.runs[1:]] + [self.count]
            firsts += [run.cycle(after - 1) for run, after in zip(self.runs, following, strict=True)]
        return min(firsts, key=lambda cycle: (cycle.length, cycle.index))

    def shortest_in(self, first: int, after: int | None) -> Cycle:
        """Return the first of the shortest cycles that have samples from ``first`` on, before ``after`` if given."""
        lowest = self.find(first).index
        following = [run.index for run in self.runs[1:]]
        last = None if self.count is None else self.count - 1
        highest = last if after is None else self.find(max(first, after - 1)).index
        # Lengths rise or fall inside a run, so the shortest is at one of its ends, or at one of the two given.
        ends = {lowest, highest, last, *following, *(index - 1 for index in following)}
        inside = [
            index for index in ends if index is not None and lowest <= index and (highest is None or index <= highest)
        ]
        return min(map(self.cycle, inside), key=lambda cycle: (cycle.length, cycle.index))


def geometric(restart_period: Length, t_mult: Length, min_restart_period: Length | None, sizes: Sizes) -> Cycles:
    """Return cycles of length max(T_min, T_0 t_mult**i).

    Args:
        restart_period: T_0; a number is in epochs.
        t_mult: Factor from the length of one cycle to the next.
        min_restart_period: T_min. Default: one epoch (T_0 if that is shorter) when t_mult < 1, none otherwise.
        sizes: What units are worth.

    Raises:
        ValueError: an argument is out of its range, or the cycles cannot be counted exactly.
    """
    first = in_samples("restart_period", restart_period, "epochs", sizes)
    ratio = exact("t_mult", t_mult)
    if min_restart_period is not None:
        floor = in_samples("min_restart_period", min_restart_period, "epochs", sizes)
    else:
        floor = min(first, Fraction(sizes.epoch_size)) if ratio < 1 else Fraction(0)
    shortest = max(floor, first) if ratio >= 1 else floor
    if shortest < _SHORTEST:
        raise ValueError(
            f"restart_period={shown(restart_period)} and min_restart_period={shown(min_restart_period)} "
            f"make cycles of less than a millionth of a sample, in epochs of {sizes.epoch_size:,}. Raise them."
        )
    if ratio == 1 or (ratio < 1 and first <= floor):
        return Cycles((_Run(0, Fraction(0), max(first, floor), Fraction(1)),))
    _check_countable(first, ratio, floor, (t_mult, min_restart_period), sizes)
    # The number of cycles before the floor applies (shrinking) or no longer applies (growing).
    turn = _first_power(first, ratio, floor)
    all_alike = Fraction(1)
    if ratio < 1:
        before = _Run(0, Fraction(0), first, ratio)
        after = _Run(turn, before.start_of(turn), floor, all_alike)
    else:
        before = _Run(0, Fraction(0), floor, all_alike)
        after = _Run(turn, before.start_of(turn), first * ratio**turn, ratio)
    return Cycles((before, after) if turn else (after,))


def by_ends(ends: Sequence[Length], warmup: int, sizes: Sizes) -> Cycles:
    """Return the cycles that end at ``ends``; the first one begins after the warm-up.

    Args:
        ends: Training so far at the end of each cycle, warm-up included; numbers are samples.
        warmup: Samples.
        sizes: What units are worth.

    Raises:
        ValueError: no ends, or one that is not after the one before it.
    """
    if isinstance(ends, str) or not isinstance(ends, Sequence) or not ends:
        raise ValueError(
            f"cycle_ends must be a list of one end or more, such as ['1 epoch', '3 epochs'], got {ends!r}."
        )
    runs: list[_Run] = []
    start = Fraction(0)
    for index, end in enumerate(ends):
        at = in_samples(f"cycle_ends[{index}]", end, "samples", sizes) - warmup
        if at < start + _SHORTEST:
            before = f"{shown(ends[index - 1])}, the one before" if index else f"the warm-up of {warmup:,} samples"
            raise ValueError(f"cycle_ends[{index}]={shown(end)} must come after {before}. Sort the ends.")
        if at - start < sizes.batch_size:
            raise ValueError(
                f"cycle_ends[{index}]={shown(end)} makes a cycle of {float(at - start):g} samples, less than an update "
                f"of {sizes.batch_size:,}. {_hint(end)}"
            )
        runs.append(_Run(index, start, at - start, Fraction(1)))
        start = at
    return Cycles(tuple(runs), len(runs))


def fitted(cycles: Cycles, total_samples: Length, fit: Fit, warmup: int, sizes: Sizes) -> Cycles:
    """Return cycles of which the last ends with training.

    Args:
        cycles: Endless.
        total_samples: All of training, warm-up included; a number is samples.
        fit: "last" cuts the cycle in which training ends, or extends the one before it if less than half of a cycle
            would be left; "scale" multiplies all lengths by the factor nearest to 1.
        warmup: Samples.
        sizes: What units are worth.

    Raises:
        ValueError: training ends before the first update after the warm-up.
    """
    total = in_samples("total_samples", total_samples, "samples", sizes) - warmup
    if total < sizes.batch_size:
        raise ValueError(
            f"total_samples={shown(total_samples)} ends before the first update after the warm-up of {warmup:,} "
            f"samples. {_hint(total_samples)}"
        )
    _check_reachable(cycles, total, sizes)
    last = cycles.find(total)
    if last.start == total and last.index:
        last = cycles.cycle(last.index - 1)
    count = last.index + 1
    if fit == "scale":
        # With a shorter period cycle `last` ends at `total`, with a longer one the cycle before it does.
        factor = total / (last.start + last.length)
        if last.index and total / last.start < 1 / factor:
            factor, count = total / last.start, last.index
        scaled = (replace(run, start=run.start * factor, length=run.length * factor) for run in cycles.runs)
        return Cycles(tuple(run for run in scaled if run.index < count), count)
    if last.index and 2 * (total - last.start) < last.length:
        last, count = cycles.cycle(last.index - 1), last.index
    before = [run for run in cycles.runs if run.index < last.index]
    return Cycles((*before, _Run(last.index, last.start, total - last.start, Fraction(1))), count)


def _check_countable(
    first: Fraction, ratio: Fraction, floor: Fraction, given: tuple[Length, Length | None], sizes: Sizes
) -> None:
    """Raise if the lookup of a sample would take long: it computes exact powers of ``t_mult``."""
    t_mult, min_restart_period = given
    growth = _log_of_one_plus(ratio - 1)
    turns = (
        {f"before the floor of {_with_unit(min_restart_period)}": abs(_log(floor / first) / growth)} if floor else {}
    )
    if ratio > 1:
        length = max(first, floor)
        turns["in a thousand epochs"] = _log_of_one_plus(1000 * sizes.epoch_size * (ratio - 1) / length) / growth
    for when, count in turns.items():
        largest = _LARGEST_POWER if when.startswith("before") else _LARGEST_POWER >> 3
        if count * ratio.denominator.bit_length() > largest:
            raise ValueError(
                f"t_mult={shown(t_mult)} is so close to 1 that {count:,.0f} cycles pass {when}, which cannot "
                "be counted exactly. Round it, or pass 1."
            )


def _check_reachable(cycles: Cycles, total: Fraction, sizes: Sizes) -> None:
    """Raise ValueError if so many cycles of a growing length end before ``total`` that exact powers take long."""
    run = cycles.runs[-1]
    if run.ratio == 1 or total <= run.start:
        return
    count = _log_of_one_plus((total - run.start) * (run.ratio - 1) / run.length) / _log_of_one_plus(run.ratio - 1)
    if count * run.ratio.denominator.bit_length() > _LARGEST_POWER >> 3:
        raise ValueError(
            f"t_mult={float(run.ratio)!r} is so close to 1 that {count:,.0f} cycles end in "
            f"{float(total / sizes.epoch_size):g} epochs, which cannot be counted exactly. Round it, or pass 1."
        )


def _hint(length: Length) -> str:
    if isinstance(length, str):
        return "Make it longer."
    return f"Numbers are samples: write '{shown(length)} epochs' for epochs."


def _with_unit(period: Length | None) -> str:
    return shown(period) if isinstance(period, str) else f"{shown(period)} epochs"


def _log_of_one_plus(value: Fraction) -> float:
    return math.log1p(value) if -0.5 < value < 1 else _log(1 + value)


def _log(value: Fraction) -> float:
    return math.log(value.numerator) - math.log(value.denominator)  # math.log takes ints of any size, beyond any float


def _first_power(first: Fraction, ratio: Fraction, floor: Fraction) -> int:
    """Return the first n at which first * ratio ** n reaches ``floor``, from either side."""

    def reached(n: int) -> bool:
        length = first * ratio**n
        return length <= floor if ratio < 1 else length >= floor

    above = 1
    while not reached(above):
        above *= 2
    return bisect_right(range(above + 1), False, key=reached)
