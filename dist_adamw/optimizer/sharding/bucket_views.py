"""The tensors that the update of one bucket reads and writes: views of parameters and state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from dist_adamw.optimizer.kernels.triton import BlockTable
from dist_adamw.optimizer.transport.layout import Piece

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
# fp32 weights, or the 16 bits that bf16 weights lack.
MASTERS = ("master", "remainder")


class Operands(NamedTuple):
    """The tensors that an update reads and writes; equally long lists of 1-D tensors (steps: 0-d), or empty ones."""

    params: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    max_exp_avg_sqs: list[Tensor]
    steps: list[Tensor]
    masters: list[Tensor]

    def at(self, places: Sequence[int]) -> Operands:
        """Return the operands at these places of the lists."""
        return Operands(*([column[i] for i in places] if column else [] for column in self))


class GroupRun:
    """The pieces of one bucket whose parameters are in one param group, which has their hyper-parameters.

    Attributes:
        group: The param group.
        indices: Their indices among all pieces of the bucket.
    """

    def __init__(self, group: dict[str, Any], indices: list[int], pieces: list[Piece], operands: Operands) -> None:
        self.group, self.indices = group, indices
        self._pieces, self._operands = [pieces[i] for i in indices], operands.at(indices)
        # By the number of pieces with a gradient, which mostly identifies them.
        self._tables: dict[int, tuple[list[int], BlockTable]] = {}

    def operands(self, live: list[int]) -> Operands:
        """Return the tensors that an update of ``live``, some of `indices`, needs."""
        return self._operands if len(live) == len(self.indices) else self._operands.at(self._places(live))

    def table(self, live: list[int], grads: list[Tensor]) -> BlockTable:
        """Return the Triton kernel's table of the pieces ``live``, some of `indices`, and their gradients."""
        params = self.operands(live).params
        known = self._tables.get(len(live))
        if known is None or known[0] != live:
            pieces = [self._pieces[place] for place in self._places(live)]
            made = BlockTable(params, grads, offsets=[p.offset for p in pieces], step_indices=[p.param for p in pieces])
            known = self._tables[len(live)] = (live, made)
        known[1].follow(params, grads)
        return known[1]

    def _places(self, live: list[int]) -> list[int]:
        chosen = set(live)
        return [place for place, i in enumerate(self.indices) if i in chosen]


class BucketViews:
    """Views for one bucket, valid until a parameter moves to other memory.

    Args:
        pieces: The pieces that this rank owns.
        params: The same runs of the parameters.
        moments: The flat moments, the master or remainder, and averages of the weights, by name.
        steps: The step count of each parameter.
        groups: The param group of each parameter.

    Attributes:
        operands: The views that an update needs, by piece.
        columns: The views of each of ``moments``, by piece.
        runs: The pieces by param group.
    """

    def __init__(
        self,
        pieces: list[Piece],
        params: list[Tensor],
        *,
        moments: Mapping[str, Tensor],
        steps: Sequence[Tensor],
        groups: Sequence[dict[str, Any]],
    ) -> None:
        self._pieces = pieces
        # Detached: a view that autograd could follow takes 320 bytes more, and there may be thousands.
        self.columns = {
            name: [moment[p.offset : p.offset + p.numel].detach() for p in pieces] for name, moment in moments.items()
        }
        masters = self.columns.get("master") or self.columns.get("remainder") or []
        exp_avgs, exp_avg_sqs, maxima = (self.columns.get(name, []) for name in MOMENTS)
        self.operands = Operands(params, exp_avgs, exp_avg_sqs, maxima, [steps[p.param] for p in pieces], masters)
        self.set_groups(groups)

    def set_groups(self, groups: Sequence[dict[str, Any]]) -> None:
        """Divide the pieces by the param group of each parameter."""
        by_group: dict[int, tuple[dict[str, Any], list[int]]] = {}
        for j, piece in enumerate(self._pieces):
            group = groups[piece.param]
            by_group.setdefault(id(group), (group, []))[1].append(j)
        self.runs = [GroupRun(group, indices, self._pieces, self.operands) for group, indices in by_group.values()]
