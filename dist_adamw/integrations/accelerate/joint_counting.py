"""Count for several optimizers that are trained on one loader, such as those of a GAN."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import TYPE_CHECKING

from dist_adamw.integrations.accelerate.counting import SampleCounter
from dist_adamw.integrations.accelerate.loader_iteration import Batch
from dist_adamw.wrappers import unwrap

if TYPE_CHECKING:
    from accelerate import Accelerator


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

        Raises:
            ValueError: a batch is accumulated for one optimizer, and another one was updated with it or a later one: no
                position in the data is right for both.
        """
        by_counter = [{id(batch): batch for batch in counter.pending()} for counter in self._counters]
        self._check_accumulated()
        accumulated = {
            id(entry.batch) for counter in self._counters for entry in counter._accumulated if not entry.is_done
        }
        in_hand_for_all = reduce(set.intersection, map(set, by_counter))
        found = {key: batch for batches in by_counter for key, batch in batches.items()}
        return [batch for key, batch in found.items() if key in accumulated or key in in_hand_for_all]

    def _check_accumulated(self) -> None:
        for place, counter in enumerate(self._counters):
            waiting = [entry.batch.number for entry in counter._accumulated if not entry.is_done]
            for other_place, other in enumerate(self._counters):
                if other is not counter and waiting and other.newest_tried >= min(waiting):
                    name, other_name = self._name(place), self._name(other_place)
                    raise ValueError(
                        f"{name} has accumulated gradients of batches that {other_name} was updated with. Gradients "
                        f"are not saved, so after a resume these batches would come again for both. Save after the "
                        f"step() of {name}; or call its zero_grad() before, if the gradients are not to be used."
                    )

    def _name(self, place: int) -> str:
        kind = type(self._counters[place].optimizer()).__name__
        return f"optimizer {place + 1} of {len(self._counters)} ({kind})"

    def forget(self) -> None:
        """Drop everything in hand or accumulated, after a checkpoint was loaded. Local."""
        for counter in self._counters:
            counter.forget()


def joint(counters: Sequence[SampleCounter]) -> SampleCounter | JointCounter:
    """Return one counter for all optimizers. Local."""
    return counters[0] if len(counters) == 1 else JointCounter(counters)


def counters_to_join(
    earlier: SampleCounter | JointCounter, newer: Sequence[SampleCounter], accelerator: Accelerator
) -> list[SampleCounter]:
    """Return the counters of ``earlier`` whose optimizers are trained together with those of ``newer``. Local.

    An optimizer that was released, or whose parameters another one has now, belongs to an earlier phase of training.
    """
    kept = {id(unwrap(optimizer)) for optimizer in accelerator._optimizers}
    taken = {key for counter in newer for key in _param_ids(counter)}
    before = earlier._counters if isinstance(earlier, JointCounter) else [earlier]
    return [one for one in before if id(one.optimizer()) in kept and taken.isdisjoint(_param_ids(one))]


def _param_ids(counter: SampleCounter) -> set[int]:
    optimizer = counter.optimizer()
    return set() if optimizer is None else {id(param) for group in optimizer.param_groups for param in group["params"]}
