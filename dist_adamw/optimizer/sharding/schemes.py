"""Sharding schemes: DistAdamW divides the state among ranks, or an engine has sharded the parameters already."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from dist_adamw.optimizer.sharding.dtensors import is_dtensor
from dist_adamw.optimizer.sharding.shard import Shard
from dist_adamw.ranks import collectives

Groups = Sequence[dict[str, Any]]
NOT_UNDER_DEEPSPEED = (
    "reproducible=True is not supported under DeepSpeed, which adds gradients up itself, in an order that depends on "
    "the number of ranks. Use DDP, FSDP2 or one process."
)


@dataclass(frozen=True, slots=True)
class ShardingRanks:
    """The ranks that an optimizer works with.

    Attributes:
        process_group: The ranks that the state is sharded over; None if DistAdamW shards nothing.
        replica_group: The ranks that own the same elements, in other copies of the state.
        mesh: The user's mesh of both.
    """

    process_group: dist.ProcessGroup | None
    replica_group: dist.ProcessGroup | None
    mesh: DeviceMesh | None

    @property
    def groups(self) -> list[dist.ProcessGroup]:
        """The existing groups; a reduction over one after the other is one over all ranks."""
        return [group for group in (self.process_group, self.replica_group) if group is not None]

    @property
    def place(self) -> tuple[int, int]:
        """This rank and the number of ranks, within the process group."""
        group = self.process_group
        return (0, 1) if group is None else (collectives.rank(group), collectives.world_size(group))

    def averaged(self) -> list[int]:
        """Return the global ranks over which gradients are averaged: all of the mesh. Local."""
        if self.mesh is not None:
            return sorted(int(rank) for rank in self.mesh.mesh.flatten())
        return sorted(dist.get_process_group_ranks(dist.group.WORLD))

    def comparing(self) -> list[dist.ProcessGroup]:
        """Return groups, able to reduce host tensors, of the ranks that must make the same changes. Collective."""
        if self.process_group is None:
            return []
        if collectives.serves_host(self.process_group):
            return self.groups
        # The host group has all ranks of the job, and a mesh may have only some of them.
        host = collectives.host_group() if self.mesh is None else None
        return [] if host is None else [host]

    def dividing(self, shard_axes: tuple[Any, ...] | None) -> list[dist.ProcessGroup]:
        """Return the groups over which a shard's elements are divided, see `Shard.shard_axes`. Local."""
        if shard_axes is None:
            return [] if self.process_group is None else [self.process_group]
        mesh, axes = shard_axes
        return [mesh.get_group(axis) for axis in axes]


class ShardingScheme:
    """State that an engine has sharded: this rank updates the parameters it has, and sends nothing.

    Args:
        mesh: The user's mesh, which an engine's sharding does not use.
    """

    def __init__(self, mesh: DeviceMesh | None) -> None:
        self.mesh = mesh

    def ranks(self) -> ShardingRanks:
        """Return the ranks to work with, by the present process group. Local."""
        return ShardingRanks(None, None, self.mesh)

    def present(self, shards: list[Shard], groups: Groups) -> list[Shard]:
        """Return the shards of the parameters that are in ``groups`` now. Local."""
        return shards

    def count_update(self, updates: int, shards: Sequence[Shard]) -> int:
        """Return the number of applied updates, including one more of ``shards``. Local."""
        return updates + 1

    def forget_counts(self) -> None:
        """Read counts from the shards again at the next update. Local."""

    def check_options(self, reduce_dtype: torch.dtype | None, *, reproducible: bool) -> None:
        """Refuse options that do nothing if the engine averages gradients. Local.

        Raises:
            RuntimeError: says what to do instead.
        """
        if reduce_dtype is not None:
            raise RuntimeError(
                f"reduce_dtype={reduce_dtype} is for gradients that DistAdamW averages, but here the engine does. Set "
                'MixedPrecisionPolicy(reduce_dtype=...) of FSDP2, or "communication_data_type" in the DeepSpeed '
                "configuration, and leave reduce_dtype=None."
            )

    def describe(self, ranks: ShardingRanks) -> str:
        """Describe where the state is, for ``repr``. Local."""
        raise NotImplementedError


class OwnSharding(ShardingScheme):
    """State that DistAdamW divides among the ranks of ``mesh``, or all ranks."""

    def ranks(self) -> ShardingRanks:
        """Return the ranks to work with, by the present process group. Local."""
        if not collectives.initialized():
            return ShardingRanks(None, None, self.mesh)
        mesh = self.mesh
        # The last axis of a mesh shards; the first of two replicates.
        group = dist.group.WORLD if mesh is None else mesh.get_group(mesh.ndim - 1)
        if collectives.world_size(group) == 1:
            return ShardingRanks(None, None, mesh)
        replicas = None if mesh is None or mesh.ndim == 1 else mesh.get_group(0)
        if replicas is not None and collectives.world_size(replicas) == 1:  # spare the reductions over it
            replicas = None
        return ShardingRanks(group, replicas, mesh)

    def check_options(self, reduce_dtype: torch.dtype | None, *, reproducible: bool) -> None:
        """Accept any: DistAdamW averages them, or `DistAdamW.step` refuses. Local."""

    def describe(self, ranks: ShardingRanks) -> str:
        """Describe where the state is, for ``repr``. Local."""
        if ranks.process_group is None:
            return "state whole on this rank"
        return f"state sharded over {ranks.place[1]} ranks"


class DTensorSharding(ShardingScheme):
    """State sharded like the parameters, which are DTensors (FSDP2)."""

    def describe(self, ranks: ShardingRanks) -> str:
        """Describe where the state is, for ``repr``. Local."""
        return "state sharded like the parameters, which are DTensors"


class PartitionSharding(ShardingScheme):
    """State of DeepSpeed's flat fp32 partitions, which DeepSpeed puts into the groups one after the other."""

    def __init__(self, mesh: DeviceMesh | None) -> None:
        super().__init__(mesh)
        self._updates_of: dict[int, int] = {}  # by id of shard

    def check_options(self, reduce_dtype: torch.dtype | None, *, reproducible: bool) -> None:
        """See `ShardingScheme`."""
        super().check_options(reduce_dtype, reproducible=reproducible)
        if reproducible:
            raise RuntimeError(NOT_UNDER_DEEPSPEED)

    def present(self, shards: list[Shard], groups: Groups) -> list[Shard]:
        """Return the shards of the partitions that are in ``groups`` now. Local."""
        here = {id(param) for group in groups for param in group["params"]}
        return [shard for shard in shards if id(shard.params[0]) in here]

    def count_update(self, updates: int, shards: Sequence[Shard]) -> int:
        """Return the number of applied updates, which is the most that any partition has had. Local."""
        # DeepSpeed calls step() once per partition, so the first call of an update counts it.
        for shard in shards:
            if id(shard) not in self._updates_of:
                self._updates_of[id(shard)] = int(shard.steps.max())  # waits for the device, so only once
            self._updates_of[id(shard)] += 1
            updates = max(updates, self._updates_of[id(shard)])
        return updates

    def forget_counts(self) -> None:
        """Read counts from the shards again at the next update. Local."""
        self._updates_of.clear()

    def describe(self, ranks: ShardingRanks) -> str:
        """Describe where the state is, for ``repr``. Local."""
        return "state of the partitions that the engine gives this rank"


def detect_scheme(params: Iterable[Tensor], optimizer: Optimizer, known: ShardingScheme) -> ShardingScheme:
    """Detect engine-managed sharding by DTensors in the groups, and by DeepSpeed's optimizers. Local.

    Args:
        params: Parameters that have no state yet.
        optimizer: Their optimizer.
        known: The scheme of the parameters that have state.
    """
    scheme = known
    for param in params:
        # DeepSpeed's partitions are plain tensors. So may be a user's, hence the search for an engine below.
        may_be_partition = not isinstance(param, nn.Parameter) and not isinstance(known, PartitionSharding)
        if is_dtensor(param):
            if not isinstance(scheme, DTensorSharding):
                scheme = DTensorSharding(known.mesh)
        elif may_be_partition and engine_that_shards(optimizer):
            return PartitionSharding(known.mesh)
    return scheme


def engine_that_shards(optimizer: Optimizer) -> Any:
    """Return DeepSpeed's optimizer that steps ``optimizer`` on its own partitions; None if there is none. Local.

    DeepSpeed puts its flat fp32 partitions into the groups of the optimizer that it is given. Nothing but its reference
    to the optimizer shows this, so its objects are searched for that. It takes tenths of a second: call it rarely.
    """
    module = sys.modules.get("deepspeed.runtime.base_optimizer")
    base = getattr(module, "DeepSpeedOptimizer", None)
    if base is None:
        return None
    found = (candidate for candidate in gc.get_objects() if issubclass(type(candidate), base))
    return next((one for one in found if getattr(one, "optimizer", None) is optimizer), None)
