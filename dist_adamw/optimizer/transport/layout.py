"""Divide the elements of parameters among ranks: flat layouts, buckets and slices.

Whole numbers only; no tensors, no ranks of a running job, nothing allocated.

The parameters of one group, dtype and device are thought of as laid out one after the other, each
beginning at a multiple of ALIGNMENT, then cut into buckets. Rank r owns the r-th of ``world_size``
equal slices of every bucket, so shares are equal whatever the sizes of the parameters; what does
not divide is padding. The layout is for optimizer state and traffic: parameters keep their own
storage.

The alignment is what keeps the bits: torch's fused CPU kernel runs whole vectors, then single
elements, and the two round differently. Cuts at multiples of the widest vector (32 elements of
bf16 under AVX-512), counted from the parameter's own start, leave every element on its side.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from itertools import accumulate

ALIGNMENT = 32  # elements: 128 bytes of fp32, a full line for GPUs too
BUCKET_NUMEL = 1 << 23  # 32 MiB of fp32


def suitable_bucket_numel(numel: int, world_size: int, *, reduce_every_backward: bool = False) -> int:
    """Elements that should travel together, of ``numel`` in all.

    Large buckets move faster, small ones need less staging: two of them travel at a time, so that a
    ``4 W``-th keeps staging near 4% of parameters, gradients and state. ``reduce_every_backward`` is for gradients
    that are let go of bucket by bucket: half of that, so that few of them exist at a time. No rank's
    slice is so short that messages cost more than what is in them, nor a bucket longer than pays.
    """
    if world_size == 1:
        return BUCKET_NUMEL
    part, shortest = (8, world_size << 18) if reduce_every_backward else (4, world_size << 19)
    largest = max(BUCKET_NUMEL, world_size << 15)
    return min(max(numel // (part * world_size), shortest), largest)


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of one parameter's elements: ``[start, stop)`` of it lies at ``offset`` of something flat."""

    param: int
    start: int
    stop: int
    offset: int

    @property
    def numel(self) -> int:
        """Elements in the run."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class FlatLayout:
    """Where the elements of a list of parameters lie, and which rank owns them.

    Args:
        numels: Elements of each parameter, in order; 0 is allowed.
        world_size: Ranks that share the state.
        max_bucket_numel: Elements of a full bucket; rounded up to ``world_size * ALIGNMENT``.
            None: `suitable_bucket_numel`.
        reduce_every_backward: See there.
    """

    numels: tuple[int, ...]
    world_size: int = 1
    max_bucket_numel: int | None = None
    reduce_every_backward: bool = False
    starts: tuple[int, ...] = field(init=False, repr=False)  # flat place of each, then the end

    def __post_init__(self) -> None:
        spans = (_round_up(n, ALIGNMENT) for n in self.numels)
        object.__setattr__(self, "starts", tuple(accumulate(spans, initial=0)))

    @property
    def numel(self) -> int:
        """Elements of all parameters, without padding."""
        return sum(self.numels)

    @property
    def _quantum(self) -> int:
        return self.world_size * ALIGNMENT

    @property
    def bucket_numel(self) -> int:
        """Elements of every bucket but the last, which may be smaller."""
        most = self.max_bucket_numel or suitable_bucket_numel(
            self.starts[-1], self.world_size, reduce_every_backward=self.reduce_every_backward
        )
        return _round_up(max(min(most, self.starts[-1]), 1), self._quantum)

    @property
    def padded_numel(self) -> int:
        """Elements of the whole layout."""
        return _round_up(self.starts[-1], self._quantum)

    @property
    def shard_numel(self) -> int:
        """Elements that each rank owns, padding included."""
        return self.padded_numel // self.world_size

    @property
    def num_buckets(self) -> int:
        """Buckets in the layout."""
        return -(-self.padded_numel // self.bucket_numel)

    def bucket(self, k: int) -> tuple[int, int]:
        """Flat ``[start, stop)`` of bucket ``k``, padding included."""
        return k * self.bucket_numel, min((k + 1) * self.bucket_numel, self.padded_numel)

    def slice_of(self, k: int, rank: int) -> tuple[int, int]:
        """Flat ``[start, stop)`` of what ``rank`` owns in bucket ``k``."""
        start, stop = self.bucket(k)
        share = (stop - start) // self.world_size
        return start + rank * share, start + (rank + 1) * share

    def pieces(self, start: int, stop: int, offset: int = 0) -> list[Piece]:
        """The runs of parameters in flat ``[start, stop)``; ``offset`` is where ``start`` shall lie."""
        found = []
        i = max(bisect_right(self.starts, start) - 1, 0)
        while i < len(self.numels) and self.starts[i] < stop:
            a, b = max(start, self.starts[i]), min(stop, self.starts[i] + self.numels[i])
            if a < b:
                found.append(Piece(i, a - self.starts[i], b - self.starts[i], offset + a - start))
            i += 1
        return found

    def owned(self, rank: int) -> list[list[Piece]]:
        """Return the runs that ``rank`` owns, by bucket; offsets are places in the rank's flat shard."""
        buckets = []
        offset = 0
        for k in range(self.num_buckets):
            start, stop = self.slice_of(k, rank)
            buckets.append(self.pieces(start, stop, offset))
            offset += stop - start
        return buckets

    def ranges(self, rank: int) -> list[list[list[int]]]:
        """The ``[start, stop)`` of each parameter that ``rank`` owns, in ascending order."""
        found: list[list[list[int]]] = [[] for _ in self.numels]
        for pieces in self.owned(rank):
            for piece in pieces:
                found[piece.param].append([piece.start, piece.stop])
        return found


@dataclass(frozen=True, slots=True)
class Footprint:
    """The memory and traffic of one rank, in bytes.

    Attributes:
        staging: Buckets that travel.
        sent: Per update, gradients and parameters together.
    """

    parameters: int
    gradients: int
    state: int
    staging: int
    sent: int

    @property
    def total(self) -> int:
        """Bytes held at the peak of an update."""
        return self.parameters + self.gradients + self.state + self.staging


def footprint(
    layout: FlatLayout, *, param_bytes: int = 4, grad_bytes: int = 4, state_bytes: int = 8, under_way: int = 2
) -> Footprint:
    """Return the memory and traffic of each rank with ``layout``, before there is a model.

    Args:
        param_bytes: Of an element; 2 for bf16.
        grad_bytes: Of an element. With ``layout.reduce_every_backward`` there are those of the shard, and of a few
            buckets.
        state_bytes: Of an owned element: 8 for two fp32 moments, 12 with an fp32 master.
        under_way: Buckets that travel at a time.
    """
    others = layout.world_size - 1
    slice_numel = layout.bucket_numel // layout.world_size
    kept = layout.shard_numel + (1 + under_way) * layout.bucket_numel if layout.reduce_every_backward else layout.numel
    return Footprint(
        parameters=layout.numel * param_bytes,
        gradients=kept * grad_bytes,
        state=layout.shard_numel * state_bytes,
        staging=under_way * others * slice_numel * max(param_bytes, grad_bytes),
        sent=others * layout.shard_numel * (param_bytes + grad_bytes),
    )


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
