"""Transport by the backend's own reduce-scatter and all-gather, with each bucket packed into one buffer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from dist_adamw.optimizer.transport.base import Flat, InFlightBucket, OwnedPart, Transport, _copy_present
from dist_adamw.optimizer.transport.layout import Piece, Segment
from dist_adamw.optimizer.transport.tree_sum import TreeSum


class _Arrival:
    """The end of work that runs on its own stream.

    Args:
        begun_on: The stream that the results belong to.
    """

    def __init__(self, stream: torch.cuda.Stream, begun_on: torch.cuda.Stream) -> None:
        self._begun_on = begun_on
        self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._event.record(stream)

    def wait(self) -> None:
        """Make the current stream wait, and the one on which the work was begun, in case that is another."""
        self._begun_on.wait_event(self._event)
        torch.cuda.current_stream(self._begun_on.device).wait_event(self._event)


class CollectiveTransport(Transport):
    """The backend's reduce-scatter and all-gather; see `Transport`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._known: dict[int, tuple[list[Piece], int, int, int]] = {}
        self._unchained: InFlightBucket | None = None  # its all-reduce over replicas has not been started yet
        self._side: torch.cuda.Stream | None = None

    def _staging(self) -> Tensor:
        return self._empty(self._layout.bucket_numel).zero_()  # padding is sent too

    def _pieces(self, k: int) -> tuple[list[Piece], int, int, int]:
        """Return all pieces of a bucket by offset in it, its length, and start and stop of this rank's slice."""
        if k not in self._known:
            start, stop = self._layout.bucket(k)
            mine = self._layout.slice_of(k, self._rank)
            self._known[k] = self._layout.pieces(start, stop), stop - start, mine[0] - start, mine[1] - start
        return self._known[k]

    def segments(self, k: int) -> list[Segment]:
        """See `Transport`: one, since a reduce-scatter needs one buffer, padding included."""
        start, stop = self._layout.bucket(k)
        return [Segment(0, stop - start)]

    def owned_parts(self, k: int) -> list[OwnedPart]:
        """See `Transport`."""
        _, _, first, last = self._pieces(k)
        return [OwnedPart(0, first, last, 0)]

    def start_reduce(self, k: int, parts: Sequence[Tensor]) -> InFlightBucket:
        """See `Transport`."""
        self._chain()
        (buffer,) = parts
        if buffer.dtype != self._reduce_dtype:
            buffer = buffer.to(self._reduce_dtype)
        sent = InFlightBucket(k, [], None, [buffer])
        if self._reproducible:
            sent.staging = torch.empty_like(buffer)
            work = dist.all_to_all_single(sent.staging, buffer, group=self._group, async_op=True)
            sent.works = [] if work is None else [work]
            return sent
        _, _, first, last = self._pieces(k)
        # torch 2.13 renamed reduce_scatter_tensor, and warns about the old name.
        scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        # With replicas, sum both times and divide once at the end.
        average = dist.ReduceOp.AVG if self._replicas is None else dist.ReduceOp.SUM
        work = scatter(buffer[first:last], buffer, op=average, group=self._group, async_op=True)
        sent.works = [] if work is None else [work]
        if self._replicas is not None:
            self._unchained = sent
            if buffer.is_cuda:  # streams wait for each other, so the host need not come back for it
                with torch.cuda.stream(self._side_stream(buffer.device)):
                    self._chain()
        return sent

    def _side_stream(self, device: torch.device) -> torch.cuda.Stream:
        """Return a stream that may wait for a collective while the current one computes."""
        if self._side is None:
            self._side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        return self._side

    def _chain(self) -> None:
        """Start to sum over the replicas what the last reduce-scatter has summed over the shards. Collective.

        In the same order on every rank: a bucket's all-reduce comes before the next bucket's reduce-scatter. On a host
        it waits for the reduce-scatter, which is mostly over when the next bucket is complete.
        """
        sent, self._unchained = self._unchained, None
        if sent is None:
            return
        sent.wait()
        own = self.owned_parts(sent.bucket)[0].of(sent.parts)
        work = dist.all_reduce(own, group=self._replicas, async_op=True)
        sent.works = [] if work is None else [work]

    def finish_reduce(self, sent: InFlightBucket, into: Sequence[Tensor], *, add: bool = False) -> None:
        """See `Transport`."""
        if sent is self._unchained:
            self._chain()
        sent.wait()
        (out,) = into
        own = self.owned_parts(sent.bucket)[0].of(sent.parts)
        if self._replicas is not None:
            own.div_(self.count)
        if add:
            out.add_(own)
        elif out.data_ptr() != own.data_ptr():
            out.copy_(own)
        sent.parts = ()

    def finish_terms(self, sent: InFlightBucket, sums: TreeSum) -> None:
        """See `Transport`."""
        sent.wait()
        sums.add(self._size, [(0, sent.staging.chunk(self._size))])
        sent.parts = ()

    def _owned(self, k: int, first: int, last: int) -> list[Piece]:
        """Return this rank's pieces by offset in the bucket."""
        start, _ = self._layout.bucket(k)
        return self._layout.pieces(start + first, start + last, first)

    def start_gather(self, k: int, flat: Flat | None = None) -> InFlightBucket:
        """See `Transport`."""
        sent = InFlightBucket(k, [], self._take(), gathered=flat)
        _, numel, first, last = self._pieces(k)
        owned = self._owned(k, first, last)
        buffer = sent.staging[:numel]
        mine = self._gathered(sent, (k, "mine"), owned)
        there = [i for i, view in enumerate(mine) if view is not None]
        if there:
            torch._foreach_copy_(
                [buffer[owned[i].offset : owned[i].offset + owned[i].numel] for i in there],
                [cast(Tensor, mine[i]) for i in there],
            )
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        work = gather(buffer, buffer[first:last], group=self._group, async_op=True)
        sent.works = [] if work is None else [work]
        return sent

    def finish_gather(self, sent: InFlightBucket) -> None:
        """See `Transport`."""
        sent.wait()
        if sent.staging is None:  # it was gathered aside
            return
        pieces, _, first, last = self._pieces(sent.bucket)
        others = [p for p in pieces if p.offset + p.numel <= first or p.offset >= last]
        # Of a piece that is partly this rank's, the own part is copied onto itself.
        others += [p for p in pieces if p.offset < last and p.offset + p.numel > first and not _inside(p, first, last)]
        if others:
            targets = self._gathered(sent, (sent.bucket, "others"), others)
            _copy_present(targets, [sent.staging[p.offset : p.offset + p.numel] for p in others])
        self._free.append(sent.staging)

    def gather_aside(self, k: int) -> InFlightBucket | None:
        """See `Transport`."""
        device = self._like.device
        if device.type != "cuda":
            return None
        current = torch.cuda.current_stream(device)
        side = self._side_stream(device)
        side.wait_stream(current)  # which computes the bucket
        # Packing and unpacking are on that stream too, so two staging buffers serve any number of buckets.
        with torch.cuda.stream(side):
            self.finish_gather(self.start_gather(k))
        return InFlightBucket(k, [cast(dist.Work, _Arrival(side, current))], None)


def _inside(piece: Piece, first: int, last: int) -> bool:
    return first <= piece.offset and piece.offset + piece.numel <= last
