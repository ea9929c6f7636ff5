"""The samples of one update, summed over the ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from dist_adamw.ranks.summing import Passenger

if TYPE_CHECKING:
    from dist_adamw.ranks.agreement import AgreementWatch
    from dist_adamw.schedule.scheduler import CyclicLRWithRestarts


class UpdateCount:
    """The rows of an update, while they are summed over ranks.

    Args:
        rows: Rows on this rank that count.
        has_heard: Whether a loader has handed out a batch to train on, ever.
        group: The ranks.
        is_alone: Whether nothing is exchanged.
        warn: A weak reference to a function that gives a warning once; dead: no warnings.
    """

    def __init__(
        self,
        rows: int,
        has_heard: bool,
        group: dist.ProcessGroup | None,
        *,
        is_alone: bool,
        warn: Callable[[], Callable[[str], None] | None],
    ) -> None:
        self._is_alone, self._warn = is_alone, warn
        self._numbers = Passenger([rows, int(has_heard)], group)

    def waiting(self) -> Passenger | None:
        """Return the numbers if other ranks need them, and they were not sent yet. Local."""
        return None if self._is_alone or not self._numbers.is_waiting else self._numbers

    def send(self) -> None:
        """Send the count, unless it was sent already. Collective."""
        if (numbers := self.waiting()) is not None:
            numbers.send()

    def __call__(self) -> int | None:
        """Wait for all ranks; return the sum, or None if no loader has handed out a batch."""
        rows, heard = self._numbers.numbers if self._is_alone else self._numbers.sums()
        warn = self._warn()
        if rows or warn is None:
            return rows
        if not heard:
            warn(
                "no loader that Accelerate prepared has handed out a batch, so this update counts batch_size samples. "
                "Prepare the loader that you train on, or pass scheduler.step(samples=n)."
            )
            return None
        warn(
            "an update counts no samples: no batch was handed out since the previous update, or it was handed out "
            "under torch.no_grad(). Rows count once, in the update of their first backward pass; to count differently "
            "pass scheduler.step(samples=n)."
        )
        return 0


def send_counts_with(watch: AgreementWatch, scheduler: CyclicLRWithRestarts) -> None:
    """Make the ranks' comparison at each update take the scheduler's count of samples along. Local.

    Args:
        watch: Its hook must run after the scheduler's, in `step`.
    """

    def passenger() -> Passenger | None:
        update = getattr(scheduler.sample_source, "update", None)
        return update.waiting() if isinstance(update, UpdateCount) else None

    watch.passenger = passenger
    counter: Any = scheduler.sample_source
    if hasattr(counter, "rides"):
        counter.rides = True
