"""Present a tensor of which this process holds some regions to torch.distributed.checkpoint.

Knows tensors and boxes, and the three methods by which DTensor talks to that library.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor

from dist_adamw.checkpoint.storage.regions import Box, boxes

Values = Tensor | Callable[[], Tensor]


class PartialTensor(Tensor):
    """A tensor of ``shape`` of which only ``parts`` are stored in this process. Local.

    ``torch.distributed.checkpoint`` saves it from, and loads it into, the memory of the parts. It has no elements of
    its own, and no operation works on it.

    Args:
        shape: Of the whole.
        dtype: Of the elements.
        parts: Boxes of it, and a tensor of each box's sizes; or what makes that, where it is to take memory only
            while it is needed.
    """

    parts: Mapping[Box, Values]
    shared = True  # whether other ranks hold the other boxes; False where each has all of them

    @staticmethod
    def __new__(cls, shape: Sequence[int], dtype: torch.dtype, parts: Mapping[Box, Values]) -> PartialTensor:
        """A tensor without memory."""
        made: PartialTensor = torch.Tensor._make_wrapper_subclass(
            cls, torch.Size(shape), dtype=dtype, device=torch.device("cpu")
        )
        return made

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, parts: Mapping[Box, Values]) -> None:
        self.parts = parts
        self._by_offsets = {box.offsets: values for box, values in parts.items()}

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
        """Elements in ``ranges``, each ``[start, stop)``, which ``flat`` has end to end, 1-D.

        Args:
            shape: Of the whole.
            flat: The elements, or what makes them.
            ranges: Counted in the order of memory.
            dtype: Of the elements.
            order: Axes in memory, from the largest step to the smallest; default: C order. Boxes are of the tensor's
                own axes, so that a checkpoint does not depend on memory formats.
        """
        if 0 in shape:  # no rank has any of it, and it must be there
            return cls(shape, dtype, {Box((0,) * len(shape), tuple(shape)): torch.empty(*shape, dtype=dtype)})
        order = range(len(shape)) if order is None else order
        inverse = [list(order).index(axis) for axis in range(len(shape))]
        parts: dict[Box, Values] = {}
        place = 0
        for start, stop in ranges:
            for box in boxes(start, stop, [shape[axis] for axis in order]):
                key = Box(*(tuple(numbers[axis] for axis in inverse) for numbers in box))
                parts[key] = _cut(flat, place, box, inverse)
                place += box.numel
        return cls(shape, dtype, parts)

    @classmethod
    def of(cls, tensor: Tensor) -> PartialTensor:
        """Return the part of a DTensor, or the whole of a tensor, that is in this process."""
        if isinstance(tensor, PartialTensor):
            return tensor
        if not isinstance(tensor, DTensor):
            return cls(tensor.shape, tensor.dtype, {Box((0,) * tensor.ndim, tuple(tensor.shape)): tensor})
        if tensor.device_mesh.get_coordinate() is None:
            return cls(tensor.shape, tensor.dtype, {})
        chunks = tensor.__create_chunk_list__()  # type: ignore[no-untyped-call]
        return cls(
            tensor.shape,
            tensor.dtype,
            {
                Box(tuple(c.offsets), tuple(c.sizes)): tensor.__get_tensor_shard__(MetadataIndex("", c.offsets))  # type: ignore[no-untyped-call]
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
        return [ChunkStorageMetadata(*map(torch.Size, box)) for box in self.parts]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        return evaluated(self._by_offsets[tuple(index.offset)])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise NotImplementedError(f"{func} of a PartialTensor: this process does not have all of it.")

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"PartialTensor(shape={tuple(self.shape)}, dtype={self.dtype}, parts={list(self.parts)})"


def evaluated(values: Values) -> Tensor:
    """The tensor itself. Local."""
    return values if isinstance(values, Tensor) else values()


def _cut(flat: Values, place: int, box: Box, inverse: Sequence[int]) -> Values:
    def cut(values: Tensor) -> Tensor:
        return values[place : place + box.numel].view(box.sizes).permute(list(inverse))

    if isinstance(flat, Tensor):
        return cut(flat)
    return lambda: cut(flat())
