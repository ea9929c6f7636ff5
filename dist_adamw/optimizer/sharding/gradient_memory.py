"""Flat memory for the gradients of a shard that stays from update to update.

Autograd allocates a gradient in every backward pass. If it lived until ``zero_grad``, all gradients would be allocated
and freed at every update, and on a CPU the system would hand out, and clear, every page of them each time. So each
gradient is copied here as soon as it has arrived, while it is still in the processor's cache, and autograd's memory
serves the next one. ``param.grad`` is a view of this memory, as with DDP's ``gradient_as_bucket_view``. Unlike there, a
gradient that the user holds keeps its values: the next pass gets other memory.
"""

from __future__ import annotations

import itertools
import operator
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dist_adamw.optimizer.transport.layout import FlatLayout, Piece

_gradient = operator.attrgetter("grad")


class GradientMemory:
    """Memory for the gradients of ``params``, in the order of ``layout``.

    Args:
        params: Plain tensors of one dtype and device.
        owned: For each bucket, the pieces that this rank owns.
    """

    def __init__(self, params: Sequence[Tensor], layout: FlatLayout, owned: Sequence[Sequence[Piece]]) -> None:
        self._params, self._layout, self._owned = params, layout, owned
        self._allocate()

    def _allocate(self) -> None:
        like, layout = self._params[0], self._layout
        self._flat = torch.zeros(layout.padded_numel, dtype=like.dtype, device=like.device)
        self._views = [
            _view(self._flat, start, param) for start, param in zip(layout.starts, self._params, strict=False)
        ]
        self._addresses = list(map(Tensor.data_ptr, self._views))
        self._buckets = [self._flat[slice(*layout.bucket(k))] for k in range(layout.num_buckets)]
        self._runs = [[self._run(piece) for piece in pieces] for pieces in self._owned]
        self._known: dict[int, _Sent] = {}
        self._left: set[int] = set()  # parameters whose gradient is elsewhere and stays there
        self._references = self._count_references()

    def _run(self, piece: Piece) -> Tensor:
        start = self._layout.starts[piece.param]
        return self._flat[start + piece.start : start + piece.stop]

    def bucket(self, k: int) -> Tensor:
        """Return the gradients of bucket ``k``, 1-D, with padding."""
        return self._buckets[k]

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
        views, uses = self._count_references()
        known, known_uses = self._references
        return uses != known_uses or list(itertools.compress(views, chosen)) != list(itertools.compress(known, chosen))

    def _count_references(self) -> tuple[list[int], tuple[int, int]]:
        """Return the references to each view, and those to the memory: of tensors, and of Python objects."""
        storage = self._flat.untyped_storage()
        uses = (torch._C._storage_Use_Count(storage._cdata), sys.getrefcount(storage))
        return list(map(sys.getrefcount, self._views)), uses

    def _contains(self, grad: Tensor) -> bool:
        return grad.layout == torch.strided and grad.untyped_storage().data_ptr() == self._flat.data_ptr()

    # ---------------------------------------------------------------- gradients arrive

    def take_in(self, indices: Sequence[int]) -> None:
        """Copy gradients here, and make ``param.grad`` views of the copies. Local.

        Args:
            indices: Of parameters. A gradient that was there before the pass began stays where the user has put it.
        """
        params, views, grads = [], [], []
        for i in indices:
            param, view = self._params[i], self._views[i]
            grad = param.grad
            if grad is None or grad is view or i in self._left or not _is_plain(grad, view):
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

    def runs_of(self, k: int, indices: Sequence[int], grads: Sequence[Tensor | None]) -> Sequence[Tensor | None] | None:
        """Return the gradients of the owned pieces of bucket ``k``, or None if not all of ``grads`` lie here.

        Args:
            indices: The parameters that are sent; the same object at every call for ``k``, or it takes longer. A piece
                of another parameter has None.
            grads: Their gradients.
        """
        known = self._known.get(k)
        if known is None or known.indices is not indices:
            known = self._known[k] = self._sent_in(k, indices)
        views = [self._views[i] for i in indices]
        if not all(map(operator.is_, grads, views)):
            return None
        return known.runs if list(map(Tensor.data_ptr, views)) == known.addresses else None

    def _sent_in(self, k: int, indices: Sequence[int]) -> _Sent:
        chosen, owned = set(indices), zip(self._owned[k], self._runs[k], strict=True)
        runs = [run if piece.param in chosen else None for piece, run in owned]
        return _Sent(indices, [self._addresses[i] for i in indices], runs)


@dataclass(slots=True)
class _Sent:
    """The part of a bucket that is sent. It holds none of the views, whose references are counted."""

    indices: Sequence[int]
    addresses: list[int]
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
