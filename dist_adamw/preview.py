"""A look at a schedule before training: the table of restarts, and lr and weight decay as curves.

Floor 1: knows schedules; nothing of optimizers. Draws with matplotlib when asked to.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dist_adamw.batch import check_positive_int
from dist_adamw.schedule import RestartSchedule, SchedulePoint

GroupValues = Callable[[SchedulePoint], tuple[float, float]]


@dataclass(frozen=True, slots=True)
class CycleRow:
    """One line of the table of restarts."""

    cycle: int
    first_sample: int
    samples: int
    epochs: float
    updates: int
    peak_lr: float
    peak_weight_decay: float


@dataclass(frozen=True, slots=True)
class Preview:
    """What `CyclicLRWithRestarts.preview` returns; ``print`` it, or `plot` it.

    Attributes:
        rows: One per cycle.
        samples: Where lr and weight_decay were evaluated; the next two match it.
        warmup_samples: Samples before the first cycle.
    """

    rows: tuple[CycleRow, ...]
    samples: tuple[int, ...]
    lr: tuple[float, ...]
    weight_decay: tuple[float, ...]
    warmup_samples: int

    @classmethod
    def compute(cls, schedule: RestartSchedule, values: GroupValues, *, cycles: int, points: int) -> Preview:
        """Evaluate ``values`` (lr, weight decay) over the first ``cycles`` cycles."""
        check_positive_int("cycles", cycles)
        check_positive_int("points", points)
        warmup = schedule.warmup_samples
        starts = [warmup + _ceil(schedule.cycle(i).start) for i in range(cycles + 1)]
        samples = tuple(starts[-1] * k // points for k in range(points))
        trace = [values(schedule.at(s)) for s in samples]
        rows = []
        for i, (first, end) in enumerate(itertools.pairwise(starts)):
            inside = {first + (end - first) * k // 64 for k in range(64)}
            inside.add(min(first + int((end - first) * schedule.triangular_step), end - 1))
            peak = max(values(schedule.at(s))[0] for s in inside)
            rows.append(
                CycleRow(
                    cycle=i,
                    first_sample=first,
                    samples=end - first,
                    epochs=float(schedule.cycle(i).length / schedule.epoch_size),
                    updates=-(-(end - first) // schedule.batch_size),
                    peak_lr=peak,
                    peak_weight_decay=max(values(schedule.at(s))[1] for s in inside),
                )
            )
        return cls(tuple(rows), samples, tuple(v[0] for v in trace), tuple(v[1] for v in trace), warmup)

    def __str__(self) -> str:
        titles = ("cycle", "first sample", "samples", "epochs", "updates", "peak lr", "peak decay")
        head = "{:>5}  {:>14}  {:>14}  {:>9}  {:>9}  {:>10}  {:>12}".format(*titles)
        lines = [
            f"{r.cycle:>5}  {r.first_sample:>14,}  {r.samples:>14,}  {r.epochs:>9.4g}  {r.updates:>9,}  "
            f"{r.peak_lr:>10.4g}  {r.peak_weight_decay:>12.4g}"
            for r in self.rows
        ]
        warmup = [f"warm-up over the first {self.warmup_samples:,} samples"] if self.warmup_samples else []
        return "\n".join([*warmup, head, *lines])

    def plot(self, path: str | Path) -> Path:
        """Draw lr and weight decay over samples, restarts marked, into a PNG."""
        from dist_adamw.plot import plot_curves

        restarts = [row.first_sample for row in self.rows[1:]]
        curves = {"lr": self.lr, "weight decay": self.weight_decay}
        return plot_curves(path, self.samples, curves, restarts)


def _ceil(value: object) -> int:
    return -int(-value // 1)  # type: ignore[operator]
