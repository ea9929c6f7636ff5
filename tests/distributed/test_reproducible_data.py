"""Data and loops of Accelerate with ``reproducible=True``: the same bits on any number of ranks, or one sentence."""

from __future__ import annotations

import multiprocessing
from collections import namedtuple
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.utils import DataLoaderConfiguration
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from dist_adamw import CyclicLRWithRestarts, DistAdamW, prepare
from dist_adamw.integrations.accelerate.reproducible import aligned
from tests.distributed.engines import accelerator_on
from tests.distributed.test_reproducible import digest
from tests.ranks import expect_error_on_all, run_ranks

WIDTH = 9  # 36 bytes
SIZE, MICRO_BATCHES = 5, 6  # samples of a micro-batch, and micro-batches of an update


def samples(count: int) -> Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(1))


class Stream(IterableDataset[Tensor]):
    """Samples without a length."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[Tensor]:
        yield from samples(self.count)


def training(
    engine: str,
    data: Dataset[Any],
    loop: str = "plain",
    *,
    dispatch: bool | None = None,
    **options: Any,
) -> list[str]:
    """Train through `prepare` for one epoch; return a digest after each update."""
    ranks = dist.get_world_size()
    config = DataLoaderConfiguration(dispatch_batches=dispatch)
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # as a job's rank
    with accelerator_on(engine, MICRO_BATCHES // ranks, dataloader_config=config) as accelerator:
        torch.manual_seed(0)
        model: Any = nn.Sequential(nn.Linear(WIDTH, 8), nn.GELU(), nn.Linear(8, 1))
        optimizer: Any = DistAdamW(model.parameters(), 1e-2, eps=0.1, reproducible=True)
        scheduler: Any = CyclicLRWithRestarts(optimizer, restart_period=1, epoch_size=90)
        loader: Any = DataLoader(data, SIZE, **options)
        model, optimizer, loader, scheduler = prepare(accelerator, model, optimizer, loader, scheduler)
        digests: list[str] = []
        for batch in loader:
            (x,) = batch if isinstance(batch, list) else (batch,)
            with accelerator.accumulate(model):
                _backward(accelerator, model, optimizer, x, loop)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                digests.append(digest(accelerator.unwrap_model(model)))
                if loop == "batches used again":
                    digests += _use_again(accelerator, model, optimizer, scheduler, x)
        return digests


def _backward(accelerator: Any, model: Any, optimizer: Any, x: Tensor, loop: str) -> None:
    if loop == "two losses":
        accelerator.backward(model(x).square().mean())
        accelerator.backward(model(x).abs().mean())
    else:
        if loop == "tried again" and accelerator.step % accelerator.gradient_accumulation_steps == 1:
            accelerator.backward(model(x).square().mean())
            optimizer.optimizer.zero_grad()  # Accelerate's does nothing before the last micro-batch
        accelerator.backward(model(x).square().mean())
        if loop == "gathered twice" and accelerator.sync_gradients:
            accelerator.backward(model(x).abs().mean())
            optimizer.optimizer.gather_gradients()


def _use_again(accelerator: Any, model: Any, optimizer: Any, scheduler: Any, x: Tensor) -> list[str]:
    """Make two more updates of two micro-batches, from a batch that has had one, as PPO does."""
    for _ in range(2):
        for part in x.split(3):
            accelerator.backward(model(part).square().mean())
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return [digest(accelerator.unwrap_model(model))]


def same_on_all(data: Dataset[Any], ranks: tuple[int, ...] = (1, 2, 3), **options: Any) -> list[str]:
    found = [run_ranks(n, training, "single" if n == 1 else "DDP", data, **options) for n in ranks]
    assert len({str(one) for of_ranks in found for one in of_ranks}) == 1, found
    return found[0][0]


# ---------------------------------------------------------------- rows cut from a larger batch


@pytest.mark.parametrize("data", [TensorDataset(samples(90)), Stream(90)], ids=["indices", "stream"])
def test_rows_that_rank_0_cuts_from_a_larger_batch(data: Dataset[Any]) -> None:
    assert len(same_on_all(data, dispatch=True)) == 3


def test_aligned_copies_only_what_begins_elsewhere() -> None:
    whole = torch.arange(18.0).view(2, WIDTH)
    pair = namedtuple("pair", "a b")
    batch = {"x": whole[1:], "more": [pair(whole[:1], whole[1:, 1:]), "text"], "sparse": torch.eye(2).to_sparse()}
    found = aligned(batch)
    assert found["more"][0].a is batch["more"][0].a  # type: ignore[index]
    assert found["sparse"] is batch["sparse"]
    for one, before in ((found["x"], batch["x"]), (found["more"][0].b, whole[1:, 1:])):
        assert torch.equal(one, before)  # type: ignore[arg-type]
        assert one.data_ptr() % 64 == 0
    at_its_place = (whole, {"y": torch.zeros(3, 0)})
    assert aligned(at_its_place) is at_its_place


# ---------------------------------------------------------------- data without a length

UNEVEN = "reproducible=True: an epoch of {} samples is {} micro-batches of 5 and {} samples, which do not"


@pytest.mark.parametrize("dispatch", [True, False])
def test_a_stream_that_ends_with_a_whole_round(dispatch: bool) -> None:
    expected = same_on_all(TensorDataset(samples(90)))
    assert same_on_all(Stream(90), dispatch=dispatch) == expected
    assert same_on_all(Stream(90), ranks=(1, 2), dispatch=dispatch, num_workers=1) == expected


@pytest.mark.parametrize(
    ("ranks", "count", "options"),
    [
        (2, 85, {"dispatch": True}),  # 17 micro-batches
        (3, 92, {"dispatch": None}),
        (1, 92, {"dispatch": None}),
        (2, 85, {"dispatch": False}),
        (2, 85, {"dispatch": False, "num_workers": 1}),
        (2, 85, {"dispatch": False, "drop_last": True}),
        (1, 92, {"dispatch": False}),
        (2, 3, {"dispatch": True}),
    ],
)
def test_a_stream_that_ends_with_a_padded_round_is_refused(ranks: int, count: int, options: dict[str, Any]) -> None:
    engine = "single" if ranks == 1 else "DDP"
    for error in expect_error_on_all(ranks, training, engine, Stream(count), **options):
        assert UNEVEN.format(count, count // 5, count % 5) in error
        assert error.startswith("ValueError: ")


def test_a_stream_in_one_process_may_drop_its_last_samples() -> None:
    assert len(same_on_all(Stream(92), ranks=(1, 2), dispatch=False, drop_last=True)) == 3


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"dispatch": None, "drop_last": True}, "with dispatch_batches and drop_last=True"),
        ({"dispatch": False, "num_workers": 2}, "with dispatch_batches=False and num_workers=2"),
    ],
)
def test_streams_whose_end_or_order_is_unknown_are_refused(options: dict[str, Any], match: str) -> None:
    for error in expect_error_on_all(2, training, "DDP", Stream(90), **options):
        assert match in error, error


# ---------------------------------------------------------------- backward passes and batches

TWICE = "RuntimeError: reproducible=True: this update has"


@pytest.mark.parametrize(
    ("engine", "ranks", "loop"),
    [
        ("single", 1, "two losses"),
        ("DDP", 2, "two losses"),
        ("FSDP2", 2, "two losses"),
        ("DDP", 2, "gathered twice"),
    ],
)
def test_two_backward_passes_per_batch_are_refused(engine: str, ranks: int, loop: str) -> None:
    per_rank = MICRO_BATCHES // ranks
    passes = 2 * per_rank if loop == "two losses" else per_rank + 1
    for error in expect_error_on_all(ranks, training, engine, TensorDataset(samples(90)), loop):
        assert error.startswith(f"{TWICE} {passes} backward passes on this rank and {per_rank} batches"), error


def test_batches_that_are_used_again() -> None:
    """For later updates, or after their gradients were discarded."""
    data = TensorDataset(samples(90))
    assert len(run_ranks(2, training, "DDP", data, "batches used again")[0]) == 6
    expected = run_ranks(2, training, "DDP", data)
    assert run_ranks(2, training, "DDP", data, "tried again") == expected
