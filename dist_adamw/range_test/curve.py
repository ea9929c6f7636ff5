"""The curve of a range test, when it has diverged, and the lr range that it suggests. Pure functions of numbers."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MIN_UPDATES = 20  # with fewer the levels below are of single losses
_BEGIN, _END = 0.1, 0.9  # of the fall of the loss, between which it falls fast
_SIGNIFICANT = 5.0  # standard errors; of 1,000 curves of noise alone, fewer than 1 falls so far


@dataclass(frozen=True, slots=True)
class RangeResult:
    """The result of a range test.

    Attributes:
        lrs: The lr of each update; of the group with the largest lr, if groups differ.
        losses: The loss before that update, averaged over micro-batches and ranks.
        smoothed: ``losses``, smoothed without a lag.
        suggested_min: Where the loss begins to fall; None without a suggestion.
        suggested_max: Where the fall slows; None without a suggestion.
        problem: Why there is no suggestion; None if there is one.
        ended_by: Why the test ended.
    """

    lrs: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed: tuple[float, ...]
    suggested_min: float | None
    suggested_max: float | None
    problem: str | None
    ended_by: str

    def plot(self, path: str | Path) -> Path:
        """Draw the curve and the suggestion into a PNG. Local; call it on one rank.

        Raises:
            ModuleNotFoundError: matplotlib is missing; install dist_adamw[tracking].
        """
        from dist_adamw.range_test.drawing import draw_range

        suggested = self.suggested_min, self.suggested_max
        return draw_range(path, self.lrs, self.losses, self.smoothed, suggested, self.ended_by)

    def __str__(self) -> str:
        lines = ["          lr        loss    smoothed"]
        shown = sorted({round(i * (len(self.lrs) - 1) / 19) for i in range(20)}) if self.lrs else []
        for i in shown:
            lines.append(f"{self.lrs[i]:12.3e}{self.losses[i]:12.4f}{self.smoothed[i]:12.4f}")
        lines.append(f"\n{self.ended_by}")
        if self.problem is not None:
            lines.append(f"no suggestion: {self.problem}")
        else:
            lines.append(f"suggested: lr from {self.suggested_min:.2e} to {self.suggested_max:.2e}")
        return "\n".join(lines)


def make_result(
    lrs: Sequence[float], losses: Sequence[float], updates: int, ended_by: str, *, has_diverged: bool, was_left: bool
) -> RangeResult:
    """Return the result of a test of at most ``updates`` updates, of which those in ``losses`` were made. Local.

    Args:
        lrs: See `RangeResult`.
        losses: See `RangeResult`.
        updates: The number of updates that were planned.
        ended_by: See `RangeResult`.
        has_diverged: Whether the test ended by divergence.
        was_left: Whether the loop ended before the test.
    """
    smoothed = smooth(losses, updates)
    low, high, problem = suggest(lrs, losses, updates, has_diverged=has_diverged)
    if problem is not None and was_left:
        problem = f"the loop must run for all {updates} updates, or until the loss diverges; at its end, {problem}"
    return RangeResult(tuple(lrs), tuple(losses), tuple(smoothed), low, high, problem, ended_by)


def check_range(lowest: Any, highest: Any, updates: Any, divergence: Any) -> str | None:
    """Return what is wrong with the options of a range test; None if nothing is. Local."""
    for name, value in (("lowest", lowest), ("highest", highest), ("divergence", divergence)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            return f"{name} must be a finite number above 0, got {value!r}."
    if lowest >= highest:
        return f"lowest must be smaller than highest, got {lowest!r} and {highest!r}."
    if type(updates) is not int or updates < MIN_UPDATES:
        return f"updates must be a whole number of at least {MIN_UPDATES}, got {updates!r}."
    if divergence <= 1:
        return f"divergence must be above 1, got {divergence!r}."
    return None


def lr_of(update: int, lowest: float, highest: float, updates: int) -> float:
    """Return the lr of the ``update``-th of ``updates`` updates, from 0: a geometric sequence."""
    if update >= updates - 1:
        return highest
    return lowest * math.pow(highest / lowest, update / (updates - 1))


def smooth(losses: Sequence[float], updates: int) -> list[float]:
    """Return weighted means with a Gaussian window of 1/40 of ``updates`` on both sides.

    An exponential mean, as fastai, torch-lr-finder and Lightning take, lags: with their 0.98 and 100 updates by half of
    the range.
    """
    width = _width(updates)
    reach = math.ceil(4 * width)
    smoothed = []
    for i in range(len(losses)):
        near = range(max(0, i - reach), min(len(losses), i + reach + 1))
        weights = [math.exp(-0.5 * ((j - i) / width) ** 2) for j in near]
        smoothed.append(math.fsum(w * losses[j] for w, j in zip(weights, near, strict=True)) / math.fsum(weights))
    return smoothed


def _width(updates: int) -> float:
    return max(updates / 40, 0.5)


def suggest(
    lrs: Sequence[float], losses: Sequence[float], updates: int, *, has_diverged: bool
) -> tuple[float | None, float | None, str | None]:
    """Return the suggested minimum and maximum, or (None, None, why there are none).

    Smith takes the lr at which the accuracy begins to rise as the minimum, and the one at which the rise slows, becomes
    ragged or ends as the maximum. Here that is read from the smoothed loss: of its fall, from the level at the start
    (the median of the first tenth) to the smallest value, 10% lie before the minimum and 90% before the maximum. These
    levels depend less on noise than slopes do, or than the place of the smallest value on a flat bottom.

    There is no suggestion if the fall is not significant (below 5 standard errors), or if the range ends before the
    loss has turned up, or begins where it falls already.

    Source: Smith, arXiv:1506.01186, section 3.3.
    """
    if len(losses) < MIN_UPDATES:
        return _none(
            f"{len(losses)} updates are too few, and {MIN_UPDATES} needed: pass more updates, or a smaller lowest"
        )
    smoothed = smooth(losses, updates)
    head = max(4, len(losses) // 10)
    start = statistics.median(losses[:head])
    bottom = min(range(len(smoothed)), key=smoothed.__getitem__)
    fall = start - smoothed[bottom]
    if bottom == 0 or not fall > max(_SIGNIFICANT * _standard_error(losses[: bottom + 1], updates), 1e-9 * abs(start)):
        return _none(
            f"the loss never fell below its level at the start, {start:.4g}: raise highest, start with a "
            "smaller lowest, or test the model earlier in its training"
        )
    # On the last points the smallest value is that of a curve that still falls.
    if not has_diverged and bottom >= len(losses) - 1 - len(losses) // 20:
        return _none(f"the loss was still falling at the largest lr, {lrs[-1]:.3g}: raise highest")
    # From half of the fall to both sides, so that a dip on the flat part before it is not taken for its beginning.
    half = next(i for i, value in enumerate(smoothed) if value <= start - 0.5 * fall)
    begin = max((i + 1 for i in range(half) if smoothed[i] > start - _BEGIN * fall), default=0)
    end = next(i for i in range(half, len(smoothed)) if smoothed[i] <= start - _END * fall)
    if begin < 3 or smoothed[0] - smoothed[head] > 2 * _BEGIN * fall:
        return _none(f"the loss falls from the first update on, at lr {lrs[0]:.3g}: lower lowest")
    return lrs[begin], lrs[end], None


def _none(problem: str) -> tuple[None, None, str]:
    return None, None, f"{problem}."


def _standard_error(losses: Sequence[float], updates: int) -> float:
    """Return the standard error of the difference of two smoothed losses."""
    # From differences of consecutive losses, which hardly contain the fall itself; outliers do not move their median.
    steps = [abs(after - before) for before, after in itertools.pairwise(losses)]
    deviation = 1.4826 * statistics.median(steps) / math.sqrt(2) if steps else 0.0
    averaged = 2 * math.sqrt(math.pi) * _width(updates)  # losses of a Gaussian window, in effect
    return deviation * math.sqrt(2 / averaged)


class Divergence:
    """Detects divergence while the test runs.

    The exponential mean of the loss must rise above its smallest value by 3 times the largest of: that value, the fall
    so far, and the noise at the start. For a positive loss that has not fallen to less than half of its first level
    this is 4 times the smallest value, as in fastai and Lightning; the other two serve losses that are negative or near
    0.

    Args:
        updates: Updates of the whole test. The mean's time is 1/20 of it.
        factor: The factor on the smallest value, 4 above; the multiple, 3 above, is one less.
    """

    def __init__(self, updates: int, factor: float) -> None:
        self._keep = 1 - 1 / max(1.0, updates / 20)
        self._factor = factor
        self._head = max(4, updates // 10)
        self._first: list[float] = []
        self._sum = self._weight = 0.0
        self._best = math.inf

    def add(self, loss: float) -> bool:
        """Add the loss of an update; return whether the test has diverged. Local."""
        self._sum = self._keep * self._sum + loss
        self._weight = self._keep * self._weight + 1
        mean = self._sum / self._weight
        if len(self._first) < self._head:
            self._first.append(loss)
        if mean < self._best:
            self._best = mean
        if len(self._first) < self._head:
            return False
        start = statistics.median(self._first)
        noise = statistics.pstdev(self._first)
        return mean > self._best + (self._factor - 1) * max(abs(self._best), start - self._best, noise)
