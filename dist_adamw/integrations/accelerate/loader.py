"""Observe Accelerate's loaders: notify listeners of every batch that is handed out.

Accelerate builds loaders in several places (``prepare``, ``prepare_data_loader``, ``skip_first_batches``, copies), so
`observe_loaders` wraps ``__iter__`` of its loader classes, once per process. Without listeners nothing changes.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch.utils.data import BatchSampler, IterableDataset

from dist_adamw.integrations.accelerate.loader_iteration import Batch, Run, is_dispatched
from dist_adamw.run_log import batch_sources
from dist_adamw.run_log.digests import batch_digest


class Listener(Protocol):
    """An observer of loaders."""

    def begins(self, run: Run) -> None:
        """Handle the start of an iteration over a loader."""

    def handed_out(self, batch: Batch) -> None:
        """Handle a batch that a loader hands out."""

    def ended(self, run: Run) -> None:
        """Handle the end of an iteration."""


_LISTENERS: weakref.WeakSet[Listener] = weakref.WeakSet()


class _Fetching(threading.local):
    """The iterations of this thread that are fetching a batch, innermost last."""

    def __init__(self) -> None:
        self.runs: list[Run] = []


_FETCHING = _Fetching()


# ---------------------------------------------------------------- listening to the sampler


class _Recorder(BatchSampler):
    """Replace a loader's batch sampler while its iterator is created, and record the indices that it draws."""

    def __init__(self, sampler: Any) -> None:
        self.recorded = sampler

    def __iter__(self) -> Iterator[Any]:
        # This runs inside a fetch. Persistent workers keep the first recorder, so the iteration is looked up each time.
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
    """A sampler that passes every list to ``before``, then yields it."""

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
    """Return a recording version of the sampler; Accelerate's samplers around the script's own are copied."""
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
    """Wrap the script's iterable data set, and count its samples in ``run``."""

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
    """Make the iterator that is created in the block draw from a recorder."""
    # DataLoader.__setattr__ forbids changing these attributes, so its __dict__ is used.
    base = vars(getattr(loader, "base_dataloader", loader))
    swapped = _recorders(loader, base, run)
    before = {name: base[name] for name in swapped}
    base.update(swapped)
    shard = loader.dataset
    is_shard = type(shard).__name__ == "IterableDatasetShard"
    whole = shard.dataset if is_shard else None
    if is_shard and run.wrap is not None:
        shard.dataset = run.wrap(shard.dataset)
    if is_shard and not base.get("num_workers"):
        shard.dataset = _Streamed(shard.dataset, run)
    try:
        yield
    finally:
        base.update(before)
        if is_shard:
            shard.dataset = whole


def _recorders(loader: Any, base: dict[str, Any], run: Run) -> dict[str, Any]:
    """Return by name the recording replacements for attributes of torch's loader."""
    found: dict[str, Any] = {}
    name = "sampler" if base.get("batch_sampler") is None else "batch_sampler"
    if isinstance(base.get(name), BatchSampler) or name == "batch_sampler":
        found[name] = _Recorder(base[name])
    is_iterable = isinstance(loader.dataset, IterableDataset)
    # With workers, collate_fn runs in another process; a dispatcher's runs on rank 0 only.
    if is_iterable and run.wrap is not None and type(loader.dataset).__name__ != "IterableDatasetShard":
        found["dataset"] = run.wrap(loader.dataset)
    if is_iterable and not base.get("num_workers") and not is_dispatched(loader):
        found["collate_fn"] = functools.partial(_collate, base["collate_fn"], run)
    return found


def _collate(collate: Callable[[Any], Any], run: Run, samples: Any) -> Any:
    run.collated(samples)
    return collate(samples)


# ---------------------------------------------------------------- listening to loaders


def listen(listener: Listener) -> None:
    """Notify ``listener`` of the batches that Accelerate's loaders hand out, as long as it lives. Local."""
    observe_loaders()
    _LISTENERS.add(listener)


@functools.cache
def observe_loaders() -> None:
    """Observe all of Accelerate's loaders from now on, existing and future ones. Local."""
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
    # A stateful loader advances its sampler itself, so its draws do not match the batches.
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
            watching = contextlib.nullcontext()  # torch's iterator exists now, and has taken the recorder
            run.begin()
            if run.convert is not None:
                batch = run.convert(batch)
            handed_out = run.hand_out(loader, batch)
            if batch_sources.are_read() and torch.is_grad_enabled():
                handed_out.digest = batch_digest(batch)  # now, since the script may change it
            for listener in list(_LISTENERS):
                listener.handed_out(handed_out)
            yield batch
    finally:
        run.has_ended = True
        for listener in list(_LISTENERS):
            listener.ended(run)
