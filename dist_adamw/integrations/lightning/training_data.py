"""Read the global batch and the epoch size from Lightning's training loader, and count the real rows of its batches."""

from __future__ import annotations

import copy
import math
import warnings
import weakref
from collections import deque
from collections.abc import Iterator, Sequence, Sized
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset

from dist_adamw.integrations.accelerate.loader_iteration import batch_size_of
from dist_adamw.schedule.batch import GlobalBatch
from dist_adamw.schedule.scheduler import CyclicLRWithRestarts


class RowRecorder(BatchSampler):
    """Replace a loader's batch sampler, and record how many real rows each of its lists has.

    Real rows exclude those with which ``DistributedSampler`` repeats samples so that all ranks have equally many.

    Attributes:
        recorded: The batch sampler that it replaces.
        newest: The lists of the newest iteration. Workers fetch ahead, so they are drawn before their batches come.
    """

    def __init__(self, batches: Any) -> None:
        self.recorded = batches
        self.newest: list[_Drawn] = []

    def __iter__(self) -> Iterator[Any]:
        self.newest = []
        return self._record(self.newest)

    def _record(self, drawn: list[_Drawn]) -> Iterator[Any]:
        position = 0
        for indices in self.recorded:
            begin, position = position, position + len(indices)
            drawn.append(_Drawn(len(indices), real_rows(self.recorded, begin, position)))
            yield indices

    def __len__(self) -> int:
        return len(self.recorded)

    def __getattr__(self, name: str) -> Any:  # Lightning calls set_epoch of ``sampler``
        return getattr(vars(self)["recorded"], name)


class _Drawn(NamedTuple):
    length: int
    rows: int  # without repeated samples


# By DataLoader's iterator: the lists that it has drawn and whose batches have not come. With persistent workers
# a loader has only one iterator, which each iteration begins again.
_DRAWN: weakref.WeakKeyDictionary[Any, list[_Drawn]] = weakref.WeakKeyDictionary()


class RecordedIteration:
    """One iteration over a loader, with the real rows of each batch. The script may begin others at any time.

    Args:
        loader: A loader that has a `RowRecorder`.
    """

    def __init__(self, loader: Any) -> None:
        self._batches: Any = DataLoader.__iter__(loader)  # begins the batch sampler's iteration too
        _DRAWN[self._batches] = loader.batch_sampler.newest
        self._in_order = not loader.num_workers or getattr(loader, "in_order", True)
        self._fetched: deque[int] = deque()  # rows of the last batches

    def __iter__(self) -> RecordedIteration:
        return self

    def __next__(self) -> Any:
        batch = next(self._batches)
        self._fetched.append(self._rows_of(batch))
        return batch

    def _rows_of(self, batch: Any) -> int:
        drawn = _DRAWN[self._batches]
        if self._in_order:
            return drawn.pop(0).rows
        if batch is None:  # of any list; Lightning skips it
            return 0
        # Lists of the same length have as many rows, except for those with repeated samples, which are the last.
        size = batch_size_of(batch)
        place = next((i for i, one in enumerate(drawn) if one.length == size), 0)
        return drawn.pop(place).rows

    def rows(self, *, ahead: int) -> int:
        """Return the rows of a batch after which ``ahead`` others were fetched. Local."""
        while len(self._fetched) > ahead + 1:
            self._fetched.popleft()
        return self._fetched[0]


def record_rows(loader: Any) -> Any:
    """Return a copy of a loader with indices that records the rows of its batches; any other loader as it is. Local."""
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return loader
    cls = type(loader)
    # An own __iter__ may make other batches than the sampler's lists. A loader with a state skips, when it resumes,
    # lists whose batches never come.
    is_plain = cls.__iter__ is DataLoader.__iter__ and not hasattr(loader, "load_state_dict")
    if loader.batch_sampler is None or not is_plain:
        return loader
    copied = copy.copy(loader)  # the script may use its own in other ways
    # DataLoader.__setattr__ forbids changing this attribute, so its __dict__ is used.
    vars(copied)["batch_sampler"] = RowRecorder(loader.batch_sampler)
    copied._iterator = None  # persistent workers that the script has started draw from the sampler without a recorder
    members = {"__iter__": lambda self: RecordedIteration(self), "__module__": cls.__module__}
    copied.__class__ = type(cls.__name__, (cls,), members)
    return copied


def real_rows(batches: Any, begin: int, end: int) -> int:
    """Return how many of a rank's positions from ``begin`` to ``end`` in its epoch are not padding. Local."""
    sampler = getattr(batches, "sampler", None)
    # Lightning's DistributedSamplerWrapper, around a sampler of the user, shards in the same way.
    if not isinstance(sampler, DistributedSampler) or sampler.drop_last:
        return end - begin
    length = len(sampler.dataset)  # type: ignore[arg-type]
    # Position j of rank r is sample j * W + r of all ranks together; those from ``length`` on are repeated.
    own = max(0, math.ceil((length - sampler.rank) / sampler.num_replicas))
    return max(0, min(end, own) - begin)


@dataclass(frozen=True, slots=True)
class RankSizes:
    """What one rank's training loader makes.

    Attributes:
        micro_batch: Samples of one batch; None if it is not known.
        rows: Real samples of one epoch on this rank; None if they are not known.
    """

    micro_batch: int | None
    rows: int | None

    @classmethod
    def of(cls, loaders: list[Any], batches: float) -> RankSizes:
        """Read the sizes. Local.

        Args:
            loaders: The loaders that are iterated together.
            batches: Batches of an epoch, as limited by ``limit_train_batches``.
        """
        if len(loaders) != 1 or not isinstance(loader := loaders[0], DataLoader):
            return cls(None, None)
        lists: Any = loader.batch_sampler
        lists = lists.recorded if isinstance(lists, RowRecorder) else lists
        size = loader.batch_size or getattr(lists, "batch_size", None)
        if type(lists) is not BatchSampler or isinstance(loader.dataset, IterableDataset) or batches == math.inf:
            return cls(size, None)
        if not isinstance(lists.sampler, Sized):
            return cls(size, None)
        if len(loader) != len(lists):  # its own __iter__ makes other batches
            return cls(None, None)
        trained_on = min(int(batches) * lists.batch_size, len(lists.sampler))
        return cls(size, real_rows(lists, 0, trained_on))


@dataclass(frozen=True, slots=True)
class EpochSizes:
    """The global batch and the epoch of all ranks; None: not known.

    Attributes:
        batch: The global batch, with its accumulation.
        samples: Real samples that one epoch trains on.
    """

    batch: GlobalBatch | None
    samples: int | None

    @classmethod
    def of(cls, ranks: Sequence[RankSizes], accumulation: int, same_rows: int) -> EpochSizes:
        """Combine the sizes of all ranks. Local.

        Args:
            ranks: Each rank's.
            accumulation: Batches of one update on one rank.
            same_rows: How many consecutive ranks see the same rows.

        Raises:
            ValueError: ranks have different batch sizes.
        """
        micro_batches = [one.micro_batch for one in ranks]
        if len(set(micro_batches)) > 1:
            raise ValueError(f"the ranks' training loaders have batches of {micro_batches}. Give all ranks the same.")
        apart = ranks[::same_rows]
        micro_batch, rows = micro_batches[0], [one.rows for one in apart]
        batch = None if micro_batch is None else GlobalBatch(micro_batch, accumulation, len(apart))
        return cls(batch, None if None in rows else sum(rows))  # type: ignore[arg-type]

    def fill(self, scheduler: CyclicLRWithRestarts, *, is_automatic: bool, num_loaders: int) -> None:
        """Set the sizes that the scheduler was not given. Local.

        Args:
            scheduler: The scheduler.
            is_automatic: Whether Lightning calls ``optimizer.step()``.
            num_loaders: The number of training loaders.

        Raises:
            ValueError: a size is not known, or the given one differs from the loader's.
        """
        several = f"there are {num_loaders} training loaders" if num_loaders > 1 else ""
        batch = self.batch if is_automatic else None  # the module may accumulate by hand
        if scheduler.batch_size is None and batch is None:
            no_batch = "the training loader has no batch size"
            if not is_automatic:
                no_batch = "with manual optimization the module decides what an update is"
            raise ValueError(
                f"{several or no_batch}, so the samples of an update are not known. Pass "
                "batch_size=<samples of one update, all ranks together> to CyclicLRWithRestarts."
            )
        if batch is not None and scheduler.batch_size not in (None, batch.size):
            raise ValueError(
                f"batch_size={scheduler.batch_size} was given, but the loader and the Trainer make a global batch of "
                f"{batch.micro_batch_size} samples x {batch.gradient_accumulation_steps} accumulate_grad_batches x "
                f"{batch.data_parallel_size} ranks = {batch.size}. Leave batch_size=None, or correct one of them."
            )
        if scheduler.epoch_size is None and self.samples is None:
            raise ValueError(
                f"{several or 'the length of the training data is not known'}, so the epoch size is unknown. Pass "
                "epoch_size=<samples per epoch> to CyclicLRWithRestarts."
            )
        if self.samples is not None and scheduler.epoch_size not in (None, self.samples):
            warnings.warn(
                f"epoch_size={scheduler.epoch_size} was given, and an epoch of this Trainer trains on {self.samples} "
                "samples: restarts and epochs drift apart. Leave epoch_size None.",
                stacklevel=2,
            )
        if scheduler.epoch_size is None:
            assert self.samples is not None
            scheduler.epoch_size = self.samples
        if scheduler.batch_size is None:
            assert batch is not None
            scheduler.batch_size = batch

    def compare(self, scheduler: CyclicLRWithRestarts, *, is_automatic: bool) -> None:
        """Compare loaders that were made again during a fit with the scheduler's sizes. Local.

        Raises:
            ValueError: the global batch has changed.
        """
        if is_automatic and self.batch is not None and self.batch.size != scheduler.batch_size:
            raise ValueError(
                f"the training loader was made again with a global batch of {self.batch.size} samples, and the "
                f"schedule has {scheduler.batch_size}. Keep the batch size during a fit."
            )
        if self.samples not in (None, scheduler.epoch_size):
            warnings.warn(
                f"the training loader was made again, and an epoch trains on {self.samples} samples; the schedule "
                f"still counts {scheduler.epoch_size} as an epoch, so restarts and epochs drift apart.",
                stacklevel=2,
            )


def rows_in(fetcher: Any, batch: Any) -> int:
    """Return the real rows of a batch on this rank. Local.

    Args:
        fetcher: Lightning's data fetcher, which has handed out the batch, and may have fetched more.
        batch: The batch.

    Raises:
        ValueError: the loader has no indices, and the batch no tensor.
    """
    iterations = fetcher.combined_loader._iterator.iterators
    if iterations and isinstance(iterations[0], RecordedIteration):
        return iterations[0].rows(ahead=len(getattr(fetcher, "batches", ())))
    rows = batch_size_of(batch)
    if rows is None:
        raise ValueError(
            f"the batch, a {type(batch).__name__}, has no tensor by which to count its samples. Put one first whose "
            "first dimension is the batch, or use a DataLoader with a data set that has indices."
        )
    return rows
