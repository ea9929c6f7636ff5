"""Sharded optimizer state on disk, keyed by parameter name and element range.

Floor 3: knows DistAdamW and files; nothing of Accelerate. Tensors go through safetensors, so
nothing in a checkpoint is executed when it is read.

A folder holds one file per rank with what that rank owns, and an index that is written last:

    share-00000-of-00002.safetensors   "0.exp_avg": the first shard's moment, 1-D, as the rank holds it
    share-00001-of-00002.safetensors
    index.json                         version, parameters, their ranges and places, checksums

It loads on any number of ranks: each reads the elements it owns, and no others.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dist_adamw import collectives
from dist_adamw.optimizer import DistAdamW
from dist_adamw.shard import MASTERS, axes_in_memory

INDEX = "index.json"
VERSION = 1
_CHUNK = 1 << 22


class CheckpointError(ValueError):
    """A checkpoint cannot be used: torn, of another model, or of an unknown version."""


def save_share(optimizer: DistAdamW, names: Mapping[Tensor, str], folder: str | Path) -> None:
    """Write this rank's share of the state, then, on rank 0, the index. Collective.

    Args:
        names: Every parameter of the optimizer and its name in the model.
        folder: Where to; created. An index that is there is removed first, so that a reader
            never takes an old index for new shares.

    Raises:
        CheckpointError: some rank could not write; on every rank alike.
    """
    folder = Path(folder)
    rank, world_size = collectives.rank(), collectives.world_size()
    file = folder / f"share-{rank:05d}-of-{world_size:05d}.safetensors"
    entries: dict[str, Any] = {}
    problem = None
    _all_ranks(lambda: _clear(folder) if rank == 0 else None)
    try:
        tensors: dict[str, Tensor] = {}
        # Of ranks that hold the same, the first one writes it.
        copy = rank if optimizer.process_group is None else 0
        if optimizer.replica_group is not None:
            copy = collectives.rank(optimizer.replica_group)
        for s, shard in enumerate(optimizer.shards if copy == 0 else []):
            tensors |= {f"{s}.{key}": moment for key, moment in shard.moments.items() if key not in MASTERS}
            if shard.has_master:  # in fp32 however it is kept, so that it loads under other options
                tensors[f"{s}.master"] = shard.flat_master()
            for i, param in enumerate(shard.params):
                place = {"shard": s, "offset": shard.offset_of(i), "ranges": shard.ranges_of(i)}
                entries[names[param]] = {**place, "step": float(shard.steps[i])}
        _write_tensors(tensors, file)
        mine = {"file": file.name, "entries": entries, **file_fingerprint(file)}
    except Exception as error:
        problem, mine = f"{type(error).__name__}: {error}", {}
    shares = _all_ranks_report(problem, mine, f"could not write {folder}")
    index = {"version": VERSION, "world_size": world_size, "parameters": _describe(optimizer, names), "shares": shares}
    _all_ranks(lambda: _write_text(folder / INDEX, json.dumps(index)) if rank == 0 else None)


def load_share(optimizer: DistAdamW, names: Mapping[Tensor, str], folder: str | Path) -> Callable[[], None] | None:
    """Check a folder that `save_share` wrote, and return what copies this rank's elements from it.

    Nothing of the optimizer is changed before the returned function is called. Both are called
    by every rank; only the check communicates. None when no rank has such a folder.

    Raises:
        CheckpointError: the folder is torn or of another model; on every rank alike.
    """
    folder = Path(folder)
    there = collectives.all_gather_objects(folder.is_dir())
    if not any(there):
        return None
    if not all(there):
        raise CheckpointError(
            f"{folder} is there on some ranks and missing on rank {there.index(False)}. "
            "Save to a folder that every machine sees."
        )
    problem, index = None, None
    try:
        index = _read_index(folder)
        _check_same_model(_describe(optimizer, names), index["parameters"], folder)
        # Each rank checks its part of the files in full; together they check all.
        for share in index["shares"][collectives.rank() :: collectives.world_size()]:
            _check_file(folder / share["file"], share)
    except CheckpointError as error:
        problem = str(error)
    _all_ranks_report(problem, None, "")
    assert index is not None
    return lambda: _fill(optimizer, names, folder, index)


def _fill(optimizer: DistAdamW, names: Mapping[Tensor, str], folder: Path, index: Mapping[str, Any]) -> None:
    saved = {name for share in index["shares"] for name in share["entries"]}
    optimizer.place([param for param, name in names.items() if name in saved])
    files: list[Any] = [safe_open(folder / share["file"], framework="pt") for share in index["shares"]]
    tensors_in = [set(file.keys()) for file in files]
    for shard in optimizer.shards:
        for i, param in enumerate(shard.params):
            name = names[param]
            master, has_been_saved = shard.master_of(i) if shard.has_master else None, False
            for share, file, known in zip(index["shares"], files, tensors_in, strict=True):
                if (entry := share["entries"].get(name)) is None:
                    continue
                shard.steps[i] = entry["step"]
                for key in shard.moments.keys() - MASTERS:
                    source = file.get_slice(f"{entry['shard']}.{key}")
                    _copy_overlap(entry, source, shard.ranges_of(i), shard.owned_moment(i, key))
                if master is not None and (key := f"{entry['shard']}.master") in known:
                    _copy_overlap(entry, file.get_slice(key), shard.ranges_of(i), master)
                    has_been_saved = True
            if master is not None and has_been_saved:
                shard.set_master(i, master)
    optimizer.recount()


def _copy_overlap(entry: Mapping[str, Any], source: Any, wanted: list[list[int]], target: Tensor) -> None:
    """Copy what ``source`` holds of the ``wanted`` ranges; in both, ranges lie end to end."""
    offset = entry["offset"]
    for a, b in entry["ranges"]:
        place = 0
        for c, d in wanted:
            start, stop = max(a, c), min(b, d)
            if start < stop:
                target[place + start - c : place + stop - c].copy_(source[offset + start - a : offset + stop - a])
            place += d - c
        offset += b - a


def _describe(optimizer: DistAdamW, names: Mapping[Tensor, str]) -> dict[str, Any]:
    """Name to shape and order of axes in memory, of every parameter of the optimizer."""
    return {
        names[param]: {"shape": list(param.shape), "axes in memory": axes_in_memory(param)}
        for group in optimizer.param_groups
        for param in group["params"]
    }


def _check_same_model(ours: Mapping[str, Any], saved: Mapping[str, Any], folder: Path) -> None:
    differences = [f"{n} is missing in the checkpoint" for n in ours if n not in saved]
    differences += [f"{n} is not in this model" for n in saved if n not in ours]
    differences += [f"{n} is {saved[n]} there and {ours[n]} here" for n in ours if n in saved and ours[n] != saved[n]]
    if differences:
        more = f", and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise CheckpointError(f"{folder} is a checkpoint of another model: {'; '.join(differences[:3])}{more}.")


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX
    try:
        index = json.loads(path.read_text())
        if index["version"] != VERSION:
            raise CheckpointError(f"{path} has version {index['version']!r}; this release reads version {VERSION}.")
        _ = index["parameters"]
        for share in index["shares"]:
            _ = share["entries"], share["bytes"], share["blake2b"]
            if Path(share["file"]).name != share["file"]:
                raise CheckpointError(f"{path} names a file outside its folder: {share['file']!r}.")
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{folder} is not a whole checkpoint: {INDEX} is missing (it is written last)."
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {error}.") from error
    return dict(index)


def _check_file(path: Path, expected: Mapping[str, Any]) -> None:
    try:
        found = file_fingerprint(path)
        if found != {key: expected[key] for key in found}:
            raise CheckpointError(
                f"{path} is damaged: it has {found['bytes']:,} bytes, {expected['bytes']:,} were written, "
                "or its checksum differs. Resume from an older checkpoint."
            )
        with safe_open(path, framework="pt"):
            pass
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}. Resume from an older checkpoint.") from error


def file_fingerprint(path: Path) -> dict[str, Any]:
    """Size and checksum of a file. Local."""
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return {"bytes": path.stat().st_size, "blake2b": digest.hexdigest()}


def _write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    save_file({name: tensor.cpu() for name, tensor in tensors.items()}, path)
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _write_text(path: Path, text: str) -> None:
    """Write all of ``text`` or nothing."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _clear(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for old in [folder / INDEX, *folder.glob("share-*.safetensors")]:
        old.unlink(missing_ok=True)


def _all_ranks(action: Callable[[], None]) -> None:
    """Run ``action``; raise on every rank when it failed on any."""
    problem = None
    try:
        action()
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
    _all_ranks_report(problem, None, "checkpoint")


def _all_ranks_report(problem: str | None, value: Any, what: str) -> list[Any]:
    """Exchange ``value``; raise the first problem on every rank. Collective."""
    reports = collectives.all_gather_objects((problem, value))
    for rank, (failed, _) in enumerate(reports):
        if failed is not None:
            where = f" (rank {rank})" if len(reports) > 1 else ""
            raise CheckpointError(f"{what}: {failed}{where}" if what else failed + where)
    return [value for _, value in reports]
