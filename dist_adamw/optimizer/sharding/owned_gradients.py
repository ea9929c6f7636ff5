"""Provide averaged gradients of the elements that this rank owns to the update, and gradients of buckets to send."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dist_adamw.optimizer.sharding.dtensors import local_gradient, local_of
from dist_adamw.optimizer.sharding.gradient_memory import GradientMemory
from dist_adamw.optimizer.sharding.memory_order import check_dense, storage_order
from dist_adamw.optimizer.transport.base import cut_slice
from dist_adamw.optimizer.transport.layout import FlatLayout, Piece

LARGE_BYTES = 1 << 25


def is_large(param: Tensor) -> bool:
    """Return whether a parameter has a shard to itself, and its gradient stays where autograd puts it."""
    # glibc takes blocks of 32 MiB and more from the system each time, so a copy of the gradient would save nothing.
    return param.device.type == "cpu" and param.nbytes >= LARGE_BYTES


@dataclass(slots=True)
class SentGradients:
    """The gradients of one bucket in one tensor.

    Attributes:
        buffer: The gradients, 1-D in the order of the layout.
        runs: Those of the owned pieces, as part of the buffer; None for a piece that is not sent.
        lent: Memory that ``buffer`` is part of, to be used again; None if it has the gradients themselves.
        outside: The gradients of which ``lent`` has copies, 1-D, by index of the parameter.
    """

    buffer: Tensor
    runs: list[Tensor | None]
    lent: Tensor | None = None
    outside: dict[int, Tensor] = field(default_factory=dict)


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

    def prepare(self, *, may_allocate: bool) -> None:
        """Make sure that backward overwrites no gradient that the user holds. Local; with no bucket in flight.

        Args:
            may_allocate: Whether the pass will move gradients to memory that stays.
        """
        memory = self._staying_memory() if may_allocate else self._memory
        if memory is not None:
            memory.prepare()

    def _staying_memory(self) -> GradientMemory | None:
        if self._memory is None and not (len(self._params) == 1 and is_large(self._params[0])):
            self._memory = GradientMemory(self._params, self._layout, self._pieces)
        return self._memory

    def take_in(self, indices: Sequence[int]) -> None:
        """Move gradients that have arrived to memory that stays; see `GradientMemory.take_in`. Local."""
        memory = self._staying_memory()
        if memory is not None:
            memory.take_in(indices)

    def fill_in_zeros(self, i: int) -> None:
        """Give zeros to parameter ``i``, which has no gradient. Local."""
        if self._memory is None:
            self._params[i].grad = torch.zeros_like(self._params[i])
        else:
            self._memory.fill_in_zeros(i)

    def kept(self, k: int, indices: Sequence[int], grads: Sequence[Tensor | None]) -> SentGradients | None:
        """Return the gradients of bucket ``k`` if they lie in memory that stays, else None. Local.

        Args:
            indices: The parameters to send; the same object at every call for ``k``.
            grads: Their gradients.
        """
        if self._memory is None:
            return None
        runs = self._memory.runs_of(k, indices, grads)
        return None if runs is None else SentGradients(self._memory.bucket(k), list(runs))

    def packed(self, k: int, indices: Sequence[int], flat: Sequence[Tensor | None], *, padded: bool) -> SentGradients:
        """Return the gradients of bucket ``k`` in memory that `received` takes back, or as they are. Local.

        Args:
            indices: The parameters to send; the others count as zero.
            flat: Their gradients, 1-D; None counts as zero.
            padded: Whether the buffer must include the padding at the end of the layout.
        """
        start, stop = self._layout.bucket(k)
        pieces = self._layout.pieces(start, stop)
        by_index = dict(zip(indices, flat, strict=True))
        if len(pieces) == 1 and pieces[0].numel == (stop if padded else min(stop, self._layout.end)) - start:
            grad = by_index.get(pieces[0].param)
            if grad is not None:
                buffer = grad[pieces[0].start : pieces[0].stop]
                return SentGradients(buffer, self._runs_in(buffer, k))
        lent = self._lent.pop() if self._lent else self._params[0].new_zeros(self._layout.bucket_numel)
        outside = {}
        for piece in pieces:
            grad, place = by_index.get(piece.param), lent[piece.offset : piece.offset + piece.numel]
            if grad is None:
                place.zero_()
            else:
                place.copy_(grad[piece.start : piece.stop])
                outside[piece.param] = grad
        buffer = lent[: stop - start]
        return SentGradients(buffer, self._runs_in(buffer, k), lent, outside)

    def _runs_in(self, buffer: Tensor, k: int) -> list[Tensor | None]:
        """Return the owned pieces of bucket ``k`` as views of ``buffer``, which has the whole bucket."""
        start, _ = self._layout.bucket(k)
        places = [(self._layout.starts[piece.param] + piece.start - start, piece.numel) for piece in self._pieces[k]]
        return [buffer[place : place + numel] for place, numel in places]

    def received(self, k: int, sent: SentGradients) -> None:
        """Take the averages of bucket ``k``, which are in the owned runs of ``sent``. Local."""
        self.reduced[k] = self.write_back(k, sent)

    def write_back(self, k: int, sent: SentGradients) -> list[Tensor | None]:
        """Return the owned runs of the gradients, into which averages in a copy were written. Local."""
        if sent.lent is None:
            return sent.runs
        runs: list[Tensor | None] = []
        for piece, average in zip(self._pieces[k], sent.runs, strict=True):
            grad = sent.outside.get(piece.param)
            assert average is not None
            runs.append(None if grad is None else grad[piece.start : piece.stop].copy_(average))
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
