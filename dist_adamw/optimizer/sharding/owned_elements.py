"""Look up the elements that this rank owns, and their offsets in its shard."""

from __future__ import annotations

from dist_adamw.optimizer.transport.layout import FlatLayout, Piece


class OwnedElements:
    """One rank's pieces of a layout.

    Attributes:
        pieces: For each bucket, the runs that this rank owns; their offsets are positions in the flat moments.
        places: For each parameter, bucket and index in it of each of its pieces.
    """

    def __init__(self, layout: FlatLayout, rank: int) -> None:
        self.pieces = layout.owned(rank)
        self._pieces_of: list[list[Piece]] = [[] for _ in layout.numels]
        self.places: list[list[tuple[int, int]]] = [[] for _ in layout.numels]
        for k, bucket in enumerate(self.pieces):
            for j, piece in enumerate(bucket):
                self._pieces_of[piece.param].append(piece)
                self.places[piece.param].append((k, j))

    def ranges_of(self, i: int) -> list[list[int]]:
        """Return the ``[start, stop)`` of parameter ``i`` that this rank owns, in ascending order."""
        return [[piece.start, piece.stop] for piece in self._pieces_of[i]]

    def numel_of(self, i: int) -> int:
        """Return the number of elements of parameter ``i`` that this rank owns."""
        return sum(piece.numel for piece in self._pieces_of[i])

    def offset_of(self, i: int) -> int:
        """Return where this rank's elements of parameter ``i`` begin in the flat moments."""
        return self._pieces_of[i][0].offset if self._pieces_of[i] else 0
