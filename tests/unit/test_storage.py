"""Boxes, tensors that lie here in parts, and folders of them."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from dist_adamw.checkpoint.storage import files as storage
from dist_adamw.checkpoint.storage.files import Reader, Writer, read_whole
from dist_adamw.checkpoint.storage.index import CODES, damage, read_index
from dist_adamw.checkpoint.storage.partial_tensor import PartialTensor
from dist_adamw.checkpoint.storage.regions import Region, overlap_anywhere, regions_of
from dist_adamw.errors import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
SHAPES = [(), (5,), (3, 4), (2, 3, 4), (2, 1, 3, 2), (1, 4), (4, 1), (1, 1, 1)]


@pytest.mark.parametrize("shape", SHAPES)
def test_boxes_have_the_elements_in_order(shape: tuple[int, ...]) -> None:
    numel = math.prod(shape)
    numbers = torch.arange(numel).view(shape)
    for start, stop in itertools.combinations_with_replacement(range(numel + 1), 2):
        found = list(regions_of(start, stop, shape))
        assert len(found) <= max(1, 2 * len(shape) - 1)
        assert not overlap_anywhere(found, len(shape))
        elements = [n for region in found for n in numbers[_slices(region)].reshape(-1).tolist()]
        assert elements == list(range(start, stop))


def _slices(region: Region) -> tuple[slice, ...]:
    return tuple(slice(a, a + n) for a, n in zip(*region, strict=True))


def test_overlaps_are_found() -> None:
    assert overlap_anywhere([Region((0, 0), (2, 2)), Region((1, 1), (2, 2))], 2)
    assert not overlap_anywhere([Region((0, 0), (2, 2)), Region((0, 2), (2, 2)), Region((2, 0), (1, 4))], 2)
    assert not overlap_anywhere([Region((1, 1), (0, 2)), Region((0, 0), (2, 2))], 2)
    assert overlap_anywhere([Region((), ()), Region((), ())], 0)


def save(folder: Path, tensors: dict[str, Tensor], about: dict[str, object] | None = None) -> None:
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    dcp_save(tensors, storage_writer=Writer(folder, about), planner=planner, no_dist=True)


def load(folder: Path, tensors: dict[str, Tensor], aliases: dict[str, str] | None = None) -> None:
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    dcp_load(tensors, storage_reader=Reader(folder, aliases), planner=planner, no_dist=True)


DTYPES = [*CODES]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_comes_back(dtype: torch.dtype, tmp_path: Path) -> None:
    tensor = (torch.randn(7, 5) * 50).to(dtype)
    save(tmp_path, {"a": tensor, "none": tensor[:0], "one": tensor[0, 0].clone(), "turned": tensor.t()})
    found = {"a": torch.zeros_like(tensor), "one": torch.zeros((), dtype=dtype), "none": torch.zeros(0, 5, dtype=dtype)}
    load(tmp_path, found)
    assert torch.equal(found["a"], tensor)
    assert torch.equal(found["one"], tensor[0, 0])
    assert torch.equal(read_whole(read_index(tmp_path), "turned"), tensor.t())
    (file,) = tmp_path.glob("*.safetensors")
    with safe_open(file, framework="pt") as opened:
        assert torch.equal(opened.get_tensor("a"), tensor)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block", [1 << 22, 32])
def test_any_runs_load_from_any_other(
    shape: tuple[int, ...], block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a row is larger than what is read at a time."""
    monkeypatch.setattr(storage, "BLOCK", block)
    numel = math.prod(shape)
    tensor = torch.randn(shape)
    for cuts in ([], [1], [numel // 2], [1, 2, numel - 1]):
        edges = sorted({0, *(c for c in cuts if 0 < c < numel), numel})
        ranges = list(itertools.pairwise(edges))[::-1]
        flat = torch.cat([tensor.reshape(-1)[a:b] for a, b in ranges])
        save(tmp_path, {"x": PartialTensor.of_ranges(shape, flat, ranges, dtype=flat.dtype)})
        assert damage(tmp_path) is None
        for start, stop in itertools.combinations(range(numel + 1), 2):
            part = torch.zeros(stop - start, dtype=torch.float64)
            load(tmp_path, {"x": PartialTensor.of_ranges(shape, part, [(start, stop)], dtype=part.dtype)})
            assert torch.equal(part.float(), tensor.reshape(-1)[start:stop])


def test_the_order_of_memory_does_not_matter(tmp_path: Path) -> None:
    tensor = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    flat = tensor.permute(0, 2, 3, 1).reshape(-1)
    owned = [
        PartialTensor.of_ranges(tensor.shape, flat[a:b], [(a, b)], dtype=flat.dtype, order=[0, 2, 3, 1])
        for a, b in [(0, 19), (19, 48)]
    ]
    both = PartialTensor(tensor.shape, flat.dtype, {**owned[0].parts, **owned[1].parts})
    save(tmp_path, {"x": both})
    plain = torch.zeros(4, 3, 2, 2)
    load(tmp_path, {"y": plain}, {"y": "x"})
    assert torch.equal(plain, tensor)


def test_saving_again_leaves_one_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, {"x": torch.zeros(3)}, {"n": 1})
    (tmp_path / f"{'0' * 16}-00007.safetensors").write_bytes(b"left by a save that was killed")
    (tmp_path / "mine.txt").write_text("not ours")
    save(tmp_path, {"x": torch.ones(3)}, {"n": 2})
    index = read_index(tmp_path)
    assert index.about == {"n": 2}
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["index.json", "mine.txt", *index.files])


def test_what_is_no_plain_data_or_tensor_is_refused_and_nothing_lost(tmp_path: Path) -> None:
    save(tmp_path, {"x": torch.zeros(3)}, {"n": 1})
    cases: list[tuple[dict[str, Any], dict[str, object], str]] = [
        ({"x": torch.zeros(3)}, {"n": {1, 2}}, "only plain data"),
        ({"x": torch.zeros(3), "y": "text"}, {}, "'y' is not a tensor"),
        ({"x": torch.zeros(3, dtype=torch.complex64)}, {}, "complex64"),
    ]
    for tensors, about, message in cases:
        with pytest.raises(BaseException, match=message):  # the library's is no Exception
            save(tmp_path, tensors, about)
        assert damage(tmp_path) is None
        assert read_index(tmp_path).about == {"n": 1}
        assert len(list(tmp_path.iterdir())) == 2


def test_folders_of_others_are_named(tmp_path: Path) -> None:
    assert "no such folder" in str(damage(tmp_path / "none"))
    assert "not a whole checkpoint" in str(damage(tmp_path))
    dcp_save({"x": torch.zeros(3)}, checkpoint_id=tmp_path / "theirs", no_dist=True)
    assert "Convert it with `dist-adamw import`" in str(damage(tmp_path / "theirs"))
    save(tmp_path, {"x": torch.zeros(3)})
    with pytest.raises(CheckpointError, match="no tensor 'y'"):
        read_whole(read_index(tmp_path), "y")


def test_torch_alone_reads_nothing_that_is_damaged(tmp_path: Path) -> None:
    dcp_save({"weight": torch.arange(100.0)}, storage_writer=Writer(tmp_path), no_dist=True)
    (file,) = tmp_path.glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-5] ^= 64
    file.write_bytes(content)
    found = {"weight": torch.zeros(100)}
    with pytest.raises(CheckpointException, match="its checksum differs"):
        dcp_load(found, storage_reader=Reader(tmp_path), no_dist=True)
    assert not found["weight"].any()


def test_thousands_of_rows_of_a_wide_matrix_are_compared_in_one_sweep() -> None:
    """Use the regions of 4,096 ranks of FSDP2; comparing all pairs would take minutes."""
    compared = 0

    class Counting(tuple[int, ...]):  # zip asks it for an iterator at each comparison
        def __iter__(self) -> Any:
            nonlocal compared
            compared += 1
            return super().__iter__()

    rows = [Region(Counting((i, 0)), (1, 50_000)) for i in range(4096)]
    assert not overlap_anywhere(rows, 2)
    assert compared < 4096
    assert overlap_anywhere([*rows, Region((7, 3), (1, 1))], 2)
