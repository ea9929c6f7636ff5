"""The place in the data: for data that is not sampled one by one, and what is refused."""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import re
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, DataLoaderConfiguration, skip_first_batches
from accelerate.utils import GradientAccumulationPlugin
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from dist_adamw import CheckpointError, CyclicLRWithRestarts, DistAdamW, position, prepare, rest_of_epoch
from dist_adamw.checkpoint.storage.index import read_index
from tests.distributed.engines import accelerator_on, environment
from tests.known import unwrap
from tests.ranks import run_ranks

SIZE = 48


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        yield from torch.arange(SIZE).float().view(-1, 1)


class Pairs(BatchSampler):
    """A custom batch sampler: a sample and its opposite."""

    def __init__(self) -> None:
        self.batch_size, self.drop_last = 2, False

    def __iter__(self) -> Iterator[list[int]]:
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


def update(accelerator: Accelerator) -> None:
    """An update, of some loss or other."""
    (model,), (optimizer,) = accelerator._models, accelerator._optimizers
    accelerator.backward(model(torch.ones(1, 1)).mean())
    optimizer.step()
    optimizer.zero_grad()


def numbers(accelerator: Accelerator, batch: Any) -> list[int]:
    batch = batch[0] if isinstance(batch, (list, tuple)) else batch
    return sorted(accelerator.gather(batch).flatten().int().tolist())


def begin(kind: str) -> tuple[list[int], dict[str, Any]]:
    accelerator, loader = prepared(kind, 1)
    seen = []
    for batch in rest_of_epoch(loader):
        seen += numbers(accelerator, batch)
        update(accelerator)
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
        update(accelerator)
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
        assert re.search("6 samples .*only whole batches.* 4", text)


def uneven_rest(samples: int) -> str | int:
    """Batches of the rest of an epoch of 24 batches that are not evened out, or why there are none."""
    config = DataLoaderConfiguration(even_batches=False)
    _, loader = prepared("batch sampler", 1, dataloader_config=config)
    position(loader).load_state_dict({"epoch": 0, "samples": samples, "seed": None, "order": ""})
    try:
        return sum(1 for _ in rest_of_epoch(loader))
    except CheckpointError as error:
        return str(error)


def test_ranks_never_have_different_numbers_of_batches() -> None:
    assert run_ranks(2, uneven_rest, 4) == [11, 11]
    for text in run_ranks(2, uneven_rest, 2):
        assert re.search("2 samples .* 46 .*even_batches=False", str(text))


def skipped() -> int:
    """The place after one batch, where rank 0 reads for all ranks and two lists of indices were left out."""
    config = DataLoaderConfiguration(dispatch_batches=True)
    accelerator, loader = prepared("batch sampler", 1, dataloader_config=config)
    next(batches := iter(skip_first_batches(loader, 2)))
    update(accelerator)
    del batches
    return position(loader).samples


@pytest.mark.parametrize("ranks", [1, 2])
def test_batches_that_are_left_out_of_dispatched_data_are_behind(ranks: int) -> None:
    assert run_ranks(ranks, skipped) == [4 + 2 * ranks] * ranks


def refusals() -> None:
    accelerator, loader = prepared("workers", 1)
    place = position(loader)
    whole = {"epoch": 1, "samples": 4, "seed": None, "order": ""}
    for wrong in ({"samples": -1}, {"samples": 1.5}, {"epoch": True}, {"order": "xyz"}, {"order": "00"}, {"order": 5}):
        with pytest.raises(CheckpointError, match="not a position"):
            place.load_state_dict({**whole, **wrong})
    assert (place.epoch, place.samples) == (0, 0)
    with pytest.raises(ValueError, match=r"position in a DataLoader .*prepare"):
        rest_of_epoch(loader_of("pairs"))
    del accelerator


def test_what_is_no_position_is_refused() -> None:
    run_ranks(1, refusals)


# ---------------------------------------------------------------------------------------------- as if never stopped

# What a job is made of: engine, ranks, and what is odd about its data.
JOBS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "no generator": ("single", 1, {}),
    "no generator, weighted": ("single", 1, {"weighted": True}),
    "no generator, 2 ranks": ("DDP", 2, {}),
    "dispatched": ("DDP", 2, {"config": {"dispatch_batches": True}}),
    "not shuffled": ("single", 1, {"shuffle": False}),
    "workers": ("single", 1, {"generator": True, "workers": 2}),
    "workers that persist": ("single", 1, {"generator": True, "workers": 2, "persistent": True}),
    "padded": ("DDP", 2, {"size": 26}),
    "padded, split": ("DDP", 2, {"size": 26, "config": {"split_batches": True}}),
    "padded, in order": ("DDP", 2, {"size": 26, "shuffle": False}),
}
Told = tuple[list[int], float, int]  # the samples of an update, its loss, and the clock after it


def with_dropout(
    engine: str, options: dict[str, Any], saves: dict[int, str], loaded: str | None, last: int
) -> list[Told]:
    """Updates of 4 samples up to ``last``; a checkpoint after those that ``saves`` names."""
    torch.manual_seed(7 if loaded is None else 99)  # nothing may depend on it after a load
    config = DataLoaderConfiguration(**options.get("config", {}))
    with accelerator_on(engine, 1, dataloader_config=config) as accelerator:
        whole = accelerator.num_processes if accelerator.split_batches else 1
        model: Any = nn.Sequential(nn.Linear(1, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        for param in model.parameters():
            nn.init.constant_(param, 0.1)
        optimizer: Any = DistAdamW(model.parameters(), lr=1e-2)
        scheduler = CyclicLRWithRestarts(optimizer, restart_period=2)
        data = TensorDataset(torch.arange(options.get("size", 24)).float().view(-1, 1))
        generator = torch.Generator().manual_seed(3) if options.get("generator") else None
        weighted = WeightedRandomSampler([1.0] * len(data), len(data), replacement=False)
        if workers := options.get("workers", 0):
            multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # as a job's rank
        loader = DataLoader(
            data,
            4 // accelerator.num_processes * whole,
            shuffle=options.get("shuffle", True) and not options.get("weighted"),
            sampler=weighted if options.get("weighted") else None,
            generator=generator,
            num_workers=workers,
            persistent_workers=options.get("persistent", False),
        )
        model, optimizer, loader, scheduler = prepare(accelerator, model, optimizer, loader, scheduler)
        if loaded is not None:
            accelerator.load_state(loaded)
        told: list[Told] = []
        while True:
            for (x,) in rest_of_epoch(loader):
                loss = model(x / 10).square().mean()
                accelerator.backward(loss)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
                told.append(
                    (sorted(accelerator.gather(x).flatten().int().tolist()), float(loss.detach()), scheduler.samples)
                )
                if unwrap(optimizer).updates in saves:
                    accelerator.save_state(saves[unwrap(optimizer).updates])
                if unwrap(optimizer).updates == last:
                    return told


@pytest.mark.parametrize("kind", JOBS)
def test_samples_dropout_and_padding_of_a_resumed_epoch(kind: str, tmp_path: Path) -> None:
    """Stopped in the second epoch, at its beginning, and at its end: all to the bit."""
    engine, ranks, options = JOBS[kind]
    per_epoch = -(-options.get("size", 24) // 4)
    saves = {n: str(tmp_path / str(n)) for n in (per_epoch, per_epoch + 3, 2 * per_epoch)}
    last = 2 * per_epoch + 2
    expected = run_ranks(ranks, with_dropout, engine, options, saves, None, last)
    epoch = [i for samples, *_ in expected[0][per_epoch : 2 * per_epoch] for i in samples]
    assert set(epoch) == set(range(options.get("size", 24)))
    for stop, folder in saves.items():
        again = {stop + 1: str(tmp_path / "again")}  # a second stop
        resumed = run_ranks(ranks, with_dropout, engine, options, again, folder, last)
        assert resumed == [rows[stop:] for rows in expected]
        resumed = run_ranks(ranks, with_dropout, engine, options, {}, again[stop + 1], last)
        assert resumed == [rows[stop + 1 :] for rows in expected]


def test_one_order_for_every_number_of_ranks(tmp_path: Path) -> None:
    """The same for a shuffle without a generator."""
    saves = {9: str(tmp_path / "9")}
    alone = run_ranks(1, with_dropout, "single", {}, saves, None, 14)[0]
    for ranks in (2, 4):
        assert [row[0] for row in run_ranks(ranks, with_dropout, "DDP", {}, {}, None, 14)[0]] == [
            row[0] for row in alone
        ]
        resumed = run_ranks(ranks, with_dropout, "DDP", {}, {}, saves[9], 14)[0]
        assert [row[0] for row in resumed] == [row[0] for row in alone[9:]]


def is_left(engine: str, updates: int) -> bool:
    """Return whether a loader lives on without references."""
    gc.disable()
    try:
        with accelerator_on(engine, 1) as accelerator:
            model: Any = nn.Linear(1, 8)
            optimizer: Any = DistAdamW(model.parameters())
            scheduler = CyclicLRWithRestarts(optimizer, restart_period=2)
            data = DataLoader(TensorDataset(torch.arange(24.0).view(-1, 1)), 4, shuffle=True)
            model, optimizer, loader, scheduler = prepare(accelerator, model, optimizer, data, scheduler)
            for (x,) in itertools.islice(rest_of_epoch(loader), updates):
                accelerator.backward(model(x).square().mean())
                optimizer.step()
                scheduler.step()
            accelerates: Any = loader
            known = weakref.ref(accelerates.base_dataloader)
            accelerator._dataloaders.clear()  # as with the accelerator's end; the test has that itself
            del loader, accelerates, data
            return known() is not None
    finally:
        gc.enable()


@pytest.mark.parametrize("updates", [0, 2, 4])
@pytest.mark.parametrize("engine", ["DDP", "FSDP2", "ZeRO-2", "ZeRO-3"])
def test_a_loader_that_nobody_has_goes_at_once(engine: str, updates: int) -> None:
    """The collector would wait for its workers, for 5 seconds each."""
    assert run_ranks(2, is_left, engine, updates) == [False] * 2


# Micro-batches of 4 samples, so many an update, and after which the job is stopped.
ACROSS = [(18, 2, 2), (18, 2, 3), (18, 3, 6), (20, 4, 4), (20, 4, 5), (20, 4, 6), (20, 4, 8)]


def across(
    size: int, accumulation: int, last: int, saves: dict[int, str], loaded: str | None
) -> list[tuple[list[int], int]]:
    """The samples and the clock of each update, in accumulations that cross the ends of epochs."""
    plugin = GradientAccumulationPlugin(num_steps=accumulation, sync_with_dataloader=False)
    with environment(**dict.fromkeys(("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR"))):
        accelerator = Accelerator(cpu=True, gradient_accumulation_plugin=plugin)
    model: Any = nn.Linear(1, 1)
    optimizer: Any = DistAdamW(model.parameters())
    scheduler = CyclicLRWithRestarts(optimizer, restart_period=2)
    loader: Any = DataLoader(TensorDataset(torch.arange(size).float().view(-1, 1)), 4, shuffle=True)
    model, optimizer, loader, scheduler = prepare(accelerator, model, optimizer, loader, scheduler)
    if loaded is not None:
        accelerator.load_state(loaded)
    updates, seen, micro_batches = [], [], 0
    while True:
        for (x,) in rest_of_epoch(loader):
            with accelerator.accumulate(model):
                accelerator.backward(model(x).mean())
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            seen += x.flatten().int().tolist()
            micro_batches += 1
            if accelerator.sync_gradients:
                updates.append((seen, scheduler.samples))
                seen = []
            if micro_batches in saves:
                accelerator.save_state(saves[micro_batches])
            if len(updates) == last:
                return updates


@pytest.mark.parametrize(("size", "accumulation", "stop"), ACROSS)
def test_accumulation_across_the_end_of_an_epoch(size: int, accumulation: int, stop: int, tmp_path: Path) -> None:
    saves = {stop: str(tmp_path / "stopped")}
    expected = run_ranks(1, across, size, accumulation, 8, saves, None)[0]
    assert [clock for _, clock in expected] == list(itertools.accumulate(len(seen) for seen, _ in expected))
    done = stop // accumulation  # the rest was half an update, and comes again
    assert run_ranks(1, across, size, accumulation, 8 - done, {}, saves[stop])[0] == expected[done:]


def without_rest_of_epoch(folder: str) -> tuple[Any, Any]:
    accelerator, loader = prepared("workers", 1)
    for i, _ in enumerate(rest_of_epoch(loader)):
        update(accelerator)
        if i == 2:
            break
    accelerator.save_state(folder)
    running: Any = rest_of_epoch(loader)
    next(running)  # and nobody ends it
    accelerator.load_state(folder)
    accelerator.save_state(folder)
    at_once = position(loader).state_dict()
    rest = sum(1 for _ in rest_of_epoch(loader))
    running.close()
    return at_once and at_once["samples"], rest


def test_a_loop_that_was_left_alone_is_in_nobodys_way(tmp_path: Path) -> None:
    assert run_ranks(2, without_rest_of_epoch, str(tmp_path)) == [(12, 9)] * 2


def by_hand(folder: str) -> Any:
    with accelerator_on("single") as accelerator:
        model: Any = nn.Linear(1, 1)
        optimizer: Any = DistAdamW(model.parameters())
        scheduler = CyclicLRWithRestarts(optimizer, restart_period=2)
        model, optimizer, loader, scheduler = prepare(accelerator, model, optimizer, loader_of("workers"), scheduler)

        def train(batches: Any, number: int) -> None:
            for (x,) in itertools.islice(batches, number):
                accelerator.backward(model(x).mean())
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()

        train(rest_of_epoch(loader), 2)
        accelerator.save_state(folder)
        accelerator.load_state(folder)
        train(accelerator.skip_first_batches(loader, 2), 2)
        accelerator.save_state(folder)
    return read_index(Path(folder) / "dist_adamw").about["extra"]["position"]


def test_batches_skipped_by_hand_are_a_part_of_the_epoch(tmp_path: Path) -> None:
    (saved,) = run_ranks(1, by_hand, str(tmp_path))
    assert (saved["epoch"], saved["samples"]) == (0, 8)
