"""Nothing is written that could not be read: limits are the same for both, and checked before files are touched."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dist_adamw import CheckpointError, CheckpointFolder, load, save
from dist_adamw.checkpoint.manifest import damage_of
from dist_adamw.checkpoint.storage import index
from dist_adamw.checkpoint.storage.index import damage
from tests.ranks import run_ranks


def files(folder: Path) -> list[tuple[str, bytes]]:
    if dist.is_initialized():
        dist.barrier()  # the other rank may still remove its file
    return sorted((path.name, path.read_bytes()) for path in folder.rglob("*") if path.is_file())


def refused(root: str) -> None:
    folder, model = Path(root), nn.Linear(3, 3)
    save(folder, model)
    before = files(folder)
    many = nn.Sequential(*(nn.Linear(1, 1) for _ in range(40)))
    largest, index._LARGEST = index._LARGEST, 4000
    try:
        with pytest.raises(CheckpointError, match=r"index .*more than [\d,]+ bytes.* 4,000"):
            save(folder, many)
        assert files(folder) == before
        index._LARGEST = len((folder / "index.json").read_bytes()) - 100  # what only the whole index shows
        with pytest.raises(CheckpointError, match=r"index\.json .* [\d,]+ bytes"):
            save(folder, model)
    finally:
        index._LARGEST = largest
    assert files(folder) == before
    for name, tensor, message in [
        ("strides", torch.zeros(0, 1 << 40, 1 << 22), "no load"),
        ("dims", torch.zeros([1] * 65), "no load"),
        ("complex", torch.zeros(2, dtype=torch.complex64), r"torch\.complex64.*checkpoints"),
    ]:
        odd = nn.Linear(3, 3)
        odd.register_buffer(name, tensor)
        with pytest.raises(CheckpointError, match=message):
            save(folder, odd)
        assert files(folder) == before
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.state[model.weight]["step"] = -1
    with pytest.raises(CheckpointError, match=r"scalars.*no load"):
        save(folder, model, optimizer)
    dist.barrier()
    assert files(folder) == before
    load(folder, model)
    assert damage(folder) is None


@pytest.mark.parametrize("world_size", [1, 2])
def test_what_could_not_be_read_is_not_written(world_size: int, tmp_path: Path) -> None:
    run_ranks(world_size, refused, str(tmp_path / "checkpoint"))


def test_what_is_just_small_enough_to_write_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "_LARGEST", 100)
    index.write_text(tmp_path / "text", "x" * 100)
    assert index.read_bounded(tmp_path / "text") == b"x" * 100
    with pytest.raises(CheckpointError, match=r"101 bytes.* 100 "):
        index.write_text(tmp_path / "text", "x" * 101)
    monkeypatch.setattr(index, "_LARGEST", 99)
    with pytest.raises(CheckpointError, match=r"100 bytes.*more than"):
        index.read_bounded(tmp_path / "text")


def test_an_index_that_is_too_large_takes_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "index.json"
    path.touch()
    os.truncate(path, index._LARGEST + 1)  # a hole in the file, so no disk either

    class Unread(io.FileIO):
        def read(self, size: int | None = -1, /) -> bytes:
            raise AssertionError(f"{size} bytes were asked for")

        readall = read

    monkeypatch.setattr(os, "fdopen", lambda handle, *_, **__: Unread(handle))
    assert "more than any such file" in str(damage(tmp_path))


def test_a_damaged_index_is_no_file_like_any(tmp_path: Path) -> None:
    """A manifest that lists it with its checksum would call the checkpoint whole, and the older ones would go."""
    folder, model = CheckpointFolder(tmp_path, keep=1), nn.Linear(3, 3)
    kept = folder.save(10, lambda path: save(path, model))

    def torn(path: Path) -> Any:
        save(path, model)
        text = (path / "index.json").read_text()
        (path / "index.json").write_text(text.replace('"world_size": 1', '"world_size": 2'))

    with pytest.raises(CheckpointError, match="its checksum differs"):
        folder.save(20, torn)
    assert folder.all() == [kept]
    assert kept is not None
    assert damage_of(kept) is None
    assert folder.newest() == kept
    folder.close()
