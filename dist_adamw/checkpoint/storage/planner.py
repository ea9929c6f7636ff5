"""Plan distributed saves with tuples of numbers in place of pickled objects.

With thousands of tensors, DCP's own plans take most of a save: a dozen pickled objects per tensor go to the main rank
and back, and ``dcp.save`` checks and logs every tensor of the state dict.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import StorageWriter

from dist_adamw.checkpoint.storage.index import check_tensors


class Planner(DefaultSavePlanner):
    """A ``DefaultSavePlanner`` that holds the tensors itself. Pass ``dcp.save`` an empty state dict.

    Args:
        tensors: By key: plain tensors, DTensors, `PartialTensor`.
        about: The plain data that the index will have; the main rank's.
    """

    def __init__(self, tensors: Mapping[str, Tensor], about: Mapping[str, Any] | None = None) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._tensors, self._about = dict(tensors), about or {}
        self._items: list[WriteItem] = []

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        """Plan this object's tensors in place of the state dict."""
        super().set_up_planner(self._tensors, storage_meta, is_coordinator)

    def create_local_plan(self) -> SavePlan:
        """Return this rank's items as tuples."""
        self._items = super().create_local_plan().items
        return SavePlan([], planner_data=list(map(_numbers, self._items)))

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Choose the items that each rank writes, by their indices in its local plan."""
        given = [[_item(*numbers) for numbers in plan.planner_data] for plan in all_plans]
        chosen, metadata = super().create_global_plan([SavePlan(items) for items in given])
        check_tensors(_described(metadata), self._about)
        plans = []
        for items, plan in zip(given, chosen, strict=True):
            kept = {item.index for item in plan.items}
            places = [i for i, item in enumerate(items) if item.index in kept]
            plans.append(SavePlan([], planner_data=places))
        return plans, metadata

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """Replace the indices by this rank's items."""
        items = [self._items[i] for i in new_plan.planner_data]
        return super().finish_plan(dataclasses.replace(new_plan, items=items, planner_data=None))


def save_alone(planner: SavePlanner, writer: StorageWriter) -> None:
    """Save from one process: ``torch.distributed.checkpoint.save(no_dist=True)`` without its warning. Local."""
    planner.set_up_planner({}, writer.storage_meta(), True)
    writer.set_up_storage_writer(True)
    local_plan = writer.prepare_local_plan(planner.create_local_plan())
    global_plans, metadata = planner.create_global_plan([local_plan])
    (plan,) = writer.prepare_global_plan(global_plans)
    results = writer.write_data(planner.finish_plan(plan), planner).wait()
    writer.finish(metadata, [results])


def _described(metadata: Metadata) -> Iterator[tuple[str, torch.dtype, tuple[int, ...], int]]:
    for key, found in metadata.state_dict_metadata.items():
        assert isinstance(found, TensorStorageMetadata)
        yield key, found.properties.dtype, tuple(found.size), len(found.chunks)


def _numbers(item: WriteItem) -> tuple[Any, ...]:
    data = item.tensor_data
    assert data is not None
    is_shard = item.type == WriteItemType.SHARD
    chunk = data.chunk
    return item.index.fqn, is_shard, data.properties.dtype, tuple(data.size), tuple(chunk.offsets), tuple(chunk.sizes)


def _item(
    fqn: str,
    is_shard: bool,
    dtype: torch.dtype,
    size: tuple[int, ...],
    offsets: tuple[int, ...],
    sizes: tuple[int, ...],
) -> WriteItem:
    chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
    data = TensorWriteData(chunk, TensorProperties(dtype=dtype), torch.Size(size))
    kind = WriteItemType.SHARD if is_shard else WriteItemType.TENSOR
    return WriteItem(MetadataIndex(fqn, chunk.offsets), kind, tensor_data=data)
