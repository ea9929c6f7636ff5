"""Every field of an index is checked, even if the index's checksum is right."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException

from dist_adamw.checkpoint.storage.files import Writer
from dist_adamw.checkpoint.storage.index import INDEX, check_tensors, damage, read_index
from dist_adamw.errors import CheckpointError
from tests.fuzz.mutations import reseal_index
from tests.unit.test_storage import save

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
Index = dict[str, Any]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(tmp_path, {"x": torch.arange(24.0).view(4, 6), "y": torch.arange(6.0)}, {"n": 1})
    return tmp_path


def cut(index: Index, *rows: tuple[int, int]) -> None:
    """Let ``x`` have chunks of whole rows, from the first of each pair and so many, where those rows lie."""
    ((_, _, file, offset),) = index["tensors"]["x"]["chunks"]
    index["tensors"]["x"]["chunks"] = [[[row, 0], [count, 6], file, offset + 24 * row] for row, count in rows]


def move(index: Index, by: int) -> None:
    index["tensors"]["y"]["chunks"][0][3] = index["tensors"]["x"]["chunks"][0][3] + by


def files(index: Index, name: str) -> None:
    index["files"][name] = index["files"].pop(*index["files"])
    for tensor in index["tensors"].values():
        for chunk in tensor["chunks"]:
            chunk[2] = name


GAPS = "'x' has gaps"
# What is done to the index, and the sentence.
CASES: dict[str, tuple[Callable[[Index], Any], str]] = {
    "a row that is nowhere": (lambda i: cut(i, (0, 1), (2, 2)), GAPS),
    "a row twice": (lambda i: cut(i, (0, 4), (2, 1)), GAPS),
    "a row twice, and another nowhere": (lambda i: cut(i, (0, 2), (1, 2)), GAPS),
    "no chunks": (lambda i: cut(i), GAPS),
    "a row beyond the shape": (lambda i: cut(i, (1, 4)), r"'x' has a chunk Region\(offsets=\(1, 0\)"),
    "a chunk with an axis less": (lambda i: i["tensors"]["x"]["chunks"][0].__setitem__(1, [24]), "'x' has a chunk"),
    "a negative offset": (lambda i: i["tensors"]["x"]["chunks"][0].__setitem__(3, -4), "'x' has a chunk"),
    "an offset that is no integer": (lambda i: i["tensors"]["x"]["chunks"][0].__setitem__(3, 8.0), "'x' has a chunk"),
    "a dtype without a name": (lambda i: i["tensors"]["y"].update(dtype="float31"), "'y' is of dtype 'float31'"),
    "a dtype that files do not hold": (lambda i: i["tensors"]["y"].update(dtype="complex64"), "'y' is of dtype"),
    "no dtype": (lambda i: i["tensors"]["y"].update(dtype=None), "'y' is of dtype None"),
    "a larger dtype": (lambda i: i["tensors"]["x"].update(dtype="float64"), "'x' reaches beyond"),
    "a shape that no tensor has": (lambda i: i["tensors"]["y"].update(shape=[1 << 61, 8]), "'y' has shape"),
    "a negative shape": (lambda i: i["tensors"]["y"].update(shape=[-6]), r"'y' has shape \[-6\]"),
    "bytes beyond the end": (lambda i: move(i, 10_000), "'y' reaches beyond"),
    "bytes of another tensor": (lambda i: move(i, 8), "the same bytes"),
    "all bytes of another tensor": (lambda i: move(i, 0), "the same bytes"),
    "a file that it does not list": (
        lambda i: i["tensors"]["x"]["chunks"][0].__setitem__(2, f"{'0' * 16}-00009.safetensors"),
        "none of its files",
    ),
    "a file of another name": (lambda i: files(i, "0.safetensors"), "no save makes"),
    "a size that is no integer": (lambda i: next(iter(i["files"].values())).update(bytes=1.5), "is described as"),
    "a checksum that is no text": (lambda i: next(iter(i["files"].values())).update(sha256=5), "is described as"),
    "nothing about what was saved": (lambda i: i.update(about=[]), "nothing of what was saved"),
    "a save without a name": (lambda i: i.update(save=7), "nothing of what was saved"),
    "another version": (lambda i: i.update(version=3), "has version 3"),
    "another format": (lambda i: i.update(format="theirs"), "not an index"),
}


@pytest.mark.parametrize("case", CASES)
def test_each_check_of_an_index(case: str, folder: Path) -> None:
    change, sentence = CASES[case]
    index = json.loads((folder / INDEX).read_text())
    change(index)
    assert reseal_index(folder / INDEX, index)
    with pytest.raises(CheckpointError, match=sentence):
        read_index(folder)


def test_rows_in_any_order_are_whole(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    cut(index, (2, 2), (0, 1), (1, 1))
    assert reseal_index(folder / INDEX, index)
    assert len(read_index(folder).tensors["x"].chunks) == 3


def test_an_index_that_could_not_be_read_is_not_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank has written a row less than it should."""
    before = (folder / INDEX).read_bytes()
    finish = Writer.finish

    def finish_with_less(writer: Writer, metadata: Any, results: Any) -> None:
        for result in results[0]:
            _, chunks = result.storage_data
            chunks[:] = [(key, offsets, (rows - 1, columns), place) for key, offsets, (rows, columns), place in chunks]
        finish(writer, metadata, results)

    monkeypatch.setattr(Writer, "finish", finish_with_less)
    with pytest.raises(CheckpointException, match=f"cannot be written: {GAPS}"):
        save(folder, {"x": torch.arange(24.0).view(4, 6)})
    assert (folder / INDEX).read_bytes() == before


def test_what_no_file_holds_is_refused_before_any_rank_writes() -> None:
    check_tensors([("x", torch.float32, (2,), 1)], {})
    with pytest.raises(CheckpointError, match=r"'x' is torch\.complex64.*do not hold"):
        check_tensors([("x", torch.complex64, (2,), 1)], {})
    with pytest.raises(CheckpointError, match=r"'x' has shape \[2305843009213693952, 8\].*no load"):
        check_tensors([("x", torch.float32, (1 << 61, 8), 1)], {})


@pytest.mark.parametrize("key", ["about", "save", "files"])
def test_a_word_that_its_checksum_does_not_know(key: str, folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    index[key] = {"about": {"n": 2}, "save": "other", "files": {}}[key]
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"index\.json .*checksum"):
        read_index(folder)


def test_a_bit_of_a_file_and_a_byte_more(folder: Path) -> None:
    assert damage(folder) is None
    (path,) = folder.glob("*.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert "checksum" in (damage(folder) or "")
    content[-1] ^= 1
    path.write_bytes(content + b"\0")
    assert "were written" in (damage(folder) or "")
    # Both sums are taken of what was written: a file that an index describes rightly is whole.
    index = json.loads((folder / INDEX).read_text())
    facts = {"bytes": len(content) + 1, "sha256": hashlib.sha256(content + b"\0").hexdigest()}
    index["files"] = dict.fromkeys(index["files"], facts)
    assert reseal_index(folder / INDEX, index)
    assert damage(folder) is None
