"""Record and check sizes and checksums of all files in a saved folder, including other libraries' files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dist_adamw.checkpoint.storage.hashing import sha256_of
from dist_adamw.checkpoint.storage.index import (
    INDEX,
    damage,
    is_ours,
    open_plainly,
    read_bounded,
    read_index,
)
from dist_adamw.errors import CheckpointError

MANIFEST = "manifest.json"


def file_facts(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield name, size and checksum of the files that no index of ours lists, after syncing them to disk."""
    indexed = {path.parent: files for path in folder.rglob(INDEX) if (files := _files_of(path.parent))}
    known = {where / name for where, names in indexed.items() for name in names}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path not in known and path != folder / MANIFEST:
            with path.open("rb") as file:
                os.fsync(file.fileno())
            yield path.relative_to(folder).as_posix(), fingerprint(path)
    yield from ((f"{path.relative_to(folder).as_posix()}/", {}) for path in sorted(indexed))


def _files_of(folder: Path) -> set[str]:
    """Return a checkpoint's files and its index; nothing if the index is another program's."""
    try:
        return {INDEX, *read_index(folder).files}
    except CheckpointError:
        if is_ours(folder):  # damaged: its files would be recorded as they are, and pass for whole
            raise
        return set()


def fingerprint(path: Path) -> dict[str, Any]:
    """Return size and checksum of a plain file. Local."""
    with open_plainly(path) as file:
        digest = sha256_of(file)
    return {"bytes": path.stat().st_size, "sha256": digest}


def damage_of(path: Path, part: int = 0, parts: int = 1, *, sizes_only: bool = False) -> str | None:
    """Return what is wrong with a checkpoint of a `CheckpointFolder`, as a sentence; None if it is whole. Local.

    Args:
        path: The checkpoint.
        part: The number of this rank's part of the files.
        parts: The number of parts.
        sizes_only: Read the indexes, and of other files only the sizes.
    """
    try:
        manifest = json.loads(read_bounded(path / MANIFEST))
        for i, (name, expected) in enumerate(manifest.items()):
            inside = path / name
            if not inside.resolve().is_relative_to(path.resolve()):  # also through a symlink
                return f"the checkpoint {path} is damaged: its manifest names {name!r}, outside of it."
            if name.endswith("/"):
                if problem := damage(inside, part, parts, sizes_only=sizes_only):
                    return problem
                continue
            if i % parts != part:
                continue
            found = {**expected, "bytes": inside.stat().st_size} if sizes_only else fingerprint(inside)
            if found != expected:
                what = "its checksum differs" if found["bytes"] == expected["bytes"] else "it is torn"
                return (
                    f"the checkpoint {path} is damaged: {name} has {found['bytes']:,} bytes where "
                    f"{expected['bytes']:,} were written, and {what}."
                )
    except FileNotFoundError as error:
        return f"the checkpoint {path} is not whole: {Path(error.filename).name} is missing."
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, MemoryError) as error:
        return f"the checkpoint {path} cannot be read: {type(error).__name__}: {error}."
    return None
