"""Provide averaged gradients of the elements that this rank owns to the update, and gradients of buckets to send."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from dist_adamw.optimizer.sharding.dtensors import local_gradient, local_of
from dist_adamw.optimizer.sharding.gradient_memory import GradientMemory, SentGradients
from dist_adamw.optimizer.sharding.memory_order import MemoryOrder, check_dense, storage_order
from dist_adamw.optimizer.transport.base import Transport, cut_slice
from dist_adamw.optimizer.transport.layout import FlatLayout, Piece


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
        self._lent: list[Tensor] = []
        self._accumulated: Tensor | None = None
        self._views: list[list[Tensor]] = []

    @property
    def any_grad(self) -> bool:
        """Whether any parameter had a gradient when `owned` was last called."""
        return any(self.has_grad)

    def move(self, device: torch.device, dtype: torch.dtype) -> None:
        """Follow parameters that have moved, perhaps to another device or dtype. Local."""
        self._lent.clear()
        if self._memory is not None and not self._memory.fits():
            self._memory = None
        if self._accumulated is not None:
            self._accumulated = self._accumulated.to(device, dtype)
            self._cut()
            self.reduced = {k: list(self._views[k]) for k in self.reduced}  # the old views have the old memory

    # ---------------------------------------------------------------- memory of gradients

    def prepare(self, transport: Transport | None) -> None:
        """Make sure that backward overwrites no gradient that the user holds. Local; with no bucket in flight.

        Args:
            transport: Sends the buckets, if the pass will move gradients to memory that stays.
        """
        if self._memory is None and transport is not None:
            self._memory = GradientMemory(self._params, self._layout, self._pieces, transport)
        if self._memory is not None:
            self._memory.prepare()

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

    def kept(
        self, k: int, indices: Sequence[int], grads: Sequence[Tensor | None], order: MemoryOrder
    ) -> SentGradients | None:
        """Return the gradients of bucket ``k``, or None if they must be `packed`; see `GradientMemory.sent`. Local."""
        return None if self._memory is None else self._memory.sent(k, indices, grads, order)

    def packed(
        self, k: int, indices: Sequence[int], flat: Sequence[Tensor | None], transport: Transport
    ) -> SentGradients:
        """Return the gradients of bucket ``k``, small ones copied to memory that `received` takes back. Local.

        Args:
            indices: The parameters to send; the others count as zero.
            flat: Their gradients, 1-D; None counts as zero.
        """
        lent = self._lent.pop() if self._lent else self._params[0].new_zeros(self._layout.bucket_numel)
        by_index = {i: grad for i, grad in zip(indices, flat, strict=True) if grad is not None}
        segments = transport.segments(k)
        in_place = {segment.piece.param for segment in segments if segment.piece is not None}
        outside = {i: grad for i, grad in by_index.items() if i not in in_place}
        self._copy(k, outside, lent)
        parts = []
        for segment in segments:
            grad = by_index.get(segment.piece.param) if segment.piece is not None else None
            if segment.piece is None or grad is None:
                parts.append(lent[segment.start : segment.stop])
            else:
                parts.append(grad[segment.piece.start : segment.piece.stop])
        into = [part.of(parts) for part in transport.owned_parts(k)]
        return SentGradients(parts, into, self._runs_of(k, by_index, outside, lent), lent, outside)

    def _copy(self, k: int, grads: Mapping[int, Tensor], lent: Tensor) -> None:
        """Copy ``grads``, by index of the parameter, to their places in bucket ``k``; elsewhere write zeros."""
        for piece in self._layout.pieces(*self._layout.bucket(k)):
            place = lent[piece.offset : piece.offset + piece.numel]
            if piece.param in grads:
                place.copy_(grads[piece.param][piece.start : piece.stop])
            else:
                place.zero_()

    def _runs_of(
        self, k: int, grads: Mapping[int, Tensor], outside: Collection[int], lent: Tensor
    ) -> list[Tensor | None]:
        """Return the owned pieces of bucket ``k``: in ``lent`` if they are copies, else in the gradients."""
        start, _ = self._layout.bucket(k)
        runs: list[Tensor | None] = []
        for piece in self._pieces[k]:
            place = self._layout.starts[piece.param] + piece.start - start
            if piece.param in outside:
                runs.append(lent[place : place + piece.numel])
            else:
                grad = grads.get(piece.param)
                runs.append(None if grad is None else grad[piece.start : piece.stop])
        return runs

    def received(self, k: int, sent: SentGradients) -> None:
        """Take the averages of bucket ``k``, which are in ``sent``. Local."""
        self.reduced[k] = self.write_back(k, sent)
        for i, grad in sent.released:
            assert self._memory is not None
            self._memory.release(i, grad)

    def write_back(self, k: int, sent: SentGradients) -> list[Tensor | None]:
        """Return the owned pieces with their averages, in the gradients themselves if those were copied. Local."""
        runs = list(sent.runs)
        for place, (piece, average) in enumerate(zip(self._pieces[k], sent.runs, strict=True)):
            if (grad := sent.outside.get(piece.param)) is not None and average is not None:
                runs[place] = grad[piece.start : piece.stop].copy_(average)
        self.give_back(sent)
        return runs

    def give_back(self, sent: SentGradients) -> None:
        """Use the memory of ``sent`` for other buckets. Local."""
        if sent.lent is not None:
            self._lent.append(sent.lent)

    # ---------------------------------------------------------------- gradients of several passes, kept in the shard

    def accumulated(self, k: int) -> Tensor:
        """Return memory for the averages of this rank's slice of bucket ``k``, 1-D. Local."""
        if self._accumulated is None:
            like = self._params[0]
            self._accumulated = torch.zeros(self._layout.shard_numel, dtype=like.dtype, device=like.device)
            self._cut()
        share = self._layout.bucket_numel // self._layout.world_size
        start, stop = self._layout.slice_of(k, 0)
        return self._accumulated[k * share : k * share + stop - start]

    def accumulated_runs(self, k: int) -> list[Tensor]:
        """Return `accumulated` by owned piece. Local."""
        self.accumulated(k)
        return self._views[k]

    def _cut(self) -> None:
        assert self._accumulated is not None
        flat = self._accumulated
        self._views = [[flat[p.offset : p.offset + p.numel] for p in bucket] for bucket in self._pieces]

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
