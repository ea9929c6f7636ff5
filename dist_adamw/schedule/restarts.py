"""The AdamWR schedule as a pure function of samples: cycles, lr, and normalised weight decay.

Notation (docs/schedule.md): E epoch size, b global batch, W warm-up, all in samples;
T_i the length of cycle i in epochs; S_i its first sample; tau the position in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from fractions import Fraction
from typing import Any

from dist_adamw.schedule.batch import check_whole, shown
from dist_adamw.schedule.cooldown import Cooldown
from dist_adamw.schedule.cycles import Cycle, Cycles, Fit, by_ends, fitted, geometric
from dist_adamw.schedule.exact_math import power
from dist_adamw.schedule.lengths import Length, Sizes, in_samples
from dist_adamw.schedule.policies import RISING, Policy, make_policy, make_shape
from dist_adamw.schedule.segments import Phases, Segment

RestartCallback = Callable[[float, float], tuple[float, float]]
IterationCallback = Callable[[float, float, float], tuple[float, float]]


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
class SchedulePoint:
    """The schedule at one sample count.

    Attributes:
        cycle: The cycle and its exact boundaries.
        tau: Position in the cycle, in [0, 1); 1 after the last cycle.
        multiplier: The lr, from 0 (min_lr) to 1 (base lr).
        warmup: Fraction of the warm-up done, in [0, 1); None once it is over.
        samples: The count.
    """

    cycle: Cycle
    tau: float
    multiplier: float
    warmup: float | None
    samples: int


@dataclass(frozen=True, kw_only=True)
class RestartSchedule:
    """Cyclic learning rates with warm restarts, in samples.

    The lookup of a sample is exact after any number of cycles: boundaries are rational numbers, and no floats
    accumulate. lr and weight decay have the same bits on every processor. With your own ``policy_fn`` or callbacks that
    depends on their arithmetic: ``math.cos``, ``math.exp``, ``**`` and torch's functions differ in the last bit between
    processors; +, -, *, / and ``math.sqrt`` do not.

    Args:
        epoch_size: E, samples in an epoch.
        batch_size: b_ref, the global batch that counts as one iteration.
        restart_period: T_0, epochs in the first cycle; may be a fraction. This and other lengths may have a unit: "2.5
            epochs", "10_000 samples", "500 updates" of b_ref, "1e9 tokens".
        t_mult: Factor from the length of one cycle to the next.
        policy: One of ``policies.POLICIES``; ignored when ``policy_fn`` is given.
        policy_fn: Your own function of tau.
        gamma: Base of exp_range's amplitude, gamma ** (u / b_ref), in (0, 1].
        triangular_step: Position of the triangular policies' peak, in [0, 1].
        min_restart_period: T_min, the shortest cycle in epochs. Default: one epoch
            (T_0 if that is shorter) when t_mult < 1, none otherwise.
        warmup_samples: W; lr rises linearly from warmup_start_lr to the base lr, once. Rounded up to whole samples.
        warmup_start_lr: lr at sample 0 when W > 0.
        eta_on_restart_cb: (eta_min, eta_max) -> (eta_min, eta_max), applied at each restart to
            the result of the one before, starting from (0, 1). Must be pure: results are recomputed on resume.
        eta_on_iteration_cb: (eta_min, eta_max, iterations) -> (eta_min, eta_max), applied
            once to that result; iterations = u / b_ref.
        weight_decay_exponent: p_wd; 1/2 is AdamWR's.
        decay_length: For policy "wsd", the part at the end of a cycle in which lr falls, in samples; "10%" is a share
            of the cycle, and the default.
        decay_shape: For policy "wsd", the shape of that fall: "linear", "one_minus_sqrt" or "cosine".
        rewarmup: Samples, or a share of the cycle, over which lr rises from its minimum after each restart.
        peak_factor: The peak of cycle i is multiplied by peak_factor ** i; a list has a factor of each cycle, and its
            last one serves for further cycles.
        cycle_ends: Training so far at the end of each cycle, in samples with the warm-up, in place of restart_period
            and t_mult. After the last end the lr stays where that cycle ends.
        total_samples: Samples of the whole training with the warm-up: the last cycle ends there, and the lr stays.
        fit: How: "last" cuts or extends the last cycle, "scale" scales all cycles.
        weight_decay_timescale: Samples over which AdamW's weights average their updates at the base lr, in place of
            weight decays above 0; "1 cycle" and "2 epochs" work.
        tokens_per_sample: For lengths in tokens.
        cooldown: A fall of the lr that ends the schedule.

    Attributes:
        last_sample: The clock at which the last cycle or the cool-down ends; None: endless.

    Raises:
        ValueError: an argument is out of its range.

    Source: SGDR arXiv:1608.03983; AdamWR arXiv:1711.05101, appendix B; CLR arXiv:1506.01186; WSD-S arXiv:2410.05192;
    time scale of weight decay arXiv:2405.13698 and arXiv:2505.13738.
    """

    epoch_size: int
    batch_size: int
    restart_period: Length = 100
    t_mult: Length = 2
    policy: str = "cosine"
    policy_fn: Policy | None = None
    gamma: float = 1.0
    triangular_step: float = 0.5
    min_restart_period: Length | None = None
    warmup_samples: int = 0
    warmup_start_lr: float = 0.0
    eta_on_restart_cb: RestartCallback | None = None
    eta_on_iteration_cb: IterationCallback | None = None
    weight_decay_exponent: float = 0.5
    decay_length: Length | None = None
    decay_shape: str = "linear"
    rewarmup: Length | None = None
    peak_factor: float | Sequence[float] = 1.0
    cycle_ends: Sequence[Length] | None = None
    total_samples: Length | None = None
    fit: Fit = "last"
    weight_decay_timescale: Length | None = None
    tokens_per_sample: int | None = None
    cooldown: Cooldown | None = None
    _cycles: Cycles = field(init=False, repr=False, compare=False)
    _phases: Phases = field(init=False, repr=False, compare=False)
    _end: Fraction | None = field(init=False, repr=False, compare=False)  # of the last cycle
    last_sample: int | None = field(init=False, repr=False, compare=False)
    _is_scaled: bool = field(init=False, repr=False, compare=False)  # whether the multiplier is anything else than eta
    # Caches, not state: the restart callback's last result as (cycle, eta_min, eta_max), and the last segment.
    _folded: list[tuple[int, float, float]] = field(init=False, repr=False, compare=False)
    _recent: list[Segment] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("epoch_size", "batch_size"):
            object.__setattr__(self, name, check_whole(name, getattr(self, name), 1))
        if self.tokens_per_sample is not None:
            object.__setattr__(self, "tokens_per_sample", check_whole("tokens_per_sample", self.tokens_per_sample, 1))
        sizes = Sizes(self.epoch_size, self.batch_size, self.tokens_per_sample)
        warmup: Any = self.warmup_samples
        if isinstance(warmup, str):
            warmup = math.ceil(in_samples("warmup_samples", warmup, "samples", sizes))
        object.__setattr__(self, "warmup_samples", check_whole("warmup_samples", warmup))
        for name in ("warmup_start_lr", "triangular_step", "weight_decay_exponent", "gamma"):
            # A numpy float32 would turn everything computed with it into float32.
            object.__setattr__(self, name, _check_number(name, getattr(self, name)))
        object.__setattr__(self, "peak_factor", _check_factors(self.peak_factor))
        object.__setattr__(self, "rewarmup", self.rewarmup or None)
        _check_choices(self)
        curve = self.policy_fn or make_policy(self.policy, self.triangular_step, self.decay_shape)
        decay = self.decay_length
        if self._is("wsd") and decay is None:
            decay = "10%"
        has_callbacks = self.eta_on_restart_cb is not None or self.eta_on_iteration_cb is not None
        is_scaled = has_callbacks or self._is("triangular2", "exp_range") or self.peak_factor != 1.0
        object.__setattr__(self, "_is_scaled", is_scaled)
        object.__setattr__(self, "_cycles", self._make_cycles(sizes))
        object.__setattr__(self, "_end", self._cycles.end)
        last = None if self.count is None else self.first_sample(self.count)
        object.__setattr__(self, "last_sample", last if self.cooldown is None else self.cooldown.end)
        object.__setattr__(self, "_phases", Phases(self.rewarmup, decay, curve, sizes))
        object.__setattr__(self, "_folded", [(0, 0.0, 1.0)])
        shortest = self._cycles.shortest
        self._phases.edges(shortest)
        self._phases.edges(Cycle(max(shortest.index, 1), shortest.start, shortest.length))  # cycle 0 has no rise
        self.check_timescale(self.batch_size)
        object.__setattr__(self, "_recent", [self._phases.find(self.cycle(0), 0)])

    def _is(self, *policies: str) -> bool:
        return self.policy_fn is None and self.policy in policies

    def _make_cycles(self, sizes: Sizes) -> Cycles:
        if self.cycle_ends is not None:
            return by_ends(self.cycle_ends, self.warmup_samples, sizes)
        cycles = geometric(self.restart_period, self.t_mult, self.min_restart_period, sizes)
        if self.total_samples is None:
            return cycles
        return fitted(cycles, self.total_samples, self.fit, self.warmup_samples, sizes)

    def check_timescale(self, batch_size: int, first: int = 0, after: int | None = None) -> None:
        """Raise ValueError if ``weight_decay_timescale`` is shorter than an update of ``batch_size`` samples.

        Args:
            batch_size: Samples.
            first: The first sample at which updates have this size.
            after: The first one at which they have another; None: all later ones have this size.
        """
        if self.weight_decay_timescale is None:
            return
        since, until = (None if at is None else max(0, at - self.warmup_samples) for at in (first, after))
        timescale = self._timescale(self._cycles.shortest_in(since or 0, until))
        if timescale < batch_size:
            raise ValueError(
                f"weight_decay_timescale={shown(self.weight_decay_timescale)} is {float(timescale):,.6g} samples, less "
                f"than an update of {batch_size:,}: weights would change their sign. Make it longer."
            )

    def __getstate__(self) -> dict[str, Any]:
        return {one.name: getattr(self, one.name) for one in fields(self) if one.init}

    def __setstate__(self, state: Mapping[str, Any] | Sequence[Any]) -> None:
        if not isinstance(state, Mapping):  # from an earlier version: the values of the first fields, and caches
            names = [one.name for one in fields(self)]
            state = dict(zip(names[: names.index("decay_length")], state, strict=False))
        for one in fields(self):
            if one.init:
                object.__setattr__(self, one.name, state.get(one.name, one.default))
        self.__post_init__()

    @property
    def sizes(self) -> Sizes:
        """What the units of lengths are worth."""
        return self._phases.sizes

    @property
    def count(self) -> int | None:
        """The number of cycles; None: endless."""
        return self._cycles.count

    def cycle(self, index: int) -> Cycle:
        """Return cycle number ``index``, counted from 0.

        Raises:
            ValueError: there are fewer cycles.
        """
        return self._cycles.cycle(index)

    def first_sample(self, index: int) -> int:
        """Return the clock at which cycle number ``index`` begins; for ``count``, at which the last one ends."""
        return self.warmup_samples + math.ceil(self._cycles.start_of(index))

    def at(self, samples: int) -> SchedulePoint:
        """Return the point of the schedule after ``samples``, the real global samples before an update."""
        cycle, multiplier, warmup = self._look_up(samples)
        before_cooldown = samples if self.cooldown is None else min(samples, self.cooldown.at)
        u = max(0, before_cooldown - self.warmup_samples)
        is_over = self._end is not None and u >= self._end
        return SchedulePoint(cycle, 1.0 if is_over else self._recent[0].tau(u), multiplier, warmup, samples)

    def _look_up(self, samples: int) -> tuple[Cycle, float, float | None]:
        """Return the cycle, the multiplier and the warm-up at ``samples``."""
        if self.cooldown is not None and samples >= self.cooldown.at:
            cycle, multiplier, warmup = self._look_up_cycle(self.cooldown.at)
            return cycle, multiplier * self.cooldown.factor(samples), warmup
        return self._look_up_cycle(samples)

    def _look_up_cycle(self, samples: int) -> tuple[Cycle, float, float | None]:
        u = max(0, samples - self.warmup_samples)
        if self._end is not None and u >= self._end:
            return self._after_the_end()
        segment = self._recent[0]
        # Consecutive lookups nearly always hit the same segment, and the search computes large powers.
        if not segment.first <= u < segment.end:
            segment = self._recent[0] = self._phases.find(self._cycles.find(u), u)
        eta = segment.ahead.etas.get(u)
        if eta is None:  # a user's function is called only when it is needed
            eta = segment.value(u, _checked, may_compute_ahead=self.policy_fn is None)
        multiplier = self._multiplier(segment.cycle.index, eta, u) if self._is_scaled else 0.0 + 1.0 * eta
        return segment.cycle, multiplier, samples / self.warmup_samples if samples < self.warmup_samples else None

    def _after_the_end(self) -> tuple[Cycle, float, float | None]:
        assert self.count is not None
        assert self._end is not None
        cycle = self.cycle(self.count - 1)
        eta = _checked(self._phases.curve, 1.0)
        multiplier = self._multiplier(cycle.index, eta, math.ceil(self._end)) if self._is_scaled else 0.0 + 1.0 * eta
        return cycle, multiplier, None

    def _multiplier(self, cycle: int, eta: float, u: int) -> float:
        eta_min, eta_max = self._fold(cycle)
        iterations = u / self.batch_size
        if self.eta_on_iteration_cb is not None:
            eta_min, eta_max = self.eta_on_iteration_cb(eta_min, eta_max, iterations)
        if self._is("triangular2"):
            eta_max *= math.ldexp(1.0, -min(cycle, 2000))  # 2000: past the smallest float
        elif self._is("exp_range"):
            eta_max *= power(self.gamma, iterations)
        eta_max *= self._peak(cycle)
        return eta_min + (eta_max - eta_min) * eta

    def _peak(self, cycle: int) -> float:
        factor = self.peak_factor
        if isinstance(factor, Sequence):
            return factor[min(cycle, len(factor) - 1)]
        return power(factor, float(cycle)) if factor else float(cycle == 0)

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
        """Return (b / (E T_i)) ** p_wd, the factor from lambda_norm to lambda_i; with a time scale tau, b / tau.

        Source: AdamWR, arXiv:1711.05101, appendix on normalised weight decay.
        """
        return self._norm_in(point.cycle, batch_size)

    def _norm_in(self, cycle: Cycle, batch_size: int, *, since_first: bool = False) -> float:
        """Return `weight_decay_norm`, which is the same in the whole cycle.

        Args:
            cycle: The cycle.
            batch_size: b.
            since_first: Divide by its value in the first cycle with the batch of the beginning.
        """
        if self.weight_decay_timescale is not None:
            return _ratio(Fraction(batch_size), self._timescale(cycle))
        length = cycle.length * self.batch_size / self.cycle(0).length if since_first else cycle.length
        return power(_ratio(Fraction(batch_size), length), float(self.weight_decay_exponent))

    def _timescale(self, cycle: Cycle) -> Fraction:
        """Return the time scale in samples."""
        assert self.weight_decay_timescale is not None
        sizes, name = self.sizes, "weight_decay_timescale"
        return in_samples(name, self.weight_decay_timescale, "samples", sizes, cycle.length)


def _check_choices(schedule: RestartSchedule) -> None:
    """Raise ValueError for values out of their range, and options that exclude each other."""
    if not 0.0 <= schedule.warmup_start_lr < math.inf:
        raise ValueError(f"warmup_start_lr must be a finite number >= 0, got {schedule.warmup_start_lr!r}.")
    if not 0.0 <= schedule.triangular_step <= 1.0:
        raise ValueError(f"triangular_step must lie in [0, 1], got {schedule.triangular_step!r}.")
    if not 0.0 <= schedule.weight_decay_exponent <= 10.0:
        raise ValueError(f"weight_decay_exponent must lie in [0, 10], got {schedule.weight_decay_exponent!r}.")
    _check_gamma(schedule.gamma)
    if schedule.policy_fn is not None and not callable(schedule.policy_fn):
        raise ValueError(f"policy_fn must be a function of tau, got {schedule.policy_fn!r}.")
    make_shape("decay_shape", schedule.decay_shape)
    if schedule.decay_shape != "linear" and not schedule._is("wsd"):
        raise ValueError(f"decay_shape={schedule.decay_shape!r} is for policy='wsd', got {schedule.policy!r}.")
    if schedule.weight_decay_timescale is not None and schedule.weight_decay_exponent != 0.5:
        raise ValueError(
            f"weight_decay_exponent={schedule.weight_decay_exponent!r} has no effect with weight_decay_timescale: "
            "leave one of them out."
        )
    if schedule.fit not in ("last", "scale"):
        raise ValueError(f"fit must be 'last' or 'scale', got {schedule.fit!r}.")
    if schedule.decay_length is not None and not schedule._is("wsd"):
        raise ValueError(f"decay_length={shown(schedule.decay_length)} is for policy='wsd', got {schedule.policy!r}.")
    if schedule.rewarmup is not None and schedule._is(*RISING):
        raise ValueError(f"rewarmup={shown(schedule.rewarmup)}, but policy={schedule.policy!r} rises itself.")
    if schedule.fit != "last" and schedule.total_samples is None:
        raise ValueError(f"fit={schedule.fit!r} needs total_samples, where the last cycle is to end.")
    others = (schedule.restart_period, schedule.t_mult, schedule.min_restart_period)
    if schedule.cycle_ends is not None and others != (100, 2, None):
        raise ValueError(
            "cycle_ends stands in place of restart_period, t_mult and min_restart_period, got "
            f"restart_period={shown(others[0])}, t_mult={shown(others[1])}, min_restart_period={shown(others[2])}."
        )
    if schedule.cycle_ends is not None and schedule.total_samples is not None:
        raise ValueError("pass cycle_ends or total_samples, not both: the last of cycle_ends ends training.")


def _checked(curve: Policy, tau: float) -> float:
    eta = curve(tau)
    if not -math.inf < eta < math.inf:
        raise ValueError(f"the policy returned {eta!r} at tau={tau!r}; it must return a finite number.")
    return eta


def _ratio(a: Fraction, b: Fraction) -> float:
    # Integer division is correctly rounded and, unlike Fraction's, computes no greatest common divisor.
    return (a.numerator * b.denominator) / (a.denominator * b.numerator)


def _check_factors(factor: Any) -> float | tuple[float, ...]:
    is_list = isinstance(factor, Sequence) and not isinstance(factor, str)
    factors = tuple(_check_number("peak_factor", one) for one in (factor if is_list else [factor]))
    if not factors or not all(0.0 <= one < math.inf for one in factors):
        raise ValueError(f"peak_factor must be a finite number >= 0, or a list of them, got {factor!r}.")
    return factors if is_list else factors[0]


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
