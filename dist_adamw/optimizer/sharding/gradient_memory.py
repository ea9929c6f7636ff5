"""Flat memory for the gradients of a shard that stays from update to update.

Autograd allocates a gradient in every backward pass. If all of them lived until ``zero_grad``, they would be allocated
and freed at every update, and on a CPU the system would hand out, and clear, every page of them each time. So gradients
are let go during backward: ``param.grad`` becomes a view of this memory, and autograd's serves the next gradient.

A small gradient is copied here when it has arrived, while it is in the processor's cache. A large one is sent from the
memory that autograd gave it, and only the average of the elements that this rank owns is written here; the others keep
what they had. With DDP's ``gradient_as_bucket_view`` gradients stay in memory too. Unlike there, a gradient that the
user holds keeps its values: the next pass gets other memory. And a gradient that was there before the pass began stays
the tensor that it was, since backward adds to it.
"""

from __future__ import annotations

import itertools
import operator
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dist_adamw.optimizer.sharding.memory_order import MemoryOrder
from dist_adamw.optimizer.transport.base import Transport
from dist_adamw.optimizer.transport.layout import FlatLayout, Piece

_gradient = operator.attrgetter("grad")


@dataclass(slots=True)
class SentGradients:
    """The gradients of one bucket.

    Attributes:
        parts: The gradients, 1-D, one tensor for each segment of the bucket.
        into: What receives the averages, one tensor for each owned part of these segments.
        runs: The owned pieces with their averages; None for a piece that is not sent.
        lent: Memory that some parts are in, to be used again, if they are copies.
        outside: The gradients that ``lent`` has copies of, 1-D, by index of the parameter.
        released: Parameters, by index, and their gradients, that are not needed after this bucket.
    """

    parts: list[Tensor]
    into: list[Tensor]
    runs: list[Tensor | None]
    lent: Tensor | None = None
    outside: dict[int, Tensor] = field(default_factory=dict)
    released: list[tuple[int, Tensor]] = field(default_factory=list)


class GradientMemory:
    """Memory for the gradients of ``params``, in the order of ``layout``.

    Args:
        params: Plain tensors of one dtype and device.
        owned: For each bucket, the pieces that this rank owns.
        transport: Sends the buckets.
    """

    def __init__(
        self, params: Sequence[Tensor], layout: FlatLayout, owned: Sequence[Sequence[Piece]], transport: Transport
    ) -> None:
        self._params, self._layout, self._owned, self._transport = params, layout, owned, transport
        segments = [segment for k in range(layout.num_buckets) for segment in transport.segments(k)]
        self._large = {segment.piece.param for segment in segments if segment.piece is not None}
        self._allocate()

    def _allocate(self) -> None:
        like, layout = self._params[0], self._layout
        self._flat = torch.zeros(layout.padded_numel, dtype=like.dtype, device=like.device)
        self._views = [
            _view(self._flat, start, param) for start, param in zip(layout.starts, self._params, strict=False)
        ]
        self._addresses = list(map(Tensor.data_ptr, self._views))
        self._known: dict[int, _Sent] = {}
        self._left: set[int] = set()  # parameters whose gradient is elsewhere and stays there
        self._references = list(map(sys.getrefcount, self._views))
        self._known_uses = self._uses()

    def _run(self, piece: Piece) -> Tensor:
        start = self._layout.starts[piece.param]
        return self._flat[start + piece.start : start + piece.stop]

    def fits(self) -> bool:
        """Return whether the gradients of the parameters as they are now can lie here. Local."""
        flat, alike = self._flat, zip(self._params, self._views, strict=True)
        return all((p.device, p.dtype, p.stride()) == (flat.device, flat.dtype, view.stride()) for p, view in alike)

    # ---------------------------------------------------------------- between passes

    def prepare(self) -> None:
        """Make sure that backward overwrites no gradient that the user holds. Local; with no bucket in flight."""
        grads = list(map(_gradient, self._params))
        are_here = list(map(operator.is_, grads, self._views))
        self._left = set()
        if all(are_here):  # backward adds to them in place, as in torch
            return
        self._left = {
            i for i, (grad, here) in enumerate(zip(grads, are_here, strict=True)) if grad is not None and not here
        }
        del grads
        elsewhere = list(map(operator.not_, are_here))
        has_moved = list(map(Tensor.data_ptr, self._views)) != self._addresses  # by ``param.grad.data = x``
        if has_moved or self._are_held(elsewhere):
            self._allocate()
            return
        # A gradient that the user gave to another parameter must not be overwritten by this one's next gradient.
        params = [self._params[i] for i in self._left]
        inside = [
            (param, grad.clone()) for param in params if (grad := param.grad) is not None and self._contains(grad)
        ]
        for param, clone in inside:
            param.grad = clone

    def _are_held(self, chosen: Sequence[bool]) -> bool:
        """Return whether other objects refer to some of the ``chosen`` views, or to any part of the memory."""
        if self._uses() != self._known_uses:
            return True
        now = map(sys.getrefcount, self._views)
        return list(itertools.compress(now, chosen)) != list(itertools.compress(self._references, chosen))

    def _uses(self) -> int:
        """Return the number of references to the memory: of tensors, and of Python objects."""
        storage = self._flat.untyped_storage()
        return torch._C._storage_Use_Count(storage._cdata) + sys.getrefcount(storage)

    def _contains(self, grad: Tensor) -> bool:
        return grad.layout == torch.strided and grad.untyped_storage().data_ptr() == self._flat.data_ptr()

    # ---------------------------------------------------------------- gradients arrive

    def take_in(self, indices: Sequence[int], *, large: bool) -> None:
        """Copy gradients here, and make ``param.grad`` views of the copies. Local.

        Args:
            indices: Of parameters whose gradients have arrived.
            large: Also copy large ones, because they will not be sent in this pass.
        """
        params, views, grads = [], [], []
        for i in indices:
            param, view = self._params[i], self._views[i]
            grad = param.grad
            if grad is None or grad is view or i in self._left or not (large or i not in self._large):
                continue
            if not _is_plain(grad, view):
                continue
            params.append(param)
            views.append(view)
            grads.append(grad)
        if not params:
            return
        torch._foreach_copy_(views, grads)
        for param, view in zip(params, views, strict=True):
            param.grad = view

    def fill_in_zeros(self, i: int) -> None:
        """Give zeros to parameter ``i``, which has no gradient. Local."""
        view, param = self._views[i], self._params[i]
        param.grad = view.zero_() if view.shape == param.shape else torch.zeros_like(param)

    # ---------------------------------------------------------------- gradients are sent

    def sent(
        self, k: int, indices: Sequence[int], grads: Sequence[Tensor | None], order: MemoryOrder
    ) -> SentGradients | None:
        """Return the gradients of bucket ``k``, or None if they have to be copied together. Local.

        Args:
            indices: The parameters that are sent; the same object at every call for ``k``, or it takes longer.
            grads: Their gradients.
            order: The order of their elements.
        """
        known = self._known.get(k)
        if known is None or known.indices is not indices:
            uses = self._uses()
            known = self._known[k] = self._sent_in(k, indices)
            self._known_uses += self._uses() - uses
        views = [self._views[indices[place]] for place in known.small]
        if not all(map(operator.is_, map(grads.__getitem__, known.small), views)):
            return None
        if list(map(Tensor.data_ptr, views)) != known.addresses:
            return None
        gradients = SentGradients(list(known.parts), list(known.into), list(known.runs))
        for n, place, piece in known.large:
            grad = grads[place]
            if grad is None or not self._add_large(gradients, k, n, piece, grad, order):
                return None
        return gradients

    def _add_large(
        self, gradients: SentGradients, k: int, n: int, piece: Piece, grad: Tensor, order: MemoryOrder
    ) -> bool:
        """Send segment ``n`` of bucket ``k``, ``piece``, from ``grad``; return whether that is possible."""
        i = piece.param
        if grad is self._views[i] and grad.data_ptr() == self._addresses[i]:
            return True
        flat = order.flatten(i, grad)
        if flat.data_ptr() != grad.data_ptr() or flat.dtype != self._flat.dtype:
            return False
        gradients.parts[n] = flat[piece.start : piece.stop]
        if i in self._left or not _is_plain(grad, self._views[i]):
            self._average_in_place(gradients, k, n, i, flat)
        elif piece.start == 0:  # in the bucket that is sent last
            gradients.released.append((i, grad))
        return True

    def _average_in_place(self, gradients: SentGradients, k: int, n: int, i: int, flat: Tensor) -> None:
        for place, part in enumerate(self._transport.owned_parts(k)):
            if part.segment == n:
                gradients.into[place] = part.of(gradients.parts)
        for place, piece in enumerate(self._owned[k]):
            if piece.param == i:
                gradients.runs[place] = flat[piece.start : piece.stop]

    def release(self, i: int, grad: Tensor) -> None:
        """Let ``grad`` go, the gradient of parameter ``i``, of which the averages are here now. Local."""
        param = self._params[i]
        if param.grad is grad:
            param.grad = self._views[i]

    def _sent_in(self, k: int, indices: Sequence[int]) -> _Sent:
        start, _ = self._layout.bucket(k)
        place_of = {i: place for place, i in enumerate(indices)}
        segments = self._transport.segments(k)
        large = [
            (n, place_of[segment.piece.param], segment.piece)
            for n, segment in enumerate(segments)
            if segment.piece is not None and segment.piece.param in place_of
        ]
        small = [place for i, place in place_of.items() if i not in self._large]
        parts = [self._flat[start + segment.start : start + segment.stop] for segment in segments]
        return _Sent(
            indices=indices,
            small=small,
            addresses=[self._addresses[indices[place]] for place in small],
            large=large,
            parts=parts,
            into=[part.of(parts) for part in self._transport.owned_parts(k)],
            runs=[self._run(piece) if piece.param in place_of else None for piece in self._owned[k]],
        )


@dataclass(slots=True)
class _Sent:
    """The part of a bucket that is sent. It holds none of the views, whose references are counted.

    Attributes:
        indices: The parameters.
        small: Places in ``indices`` of small ones, and ``addresses``, those of their views.
        large: Segment, place in ``indices``, and piece of large ones.
        parts: The segments, and ``into``, the owned parts of them, and ``runs``, the owned pieces.
    """

    indices: Sequence[int]
    small: list[int]
    addresses: list[int]
    large: list[tuple[int, int, Piece]]
    parts: list[Tensor]
    into: list[Tensor]
    runs: list[Tensor | None]


def _view(flat: Tensor, start: int, param: Tensor) -> Tensor:
    """Return a view like ``param`` with a version counter of its own, which shows changes to this gradient alone."""
    return flat.as_strided(param.shape, param.stride(), start).data  # ``data`` does not share the counter


def _is_plain(grad: Tensor, view: Tensor) -> bool:
    """Return whether a copy in ``view`` can replace ``grad``."""
    return (
        type(grad) is Tensor
        and grad.layout == torch.strided
        and not grad.requires_grad
        and grad.shape == view.shape
        and grad.dtype == view.dtype
        and grad.untyped_storage().nbytes() == grad.nbytes  # not a part of DDP's buckets, if the user has woken DDP
    )
