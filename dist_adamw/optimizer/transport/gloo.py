"""Transport over gloo: messages between pairs of ranks.

Each large run is a message, sent in place. Small gradients lie side by side, and are one message up to the next large
one; all small runs of parameters are packed into one. Owners sum in rank order, so that results do not depend on the
owner.

Measured with 2 ranks (``benchmarks/transport.py``, ns per element). Reducing: messages and a local sum 2.1, all-to-all
and a local sum 2.6, all-reduce 3.6, gloo's own reduce-scatter 11. Gathering: messages 1.5, broadcasts 1.9, gloo's own
all-gather 8.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from dist_adamw.optimizer.transport.base import Flat, InFlightBucket, OwnedPart, T, Transport, _copy_present
from dist_adamw.optimizer.transport.layout import Piece, Segment
from dist_adamw.optimizer.transport.tree_sum import BLOCK_NUMEL, TreeSum

DIRECT_NUMEL = 1 << 14  # shorter runs are packed, since a copy costs less than a message


@dataclass(slots=True)
class _Slice:
    """One rank's slice of one bucket. Offsets of pieces are positions in a message buffer, small pieces first."""

    pieces: list[Piece]
    small: list[int]
    large: list[int]
    small_numel: int

    @classmethod
    def of(cls, pieces: list[Piece]) -> _Slice:
        small = [i for i, p in enumerate(pieces) if p.numel < DIRECT_NUMEL]
        large = [i for i, p in enumerate(pieces) if p.numel >= DIRECT_NUMEL]
        arranged, place, small_numel = list(pieces), 0, 0
        for i in (*small, *large):
            arranged[i] = replace(pieces[i], offset=place)
            place += pieces[i].numel
            if small and i == small[-1]:
                small_numel = place
        return cls(arranged, small, large, small_numel)

    def small_of(self, views: Sequence[T]) -> list[T]:
        """Return the items of ``views`` that belong to small pieces."""
        return list(views) if not self.large else [views[i] for i in self.small]


class GlooTransport(Transport):
    """Messages between pairs of ranks; see `Transport`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        layout = self._layout
        self._slices = [
            [_Slice.of(layout.pieces(*layout.slice_of(k, r))) for r in range(self._size)]
            for k in range(layout.num_buckets)
        ]
        self._segments = [layout.segments(k, DIRECT_NUMEL) for k in range(layout.num_buckets)]
        self._parts = [[self._parts_of(k, rank) for rank in range(self._size)] for k in range(layout.num_buckets)]
        self._slot_numel = layout.bucket_numel // self._size
        self._small_numel = max((part.small_numel for slices in self._slices for part in slices), default=0)
        self._is_recast = self._reduce_dtype != self._like.dtype
        # Sums of 16-bit gradients are in fp32 anyway, so wider messages would only have more zeros.
        self._sent_dtype = min(self._like.dtype, self._reduce_dtype, key=lambda dtype: dtype.itemsize)
        peers = [(self._rank + d) % self._size for d in range(1, self._size)]
        # Pairs (send to, receive from). In step d each rank sends to rank + d, so every rank is busy in every step.
        self._peers = list(zip(peers, reversed(peers), strict=True))

    def _parts_of(self, k: int, rank: int) -> list[OwnedPart]:
        """Return ``rank``'s parts of the segments of bucket ``k``."""
        first, _ = self._layout.bucket(k)
        start, stop = (place - first for place in self._layout.slice_of(k, rank))
        found = []
        for n, segment in enumerate(self._segments[k]):
            a, b = max(start, segment.start), min(stop, segment.stop)
            if a < b:
                found.append(OwnedPart(n, a - segment.start, b - segment.start, a - start))
        return found

    def _staging(self) -> tuple[dict[int, Tensor], Tensor]:
        numel = max(self._slot_numel, self._small_numel)
        return {peer: self._empty(numel) for peer, _ in self._peers}, self._empty(self._small_numel)

    def segments(self, k: int) -> list[Segment]:
        """See `Transport`."""
        return self._segments[k]

    def owned_parts(self, k: int) -> list[OwnedPart]:
        """See `Transport`."""
        return self._parts[k][self._rank]

    def start_reduce(self, k: int, parts: Sequence[Tensor]) -> InFlightBucket:
        """See `Transport`."""
        sent = InFlightBucket(k, [], self._take(), parts)
        received = {source: slot.view(self._sent_dtype) for source, slot in sent.staging[0].items()}
        for to, source in self._peers:
            for part in self._parts[k][self._rank]:
                self._receive(sent, part.in_slice(received[source]), source)
            for part in self._parts[k][to]:
                self._send(sent, part.of(parts).to(self._sent_dtype), to)
        return sent

    def finish_reduce(self, sent: InFlightBucket, into: Sequence[Tensor], *, add: bool = False) -> None:
        """See `Transport`."""
        for (_, terms), out in zip(self._await_terms(sent), into, strict=True):
            # Sums are added to ``into``, or to those of replicas, only when they are complete.
            if self._is_recast:
                total = torch.empty_like(out, dtype=torch.float32)
            else:
                total = terms[self._summed_in] if add or self._replicas is not None else out
            self._average(terms, total)
            if self._replicas is not None:
                dist.all_reduce(total, group=self._replicas)
                total.div_(self.count)
            if total is not out:
                out.add_(total) if add else out.copy_(total)
        sent.parts = ()
        self._give_back(sent)

    def finish_terms(self, sent: InFlightBucket, sums: TreeSum) -> None:
        """See `Transport`."""
        sums.add(self._size, [(part.offset, terms) for part, terms in self._await_terms(sent)])
        sent.parts = ()
        self._give_back(sent)

    def _await_terms(self, sent: InFlightBucket) -> list[tuple[OwnedPart, list[Tensor]]]:
        """Wait for a bucket; return the owned parts with the gradient of every rank, in rank order."""
        self._await_parts(sent)
        received = {source: slot.view(self._sent_dtype) for source, slot in sent.staging[0].items()}
        found = []
        for part in self.owned_parts(sent.bucket):
            own = part.of(sent.parts).to(self._sent_dtype)  # rounded as the others' are, so the owner does not matter
            terms = [own if rank == self._rank else part.in_slice(received[rank]) for rank in range(self._size)]
            found.append((part, terms))
        return found

    def _await_parts(self, sent: InFlightBucket) -> None:
        """Wait until the parts of every rank have arrived."""
        sent.wait()

    def _give_back(self, sent: InFlightBucket) -> None:
        """Use the staging memory of ``sent`` for other buckets."""
        self._free.append(sent.staging)

    @property
    def _summed_in(self) -> int:
        """The rank whose message buffer holds sums that are not complete."""
        # Of the first two ranks the other one, since `_average` begins with their terms and may overwrite them.
        return 1 if self._rank == 0 else 0

    def _average(self, terms: list[Tensor], out: Tensor) -> None:
        """Write the average of ``terms`` (with replicas: their sum) to ``out``, which may be any of them.

        Terms are added in rank order, so that the bits do not depend on the owner, and block by block, so that a block
        stays in the cache from one term to the next.
        """
        scale = 1.0 if self._replicas is not None else float(self.count)
        wide = self._is_recast or self._sums_in_fp32(len(terms), out.dtype)
        for start in range(0, out.numel(), BLOCK_NUMEL):
            first, second, *rest = [term[start : start + BLOCK_NUMEL] for term in terms]
            block = out[start : start + BLOCK_NUMEL]
            if wide:
                total = first.float().add_(second)
            elif not rest:
                total = torch.add(first, second, out=block)
            else:  # a + b has the bits of b + a, so the sum may replace either term; keep this rank's own gradient
                total = second.add_(first) if self._rank == 0 else first.add_(second)
            for term in rest:
                total.add_(term)
            if scale != 1.0:
                total.div_(scale)
            if total is not block:
                block.copy_(total)

    def _sums_in_fp32(self, num_terms: int, dtype: torch.dtype) -> bool:
        """Return whether to sum 16-bit terms in fp32, which rounds once at the end instead of once per rank."""
        return num_terms > 2 and self._replicas is None and dtype in (torch.bfloat16, torch.float16)

    def start_gather(self, k: int, flat: Flat | None = None) -> InFlightBucket:
        """See `Transport`."""
        sent = InFlightBucket(k, [], self._take(), gathered=flat)
        received, buffer = sent.staging
        mine = self._slices[k][self._rank]
        views = self._gathered(sent, (k, self._rank), mine.pieces)
        if mine.small:
            self._pack(k, self._rank, views, buffer)
        for to, source in self._peers:
            theirs = self._slices[k][source]
            if theirs.small:
                self._receive(sent, received[source][: theirs.small_numel], source)
            if theirs.large:
                places = self._gathered(sent, (k, source), theirs.pieces)
                for i in theirs.large:
                    if places[i] is not None:
                        self._receive(sent, places[i], source)
            if mine.small:
                self._send(sent, buffer[: mine.small_numel], to)
            for i in mine.large:
                if views[i] is not None:
                    self._send(sent, views[i], to)
        return sent

    def finish_gather(self, sent: InFlightBucket) -> None:
        """See `Transport`."""
        sent.wait()
        received, _ = sent.staging
        for _, source in self._peers:
            theirs = self._slices[sent.bucket][source]
            if theirs.small:
                targets = theirs.small_of(self._gathered(sent, (sent.bucket, source), theirs.pieces))
                places = theirs.small_of(self._places(received[source], sent.bucket, source))
                _copy_present(targets, places)
        self._free.append(sent.staging)

    def _places(self, buffer: Tensor, k: int, rank: int) -> list[Tensor]:
        """Return views of a message buffer, one for each piece of ``rank``'s slice."""
        pieces = self._slices[k][rank].pieces
        key = ("staged", id(buffer), k, rank)  # staging memory is never freed, so its id is not reused
        return self._kept(key, lambda: [buffer[p.offset : p.offset + p.numel] for p in pieces])

    def _pack(self, k: int, rank: int, views: Sequence[Tensor | None], buffer: Tensor) -> None:
        part = self._slices[k][rank]
        sources = part.small_of(views)
        if any(view is None for view in sources):
            places = part.small_of(self._places(buffer, k, rank))
            for place, view in zip(places, sources, strict=True):
                if view is None:
                    place.zero_()
            there = [i for i, view in enumerate(sources) if view is not None]
            places, sources = [places[i] for i in there], [sources[i] for i in there]
            if not there:
                return
            torch._foreach_copy_(places, cast(list[Tensor], sources))
        else:
            torch.cat(cast(list[Tensor], sources), out=buffer[: part.small_numel])

    def _send(self, sent: InFlightBucket, tensor: Tensor | None, to: int) -> None:
        assert tensor is not None
        work = dist.isend(tensor, group=self._group, group_dst=to, tag=self.channel.tag)
        assert work is not None
        sent.works.append(work)

    def _receive(self, sent: InFlightBucket, tensor: Tensor | None, source: int) -> None:
        assert tensor is not None
        work = dist.irecv(tensor, group=self._group, group_src=source, tag=self.channel.tag)
        assert work is not None
        sent.works.append(work)
