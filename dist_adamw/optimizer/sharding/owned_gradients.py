"""Provide averaged gradients of the elements that this rank owns to the update."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dist_adamw.optimizer.sharding.dtensors import local_gradient, local_of
from dist_adamw.optimizer.sharding.memory_order import check_dense, storage_order
from dist_adamw.optimizer.transport.base import cut_slice
from dist_adamw.optimizer.transport.layout import Piece


class OwnedGradients:
    """The gradients of one shard: reduced by `GradientPath`, or cut out of ``param.grad``.

    Args:
        params: The shard's parameters.
        pieces: For each bucket, the pieces that this rank owns.
        numel: The number of elements of the shard.

    Attributes:
        has_grad: For each parameter, whether it had a gradient when `owned` was last called.
        reduced: By bucket, the gradients that a `GradientPath` has averaged; None for a piece without one.
    """

    def __init__(self, params: Sequence[Tensor], pieces: list[list[Piece]], numel: int) -> None:
        self._params, self._pieces, self._numel = params, pieces, numel
        self.has_grad = [False] * len(params)
        self.reduced: dict[int, list[Tensor | None]] = {}
        self._flat: Tensor | None = None
        self._views: list[list[Tensor]] = []

    @property
    def any_grad(self) -> bool:
        """Whether any parameter had a gradient when `owned` was last called."""
        return any(self.has_grad)

    def memory(self, k: int) -> list[Tensor]:
        """Return memory for averaged gradients of the owned pieces of bucket ``k``. Local."""
        if self._flat is None:
            like = self._params[0]
            self._flat = torch.zeros(self._numel, dtype=like.dtype, device=like.device)
            self._cut()
        return self._views[k]

    def move(self, device: torch.device, dtype: torch.dtype) -> None:
        """Follow parameters to another device or dtype. Local."""
        if self._flat is not None:
            self._flat = self._flat.to(device, dtype)
            self._cut()
            self.reduced = {k: list(self._views[k]) for k in self.reduced}  # the old views have the old memory

    def _cut(self) -> None:
        assert self._flat is not None
        self._views = [[self._flat[p.offset : p.offset + p.numel] for p in bucket] for bucket in self._pieces]

    def owned(self) -> list[list[Tensor | None]]:
        """Return averaged gradients of the owned pieces by bucket; None if a parameter has none. Local."""
        # With flat memory ``param.grad`` is None after backward, and `GradientsForUpdate` sets ``has_grad``.
        if self._flat is None:
            self.has_grad = [param.grad is not None for param in self._params]
        if self.reduced:
            return [self._reduced_in(k) for k in range(len(self._pieces))]
        # Not attached: gradients are the same on all ranks, and this rank takes its runs of them.
        flat: list[Tensor | None] = []
        for param in self._params:
            if param.grad is None:
                flat.append(None)
                continue
            grad = local_gradient(param.grad, param)
            check_dense(grad)
            flat.append(storage_order(grad, like=local_of(param)))
        return [cut_slice(flat, bucket) for bucket in self._pieces]

    def _reduced_in(self, k: int) -> list[Tensor | None]:
        pieces = self._pieces[k]
        grads = self.reduced.get(k) or [None] * len(pieces)
        return [grad if self.has_grad[p.param] else None for p, grad in zip(pieces, grads, strict=True)]
