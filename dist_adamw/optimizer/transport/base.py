"""The interface of a transport, which sends slices of buckets between ranks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from dist_adamw.optimizer.transport.layout import FlatLayout, Piece, Segment
from dist_adamw.optimizer.transport.tree_sum import TreeSum
from dist_adamw.ranks import collectives

T = TypeVar("T")
Flat = Sequence["Tensor | None"]  # one 1-D tensor per parameter, or None if it has no gradient

MAX_IN_FLIGHT = 2  # buckets: one is sent while the next is computed, and each needs its own staging
GONE = (
    "A rank that this one exchanges gradients or parameters with has exited, skipped a backward pass or a step() that "
    "others made, or left the training loop early. Every rank must make the same backward passes and updates."
)


@dataclass(slots=True)
class InFlightBucket:
    """A bucket that is being sent.

    Attributes:
        staging: Memory for messages.
        parts: The gradients, which must not change before the transfer is over; empty in a gather.
        gathered: The tensors that receive slices in a gather; None: the parameters.
    """

    bucket: int
    works: list[dist.Work]
    staging: Any
    parts: Sequence[Tensor] = ()
    gathered: Flat | None = None

    def wait(self) -> None:
        """Wait until everything has been sent and received.

        Raises:
            RuntimeError: a rank has exited, or did not take part within the process group's timeout.
        """
        try:
            for work in self.works:
                work.wait()
        except RuntimeError as error:
            raise RuntimeError(f"{error}\n{GONE}") from error


@dataclass(frozen=True, slots=True)
class OwnedPart:
    """A rank's part of a segment.

    Attributes:
        segment: The index of the segment.
        start: Where the part begins in the segment, and ``stop``, where it ends.
        offset: Where it begins in the rank's slice of the bucket.
    """

    segment: int
    start: int
    stop: int
    offset: int

    @property
    def numel(self) -> int:
        """The number of elements."""
        return self.stop - self.start

    def of(self, parts: Sequence[Tensor]) -> Tensor:
        """Return the part of a bucket's ``parts``, one for each segment."""
        part = parts[self.segment]
        return part if self.numel == part.numel() else part[self.start : self.stop]

    def in_slice(self, of_rank: Tensor) -> Tensor:
        """Return the part of a tensor that has the rank's slice of the bucket."""
        return of_rank[self.offset : self.offset + self.numel]


class Transport(ABC):
    """Sends the buckets of one layout. Every method is collective, in the same order on every rank.

    At most MAX_IN_FLIGHT buckets may be in flight at a time.

    Args:
        reproducible: Whether gradients are finished by `finish_terms`, and not by `finish_reduce`.

    Attributes:
        channel: Distinguishes the messages of several optimizers.
        count: The number of ranks that gradients are averaged over.
    """

    def __init__(
        self,
        layout: FlatLayout,
        params: list[Tensor],
        *,
        group: dist.ProcessGroup,
        replicas: dist.ProcessGroup | None,
        channel: Any,
        reduce_dtype: torch.dtype | None = None,
        reproducible: bool = False,
    ) -> None:
        self._layout, self._params = layout, params
        self._reproducible = reproducible
        self._group, self._replicas, self.channel = group, replicas, channel
        self._rank, self._size = collectives.rank(group), layout.world_size
        self.count = self._size * (1 if replicas is None else collectives.world_size(replicas))
        self._like = params[0]
        self._reduce_dtype = params[0].dtype if reduce_dtype is None else reduce_dtype
        self._free: list[Any] = []
        self._views: dict[Any, list[Tensor]] = {}

    def _kept(self, key: Any, make: Callable[[], list[Tensor]]) -> list[Tensor]:
        """Return cached views of parameters or staging memory, which stay valid."""
        # A view costs about a microsecond, and a bucket may have thousands.
        views = self._views.get(key)
        if views is None:
            views = self._views[key] = make()
        return views

    def _params_of(self, key: Any, pieces: list[Piece]) -> list[Tensor]:
        return self._kept(("params", *key), lambda: cast(list[Tensor], cut(self._params, pieces)))

    def _take(self) -> Any:
        return self._free.pop() if self._free else self._staging()

    @property
    def is_open(self) -> bool:
        """Whether ranks have agreed on how they send. The first transfer of a transport that is not open needs ranks
        that are known to begin the same one."""
        return True

    @abstractmethod
    def _staging(self) -> Any:
        """Return staging memory for one bucket."""

    def _empty(self, numel: int) -> Tensor:
        return torch.empty(numel, dtype=self._like.dtype, device=self._like.device)

    @abstractmethod
    def segments(self, k: int) -> list[Segment]:
        """Return the runs of bucket ``k`` that may lie in different memory."""

    @abstractmethod
    def owned_parts(self, k: int) -> list[OwnedPart]:
        """Return this rank's parts of these segments."""

    @abstractmethod
    def start_reduce(self, k: int, parts: Sequence[Tensor]) -> InFlightBucket:
        """Start to send gradients to their owners.

        Args:
            k: The bucket.
            parts: Its gradients, 1-D, one tensor for each of its `segments`. They must not change before the finish.
        """

    @abstractmethod
    def finish_reduce(self, sent: InFlightBucket, into: Sequence[Tensor], *, add: bool = False) -> None:
        """Wait for a bucket, and average this rank's slice over all ranks.

        Args:
            into: 1-D tensors that receive the averages, one for each of the `owned_parts`: other memory than the
                gradients, or the same.
            add: Add the averages to ``into`` instead of copying them.
        """

    @abstractmethod
    def finish_terms(self, sent: InFlightBucket, sums: TreeSum) -> None:
        """Wait for a bucket, and add every rank's gradient of this rank's slice to ``sums``, in rank order."""

    @abstractmethod
    def start_gather(self, k: int, flat: Flat | None = None) -> InFlightBucket:
        """Start to send this rank's slice of bucket ``k``, and to receive the others'.

        Args:
            flat: The tensors to gather, with None for the same ones on every rank; default: the parameters.
        """

    @abstractmethod
    def finish_gather(self, sent: InFlightBucket) -> None:
        """Wait until all slices of the bucket have arrived."""

    def gather_aside(self, k: int) -> InFlightBucket | None:
        """Gather bucket ``k`` of the parameters on a separate stream, if the device has streams; else return None.

        Any number of these may be in flight. `finish_gather` makes the device wait for one, and not the host.
        """
        return None

    def _gathered(self, sent: InFlightBucket, key: Any, pieces: list[Piece]) -> Sequence[Tensor | None]:
        """Return the runs that a gather reads or writes."""
        return self._params_of(key, pieces) if sent.gathered is None else cut(sent.gathered, pieces)


def _copy_present(targets: Sequence[Tensor | None], sources: Sequence[Tensor]) -> None:
    """Copy each source to its target, if that is not None."""
    if any(target is None for target in targets):
        pairs = [(target, source) for target, source in zip(targets, sources, strict=True) if target is not None]
        targets, sources = [target for target, _ in pairs], [source for _, source in pairs]
    if targets:
        torch._foreach_copy_(cast(list[Tensor], list(targets)), list(sources))


def cut(flat: Flat, pieces: list[Piece]) -> list[Tensor | None]:
    """Return the ``pieces`` of ``flat`` as views."""
    # A piece that is a whole tensor is returned as it is, since a view costs a microsecond.
    return [
        base if (base := flat[p.param]) is None or p.numel == base.numel() else base[p.start : p.stop] for p in pieces
    ]


def cut_slice(flat: Flat, pieces: list[Piece]) -> list[Tensor | None]:
    """Return `cut` of adjacent pieces, such as those of a bucket or a slice."""
    if not pieces:
        return []
    # Only the first and the last piece can be parts of a parameter, so the others need no view.
    runs = list(flat[pieces[0].param : pieces[-1].param + 1])
    if len(runs) != len(pieces):  # tensors without elements have no piece
        runs = [flat[piece.param] for piece in pieces]
    runs[0], runs[-1] = cut(flat, pieces[:1])[0], cut(flat, pieces[-1:])[0]
    return runs
