"""Count for several optimizers that are trained on one loader, such as those of a GAN."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

from dist_adamw.integrations.accelerate.counting import SampleCounter
from dist_adamw.integrations.accelerate.loader_iteration import Batch


class JointCounter:
    """What a `Position` asks of the sample counters of several optimizers.

    Each optimizer still has its own samples: rows of a batch count for it if a backward pass reaches its parameters
    before its update. One that is updated at every fifth batch has a fifth of the samples.

    Args:
        counters: One for each optimizer.
    """

    def __init__(self, counters: Sequence[SampleCounter]) -> None:
        self._counters = [*counters]

    @property
    def tries(self) -> int:
        """Updates that were started, of all optimizers."""
        return sum(counter.tries for counter in self._counters)

    def pending(self) -> list[Batch]:
        """Return the batches that must come again after a resume. Local.

        They are accumulated for some optimizer, or in hand for all. A batch that one optimizer was updated with, and
        another one passes over, is not pending.
        """
        by_counter = [{id(batch): batch for batch in counter.pending()} for counter in self._counters]
        accumulated = {
            id(entry.batch) for counter in self._counters for entry in counter._accumulated if not entry.is_done
        }
        in_hand_for_all = reduce(set.intersection, map(set, by_counter))
        found = {key: batch for batches in by_counter for key, batch in batches.items()}
        return [batch for key, batch in found.items() if key in accumulated or key in in_hand_for_all]

    def forget(self) -> None:
        """Drop everything in hand or accumulated, after a checkpoint was loaded. Local."""
        for counter in self._counters:
            counter.forget()


def joint(counters: Sequence[SampleCounter]) -> SampleCounter | JointCounter:
    """Return one counter for all optimizers. Local."""
    return counters[0] if len(counters) == 1 else JointCounter(counters)
