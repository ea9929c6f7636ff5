"""A batch-size schedule: the weights of two jobs with one batch each; resumed elsewhere; and what is refused."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import GradientAccumulationPlugin
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dist_adamw import CyclicLRWithRestarts, DistAdamW, prepare
from tests.distributed.engines import accelerator_on, prepare_plain
from tests.distributed.test_resume import EPOCH, Row, check, data, network, tensors, updates
from tests.known import unwrap
from tests.ranks import run_ranks

# An epoch has 60 samples. The boundary lies inside an update of the second epoch; epochs then end with half a batch.
BATCHES: dict[int | str, int] = {0: 12, 100: 24}
RECIPE: dict[str, Any] = {"restart_period": 1.5, "t_mult": 1.5, "min_lr": 1e-5, "lr_scaling": "sqrt"}
SMALL = 9  # updates of 12 samples
UPDATES = 18
Place = tuple[str, int]
PLACES: list[Place] = [
    ("single", 1),
    ("plain", 2),
    ("DDP", 2),
    ("FSDP2", 2),
    ("ZeRO-1", 2),
    ("ZeRO-2", 2),
    ("ZeRO-3", 2),
]
PLACES += [("DDP", 1), ("DDP", 3), ("DDP", 4), ("FSDP2", 3), ("ZeRO-2", 3), ("ZeRO-2 offload", 2)]


def train(
    engine: str,
    first: int,
    last: int,
    saved: str,
    loaded: str | None = None,
    batch_size: dict[int | str, int] | None = None,
    *,
    accumulation: int = 1,
    micro_batch: int = 2,
    reproducible: bool = False,
    **recipe: Any,
) -> list[Row]:
    """Updates ``first`` to ``last`` of a job, from the checkpoint ``loaded`` on, and a checkpoint in ``saved``."""
    with accelerator_on("DDP" if engine == "plain" else engine, accumulation) as accelerator:
        model = network()
        optimizer = DistAdamW(model.parameters(), lr=1e-2, weight_decay=0.1, eps=0.1, reproducible=reproducible)
        scheduler = CyclicLRWithRestarts(optimizer, batch_size, **{**RECIPE, **recipe})
        order = torch.Generator().manual_seed(11 if loaded is None else 12)
        loader = DataLoader(data(), micro_batch, shuffle=True, generator=order)
        prepared = prepare_plain if engine == "plain" else prepare
        model, wrapped, loader, scheduler = prepared(accelerator, model, optimizer, loader, scheduler)
        if loaded is not None:
            accelerator.load_state(loaded)
        rows = list(itertools.islice(updates(accelerator, model, wrapped, loader, scheduler), last - first))
        accelerator.save_state(saved)
        assert unwrap(wrapped).updates == last
    return rows


def run(place: Place, *args: Any, **options: Any) -> list[Row]:
    return run_ranks(place[1], functools.partial(train, place[0], *args, **options))[0]


def clocks() -> Iterator[int]:
    """Yield the sample before each update: the batch of that sample, but never beyond the epoch."""
    samples = 0
    while True:
        yield samples
        samples += min(12 if samples < 100 else 24, EPOCH - samples % EPOCH)


@pytest.mark.parametrize("place", PLACES, ids=lambda place: f"{place[0]}x{place[1]}")
def test_the_same_as_two_jobs_with_one_batch_each(place: Place, tmp_path: Path) -> None:
    """To the bit: the second job loads the first's checkpoint, with twice the accumulation."""
    stopped, end, whole = (str(tmp_path / name) for name in ("stopped", "end", "whole"))
    micro_batch = 1 if place[1] == 4 else 2
    steps = 12 // (place[1] * micro_batch)
    rows = run(place, 0, SMALL, stopped, accumulation=steps, micro_batch=micro_batch)
    rows += run(place, SMALL, UPDATES, end, stopped, accumulation=2 * steps, micro_batch=micro_batch)
    assert [row[0] for row in rows] == [*itertools.islice(clocks(), UPDATES)]
    assert sorted({len(row[-1]) for row in rows}) == [12, 24]
    assert run(place, 0, UPDATES, whole, None, BATCHES, micro_batch=micro_batch) == rows
    assert equal(tensors(whole), tensors(end))


def equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


# ---------------------------------------------------------------- beside plain torch


def plain_torch(drop_last: bool, spans_epochs: bool) -> tuple[list[tuple[int, float, float]], list[Tensor]]:
    """Train with torch's AdamW and a loop that counts by hand; return clock, lr and decay of updates, and weights."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, eps=0.1, fused=True)
    epoch = 52 if drop_last else 55
    size = 48 if drop_last else epoch
    scheduler = CyclicLRWithRestarts(optimizer, BATCHES, size, **RECIPE, stream=spans_epochs)
    x, y, _ = data()[:55]
    rows: list[tuple[int, float, float]] = []
    begin = 0
    micro_batches: list[range] = []
    while len(rows) < UPDATES:
        micro_batches.append(range(begin, min(begin + 4, epoch)))
        begin = micro_batches[-1].stop % epoch
        is_over = begin == 0 and not spans_epochs
        batch_size = 12 if scheduler.samples < 100 else 24
        assert scheduler.batch_size == batch_size
        steps = batch_size // 4
        if len(micro_batches) < steps and not is_over:
            continue
        for chosen in micro_batches:
            (nn.functional.mse_loss(model(x[chosen]), y[chosen]) / steps).backward()
        rows.append((scheduler.samples, *(optimizer.param_groups[0][name] for name in ("lr", "weight_decay"))))
        optimizer.step()
        scheduler.step(samples=sum(map(len, micro_batches)))
        optimizer.zero_grad()
        micro_batches = []
    return rows, [param.detach() for param in model.parameters()]


def accelerate_loop(drop_last: bool, spans_epochs: bool) -> tuple[list[tuple[int, float, float]], list[Tensor]]:
    """Do the same with Accelerate's loop, on one process."""
    plugin = GradientAccumulationPlugin(num_steps=1, sync_with_dataloader=not spans_epochs)
    with accelerator_on("single", gradient_accumulation_plugin=plugin) as accelerator:
        model = network()
        optimizer = DistAdamW(model.parameters(), lr=1e-2, weight_decay=0.1, eps=0.1)
        scheduler = CyclicLRWithRestarts(optimizer, BATCHES, **RECIPE, stream=spans_epochs)
        loader = DataLoader(TensorDataset(*data()[:55]), 4, drop_last=drop_last)
        model, wrapped, loader, scheduler = prepare(accelerator, model, optimizer, loader, scheduler)
        rows = [row[:3] for row in itertools.islice(updates(accelerator, model, wrapped, loader, scheduler), UPDATES)]
        return rows, [param.detach() for param in model.parameters()]


@pytest.mark.parametrize(("drop_last", "spans_epochs"), [(False, False), (True, False), (False, True)])
def test_the_same_bits_as_a_plain_loop(drop_last: bool, spans_epochs: bool) -> None:
    """With data that end in the middle of a micro-batch: the rest of an epoch is an update, or begins one."""
    rows, weights = run_ranks(1, plain_torch, drop_last, spans_epochs)[0]
    found_rows, found = run_ranks(1, accelerate_loop, drop_last, spans_epochs)[0]
    assert found_rows == rows
    assert all(map(torch.equal, found, weights))


# ---------------------------------------------------------------- resumed elsewhere


STOPS = [SMALL - 1, SMALL, SMALL + 1, 13]  # before the boundary, at it, after it, and later in mid-epoch
RESUMED: list[Place] = [("single", 1), ("DDP", 3), ("FSDP2", 2), ("DDP", 4), ("ZeRO-2", 2)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    return run(("single", 1), 0, UPDATES, str(tmp_path_factory.mktemp("whole")), None, BATCHES)


@pytest.mark.parametrize("places", [RESUMED, RESUMED[::-1]], ids=["up", "down"])
def test_stopped_around_the_boundary_and_resumed_elsewhere(
    places: list[Place], whole: list[Row], tmp_path: Path
) -> None:
    rows: list[Row] = []
    loaded = None
    for place, first, last in zip(places, [0, *STOPS], [*STOPS, UPDATES], strict=True):
        saved = str(tmp_path / str(last))
        rows += run(place, first, last, saved, loaded, BATCHES, micro_batch=1 if place[1] == 4 else 2)
        loaded = saved
    assert check(rows, whole) < 1e-5


@pytest.mark.parametrize("engine", ["DDP", "FSDP2"])
def test_reproducible_has_the_same_bits_on_any_number_of_ranks(engine: str, tmp_path: Path) -> None:
    options = {"reproducible": True, "micro_batch": 1}
    one = run(("single", 1), 0, UPDATES, str(tmp_path / "1"), None, BATCHES, **options)
    for ranks in (2, 3, 4):
        stopped, end = str(tmp_path / f"{ranks} stopped"), str(tmp_path / f"{ranks}")
        rows = run((engine, ranks), 0, SMALL, stopped, None, BATCHES, **options)
        rows += run((engine, 6 - ranks), SMALL, UPDATES, end, stopped, BATCHES, **options)
        assert [(row[:3], row[-1]) for row in rows] == [(row[:3], row[-1]) for row in one]
        found, expected = (
            {key: value for key, value in tensors(folder).items() if key.startswith("model.")}
            for folder in (end, str(tmp_path / "1"))
        )
        assert expected
        assert equal(found, expected)
