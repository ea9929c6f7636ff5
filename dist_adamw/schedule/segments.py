"""Segments of a cycle: a rise after the restart, a stable lr, and the policy's curve.

A lookup nearly always hits the segment of the one before it, so a segment keeps the integers by which to find a sample
in it, and values of the policy at the samples that are likely to come.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

from dist_adamw.schedule.cycles import Cycle
from dist_adamw.schedule.lengths import Length, Sizes, in_samples
from dist_adamw.schedule.policies import Policy, rise, stable

BELOW_ONE = math.nextafter(1.0, 0.0)
_AHEAD = 32  # updates for which the policy is computed at once


class _Ahead:
    """Values of the policy in one segment, at the samples of updates that are likely to come."""

    __slots__ = ("etas", "last", "step")

    def __init__(self) -> None:
        self.etas: dict[int, float] = {}
        self.last = self.step = 0  # the last sample without a value here, and its distance from the one before


class Segment(NamedTuple):
    """A part of a cycle with one curve: position = (u * scale - offset) / divisor, in [0, 1)."""

    cycle: Cycle
    first: int  # the first whole sample in it
    end: int  # and the first one after it
    scale: int
    offset: int
    divisor: int
    curve: Policy
    is_whole: bool  # whether it is the whole cycle
    ahead: _Ahead

    @classmethod
    def of(cls, cycle: Cycle, start: Fraction, end: Fraction, curve: Policy) -> Segment:
        """Return the segment of ``cycle`` from ``start`` to ``end``, in samples after warm-up."""
        length = end - start
        scale, divisor = start.denominator * length.denominator, start.denominator * length.numerator
        offset = start.numerator * length.denominator
        shared = math.gcd(scale, offset, divisor)
        numbers = (scale // shared, offset // shared, divisor // shared)
        is_whole = start == cycle.start and length == cycle.length
        return cls(cycle, math.ceil(start), math.ceil(end), *numbers, curve, is_whole, _Ahead())

    def position(self, u: int) -> float:
        """Return the position of sample ``u`` in the segment."""
        # Division of integers is correctly rounded. That may give 1.0, which no segment contains.
        return min((u * self.scale - self.offset) / self.divisor, BELOW_ONE)

    def tau(self, u: int) -> float:
        """Return the position of sample ``u`` in the cycle."""
        if self.is_whole:
            return self.position(u)
        ratio = (u - self.cycle.start) / self.cycle.length
        return min(ratio.numerator / ratio.denominator, BELOW_ONE)

    def value(self, u: int, checked: Callable[[Policy, float], float], *, may_compute_ahead: bool) -> float:
        """Return the curve's value at ``u``; compute those of the next updates too, if updates have the same size.

        One after the other they take a third of the time that each takes between two updates, with cold caches.
        """
        eta = self.ahead.etas.get(u)
        if eta is not None:
            return eta
        eta = checked(self.curve, self.position(u))
        ahead, step = self.ahead, u - self.ahead.last
        if step == ahead.step > 0 and may_compute_ahead:
            coming = range(u + step, min(u + _AHEAD * step + 1, self.end), step)
            ahead.etas = {at: checked(self.curve, self.position(at)) for at in coming}
            u = coming[-1] if coming else u
        ahead.last, ahead.step = u, step
        return eta


class Phases(NamedTuple):
    """The lengths of a cycle's segments.

    Attributes:
        rewarmup: The rise after each restart; None: none.
        decay: The part at the end of a cycle in which the policy falls; lr is stable before it. None: all of the cycle.
        curve: The policy.
        sizes: What units are worth.
    """

    rewarmup: Length | None
    decay: Length | None
    curve: Policy
    sizes: Sizes

    def edges(self, cycle: Cycle) -> tuple[Fraction, Fraction]:
        """Return where the rise ends and where the policy's curve begins, in samples after warm-up.

        Raises:
            ValueError: both together are longer than the cycle.
        """
        start, end = cycle.start, cycle.start + cycle.length
        risen = start
        if self.rewarmup is not None and cycle.index:  # cycle 0 follows the warm-up
            risen += in_samples("rewarmup", self.rewarmup, "samples", self.sizes, cycle.length)
        falls = risen
        if self.decay is not None:
            falls = end - in_samples("decay_length", self.decay, "samples", self.sizes, cycle.length)
        if not risen <= falls < end:
            given = {"rewarmup": self.rewarmup, "decay_length": self.decay}
            names = " and ".join(f"{name}={value!r}" for name, value in given.items() if value is not None)
            raise ValueError(
                f"cycle {cycle.index} has {float(cycle.length):,.6g} samples, too few for {names}. Shorten them, for "
                "example to a share of the cycle ('10%')."
            )
        return risen, falls

    def find(self, cycle: Cycle, u: int) -> Segment:
        """Return the segment of ``cycle`` that contains ``u``."""
        start, end = cycle.start, cycle.start + cycle.length
        if self.rewarmup is None and self.decay is None:
            return Segment.of(cycle, start, end, self.curve)
        risen, falls = self.edges(cycle)
        if u < risen:
            return Segment.of(cycle, start, risen, rise)
        if u < falls:
            return Segment.of(cycle, risen, falls, stable)
        return Segment.of(cycle, falls, end, self.curve)
