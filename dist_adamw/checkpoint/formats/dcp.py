"""Read folders of ``torch.distributed.checkpoint`` without executing their index, a pickle."""

from __future__ import annotations

import io
import itertools
import math
import os
import pickle
import pickletools
import re
from collections import OrderedDict
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_adamw.checkpoint.formats.content import MODEL_KEYS, STATE_NAMES, Content, average_kinds, plain_group
from dist_adamw.checkpoint.formats.torch_file import MEMBERS, Record, tensors_and_plain_data
from dist_adamw.checkpoint.local_state import MODEL
from dist_adamw.checkpoint.storage.files import inside, read_exactly
from dist_adamw.checkpoint.storage.index import DTYPES, open_plainly
from dist_adamw.checkpoint.storage.partial_tensor import PartialTensor
from dist_adamw.checkpoint.storage.regions import Region, overlap_anywhere
from dist_adamw.errors import CheckpointError
from dist_adamw.optimizer.averages import AVERAGED

_DCP = "torch.distributed.checkpoint"
_NEEDED = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("pathlib._local", "PosixPath"),
    ("pathlib._local", "WindowsPath"),
    ("collections", "OrderedDict"),
    (f"{_DCP}.filesystem", "_StorageInfo"),
    *((f"{_DCP}.metadata", name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties")),
    *((f"{_DCP}.metadata", f"{name}StorageMetadata") for name in ("Tensor", "Bytes", "Chunk")),
    (f"{_DCP}.metadata", "_MEM_FORMAT_ENCODING"),
}


class _Unpickler(pickle.Unpickler):
    """Unpickle a ``.metadata`` into records; refuse every class that it does not need."""

    def find_class(self, module: str, name: str) -> Any:
        """Return an inert class in place of the named class or function."""
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        if f"{module}.{name}" in MEMBERS:
            return type(name, (Record,), {})
        if (module, name) not in _NEEDED:
            raise CheckpointError(
                f"its .metadata asks for {module}.{name}, which describes no tensors, and nothing is executed. Do not "
                "load this folder with another tool, unless you know why it does."
            )
        if name == "OrderedDict":
            return OrderedDict
        return tuple if name == "Size" else type(name, (Record,), {})


def _check_memo(data: bytes) -> None:
    """Raise if a pickle's memo has an index beyond its length: Python allocates memory up to the largest index."""
    for opcode, number, _ in pickletools.genops(data):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and (number or 0) > len(data):
            raise CheckpointError(f"its .metadata is damaged: it numbers {number:,} objects in {len(data):,} bytes.")


class _Dcp:
    """A folder of torch.distributed.checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with open_plainly(folder / ".metadata") as file:
            try:
                data = file.read()
                _check_memo(data)
                found = _Unpickler(io.BytesIO(data)).load()
            except CheckpointError as error:
                raise CheckpointError(f"{folder}: {error}") from error
            except (pickle.UnpicklingError, EOFError, ValueError) as error:
                raise CheckpointError(f"{folder}/.metadata is damaged: {error}.") from error
        self.items: Mapping[str, Any] = found.state_dict_metadata
        self.paths: Mapping[str, tuple[Any, ...]] = getattr(found, "planner_data", None) or {}
        self._places = {
            (where.fqn, tuple(getattr(where, "offset", None) or ())): place
            for where, place in found.storage_data.items()
        }

    def is_tensor(self, key: str) -> bool:
        return type(self.items[key]).__name__ == "TensorStorageMetadata"

    def tensor(self, key: str) -> Tensor:
        """Return a tensor that is read when it is needed, chunk by chunk."""
        item = self.items[key]
        dtype, shape = item.properties.state[0], tuple(item.size)
        regions, fit = [], True
        for chunk in item.chunks:
            region = Region(tuple(chunk.offsets), tuple(chunk.sizes))
            fit = fit and _lies_in(region, shape)
            if region.numel:  # a rank without elements of the tensor has an empty chunk
                regions.append(region)
        missing = math.prod(shape) - sum(region.numel for region in regions)
        if not fit or missing or overlap_anywhere(regions, len(shape)):
            raise CheckpointError(f"{self.folder} is damaged: {key} has gaps or overlaps.")
        if not regions:
            return torch.empty(shape, dtype=dtype)
        return PartialTensor(shape, dtype, {region: partial(self._chunk, key, region, dtype) for region in regions})

    def _chunk(self, key: str, region: Region, dtype: torch.dtype) -> Tensor:
        found = self._read(key, region.offsets)
        if not isinstance(found, Tensor) or tuple(found.shape) != region.sizes or found.dtype != dtype:
            raise CheckpointError(f"{self.folder} is damaged: {key} is not what its .metadata says.")
        return found

    def value(self, key: str) -> Any:
        """Return a number, or other plain data."""
        if self.is_tensor(key):
            item = self.items[key]
            return self._read(key, (0,) * len(item.size))
        return self._read(key, ())

    def _read(self, key: str, offsets: tuple[int, ...]) -> Any:
        place = self._places[key, offsets]
        if getattr(place, "transform_descriptors", None):
            raise CheckpointError(f"{self.folder} has {key} compressed. Save it without extensions.")
        with open_plainly(self.folder / inside(self.folder, place.relative_path)) as file:
            if not 0 <= place.offset <= place.offset + place.length <= os.fstat(file.fileno()).st_size:
                raise CheckpointError(f"{self.folder} is damaged: {key} reaches beyond {place.relative_path}.")
            data = io.BytesIO(read_exactly(file, place.offset, place.length).numpy().data)
        return tensors_and_plain_data(data, f"{key} in {self.folder}")


def _lies_in(region: Region, shape: tuple[int, ...]) -> bool:
    if not len(region.offsets) == len(region.sizes) == len(shape):
        return False
    for offset, size, whole in zip(*region, shape, strict=True):
        if offset < 0 or size < 0 or offset + size > whole:
            return False
    return True


def from_dcp(source: Path) -> Content:
    """Read a folder of ``torch.distributed.checkpoint`` with both dicts of ``get_state_dict``, at any level. Local."""
    folder = _Dcp(source)
    weights: dict[tuple[Any, ...], dict[str, str]] = {}
    states: dict[tuple[Any, ...], list[tuple[str, str, str]]] = {}
    of_groups: dict[Any, dict[str, Any]] = {}
    told = (key for key in folder.items if str(folder.paths.get(key, (key,))[-1]).rpartition(".")[2] == AVERAGED)
    averages = average_kinds({AVERAGED: folder.value(key)} for key in told)
    for key in folder.items:
        path = tuple(folder.paths.get(key, (key,)))
        if (of_state := _place(path, "state", averages)) is not None:
            states.setdefault(of_state[0], []).append((*of_state[1:], key))
        elif (of_group := _place(path, "param_groups")) is not None:
            of_groups.setdefault(of_group[1], {})[of_group[2]] = folder.value(key)
        elif folder.is_tensor(key):
            weights.setdefault(path[:-1], {})[str(path[-1])] = key
    if len(states) > 1:
        raise CheckpointError(f"{source} has {len(states)} optimizers, {sorted(states)}. Save only one.")
    found = Content("torch.distributed.checkpoint", averages=averages)
    for name, kind, key in itertools.chain(*states.values()):
        read = folder.value if kind == "step" else folder.tensor
        found.add_state(name, kind, read(key))
    found.groups = _dcp_groups(of_groups)
    trained = itertools.chain.from_iterable(group["names"] for group in found.groups)
    for name, key in _model_of(source, weights, {*trained}).items():
        found.tensors[f"{MODEL}.{name}"] = folder.tensor(key)
    return found


def _place(path: tuple[Any, ...], part: str, averages: Collection[str] = ()) -> tuple[tuple[Any, ...], Any, str] | None:
    """Split ``(..., part, name, what)``, or ``(..., "part.name.what")`` as flattened optimizer states have it."""
    if len(path) > 2 and path[-3] == part and str(path[-1]).isidentifier():
        return path[:-3], path[-2], path[-1]
    flat = re.fullmatch(rf"{part}\.(.+)\.(\w+)", str(path[-1]))
    if flat and (part == "param_groups" or flat[2] in (*STATE_NAMES, *averages)):
        return path[:-1], flat[1], flat[2]
    return None


def _dcp_groups(of_groups: Mapping[Any, dict[str, Any]]) -> list[dict[str, Any]]:
    if all(isinstance(number, int) for number in of_groups):
        return [plain_group(of_groups[number], of_groups[number]["params"]) for number in sorted(of_groups)]
    # Flattened state dicts have the groups' values by parameter: put those with equal values together again.
    groups: list[dict[str, Any]] = []
    for name, values in of_groups.items():
        group = plain_group(values, [name])
        alike = next((other for other in groups if {**other, "names": 0} == {**group, "names": 0}), None)
        if alike is None:
            groups.append(group)
        else:
            alike["names"].append(name)
    return groups


def _model_of(source: Path, weights: Mapping[tuple[Any, ...], dict[str, str]], trained: set[str]) -> dict[str, str]:
    # The model is where all trained parameters are; an EMA copy may qualify too, and then the name decides.
    chosen = [where for where, names in weights.items() if trained <= names.keys()]
    if len(chosen) > 1:
        chosen = [where for where in chosen if where and where[-1] in MODEL_KEYS]
    if len(chosen) != 1:
        places = ", ".join(".".join(map(str, where)) or "the top" for where in weights)
        raise CheckpointError(f"{source} has tensors at {places}; which are the model's? Save it as 'model'.")
    return weights[chosen[0]]
