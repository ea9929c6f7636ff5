"""The parameters of a model under names without wrappers, and their digests, whole or in shards."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dist_adamw.optimizer.sharding.dtensors import is_dtensor
from dist_adamw.ranks.run_on_all import Ranks
from dist_adamw.run_log.digests import position_sum, read_numbers
from dist_adamw.wrappers import bare, names_without_wrappers

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


class LoggedParameters:
    """The parameters of a model, as they were when it was last read; an engine may replace them in between.

    Args:
        model: With or without its wrapper.
        ranks: All ranks.

    Attributes:
        names: Their names, in the model's order; a tied parameter has its first one.
    """

    def __init__(self, model: nn.Module, ranks: Ranks) -> None:
        self._model, self._ranks = model, ranks
        self._params: list[Tensor] = []
        self.names: tuple[str, ...] = ()
        self.read()

    def read(self) -> None:
        """Read the model's parameters. Local.

        Raises:
            ValueError: DeepSpeed ZeRO-3 or FSDP1 has partitioned them, so that no rank has their elements in order.
        """
        model = bare(self._model)
        if hasattr(model, "zero_optimization_stage"):  # DeepSpeed's engine is a module around the model
            model = bare(model.module)  # type: ignore[arg-type]
        params: list[Tensor] = list(model.parameters())
        if len(params) == len(self._params) and all(map(operator.is_, params, self._params)):
            return
        if any(hasattr(param, "ds_id") for param in params):
            raise ValueError(
                "RunLog cannot read the parameters of DeepSpeed ZeRO-3, of which each rank has a partition. Use "
                "ZeRO-1, ZeRO-2, FSDP2 or DDP."
            )
        if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
            raise ValueError("RunLog cannot read the flat parameters of FSDP1. Use fully_shard (FSDP2) or DDP.")
        clean = names_without_wrappers(model)
        self.names = tuple(clean(name) for name, _ in model.named_parameters())
        self._params = params

    @property
    def are_sharded(self) -> bool:
        """Whether the sums of ranks have to be added up."""
        return any(map(is_dtensor, self._params))

    def sums(self) -> list[int]:
        """Return this rank's term of the sum that stands for each parameter. Collective if some are sharded.

        Without sharded parameters rank 0 has whole ones and their sums, and the other ranks have none.
        """
        if not self.are_sharded:
            return read_numbers([position_sum(param) for param in self._params]) if self._ranks.is_main else []
        return read_numbers([self._term(param) for param in self._params])

    def facts(self) -> dict[str, Any]:
        """Return what explains different digests of all parameters. Local."""
        return {
            "parameter dtypes": sorted({str(param.dtype).removeprefix("torch.") for param in self._params}),
            "elements": sum(param.numel() for param in self._params),
            "devices": sorted({_device(param.device) for param in self._params}),
        }

    def _term(self, param: Tensor) -> Tensor:
        if not is_dtensor(param):
            return position_sum(param) if self._ranks.is_main else _zero(param.device)
        local = param._local_tensor
        offset = _flat_offset(param)
        if offset is None:
            whole = param.full_tensor()  # every rank of the mesh calls it
            return position_sum(whole) if self._ranks.is_main else _zero(local.device)
        is_first_copy = self._has_rank_0(param) and not any(
            param.device_mesh.get_local_rank(axis)
            for axis, placement in enumerate(param.placements)
            if placement.is_replicate()
        )
        return position_sum(local, offset) if is_first_copy else _zero(local.device)

    @staticmethod
    def _has_rank_0(param: DTensor) -> bool:
        # Of several meshes, each with a copy of the model, one counts.
        return bool((param.device_mesh.mesh == 0).any())


def _zero(device: torch.device) -> Tensor:
    return torch.zeros((), dtype=torch.int64, device=device)


def _device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _flat_offset(param: DTensor) -> int | None:
    """Return where the elements of this rank begin in the whole parameter; None if they are not consecutive there."""
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shards: Sequence[Any] = [placement for placement in param.placements if not placement.is_replicate()]
    if len(shards) > 1 or any(type(shard) is not Shard or shard.dim != 0 for shard in shards):
        return None
    if not shards or not param.numel():
        return 0
    _, offsets = compute_local_shape_and_global_offset(param.shape, param.device_mesh, param.placements)
    return int(offsets[0]) * (param.numel() // param.shape[0])
