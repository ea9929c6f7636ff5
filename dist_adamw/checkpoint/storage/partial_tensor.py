"""Present a tensor of which this process holds some regions to torch.distributed.checkpoint.

It implements the three methods through which that library reads and fills DTensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor

from dist_adamw.checkpoint.storage.regions import Region, regions_of

Values = Tensor | Callable[[], Tensor]


class PartialTensor(Tensor):
    """A tensor of ``shape`` of which only ``parts`` are stored in this process. Local.

    ``torch.distributed.checkpoint`` saves it from, and loads it into, the memory of the parts. The tensor itself has no
    memory and supports no operation.

    Args:
        shape: The shape of the whole tensor.
        dtype: The dtype of its elements.
        parts: By region, a tensor of the region's sizes, or a function that makes one when it is needed.
    """

    parts: Mapping[Region, Values]
    shared = True  # whether other ranks hold the other regions; False if each rank has all of them

    @staticmethod
    def __new__(cls, shape: Sequence[int], dtype: torch.dtype, parts: Mapping[Region, Values]) -> PartialTensor:
        """Create a tensor without memory."""
        made: PartialTensor = torch.Tensor._make_wrapper_subclass(
            cls, torch.Size(shape), dtype=dtype, device=torch.device("cpu")
        )
        return made

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, parts: Mapping[Region, Values]) -> None:
        self.parts = parts
        self._by_offsets = {region.offsets: values for region, values in parts.items()}

    @classmethod
    def of_ranges(
        cls,
        shape: Sequence[int],
        flat: Values,
        ranges: Iterable[Sequence[int]],
        *,
        dtype: torch.dtype,
        order: Sequence[int] | None = None,
    ) -> PartialTensor:
        """Return a tensor with the elements in ``ranges``, each ``[start, stop)``; ``flat`` has them end to end, 1-D.

        Args:
            shape: The shape of the whole tensor.
            flat: The elements, or a function that makes them.
            ranges: Counted in memory order.
            dtype: The dtype of the elements.
            order: Axes in memory, from the largest stride to the smallest; default: C order. Regions use the tensor's
                own axes, so that a checkpoint does not depend on memory formats.
        """
        if 0 in shape:  # it has no ranges, but the checkpoint must list it
            return cls(shape, dtype, {Region((0,) * len(shape), tuple(shape)): torch.empty(*shape, dtype=dtype)})
        order = range(len(shape)) if order is None else order
        inverse = [list(order).index(axis) for axis in range(len(shape))]
        parts: dict[Region, Values] = {}
        place = 0
        for start, stop in ranges:
            for region in regions_of(start, stop, [shape[axis] for axis in order]):
                key = Region(*(tuple(numbers[axis] for axis in inverse) for numbers in region))
                parts[key] = _cut(flat, place, region, inverse)
                place += region.numel
        return cls(shape, dtype, parts)

    @classmethod
    def of(cls, tensor: Tensor) -> PartialTensor:
        """Return the local part of a DTensor, or all of a plain tensor."""
        if isinstance(tensor, PartialTensor):
            return tensor
        if not isinstance(tensor, DTensor):
            return cls(tensor.shape, tensor.dtype, {Region((0,) * tensor.ndim, tuple(tensor.shape)): tensor})
        if tensor.device_mesh.get_coordinate() is None:  # this rank is not in its mesh
            return cls(tensor.shape, tensor.dtype, {})
        chunks = tensor.__create_chunk_list__()  # type: ignore[no-untyped-call]
        return cls(
            tensor.shape,
            tensor.dtype,
            {
                Region(tuple(c.offsets), tuple(c.sizes)): tensor.__get_tensor_shard__(MetadataIndex("", c.offsets))  # type: ignore[no-untyped-call]
                for c in chunks
            },
        )

    def __create_write_items__(self, fqn: str, _: object) -> list[WriteItem]:
        properties = TensorProperties(dtype=self.dtype)
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.shape),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(*map(torch.Size, region)) for region in self.parts]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        return evaluated(self._by_offsets[tuple(index.offset)])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise NotImplementedError(f"{func} of a PartialTensor: this process has only some of its elements.")

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"PartialTensor(shape={tuple(self.shape)}, dtype={self.dtype}, parts={list(self.parts)})"


def evaluated(values: Values) -> Tensor:
    """Return the tensor, made now if ``values`` is a function. Local."""
    return values if isinstance(values, Tensor) else values()


def _cut(flat: Values, place: int, region: Region, inverse: Sequence[int]) -> Values:
    def cut(values: Tensor) -> Tensor:
        return values[place : place + region.numel].view(region.sizes).permute(list(inverse))

    if isinstance(flat, Tensor):
        return cut(flat)
    return lambda: cut(flat())
