"""How the slices of a bucket travel: gradients to their owners, parameters to everybody.

Floor 1: knows layouts, flat tensors and process groups; nothing of optimizers or autograd.

Two ways, the same results up to the order of sums:

    PeerToPeer  gloo: one message for every large run, from where it lies to where it belongs, and
                one for all small runs together. Owners add in rank order.
    Native      other backends: a bucket is packed into one buffer for the backend's own
                reduce-scatter and all-gather.

Measured on gloo with 2 ranks (``benchmarks/transport.py``, ns an element): messages and a local sum
2.1, all-to-all and a local sum 2.6, all-reduce 3.6, its own reduce-scatter 11; messages 1.5,
broadcasts 1.9, its own all-gather 8.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor

from dist_adamw import collectives
from dist_adamw.partition import ALIGNMENT, FlatLayout, Piece

Flat = Sequence["Tensor | None"]  # one 1-D tensor a parameter, None where there is no gradient

DIRECT_NUMEL = 1 << 14  # a shorter run is packed: a copy costs less than a message
BLOCK_NUMEL = 1 << 16  # summed at once: small enough to stay in a core's cache between passes
UNDER_WAY = 2  # buckets travelling at a time, each with its own staging


@dataclass(slots=True)
class Travelling:
    """A bucket on its way. ``held`` must outlive the transfer."""

    bucket: int
    works: list[dist.Work]
    staging: Any
    own: list[Tensor | None] = field(default_factory=list)
    held: list[Tensor] = field(default_factory=list)


class Exchange(Protocol):
    """Moves the buckets of one layout. Every method is collective, in the same order on every rank.

    At most UNDER_WAY buckets travel at a time.

    Attributes:
        tag: Tells messages of several optimizers apart; the same on all ranks.
        remember: Gradients lie in the same memory from update to update, so views of them are kept.
        count: Ranks that gradients are averaged over.
    """

    tag: int
    remember: bool
    count: int

    def start_reduce(self, k: int, flat: Flat) -> Travelling:
        """Send bucket ``k`` of gradients ``flat`` to its owners. They must stay as they are until it is finished."""

    def finish_reduce(self, sent: Travelling, into: list[Tensor] | None, *, add: bool = False) -> None:
        """Average this rank's slice over all ranks.

        Args:
            into: Where each owned piece's average goes; None: over the local gradient it was made from.
            add: Add it to what is there.
        """

    def start_gather(self, k: int) -> Travelling:
        """Send this rank's slice of bucket ``k`` of the parameters, and receive the others'."""

    def finish_gather(self, sent: Travelling) -> None:
        """Wait until the parameters of a bucket are those that their owners have."""


def make_exchange(
    layout: FlatLayout,
    params: list[Tensor],
    *,
    group: dist.ProcessGroup,
    replicas: dist.ProcessGroup | None = None,
    tag: int = 0,
) -> Exchange:
    """The way that suits ``group``'s backend. Local.

    Args:
        layout: Whose buckets travel.
        params: The parameters, as 1-D views.
        group: The ranks that share the layout.
        replicas: The ranks that own the same slices as this one, over which gradients are averaged too.
        tag: Tells messages of several optimizers apart; the same on all ranks.
    """
    kind = PeerToPeer if dist.get_backend(group) == "gloo" else Native
    return kind(layout, params, group=group, replicas=replicas, tag=tag)


class _Base:
    def __init__(
        self,
        layout: FlatLayout,
        params: list[Tensor],
        *,
        group: dist.ProcessGroup,
        replicas: dist.ProcessGroup | None,
        tag: int,
    ) -> None:
        self._layout, self._params = layout, params
        self._group, self._replicas, self.tag = group, replicas, tag
        self.remember = False
        self._rank, self._size = collectives.rank(group), layout.world_size
        self.count = self._size * (1 if replicas is None else collectives.world_size(replicas))
        self._like = params[0]
        self._free: list[Any] = []
        self._cuts: dict[Any, tuple[list[Tensor | None], list[Tensor | None]]] = {}

    def _cut(self, key: Any, pieces: list[Piece], flat: Flat, *, remember: bool = True) -> list[Tensor | None]:
        """The ``pieces`` of ``flat``; the views of last time where its tensors are last time's."""
        if not remember:
            return [None if (base := flat[p.param]) is None else _run(base, p) for p in pieces]
        bases = [flat[p.param] for p in pieces]
        known = self._cuts.get(key)
        if known is not None and all(map(_same, known[0], bases)):
            return known[1]
        views = [None if base is None else _run(base, p) for base, p in zip(bases, pieces, strict=True)]
        self._cuts[key] = (bases, views)
        return views

    def _take(self) -> Any:
        return self._free.pop() if self._free else self._staging()

    def _staging(self) -> Any:
        raise NotImplementedError

    def _empty(self, numel: int) -> Tensor:
        return torch.empty(numel, dtype=self._like.dtype, device=self._like.device)


@dataclass(slots=True)
class _Slice:
    """One rank's slice of one bucket. A piece's offset is its place in a message buffer: small ones first."""

    pieces: list[Piece]
    small: list[int]
    large: list[int]
    small_numel: int
    numel: int

    @classmethod
    def of(cls, pieces: list[Piece]) -> _Slice:
        small = [i for i, p in enumerate(pieces) if p.numel < DIRECT_NUMEL]
        large = [i for i, p in enumerate(pieces) if p.numel >= DIRECT_NUMEL]
        arranged, place, small_numel = list(pieces), 0, 0
        for i in (*small, *large):
            arranged[i] = replace(pieces[i], offset=place)
            place += -(-pieces[i].numel // ALIGNMENT) * ALIGNMENT
            if small and i == small[-1]:
                small_numel = place
        return cls(arranged, small, large, small_numel, place)

    def blocks(self) -> list[list[tuple[int, int, int]]]:
        """Runs ``(piece, start, stop)`` counted from the piece, in groups of BLOCK_NUMEL elements at most."""
        groups: list[list[tuple[int, int, int]]] = []
        room = 0
        for i, piece in enumerate(self.pieces):
            for start in range(0, piece.numel, BLOCK_NUMEL):
                stop = min(start + BLOCK_NUMEL, piece.numel)
                if not groups or stop - start > room:
                    groups.append([])
                    room = BLOCK_NUMEL
                groups[-1].append((i, start, stop))
                room -= stop - start
        return groups


class PeerToPeer(_Base):
    """Messages between pairs of ranks; see `Exchange`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        layout = self._layout
        self._slices = [
            [_Slice.of(layout.pieces(*layout.slice_of(k, r))) for r in range(self._size)]
            for k in range(layout.num_buckets)
        ]
        self._blocks = [slices[self._rank].blocks() for slices in self._slices]
        self._slot_numel = max(slices[self._rank].numel for slices in self._slices)
        self._small_numel = max(part.small_numel for slices in self._slices for part in slices)
        peers = [(self._rank + d) % self._size for d in range(1, self._size)]
        self._peers = list(zip(peers, reversed(peers), strict=True))  # to whom, from whom: all busy at a time

    def _staging(self) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        numel = max(self._slot_numel, self._small_numel)
        return (
            {peer: self._empty(numel) for peer, _ in self._peers},
            {peer: self._empty(self._small_numel) for peer, _ in self._peers},
        )

    def start_reduce(self, k: int, flat: Flat) -> Travelling:
        """See `Exchange`."""
        sent = Travelling(k, [], self._take())
        received, outbox = sent.staging
        mine = self._slices[k][self._rank]
        sent.own = self._cut(("own", k), mine.pieces, flat, remember=self.remember)
        for to, source in self._peers:
            slot = received[source]
            if mine.small:
                self._receive(sent, slot[: mine.small_numel], source)
            for i in mine.large:
                piece = mine.pieces[i]
                self._receive(sent, slot[piece.offset : piece.offset + piece.numel], source)
            theirs = self._slices[k][to]
            views = self._cut(("sent", k, to), theirs.pieces, flat, remember=self.remember)
            if theirs.small:
                self._pack(theirs, views, outbox[to])
                self._send(sent, outbox[to][: theirs.small_numel], to)
            for i in theirs.large:
                view = views[i]
                if view is None:
                    view = torch.zeros(theirs.pieces[i].numel, dtype=self._like.dtype, device=self._like.device)
                sent.held.append(view)
                self._send(sent, view, to)
        return sent

    def finish_reduce(self, sent: Travelling, into: list[Tensor] | None, *, add: bool = False) -> None:
        """See `Exchange`."""
        for work in sent.works:
            work.wait()
        mine, blocks = self._slices[sent.bucket][self._rank], self._blocks[sent.bucket]
        in_place = into is None and self._replicas is None
        if self._replicas is not None:  # one reduction for all blocks, of the message buffer they were summed in
            for block in blocks:
                self._sum(block, sent, in_place=False)
            dist.all_reduce(sent.staging[0][self._summed_in][: mine.numel], group=self._replicas)
        for block in blocks:
            if self._replicas is None:
                total = self._sum(block, sent, in_place=in_place)
            else:
                total = self._terms(self._summed_in, block, sent)
            torch._foreach_div_(total, float(self.count))
            target = []
            for t, (i, start, stop) in zip(total, block, strict=True):
                place = sent.own[i] if into is None else into[i]
                target.append(t if place is None else _span(place, start, stop))
            if add:
                torch._foreach_add_(target, total)
            elif not (in_place and self._rank < 2 and total[0].dtype == self._like.dtype):  # not there already
                torch._foreach_copy_(target, total)
        sent.held.clear()
        self._free.append(sent.staging)

    @property
    def _summed_in(self) -> int:
        """The rank in whose message buffer sums are made: of the first two, the one that is not this one."""
        return 1 if self._rank == 0 else 0

    def _terms(self, rank: int, block: list[tuple[int, int, int]], sent: Travelling) -> list[Tensor]:
        """What ``rank`` adds to one block."""
        if rank == self._rank:
            return [
                self._empty(stop - start).zero_() if (view := sent.own[i]) is None else _span(view, start, stop)
                for i, start, stop in block
            ]
        slot, pieces = sent.staging[0][rank], self._slices[sent.bucket][self._rank].pieces
        return [slot[pieces[i].offset + start : pieces[i].offset + stop] for i, start, stop in block]

    def _sum(self, block: list[tuple[int, int, int]], sent: Travelling, *, in_place: bool) -> list[Tensor]:
        """Add one block in rank order, so that its bits do not depend on who owns it."""
        order = list(range(self._size))
        # Two numbers have one sum, whichever is added to the other.
        if self._rank == (1 if in_place else 0):
            order[:2] = 1, 0
        total = self._terms(order[0], block, sent)
        if self._size > 2 and self._replicas is None and self._like.dtype in (torch.bfloat16, torch.float16):
            total = [t.float() for t in total]  # one rounding at the end, not one for every rank
        for rank in order[1:]:
            torch._foreach_add_(total, self._terms(rank, block, sent))
        return total

    def start_gather(self, k: int) -> Travelling:
        """See `Exchange`."""
        sent = Travelling(k, [], self._take())
        received, outbox = sent.staging
        mine = self._slices[k][self._rank]
        views = self._cut(("gathered", k, self._rank), mine.pieces, self._params)
        packed = outbox[self._peers[0][0]][: mine.small_numel]
        if mine.small:
            self._pack(mine, views, packed)
        for to, source in self._peers:
            theirs = self._slices[k][source]
            places = self._cut(("gathered", k, source), theirs.pieces, self._params)
            if theirs.small:
                self._receive(sent, received[source][: theirs.small_numel], source)
            for i in theirs.large:
                self._receive(sent, places[i], source)
            if mine.small:
                self._send(sent, packed, to)
            for i in mine.large:
                self._send(sent, views[i], to)
        return sent

    def finish_gather(self, sent: Travelling) -> None:
        """See `Exchange`."""
        for work in sent.works:
            work.wait()
        received, _ = sent.staging
        for _, source in self._peers:
            theirs = self._slices[sent.bucket][source]
            if theirs.small:
                places = self._cut(("gathered", sent.bucket, source), theirs.pieces, self._params)
                slot = received[source]
                torch._foreach_copy_(
                    [cast(Tensor, places[i]) for i in theirs.small],
                    [slot[(p := theirs.pieces[i]).offset : p.offset + p.numel] for i in theirs.small],
                )
        self._free.append(sent.staging)

    def _pack(self, part: _Slice, views: list[Tensor | None], buffer: Tensor) -> None:
        targets, sources = [], []
        for i in part.small:
            target = buffer[(p := part.pieces[i]).offset : p.offset + p.numel]
            view = views[i]
            if view is None:
                target.zero_()
            else:
                targets.append(target)
                sources.append(view)
        if targets:
            torch._foreach_copy_(targets, sources)

    def _send(self, sent: Travelling, tensor: Tensor | None, to: int) -> None:
        assert tensor is not None
        work = dist.isend(tensor, group=self._group, group_dst=to, tag=self.tag)
        assert work is not None
        sent.works.append(work)

    def _receive(self, sent: Travelling, tensor: Tensor | None, source: int) -> None:
        assert tensor is not None
        work = dist.irecv(tensor, group=self._group, group_src=source, tag=self.tag)
        assert work is not None
        sent.works.append(work)


class Native(_Base):
    """The backend's reduce-scatter and all-gather; see `Exchange`."""

    def _staging(self) -> Tensor:
        return self._empty(self._layout.bucket_numel).zero_()  # padding travels too

    def _pieces(self, k: int) -> tuple[list[Piece], int, int, int]:
        """All pieces of a bucket, placed in it; the bucket's length; where this rank's slice is."""
        start, stop = self._layout.bucket(k)
        mine = self._layout.slice_of(k, self._rank)
        return self._layout.pieces(start, stop), stop - start, mine[0] - start, mine[1] - start

    def start_reduce(self, k: int, flat: Flat) -> Travelling:
        """See `Exchange`."""
        sent = Travelling(k, [], self._take())
        pieces, numel, first, last = self._pieces(k)
        targets, sources = [], []
        for piece, view in zip(pieces, self._cut(("all", k), pieces, flat, remember=self.remember), strict=True):
            target = _run(sent.staging, replace(piece, start=piece.offset, stop=piece.offset + piece.numel))
            if view is None:
                target.zero_()
            else:
                targets.append(target)
                sources.append(view)
        if targets:
            torch._foreach_copy_(targets, sources)
        owned = self._owned(k, first, last)
        sent.own = self._cut(("own", k), owned, flat, remember=self.remember)
        # torch 2.13 renames reduce_scatter_tensor and warns of the old name.
        scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        average = dist.ReduceOp.AVG if self._replicas is None else dist.ReduceOp.SUM
        buffer = sent.staging[:numel]
        work = scatter(buffer[first:last], buffer, op=average, group=self._group, async_op=True)
        sent.works = [] if work is None else [work]
        return sent

    def _owned(self, k: int, first: int, last: int) -> list[Piece]:
        """This rank's pieces, placed in the bucket."""
        start, _ = self._layout.bucket(k)
        return self._layout.pieces(start + first, start + last, first)

    def finish_reduce(self, sent: Travelling, into: list[Tensor] | None, *, add: bool = False) -> None:
        """See `Exchange`."""
        for work in sent.works:
            work.wait()
        _, _, first, last = self._pieces(sent.bucket)
        if self._replicas is not None:
            dist.all_reduce(sent.staging[first:last], group=self._replicas)
            sent.staging[first:last].div_(self.count)
        targets, sources = [], []
        for i, piece in enumerate(self._owned(sent.bucket, first, last)):
            target = sent.own[i] if into is None else into[i]
            if target is not None:
                targets.append(target)
                sources.append(sent.staging[piece.offset : piece.offset + piece.numel])
        if targets:
            (torch._foreach_add_ if add else torch._foreach_copy_)(targets, sources)
        self._free.append(sent.staging)

    def start_gather(self, k: int) -> Travelling:
        """See `Exchange`."""
        sent = Travelling(k, [], self._take())
        _, numel, first, last = self._pieces(k)
        owned = self._owned(k, first, last)
        buffer = sent.staging[:numel]
        if owned:
            torch._foreach_copy_(
                [buffer[p.offset : p.offset + p.numel] for p in owned],
                cast(list[Tensor], self._cut(("mine", k), owned, self._params)),
            )
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        work = gather(buffer, buffer[first:last], group=self._group, async_op=True)
        sent.works = [] if work is None else [work]
        return sent

    def finish_gather(self, sent: Travelling) -> None:
        """See `Exchange`."""
        for work in sent.works:
            work.wait()
        pieces, _, first, last = self._pieces(sent.bucket)
        others = [p for p in pieces if p.offset + p.numel <= first or p.offset >= last]
        # A piece that is partly this rank's is copied onto itself.
        others += [p for p in pieces if p.offset < last and p.offset + p.numel > first and not _inside(p, first, last)]
        if others:
            torch._foreach_copy_(
                cast(list[Tensor], self._cut(("others", sent.bucket), others, self._params)),
                [sent.staging[p.offset : p.offset + p.numel] for p in others],
            )
        self._free.append(sent.staging)


def _inside(piece: Piece, first: int, last: int) -> bool:
    return first <= piece.offset and piece.offset + piece.numel <= last


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b


def _run(flat: Tensor, piece: Piece) -> Tensor:
    """The elements of ``piece``."""
    return _span(flat, piece.start, piece.stop)


def _span(flat: Tensor, start: int, stop: int) -> Tensor:
    """``flat[start:stop]``; ``flat`` itself where that is all of it, since a view costs a microsecond."""
    return flat if stop - start == flat.numel() else flat[start:stop]
