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
        self.places: list[list[tuple[int, int]]] = [[] for _ in layout.numels]
        for k, bucket in enumerate(self.pieces):
            for j, piece in enumerate(bucket):
                self.places[piece.param].append((k, j))

    def _pieces_of(self, i: int) -> list[Piece]:
        return [self.pieces[k][j] for k, j in self.places[i]]

    def ranges_of(self, i: int) -> list[list[int]]:
        """Return the ``[start, stop)`` of parameter ``i`` that this rank owns, in ascending order."""
        return [[piece.start, piece.stop] for piece in self._pieces_of(i)]

    def numel_of(self, i: int) -> int:
        """Return the number of elements of parameter ``i`` that this rank owns."""
        return sum(piece.numel for piece in self._pieces_of(i))

    def offset_of(self, i: int) -> int:
        """Return where this rank's elements of parameter ``i`` begin in the flat moments."""
        pieces = self._pieces_of(i)
        return pieces[0].offset if pieces else 0
