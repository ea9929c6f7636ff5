"""Where FSDP2 cuts parameters between ranks, in elements of the whole parameter.

FSDP2 divides the rows of a parameter into equal chunks, so its cuts are at no multiple of a vector or of a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from dist_adamw.optimizer.sharding.dtensors import is_dtensor


@dataclass(frozen=True, slots=True)
class Cut:
    """A parameter in C order, of which each rank has an equal number of rows, except for the last ones.

    Attributes:
        numel: The number of elements of the whole parameter.
        chunk: The number of elements of a rank, padding included.
        rank: This rank.
    """

    numel: int
    chunk: int
    rank: int

    def start_of(self, rank: int) -> int:
        """Return the first element of a rank; ``numel`` for ranks that have none."""
        return min(rank * self.chunk, self.numel)

    @property
    def start(self) -> int:
        """The first element of this rank."""
        return self.start_of(self.rank)

    @property
    def stop(self) -> int:
        """The element after this rank's last one."""
        return self.start_of(self.rank + 1)

    def following(self, stop: int) -> Iterator[tuple[int, int, int]]:
        """Yield the ranks after this one with elements before ``stop``, and their first element and the one after."""
        rank = self.rank + 1
        while self.start_of(rank) < stop:
            yield rank, self.start_of(rank), min(self.start_of(rank + 1), stop)
            rank += 1


def is_cut_by_rows(param: Tensor) -> bool:
    """Return whether ``param`` is a DTensor whose rows are divided along the only axis of its mesh. Local."""
    return is_dtensor(param) and param.device_mesh.ndim == 1 and param.placements[0].is_shard(0)


def cut_of(param: Tensor) -> Cut:
    """Return where ``param``, for which `is_cut_by_rows`, is cut. Local."""
    assert is_dtensor(param)
    numel, mesh = param.numel(), param.device_mesh
    rows = -(-param.shape[0] // mesh.size())
    return Cut(numel, rows * (numel // max(param.shape[0], 1)), mesh.get_local_rank())
