"""Lay the gradients of a bucket out for the transport, and say where their averages go."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from dist_adamw.optimizer.transport.base import OwnedPart, Transport
from dist_adamw.optimizer.transport.layout import FlatLayout, Piece, Segment


@dataclass(slots=True)
class BucketGradients:
    """The gradients of one bucket.

    Attributes:
        parts: The gradients, 1-D, one tensor for each segment of the bucket.
        into: What receives the averages, one tensor for each owned part of these segments.
        runs: The owned pieces with their averages; None for a piece that is not sent.
        lent: Memory with copies of small gradients, to be used again; None: they were not copied.
        copied: The gradients that ``lent`` has copies of, 1-D, by index of the parameter.
        released: Parameters, their gradients, which are not needed after this bucket, and the views with the averages
            that take their place.
    """

    packer: BucketPacker
    parts: list[Tensor]
    into: list[Tensor]
    runs: list[Tensor | None]
    lent: Tensor | None = None
    copied: Mapping[int, Tensor] = field(default_factory=dict)
    released: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)


class BucketPacker:
    """Lays out the gradients of one shard.

    Args:
        layout: The layout of the shard.
        owned: For each bucket, the pieces that this rank owns.
        transport: Sends its buckets. It is not kept, since it is replaced when parameters move.
        like: Has the dtype and device of the parameters.

    Attributes:
        segments: For each bucket, the runs that may lie in different memory.
        parts: For each bucket, the owned parts of these segments.
        large: The parameters that have separate segments, by index.
    """

    def __init__(
        self, layout: FlatLayout, owned: Sequence[Sequence[Piece]], transport: Transport, like: Tensor
    ) -> None:
        self._layout, self._owned, self._like = layout, owned, like
        buckets = range(layout.num_buckets)
        self.segments: list[list[Segment]] = [transport.segments(k) for k in buckets]
        self.parts: list[list[OwnedPart]] = [transport.owned_parts(k) for k in buckets]
        pieces = [segment.piece for segments in self.segments for segment in segments]
        self.large = {piece.param for piece in pieces if piece is not None}
        self._lent: list[Tensor] = []

    def packed(self, k: int, flat: Mapping[int, Tensor]) -> BucketGradients:
        """Lay out bucket ``k``: small gradients are copied to lent memory, large ones stay. Local.

        Args:
            flat: The gradients, 1-D, by index of the parameter; others count as zero.
        """
        lent: Tensor | None = None
        copied = {i: grad for i, grad in flat.items() if i not in self.large}
        if any(segment.piece is None for segment in self.segments[k]):
            lent = self._lent.pop() if self._lent else self._like.new_zeros(self._layout.bucket_numel)
            self._copy(k, copied, lent)
        parts = []
        for segment in self.segments[k]:
            if segment.piece is None:
                assert lent is not None
                parts.append(lent[segment.start : segment.stop])
            elif (grad := flat.get(segment.piece.param)) is None:
                parts.append(self._like.new_zeros(segment.stop - segment.start))
            else:
                parts.append(grad[segment.piece.start : segment.piece.stop])
        into = [part.of(parts) for part in self.parts[k]]
        return BucketGradients(self, parts, into, self._runs(k, flat, copied, lent), lent, copied)

    def _copy(self, k: int, grads: Mapping[int, Tensor], lent: Tensor) -> None:
        """Copy ``grads``, by index of the parameter, to the places of small pieces of bucket ``k``, else zeros."""
        pieces = self._layout.pieces(*self._layout.bucket(k))
        targets, sources, empty = [], [], []
        for piece, place in zip(pieces, _cut_out(lent, pieces), strict=True):
            if piece.param in self.large:
                continue
            grad = grads.get(piece.param)
            if grad is None:
                empty.append(place)
            else:
                targets.append(place)
                sources.append(grad if piece.numel == grad.numel() else grad[piece.start : piece.stop])
        if targets:
            torch._foreach_copy_(targets, sources)
        if empty:
            torch._foreach_zero_(empty)

    def _runs(
        self, k: int, flat: Mapping[int, Tensor], copied: Collection[int], lent: Tensor | None
    ) -> list[Tensor | None]:
        """Return the owned pieces of bucket ``k``: in ``lent`` if they are copies, else in the gradients."""
        start, _ = self._layout.bucket(k)
        runs: list[Tensor | None] = []
        for piece in self._owned[k]:
            if piece.param in copied:
                assert lent is not None
                place = self._layout.starts[piece.param] + piece.start - start
                runs.append(lent[place : place + piece.numel])
            else:
                grad = flat.get(piece.param)
                runs.append(None if grad is None else grad[piece.start : piece.stop])
        return runs

    def write_back(self, k: int, gradients: BucketGradients) -> list[Tensor | None]:
        """Write averages of copies into the gradients; return the owned pieces, which are there now. Local."""
        runs = list(gradients.runs)
        places = [j for j, piece in enumerate(self._owned[k]) if piece.param in gradients.copied]
        for j in places:
            piece = self._owned[k][j]
            runs[j] = gradients.copied[piece.param][piece.start : piece.stop]
        if places:
            averages = [gradients.runs[j] for j in places]
            torch._foreach_copy_(cast(list[Tensor], [runs[j] for j in places]), cast(list[Tensor], averages))
        self.give_back(gradients)
        return runs

    def give_back(self, gradients: BucketGradients) -> None:
        """Use the memory of ``gradients`` for other buckets. Local."""
        if gradients.lent is not None:
            self._lent.append(gradients.lent)


def _cut_out(flat: Tensor, pieces: Sequence[Piece]) -> list[Tensor]:
    """Return the places of adjacent ``pieces`` in ``flat``."""
    # In one call, which takes half as long as a slice each. Kept views of all buckets would take 600 bytes each.
    sizes, stop = [], 0
    for piece in pieces:
        sizes += [piece.offset - stop, piece.numel]
        stop = piece.offset + piece.numel
    return list(flat[:stop].split_with_sizes(sizes))[1::2]
