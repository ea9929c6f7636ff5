"""Divide the elements of parameters among ranks: flat layouts, buckets and slices.

This module computes with integers only, and needs no tensors or process group.

The parameters of one dtype and device are laid out one after the other, each starting at a
multiple of ALIGNMENT, and cut into buckets. Rank r owns the r-th of ``world_size`` equal slices of
every bucket, so shares are equal whatever the sizes of the parameters; the remainder is padding.
The layout is for optimizer state and traffic: parameters keep their own storage.

The alignment keeps the bits of an update: torch's fused CPU kernel runs whole vectors, then single
elements, and the two round differently. Cuts at multiples of the widest vector (32 elements of
bf16 under AVX-512), counted from the parameter's own start, do not move an element from one loop
to the other.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from itertools import accumulate

ALIGNMENT = 32  # elements: 128 bytes of fp32, which is also a GPU's cache line
BUCKET_NUMEL = 1 << 23  # 32 MiB of fp32


@dataclass(frozen=True, slots=True)
class _BucketRule:
    """Limits of the number of elements in a bucket of W ranks.

    Attributes:
        part: At most a ``part * W``-th of all elements, so that staging is small beside parameters and state;
        shortest_slice: but at least this number for each rank, so that a slice is worth a message.
        largest: At most this number, beyond which larger buckets gain nothing;
        longest_slice: but this number for each rank, if that is more.
    """

    part: int
    shortest_slice: int
    largest: int
    longest_slice: int

    def numel(self, numel: int, world_size: int, *, is_halved: bool) -> int:
        """Return the number of elements in a bucket, of ``numel`` in all."""
        half = 2 if is_halved else 1
        least = max(numel // (half * self.part * world_size), world_size * self.shortest_slice // half)
        return min(least, max(self.largest, world_size * self.longest_slice))


_BY_HOST = _BucketRule(8, 1 << 18, 1 << 22, 1 << 15)  # four are staged, see `slots`
# Megatron's 40M elements, with slices of 1 MiB of fp32 on thousands of ranks; two are staged.
_BY_COLLECTIVES = _BucketRule(4, 1 << 19, 40_000_000, 1 << 18)
_EARLIER = _BucketRule(4, 1 << 19, 1 << 23, 1 << 15)


def suitable_bucket_numel(
    numel: int, world_size: int, *, reduce_every_backward: bool = False, by_collectives: bool = False
) -> int:
    """Return a good number of elements to send together, of ``numel`` in all.

    With ``reduce_every_backward``, gradients are freed bucket by bucket, so buckets are half as long and fewer
    gradients exist at a time.

    Args:
        by_collectives: Whether the backend's collectives send them, such as NCCL's, not messages from the host.
    """
    if world_size == 1:
        return BUCKET_NUMEL
    rule = _BY_COLLECTIVES if by_collectives else _BY_HOST
    return rule.numel(numel, world_size, is_halved=reduce_every_backward)


def earlier_bucket_numel(numel: int, world_size: int, *, reduce_every_backward: bool = False) -> int:
    """Return what `suitable_bucket_numel` returned in versions whose shares do not say how they were cut."""
    return _EARLIER.numel(numel, world_size, is_halved=reduce_every_backward)


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of one parameter's elements: its ``[start, stop)`` lies at ``offset`` of a flat tensor."""

    param: int
    start: int
    stop: int
    offset: int

    @property
    def numel(self) -> int:
        """The number of elements in the run."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of a bucket, ``[start, stop)`` in it: of one large parameter, or of any number of small ones.

    Attributes:
        piece: The run of the large parameter; None: small ones.
    """

    start: int
    stop: int
    piece: Piece | None = None


@dataclass(frozen=True, slots=True)
class FlatLayout:
    """The position of each element of a list of parameters, and the rank that owns it.

    Args:
        numels: The number of elements of each parameter, in order; 0 is allowed.
        world_size: The number of ranks that share the state.
        max_bucket_numel: The number of elements of a full bucket, rounded up to ``world_size * ALIGNMENT``.
            None: `suitable_bucket_numel`.
        reduce_every_backward: See `suitable_bucket_numel`, also for ``by_collectives``.
    """

    numels: tuple[int, ...]
    world_size: int = 1
    max_bucket_numel: int | None = None
    reduce_every_backward: bool = False
    by_collectives: bool = False
    starts: tuple[int, ...] = field(init=False, repr=False)  # where each parameter starts, then the end

    def __post_init__(self) -> None:
        spans = (_round_up(n, ALIGNMENT) for n in self.numels)
        object.__setattr__(self, "starts", tuple(accumulate(spans, initial=0)))

    @property
    def numel(self) -> int:
        """The number of elements of all parameters, without padding."""
        return sum(self.numels)

    @property
    def _quantum(self) -> int:
        return self.world_size * ALIGNMENT

    @property
    def bucket_numel(self) -> int:
        """The number of elements of every bucket but the last, which may be smaller."""
        most = self.max_bucket_numel or suitable_bucket_numel(
            self.starts[-1],
            self.world_size,
            reduce_every_backward=self.reduce_every_backward,
            by_collectives=self.by_collectives,
        )
        return _round_up(max(min(most, self.starts[-1]), 1), self._quantum)

    @property
    def padded_numel(self) -> int:
        """The number of elements of the whole layout, padding included."""
        return _round_up(self.starts[-1], self._quantum)

    @property
    def shard_numel(self) -> int:
        """The number of elements that each rank owns, padding included."""
        return self.padded_numel // self.world_size

    @property
    def num_buckets(self) -> int:
        """The number of buckets."""
        return -(-self.padded_numel // self.bucket_numel)

    def bucket(self, k: int) -> tuple[int, int]:
        """Return the flat ``[start, stop)`` of bucket ``k``, padding included."""
        return k * self.bucket_numel, min((k + 1) * self.bucket_numel, self.padded_numel)

    def slice_of(self, k: int, rank: int) -> tuple[int, int]:
        """Return the flat ``[start, stop)`` of ``rank``'s slice of bucket ``k``."""
        start, stop = self.bucket(k)
        share = (stop - start) // self.world_size
        return start + rank * share, start + (rank + 1) * share

    def segments(self, k: int, direct_numel: int) -> list[Segment]:
        """Divide bucket ``k`` into runs that may lie in different memory, leaving out padding between them.

        Args:
            direct_numel: Parameters with at least as many elements have separate segments.
        """
        found: list[Segment] = []
        small: list[Piece] = []
        for piece in [*self.pieces(*self.bucket(k)), None]:
            if piece is not None and self.numels[piece.param] < direct_numel:
                small.append(piece)
                continue
            if small:
                found.append(Segment(small[0].offset, small[-1].offset + small[-1].numel))
                small = []
            if piece is not None:
                found.append(Segment(piece.offset, piece.offset + piece.numel, piece))
        return found

    def pieces(self, start: int, stop: int, offset: int = 0) -> list[Piece]:
        """Return the runs of parameters in flat ``[start, stop)``; ``start`` has the offset ``offset``."""
        found = []
        # A bisection, since a layout of thousands of parameters is asked for every slice of every bucket.
        i = max(bisect_right(self.starts, start) - 1, 0)
        while i < len(self.numels) and self.starts[i] < stop:
            a, b = max(start, self.starts[i]), min(stop, self.starts[i] + self.numels[i])
            if a < b:
                found.append(Piece(i, a - self.starts[i], b - self.starts[i], offset + a - start))
            i += 1
        return found

    def owned(self, rank: int) -> list[list[Piece]]:
        """Return the runs that ``rank`` owns, by bucket; offsets are positions in the rank's flat shard."""
        buckets = []
        offset = 0
        for k in range(self.num_buckets):
            start, stop = self.slice_of(k, rank)
            buckets.append(self.pieces(start, stop, offset))
            offset += stop - start
        return buckets

    def ranges(self, rank: int) -> list[list[list[int]]]:
        """Return the ``[start, stop)`` of each parameter that ``rank`` owns, in ascending order."""
        found: list[list[list[int]]] = [[] for _ in self.numels]
        for pieces in self.owned(rank):
            for piece in pieces:
                found[piece.param].append([piece.start, piece.stop])
        return found


@dataclass(frozen=True, slots=True)
class Footprint:
    """The memory and traffic of one rank, in bytes.

    Attributes:
        staging: Buckets in flight.
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
    """Return the memory and traffic of each rank with ``layout``, without a model.

    Args:
        param_bytes: Bytes per element; 2 for bf16.
        grad_bytes: Bytes per element. With ``layout.reduce_every_backward`` only the averages of the shard exist after
            backward; during it also the gradients of the buckets in flight, and of the next bucket or of one parameter,
            since autograd returns its gradient whole.
        state_bytes: Bytes per owned element: 8 for two fp32 moments, 12 with an fp32 master.
        under_way: The number of buckets in flight.
    """
    others = layout.world_size - 1
    slice_numel = layout.bucket_numel // layout.world_size
    staged = under_way * layout.bucket_numel if layout.by_collectives else 2 * under_way * others * slice_numel
    kept = layout.numel
    if layout.reduce_every_backward:
        arriving = max(layout.bucket_numel, *layout.numels)
        kept = layout.shard_numel + under_way * layout.bucket_numel + arriving
    return Footprint(
        parameters=layout.numel * param_bytes,
        gradients=kept * grad_bytes,
        state=layout.shard_numel * state_bytes,
        staging=staged * max(param_bytes, grad_bytes),
        sent=others * layout.shard_numel * (param_bytes + grad_bytes),
    )


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
