"""Samples are counted as the loop trains on them: rows count once, in the update of their first backward pass."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from accelerate import Accelerator, DataLoaderConfiguration, skip_first_batches
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from dist_adamw import CyclicLRWithRestarts, DistAdamW, prepare
from tests.ranks import run_ranks, run_ranks_within


def rows(size: int) -> TensorDataset:
    return TensorDataset(torch.arange(size).float().view(-1, 1))


class Stream(IterableDataset[Tensor]):
    def __init__(self, size: int) -> None:
        self.size = size

    def __iter__(self) -> Iterator[Tensor]:
        yield from torch.arange(self.size).float().view(-1, 1)

    def __len__(self) -> int:
        return self.size


class Growing(Dataset[Tensor]):
    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int) -> Tensor:
        return torch.tensor([float(i)])


class Loop:
    """A script: what `prepare` gave it, and one micro-batch of training."""

    def __init__(
        self, data: Any, accumulation: int = 1, batch_size: int = 4, config: Any = None, **loader: Any
    ) -> None:
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation, dataloader_config=config)
        model: Any = nn.Linear(1, 1)
        optimizer: Any = DistAdamW(model.parameters())
        scheduler = CyclicLRWithRestarts(optimizer, restart_period=1)
        source = DataLoader(data, batch_size, **loader)
        self.model, self.optimizer, self.loader, self.scheduler = prepare(
            self.accelerator, model, optimizer, source, scheduler
        )

    def train(self, batch: Any) -> int:
        """A micro-batch; the clock after it."""
        x = batch[0] if isinstance(batch, (list, tuple)) else batch
        with self.accelerator.accumulate(self.model):
            self.accelerator.backward(self.model(x).mean())
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
        return self.scheduler.samples

    def epoch(self, batches: Any = None) -> list[int]:
        return [self.train(batch) for batch in (self.loader if batches is None else batches)]


def second_loader() -> int:
    data = rows(64)
    loop = Loop(data)
    other = loop.accelerator.prepare(DataLoader(data, 16))
    return loop.epoch(other)[-1]


def left_by_break() -> int:
    loop = Loop(rows(40), 4)
    loop.epoch(itertools.islice(loop.loader, 2))
    return loop.epoch()[-1]


def accumulation_changed() -> int:
    loop = Loop(rows(100), 2)
    for i, batch in enumerate(loop.loader, 1):
        loop.train(batch)
        if i == 2:
            loop.accelerator.gradient_accumulation_steps = 3
    return loop.scheduler.samples


def growing() -> int:
    data = Growing(10)
    loop = Loop(data)
    loop.epoch()
    data.size = 12
    return loop.epoch()[-1]


def recreated() -> int:
    loop = Loop(rows(10))
    for _ in range(3):
        loop.epoch(loop.accelerator.prepare(DataLoader(rows(13), 4)))
    return loop.scheduler.samples


def skipped_first_of_a_stream() -> int:
    loop = Loop(Stream(42), 3)
    return loop.epoch(skip_first_batches(loop.loader, 1))[-1]


def cut_by_hand() -> int:
    loop = Loop(rows(24), 4, batch_size=8)
    for (batch,) in loop.loader:
        for i, piece in enumerate(batch.split(2)):
            loop.accelerator.gradient_state.plugin_kwargs["sync_with_dataloader"] = False
            loop.train(piece)
            assert loop.accelerator.sync_gradients == (i == 3)
    return loop.scheduler.samples


CASES: dict[str, tuple[Callable[[], int], int]] = {
    "a second prepared loader over the same data set object": (second_loader, 64),
    "an epoch left by break in mid-accumulation": (left_by_break, 48),
    "accumulation changed in mid-epoch": (accumulation_changed, 100),
    "a data set that grows": (growing, 22),
    "another data set in a loader created anew": (recreated, 39),
    "skip_first_batches of a sized stream": (skipped_first_of_a_stream, 38),
    "a batch cut by hand": (cut_by_hand, 24),
}


@pytest.mark.parametrize("case", CASES)
def test_samples_are_those_that_were_trained_on(case: str) -> None:
    count, expected = CASES[case]
    assert count() == expected


def test_a_micro_batch_that_is_skipped_does_not_count() -> None:
    loop = Loop(rows(32), 4)
    for i, batch in enumerate(loop.loader):
        if i != 2:
            loop.train(batch)
    assert loop.scheduler.samples == 28


def test_the_length_of_the_data_is_no_epoch_size_with_drop_last() -> None:
    optimizer: Any = DistAdamW((model := nn.Linear(1, 1)).parameters())
    scheduler = CyclicLRWithRestarts(optimizer, epoch_size=10)
    loader = DataLoader(rows(10), 4, drop_last=True)
    with pytest.warns(UserWarning, match="epoch_size=10 is the length .* trains on only 8 samples"):
        prepare(Accelerator(cpu=True), model, optimizer, loader, scheduler)


def test_batches_that_are_not_trained_on_do_not_count() -> None:
    """Batches of an evaluation, and of a loop that was left without a backward pass."""
    loop = Loop(rows(8))
    other = loop.accelerator.prepare(DataLoader(rows(9), 3))
    batches = iter(loop.loader)
    batch = next(batches)
    with torch.no_grad():
        next(iter(other))
    assert loop.train(batch) == 4
    next(iter(other))  # with gradients, and dropped when the next batch comes
    assert loop.train(next(batches)) == 8


def test_an_evaluation_without_gradients_drops_no_batch() -> None:
    """Also where the iteration that the batch came from has ended."""
    loop = Loop(rows(8))
    other = loop.accelerator.prepare(DataLoader(rows(9), 3))
    batch = next(iter(loop.loader))
    with torch.no_grad():
        list(other)
    assert loop.train(batch) == 4


def test_batches_that_are_fetched_ahead_count_one_by_one() -> None:
    loop = Loop(rows(10))
    ahead = list(loop.loader)
    assert [loop.train(batch) for batch in ahead] == [4, 8, 10]


def test_batches_that_are_fetched_ahead_over_the_end_of_an_epoch_count_one_by_one() -> None:
    loop = Loop(rows(10))
    batches = itertools.chain(loop.loader, loop.loader, loop.loader)
    counted = []
    while ahead := list(itertools.islice(batches, 2)):
        counted += [loop.train(batch) for batch in ahead]
        del ahead
    assert counted == [4, 8, 10, 14, 18, 20, 24, 28, 30]


def test_a_last_batch_of_an_evaluation_with_gradients_does_not_count() -> None:
    loop = Loop(rows(10))
    other = loop.accelerator.prepare(DataLoader(rows(9), 4))
    for _ in range(2):
        for held in other:
            loop.model(held[0])
        loop.epoch()
    assert loop.scheduler.samples == 20


def raising(loop: Loop, batch: Any, optimizer: Any) -> None:
    """The ``step`` of a micro-batch raises; the script fixes the cause, and continues."""
    loop.accelerator.backward(loop.model(batch[0]).mean())
    param = optimizer.param_groups[0]["params"][0]
    entry = optimizer.state.pop(param)
    optimizer.state[param] = {"step": 1.0, "exp_avg": torch.zeros(3)}
    with pytest.raises(ValueError, match="has 'exp_avg' of parameter 0"):
        optimizer.step()
    optimizer.state[param] = entry


@pytest.mark.parametrize(
    ("then", "samples"),
    [("step", 8), ("zero_grad, next", 8), ("zero_grad, same", 8), ("next", 12), ("same", 8)],
)
def test_a_step_that_raised_and_what_the_script_does_then(then: str, samples: int) -> None:
    """Rows count once, with the update that their gradients went into."""
    loop = Loop(rows(24))
    batches = iter(loop.loader)
    loop.train(next(batches))
    raising(loop, batch := next(batches), loop.optimizer)
    if then.startswith("zero_grad"):
        loop.optimizer.zero_grad()
    if then.endswith("next"):
        batch = next(batches)
    if then != "step":
        loop.accelerator.backward(loop.model(batch[0]).mean())
    loop.optimizer.step()
    loop.scheduler.step()
    loop.optimizer.zero_grad()
    assert loop.scheduler.samples == samples
    assert loop.train(next(batches)) == samples + 4


# Loaders with even_batches=False on two ranks, and the clock after an epoch; None: the ranks have different numbers of
# batches. Accelerate fills up iterable data, and what rank 0 reads for all ranks.
UNEVEN: list[tuple[dict[str, Any], int, int, bool, int | None]] = [
    ({}, 12, 4, False, None),
    ({}, 13, 4, False, 13),
    ({"split_batches": True}, 9, 8, False, None),
    ({"split_batches": True}, 13, 8, False, 13),
    ({"dispatch_batches": True}, 12, 4, False, 12),
    ({"dispatch_batches": False}, 12, 4, True, 12),
]


def uneven() -> list[int | None]:
    found: list[int | None] = []
    for options, size, batch_size, is_stream, _ in UNEVEN:
        config = DataLoaderConfiguration(even_batches=False, **options)
        try:
            loop = Loop(Stream(size) if is_stream else rows(size), 1, batch_size, config=config)
        except ValueError as error:
            assert re.search("even_batches=False.* 2 ranks", str(error))  # noqa: PT017
            found.append(None)
        else:
            found.append(loop.epoch()[-1])
    return found


def test_batches_that_are_not_evened_out() -> None:
    assert run_ranks(2, uneven) == [[expected for *_, expected in UNEVEN]] * 2


def grown_unevenly() -> None:
    data = Growing(16)
    loop = Loop(data, config=DataLoaderConfiguration(even_batches=False))
    assert loop.epoch()[-1] == 16
    data.size = 17
    for batches in (loop.loader, skip_first_batches(loop.loader, 1)):
        with torch.no_grad():
            list(batches)  # no update is made in it
        with pytest.raises(ValueError, match=r"2 ranks .*\(5 of 4 samples"):
            loop.epoch(batches)
    data.size = 24
    assert loop.epoch()[-1] == 40


def test_data_that_grows_so_that_batches_are_uneven_is_refused_when_the_loop_begins() -> None:
    run_ranks_within(30, 2, grown_unevenly)
