"""Count the real rows of each batch of one iteration over a loader, and the sample of the epoch at which it ends.

How the real rows of a batch are found:

- Data with indices: lists of indices are recorded as the sampler draws them, and matched with batches first in, first
  out, however many workers fetch ahead. Every rank draws all lists (Accelerate shards by skipping), so it knows which
  of its rows Accelerate repeated as padding, whatever the collate function returns.
- Iterable data: the samples collated in this process. With workers, or if rank 0 reads for all ranks: the size that
  Accelerate finds in the batch, minus the padding that the loader reports at the end.
- ``in_order=False``: the oldest list with as many indices as the batch has rows.
"""

from __future__ import annotations

import itertools
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sized
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.utils.data import IterableDataset


class _Drawn(NamedTuple):
    """A list of indices that this rank fetches."""

    length: int  # with padding
    rows: int  # without padding
    begin: int  # samples drawn before it, over all ranks
    end: int  # and after it, including the lists that other ranks fetch at the same time


@dataclass(eq=False, slots=True)
class Batch:
    """A batch that a loader has handed out, without a reference to its data.

    Attributes:
        rows: Real rows on this rank; 0 for padding.
        run: The iteration that it came from.
        begin: Samples of the epoch before it, over all ranks.
        end: Samples of the epoch up to its end, over all ranks.
        is_last: Whether the loader says that it is the epoch's last.
        is_held: Returns whether the script still references it.
        digest: Returns a hash of its values; None if no run log needs it.
        number: Increases with each batch that any loader of this process hands out.
    """

    rows: int
    run: Run
    begin: int
    end: int
    is_last: bool
    is_held: Callable[[], bool]
    digest: Callable[[], int] | None = None
    number: int = field(default_factory=itertools.count().__next__)


class Run:
    """One iteration over a loader.

    Attributes:
        has_ended: No more batches will come from it.
        is_exhausted: It has reached the end of the data.
        offset: Samples of the epoch before the first one drawn.
        repeated: The number of samples at the beginning that were drawn only for padding.
        streamed: Samples that an iterable data set has yielded, over all ranks; None if they cannot be observed.
        on_begin: Called when the sampler begins.
        wrap: Replaces the script's iterable data set in this iteration; not the one that is read for other ranks.
        convert: Applied to each batch before it is handed out.
    """

    def __init__(self, loader: Any) -> None:
        self.loader = weakref.ref(loader)
        self.has_ended = self.is_exhausted = False
        self.offset = self.repeated = 0
        self.streamed: int | None = None
        self.on_begin: Callable[[], None] | None = None
        self.wrap: Callable[[Any], Any] | None = None
        self.convert: Callable[[Any], Any] | None = None
        self._has_begun = self._has_handed_out = False
        self._skipped = int(getattr(loader, "skip_batches", 0) or 0)
        self._drawn: deque[_Drawn] = deque()
        self._collated: deque[int] = deque()
        self._total = 0  # samples drawn, over all ranks
        self._pass = (0, 0)  # samples drawn before and after the lists that ranks fetch at the same time
        self._end = 0  # the last batch's end
        self._shard: Any = None
        self._own: deque[tuple[Any, int]] = deque()  # this rank's lists that were not yielded yet
        self._number = self._newest = 0

    # ---------------------------------------------------------------- while indices are drawn

    def begin(self) -> None:
        """Handle the sampler's start or, on a rank that draws nothing, the first batch."""
        if not self._has_begun:
            self._has_begun = True
            if self.on_begin is not None:
                self.on_begin()

    def draws_from(self, shard: Any) -> None:
        """Record the sampler that distributes lists over ranks; None: this rank gets all of them."""
        self._shard = shard

    def drew(self, indices: Any) -> None:
        """Record a list of indices that the script's own sampler has drawn, for some rank."""
        size = len(indices) if isinstance(indices, Sized) else 1
        self._total += size
        self._newest = size
        shard = self._shard
        if shard is not None and not shard.split_batches and self._number % shard.num_processes == shard.process_index:
            self._own.append((indices, size))
        self._number += 1

    def passed(self, _: Any) -> None:
        """Record that every rank now has one more list to fetch or skip."""
        self._pass = (self._pass[1], self._total)

    def dealt(self, indices: Any) -> None:
        """Record a list of indices that this rank fetches."""
        length = len(indices) if isinstance(indices, Sized) else 1
        self._drawn.append(_Drawn(length, self._real(indices, length), *self._pass))

    def _real(self, indices: Any, length: int) -> int:
        shard = self._shard
        if shard is None:
            return length
        if shard.split_batches:  # the list is this rank's part of the newest one
            part = int(shard.batch_size) // int(shard.num_processes)
            return min(length, max(0, self._newest - part * int(shard.process_index)))
        # Accelerate extends a short list in place; a list that is none of the sampler's is padding as a whole.
        for i, (own, size) in enumerate(self._own):
            if own is indices:
                for _ in range(i + 1):
                    self._own.popleft()
                return min(size, length)
        return 0

    def collated(self, samples: Any) -> None:
        """Record samples of an iterable data set that were collated in this process."""
        self._collated.append(len(samples) if isinstance(samples, Sized) else 1)

    # ---------------------------------------------------------------- when a batch comes

    def hand_out(self, loader: Any, batch: Any) -> Batch:
        """Describe a batch that is about to be handed out."""
        for _ in range(self._skipped):  # the loader has fetched and dropped these
            for noted in (self._drawn, self._collated):
                if noted:
                    noted.popleft()
        if not (self._has_handed_out or self._by_index(loader)):
            self._end = self._skipped * _pass_size(loader) + _left_out(loader)
        self._skipped, self._has_handed_out = 0, True
        is_last = bool(getattr(loader, "end_of_dataloader", False))
        if self._by_index(loader) and self._drawn:
            _, rows, begin, end = self._match(loader, batch)
        else:
            rows, whole = self._measure(loader, batch, is_last)
            begin, end = self._end, self._end + whole
        self._end = end
        return Batch(rows, self, self._in_epoch(begin), self._in_epoch(end), is_last, holder(batch))

    def _in_epoch(self, drawn: int) -> int:
        return self.offset + max(0, drawn - self.repeated)

    @staticmethod
    def _by_index(loader: Any) -> bool:
        return not (is_dispatched(loader) or isinstance(loader.dataset, IterableDataset))

    def _match(self, loader: Any, batch: Any) -> _Drawn:
        if loader.num_workers and not getattr(loader, "in_order", True):
            size = batch_size_of(batch)
            for i, drawn in enumerate(self._drawn):
                if drawn.length == size:
                    del self._drawn[i]
                    return drawn
        return self._drawn.popleft()

    def _measure(self, loader: Any, batch: Any, is_last: bool) -> tuple[int, int]:
        """Return the real rows on this rank and on all ranks."""
        size = self._collated.popleft() if self._collated else batch_size_of(batch)
        if size is None:
            size = loader.batch_size or 1
            warnings.warn(
                f"the size of a batch of type {type(batch).__name__} is unknown; it is counted as the "
                f"loader's batch_size, {size}. Return tensors from the collate function, or pass "
                "scheduler.step(samples=n).",
                stacklevel=4,
            )
        if is_dispatched(loader):
            ranks, rank = loader.state.num_processes, loader.state.process_index
            whole = loader.remainder if is_last and loader.remainder > 0 else size * ranks
            return _rows_of_rank(size, rank, whole), min(whole, size * ranks)
        shard = loader.dataset
        if type(shard).__name__ != "IterableDatasetShard":
            return size, size
        left = self._left(shard, is_last)
        if left is None:
            return size, size * shard.num_processes
        return _rows_of_rank(size, shard.process_index, left), min(left, size * shard.num_processes)

    def _left(self, shard: Any, is_last: bool) -> int | None:
        """Return the samples of iterable data after the previous batch; None: not known."""
        given = self.streamed  # covers at least this batch, and at the last batch all of the data
        if given is None and isinstance(shard.dataset, Sized):
            given = len(shard.dataset)
        if given is not None:
            return max(0, given - self._end)
        if is_last and not shard.drop_last:
            warnings.warn(
                "the data set has no length and is read by workers, so samples that were repeated to fill the "
                "last batch cannot be recognised and are counted. Give it a __len__, or leave "
                "dispatch_batches=None.",
                stacklevel=5,
            )
        return None


def _rows_of_rank(size: int, rank: int, whole: int) -> int:
    """Return a rank's number of ``whole`` samples, of which ranks take ``size`` each in order."""
    return min(size, max(0, whole - rank * size))


# ---------------------------------------------------------------- reading loaders and batches


def is_dispatched(loader: Any) -> bool:
    """Return whether rank 0 reads for all ranks. Local."""
    return type(loader).__name__ == "DataLoaderDispatcher"


def _pass_size(loader: Any) -> int:
    """Return the number of samples in one full batch over all ranks."""
    shard = loader.dataset
    size = loader.batch_size or 1
    if is_dispatched(loader):
        return size if loader.split_batches else size * int(loader.state.num_processes)
    return size * int(shard.num_processes) if type(shard).__name__ == "IterableDatasetShard" else size


def _left_out(loader: Any) -> int:
    """Return the number of samples that ``skip_first_batches`` makes the batch sampler skip."""
    sampler, lists = loader.batch_sampler, 0
    while type(sampler).__name__ == "SkipBatchSampler":
        sampler, lists = sampler.batch_sampler, lists + int(sampler.skip_batches)
    return lists * int(loader.batch_size or getattr(sampler, "batch_size", None) or 1) if lists else 0


def batch_size_of(batch: Any) -> int | None:
    """Return the number of rows in a batch, as Accelerate finds it; None if it has no tensor. Local."""
    tensor = _first_tensor(batch)
    return tensor.shape[0] if tensor is not None and tensor.ndim else None


def _first_tensor(batch: Any) -> torch.Tensor | None:
    if isinstance(batch, torch.Tensor):
        return batch
    if isinstance(batch, Mapping):
        batch = list(batch.values())
    if isinstance(batch, (list, tuple)):
        return next((found for part in batch if (found := _first_tensor(part)) is not None), None)
    return None


def holder(batch: Any) -> Callable[[], bool]:
    """Return a function that returns whether a batch is still referenced; False if that cannot be observed."""
    tensor = _first_tensor(batch)
    try:
        known = weakref.ref(batch if tensor is None else tensor)
    except TypeError:
        return lambda: False
    return lambda: known() is not None
