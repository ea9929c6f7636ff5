"""A batch-size schedule: the global batch as a function of samples."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dist_adamw.schedule.batch import GlobalBatch, check_positive_int, check_whole, samples_of_batch, shown
from dist_adamw.schedule.lengths import Sizes, in_samples, is_zero, parse

# From numbers of samples, or lengths with a unit, to global batches. (With int | str for keys, mypy would refuse a
# dict[int, int].)
BatchSizes = Mapping[Any, int]
# The same as plain data, checked as far as that is possible without an epoch size.
GivenBatches = tuple[tuple[int | str, int], ...]


@dataclass(frozen=True, slots=True)
class BatchSchedule:
    """Global batches, each from some sample on.

    Attributes:
        starts: Samples, ascending; the first is 0.
        sizes: The global batch of updates that begin at or after each of them.
    """

    starts: tuple[int, ...]
    sizes: tuple[int, ...]

    def __str__(self) -> str:
        later = [f"{size:,} from sample {start:,} on" for start, size in zip(self.starts, self.sizes, strict=True)]
        return ", ".join([f"{self.sizes[0]:,} samples", *later[1:]])

    def at(self, samples: int) -> int:
        """Return the global batch of the update that begins at ``samples``."""
        return self.sizes[bisect_right(self.starts, samples) - 1]

    def updates(self, first: int, after: int) -> tuple[int, int]:
        """Return how many updates from ``first`` on reach ``after``, and the sample at which the last of them ends."""
        count, samples = 0, first
        while samples < after:
            size = self.at(samples)
            later = bisect_right(self.starts, samples)
            end = after if later == len(self.starts) else min(after, self.starts[later])
            updates = -(-(end - samples) // size)
            count, samples = count + updates, samples + updates * size
        return count, samples


def read_batch_sizes(given: BatchSizes) -> GivenBatches:
    """Return a batch-size schedule as plain data: samples as numbers, other lengths as texts.

    Raises:
        ValueError: fewer than two batches, a key that is not a length, a first key other than 0, or a batch that is not
            a whole number above 0.
    """
    pairs = list(given.items())
    if not pairs:
        raise ValueError("batch_size={} is empty. Pass a number, or a mapping such as {0: 256, 1_000_000: 512}.")
    read = tuple((_key(key), check_positive_int(f"batch_size[{shown(key)}]", size)) for key, size in pairs)
    if read[0][0] != 0:
        raise ValueError(f"the first key of batch_size must be 0, where training begins, got {shown(pairs[0][0])}.")
    if len(read) == 1:
        raise ValueError(f"batch_size={shown(dict(read))} is one batch for all of training: pass {read[0][1]}.")
    if not any(isinstance(key, str) for key, _ in read):
        resolve(read, None)
    return read


def resolve(given: GivenBatches, sizes: Sizes | None) -> BatchSchedule:
    """Return the schedule of ``given``, whose lengths are rounded up to whole samples.

    Args:
        given: From `read_batch_sizes`.
        sizes: What units are worth; None if all keys are samples.

    Raises:
        ValueError: keys do not ascend, or a unit cannot be converted.
    """
    starts = [_start(key, sizes) for key, _ in given]
    for i in range(1, len(starts)):
        if starts[i] <= starts[i - 1]:
            raise ValueError(
                f"batch_size: {shown(given[i][0])} is sample {starts[i]:,} and must come after "
                f"{shown(given[i - 1][0])}, which is sample {starts[i - 1]:,}. Sort the keys, each sample once."
            )
    return BatchSchedule(tuple(starts), tuple(size for _, size in given))


def read_saved_batches(saved: Any) -> GivenBatches:
    """Return the batch-size schedule of a saved configuration, which may come from an untrusted file.

    Raises:
        ValueError: it is not one.
    """
    is_list = isinstance(saved, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in saved)
    if not is_list or not all(isinstance(key, int | str) for key, _ in saved):
        raise ValueError(f"batch_size_schedule of a saved schedule must be a list of pairs, got {shown(saved)}.")
    return read_batch_sizes(dict(saved))


def read_batch(batch_size: int | GlobalBatch | BatchSizes) -> tuple[int, GivenBatches | None]:
    """Return the first global batch, in samples, and the schedule if there is one.

    Raises:
        ValueError: as `read_batch_sizes` and `samples_of_batch`.
    """
    if not isinstance(batch_size, Mapping):
        return samples_of_batch(batch_size), None
    given = read_batch_sizes(batch_size)
    return given[0][1], given


def solve_each(given: GivenBatches, *, micro_batch_size: int, data_parallel_size: int) -> tuple[GlobalBatch, ...]:
    """Find the gradient accumulation for each batch of a schedule.

    Raises:
        ValueError: a batch is not a multiple of ``micro_batch_size * data_parallel_size``.
    """
    found = []
    for key, size in given:
        try:
            one = GlobalBatch.solve(size=size, micro_batch_size=micro_batch_size, data_parallel_size=data_parallel_size)
        except ValueError as error:
            raise ValueError(f"batch_size[{shown(key)}]: {error}") from error
        found.append(one)
    return tuple(found)


def _key(key: Any) -> int | str:
    """Return a number of samples, or the text of a length in another unit."""
    if not isinstance(key, str):
        try:
            return check_whole("a key of batch_size", key)
        except ValueError as error:
            raise ValueError(f"{str(error).rstrip('.')}: samples, or a text with a unit ('2 epochs').") from error
    if is_zero("a key of batch_size", key):
        return 0
    amount, unit = parse("a key of batch_size", key, "samples")
    if unit in ("cycles", "%"):
        raise ValueError(f"a key of batch_size cannot be a share of a cycle, got {shown(key)}. Use samples or epochs.")
    if unit != "samples":
        return " ".join(key.split())
    if amount.denominator != 1:
        raise ValueError(f"a key of batch_size must be a whole number of samples, got {shown(key)}.")
    return check_whole("a key of batch_size", int(amount))


def _start(key: int | str, sizes: Sizes | None) -> int:
    if isinstance(key, int):
        return key
    assert sizes is not None
    return math.ceil(in_samples("a key of batch_size", key, "samples", sizes))
