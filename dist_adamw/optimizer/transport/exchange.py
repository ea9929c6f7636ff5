"""How the slices of a bucket travel: gradients to their owners, parameters to everybody.

Knows layouts, flat tensors and process groups; nothing of optimizers or autograd.

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

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from dist_adamw.optimizer.transport.layout import ALIGNMENT, FlatLayout, Piece
from dist_adamw.ranks import collectives

T = TypeVar("T")
Flat = Sequence["Tensor | None"]  # one 1-D tensor a parameter, None where there is no gradient

DIRECT_NUMEL = 1 << 14  # a shorter run is packed: a copy costs less than a message
BLOCK_NUMEL = 1 << 16  # summed at once: small enough to stay in a core's cache between passes
UNDER_WAY = 2  # buckets travelling at a time, each with its own staging


_GONE = (
    "A rank that this one exchanges gradients or parameters with has ended, or is somewhere else: it skipped a "
    "backward pass or a step() that others made, or left the loop before them. Every rank must make the same ones."
)


@dataclass(slots=True)
class Travelling:
    """A bucket on its way. ``held`` must outlive the transfer."""

    bucket: int
    works: list[dist.Work]
    staging: Any
    own: list[Tensor | None] = field(default_factory=list)
    held: list[Tensor] = field(default_factory=list)
    gathered: Flat | None = None  # where slices are received, if not in the parameters

    def wait(self) -> None:
        """Wait until everything has been sent and received.

        Raises:
            RuntimeError: a rank has ended, or did not take part within the process group's timeout.
        """
        try:
            for work in self.works:
                work.wait()
        except RuntimeError as error:
            raise RuntimeError(f"{error}\n{_GONE}") from error


class Exchange(ABC):
    """Moves the buckets of one layout. Every method is collective, in the same order on every rank.

    At most UNDER_WAY buckets travel at a time.

    Attributes:
        tag: Tells messages of several optimizers apart; the same on all ranks.
        count: Ranks that gradients are averaged over.
    """

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
        self._rank, self._size = collectives.rank(group), layout.world_size
        self.count = self._size * (1 if replicas is None else collectives.world_size(replicas))
        self._like = params[0]
        self._free: list[Any] = []
        self._views: dict[Any, list[Tensor]] = {}

    def _kept(self, key: Any, make: Callable[[], list[Tensor]]) -> list[Tensor]:
        """Views that stay valid: of parameters, or of staging."""
        views = self._views.get(key)
        if views is None:
            views = self._views[key] = make()
        return views

    def _params_of(self, key: Any, pieces: list[Piece]) -> list[Tensor]:
        return self._kept(("params", *key), lambda: cast(list[Tensor], cut(self._params, pieces)))

    def _take(self) -> Any:
        return self._free.pop() if self._free else self._staging()

    @abstractmethod
    def _staging(self) -> Any:
        """Memory for one bucket on its way."""

    def _empty(self, numel: int) -> Tensor:
        return torch.empty(numel, dtype=self._like.dtype, device=self._like.device)

    @abstractmethod
    def start_reduce(self, k: int, flat: Flat) -> Travelling:
        """Send bucket ``k`` of gradients ``flat`` to its owners. They must stay as they are until it is finished."""

    @abstractmethod
    def finish_reduce(self, sent: Travelling, into: list[Tensor] | None, *, add: bool = False) -> None:
        """Average this rank's slice over all ranks.

        Args:
            into: Where each owned piece's average goes; None: over the local gradient it was made from.
            add: Add it to what is there.
        """

    @abstractmethod
    def start_gather(self, k: int, flat: Flat | None = None) -> Travelling:
        """Send this rank's slice of bucket ``k``, and receive the others'.

        Args:
            flat: Of these tensors, None at the same places on every rank; default: of the parameters.
        """

    @abstractmethod
    def finish_gather(self, sent: Travelling) -> None:
        """Wait until what was gathered is what its owners have."""

    def _gathered(self, sent: Travelling, key: Any, pieces: list[Piece]) -> Sequence[Tensor | None]:
        """The runs that a gather reads or writes."""
        return self._params_of(key, pieces) if sent.gathered is None else cut(sent.gathered, pieces)


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
            place += pieces[i].numel
            if small and i == small[-1]:
                small_numel = place
                place = -(-place // ALIGNMENT) * ALIGNMENT
        return cls(arranged, small, large, small_numel, place)

    def small_of(self, views: Sequence[T]) -> list[T]:
        """The items of the small pieces."""
        return list(views) if not self.large else [views[i] for i in self.small]


class PeerToPeer(Exchange):
    """Messages between pairs of ranks; see `Exchange`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        layout = self._layout
        self._slices = [
            [_Slice.of(layout.pieces(*layout.slice_of(k, r))) for r in range(self._size)]
            for k in range(layout.num_buckets)
        ]
        self._slot_numel = max((slices[self._rank].numel for slices in self._slices), default=0)
        self._small_numel = max((part.small_numel for slices in self._slices for part in slices), default=0)
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
        sent.own = cut_slice(flat, mine.pieces)
        for to, source in self._peers:
            slot = received[source]
            if mine.small:
                self._receive(sent, slot[: mine.small_numel], source)
            if mine.large:
                places = self._places(slot, k, self._rank)
                for i in mine.large:
                    self._receive(sent, places[i], source)
            theirs = self._slices[k][to]
            views = cut_slice(flat, theirs.pieces)
            if theirs.small:
                self._pack(k, to, views, outbox[to])
                self._send(sent, outbox[to][: theirs.small_numel], to)
            for i in theirs.large:
                view = views[i]
                if view is None:
                    view = self._empty(theirs.pieces[i].numel).zero_()
                sent.held.append(view)
                self._send(sent, view, to)
        return sent

    def finish_reduce(self, sent: Travelling, into: list[Tensor] | None, *, add: bool = False) -> None:
        """See `Exchange`."""
        sent.wait()
        mine = self._slices[sent.bucket][self._rank]
        slots, outbox = sent.staging
        # Where no gradient was, nothing is kept of the average.
        own = [self._empty(p.numel).zero_() if v is None else v for p, v in zip(mine.pieces, sent.own, strict=True)]
        target = own if into is None else into
        summed = slots[self._summed_in]
        places = self._places(summed, sent.bucket, self._rank)
        if mine.small:  # side by side, they are summed as one
            packed = outbox[self._peers[0][0]][: mine.small_numel]
            torch.cat(mine.small_of(own), out=packed)
            self._average(self._terms(slots, packed, 0), summed[: mine.small_numel])
        for i in mine.large:
            terms = self._terms(slots, own[i], mine.pieces[i].offset)
            direct = self._replicas is None and not add
            self._average(terms, target[i] if direct else places[i])
        stored = list(mine.small)
        if self._replicas is not None:
            dist.all_reduce(summed[: mine.numel], group=self._replicas)
            summed[: mine.numel].div_(self.count)
        if self._replicas is not None or add:
            stored += mine.large
        if stored:
            targets, averages = [target[i] for i in stored], [places[i] for i in stored]
            (torch._foreach_add_ if add else torch._foreach_copy_)(targets, averages)
        sent.held.clear()
        self._free.append(sent.staging)

    @property
    def _summed_in(self) -> int:
        """The rank in whose message buffer sums are made: of the first two, the one that is not this one."""
        return 1 if self._rank == 0 else 0

    def _terms(self, slots: dict[int, Tensor], own: Tensor, offset: int) -> list[Tensor]:
        """What each rank adds to a run, in rank order."""
        return [own if r == self._rank else slots[r][offset : offset + own.numel()] for r in range(self._size)]

    def _average(self, terms: list[Tensor], out: Tensor) -> None:
        """Write the average of ``terms`` to ``out``, which may be any of them; with replicas their sum.

        Added in rank order, so that the bits do not depend on who owns an element, and a block at
        a time, which stays in the cache from one term to the next.
        """
        scale = 1.0 if self._replicas is not None else float(self.count)
        wide = len(terms) > 2 and self._replicas is None and out.dtype in (torch.bfloat16, torch.float16)
        for start in range(0, out.numel(), BLOCK_NUMEL):
            first, second, *rest = [term[start : start + BLOCK_NUMEL] for term in terms]
            block = out[start : start + BLOCK_NUMEL]
            if wide:  # one rounding at the end, not one for every rank
                total = first.float().add_(second)
            elif not rest:
                total = torch.add(first, second, out=block)
            else:  # two numbers have one sum, so the first two may be added in either's place
                total = second.add_(first) if self._rank == 0 else first.add_(second)
            for term in rest:
                total.add_(term)
            if scale != 1.0:
                total.div_(scale)
            if total is not block:
                block.copy_(total)

    def start_gather(self, k: int, flat: Flat | None = None) -> Travelling:
        """See `Exchange`."""
        sent = Travelling(k, [], self._take(), gathered=flat)
        received, outbox = sent.staging
        mine = self._slices[k][self._rank]
        views = self._gathered(sent, (k, self._rank), mine.pieces)
        buffer = outbox[self._peers[0][0]]
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

    def finish_gather(self, sent: Travelling) -> None:
        """See `Exchange`."""
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
        """Where in a message buffer the pieces of ``rank``'s slice lie."""
        pieces = self._slices[k][rank].pieces
        key = ("staged", id(buffer), k, rank)  # staging lives as long as this does
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


class Native(Exchange):
    """The backend's reduce-scatter and all-gather; see `Exchange`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._known: dict[int, tuple[list[Piece], int, int, int]] = {}

    def _staging(self) -> Tensor:
        return self._empty(self._layout.bucket_numel).zero_()  # padding travels too

    def _pieces(self, k: int) -> tuple[list[Piece], int, int, int]:
        """All pieces of a bucket, placed in it; the bucket's length; where this rank's slice is."""
        if k not in self._known:
            start, stop = self._layout.bucket(k)
            mine = self._layout.slice_of(k, self._rank)
            self._known[k] = self._layout.pieces(start, stop), stop - start, mine[0] - start, mine[1] - start
        return self._known[k]

    def start_reduce(self, k: int, flat: Flat) -> Travelling:
        """See `Exchange`."""
        sent = Travelling(k, [], self._take())
        pieces, numel, first, last = self._pieces(k)
        targets, sources = [], []
        for piece, view in zip(pieces, cut_slice(flat, pieces), strict=True):
            target = sent.staging[piece.offset : piece.offset + piece.numel]
            if view is None:
                target.zero_()
            else:
                targets.append(target)
                sources.append(view)
        if targets:
            torch._foreach_copy_(targets, sources)
        owned = self._owned(k, first, last)
        sent.own = cut_slice(flat, owned)
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
        sent.wait()
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

    def start_gather(self, k: int, flat: Flat | None = None) -> Travelling:
        """See `Exchange`."""
        sent = Travelling(k, [], self._take(), gathered=flat)
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

    def finish_gather(self, sent: Travelling) -> None:
        """See `Exchange`."""
        sent.wait()
        pieces, _, first, last = self._pieces(sent.bucket)
        others = [p for p in pieces if p.offset + p.numel <= first or p.offset >= last]
        # A piece that is partly this rank's is copied onto itself.
        others += [p for p in pieces if p.offset < last and p.offset + p.numel > first and not _inside(p, first, last)]
        if others:
            targets = self._gathered(sent, (sent.bucket, "others"), others)
            _copy_present(targets, [sent.staging[p.offset : p.offset + p.numel] for p in others])
        self._free.append(sent.staging)


def _copy_present(targets: Sequence[Tensor | None], sources: Sequence[Tensor]) -> None:
    """Copy each source to its target, where there is one."""
    if any(target is None for target in targets):
        pairs = [(target, source) for target, source in zip(targets, sources, strict=True) if target is not None]
        targets, sources = [target for target, _ in pairs], [source for _, source in pairs]
    if targets:
        torch._foreach_copy_(cast(list[Tensor], list(targets)), list(sources))


class Rollcall:
    """A few whole numbers that every rank tells every other, on the channel that buckets travel on. Collective.

    Messages of one tag arrive in the order in which they were sent. A rank that begins to send gradients where another
    one updates therefore receives the other's numbers in place of a bucket, and both see that they differ.

    Args:
        group: Ranks over gloo.
        tag: Of the buckets.
        width: Numbers in a message.
    """

    def __init__(self, group: dist.ProcessGroup, tag: int, width: int) -> None:
        self.group, self.tag, self._width = group, tag, width
        self._rank, self._size = collectives.rank(group), collectives.world_size(group)
        self._under_way: list[tuple[Travelling, Tensor]] = []

    def post(self, numbers: Sequence[int]) -> None:
        """Send ``numbers``, filled up with zeros, and begin to receive the others'."""
        table = torch.zeros(self._size, self._width, dtype=torch.int64)
        table[self._rank, : len(numbers)] = torch.tensor(numbers, dtype=torch.int64)
        sent = Travelling(0, [], None)
        for distance in range(1, self._size):
            to, source = (self._rank + distance) % self._size, (self._rank - distance) % self._size
            for work in (
                dist.irecv(table[source], group=self.group, group_src=source, tag=self.tag),
                dist.isend(table[self._rank], group=self.group, group_dst=to, tag=self.tag),
            ):
                assert work is not None
                sent.works.append(work)
        self._under_way.append((sent, table))

    @property
    def is_under_way(self) -> bool:
        """Whether there is a `post` without an `answer`."""
        return bool(self._under_way)

    def answer(self) -> list[list[int]]:
        """The numbers of the oldest `post`, by rank."""
        sent, table = self._under_way[0]
        sent.wait()
        del self._under_way[0]  # not before: the transfer needs the memory
        numbers: list[list[int]] = table.tolist()
        return numbers


def _inside(piece: Piece, first: int, last: int) -> bool:
    return first <= piece.offset and piece.offset + piece.numel <= last


def cut(flat: Flat, pieces: list[Piece]) -> list[Tensor | None]:
    """The ``pieces`` of ``flat``; a tensor itself where a piece is all of it, since a view costs a microsecond."""
    return [
        base if (base := flat[p.param]) is None or p.numel == base.numel() else base[p.start : p.stop] for p in pieces
    ]


def cut_slice(flat: Flat, pieces: list[Piece]) -> list[Tensor | None]:
    """`cut` of pieces that lie side by side, as a bucket's and a slice's: only the first and the last can be parts."""
    if not pieces:
        return []
    runs = list(flat[pieces[0].param : pieces[-1].param + 1])
    if len(runs) != len(pieces):  # tensors without elements between them
        runs = [flat[piece.param] for piece in pieces]
    runs[0], runs[-1] = cut(flat, pieces[:1])[0], cut(flat, pieces[-1:])[0]
    return runs
