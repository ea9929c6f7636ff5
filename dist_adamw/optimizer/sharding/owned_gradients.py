"""Provide averaged gradients of the elements that this rank owns to the update, and gradients of buckets to send."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dist_adamw.optimizer.sharding.bucket_gradients import BucketGradients, BucketPacker
from dist_adamw.optimizer.sharding.dtensors import local_gradient, local_of
from dist_adamw.optimizer.sharding.gradient_memory import GradientMemory
from dist_adamw.optimizer.sharding.memory_order import MemoryOrder, check_dense, storage_order
from dist_adamw.optimizer.transport.base import Transport, cut_slice
from dist_adamw.optimizer.transport.layout import FlatLayout, Piece
from dist_adamw.optimizer.transport.tree_sum import TreeSum


class OwnedGradients:
    """The gradients of one shard: reduced by `GradientPath`, or cut out of ``param.grad``.

    Args:
        params: The shard's parameters.
        layout: Their layout.
        pieces: For each bucket, the pieces that this rank owns.

    Attributes:
        has_grad: For each parameter, whether it had a gradient when `owned` was last called.
        reduced: By bucket, the gradients that a `GradientPath` has averaged; None for a piece without one.
    """

    def __init__(self, params: Sequence[Tensor], layout: FlatLayout, pieces: list[list[Piece]]) -> None:
        self._params, self._layout, self._pieces = params, layout, pieces
        self.has_grad = [False] * len(params)
        self.reduced: dict[int, list[Tensor | None]] = {}
        self._memory: GradientMemory | None = None
        self._made_packer: BucketPacker | None = None
        self._accumulated: Tensor | None = None
        self._views: list[list[Tensor]] = []
        self._tree_sums: dict[int, TreeSum] = {}  # by bucket
        self._divisor = 1

    @property
    def any_grad(self) -> bool:
        """Whether any parameter had a gradient when `owned` was last called."""
        return any(self.has_grad)

    def move(self, device: torch.device, dtype: torch.dtype) -> None:
        """Follow parameters that have moved, perhaps to another device or dtype. Local."""
        if self._memory is not None and not self._memory.fits():
            self._memory = None
        if self._memory is None:
            self._made_packer = None
        if self._accumulated is not None:
            self._accumulated = self._accumulated.to(device, dtype)
            for sums in self._tree_sums.values():
                sums.move(device)
            self._cut()
            self.reduced = {k: list(self._views[k]) for k in self.reduced}  # the old views have the old memory

    # ---------------------------------------------------------------- memory of gradients

    def prepare(self, transport: Transport, *, moves: bool) -> None:
        """Make sure that a pass overwrites no gradient that the user holds. Local; with no bucket in flight.

        Args:
            transport: Sends the buckets.
            moves: Whether the pass moves gradients to memory that stays.
        """
        if self._memory is None and moves:
            self._memory = GradientMemory(self._params, self._layout, self._pieces, self._packer(transport))
        if self._memory is not None:
            self._memory.prepare()

    def _packer(self, transport: Transport) -> BucketPacker:
        if self._made_packer is None:
            self._made_packer = BucketPacker(self._layout, self._pieces, transport, self._params[0])
        return self._made_packer

    def take_in(self, indices: Sequence[int], *, large: bool) -> None:
        """Move gradients that have arrived to memory that stays; see `GradientMemory.take_in`. Local."""
        if self._memory is not None:
            self._memory.take_in(indices, large=large)

    def fill_in_zeros(self, i: int) -> None:
        """Give zeros to parameter ``i``, which has no gradient. Local."""
        if self._memory is None:
            self._params[i].grad = torch.zeros_like(self._params[i])
        else:
            self._memory.fill_in_zeros(i)

    def to_send(
        self, k: int, indices: Sequence[int], grads: Sequence[Tensor | None], order: MemoryOrder
    ) -> BucketGradients | None:
        """Lay out gradients of bucket ``k``, or return None without memory that stays; see `GradientMemory`. Local."""
        return None if self._memory is None else self._memory.to_send(k, indices, grads, order)

    def packed(self, k: int, flat: Mapping[int, Tensor], transport: Transport) -> BucketGradients:
        """Lay out gradients of bucket ``k``, copying small ones. Local; ``flat`` as for `BucketPacker.packed`."""
        return self._packer(transport).packed(k, flat)

    def received(self, k: int, gradients: BucketGradients) -> None:
        """Take the averages of bucket ``k``. Local."""
        self.reduced[k] = gradients.packer.write_back(k, gradients)
        for param, grad, view in gradients.released:
            if param.grad is grad:
                param.grad = view

    # ---------------------------------------------------------------- gradients of several passes, kept in the shard

    def accumulated(self, k: int) -> Tensor:
        """Return memory for the averages of this rank's slice of bucket ``k``, 1-D. Local."""
        memory = self.all_accumulated()
        share = self._layout.bucket_numel // self._layout.world_size
        start, stop = self._layout.slice_of(k, 0)
        return memory[k * share : k * share + stop - start]

    def all_accumulated(self) -> Tensor:
        """Return memory for the averages of all that this rank owns, 1-D, with the offsets of the moments. Local."""
        if self._accumulated is None:
            like = self._params[0]
            self._accumulated = torch.zeros(self._layout.shard_numel, dtype=like.dtype, device=like.device)
            self._cut()
        return self._accumulated

    def accumulated_runs(self, k: int) -> list[Tensor]:
        """Return `accumulated` by owned piece. Local."""
        self.accumulated(k)
        return self._views[k]

    def _cut(self) -> None:
        assert self._accumulated is not None
        flat = self._accumulated
        self._views = [[flat[p.offset : p.offset + p.numel] for p in bucket] for bucket in self._pieces]

    # ---------------------------------------------------------------- micro-batches in the order of their numbers

    def tree_sum(self, k: int) -> TreeSum:
        """Return the sum of this rank's slices of bucket ``k``. Local."""
        if k not in self._tree_sums:
            like, (start, stop) = self._params[0], self._layout.slice_of(k, 0)
            wide = torch.promote_types(like.dtype, torch.float32)
            home = self.accumulated(k)
            self._tree_sums[k] = TreeSum(stop - start, dtype=wide, device=like.device, home=home)
        return self._tree_sums[k]

    def finish_tree_sums(self, divisor: int, *, later: bool) -> None:
        """Divide the sums that have terms by ``divisor``, and make them the averages of their buckets. Local.

        Args:
            later: Leave the division to `finish_tree_sum`.
        """
        self._divisor = divisor
        for k, sums in self._tree_sums.items():
            if sums.count:
                self.reduced[k] = list(self.accumulated_runs(k))
                if not later:
                    self.finish_tree_sum(k)

    def finish_tree_sum(self, k: int) -> None:
        """Divide the sum of bucket ``k`` if that is still to be done. Local; just before the update reads it."""
        sums = self._tree_sums.get(k)
        if sums is not None and sums.count:
            sums.write([(0, self.accumulated(k))], self._divisor)
            sums.clear()

    def clear_tree_sums(self) -> None:
        """Forget the terms of all sums. Local."""
        for sums in self._tree_sums.values():
            sums.clear()

    # ---------------------------------------------------------------- the update

    def owned(self) -> list[list[Tensor | None]]:
        """Return averaged gradients of the owned pieces by bucket; None if a parameter has none. Local."""
        # If they are accumulated, ``param.grad`` is None after backward, and `GradientsForUpdate` sets ``has_grad``.
        if self._accumulated is None:
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
