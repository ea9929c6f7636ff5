"""The place in the data: for data that is not sampled one by one, and what is refused."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, TensorDataset

from dist_adamw import CheckpointError, CyclicLRWithRestarts, DistAdamW, position, prepare, rest_of_epoch
from tests.ranks import run_ranks

SIZE = 48


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        yield from torch.arange(SIZE).float().view(-1, 1)


class Pairs(BatchSampler):
    """Batches that somebody makes himself: a sample and its opposite."""

    def __init__(self) -> None:
        self.batch_size, self.drop_last = 2, False

    def __iter__(self) -> Iterator[list[int]]:  # type: ignore[override]
        yield from ([i, SIZE - 1 - i] for i in range(SIZE // 2))

    def __len__(self) -> int:
        return SIZE // 2


def loader_of(kind: str) -> DataLoader[Any]:
    data = TensorDataset(torch.arange(SIZE).float().view(-1, 1))
    if kind == "stream":
        return DataLoader(Stream(), batch_size=2)
    if kind == "pairs":
        return DataLoader(data, batch_sampler=Pairs())
    if kind == "workers":
        multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # as a rank of a job
        return DataLoader(data, 2, shuffle=True, num_workers=2, generator=torch.Generator().manual_seed(3))
    if kind == "batch sampler":
        sampler = RandomSampler(data, generator=torch.Generator().manual_seed(3))
        return DataLoader(data, batch_sampler=BatchSampler(sampler, 2, False))
    raise ValueError(kind)


def prepared(kind: str, accumulation: int, **options: Any) -> tuple[Accelerator, Any]:
    accelerator = Accelerator(gradient_accumulation_steps=accumulation, **options)
    model = nn.Linear(1, 1)
    optimizer = DistAdamW(model.parameters())
    scheduler = CyclicLRWithRestarts(optimizer, epoch_size=SIZE, restart_period=1)
    *_, loader, _ = prepare(accelerator, model, optimizer, loader_of(kind), scheduler)
    return accelerator, loader


def numbers(accelerator: Accelerator, batch: Any) -> list[int]:
    batch = batch[0] if isinstance(batch, (list, tuple)) else batch
    return sorted(accelerator.gather(batch).flatten().int().tolist())


def begin(kind: str) -> tuple[list[int], dict[str, Any]]:
    accelerator, loader = prepared(kind, 1)
    seen = []
    for batch in rest_of_epoch(loader):
        seen += numbers(accelerator, batch)
        if len(seen) == 24:
            break
    state = position(loader).state_dict()
    assert state is not None
    return seen, state


def finish(kind: str, state: dict[str, Any]) -> tuple[list[int], list[int]]:
    accelerator, loader = prepared(kind, 1)
    position(loader).load_state_dict(state)
    rest = [n for batch in rest_of_epoch(loader) for n in numbers(accelerator, batch)]
    assert position(loader).epoch == state["epoch"] + 1
    return rest, [n for batch in rest_of_epoch(loader) for n in numbers(accelerator, batch)]


@pytest.mark.parametrize("kind", ["stream", "pairs", "workers", "batch sampler"])
@pytest.mark.parametrize(("before", "after"), [(2, 3), (3, 1), (1, 2)])
def test_no_sample_twice_and_none_missed(kind: str, before: int, after: int) -> None:
    seen, state = run_ranks(before, begin, kind)[0]
    for rest, next_epoch in run_ranks(after, finish, kind, state):
        assert sorted(seen + rest) == list(range(SIZE))
        assert sorted(next_epoch) == list(range(SIZE))


def rolled_back() -> list[int]:
    """A position that is loaded while a loop is running."""
    accelerator, loader = prepared("workers", 1)
    seen: list[int] = []
    state = None
    for batch in rest_of_epoch(loader):
        seen += numbers(accelerator, batch)
        if len(seen) == 8:
            state = position(loader).state_dict()
        if len(seen) == 24:
            assert state is not None
            position(loader).load_state_dict(state)
            del seen[8:]
    assert len(seen) == 8
    return seen + [n for batch in rest_of_epoch(loader) for n in numbers(accelerator, batch)]


def test_a_loop_ends_when_the_position_is_loaded() -> None:
    for seen in run_ranks(2, rolled_back):
        assert sorted(seen) == list(range(SIZE))


def half_an_update(folder: str) -> tuple[int, int]:
    accelerator, loader = prepared("workers", 2)
    for i, _ in enumerate(rest_of_epoch(loader), 1):
        with accelerator.accumulate(nn.Linear(1, 1)):
            pass
        if i == 3:
            accelerator.save_state(folder)
            break
    before = position(loader).samples
    accelerator.load_state(folder)
    return before, position(loader).samples


def test_samples_of_half_an_update_come_again(tmp_path: Path) -> None:
    assert run_ranks(2, half_an_update, str(tmp_path)) == [(12, 8)] * 2


def cannot(state: dict[str, Any]) -> str:
    _, loader = prepared("stream", 1)
    position(loader).load_state_dict(state)
    with pytest.raises(CheckpointError) as raised:
        next(rest_of_epoch(loader))
    return str(raised.value)


def test_what_cannot_be_reached_is_said() -> None:
    for text in run_ranks(2, cannot, {"epoch": 0, "samples": 6, "seed": None, "order": ""}):
        assert "the job stands 6 samples into data of which only batches can be left out, and batches of 4" in text


def refusals() -> None:
    accelerator, loader = prepared("workers", 1)
    place = position(loader)
    whole = {"epoch": 1, "samples": 4, "seed": None, "order": ""}
    for wrong in ({"samples": -1}, {"samples": 1.5}, {"epoch": True}, {"order": "xyz"}, {"order": "00"}, {"order": 5}):
        with pytest.raises(CheckpointError, match="this is no position in the data"):
            place.load_state_dict({**whole, **wrong})
    assert (place.epoch, place.samples) == (0, 0)
    with pytest.raises(ValueError, match=r"the position in a DataLoader is not known\. Pass the loader that prepare"):
        rest_of_epoch(loader_of("pairs"))
    del accelerator


def test_what_is_no_position_is_refused() -> None:
    run_ranks(1, refusals)
