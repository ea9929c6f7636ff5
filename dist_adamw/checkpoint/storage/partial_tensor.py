"""Present a tensor of which this process holds some regions to torch.distributed.checkpoint.

Knows tensors and regions, and the three methods by which DTensor talks to that library.
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

    ``torch.distributed.checkpoint`` saves it from, and loads it into, the memory of the parts. It has no elements of
    its own, and no operation works on it.

    Args:
        shape: Of the whole.
        dtype: Of the elements.
        parts: Regions of it, and a tensor of each region's sizes; or what makes that, where it is to take memory only
            while it is needed.
    """

    parts: Mapping[Region, Values]
    shared = True  # whether other ranks hold the other regions; False where each has all of them

    @staticmethod
    def __new__(cls, shape: Sequence[int], dtype: torch.dtype, parts: Mapping[Region, Values]) -> PartialTensor:
        """Make a tensor without memory."""
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
        """Return the elements in ``ranges``, each ``[start, stop)``, which ``flat`` has end to end, 1-D.

        Args:
            shape: Of the whole.
            flat: The elements, or what makes them.
            ranges: Counted in the order of memory.
            dtype: Of the elements.
            order: Axes in memory, from the largest step to the smallest; default: C order. Regions are of the tensor's
                own axes, so that a checkpoint does not depend on memory formats.
        """
        if 0 in shape:  # no rank has any of it, and it must be there
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
        """Return the part of a DTensor, or the whole of a tensor, that is in this process."""
        if isinstance(tensor, PartialTensor):
            return tensor
        if not isinstance(tensor, DTensor):
            return cls(tensor.shape, tensor.dtype, {Region((0,) * tensor.ndim, tuple(tensor.shape)): tensor})
        if tensor.device_mesh.get_coordinate() is None:
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
        raise NotImplementedError(f"{func} of a PartialTensor: this process does not have all of it.")

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"PartialTensor(shape={tuple(self.shape)}, dtype={self.dtype}, parts={list(self.parts)})"


def evaluated(values: Values) -> Tensor:
    """Return the tensor itself. Local."""
    return values if isinstance(values, Tensor) else values()


def _cut(flat: Values, place: int, region: Region, inverse: Sequence[int]) -> Values:
    def cut(values: Tensor) -> Tensor:
        return values[place : place + region.numel].view(region.sizes).permute(list(inverse))

    if isinstance(flat, Tensor):
        return cut(flat)
    return lambda: cut(flat())
