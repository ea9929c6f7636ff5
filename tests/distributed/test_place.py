"""The place that is saved does not depend on the loop that the script has."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, DataLoaderConfiguration, skip_first_batches
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from dist_adamw import CheckpointFolder, CyclicLRWithRestarts, DistAdamW, position, prepare, rest_of_epoch
from tests.known import unwrap
from tests.ranks import run_ranks


class Job:
    """A shuffled epoch of 40 samples in micro-batches of 4."""

    def __init__(self, accumulation: int = 1, folder: Path | None = None, **options: Any) -> None:
        # Each rank its own seed: where data are not dispatched, Accelerate gives all ranks the first one's order.
        torch.manual_seed((3 if folder is None else 9) + 10 * int(os.environ.get("RANK", 0)) * bool(options))
        config = DataLoaderConfiguration(**options)
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation, dataloader_config=config)
        model: Any = nn.Linear(1, 1)
        optimizer: Any = DistAdamW(model.parameters())
        scheduler = CyclicLRWithRestarts(optimizer, restart_period=1)
        loader: Any = DataLoader(TensorDataset(torch.arange(40).float().view(-1, 1)), 4, shuffle=True)
        self.model, self.optimizer, self.loader, self.scheduler = prepare(
            self.accelerator, model, optimizer, loader, scheduler
        )
        if folder is not None:
            self.accelerator.load_state(str(folder))

    def train(self, batch: Any) -> list[int]:
        with self.accelerator.accumulate(self.model):
            self.accelerator.backward(self.model(batch[0]).mean())
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
        return ids(batch)

    def epoch(self, batches: Any) -> list[int]:
        return [i for batch in batches for i in self.train(batch)]

    def save(self, folder: Path) -> None:
        self.accelerator.save_state(str(folder))


def ids(batch: Any) -> list[int]:
    return [int(x) for x in batch[0].flatten()]


def plain(job: Job) -> Iterator[Any]:
    yield from job.loader


def rest(job: Job) -> Iterator[Any]:
    yield from rest_of_epoch(job.loader)


LOOPS = {"for batch in loader": plain, "rest_of_epoch": rest}


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("loop", LOOPS)
def test_the_batch_in_hand_comes_again(loop: str, accumulation: int, tmp_path: Path) -> None:
    """A save at the top of the loop's body, in the second epoch."""
    job = Job(accumulation)
    job.epoch(LOOPS[loop](job))
    seen: list[int] = []
    for i, batch in enumerate(LOOPS[loop](job)):
        if i == 6 + accumulation // 2:  # of an accumulation of 2, the second half
            job.save(tmp_path)
            break
        seen += job.train(batch)
    applied = seen[:24]
    resumed = Job(accumulation, tmp_path)
    place = position(resumed.loader)
    assert (place.epoch, place.samples) == (1, 24)
    left = resumed.epoch(rest_of_epoch(resumed.loader))
    assert sorted(applied + left) == [*range(40)]
    assert resumed.scheduler.samples == 80


def test_a_batch_whose_step_raised_comes_again(tmp_path: Path) -> None:
    """A script that saves when an error ends it."""
    job = Job()
    batches = iter(job.loader)
    seen = job.train(next(batches))
    batch = next(batches)
    job.accelerator.backward(job.model(batch[0]).mean())
    entries = job.optimizer.state
    job.optimizer.state = defaultdict(dict, {job.model.get_parameter("weight"): {"step": 1.0}})
    with pytest.raises(ValueError, match="has 'exp_avg' of parameter 0"):
        job.optimizer.step()
    job.optimizer.state = entries
    job.save(tmp_path)
    again = Job(folder=tmp_path)
    assert again.scheduler.samples == 4
    assert sorted(seen + again.epoch(rest_of_epoch(again.loader))) == list(range(40))


@pytest.mark.parametrize("drops", [True, False], ids=["zero_grad", "no zero_grad"])
def test_the_batch_of_an_update_that_was_skipped_does_not_come_again(drops: bool, tmp_path: Path) -> None:
    """Its update was tried: it counts no samples, and need not be tried again."""
    job = Job()
    unwrap(job.optimizer).max_grad_norm = 1.0  # an update by a norm that is not finite is skipped
    batches = iter(job.loader)
    seen = job.train(next(batches))
    batch = next(batches)
    job.accelerator.backward(job.model(batch[0]).mean() * float("nan"))
    job.optimizer.step()
    job.scheduler.step()
    assert unwrap(job.optimizer).step_was_skipped
    if drops:
        job.optimizer.zero_grad()
    job.save(tmp_path)
    again = Job(folder=tmp_path)
    assert again.scheduler.samples == 4
    assert sorted(seen + ids(batch) + again.epoch(rest_of_epoch(again.loader))) == list(range(40))


def test_skip_first_batches_of_the_script_repeats_nothing(tmp_path: Path) -> None:
    job = Job()
    job.epoch(job.loader)
    seen = job.epoch(itertools.islice(job.loader, 4))
    job.save(tmp_path)
    resumed = Job(folder=tmp_path)
    again = skip_first_batches(resumed.loader, 4)
    seen += resumed.epoch(itertools.islice(again, 3))
    resumed.save(tmp_path / "again")
    assert (position(resumed.loader).epoch, position(resumed.loader).samples) == (1, 28)
    third = Job(folder=tmp_path / "again")
    seen += third.epoch(rest_of_epoch(third.loader))
    assert sorted(seen) == [*range(40)]
    assert third.scheduler.samples == 80


def test_the_first_batch_after_skip_first_batches_may_be_in_hand(tmp_path: Path) -> None:
    job = Job()
    for _ in skip_first_batches(job.loader, 4):
        job.save(tmp_path)
        break
    assert position(Job(folder=tmp_path).loader).samples == 16


def test_an_epoch_that_was_left_counts_as_one(tmp_path: Path) -> None:
    job = Job()
    next(iter(job.loader))  # a look at the data is none
    job.epoch(itertools.islice(job.loader, 3))
    job.epoch(itertools.islice(job.loader, 2))
    job.save(tmp_path)
    assert (position(job.loader).epoch, position(job.loader).samples) == (1, 8)
    resumed = Job(folder=tmp_path)
    assert (position(resumed.loader).epoch, position(resumed.loader).samples) == (1, 8)


def test_an_epoch_begun_again_before_an_update_goes_on_with_the_first_loop(tmp_path: Path) -> None:
    """Both loops are of epoch 0. The first batch whose gradients no update has had is one of the first loop."""
    job = Job(accumulation=4)
    first = [ids(batch) if i == 0 else job.train(batch) for i, batch in enumerate(itertools.islice(job.loader, 3))]
    job.epoch(itertools.islice(job.loader, 1))
    job.save(tmp_path)
    resumed = Job(folder=tmp_path)
    assert (position(resumed.loader).epoch, position(resumed.loader).samples) == (0, 4)
    left = resumed.epoch(rest_of_epoch(resumed.loader))
    assert left[:8] == first[1] + first[2]
    assert sorted(first[0] + left) == [*range(40)]


def test_an_evaluation_on_the_same_loader_is_no_epoch(tmp_path: Path) -> None:
    job = Job()
    seen = []
    for i, batch in enumerate(job.loader):
        seen += job.train(batch)
        if i == 4:
            with torch.no_grad():
                assert sum(len(x) for (x,) in job.loader) == 40
            job.save(tmp_path)
            break
    resumed = Job(folder=tmp_path)
    assert sorted(seen + resumed.epoch(rest_of_epoch(resumed.loader))) == [*range(40)]


def test_between_two_epochs_and_at_the_last_batch(tmp_path: Path) -> None:
    job = Job()
    for i, batch in enumerate(job.loader):
        job.train(batch)
        if i == 9:
            job.save(tmp_path / "last")
    job.save(tmp_path / "between")
    expected = job.epoch(job.loader)
    for name in ("last", "between"):
        resumed = Job(folder=tmp_path / name)
        assert position(resumed.loader).epoch == 1
        assert resumed.epoch(plain(resumed)) == expected


def left_out_on_one_rank(rank: int, folder: Path) -> int:
    """Return where a job continues if one rank skips the first of the two batches that it accumulated."""
    job = Job(4)
    for i, batch in enumerate(itertools.islice(job.loader, 2)):
        if i == 0 and job.accelerator.process_index == rank:
            with job.accelerator.accumulate(job.model):
                job.model(batch[0])
        else:
            job.train(batch)
    job.save(folder)
    return position(Job(folder=folder).loader).samples


@pytest.mark.parametrize("rank", [0, 1])
def test_what_any_rank_has_accumulated_comes_again(rank: int, tmp_path: Path) -> None:
    assert run_ranks(2, left_out_on_one_rank, rank, tmp_path) == [0, 0]


def left_out_of_dispatched_data(rank: int, folder: Path, seedable: bool) -> tuple[list[int], list[int]]:
    """Samples of a second epoch, and of the job that goes on where a rank left out the first of two batches."""
    options: dict[str, Any] = {"dispatch_batches": True, "use_seedable_sampler": seedable}
    job = Job(4, **options)
    job.epoch(job.loader)
    epoch = []
    for i, batch in enumerate(job.loader):
        epoch += ids(batch)
        if i == 0 and job.accelerator.process_index == rank:
            with job.accelerator.accumulate(job.model):
                job.model(batch[0])
        elif i < 2:
            job.train(batch)
        if i == 1:
            job.save(folder)
    resumed = Job(folder=folder, **options)
    return epoch, resumed.epoch(rest_of_epoch(resumed.loader))


@pytest.mark.parametrize("seedable", [False, True])
@pytest.mark.parametrize("rank", [0, 1])
def test_dispatched_samples_that_come_again_are_of_the_same_epoch(rank: int, seedable: bool, tmp_path: Path) -> None:
    for epoch, resumed in run_ranks(2, left_out_of_dispatched_data, rank, tmp_path, seedable):
        assert resumed == epoch


def epoch_without_the_last(job: Job) -> None:
    for i, batch in enumerate(job.loader):
        if i == 9:
            continue
        job.train(batch)


def test_a_last_batch_that_was_left_out_does_not_come_again(tmp_path: Path) -> None:
    job = Job()
    epoch_without_the_last(job)
    job.save(tmp_path)
    assert (position(job.loader).epoch, job.scheduler.samples) == (1, 36)
    expected = job.epoch(job.loader)
    resumed = Job(folder=tmp_path)
    assert (position(resumed.loader).epoch, position(resumed.loader).samples) == (1, 0)
    assert resumed.epoch(rest_of_epoch(resumed.loader)) == expected


def test_a_last_batch_that_was_fetched_ahead_comes_again(tmp_path: Path) -> None:
    """The loader is exhausted before its last batch is trained on."""
    job = Job()
    batches = iter(job.loader)
    ahead, seen = next(batches), []
    while ahead is not None:
        batch, ahead = ahead, next(batches, None)
        job.save(tmp_path)
        seen = job.train(batch)
    resumed = Job(folder=tmp_path)
    assert (position(resumed.loader).epoch, position(resumed.loader).samples) == (0, 36)
    assert resumed.epoch(rest_of_epoch(resumed.loader)) == seen


def test_a_last_batch_comes_again_when_the_next_epoch_has_been_fetched(tmp_path: Path) -> None:
    job = Job()
    batches = itertools.chain(job.loader, job.loader)
    ahead = next(batches)
    for _ in range(10):
        batch, ahead = ahead, next(batches)
        job.save(tmp_path)
        seen = job.train(batch)
    resumed = Job(folder=tmp_path)
    assert (position(resumed.loader).epoch, position(resumed.loader).samples) == (0, 36)
    assert resumed.epoch(rest_of_epoch(resumed.loader)) == seen
    assert job.scheduler.samples == 40


def test_a_checkpoint_folder_says_when_a_save_is_due(tmp_path: Path) -> None:
    """Asked at every micro-batch: once for each multiple, and not at once after a resume."""
    job, saved = Job(2), []
    with contextlib.closing(CheckpointFolder(tmp_path, keep=9, every=12)) as folder:
        for batch in job.loader:
            if folder.is_due(job.scheduler.samples):  # at the top: the batch in hand comes again
                folder.save(job.scheduler.samples, job.accelerator.save_state)
                saved.append(job.scheduler.samples)
            job.train(batch)
        newest = folder.newest()
        assert newest is not None
    assert saved == [16, 24]  # passed 12, 24; 36 would be 40, after the loop
    resumed = Job(2, newest)
    with contextlib.closing(CheckpointFolder(tmp_path, keep=9, every=12)) as folder:
        assert not folder.is_due(resumed.scheduler.samples)
        assert not folder.is_due(32)
        assert folder.is_due(40)
    with contextlib.closing(CheckpointFolder(tmp_path / "other")) as folder, pytest.raises(ValueError, match="every"):
        folder.is_due(5)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.arange(9.0).view(-1, 1))

    def __len__(self) -> int:
        return 9


@pytest.mark.parametrize("kind", ["indices", "stream", "dispatched"])
def test_the_next_epoch_follows_a_loop_that_was_left_at_its_last_batch(kind: str) -> None:
    config = DataLoaderConfiguration(dispatch_batches=kind == "dispatched")
    accelerator = Accelerator(cpu=True, dataloader_config=config)
    model: Any = nn.Linear(1, 1)
    optimizer: Any = DistAdamW(model.parameters())
    scheduler = CyclicLRWithRestarts(optimizer, restart_period=1)
    data: Any = Stream() if kind != "indices" else torch.arange(9.0).view(-1, 1)
    model, optimizer, loader, scheduler = prepare(accelerator, model, optimizer, DataLoader(data, 4), scheduler)
    sizes: list[list[int]] = []
    for _ in range(3):
        sizes.append([])
        for batch in rest_of_epoch(loader):
            accelerator.backward(model(batch).mean())
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            sizes[-1].append(len(batch))
            if len(sizes[-1]) == 3:
                break
    assert sizes == [[4, 4, 1]] * 3
    assert scheduler.samples == 27
    assert (position(loader).epoch, position(loader).samples) == (2, 9)
