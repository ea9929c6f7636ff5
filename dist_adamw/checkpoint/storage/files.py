"""Write and read folders of tensors: the storage interface of torch.distributed.checkpoint.

Each rank writes one safetensors file; then the main rank writes an index:

    5f0c81d2e9a3b764-00000.safetensors   one save, one rank: regions, such as "exp_avg.0.weight[0:3,0:8]"
    5f0c81d2e9a3b764-00001.safetensors
    index.json                           the place of each region of each tensor, plain data, checksums

The index is written last, under a temporary name, and renamed. So a reader always sees all of one save, however often
a folder is saved to and whenever a save is killed. Files that the index does not name are left over from killed saves.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import itertools
import json
import math
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from dist_adamw.checkpoint.storage.hashing import BLOCK, HashedWriter
from dist_adamw.checkpoint.storage.index import (
    CODES,
    FILE,
    FORMAT,
    VERSION,
    Chunk,
    Index,
    Saved,
    check_files,
    check_index,
    check_place,
    read_index,
    write_index,
)
from dist_adamw.checkpoint.storage.regions import Region
from dist_adamw.errors import CheckpointError
from dist_adamw.ranks import collectives

# ---------------------------------------------------------------------------------------------- writing


class Writer(StorageWriter):
    """Write to a folder. A checkpoint that it already holds stays readable until the new one is whole.

    For ``torch.distributed.checkpoint.save(state_dict, storage_writer=...)`` with a state dict of tensors only.

    Args:
        folder: Created if missing; on a file system that all ranks share.
        about: Plain data to save with the tensors; the main rank's.
        ranks: The number of ranks that must write; None: do not check it.
    """

    def __init__(self, folder: str | Path, about: Mapping[str, Any] | None = None, ranks: int | None = None) -> None:
        self.folder = Path(folder)
        self.about = {} if about is None else about
        self._ranks = ranks
        self._written: Path | None = None

    @property
    def checkpoint_id(self) -> str:
        """The folder, under the name that the library expects."""
        return str(self.folder)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Switch to another folder."""
        if checkpoint_id is not None:
            self.folder = Path(checkpoint_id)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Return whether this can be a folder."""
        return "://" not in str(checkpoint_id)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Create the folder, and check the plain data."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if is_coordinator:
            check_place(self.folder)
            self._about = as_json(self.about)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Return the plan unchanged."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Give every rank the name of its file."""
        # A new token for each save: no file of the checkpoint that the folder holds is ever overwritten.
        token = secrets.token_hex(8)
        return [
            dataclasses.replace(plan, storage_data=f"{token}-{rank:05d}.safetensors") for rank, plan in enumerate(plans)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's file, and sync it to disk."""
        path = self._written = self.folder / plan.storage_data
        written: Future[list[WriteResult]] = Future()
        try:
            written.set_result(_write_file(path, plan.items, planner) if plan.items else [])
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return written

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the index of all files, which replaces the previous one, after checking that it can be read.

        Raises:
            CheckpointError: a rank has not written, or the main rank does not see every file whole.
        """
        if self._ranks is not None and len(results) != self._ranks:
            raise CheckpointError(f"{len(results)} of {self._ranks} ranks have written")
        places: dict[str, list[list[Any]]] = {key: [] for key in metadata.state_dict_metadata}
        files: dict[str, Any] = {}
        for result in itertools.chain.from_iterable(results):
            file = result.index.fqn
            files[file], chunks = result.storage_data
            for key, offsets, sizes, offset in chunks:
                places[key].append([offsets, sizes, file, offset])
        self._check_seen(files)
        index = {
            "format": FORMAT,
            "version": VERSION,
            "save": secrets.token_hex(8),
            "tensors": _described(metadata, places),
            "files": files,
            "about": self._about,
        }
        check_index(self.folder, index)  # a reader's own checks, while the previous index is still in place
        write_index(self.folder, index)
        self._remove_others(files)

    def _check_seen(self, files: Mapping[str, Any]) -> None:
        """Raise if this process does not see a file as another rank wrote it."""
        for name, facts in files.items():
            there = self.folder / name
            if not there.is_file() or there.stat().st_size != facts["bytes"]:
                raise CheckpointError(
                    f"the main rank does not see {there}, which another rank has written. Give all machines the same "
                    "file system, and all ranks the same folder."
                )

    def _remove_others(self, files: Mapping[str, Any]) -> None:
        """Remove files of earlier saves."""
        for left in self.folder.iterdir():
            if FILE.fullmatch(left.name) and left.name not in files:
                left.unlink(missing_ok=True)

    def discard(self) -> None:
        """Remove what this rank wrote, after a failure, unless the index names it. Local."""
        # `finish` may fail after it has replaced the index: the file is then part of a whole checkpoint.
        if self._written is not None and not _names(self.folder, self._written.name):
            with contextlib.suppress(OSError):  # such as a folder that became read-only
                self._written.unlink(missing_ok=True)


def _described(metadata: Metadata, places: Mapping[str, list[list[Any]]]) -> dict[str, Any]:
    """Return dtype, shape and chunks of each tensor, as in the index."""
    tensors = {}
    for key, found in metadata.state_dict_metadata.items():
        assert isinstance(found, TensorStorageMetadata)
        dtype = str(found.properties.dtype).removeprefix("torch.")
        tensors[key] = {"dtype": dtype, "shape": list(found.size), "chunks": places[key]}
    return tensors


def _names(folder: Path, file: str) -> bool:
    try:
        return file in read_index(folder).files
    except CheckpointError:
        return False


def as_json(about: Mapping[str, Any]) -> Any:
    """Return plain data after a round trip through JSON. Local.

    Raises:
        CheckpointError: it is not plain, or has keys that JSON would change.
    """
    try:
        if not _has_text_for_keys(about):
            raise TypeError("a dict has keys that are not text, and would come back with text keys")
        return json.loads(json.dumps(about))
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"only plain data (numbers, text, lists, dicts) can be saved with the tensors: {error}."
        ) from error


def _has_text_for_keys(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _has_text_for_keys(inner) for key, inner in value.items())
    return not isinstance(value, list | tuple) or all(map(_has_text_for_keys, value))


def _write_file(path: Path, items: Sequence[WriteItem], planner: SavePlanner) -> list[WriteResult]:
    """Write a safetensors file of ``items``; tensors on a device are copied to the host one block at a time."""
    header: dict[str, Any] = {}
    ends = 0
    order = []
    # The widest dtypes first, so that every tensor is aligned to its element size.
    for item in sorted(items, key=lambda item: -_itemsize(item)):
        region = _box_of(item)
        nbytes = region.numel * _itemsize(item)
        if nbytes == 0:
            continue  # this rank has no elements of the tensor
        data = {"shape": list(region.sizes), "data_offsets": [ends, ends + nbytes]}
        header[_name(item, region)] = {"dtype": CODES[_dtype(item)], **data}
        order.append((item, region, ends, nbytes))
        ends += nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format allows padding with spaces; the data then begins at a multiple of 8
    with path.open("xb", buffering=0) as file:
        writer = HashedWriter(file)
        writer.write(len(text).to_bytes(8, "little"))
        writer.write(text)
        for item, _, _, nbytes in order:
            resolved = planner.resolve_data(item)
            assert isinstance(resolved, Tensor)
            assert resolved.nbytes == nbytes
            for block in _blocks(resolved.detach()):
                writer.write(block)
        os.fsync(file.fileno())  # the data must be on disk before an index that names this file
    fingerprint = {"bytes": 8 + len(text) + ends, "sha256": writer.sha256()}
    begin = 8 + len(text)
    # One result per file: with thousands of tensors, pickling one object each would take most of a save's time.
    chunks = [(item.index.fqn, region.offsets, region.sizes, begin + start) for item, region, start, _ in order]
    return [WriteResult(MetadataIndex(path.name), ends, (fingerprint, chunks))]


def _blocks(tensor: Tensor) -> Iterator[memoryview]:
    """Yield the bytes of a tensor in C order."""
    if not tensor.is_contiguous():
        tensor = tensor.contiguous()
    for part in torch.split(tensor.view(-1), BLOCK // tensor.itemsize):
        host = part.cpu()
        # Not by numpy: memory that it has seen cannot be resized, and FSDP2 resizes that of whole parameters.
        yield memoryview((ctypes.c_char * host.nbytes).from_address(host.data_ptr())).cast("B")


def _dtype(item: WriteItem) -> torch.dtype:
    if item.tensor_data is None:
        raise CheckpointError(f"{item.index.fqn!r} is not a tensor. Save plain data as such, not in the state dict.")
    dtype: torch.dtype = item.tensor_data.properties.dtype
    if dtype not in CODES:
        raise CheckpointError(f"{item.index.fqn!r} is {dtype}, which checkpoints do not hold. Convert it.")
    return dtype


def _itemsize(item: WriteItem) -> int:
    return _dtype(item).itemsize


def _box_of(item: WriteItem) -> Region:
    assert item.tensor_data is not None
    chunk = item.tensor_data.chunk
    return Region(tuple(chunk.offsets), tuple(chunk.sizes))


def _name(item: WriteItem, region: Region) -> str:
    assert item.tensor_data is not None
    if region.sizes == tuple(item.tensor_data.size):
        return item.index.fqn
    return f"{item.index.fqn}[{','.join(f'{a}:{a + n}' for a, n in zip(*region, strict=True))}]"


# ---------------------------------------------------------------------------------------------- reading


class Reader(StorageReader):
    """Read what `Writer` wrote: only the requested elements, a block at a time.

    For ``torch.distributed.checkpoint.load(state_dict, storage_reader=...)``.

    Args:
        folder: The checkpoint's folder, or its index.
        aliases: More keys for its tensors: from the key to the name in the checkpoint.
    """

    def __init__(self, folder: str | Path | Index, aliases: Mapping[str, str] | None = None) -> None:
        self._index = folder if isinstance(folder, Index) else None
        self.folder = folder.folder if isinstance(folder, Index) else Path(folder)
        self._aliases = {} if aliases is None else aliases

    @property
    def checkpoint_id(self) -> str:
        """The folder, under the name that the library expects."""
        return str(self.folder)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Switch to another folder."""
        # dcp.load resets to the same folder; its index, which may have been checked, is kept.
        if checkpoint_id is not None and Path(checkpoint_id) != self.folder:
            self._index, self.folder = None, Path(checkpoint_id)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Return whether this can be a folder."""
        return Writer.validate_checkpoint_id(checkpoint_id)

    @property
    def index(self) -> Index:
        """The folder's index, read on first use."""
        if self._index is None:
            self._index = read_index(self.folder)
        return self._index

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the tensors and their chunks, aliases included."""
        chosen = dict(self.index.tensors)
        for key, name in self._aliases.items():
            chosen[key] = self.index.tensors[name]
        found: dict[str, Any] = {}
        for key, saved in chosen.items():
            chunks = [ChunkStorageMetadata(*map(torch.Size, chunk.region)) for chunk in saved.chunks]
            found[key] = TensorStorageMetadata(TensorProperties(dtype=saved.dtype), torch.Size(saved.shape), chunks)
        return Metadata(found)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Compare this rank's part of the files with their checksums."""
        check_files(self.index, collectives.rank(), collectives.world_size())

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Sort the reads by file and offset."""
        return dataclasses.replace(plan, items=sorted(plan.items, key=lambda item: self._place(item)[0]))

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Return the plans unchanged."""
        return plans

    def _place(self, item: ReadItem) -> tuple[tuple[str, int], Saved, Chunk]:
        fqn, hint = item.storage_index.fqn, item.storage_index.index
        saved = self.index.tensors[self._aliases.get(fqn, fqn)]
        assert hint is not None
        chunk = saved.chunks[hint]
        return (chunk.file, chunk.offset), saved, chunk

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy the requested elements into the planner's tensors, converted to their dtype."""
        with contextlib.ExitStack() as opened:
            files: dict[str, BinaryIO] = {}
            for item in plan.items:
                _, saved, chunk = self._place(item)
                if chunk.file not in files:
                    files[chunk.file] = opened.enter_context(self.index.file(chunk.file))
                wanted = Region(tuple(item.storage_offsets), tuple(item.lengths))
                target = planner.resolve_tensor(item).detach()
                _read_box(files[chunk.file], chunk.offset, chunk.region.sizes, saved.dtype, wanted, target)
                planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done


def read_whole(index: Index, key: str) -> Tensor:
    """Return a tensor of a checkpoint in new CPU memory. Local.

    Raises:
        CheckpointError: the checkpoint has no such key.
    """
    if key not in index.tensors:
        raise CheckpointError(f"{index.folder} has no tensor {key!r}.")
    saved = index.tensors[key]
    whole = torch.empty(saved.shape, dtype=saved.dtype)
    for chunk in saved.chunks:
        with index.file(chunk.file) as file:
            part = whole[tuple(slice(a, a + n) for a, n in zip(*chunk.region, strict=True))]
            everything = Region((0,) * len(saved.shape), chunk.region.sizes)
            _read_box(file, chunk.offset, chunk.region.sizes, saved.dtype, everything, part)
    return whole


def _read_box(
    file: BinaryIO, base: int, shape: tuple[int, ...], dtype: torch.dtype, wanted: Region, target: Tensor
) -> None:
    """Copy a region of a chunk into ``target``; the chunk has ``shape``, in C order, and begins at byte ``base``."""
    if not wanted.numel:
        return
    if not shape:  # a scalar: read it as a vector of one element
        shape, wanted, target = (1,), Region((0,), (1,)), target.view(1)
    row = math.prod(shape[1:]) * dtype.itemsize
    rest = Region(wanted.offsets[1:], wanted.sizes[1:])
    if row > BLOCK:  # a row alone exceeds the memory limit of a read: descend one dim
        for i in range(wanted.sizes[0]):
            _read_box(file, base + (wanted.offsets[0] + i) * row, shape[1:], dtype, rest, target[i])
        return
    rows = BLOCK // row
    for i in range(0, wanted.sizes[0], rows):
        n = min(rows, wanted.sizes[0] - i)
        block = read_exactly(file, base + (wanted.offsets[0] + i) * row, n * row).view(dtype).view(n, *shape[1:])
        for dim, (start, length) in enumerate(zip(*rest, strict=True), 1):
            block = block.narrow(dim, start, length)
        target[i : i + n].copy_(block)


def read_exactly(file: BinaryIO, offset: int, nbytes: int) -> Tensor:
    """Return exactly ``nbytes`` bytes of a file. Local.

    Raises:
        CheckpointError: the file ends before.
    """
    data = torch.empty(nbytes, dtype=torch.uint8)
    view = memoryview(data.numpy())  # type: ignore[arg-type]
    file.seek(offset)
    while view:  # an unbuffered file may return fewer bytes than asked for
        if not (read := file.readinto(view)):  # type: ignore[attr-defined]
            raise CheckpointError(f"{file.name} ended while it was read: another process is writing to it.")
        view = view[read:]
    return data


def inside(folder: Path, name: str) -> str:
    """Return ``name``, which a checkpoint gives for something in ``folder``. Local.

    Raises:
        CheckpointError: it leads out of the folder.
    """
    if Path(name).name != name or name in ("", ".."):
        raise CheckpointError(f"{folder} names {name!r}, which lies outside of it.")
    return name
