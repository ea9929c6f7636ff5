"""Write, read and verify the index of a checkpoint's folder, and verify every byte of its files."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist

from dist_adamw.checkpoint.storage.hashing import sha256_of
from dist_adamw.checkpoint.storage.regions import Region, overlap_anywhere
from dist_adamw.errors import CheckpointError
from dist_adamw.ranks import collectives

INDEX = "index.json"
FORMAT, VERSION = "dist_adamw checkpoint", 2
FILE = re.compile(r"[0-9a-f]{16}-[0-9]{5,}\.safetensors")
_LARGEST = 1 << 30  # bytes of an index; reading a damaged or hostile one must not exhaust memory
_FILE_NAME = len('"0123456789abcdef-00000.safetensors"')
_MOST_OPEN = 256  # files that a process keeps open; the usual limit is 1,024
CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in CODES}


@dataclass(frozen=True, slots=True)
class Chunk:
    """The place of a region of a tensor: ``offset`` in bytes from the beginning of ``file``."""

    region: Region
    file: str
    offset: int

    def end(self, dtype: torch.dtype) -> int:
        """Return the offset of the byte after the chunk."""
        return self.offset + self.region.numel * dtype.itemsize


@dataclass(frozen=True, slots=True)
class Saved:
    """A tensor of a checkpoint."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True, slots=True)
class Index:
    """A checked index: every element of every tensor lies in exactly one place of one file.

    Attributes:
        folder: The checkpoint's folder.
        save: A random name of this save.
        tensors: By key.
        files: Size in bytes and SHA-256, by name.
        about: Plain data that was saved with the tensors.
        digest: The index's checksum.
        opened: Files that are kept open; see `kept_open`.
    """

    folder: Path
    save: str
    tensors: Mapping[str, Saved]
    files: Mapping[str, tuple[int, str]]
    about: Mapping[str, Any]
    digest: str
    opened: dict[str, BinaryIO] = field(default_factory=dict, compare=False, repr=False)

    @contextlib.contextmanager
    def kept_open(self) -> Iterator[None]:
        """Keep files open, so that those that were checked are read, even if they are replaced in between. Local.

        With very many files they are opened by name again instead.

        Raises:
            CheckpointError: a file cannot be opened.
        """
        with contextlib.ExitStack() as stack:
            try:
                for name in self.files if len(self.files) <= _MOST_OPEN else ():
                    self.opened[name] = stack.enter_context(open_plainly(self.folder / name))
            except OSError as error:
                raise _unreadable(self.folder / name, error) from error
            finally:
                stack.callback(self.opened.clear)
            yield

    @contextlib.contextmanager
    def file(self, name: str) -> Iterator[BinaryIO]:
        """Open one of the checkpoint's files for reading, at an arbitrary position. Local.

        Raises:
            OSError: as `open_plainly`.
        """
        if name in self.opened:
            yield self.opened[name]
            return
        with open_plainly(self.folder / name) as file:
            yield file


# ---------------------------------------------------------------------------------------------- writing


def write_index(folder: Path, index: Mapping[str, Any]) -> None:
    """Replace the folder's index by ``index``, atomically. Local."""
    index = {**index, "sha256": _digest(index)}
    write_text(folder / INDEX, json.dumps(index))


def check_tensors(tensors: Iterable[tuple[str, torch.dtype, Sequence[int], int]], about: Mapping[str, Any]) -> None:
    """Raise if an index of these tensors could not be read; before anything is written. Local.

    Args:
        tensors: Key, dtype, shape and number of regions.
        about: The index's plain data.

    Raises:
        CheckpointError: names the tensor, or the size.
    """
    size = len(json.dumps(about))
    for key, dtype, shape, regions in tensors:
        if dtype not in CODES:
            raise CheckpointError(f"{key!r} is {dtype}, which checkpoints do not hold. Convert it")
        if not _is_shape(shape):
            raise CheckpointError(f"{key!r} has shape {list(shape)[:64]}, which no load would accept")
        # A lower bound: a region has at least a digit, comma and space for each edge, and a file name.
        size += len(json.dumps(key)) + regions * (6 * len(shape) + _FILE_NAME)
    if size > _LARGEST:
        raise CheckpointError(f"its index would have more than {size:,} bytes, and {_LARGEST:,} can be read")


def write_text(path: Path, text: str) -> None:
    """Replace a file by ``text`` atomically, after syncing to disk what the folder already has. Local.

    Raises:
        CheckpointError: the text is longer than `read_bounded` allows. Nothing is written then.
    """
    if (size := len(text.encode())) > _LARGEST:
        raise CheckpointError(f"{path} would have {size:,} bytes, and {_LARGEST:,} can be read.")
    unfinished = path.with_name(f"{path.name}.partial")
    unfinished.unlink(missing_ok=True)
    with unfinished.open("x") as file:  # "x": never write through an existing symlink
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(path.parent)  # the names of the data files must be on disk before the index that refers to them
    unfinished.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Sync the names in a folder to disk. Local."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ---------------------------------------------------------------------------------------------- reading


def read_index(folder: str | Path) -> Index:
    """Read and check a checkpoint's index, without reading its files. Local.

    Raises:
        CheckpointError: it is missing, damaged, inconsistent, or of another format or version.
    """
    folder = Path(folder)
    path = folder / INDEX
    try:
        found = json.loads(read_bounded(path))
    except FileNotFoundError as error:
        raise CheckpointError(f"{_not_whole(folder)}") from error
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {error}.") from error
    if not isinstance(found, dict) or found.get("format", found.get("version")) != FORMAT:
        _refuse_old(path, found)
        raise CheckpointError(f"{path} is not an index of a dist_adamw checkpoint, but of something else.")
    if found.get("version") != VERSION:
        raise CheckpointError(f"{path} has version {found.get('version')!r}; this release reads version {VERSION}.")
    digest = found.pop("sha256", None)
    try:
        if digest != _digest(found):
            raise CheckpointError(f"{path} is damaged: its checksum differs. Resume from an older checkpoint.")
        return _checked(folder, found, digest)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {error}.") from error


def _not_whole(folder: Path) -> str:
    if not folder.is_dir():
        return f"there is no checkpoint {folder}: no such folder."
    if (folder / ".metadata").exists():
        return (
            f"{folder} is a folder of torch.distributed.checkpoint, whose .metadata is a pickle. Convert it with "
            "`dist-adamw import`, which executes nothing."
        )
    if (folder / "dist_adamw" / INDEX).exists():
        return f"{folder} was written by accelerator.save_state, which has its checkpoint in {folder / 'dist_adamw'}."
    return f"{folder} is not a whole checkpoint: {INDEX} is missing (it is written last)."


def check_place(folder: Path) -> None:
    """Raise if a save would replace anything but a checkpoint of ours. Local.

    Raises:
        CheckpointError: another program's file has the index's name.
    """
    path = folder / INDEX
    try:
        found = json.loads(read_bounded(path))
    except (OSError, ValueError, RecursionError):
        return  # missing or damaged: nothing to protect
    if not isinstance(found, dict) or FORMAT not in (found.get("format"), found.get("version")):
        if isinstance(found, dict) and "shares" in found:
            return  # an older release's
        raise CheckpointError(f"{path} is of another program. Choose another folder.")


def _refuse_old(path: Path, found: Any) -> None:
    if isinstance(found, dict) and found.get("version") == 1 and "shares" in found:
        raise CheckpointError(f"{path} has version 1; this release reads version {VERSION}.")


def check_index(folder: Path, index: Mapping[str, Any]) -> None:
    """Raise if an index that is about to be written could not be read. Local.

    Raises:
        CheckpointError: some element of a tensor is in no file, or in two.
    """
    _checked(folder, index, "", "cannot be written")


def _checked(folder: Path, found: Mapping[str, Any], digest: str, verdict: str = "is damaged") -> Index:
    wrong = partial(_wrong, folder / INDEX, verdict)
    files = _checked_files(found["files"], wrong)
    tensors = {key: _checked_tensor(key, facts, files, wrong) for key, facts in found["tensors"].items()}
    _check_places(tensors, files, wrong)
    if not (isinstance(found["about"], dict) and isinstance(found["save"], str)):
        raise wrong("it says nothing of what was saved")
    return Index(folder, found["save"], tensors, files, found["about"], digest)


_Wrong = Callable[[str], CheckpointError]


def _wrong(path: Path, verdict: str, what: str) -> CheckpointError:
    return CheckpointError(f"{path} {verdict}: {what}.")


def _checked_files(found: Mapping[str, Any], wrong: _Wrong) -> dict[str, tuple[int, str]]:
    """Return size and checksum by name."""
    files = {}
    for name, facts in found.items():
        if FILE.fullmatch(name) is None:
            raise wrong(f"it names a file that no save makes: {name!r}")
        if not (_is_size(facts["bytes"]) and isinstance(facts["sha256"], str)):
            raise wrong(f"file {name!r} is described as {facts}")
        files[name] = (facts["bytes"], facts["sha256"])
    return files


def _checked_tensor(key: str, facts: Any, files: Mapping[str, tuple[int, str]], wrong: _Wrong) -> Saved:
    """Return a tensor, each of whose elements lies in one chunk."""
    shape, dtype = tuple(facts["shape"]), DTYPES.get(facts["dtype"])
    if not (_are_sizes(facts["shape"]) and _is_shape(shape)):
        raise wrong(f"{key!r} has shape {list(shape)[:64]}")
    if dtype is None:
        raise wrong(f"{key!r} is of dtype {facts['dtype']!r}")
    chunks = []
    for offsets, sizes, file, offset in facts["chunks"]:
        region = Region(tuple(offsets), tuple(sizes))
        if not (_is_size(offset) and _is_region(offsets, sizes, shape)):
            raise wrong(f"{key!r} has a chunk {region} at byte {offset!r}, which does not fit {list(shape)}")
        if file not in files:
            raise wrong(f"{key!r} lies in {file!r}, which is none of its files")
        chunk = Chunk(region, file, offset)
        if chunk.end(dtype) > files[file][0]:
            raise wrong(f"{key!r} reaches beyond the end of {file}")
        chunks.append(chunk)
    if _have_gaps_or_overlaps(chunks, shape):
        raise wrong(f"{key!r} has gaps or overlaps")
    return Saved(dtype, shape, tuple(chunks))


def _have_gaps_or_overlaps(chunks: list[Chunk], shape: tuple[int, ...]) -> bool:
    regions = [chunk.region for chunk in chunks]
    if sum(region.numel for region in regions) != math.prod(shape):
        return True
    return len(regions) > 1 and overlap_anywhere(regions, len(shape))


def _check_places(tensors: Mapping[str, Saved], files: Iterable[str], wrong: _Wrong) -> None:
    """Raise if two chunks overlap in a file: a small hostile file must not expand to a huge load."""
    taken: dict[str, list[tuple[int, int]]] = {name: [] for name in files}
    for saved in tensors.values():
        for chunk in saved.chunks:
            end = chunk.end(saved.dtype)
            if end > chunk.offset:
                taken[chunk.file].append((chunk.offset, end))
    for name, spans in taken.items():
        spans.sort()
        if not all(a[1] <= b[0] for a, b in pairwise(spans)):
            raise wrong(f"two of its tensors lie in the same bytes of {name}")


def _is_region(offsets: Any, sizes: Any, shape: Sequence[int]) -> bool:
    """Return whether these are offsets and sizes of a region of a tensor of that shape."""
    if not (_are_sizes(offsets) and _are_sizes(sizes) and len(offsets) == len(sizes) == len(shape)):
        return False
    return all(a + n <= m for a, n, m in zip(offsets, sizes, shape, strict=True))


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(map(_is_size, value))


def _is_shape(shape: Sequence[int]) -> bool:
    """Return whether torch can make a tensor of that shape: the strides fit 64 bits, even if it has no elements."""
    return len(shape) <= 64 and _is_size(math.prod(max(n, 1) for n in shape))


def _digest(index: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(index, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def check_files(index: Index, part: int = 0, parts: int = 1, *, sizes_only: bool = False) -> None:
    """Compare the ``part``-th of ``parts`` of a checkpoint's files with their sizes and checksums. Local.

    Raises:
        CheckpointError: names the file.
    """
    for name in sorted(index.files)[part::parts]:
        nbytes, expected = index.files[name]
        path = index.folder / name
        try:
            with index.file(name) as file:
                file.seek(0)  # a file that is kept open may have been read before
                found = os.fstat(file.fileno()).st_size
                digest = expected if sizes_only else sha256_of(file) if found == nbytes else ""
        except OSError as error:
            raise _unreadable(path, error) from error
        if found != nbytes:
            raise CheckpointError(
                f"{path} is damaged: it has {found:,} bytes, {nbytes:,} were written. Resume from an older checkpoint."
            )
        if digest != expected:
            raise CheckpointError(f"{path} is damaged: its checksum differs. Resume from an older checkpoint.")


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{path} cannot be read: {error}. Resume from an older checkpoint.")


def is_ours(folder: Path) -> bool:
    """Return whether a folder has an index of ours, whole or damaged. Local."""
    try:
        found = json.loads(read_bounded(folder / INDEX))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and found.get("format") == FORMAT


def damage(folder: str | Path, part: int = 0, parts: int = 1, *, sizes_only: bool = False) -> str | None:
    """Return what is wrong with a checkpoint, or this part of its files, as a sentence; None if it is whole. Local."""
    try:
        check_files(read_index(folder), part, parts, sizes_only=sizes_only)
    except CheckpointError as error:
        return str(error)
    return None


def read_bounded(path: Path) -> bytes:
    """Return the contents of a plain file, unless it is too large to be one of ours. Local.

    Raises:
        CheckpointError: it is too large.
        OSError: it cannot be read.
    """
    with open_plainly(path) as file:
        if (size := os.fstat(file.fileno()).st_size) > _LARGEST:
            raise CheckpointError(f"{path} is damaged: it has {size:,} bytes, more than any such file has.")
        return file.read()


@contextlib.contextmanager
def open_plainly(path: Path) -> Iterator[BinaryIO]:
    """Open a plain file for reading; refuse symlinks (out of the folder) and pipes (which never end). Local.

    Raises:
        OSError: it is not a plain file, or cannot be read.
    """
    # O_NONBLOCK: otherwise opening a pipe without a writer blocks, before its type can be checked.
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(f"{path} is not a plain file")
    with os.fdopen(handle, "rb", buffering=0) as file:
        yield file


def check_alike(path: Path, group: dist.ProcessGroup | None) -> None:
    """Raise on every rank if only some of them see the folder. Collective."""
    there = collectives.all_gather_objects(os.path.isdir(path), group)  # also False without permission
    if any(there) and not all(there):
        raise CheckpointError(
            f"{path} is there on some ranks and missing on rank {there.index(False)}. Save to a folder that every "
            "machine sees."
        )
