"""The interface of a transport, which sends slices of buckets between ranks.

Knows layouts, flat tensors and process groups; nothing of optimizers or autograd.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from dist_adamw.optimizer.transport.layout import FlatLayout, Piece
from dist_adamw.ranks import collectives

T = TypeVar("T")
Flat = Sequence["Tensor | None"]  # one 1-D tensor a parameter, None where there is no gradient

MAX_IN_FLIGHT = 2  # buckets, each with its own staging
_GONE = (
    "A rank that this one exchanges gradients or parameters with has ended, or is somewhere else: it skipped a "
    "backward pass or a step() that others made, or left the loop before them. Every rank must make the same ones."
)


@dataclass(slots=True)
class InFlightBucket:
    """A bucket that is being sent. ``held`` must outlive the transfer."""

    bucket: int
    works: list[dist.Work]
    staging: Any
    own: list[Tensor | None] = field(default_factory=list)
    held: list[Tensor] = field(default_factory=list)
    gathered: Flat | None = None  # where slices are received, if not in the parameters

    def wait(self) -> None:
        """Wait until everything has been sent and received.

        Raises:
            RuntimeError: a rank has ended, or did not take part within the process group's timeout.
        """
        try:
            for work in self.works:
                work.wait()
        except RuntimeError as error:
            raise RuntimeError(f"{error}\n{_GONE}") from error


class Transport(ABC):
    """Moves the buckets of one layout. Every method is collective, in the same order on every rank.

    At most MAX_IN_FLIGHT buckets are sent at a time.

    Attributes:
        tag: Tells messages of several optimizers apart; the same on all ranks.
        count: Ranks that gradients are averaged over.
    """

    def __init__(
        self,
        layout: FlatLayout,
        params: list[Tensor],
        *,
        group: dist.ProcessGroup,
        replicas: dist.ProcessGroup | None,
        tag: int,
    ) -> None:
        self._layout, self._params = layout, params
        self._group, self._replicas, self.tag = group, replicas, tag
        self._rank, self._size = collectives.rank(group), layout.world_size
        self.count = self._size * (1 if replicas is None else collectives.world_size(replicas))
        self._like = params[0]
        self._free: list[Any] = []
        self._views: dict[Any, list[Tensor]] = {}

    def _kept(self, key: Any, make: Callable[[], list[Tensor]]) -> list[Tensor]:
        """Views that stay valid: of parameters, or of staging."""
        views = self._views.get(key)
        if views is None:
            views = self._views[key] = make()
        return views

    def _params_of(self, key: Any, pieces: list[Piece]) -> list[Tensor]:
        return self._kept(("params", *key), lambda: cast(list[Tensor], cut(self._params, pieces)))

    def _take(self) -> Any:
        return self._free.pop() if self._free else self._staging()

    @abstractmethod
    def _staging(self) -> Any:
        """Memory for one bucket on its way."""

    def _empty(self, numel: int) -> Tensor:
        return torch.empty(numel, dtype=self._like.dtype, device=self._like.device)

    @abstractmethod
    def start_reduce(self, k: int, flat: Flat) -> InFlightBucket:
        """Send bucket ``k`` of gradients ``flat`` to its owners. They must stay as they are until it is finished."""

    @abstractmethod
    def finish_reduce(self, sent: InFlightBucket, into: list[Tensor] | None, *, add: bool = False) -> None:
        """Average this rank's slice over all ranks.

        Args:
            into: Where each owned piece's average goes; None: over the local gradient it was made from.
            add: Add it to what is there.
        """

    @abstractmethod
    def start_gather(self, k: int, flat: Flat | None = None) -> InFlightBucket:
        """Send this rank's slice of bucket ``k``, and receive the others'.

        Args:
            flat: Of these tensors, None at the same places on every rank; default: of the parameters.
        """

    @abstractmethod
    def finish_gather(self, sent: InFlightBucket) -> None:
        """Wait until what was gathered is what its owners have."""

    def _gathered(self, sent: InFlightBucket, key: Any, pieces: list[Piece]) -> Sequence[Tensor | None]:
        """The runs that a gather reads or writes."""
        return self._params_of(key, pieces) if sent.gathered is None else cut(sent.gathered, pieces)


def _copy_present(targets: Sequence[Tensor | None], sources: Sequence[Tensor]) -> None:
    """Copy each source to its target, where there is one."""
    if any(target is None for target in targets):
        pairs = [(target, source) for target, source in zip(targets, sources, strict=True) if target is not None]
        targets, sources = [target for target, _ in pairs], [source for _, source in pairs]
    if targets:
        torch._foreach_copy_(cast(list[Tensor], list(targets)), list(sources))


def cut(flat: Flat, pieces: list[Piece]) -> list[Tensor | None]:
    """The ``pieces`` of ``flat``; a tensor itself where a piece is all of it, since a view costs a microsecond."""
    return [
        base if (base := flat[p.param]) is None or p.numel == base.numel() else base[p.start : p.stop] for p in pieces
    ]


def cut_slice(flat: Flat, pieces: list[Piece]) -> list[Tensor | None]:
    """`cut` of pieces that lie side by side, as a bucket's and a slice's: only the first and the last can be parts."""
    if not pieces:
        return []
    runs = list(flat[pieces[0].param : pieces[-1].param + 1])
    if len(runs) != len(pieces):  # tensors without elements between them
        runs = [flat[piece.param] for piece in pieces]
    runs[0], runs[-1] = cut(flat, pieces[:1])[0], cut(flat, pieces[-1:])[0]
    return runs
