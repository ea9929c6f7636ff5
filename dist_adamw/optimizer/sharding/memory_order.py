"""Convert between a tensor's shape and the order of its elements in memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def check_dense(grad: Tensor) -> None:
    """Refuse a sparse gradient.

    Raises:
        RuntimeError: says what to do.
    """
    if grad.layout != torch.strided:
        raise RuntimeError(
            f"DistAdamW does not support sparse gradients, got one of layout {grad.layout}. "
            "Build the embedding with sparse=False."
        )


def storage_order(tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """Return ``tensor`` as 1-D, in the order in which ``like`` (default: itself) has its elements in memory.

    A view if the two agree, else a copy.

    Raises:
        ValueError: elements of ``like`` overlap or leave gaps, so there is no such order.
    """
    like = tensor if like is None else like
    if like.is_contiguous():
        return tensor if tensor.ndim == 1 and tensor.is_contiguous() else tensor.reshape(-1)
    order = axes_in_memory(like)
    return tensor.permute(order).reshape(-1)


def shaped_like(flat: Tensor, like: Tensor) -> Tensor:
    """Undo `storage_order`: return ``flat`` if it has the shape of ``like``, else a view of that shape."""
    if flat.shape == like.shape:
        return flat
    if like.is_contiguous():
        return flat.view(like.shape)
    order = axes_in_memory(like)
    inverse = [order.index(axis) for axis in range(like.ndim)]
    return flat.view([like.shape[axis] for axis in order]).permute(inverse)


def axes_in_memory(tensor: Tensor) -> list[int]:
    """Return the axes of ``tensor``, from the one with the largest stride to the one with the smallest.

    Raises:
        ValueError: elements overlap or leave gaps.
    """
    if tensor.is_contiguous():
        return list(range(tensor.ndim))
    strides = tensor.stride()
    order = sorted(range(tensor.ndim), key=lambda axis: -strides[axis])
    if not tensor.permute(order).is_contiguous():
        raise ValueError(
            f"a parameter of shape {tuple(tensor.shape)} has strides {tensor.stride()}: its elements overlap or "
            "leave gaps. Make it contiguous before you pass it to the optimizer."
        )
    return order


class MemoryOrder:
    """The memory order of the elements of some tensors at the time of construction.

    Args:
        tensors: Their shapes are read again at each use, since the tensors may have been reshaped.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tensors
        self._axes = [axes_in_memory(tensor) for tensor in tensors]
        self._is_straight = [axes == sorted(axes) for axes in self._axes]

    def is_of(self, tensors: Sequence[Tensor]) -> bool:
        """Return whether ``tensors`` have this order now."""
        return [axes_in_memory(tensor) for tensor in tensors] == self._axes

    def of(self, i: int) -> list[int]:
        """Return the axes of tensor ``i``, from the largest stride to the smallest."""
        return self._axes[i]

    def flatten(self, i: int, tensor: Tensor) -> Tensor:
        """Return ``tensor``, of the shape of tensor ``i``, as 1-D in this order; a view if possible, else a copy."""
        if tensor.ndim == 1:
            return tensor if tensor.is_contiguous() else tensor.reshape(-1)
        check_dense(tensor)
        if self._is_straight[i]:
            return tensor.reshape(-1)
        return tensor.permute(self._axes[i]).reshape(-1)

    def unflatten(self, i: int, flat: Tensor) -> Tensor:
        """Undo `flatten`: return a view of ``flat`` in the shape of tensor ``i``."""
        axes, shape = self._axes[i], self._tensors[i].shape
        return flat.view([shape[axis] for axis in axes]).permute([axes.index(axis) for axis in range(len(axes))])
