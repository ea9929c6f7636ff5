"""The AdamWR schedule as a pure function of samples: cycles, lr, and normalised weight decay.

Notation (docs/schedule.md): E epoch size, b global batch, W warm-up, all in samples;
T_i the length of cycle i in epochs; S_i its first sample; tau the position in it.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, NamedTuple

from dist_adamw.schedule.batch import check_whole, shown
from dist_adamw.schedule.exact_math import power
from dist_adamw.schedule.policies import Policy, make_policy

RestartCallback = Callable[[float, float], tuple[float, float]]
IterationCallback = Callable[[float, float, float], tuple[float, float]]
Period = int | float | str | Fraction

_SHORTEST = Fraction(1, 1_000_000)  # samples in a cycle
_BELOW_ONE = math.nextafter(1.0, 0.0)
_AHEAD = 32  # updates for which the policy is computed at once


@dataclass(frozen=True, slots=True)
class ReduceMaxLROnRestart:
    """Restart callback: multiply the peak by ``ratio`` at every restart."""

    ratio: float = 0.75

    def __post_init__(self) -> None:
        if not 0.0 <= self.ratio < math.inf:
            raise ValueError(f"ratio must be a finite number >= 0, got {self.ratio!r}.")

    def __call__(self, eta_min: float, eta_max: float) -> tuple[float, float]:
        """Return the range of the next cycle."""
        return eta_min, eta_max * self.ratio


@dataclass(frozen=True, slots=True)
class ExpReduceMaxLROnIteration:
    """Iteration callback: multiply the peak by ``gamma`` ** (samples after warm-up / b)."""

    gamma: float = 1.0

    def __post_init__(self) -> None:
        _check_gamma(self.gamma)

    def __call__(self, eta_min: float, eta_max: float, iterations: float) -> tuple[float, float]:
        """Return the range after ``iterations`` global batches."""
        return eta_min, eta_max * power(self.gamma, float(iterations))


@dataclass(frozen=True, slots=True)
class Cycle:
    """One cycle of the schedule; ``start`` and ``length`` are exact, in samples after warm-up."""

    index: int
    start: Fraction
    length: Fraction


@dataclass(frozen=True, slots=True)
class SchedulePoint:
    """The schedule at one sample count.

    Attributes:
        cycle: The cycle and its exact boundaries.
        tau: Position in the cycle, in [0, 1).
        multiplier: The lr, from 0 (min_lr) to 1 (base lr).
        warmup: Fraction of the warm-up done, in [0, 1); None once it is over.
    """

    cycle: Cycle
    tau: float
    multiplier: float
    warmup: float | None


class _Ahead:
    """Values of the policy in one cycle, at the samples of updates that are likely to come."""

    __slots__ = ("etas", "last", "step")

    def __init__(self) -> None:
        self.etas: dict[int, float] = {}
        self.last = self.step = 0  # the last sample without a value here, and its distance from the one before


class _Place(NamedTuple):
    """A cycle, and the integers by which to find a sample in it: tau = (u * scale - offset) / divisor."""

    cycle: Cycle
    first: int  # the first whole sample in it
    end: int  # and the first one after it
    scale: int
    offset: int
    divisor: int
    is_scaled: bool  # whether the multiplier is anything else than eta
    ahead: _Ahead

    @classmethod
    def of(cls, cycle: Cycle, *, is_scaled: bool) -> _Place:
        start, length = cycle.start, cycle.length
        scale, divisor = start.denominator * length.denominator, start.denominator * length.numerator
        offset = start.numerator * length.denominator
        shared = math.gcd(scale, offset, divisor)
        end = math.ceil(start + length)
        numbers = (scale // shared, offset // shared, divisor // shared)
        return cls(cycle, math.ceil(start), end, *numbers, is_scaled, _Ahead())

    def tau(self, u: int) -> float:
        # Division of integers is correctly rounded. That may give 1.0, which no cycle contains.
        return min((u * self.scale - self.offset) / self.divisor, _BELOW_ONE)


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

    def find(self, u: int) -> int:
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


@dataclass(frozen=True, kw_only=True, slots=True)
class RestartSchedule:
    """Cyclic learning rates with warm restarts, in samples.

    The lookup of a sample is exact after any number of cycles: boundaries are rational numbers, and no floats
    accumulate. lr and weight decay have the same bits on every processor. With your own ``policy_fn`` or callbacks that
    depends on their arithmetic: ``math.cos``, ``math.exp``, ``**`` and torch's functions differ in the last bit between
    processors; +, -, *, / and ``math.sqrt`` do not.

    Args:
        epoch_size: E, samples in an epoch.
        batch_size: b_ref, the global batch that counts as one iteration.
        restart_period: T_0, epochs in the first cycle; may be a fraction.
        t_mult: Factor from the length of one cycle to the next.
        policy: One of ``policies.POLICIES``; ignored when ``policy_fn`` is given.
        policy_fn: Your own function of tau.
        gamma: Base of exp_range's amplitude, gamma ** (u / b_ref), in (0, 1].
        triangular_step: Position of the triangular policies' peak, in [0, 1].
        min_restart_period: T_min, the shortest cycle in epochs. Default: one epoch
            (T_0 if that is shorter) when t_mult < 1, none otherwise.
        warmup_samples: W; lr rises linearly from warmup_start_lr to the base lr, once.
        warmup_start_lr: lr at sample 0 when W > 0.
        eta_on_restart_cb: (eta_min, eta_max) -> (eta_min, eta_max), applied at each restart to
            the result of the one before, starting from (0, 1). Must be pure: results are recomputed on resume.
        eta_on_iteration_cb: (eta_min, eta_max, iterations) -> (eta_min, eta_max), applied
            once to that result; iterations = u / b_ref.
        weight_decay_exponent: p_wd; 1/2 is AdamWR's.

    Raises:
        ValueError: an argument is out of its range.

    Source: SGDR arXiv:1608.03983; AdamWR arXiv:1711.05101, appendix B; CLR arXiv:1506.01186.
    """

    epoch_size: int
    batch_size: int
    restart_period: Period = 100
    t_mult: Period = 2
    policy: str = "cosine"
    policy_fn: Policy | None = None
    gamma: float = 1.0
    triangular_step: float = 0.5
    min_restart_period: Period | None = None
    warmup_samples: int = 0
    warmup_start_lr: float = 0.0
    eta_on_restart_cb: RestartCallback | None = None
    eta_on_iteration_cb: IterationCallback | None = None
    weight_decay_exponent: float = 0.5
    _eta: Policy = field(init=False, repr=False, compare=False)
    _runs: tuple[_Run, ...] = field(init=False, repr=False, compare=False)
    # Caches, not state: the restart callback's last result as (cycle, eta_min, eta_max), and the cycle last looked up
    # (its `_Place`; in pickles of earlier versions a `Cycle`).
    _folded: list[tuple[int, float, float]] = field(init=False, repr=False, compare=False)
    _recent: list[_Place] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, least in (("epoch_size", 1), ("batch_size", 1), ("warmup_samples", 0)):
            object.__setattr__(self, name, check_whole(name, getattr(self, name), least))
        for name in ("warmup_start_lr", "triangular_step", "weight_decay_exponent", "gamma"):
            # A numpy float32 would turn everything computed with it into float32.
            object.__setattr__(self, name, _check_number(name, getattr(self, name)))
        if not 0.0 <= self.warmup_start_lr < math.inf:
            raise ValueError(f"warmup_start_lr must be a finite number >= 0, got {self.warmup_start_lr!r}.")
        if not 0.0 <= self.triangular_step <= 1.0:
            raise ValueError(f"triangular_step must lie in [0, 1], got {self.triangular_step!r}.")
        if not 0.0 <= self.weight_decay_exponent <= 10.0:
            raise ValueError(f"weight_decay_exponent must lie in [0, 10], got {self.weight_decay_exponent!r}.")
        _check_gamma(self.gamma)
        if self.policy_fn is not None and not callable(self.policy_fn):
            raise ValueError(f"policy_fn must be a function of tau, got {self.policy_fn!r}.")
        object.__setattr__(self, "_eta", self.policy_fn or make_policy(self.policy, self.triangular_step))
        object.__setattr__(self, "_runs", self._make_runs())
        object.__setattr__(self, "_folded", [(0, 0.0, 1.0)])
        object.__setattr__(self, "_recent", [self._place_of(self.cycle(0))])

    def _make_runs(self) -> tuple[_Run, ...]:
        first = exact("restart_period", self.restart_period) * self.epoch_size
        ratio = exact("t_mult", self.t_mult)
        if self.min_restart_period is not None:
            floor = exact("min_restart_period", self.min_restart_period) * self.epoch_size
        else:
            floor = min(first, Fraction(self.epoch_size)) if ratio < 1 else Fraction(0)
        shortest = max(floor, first) if ratio >= 1 else floor
        if shortest < _SHORTEST:
            raise ValueError(
                f"restart_period={shown(self.restart_period)} and min_restart_period={shown(self.min_restart_period)} "
                f"make cycles of less than a millionth of a sample, in epochs of {self.epoch_size:,}. Raise them."
            )
        self._check_countable(first, ratio, floor)
        if ratio == 1 or (ratio < 1 and first <= floor):
            return (_Run(0, Fraction(0), max(first, floor), Fraction(1)),)
        # The number of cycles before the floor applies (shrinking) or no longer applies (growing).
        turn = _first_power(first, ratio, floor)
        all_alike = Fraction(1)
        if ratio < 1:
            before = _Run(0, Fraction(0), first, ratio)
            after = _Run(turn, before.start_of(turn), floor, all_alike)
        else:
            before = _Run(0, Fraction(0), floor, all_alike)
            after = _Run(turn, before.start_of(turn), first * ratio**turn, ratio)
        return (before, after) if turn else (after,)

    def _check_countable(self, first: Fraction, ratio: Fraction, floor: Fraction) -> None:
        """Raise if the lookup of a sample would take long: it computes exact powers of ``t_mult``."""
        if ratio == 1 or (ratio < 1 and first <= floor):
            return
        growth = _log_of_one_plus(ratio - 1)
        turns = (
            {f"before the floor of {shown(self.min_restart_period)} epochs": abs(_log(floor / first) / growth)}
            if floor
            else {}
        )
        if ratio > 1:
            length = max(first, floor)
            turns["in a thousand epochs"] = _log_of_one_plus(1000 * self.epoch_size * (ratio - 1) / length) / growth
        for when, count in turns.items():
            largest = _LARGEST_POWER if when.startswith("before") else _LARGEST_POWER >> 3
            if count * ratio.denominator.bit_length() > largest:
                raise ValueError(
                    f"t_mult={shown(self.t_mult)} is so close to 1 that {count:,.0f} cycles pass {when}, which cannot "
                    "be counted exactly. Round it, or pass 1."
                )

    def cycle(self, index: int) -> Cycle:
        """Return cycle number ``index``, counted from 0."""
        run = self._runs[-1] if index >= self._runs[-1].index else self._runs[0]
        return run.cycle(index)

    def at(self, samples: int) -> SchedulePoint:
        """Return the point of the schedule after ``samples``, the real global samples before an update."""
        cycle, multiplier, warmup = self._look_up(samples)
        return SchedulePoint(cycle, self._recent[0].tau(max(0, samples - self.warmup_samples)), multiplier, warmup)

    def _look_up(self, samples: int) -> tuple[Cycle, float, float | None]:
        """Return the cycle, the multiplier and the warm-up at ``samples``."""
        u = max(0, samples - self.warmup_samples)
        place = self._recent[0]
        # Consecutive lookups nearly always hit the same cycle, and the search computes large powers.
        if type(place) is not _Place or not place.first <= u < place.end:
            place = self._recent[0] = self._find(u)
        eta = place.ahead.etas.get(u)
        if eta is None:
            eta = self._eta_at(u, place)
        multiplier = self._multiplier(place.cycle.index, eta, u) if place.is_scaled else 0.0 + 1.0 * eta
        return place.cycle, multiplier, samples / self.warmup_samples if samples < self.warmup_samples else None

    def _eta_at(self, u: int, place: _Place) -> float:
        """Return the policy's value; compute those of the next updates too, if updates have the same size.

        One after the other they take a third of the time that each takes between two updates, with cold caches.
        """
        eta = self._checked_eta(place.tau(u))
        ahead, step = place.ahead, u - place.ahead.last
        if step == ahead.step > 0 and self.policy_fn is None:  # a user's function is called only when it is needed
            coming = range(u + step, min(u + _AHEAD * step + 1, place.end), step)
            ahead.etas = {at: self._checked_eta(place.tau(at)) for at in coming}
            u = coming[-1] if coming else u
        ahead.last, ahead.step = u, step
        return eta

    def _checked_eta(self, tau: float) -> float:
        eta = self._eta(tau)
        if not -math.inf < eta < math.inf:
            raise ValueError(f"the policy returned {eta!r} at tau={tau!r}; it must return a finite number.")
        return eta

    def _find(self, u: int) -> _Place:
        run = self._runs[-1] if u >= self._runs[-1].start else self._runs[0]
        return self._place_of(run.cycle(run.find(u)))

    def _place_of(self, cycle: Cycle) -> _Place:
        has_callbacks = self.eta_on_restart_cb is not None or self.eta_on_iteration_cb is not None
        is_scaled = self.policy_fn is None and self.policy in ("triangular2", "exp_range")
        return _Place.of(cycle, is_scaled=has_callbacks or is_scaled)

    def _multiplier(self, cycle: int, eta: float, u: int) -> float:
        eta_min, eta_max = self._fold(cycle)
        iterations = u / self.batch_size
        if self.eta_on_iteration_cb is not None:
            eta_min, eta_max = self.eta_on_iteration_cb(eta_min, eta_max, iterations)
        if self.policy_fn is None and self.policy == "triangular2":
            eta_max *= math.ldexp(1.0, -min(cycle, 2000))  # 2000: past the smallest float
        elif self.policy_fn is None and self.policy == "exp_range":
            eta_max *= power(self.gamma, iterations)
        return eta_min + (eta_max - eta_min) * eta

    def _fold(self, cycle: int) -> tuple[float, float]:
        if self.eta_on_restart_cb is None:
            return 0.0, 1.0
        # Continue from the cached cycle; for an earlier one (a preview, a load) begin again.
        done, eta_min, eta_max = self._folded[0] if self._folded[0][0] <= cycle else (0, 0.0, 1.0)
        while done < cycle:
            before = (eta_min, eta_max)
            eta_min, eta_max = self.eta_on_restart_cb(eta_min, eta_max)
            # At a fixed point all further calls return the same, so a late cycle need not make them.
            done = cycle if (eta_min, eta_max) == before else done + 1
        self._folded[0] = (done, eta_min, eta_max)
        return eta_min, eta_max

    def lr(self, point: SchedulePoint, base_lr: float, min_lr: float) -> float:
        """Return the learning rate of a group at ``point``."""
        if point.warmup is not None:
            return self.warmup_start_lr + (base_lr - self.warmup_start_lr) * point.warmup
        return min_lr + (base_lr - min_lr) * point.multiplier

    def weight_decay_norm(self, point: SchedulePoint, batch_size: int) -> float:
        """Return (b / (E T_i)) ** p_wd, the factor from lambda_norm to lambda_i.

        Source: AdamWR, arXiv:1711.05101, appendix on normalised weight decay.
        """
        return self._norm_in(point.cycle, batch_size)

    def _norm_in(self, cycle: Cycle, batch_size: int) -> float:
        """Return `weight_decay_norm`, which is the same in the whole cycle."""
        return power(_ratio(Fraction(batch_size), cycle.length), float(self.weight_decay_exponent))


def exact(name: str, value: Period) -> Fraction:
    """Return the fraction that ``value`` prints as, so that 0.1 means 1/10.

    Raises:
        ValueError: not a finite number above 0.
    """
    try:
        text = str(value).replace("_", "")
        # As a Fraction, "1e9999999" would exhaust memory.
        fraction = Fraction(0 if len(text) > 1000 or re.search(r"[eE][+-]?\d{4}", text) else text)
    except (ValueError, ZeroDivisionError):
        fraction = Fraction(0)
    if fraction <= 0:
        raise ValueError(f"{name} must be a finite number above 0, got {shown(value)}.")
    return fraction


def _log_of_one_plus(value: Fraction) -> float:
    return math.log1p(value) if -0.5 < value < 1 else _log(1 + value)


def _log(value: Fraction) -> float:
    return math.log(value.numerator) - math.log(value.denominator)  # math.log takes ints of any size, beyond any float


def _ratio(a: Fraction, b: Fraction) -> float:
    # Integer division is correctly rounded and, unlike Fraction's, computes no greatest common divisor.
    return (a.numerator * b.denominator) / (a.denominator * b.numerator)


# Bits of an exact power of t_mult that can still be computed in well under a second.
_LARGEST_POWER = 1 << 20


def _first_power(first: Fraction, ratio: Fraction, floor: Fraction) -> int:
    """Return the first n at which first * ratio ** n reaches ``floor``, from either side."""

    def reached(n: int) -> bool:
        length = first * ratio**n
        return length <= floor if ratio < 1 else length >= floor

    above = 1
    while not reached(above):
        above *= 2
    return bisect_right(range(above + 1), False, key=reached)


def _check_number(name: str, value: Any) -> float:
    try:
        if not isinstance(value, str):
            return float(value)
    except (TypeError, ValueError, OverflowError):
        pass
    raise ValueError(f"{name} must be a number, got {shown(value)}.")


def _check_gamma(gamma: float) -> None:
    if not 0.0 < gamma <= 1.0:
        raise ValueError(f"gamma must lie in (0, 1], got {gamma!r}.")
