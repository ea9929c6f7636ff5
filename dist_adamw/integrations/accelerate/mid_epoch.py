"""Start a loader in the middle of an epoch."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sized
from typing import Any

from torch.utils.data import BatchSampler, Sampler

from dist_adamw.errors import CheckpointError
from dist_adamw.integrations.accelerate.data import LoaderFacts, batch_sampler_of, uneven_batches


class _Rest(Sampler[Any]):
    """A sampler without its first ``start`` samples.

    Args:
        sampler: The whole sampler.
        start: The number of samples to leave out.
        head: The number of samples at the beginning to yield anyway: Accelerate pads an epoch's last batch with the
            first samples that it drew, and `starting_at` makes it skip them as batches.
    """

    def __init__(self, sampler: Any, start: int, head: int) -> None:
        self.sampler, self.start, self.head = sampler, start, head

    def __iter__(self) -> Iterator[Any]:
        indices = iter(self.sampler)
        yield from itertools.islice(indices, self.head)
        for _ in range(self.start - self.head):
            next(indices, None)
        yield from indices

    def __len__(self) -> int:
        return max(0, len(self.sampler) - self.start)

    def __getattr__(self, name: str) -> Any:  # set_epoch and whatever else Accelerate calls on samplers
        return getattr(vars(self).get("sampler"), name)  # copy.copy looks attributes up before "sampler" is set


def outer_sampler(loader: Any) -> Any:
    """Return the outermost batch sampler, from which a loader draws."""
    return loader.sampler if isinstance(loader.sampler, BatchSampler) else loader.batch_sampler


def remove_rest(loader: Any) -> None:
    """Undo the `starting_at` of a loop that was left and whose generator still exists."""
    batches = batch_sampler_of(loader)
    if isinstance(getattr(batches, "sampler", None), _Rest):
        batches.sampler = _without_rests(batches.sampler)
        loader.skip_batches = 0


def _without_rests(sampler: Any) -> Any:
    """Return the sampler inside any `_Rest`."""
    while isinstance(sampler, _Rest):
        sampler = sampler.sampler
    return sampler


def check_even(loader: Any, start: int, facts: LoaderFacts) -> None:
    """Raise if ranks would have different numbers of remaining batches, and wait for each other. Local."""
    sampler, batches = outer_sampler(loader), batch_sampler_of(loader)
    if batches is None or facts.drop_last or getattr(sampler, "even_batches", True):
        return
    ranks, size = facts.batch.data_parallel_size, facts.batch.micro_batch_size
    samples = _without_rests(getattr(batches, "sampler", None))
    if isinstance(samples, Sized):
        left = max(0, len(samples) - start)
        count = -(-left // size)
    elif isinstance(batches, Sized) and not start:  # a custom batch sampler
        left, count = 0, len(batches)
    else:
        return
    if not count % ranks:
        return
    if not start:
        raise ValueError(uneven_batches(ranks, count, size))
    raise CheckpointError(
        f"the position is {start} samples into an epoch of which {left} are left, and even_batches=False gives "
        f"{ranks} ranks different numbers of batches ({count} of {size} samples). Leave even_batches=True "
        "(repeated samples are not counted)."
    )


@contextlib.contextmanager
def starting_at(loader: Any, start: int, facts: LoaderFacts) -> Iterator[tuple[int, int]]:
    """Make ``loader`` begin at sample ``start``; give the offset, and the number of samples drawn first for padding.

    If whole batches are skipped instead, the loader itself draws from sample 0: (0, 0).
    """
    batches = batch_sampler_of(loader)
    if getattr(batches, "sampler", None) is None:  # iterable data, or a custom batch sampler
        with _skipping_whole_batches(loader, start, facts.pass_samples):
            yield 0, 0
        return
    remove_rest(loader)
    whole = batches.sampler
    check_even(loader, start, facts)
    head = _padding(whole, start, facts)
    rest = batches.sampler = _Rest(whole, start, head)
    loader.skip_batches = head // facts.pass_samples  # samples drawn only for padding are not handed out
    try:
        yield start, head
    finally:
        if batches.sampler is rest:
            batches.sampler, loader.skip_batches = whole, 0


@contextlib.contextmanager
def _skipping_whole_batches(loader: Any, start: int, size: int) -> Iterator[None]:
    """Make ``loader`` skip the batches before sample ``start``, of ``size`` samples over all ranks each."""
    if start % size:
        raise CheckpointError(
            f"the position is {start} samples into data of which only whole batches can be skipped, and it is not a "
            f"multiple of {size}, the batch over all ranks. Use a batch that divides it."
        )
    loader.skip_batches = start // size
    try:
        yield
    finally:
        loader.skip_batches = 0


def _padding(sampler: Any, start: int, facts: LoaderFacts) -> int:
    """Return how many of the epoch's first samples must be drawn again, for the padding of its last batch."""
    size = facts.pass_samples
    if not start or start % size or facts.drop_last or facts.batch.data_parallel_size == 1:
        return 0
    last_is_partial = isinstance(sampler, Sized) and len(sampler) % size != 0
    return size if last_is_partial else 0
