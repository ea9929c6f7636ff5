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
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dist_adamw.optimizer.kernels.foreach import zeros_apart
from dist_adamw.optimizer.sharding.bucket_gradients import BucketGradients, BucketPacker
from dist_adamw.optimizer.sharding.memory_order import MemoryOrder
from dist_adamw.optimizer.transport.layout import FlatLayout, Piece

_PLACE = 5  # in a memory page; state has 1 to 4
# glibc takes larger blocks from the system each time, and gives them back when they are freed: letting such a gradient
# go during backward would spare no page, and its average would be written to memory that is not in the cache.
OWN_BLOCK_BYTES = 32 << 20
_gradient, _version = operator.attrgetter("grad"), operator.attrgetter("_version")


class GradientMemory:
    """Memory for the gradients of ``params``, in the order of ``layout``.

    Args:
        params: Plain tensors of one dtype and device.
        owned: For each bucket, the pieces that this rank owns.
        packer: Lays out buckets of which some small gradients are elsewhere.
    """

    def __init__(
        self, params: Sequence[Tensor], layout: FlatLayout, owned: Sequence[Sequence[Piece]], packer: BucketPacker
    ) -> None:
        self._params, self._layout, self._owned, self._packer = params, layout, owned, packer
        self._left: set[int] = set()  # parameters whose gradient is elsewhere and stays there
        self._allocate()

    def _allocate(self) -> None:
        like, layout = self._params[0], self._layout
        self._flat = zeros_apart(layout.padded_numel, _PLACE, dtype=like.dtype, device=like.device, untouched=True)
        self._views = [self._view(i) for i in range(len(self._params))]
        self._addresses = list(map(Tensor.data_ptr, self._views))
        self._zero_at = list(map(_version, self._views))  # versions at which elements of other ranks were zero
        self._known: dict[int, _Known] = {}
        self._references = list(map(sys.getrefcount, self._views))
        self._known_uses = self._uses()

    def _view(self, i: int) -> Tensor:
        """Return a view like parameter ``i`` with its own version counter, which shows changes to this gradient."""
        param = self._params[i]
        start = self._flat.storage_offset() + self._layout.starts[i]
        return self._flat.as_strided(param.shape, param.stride(), start).data

    def _run(self, piece: Piece) -> Tensor:
        start = self._layout.starts[piece.param]
        # Detached: a view that autograd could follow takes 320 bytes more, and there may be thousands.
        return self._flat[start + piece.start : start + piece.stop].detach()

    def fits(self) -> bool:
        """Return whether the gradients of the parameters as they are now can lie here. Local."""
        flat, alike = self._flat, zip(self._params, self._views, strict=True)
        return all((p.device, p.dtype, p.stride()) == (flat.device, flat.dtype, view.stride()) for p, view in alike)

    # ---------------------------------------------------------------- between passes

    def prepare(self) -> None:
        """Make sure that a pass overwrites no gradient that the user holds. Local; with no bucket in flight."""
        grads = list(map(_gradient, self._params))
        are_here = list(map(operator.is_, grads, self._views))
        elsewhere = list(map(operator.not_, are_here))
        self._left = {i for i in itertools.compress(range(len(grads)), elsewhere) if grads[i] is not None}
        del grads  # its references would count
        if all(are_here):  # backward adds to them in place, as in torch
            return
        if self._are_held(elsewhere):
            self._allocate()

    def _are_held(self, chosen: Sequence[bool]) -> bool:
        """Return whether other objects refer to some of the ``chosen`` views, or to any part of the memory."""
        # After ``param.grad.data = x`` a view no longer refers to the memory. The count of a view includes torch's own
        # references, such as that of another parameter's ``grad``.
        if self._uses() != self._known_uses:
            return True
        now = map(sys.getrefcount, self._views)
        return list(itertools.compress(now, chosen)) != list(itertools.compress(self._references, chosen))

    def _uses(self) -> int:
        """Return the number of references to the memory: of tensors, and of Python objects."""
        storage = self._flat.untyped_storage()
        return torch._C._storage_Use_Count(storage._cdata) + sys.getrefcount(storage)

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
            if grad is None or grad is view or i in self._left or not (large or i not in self._packer.large):
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

    def to_send(
        self, k: int, indices: Sequence[int], grads: Sequence[Tensor | None], order: MemoryOrder
    ) -> BucketGradients:
        """Lay out the gradients of bucket ``k``. Local.

        Args:
            indices: The parameters that are sent; the same object at every call for ``k``, or it takes longer.
            grads: Their gradients.
            order: The order of their elements.
        """
        known = self._known.get(k)
        if known is None or known.indices is not indices:
            uses = self._uses()
            known = self._known[k] = self._look_up(k, indices)
            self._known_uses += self._uses() - uses
        if self._are_small_here(known, grads):
            gradients = BucketGradients(self._packer, list(known.parts), list(known.into), list(known.runs))
        else:
            small = [(indices[place], grad) for place in known.small if (grad := grads[place]) is not None]
            gradients = self._packer.packed(k, {i: self._flattened(i, grad, order) for i, grad in small})
        for n, place, piece in known.large:
            self._add_large(gradients, k, n, piece, grads[place], order)
        return gradients

    def _are_small_here(self, known: _Known, grads: Sequence[Tensor | None]) -> bool:
        views = [self._views[known.indices[place]] for place in known.small]
        if not all(map(operator.is_, map(grads.__getitem__, known.small), views)):
            return False
        return list(map(Tensor.data_ptr, views)) == known.addresses

    def _flattened(self, i: int, grad: Tensor, order: MemoryOrder) -> Tensor:
        """Return the gradient of parameter ``i`` as 1-D, and give the parameter a copy if it has another order."""
        flat = order.flatten(i, grad)
        if flat.data_ptr() != grad.data_ptr():
            self._params[i].grad = order.unflatten(i, flat)
            self._left.add(i)
        return flat

    def _add_large(
        self, gradients: BucketGradients, k: int, n: int, piece: Piece, grad: Tensor | None, order: MemoryOrder
    ) -> None:
        """Lay out segment ``n`` of bucket ``k``, which is ``piece``; alike in all buckets of its parameter."""
        i, view = piece.param, self._views[piece.param]
        start = self._layout.starts[i]
        here = self._flat[start + piece.start : start + piece.stop]
        if grad is None:
            zeros = torch.zeros_like(here)
            self._set_large(gradients, k, n, i, zeros, zeros, None)
        elif grad is view and grad.data_ptr() == self._addresses[i]:
            self._set_large(gradients, k, n, i, here, here, self._flat[start:])
        else:
            flat = self._flattened(i, grad, order)
            part = flat[piece.start : piece.stop]
            stays = i in self._left or grad is view or grad.nbytes >= OWN_BLOCK_BYTES
            if stays or not _is_plain(grad, view):
                self._set_large(gradients, k, n, i, part, part, flat)
                return
            if view._version != self._zero_at[i]:  # local values that an earlier pass has left
                view.zero_()
                self._zero_at[i] = view._version
            self._set_large(gradients, k, n, i, part, here, self._flat[start:])
            if piece.start == 0:  # in the bucket that is sent last
                gradients.released.append((self._params[i], grad, view))

    def _set_large(
        self, gradients: BucketGradients, k: int, n: int, i: int, part: Tensor, into: Tensor, flat: Tensor | None
    ) -> None:
        """Send ``part`` as segment ``n``, of parameter ``i``; averages go to ``into``, which ``flat`` contains."""
        gradients.parts[n] = part
        for place, owned in enumerate(self._packer.parts[k]):
            if owned.segment == n:
                gradients.into[place] = into[owned.start : owned.stop]
        for place, piece in enumerate(self._owned[k]):
            if piece.param == i:
                gradients.runs[place] = None if flat is None else flat[piece.start : piece.stop]

    def _look_up(self, k: int, indices: Sequence[int]) -> _Known:
        start, _ = self._layout.bucket(k)
        place_of = {i: place for place, i in enumerate(indices)}
        self._clear_of_others(k, place_of)
        segments = self._packer.segments[k]
        large = [
            (n, place_of[segment.piece.param], segment.piece)
            for n, segment in enumerate(segments)
            if segment.piece is not None and segment.piece.param in place_of
        ]
        small = [place for i, place in place_of.items() if i not in self._packer.large]
        parts = [self._flat[start + segment.start : start + segment.stop] for segment in segments]
        return _Known(
            indices=indices,
            small=small,
            addresses=[self._addresses[indices[place]] for place in small],
            large=large,
            parts=parts,
            into=[part.of(parts) for part in self._packer.parts[k]],
            runs=[self._run(piece) if piece.param in place_of else None for piece in self._owned[k]],
        )

    def _clear_of_others(self, k: int, sent: Collection[int]) -> None:
        """Move gradients of parameters that are not ``sent`` out of bucket ``k``, which averages overwrite."""
        for piece in self._layout.pieces(*self._layout.bucket(k)):
            param = self._params[piece.param]
            if piece.param not in sent and param.grad is self._views[piece.param]:
                param.grad = self._views[piece.param].clone()


@dataclass(slots=True)
class _Known:
    """The part of a bucket that is sent. It holds none of the views, whose references are counted.

    Attributes:
        indices: The parameters.
        small: Places in ``indices`` of small ones, and ``addresses``, those of their views.
        large: Segment, place in ``indices``, and piece of large ones.
        parts: The segments in this memory, and ``into``, the owned parts of them, and ``runs``, the owned pieces.
    """

    indices: Sequence[int]
    small: list[int]
    addresses: list[int]
    large: list[tuple[int, int, Piece]]
    parts: list[Tensor]
    into: list[Tensor]
    runs: list[Tensor | None]


def _is_plain(grad: Tensor, view: Tensor) -> bool:
    """Return whether a copy in ``view`` can replace ``grad``."""
    return (
        type(grad) is Tensor
        and grad.layout == torch.strided
        and not grad.requires_grad
        and grad.shape == view.shape
        and grad.dtype == view.dtype
        # Not a part of something else, such as DDP's buckets if the user has woken DDP.
        and grad.untyped_storage().nbytes() == grad.nbytes
    )
