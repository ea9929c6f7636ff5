"""Observe Accelerate's loaders: tell a listener of every batch that is handed out.

Knows torch's and Accelerate's loaders and samplers; nothing of optimizers.

Accelerate builds loaders in several places (``prepare``, ``prepare_data_loader``, ``skip_first_batches``, a copy), so
`observe_loaders` wraps ``__iter__`` of its loader classes, once in a process. Where nothing listens, nothing changes.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from torch.utils.data import BatchSampler, IterableDataset

from dist_adamw.integrations.accelerate.loader_iteration import Batch, Run, is_dispatched


class Listener(Protocol):
    """Hears of the batches that loaders hand out."""

    def begins(self, run: Run) -> None:
        """An iteration over a loader begins."""

    def handed_out(self, batch: Batch) -> None:
        """A loader hands out a batch."""

    def ended(self, run: Run) -> None:
        """No batch will come from an iteration any more."""


_LISTENERS: weakref.WeakSet[Listener] = weakref.WeakSet()


class _Fetching(threading.local):
    """Iterations of this thread that fetch a batch right now, the innermost last."""

    def __init__(self) -> None:
        self.runs: list[Run] = []


_FETCHING = _Fetching()


# ---------------------------------------------------------------- listening to the sampler


class _Recorder(BatchSampler):
    """Stands for a loader's batch sampler while an iterator is made of it, and notes what is drawn."""

    def __init__(self, sampler: Any) -> None:
        self.recorded = sampler

    def __iter__(self) -> Iterator[Any]:
        # The body runs while a batch is being fetched. Workers that persist keep the first recorder.
        if not _FETCHING.runs:
            yield from self.recorded
            return
        run = _FETCHING.runs[-1]
        run.begin()
        for indices in _watched(self.recorded, run):
            run.dealt(indices)
            yield indices

    def __len__(self) -> int:
        return len(self.recorded)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["recorded"], name)


class _Watched:
    """Another sampler; ``before`` hears of every list before it is yielded."""

    def __init__(self, sampler: Any, before: Callable[[Any], None]) -> None:
        self.sampler_itself, self.before = sampler, before

    def __iter__(self) -> Iterator[Any]:
        for indices in self.sampler_itself:
            self.before(indices)
            yield indices

    def __len__(self) -> int:
        return len(self.sampler_itself)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["sampler_itself"], name)


def _watched(sampler: Any, run: Run) -> Any:
    """Return the same sampler, with copies of those that Accelerate put around the script's own."""
    kind = type(sampler).__name__
    if kind == "SkipBatchSampler":
        twin = copy.copy(sampler)
        twin.batch_sampler = _watched(sampler.batch_sampler, run)
        return twin
    if kind == "BatchSamplerShard":
        run.draws_from(sampler)
        twin = copy.copy(sampler)
        twin.batch_sampler = _Watched(sampler.batch_sampler, run.drew)
    else:
        twin = _Watched(sampler, run.drew)
    return _Watched(twin, run.passed)


class _Streamed:
    """The script's own iterable data set; ``run`` counts what it gives to all ranks."""

    def __init__(self, dataset: Any, run: Run) -> None:
        self.dataset_itself, self.run = dataset, run

    def __iter__(self) -> Iterator[Any]:
        self.run.streamed = 0
        for number, sample in enumerate(self.dataset_itself, 1):
            self.run.streamed = number
            yield sample

    def __getattr__(self, name: str) -> Any:  # set_epoch and generator, which Accelerate asks for
        return getattr(vars(self)["dataset_itself"], name)


@contextlib.contextmanager
def _recorded(loader: Any, run: Run) -> Iterator[None]:
    """Have the iterator that is made in the block draw from a recorder."""
    # torch forbids to set these by name.
    base = vars(getattr(loader, "base_dataloader", loader))
    swapped = _recorders(loader, base, run)
    before = {name: base[name] for name in swapped}
    base.update(swapped)
    shard = loader.dataset
    is_counted = type(shard).__name__ == "IterableDatasetShard" and not base.get("num_workers")
    if is_counted:
        shard.dataset = _Streamed(shard.dataset, run)
    try:
        yield
    finally:
        base.update(before)
        if is_counted:
            shard.dataset = shard.dataset.dataset_itself


def _recorders(loader: Any, base: dict[str, Any], run: Run) -> dict[str, Any]:
    """Return by name the attributes of torch's loader that are to record."""
    found: dict[str, Any] = {}
    name = "sampler" if base.get("batch_sampler") is None else "batch_sampler"
    if isinstance(base.get(name), BatchSampler) or name == "batch_sampler":
        found[name] = _Recorder(base[name])
    is_iterable = isinstance(loader.dataset, IterableDataset)
    # What workers collate is not seen here, nor what rank 0 reads for other ranks.
    if is_iterable and not base.get("num_workers") and not is_dispatched(loader):
        found["collate_fn"] = functools.partial(_collate, base["collate_fn"], run)
    return found


def _collate(collate: Callable[[Any], Any], run: Run, samples: Any) -> Any:
    run.collated(samples)
    return collate(samples)


# ---------------------------------------------------------------- listening to loaders


def listen(listener: Listener) -> None:
    """Have ``listener`` hear of what Accelerate's loaders hand out, for as long as it lives. Local."""
    observe_loaders()
    _LISTENERS.add(listener)


@functools.cache
def observe_loaders() -> None:
    """Observe Accelerate's loaders from now on, those that exist and those to come. Local."""
    from accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard, SkipDataLoader

    for kind in (DataLoaderShard, DataLoaderDispatcher, SkipDataLoader):
        kind.__iter__ = _observed(kind.__iter__)


def _observed(iterate: Callable[[Any], Iterator[Any]]) -> Callable[[Any], Iterator[Any]]:
    @functools.wraps(iterate)
    def observed(loader: Any) -> Iterator[Any]:
        return _hand_out(loader, iterate(loader)) if _LISTENERS else iterate(loader)

    return observed


def _hand_out(loader: Any, batches: Iterator[Any]) -> Iterator[Any]:
    run = Run(loader)
    for listener in list(_LISTENERS):
        listener.begins(run)
    # A stateful loader forwards its sampler by itself: what it draws is not what it hands out.
    is_stateful = getattr(loader, "use_stateful_dataloader", False)
    watching = contextlib.nullcontext() if is_stateful else _recorded(loader, run)
    try:
        while True:
            _FETCHING.runs.append(run)
            try:
                with watching:
                    batch = next(batches)
            except StopIteration:
                run.is_exhausted = True
                return
            finally:
                _FETCHING.runs.pop()
            watching = contextlib.nullcontext()  # torch has made its iterator
            run.begin()
            handed_out = run.hand_out(loader, batch)
            for listener in list(_LISTENERS):
                listener.handed_out(handed_out)
            yield batch
    finally:
        run.has_ended = True
        for listener in list(_LISTENERS):
            listener.ended(run)
