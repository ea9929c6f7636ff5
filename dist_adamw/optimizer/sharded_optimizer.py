"""First base class of `DistAdamW`: state in shards, which follow changes to ``param_groups`` and ``state``."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.optim.optimizer import Optimizer

from dist_adamw.optimizer.averages import dtypes_of
from dist_adamw.optimizer.gradients.gradient_path import GradientPath
from dist_adamw.optimizer.kernels.foreach import DecayBy
from dist_adamw.optimizer.options import OptionsDigest, describe_options
from dist_adamw.optimizer.outcome import Outcome
from dist_adamw.optimizer.pending_parameters import PendingBuckets
from dist_adamw.optimizer.sharding.all_shards import AllShards, Wanted
from dist_adamw.optimizer.sharding.rank_comparison import RankComparison
from dist_adamw.optimizer.sharding.schemes import (
    OwnSharding,
    PartitionSharding,
    ShardingRanks,
    ShardingScheme,
    detect_scheme,
)
from dist_adamw.optimizer.sharding.shard import Shard
from dist_adamw.optimizer.sharding.user_changes import AMSGRAD_CHANGED, Changes, check_new_state
from dist_adamw.optimizer.sharding.watched_state import AccessRecord
from dist_adamw.optimizer.state_dict import WholeState
from dist_adamw.optimizer.transport.rollcall import Channel
from dist_adamw.plain_data import plain

OPTIONS = (
    "decay_by",
    "max_grad_norm",
    "shard",
    "fused",
    "bucket_numel",
    "master_dtype",
    "state_dtype",
    "reduce_dtype",
    "reproducible",
    "averages",
)


def _order_of(path: GradientPath | None) -> dict[int, int]:
    """Return the place of attached parameters in the layout, by id: backward reaches the last ones first. Local."""
    return {} if path is None else path.sources.order


class ShardedOptimizer(Optimizer):
    """An optimizer whose shards follow ``param_groups`` and ``state`` at every update, save and load.

    Ranks that share state follow changes together: each asks the others for changes while it computes, and no state
    moves until all are known to have made the same ones.
    """

    decay_by: DecayBy
    max_grad_norm: float | None
    shard: bool | str
    fused: bool | None
    bucket_numel: int | None
    master_dtype: torch.dtype | None
    state_dtype: torch.dtype | None
    reduce_dtype: torch.dtype | None
    reproducible: bool
    averages: Any  # by name, see `AveragedOptimizer`
    # Defaults for an unpickled optimizer, whose __init__ has not run.
    _channel = Channel()
    _mesh: DeviceMesh | None = None
    _path: GradientPath | None = None

    def _reset(self) -> None:
        """Forget the layout and the updates so far."""
        if not hasattr(self, "_accesses"):  # kept otherwise: dicts in ``state`` refer to it
            self._accesses = AccessRecord()
        self._all_shards = AllShards(self._accesses)
        self._scheme: ShardingScheme = OwnSharding(self._mesh)
        self._comparison = RankComparison()
        self._options_digest = OptionsDigest()
        self._outcome = Outcome()
        self._pending = PendingBuckets()
        self._consolidated: WholeState | None = None  # valid until state changes

    @property
    def shards(self) -> list[Shard]:
        """The state on this rank. Local."""
        return self._all_shards.shards

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """The ranks that share the state; None if nothing is sharded. Local."""
        return self._ranks.process_group

    @property
    def replica_group(self) -> dist.ProcessGroup | None:
        """The ranks that own the same elements as this one, in other copies of the state. Local."""
        return self._ranks.replica_group

    @property
    def state_bytes(self) -> int:
        """Bytes of optimizer state on this rank, including padding. Local."""
        return sum(shard.nbytes for shard in self.shards)

    @property
    def _ranks(self) -> ShardingRanks:
        return ShardingRanks(None, None, self._mesh) if self.shard is False else self._scheme.ranks()

    @property
    def _is_partitioned(self) -> bool:
        return isinstance(self._scheme, PartitionSharding)

    def _all_params(self) -> list[Tensor]:
        return [param for group in self.param_groups for param in group["params"]]

    def _wanted(self) -> Wanted:
        return Wanted(
            self.param_groups,
            self.state,
            self._ranks,
            self.bucket_numel,
            self._path is not None and self._path.reduce_every_backward and not self.reproducible,
            self._channel,
            self.master_dtype,
            self.state_dtype,
            self.reduce_dtype,
            self.reproducible,
            functools.partial(_order_of, self._path),
            self._is_partitioned,
            dtypes_of(self.averages),
        )

    # ---------------------------------------------------------------- follow the user

    def follow(self) -> None:
        """Apply the user's changes to ``param_groups``, ``state`` and weights, as `step` would. Collective.

        `dist_adamw.save` calls it, so that it saves what the model and the optimizer show.

        Raises:
            ValueError: an entry of ``state`` is not valid state of its parameter. Raised before anything changes.
            AgreementError: ranks have made different changes. On every rank.
        """
        self._pending.wait()
        if not self._is_partitioned:
            if self._all_shards.is_laid_out:
                self._apply_changes(self._differs(), newcomers=False)
                self._settle()
            else:
                self._place_newcomers(gradients=False)
        for shard in self.shards:
            shard.follow_weights()

    def _differs(self) -> bool:
        """Return whether the user has changed something since the last update. Local."""
        return not self._is_partitioned and self._all_shards.differs(self._wanted())

    def _follow(self, changed: bool, *, is_agreed: bool = False) -> None:
        """Follow the user's changes, and lay out state of parameters with their first gradient. Collective.

        Args:
            changed: The result of `_differs` on this rank.
            is_agreed: Whether the ranks are known to have made the same changes.
        """
        if self._is_partitioned:
            self._follow_partitions()
        elif self._all_shards.is_laid_out:
            self._apply_changes(changed, newcomers=True, is_agreed=is_agreed)
        else:
            if not is_agreed:
                # On one rank alone the user may have put invalid entries into ``state``.
                self._ask(bool(self.state), gradients=True)
                self._settle()
            self._place_newcomers()

    def _follow_alone(self) -> None:
        """Follow the user's changes without the other ranks. Local.

        Raises:
            RuntimeError: the changes need all ranks.
            ValueError: an entry of ``state`` is not valid state of its parameter.
        """
        if self._is_partitioned:
            return
        if not self._all_shards.is_laid_out:
            check_new_state(self.param_groups, self.state, ())
            return
        for shard in self.shards:
            shard.follow_weights()
        if not self._differs():
            self._check_amsgrad()
            return
        if self.process_group is None:
            self._apply_changes(True, newcomers=False)
            return
        changes = self._find_changes()
        is_changed = changes.removed or changes.reset or changes.given
        if is_changed or self._all_shards.is_rearranged(changes, self._wanted()):
            raise RuntimeError(
                "param_groups or state were changed since the last update, and ranks apply changes together, in step() "
                "or dist_adamw.save. Call one of them on every rank before state_dict()."
            )

    def _apply_changes(self, changed: bool, *, newcomers: bool, is_agreed: bool = False) -> None:
        """Follow the user's changes, once all ranks that share state are known to have made the same ones.

        Args:
            changed: The result of `_differs` on this rank.
            newcomers: Also lay out state of parameters with their first gradient.
            is_agreed: Whether the ranks are known to have made the same changes.
        """
        sharded = self._all_shards
        sharded.check_process_group(self.process_group)
        if newcomers and not changed:
            changed = sharded.has_first_gradients()
        if not is_agreed:
            self._ask(changed, gradients=newcomers)
        # `_settle` compares and returns the changes only if another rank was asked; otherwise find them here.
        changes = (self._settle() or self._find_changes()) if changed else None
        if changes is not None:
            wanted = self._wanted()
            sharded.take_from_state(changes, wanted)
            sharded.drop_zeros(changes, wanted)
            sharded.keep(changes.kept)
            self._place_newcomers(gradients=newcomers)
            sharded.rearrange(changes, self._wanted())
        if sharded.refresh_moved(self.state):
            changed = True
        if changed:
            self._consolidated = None
            sharded.remember(self._wanted())
        self._check_amsgrad()

    def _check_amsgrad(self) -> None:
        if self._all_shards.has_amsgrad_changed:
            self._settle()  # if only one rank changed it, this raises AgreementError on all
            raise RuntimeError(AMSGRAD_CHANGED)

    def _follow_partitions(self) -> None:
        """Follow DeepSpeed's partitions. Local."""
        # DeepSpeed shows one partition at a time, so parameters that are not in the groups have not been removed.
        seen = self._all_shards.seen
        if self.shards and seen is not None and self.state is not seen.state:  # a state dict was loaded
            params = [param for shard in self.shards for param in shard.params]
            self._all_shards = AllShards(self._accesses)
            self._scheme.forget_counts()
            self._init_state(params)
        present = self._scheme.present(self.shards, self.param_groups)
        self._all_shards.refresh([shard for shard in present if shard.has_moved()], self.state)
        self._place_newcomers()

    # ---------------------------------------------------------------- ask the other ranks

    def _ask(self, changed: bool, *, gradients: bool) -> None:
        """Ask the other ranks for changes and hyper-parameters, without waiting for the answer. Collective.

        Args:
            changed: Whether there are changes on this rank.
            gradients: Also ask which parameters have a gradient, since whole gradients must be the same on all ranks.
        """
        if groups := self._ranks.comparing():
            without = [i for i, p in enumerate(self._all_params()) if p.grad is None] if gradients else None
            self._comparison.ask(changed, self._digest_options(), groups, without_gradient=without)

    def _settle(self) -> Changes | None:
        """Wait for the other ranks' answer, before anything is changed or sent. Collective.

        Returns:
            This rank's changes, if some rank has any.

        Raises:
            AgreementError: some rank has other changes or hyper-parameters. On every rank.
        """
        try:
            return self._compare() if self._comparison.is_answered_yes() else None
        finally:
            self._comparison.close()

    def _compare(self) -> Changes:
        options = {name: plain(getattr(self, name)) for name in OPTIONS} | describe_options(self.param_groups)
        return self._comparison.compare(self._find_changes, options, self._ranks.comparing())

    def _find_changes(self) -> Changes:
        are_local = self._path is not None and not self._path.is_whole
        return self._all_shards.find_changes(self._wanted(), are_local=are_local)

    def _digest_options(self) -> int:
        limit = -1.0 if self.max_grad_norm is None else self.max_grad_norm
        more = (limit, self.decay_by == "lr", self.fused is None, bool(self.fused))
        return self._options_digest.of(self.param_groups, more)

    # ---------------------------------------------------------------- lay out state

    def _shards_by_now(self) -> list[Shard]:
        """Return the shards; if there are none, make those of every parameter that requires a gradient. Local."""
        self._pending.wait()
        if not self._all_shards.is_laid_out:
            self._place_newcomers()
        self._all_shards.follow_device()
        return self.shards

    def _place_newcomers(self, *, gradients: bool = True) -> None:
        """Lay out the state of parameters that need state and have none, see `AllShards.newcomers`. Local."""
        if newcomers := self._all_shards.newcomers(self._wanted(), gradients=gradients):
            self._init_state(newcomers)

    def _init_state(self, params: Iterable[Tensor], *, bucket_numel_of_share: int | None = None) -> None:
        """Lay out the state of ``params`` from their entries in ``self.state``, or else with zeros. Local.

        Every rank must lay out the same parameters in the same order.

        Args:
            bucket_numel_of_share: If ``self.state`` has this rank's share, not the whole, how that was cut.

        Raises:
            RuntimeError: an engine's parameters were added to a sharded optimizer, or would be clipped by the norm of a
                part; or ``shard=True`` on one rank.
        """
        params = list(params)
        chosen = self._all_shards.unplaced(params)
        self._detect_engine_sharding(chosen)
        is_own = isinstance(self._scheme, OwnSharding)
        if chosen and self.shard is True and is_own and self.process_group is None:
            raise RuntimeError(
                "shard=True, but there is one rank or torch.distributed is not initialised. "
                "Launch several ranks, or leave shard='auto'."
            )
        wanted = self._wanted()
        if bucket_numel_of_share is not None:  # its ranges depend on the order too
            wanted.are_shares, wanted.bucket_numel = True, bucket_numel_of_share
            wanted.order = lambda: {id(param): place for place, param in enumerate(params)}
        self._all_shards.add(chosen, wanted)
        self._consolidated = None

    def _detect_engine_sharding(self, chosen: set[int]) -> None:
        params = (param for param in self._all_params() if id(param) in chosen)
        scheme = detect_scheme(params, self, self._scheme)
        if scheme is not self._scheme and any(shard.process_group is not None for shard in self.shards):
            raise RuntimeError(
                "parameters that an engine has sharded were added to an optimizer that itself shards the state of "
                "others over the ranks. Use a separate optimizer for each kind."
            )
        self._scheme = scheme
        if self._is_partitioned and self.max_grad_norm is not None:
            raise RuntimeError(
                f"max_grad_norm={self.max_grad_norm} would clip each of the engine's partitions by its own norm. "
                'Set "gradient_clipping" in the DeepSpeed configuration and leave max_grad_norm=None; '
                "dist_adamw.prepare does it for you."
            )
        self._scheme.check_options(self.reduce_dtype, reproducible=self.reproducible)
