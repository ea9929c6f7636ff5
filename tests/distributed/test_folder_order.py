"""A run's folder keeps its checkpoints in the order of their samples, whatever their names look like."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn

from dist_adamw import CheckpointError, CheckpointFolder, load, save
from dist_adamw.checkpoint.manifest import damage_of
from dist_adamw.integrations.transformers.trainer_state import _states_in

MODEL = nn.Linear(2, 2)


def write(path: Path) -> None:
    save(path, MODEL)


def names(root: Path) -> list[str]:
    return sorted((path.name for path in root.glob("sample-*")), key=lambda name: int(name.split("-")[1].split(".")[0]))


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_a_run_of_more_than_a_billion_samples_keeps_its_newest(keep: int, tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=keep)
    numbers = [999_999_998, 999_999_999, 1_000_000_000, 1_000_000_001, 10_000_000_000, (1 << 62) - 1, 1 << 62]
    for i, samples in enumerate(numbers, 1):
        saved = folder.save(samples, write)
        assert saved == folder.newest() == folder.all()[-1]
        assert names(tmp_path) == [f"sample-{n:09d}" for n in numbers[max(0, i - keep) : i]]
        assert (tmp_path / "latest").read_text() == f"sample-{samples:09d}"
        load(saved, MODEL)
    folder.close()


def test_names_of_any_width_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=3)
    for samples, name in [(5, "sample-5"), (30, "sample-0000000000000030"), (20, "sample-20"), (7, "sample-007")]:
        write(tmp_path / name)
        (tmp_path / name / "manifest.json").write_text('{"./": {}}')
        assert folder.samples_of(tmp_path / name) == samples
    assert [path.name for path in folder.all()] == ["sample-5", "sample-007", "sample-20", "sample-0000000000000030"]
    newest = folder.newest()
    assert newest is not None
    assert newest.name == "sample-0000000000000030"
    folder.save(1_000_000_000, write)
    assert names(tmp_path) == ["sample-20", "sample-0000000000000030", "sample-1000000000"]
    # As many samples under another name: the new one takes its place, as that of the same name would.
    write(tmp_path / "sample-00001000000000")
    saved = folder.save(1_000_000_000, write)
    assert names(tmp_path) == ["sample-20", "sample-0000000000000030", "sample-1000000000"]
    assert folder.newest() == saved
    folder.close()


@pytest.mark.parametrize("keep", [1, 3])
def test_what_a_save_wrote_stays_also_after_going_back(keep: int, tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=keep)
    for samples in (900_000_000, 1_500_000_000, 2_000_000_000, 950_000_000, 999_999_999, 1_000_000_000, 100):
        saved = folder.save(samples, write)
        assert saved is not None
        assert damage_of(saved) is None
        assert folder.newest() == saved
        assert len(folder.all()) <= keep
    assert (tmp_path / "sample-2000000000.superseded").is_dir()
    folder.close()


def test_a_smaller_keep_takes_the_oldest_and_no_folder_of_the_user(tmp_path: Path) -> None:
    with_many = CheckpointFolder(tmp_path, keep=9)
    for samples in range(999_999_995, 1_000_000_004):
        with_many.save(samples, write)
    with_many.close()
    mine = ["sample-1-of-mine.partial", "sample-12.best", "samples-5", "sample-5.partial.mine", "sample-٣"]
    for name in mine:
        (tmp_path / name).mkdir()
    folder = CheckpointFolder(tmp_path, keep=2)
    folder.save(1_000_000_004, write)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [*mine, "latest", "lock", "sample-1000000003", "sample-1000000004"]
    )
    folder.close()


@pytest.mark.parametrize("samples", [True, -1, 1.0, (1 << 62) + 1, "5"])
def test_samples_that_are_no_count_are_refused(samples: Any, tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    with pytest.raises(CheckpointError, match=r"samples must be (a whole number|at most)"):
        folder.save(samples, write)
    folder.close()


def test_trainers_states_are_in_the_order_of_their_steps(tmp_path: Path) -> None:
    for name in ("global_step9", "global_step10", "global_step100", "global_step_mine"):
        (tmp_path / name).mkdir()
    assert [path.name for path in _states_in(tmp_path)] == ["global_step9", "global_step10", "global_step100"]
