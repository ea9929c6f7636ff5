"""Track which attached optimizer receives each parameter's gradients; there is at most one."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence, Set
from typing import Any, Protocol

import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from dist_adamw.optimizer.gradients.change_watch import refuse_parts
from dist_adamw.optimizer.gradients.handshake import RankMessages
from dist_adamw.ranks import collectives


class Path(Protocol):
    """The part of `GradientPath` that other paths use."""

    @property
    def listening(self) -> Set[int]:
        """Ids of the parameters whose gradients it receives."""

    @property
    def messages(self) -> RankMessages:
        """Its channel to other ranks."""

    @property
    def has_let_go(self) -> bool:
        """Whether an update has used gradients and freed them, so that no ``param.grad`` has them."""

    @property
    def used_ids(self) -> set[int]:
        """Ids of the parameters whose gradients that update used."""

    @property
    def is_sending(self) -> bool:
        """Whether a backward pass of an attached module is running."""

    def release(self, ids: Iterable[int]) -> None:
        """Stop receiving gradients of these parameters, which another path now receives. Collective."""

    def end(self) -> None:
        """Stop receiving and sending gradients, because the optimizer no longer exists on other ranks. Local."""

    def gather_gradients(self) -> None:
        """Have the optimizer make every gradient whole. Collective."""

    def keep_alive(self) -> object:
        """Return an object that keeps the path and its optimizer alive."""


_paths: list[weakref.ref[Path]] = []


def live_paths() -> list[Path]:
    """Return the paths whose optimizers exist."""
    return [path for ref in _paths if (path := ref()) is not None]


def take_over(path: Path, params: Iterable[Tensor]) -> None:
    """Make ``path``, of the optimizer attached last, the only one that receives gradients of ``params``. Local."""
    if not _paths:  # at the first attach, since importing the package must not register global hooks
        register_optimizer_step_pre_hook(_before_any_step)
    known = live_paths()
    ids = {id(param) for param in params}
    for other in known:
        if other is not path and not other.listening.isdisjoint(ids):
            other.release(ids)
    if all(other is not path for other in known):
        known.append(path)
    _paths[:] = [weakref.ref(one) for one in known]


def end_unless_everywhere(reader: Path, model: nn.Module) -> list[Any]:
    """End other paths to ``model`` that exist only on some of the ranks of ``reader``. Collective over these.

    On the other ranks their optimizer no longer exists. On this one, a logger of the main rank may still hold it, or
    the garbage collector has not run yet. Paths between other ranks are left alone. Those of a process group that was
    destroyed are ended too.

    Returns:
        Objects that keep the remaining paths and their optimizers alive.
    """
    for path in live_paths():
        if not all(map(collectives.exists, path.messages.groups)):
            path.end()
    paths = _others_of_same_ranks(reader)
    # An optimizer that is collected during the exchange would be counted as alive on this rank.
    kept = [path.keep_alive() for path in paths]
    everywhere = {path.messages.tag for path in paths}
    for group in reader.messages.groups:
        everywhere.intersection_update(*collectives.all_gather_objects(everywhere, group))
    ids = {id(param) for param in model.parameters()}
    for path in paths:
        if path.messages.tag not in everywhere and not path.listening.isdisjoint(ids):
            path.end()
    return kept


def _others_of_same_ranks(reader: Path) -> list[Path]:
    groups = reader.messages.groups
    others = [
        path for path in live_paths() if path is not reader and all(map(collectives.exists, path.messages.groups))
    ]
    return [path for path in others if _same_ranks(path.messages.groups, groups)]


def _same_ranks(groups: Sequence[dist.ProcessGroup], others: Sequence[dist.ProcessGroup]) -> bool:
    if not all(map(collectives.exists, groups)):
        return False
    return [*map(dist.get_process_group_ranks, groups)] == [*map(dist.get_process_group_ranks, others)]


def gather_from_owners(reader: Path | None, params: Iterable[Tensor]) -> None:
    """Make gradients of ``params`` whole that optimizers other than ``reader``'s have reduced to owners.

    Collective over the ranks of those optimizers.

    Raises:
        RuntimeError: such an optimizer no longer exists. On every rank.
    """
    params = list(params)
    refuse_parts(params)
    ids: set[int] | None = None
    for path in live_paths():
        if path is reader:
            continue
        ids = {id(param) for param in params} if ids is None else ids
        if path.has_let_go and path.used_ids.isdisjoint(ids):
            continue  # its update used gradients of other parameters
        if not path.listening.isdisjoint(ids):
            path.gather_gradients()


def _before_any_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Make gradients that a DistAdamW has reduced whole for another optimizer, for example one of torch."""
    if getattr(optimizer, "gathers_from_owners", False):  # a DistAdamW does so in its own step
        return
    params = [param for group in optimizer.param_groups for param in group["params"]]
    refuse_parts(params)
    ids = set(map(id, params))
    for path in live_paths():
        if path.listening.isdisjoint(ids):
            continue
        # A closure would run backward after this hook, and leave parts of averages. (args[0] is the optimizer.)
        if any(value is not None for value in (*args[1:], kwargs.get("closure"))):
            raise RuntimeError(
                f"{type(optimizer).__name__}.step(closure) reads gradients of parameters that are attached to a "
                "DistAdamW, which reduces each to the rank that owns it. Call the closure yourself, then "
                "gather_gradients() of the DistAdamW, then step() without a closure."
            )
        path.gather_gradients()
