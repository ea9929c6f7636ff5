"""A range test while it runs: average losses over micro-batches and ranks, and end on all ranks at the same update."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dist_adamw.range_test.curve import Divergence, RangeResult, make_result
from dist_adamw.range_test.lr_override import LROverride
from dist_adamw.ranks import collectives
from dist_adamw.ranks.run_on_all import first_problem

_MAX_SKIPPED = 20  # updates in a row; a GradScaler that begins at 2**16 may skip 16


class RunningTest:
    """The losses of a range test, and whether it has ended.

    Args:
        override: Sets the lr and counts updates.
        updates: The number of updates after which the test ends.
        divergence: See `Divergence`.
        group: The ranks, in a group that can reduce CPU tensors.

    Attributes:
        ended_by: Why the test has ended; None while it runs.
    """

    def __init__(self, override: LROverride, updates: int, divergence: float, group: dist.ProcessGroup | None) -> None:
        self._override, self._planned, self._group = override, updates, group
        self._divergence = Divergence(updates, divergence)
        self._has_diverged = False
        self._lrs: list[float] = []
        self._losses: list[float] = []
        self._pending: list[float] = []  # of the update in progress
        self._counted = 0  # updates whose losses were taken
        self.has_losses = False
        self.ended_by: str | None = None

    def observe(self, loss: Any, *, is_after_step: bool) -> bool:
        """Take the loss of a micro-batch; return whether the test has ended. Collective.

        Args:
            loss: A number or a tensor with one element.
            is_after_step: Whether the update that this micro-batch belongs to may have been applied already.

        Raises:
            ValueError: on every rank: a rank's loss is not a number.
        """
        if self.ended_by is not None:
            return True
        mean = self._mean_over_ranks(loss)
        self.has_losses = True
        if not is_after_step:
            self._take_update()
        if not math.isfinite(mean) and self.ended_by is None:
            self._diverge(f"the loss became {mean}")
        self._pending.append(mean)
        if is_after_step:
            self._take_update()
        if self._override.skipped >= _MAX_SKIPPED and self.ended_by is None:
            self._diverge(f"the gradients of {_MAX_SKIPPED} updates in a row were not finite")
        return self.ended_by is not None

    def take_last_update(self) -> None:
        """Take the last update's losses at the end of a loop. Local: its losses have been averaged."""
        if self.ended_by is None:
            self._take_update()
        if self.ended_by is None:
            self.ended_by = f"the loop ended after {self._counted} of {self._planned} updates"

    @property
    def result(self) -> RangeResult | None:
        """The result; None while the test runs, or if it had no update."""
        if self.ended_by is None or not self._lrs:
            return None
        was_left = self._counted < self._planned and not self._has_diverged
        return make_result(
            self._lrs,
            self._losses,
            self._planned,
            self.ended_by,
            has_diverged=self._has_diverged,
            was_left=was_left,
        )

    def _take_update(self) -> None:
        """If an update was applied since the last call, the pending losses were its losses. The same on every rank."""
        if self._override.updates == self._counted or not self._pending or self.ended_by is not None:
            return
        self._counted = self._override.updates
        loss, lr = math.fsum(self._pending) / len(self._pending), self._override.last_lr
        self._pending.clear()
        self._lrs.append(lr)
        self._losses.append(loss)
        if self._divergence.add(loss):
            self._diverge(f"the loss rose to {loss:.4g}")
        elif self._counted >= self._planned:
            self.ended_by = f"all {self._planned} updates were made, without divergence"

    def _diverge(self, how: str) -> None:
        self._has_diverged = True
        self.ended_by = f"diverged: {how} at lr {self._override.last_lr:.3g}, after {self._override.updates} updates"

    def _mean_over_ranks(self, loss: Any) -> float:
        mine, problem = _as_number(loss)
        if collectives.world_size(self._group) == 1:
            if problem is not None:
                raise ValueError(problem)
            return mine
        is_finite = math.isfinite(mine)
        sums = torch.tensor([mine if is_finite else 0.0, not is_finite, problem is not None], dtype=torch.float64)
        dist.all_reduce(sums, group=self._group)
        total, not_finite, problems = sums.tolist()
        if problems:
            raise ValueError(first_problem(collectives.all_gather_objects(problem, self._group)))
        return math.nan if not_finite else total / collectives.world_size(self._group)


def _as_number(loss: Any) -> tuple[float, str | None]:
    """Return a loss as a number, and what is wrong with it. Waits for its device."""
    try:
        if isinstance(loss, Tensor) and loss.numel() != 1:
            return 0.0, f"the loss must be one number, got a tensor of shape {tuple(loss.shape)}: reduce it first."
        return float(loss.detach() if isinstance(loss, Tensor) else loss), None
    except (TypeError, ValueError, RuntimeError) as error:
        return 0.0, f"the loss must be one number, got {type(loss).__name__}: {error}."
