"""A batch-size schedule: the weights of two jobs with one batch each; resumed elsewhere; and what is refused."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DummyOptim, DummyScheduler, GradientAccumulationPlugin
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dist_adamw import CyclicLRWithRestarts, DistAdamW, prepare, rest_of_epoch
from tests.distributed.engines import accelerator_on, prepare_plain
from tests.distributed.test_resume import EPOCH, Row, check, data, network, tensors, updates
from tests.known import unwrap
from tests.ranks import run_ranks

# An epoch has 60 samples. The boundary lies inside an update of the second epoch; epochs then end with half a batch.
BATCHES: dict[int | str, int] = {0: 12, 100: 24}
RECIPE: dict[str, Any] = {"restart_period": 1.5, "t_mult": 1.5, "min_lr": 1e-5, "lr_scaling": "sqrt"}
SMALL = 9  # updates before the boundary
UPDATES = 18
Place = tuple[str, int]
# Engine and ranks; the micro-batch; and the batches. With a micro-batch of 6 on two ranks one batch is not accumulated.
PLACES: list[tuple[Place, int, tuple[int, int]]] = [
    (("single", 1), 2, (12, 24)),
    (("plain", 2), 6, (12, 24)),
    (("DDP", 2), 6, (24, 12)),
    (("DDP", 4), 1, (12, 24)),
    (("FSDP2", 3), 2, (12, 24)),
    (("FSDP2", 2), 6, (24, 12)),
    (("ZeRO-1", 2), 2, (12, 24)),
    (("ZeRO-2", 3), 2, (24, 12)),
    (("ZeRO-2 offload", 2), 6, (12, 24)),
    (("ZeRO-3", 2), 2, (12, 24)),
]


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
    more: int = 0,
    reproducible: bool = False,
    **recipe: Any,
) -> list[Row]:
    """Updates ``first`` to ``last`` of a job, and ``more`` micro-batches, from ``loaded`` to a checkpoint ``saved``."""
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
        for x, y, _ in itertools.islice(rest_of_epoch(loader), more):
            with accelerator.accumulate(model):
                accelerator.backward(nn.functional.mse_loss(model(x), y))
                assert not accelerator.sync_gradients
        accelerator.save_state(saved)
        assert unwrap(wrapped).updates == last
    return rows


def run(place: Place, *args: Any, **options: Any) -> list[Row]:
    return run_ranks(place[1], functools.partial(train, place[0], *args, **options))[0]


def clocks(small: int = 12, large: int = 24) -> Iterator[int]:
    """Yield the sample before each update: the batch of that sample, but never beyond the epoch."""
    samples = 0
    while True:
        yield samples
        samples += min(small if samples < 100 else large, EPOCH - samples % EPOCH)


@pytest.mark.parametrize(("place", "micro_batch", "sizes"), PLACES, ids=str)
def test_the_same_as_two_jobs_with_one_batch_each(
    place: Place, micro_batch: int, sizes: tuple[int, int], tmp_path: Path
) -> None:
    """To the bit: the second job loads the first's checkpoint, with another accumulation."""
    stopped, end, whole = (str(tmp_path / name) for name in ("stopped", "end", "whole"))
    expected = [*itertools.islice(clocks(*sizes), UPDATES)]
    first = sum(samples < 100 for samples in expected)
    before, after = (size // (place[1] * micro_batch) for size in sizes)
    rows = run(place, 0, first, stopped, accumulation=before, micro_batch=micro_batch)
    rows += run(place, first, UPDATES, end, stopped, accumulation=after, micro_batch=micro_batch)
    assert [row[0] for row in rows] == expected
    assert sorted({len(row[-1]) for row in rows}) == [12, 24]
    batches = {0: sizes[0], 100: sizes[1]}
    assert run(place, 0, UPDATES, whole, None, batches, micro_batch=micro_batch) == rows
    assert equal(tensors(whole), tensors(end))


def equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


# ---------------------------------------------------------------- compared with plain torch


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


@pytest.mark.parametrize("updates", [SMALL, SMALL + 1])
def test_stopped_in_an_accumulation(updates: int, whole: list[Row], tmp_path: Path) -> None:
    """Its gradients are not saved: its batches come again, and it begins with the batch of the clock."""
    stopped = str(tmp_path / "stopped")
    rows = run(("DDP", 2), 0, updates, stopped, None, BATCHES, more=2)
    rows += run(("ZeRO-2", 3), updates, UPDATES, str(tmp_path / "end"), stopped, BATCHES)
    assert check(rows, whole) < 1e-5


@pytest.mark.parametrize("engine", ["DDP", "FSDP2"])
def test_reproducible_has_the_same_bits_on_any_number_of_ranks(engine: str, tmp_path: Path) -> None:
    options = {"reproducible": True, "micro_batch": 1}
    one = run(("single", 1), 0, UPDATES, str(tmp_path / "1"), None, BATCHES, **options)
    for ranks in (2, 3, 4) if engine == "DDP" else (3,):
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


# ---------------------------------------------------------------- other loops


def objects(accelerator: Any, batch_size: Any = BATCHES, micro_batch: int = 2, **options: Any) -> tuple[Any, ...]:
    """Model, optimizer, loader and scheduler, not prepared yet."""
    model = network()
    optimizer = options.pop("optimizer", DistAdamW)(model.parameters(), lr=1e-2, weight_decay=0.1)
    scheduler = CyclicLRWithRestarts(optimizer, batch_size, **{**RECIPE, **options})
    return model, optimizer, DataLoader(data(), micro_batch), scheduler


def train_json(engine: str) -> tuple[list[int], int, int]:
    """The recipe is DeepSpeed's JSON: keys are texts. Return the clocks, the epoch size, and the engine's own count."""
    told: dict[str, Any] = {
        "optimizer": {"type": "DistAdamW", "params": {"lr": 1e-2}},
        "scheduler": {
            "type": "CyclicLRWithRestarts",
            "params": {"batch_size": {"0": 12, "100": 24}, "restart_period": 1, "epoch_size": "auto"},
        },
        "train_batch_size": 12,  # the first one
    }
    with accelerator_on(engine, **told) as accelerator:
        model, _, loader, _ = objects(accelerator)
        optimizer = DummyOptim(model.parameters())
        model, wrapped, loader, scheduler = prepare(accelerator, model, optimizer, loader, DummyScheduler(optimizer))
        rows = itertools.islice(updates(accelerator, model, wrapped, loader, scheduler), UPDATES)
        return [row[0] for row in rows], scheduler.epoch_size, model.train_batch_size()


def test_a_deepspeed_json() -> None:
    for found in run_ranks(2, train_json, "ZeRO-2"):
        assert found == ([*itertools.islice(clocks(), UPDATES)], EPOCH, 24)


class SkipsOnTheDevice(torch.optim.AdamW):
    """Its update is decided on the device, as that of a fused optimizer under a GradScaler: the host learns later."""

    skip_is_known = False
    step_was_skipped = False
    updates = 0

    def step(self, closure: Any = None) -> Any:
        SkipsOnTheDevice.updates += 1
        self.step_was_skipped = SkipsOnTheDevice.updates in (9, 11)  # the one that would pass the boundary, and a later
        return None if self.step_was_skipped else super().step(closure)


def train_with_skips() -> list[tuple[int, int]]:
    """Return the clock before each update, and its number of micro-batches."""
    SkipsOnTheDevice.updates = 0
    with accelerator_on("single") as accelerator:
        model, wrapped, loader, scheduler = prepare(accelerator, *objects(accelerator, optimizer=SkipsOnTheDevice))
        count = 0
        seen: list[tuple[int, int]] = []
        inner = wrapped.optimizer
        while len(seen) < 13:
            for x, y, _ in loader:
                with accelerator.accumulate(model):
                    accelerator.backward(nn.functional.mse_loss(model(x), y))
                    count += 1
                    if accelerator.sync_gradients:
                        before = scheduler.samples
                    wrapped.step()
                    scheduler.step()
                    wrapped.zero_grad()
                if accelerator.sync_gradients:
                    seen.append((before, count))
                    count = 0
        scheduler.state_dict()
        assert inner.state[next(iter(model.parameters()))]["step"] == len(seen) - 2
        return seen[:13]


def test_an_update_that_the_device_skips_does_not_pass_the_boundary() -> None:
    seen = run_ranks(1, train_with_skips)[0]
    sizes = [count for _, count in seen]
    # The 9th begins at 96, and would end at 108; it is skipped, so the 10th begins at 96 too. In Accelerate's loop the
    # data go on: an epoch has 30 micro-batches.
    assert sizes[:10] == [6] * 10
    assert sizes[10:] == [12, 12, 6]


def loop_without_accumulate(accelerator: Any) -> None:
    model, wrapped, loader, _scheduler = prepare(accelerator, *objects(accelerator))
    for x, y, _ in loader:
        accelerator.backward(nn.functional.mse_loss(model(x), y))
        wrapped.step()


def loop_with_a_late_clock(accelerator: Any) -> None:
    model, wrapped, loader, scheduler = prepare(accelerator, *objects(accelerator))
    for _ in range(3):
        for x, y, _ in loader:
            with accelerator.accumulate(model):
                accelerator.backward(nn.functional.mse_loss(model(x), y))
                if accelerator.sync_gradients:
                    scheduler.step()  # of the update before
                    wrapped.step()
                    wrapped.zero_grad()


def two_optimizers(accelerator: Any) -> None:
    prepare(accelerator, *objects(accelerator))
    prepare(accelerator, *objects(accelerator, None))


def two_optimizers_the_other_way_round(accelerator: Any) -> None:
    accelerator.gradient_accumulation_steps = 3
    prepare(accelerator, *objects(accelerator, None))
    prepare(accelerator, *objects(accelerator))


def two_accelerators(accelerator: Any) -> None:
    accelerator.gradient_accumulation_steps = 3
    model, *_ = prepare(accelerator, *objects(accelerator, None))
    other = Accelerator()
    other.gradient_accumulation_steps = 1
    prepare(other, *objects(other, {0: 24, 100: 12}))
    with accelerator.accumulate(model):
        pass


def a_batch_that_does_not_divide(accelerator: Any) -> None:
    prepare(accelerator, *objects(accelerator, {0: 12, "1 epoch": 26}, epoch_size=None))


def another_accumulation(accelerator: Any) -> None:
    accelerator.gradient_accumulation_steps = 4
    prepare(accelerator, *objects(accelerator))


def set_later(accelerator: Any) -> None:
    *_, scheduler = prepare(accelerator, *objects(accelerator, None))
    scheduler.batch_size = {0: 4, 100: 6}


def set_in_mid_update(accelerator: Any) -> None:
    model, wrapped, loader, scheduler = prepare(accelerator, *objects(accelerator, {0: 12, 100: 4}))
    for x, y, _ in loader:
        with accelerator.accumulate(model):
            accelerator.backward(nn.functional.mse_loss(model(x), y))
            scheduler.batch_size = BATCHES | {0: 8}
            wrapped.step()


def loaded_with_another(accelerator: Any) -> None:
    *_, scheduler = prepare(accelerator, *objects(accelerator))
    state = scheduler.state_dict()
    state["configuration"]["batch_size_schedule"] = [[0, 12], [100, 18]]
    scheduler.load_state_dict(state, on_difference="checkpoint")


REFUSED: list[tuple[Callable[[Any], None], str]] = [
    (
        loop_without_accumulate,
        "batch_size is a schedule (12 samples, 24 from sample 100 on), which needs accelerator.acc",
    ),
    (
        loop_with_a_late_clock,
        "the update that begins at sample 108 has a global batch of 24 by the schedule, and the accelerator "
        "accumulates 3 micro-batches, that is 12 samples. Call scheduler.step() after every optimizer.step()",
    ),
    (two_optimizers, "changes the accumulation of all optimizers of the process"),
    (two_optimizers_the_other_way_round, "changes the accumulation of all optimizers of the process"),
    (
        two_accelerators,
        "this accelerator was prepared to accumulate 3 micro-batches, and a batch-size schedule that another one "
        "follows has set 6",
    ),
    (a_batch_that_does_not_divide, "batch_size['1 epoch']: global batch size 26 is not a multiple"),
    (
        another_accumulation,
        "gradient_accumulation_steps=4 makes a global batch of 16, which is none of the schedule's (12",
    ),
    (set_later, "batch_size[100]: global batch size 6 is not a multiple of"),
    (
        set_in_mid_update,
        "the update that begins at sample 0 has a global batch of 8 by the schedule, and the accelerator accumulates 3",
    ),
    (loaded_with_another, "batch_size[100]: global batch size 18 is not a multiple of"),
]


def refusals() -> list[str]:
    said = []
    for attempt, _ in REFUSED:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        with (
            accelerator_on("DDP") as accelerator,
            pytest.raises(ValueError, match=r"batch_size|global batch") as raised,
        ):
            attempt(accelerator)
        said.append(str(raised.value))
    return said


def test_one_sentence_on_every_rank() -> None:
    for said in run_ranks(2, refusals):
        for text, (attempt, expected) in zip(said, REFUSED, strict=True):
            assert expected in text, attempt
            assert "\n" not in text


def phases() -> list[tuple[int, int]]:
    """Train with a schedule, then with one batch and the same optimizer, then with another schedule; an update each."""
    seen = []
    with accelerator_on("DDP") as accelerator:
        model, optimizer, data_loader = objects(accelerator)[:3]
        for batch_size in ({0: 12, 4: 20}, None, {0: 4, 20: 12}, {0: 40, 10: 4}):
            scheduler = CyclicLRWithRestarts(optimizer, batch_size, restart_period=1)
            model, wrapped, loader, scheduler = prepare(accelerator, model, optimizer, data_loader, scheduler)
            for _ in itertools.islice(updates(accelerator, model, wrapped, loader, scheduler), 2):
                pass
            seen.append((scheduler.samples, accelerator.gradient_accumulation_steps))
    return seen


def test_phases_of_training() -> None:
    # One batch: the accumulation stays as it is.
    for seen in run_ranks(2, phases):
        assert seen == [(32, 5), (40, 5), (8, 1), (44, 1)]


def load_and_take_its_schedule(folder: str, saved: bool) -> tuple[list[int], Any, int]:
    with accelerator_on("DDP", 3) as accelerator:
        mine = None if saved else BATCHES
        model, wrapped, loader, scheduler = prepare(accelerator, *objects(accelerator, mine))
        scheduler.on_difference = "checkpoint"
        accelerator.load_state(folder)
        steps = accelerator.gradient_accumulation_steps
        rows = itertools.islice(updates(accelerator, model, wrapped, loader, scheduler), 3)
        return [row[0] for row in rows], scheduler.configuration().get("batch_size_schedule"), steps


@pytest.mark.parametrize("saved", [True, False], ids=["taken", "dropped"])
def test_a_checkpoints_schedule_is_taken(saved: bool, tmp_path: Path) -> None:
    """With ``on_difference="checkpoint"`` a job follows the schedule of the checkpoint, or drops its own."""
    folder = str(tmp_path / "stopped")
    if saved:
        run(("DDP", 3), 0, SMALL + 1, folder, None, BATCHES)
    else:
        run(("DDP", 3), 0, SMALL + 1, folder, accumulation=4, micro_batch=1)
    for seen, batches, steps in run_ranks(2, load_and_take_its_schedule, folder, saved):
        if saved:
            assert (seen, batches, steps) == ([120, 144, 168], [[0, 12], [100, 24]], 6)
        else:
            assert (seen, batches, steps) == ([120, 132, 144], None, 3)


def by_accelerate_alone(accumulation: int) -> tuple[int | str, bool]:
    """The clock after an epoch, or why the first update was refused; and whether the weights are as before."""
    with accelerator_on("single", accumulation) as accelerator:
        model = nn.Linear(4, 2)
        before = model.weight.detach().clone()
        optimizer = DistAdamW(model.parameters())
        scheduler = CyclicLRWithRestarts(optimizer, {0: 4 * accumulation, 24: 8 * accumulation}, 48)
        loader = DataLoader(TensorDataset(torch.ones(48, 4)), 4)
        model, wrapped, loader, stepped = accelerator.prepare(model, optimizer, loader, scheduler)
        for (inputs,) in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(inputs).sum())
                try:
                    wrapped.step()
                except ValueError as error:
                    return str(error), torch.equal(before, model.weight)
                stepped.step()
                wrapped.zero_grad()
        return scheduler.samples, torch.equal(before, model.weight)


def test_accelerates_own_prepare_cannot_change_its_accumulation() -> None:
    said, is_unchanged = run_ranks(1, by_accelerate_alone, 2)[0]
    assert "accelerator.prepare alone accumulates 2 micro-batches in every update" in str(said)
    assert is_unchanged
    assert run_ranks(1, by_accelerate_alone, 1)[0] == (72, False)  # the loop may accumulate by itself
