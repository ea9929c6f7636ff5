"""Count the real rows of each batch of one iteration over a loader, and where it ends in the epoch.

Knows torch's and Accelerate's loaders and samplers. `loader.py` calls it.

How the real rows of a batch are found:

- Data with indices: the lists of indices are noted as the sampler draws them, and matched with the batches first in,
  first out, however many workers fetch ahead. Every rank draws all of them (Accelerate shards by leaving out), so it
  knows which of its own rows Accelerate repeated as padding, whatever the collate function returns.
- Iterable data: what was collated in this process. With workers, or where rank 0 reads for all ranks: the size that
  Accelerate finds in the batch, less the padding that the loader reports at the end.
- ``in_order=False``: the oldest list of as many indices as the batch has rows.
"""

from __future__ import annotations

import warnings
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sized
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.utils.data import IterableDataset


class _Drawn(NamedTuple):
    """Of one list of indices that this rank drew."""

    length: int  # padding included
    rows: int  # without
    begin: int  # samples drawn before, all ranks together
    end: int  # and with what other ranks fetch at the same time


@dataclass(eq=False, slots=True)
class Batch:
    """A batch that a loader has handed out. It does not keep the data.

    Attributes:
        rows: Real rows on this rank; 0 for padding.
        run: The iteration that it came from.
        begin: Samples of the epoch before it, all ranks together.
        end: Samples of the epoch up to its end, all ranks together.
        is_last: Whether the loader says that the epoch ends with it.
        is_held: Whether the script still has it.
    """

    rows: int
    run: Run
    begin: int
    end: int
    is_last: bool
    is_held: Callable[[], bool]


class Run:
    """One iteration over a loader.

    Attributes:
        has_ended: No batch will come from it any more.
        is_exhausted: It has come to the end of the data.
        offset: Samples of the epoch that lie before the first one drawn.
        repeated: Of the samples drawn, so many at the beginning were drawn for padding only.
        streamed: Samples that an iterable data set has given, all ranks together; None where that is not seen.
        on_begin: Called when the sampler begins.
    """

    def __init__(self, loader: Any) -> None:
        self.loader = weakref.ref(loader)
        self.has_ended = self.is_exhausted = False
        self.offset = self.repeated = 0
        self.streamed: int | None = None
        self.on_begin: Callable[[], None] | None = None
        self._has_begun = self._has_handed_out = False
        self._skipped = int(getattr(loader, "skip_batches", 0) or 0)
        self._drawn: deque[_Drawn] = deque()
        self._collated: deque[int] = deque()
        self._total = 0  # samples drawn, all ranks together
        self._pass = (0, 0)  # of them, those before and after the lists that ranks fetch at the same time
        self._end = 0  # of the last batch
        self._shard: Any = None
        self._own: deque[tuple[Any, int]] = deque()  # lists of this rank that have not been yielded yet
        self._number = self._newest = 0

    # ---------------------------------------------------------------- while indices are drawn

    def begin(self) -> None:
        """Notify that the sampler is about to begin, or on a rank that draws nothing, that the first batch came."""
        if not self._has_begun:
            self._has_begun = True
            if self.on_begin is not None:
                self.on_begin()

    def draws_from(self, shard: Any) -> None:
        """Note which sampler deals lists out to ranks; None: this rank has all of them."""
        self._shard = shard

    def drew(self, indices: Any) -> None:
        """Note a list of indices that the script's own sampler has drawn, for some rank."""
        size = len(indices) if isinstance(indices, Sized) else 1
        self._total += size
        self._newest = size
        shard = self._shard
        if shard is not None and not shard.split_batches and self._number % shard.num_processes == shard.process_index:
            self._own.append((indices, size))
        self._number += 1

    def passed(self, _: Any) -> None:
        """Note that every rank has a list of indices to fetch, or to leave out."""
        self._pass = (self._pass[1], self._total)

    def dealt(self, indices: Any) -> None:
        """Note a list of indices that this rank is to fetch."""
        length = len(indices) if isinstance(indices, Sized) else 1
        self._drawn.append(_Drawn(length, self._real(indices, length), *self._pass))

    def _real(self, indices: Any, length: int) -> int:
        shard = self._shard
        if shard is None:
            return length
        if shard.split_batches:  # this rank's part of the newest list
            part = int(shard.batch_size) // int(shard.num_processes)
            return min(length, max(0, self._newest - part * int(shard.process_index)))
        # Accelerate pads a list in place, and makes others of indices from the beginning.
        for i, (own, size) in enumerate(self._own):
            if own is indices:
                for _ in range(i + 1):
                    self._own.popleft()
                return min(size, length)
        return 0

    def collated(self, samples: Any) -> None:
        """Note samples of an iterable data set that were made into a batch in this process."""
        self._collated.append(len(samples) if isinstance(samples, Sized) else 1)

    # ---------------------------------------------------------------- when a batch comes

    def hand_out(self, loader: Any, batch: Any) -> Batch:
        """Describe a batch that is about to be handed out."""
        for _ in range(self._skipped):  # fetched, and not handed out
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
        return Batch(rows, self, self._in_epoch(begin), self._in_epoch(end), is_last, _holder(batch))

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
        """Return real rows on this rank, and on all of them."""
        size = self._collated.popleft() if self._collated else batch_size_of(batch)
        if size is None:
            size = loader.batch_size or 1
            warnings.warn(
                f"a batch of type {type(batch).__name__} has no size that can be recognised; it is counted as the "
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
        """Return the samples that iterable data has given, or will give, after the last batch; None: not known."""
        given = self.streamed  # at least up to this batch, and all there is at the last one
        if given is None and isinstance(shard.dataset, Sized):
            given = len(shard.dataset)
        if given is not None:
            return max(0, given - self._end)
        if is_last and not shard.drop_last:
            warnings.warn(
                "the data set has no length and is read by workers, so samples that were repeated to fill the "
                "last batch cannot be told from others and are counted. Give it a __len__, or leave "
                "dispatch_batches=None.",
                stacklevel=5,
            )
        return None


def _rows_of_rank(size: int, rank: int, whole: int) -> int:
    """Return how many of ``whole`` samples, which ranks take ``size`` each in order, a rank has."""
    return min(size, max(0, whole - rank * size))


# ---------------------------------------------------------------- reading loaders and batches


def is_dispatched(loader: Any) -> bool:
    """Return whether rank 0 reads for all ranks. Local."""
    return type(loader).__name__ == "DataLoaderDispatcher"


def _pass_size(loader: Any) -> int:
    """Return the samples of one full batch on all ranks."""
    shard = loader.dataset
    size = loader.batch_size or 1
    if is_dispatched(loader):
        return size if loader.split_batches else size * int(loader.state.num_processes)
    return size * int(shard.num_processes) if type(shard).__name__ == "IterableDatasetShard" else size


def _left_out(loader: Any) -> int:
    """Return how many samples ``skip_first_batches`` has a batch sampler leave out before any are drawn here."""
    sampler, lists = loader.batch_sampler, 0
    while type(sampler).__name__ == "SkipBatchSampler":
        sampler, lists = sampler.batch_sampler, lists + int(sampler.skip_batches)
    return lists * int(loader.batch_size or getattr(sampler, "batch_size", None) or 1) if lists else 0


def batch_size_of(batch: Any) -> int | None:
    """Return the rows of a batch, as Accelerate finds them; None where there is no tensor. Local."""
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


def _holder(batch: Any) -> Callable[[], bool]:
    """Return whether anything still refers to a batch; False where that cannot be seen."""
    tensor = _first_tensor(batch)
    try:
        known = weakref.ref(batch if tensor is None else tensor)
    except TypeError:
        return lambda: False
    return lambda: known() is not None
