"""prepare: one curve at every number of ranks, real samples, agreement, checkpoints."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler

from dist_adamw import CyclicLRWithRestarts, DistAdamW, GlobalBatch, prepare
from tests.distributed.jobs import RECIPE, WORLDS, Row, data, epochs, job, model_of_two_layers
from tests.distributed.test_attach import average_gradients
from tests.ranks import expect_error_on_all, run_ranks

# ---------------------------------------------------------------- one curve


def curve(way: str, accumulation: int, length: int, drop_last: bool, decay_by: str) -> list[Row]:
    options: dict[str, Any] = {"loader": {"shuffle": True, "drop_last": drop_last}, "optimizer": {"decay_by": decay_by}}
    if way == "accelerate":
        options["recipe"] = {"batch_size": 12, "epoch_size": length // 12 * 12 if drop_last else length}
    accelerator, objects = job(accumulation, length, **options)
    prepared: Any = prepare(accelerator, *objects) if way == "prepare" else accelerator.prepare(*objects)
    model, optimizer, loader, scheduler = prepared
    return list(epochs(accelerator, model, optimizer, loader, scheduler, count=6))


def plain_curve(length: int, decay_by: Any) -> list[Row]:
    model = model_of_two_layers()
    optimizer = DistAdamW(model.parameters(), lr=1e-2, weight_decay=0.05, decay_by=decay_by)
    scheduler = CyclicLRWithRestarts(optimizer, 12, length, **RECIPE)
    rows = []
    for _ in range(6):
        for x, y in DataLoader(data(length), batch_size=12):
            group = optimizer.param_groups[0]
            rows.append((scheduler.samples, group["lr"], group["weight_decay"]))
            nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    return rows


@pytest.mark.parametrize(
    ("way", "length", "decay_by"),  # whole batches; a partial last one
    [
        ("prepare", 96, "lr"),
        ("prepare", 101, "lr"),
        ("prepare", 101, "schedule"),
        ("accelerate", 96, "schedule"),
        ("accelerate", 101, "lr"),
    ],
)
def test_same_bits_at_every_world_size(way: str, length: int, decay_by: str) -> None:
    reference = plain_curve(length, decay_by)
    assert len({lr for _, lr, _ in reference}) > 30
    for world_size in WORLDS:
        for rows in run_ranks(world_size, curve, way, 12 // world_size, length, False, decay_by):
            assert rows == reference


@pytest.mark.parametrize("world_size", WORLDS)
def test_drop_last_has_one_epoch_size_at_every_world_size(world_size: int) -> None:
    reference = plain_curve(96, "lr")[:8]  # 101 samples, but whole batches only
    for rows in run_ranks(world_size, curve, "prepare", 12 // world_size, 101, True, "lr"):
        assert rows[:8] == reference


# ---------------------------------------------------------------- real samples


class Stream(IterableDataset[Any]):
    """No length, as data from a network has none."""

    def __init__(self, length: int) -> None:
        self.data = data(length)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        return iter(self.data[i] for i in range(len(self.data)))


class SizedStream(Stream):
    def __len__(self) -> int:
        return len(self.data)


def counts(accumulation: int, count: int, options: dict[str, Any]) -> tuple[list[int], int | None, int | None]:
    """Samples of each update, global batch and epoch size."""
    if options.get("dataset") == "stream":
        options = {**options, "dataset": Stream(26)}
    if options.get("dataset") == "sized stream":
        options = {**options, "dataset": SizedStream(26)}
    if options.get("loader") == "batch sampler":
        options = {
            **options,
            "loader": {"batch_size": 1, "batch_sampler": BatchSampler(SequentialSampler(range(26)), 4, False)},
        }
    accelerator, objects = job(accumulation, options.pop("length", 26), **options)
    prepared = prepare(accelerator, *objects)
    scheduler = prepared[3]
    samples = [row[0] for row in epochs(accelerator, *prepared, count=count)] + [scheduler.samples]
    return [b - a for a, b in itertools.pairwise(samples)], scheduler.batch_size, scheduler.epoch_size


@pytest.mark.parametrize(
    ("name", "accumulation", "options", "batch", "epoch", "expected"),
    [
        ("padded by even_batches", 1, {"loader": {"batch_size": 4}}, 8, 26, [8, 8, 8, 2] * 2),
        ("short last accumulation", 2, {"loader": {"batch_size": 4}}, 16, 26, [16, 10] * 2),
        ("very short last accumulation", 3, {"loader": {"batch_size": 4}}, 24, 26, [24, 2] * 2),
        ("split_batches", 1, {"loader": {"batch_size": 8}, "config": {"split_batches": True}}, 8, 26, [8, 8, 8, 2] * 2),
        (
            "dispatch_batches",
            1,
            {"loader": {"batch_size": 4}, "config": {"dispatch_batches": True}},
            8,
            26,
            [8, 8, 8, 2] * 2,
        ),
        ("drop_last", 1, {"loader": {"batch_size": 4, "drop_last": True}}, 8, 24, [8, 8, 8] * 2),
        (
            "accumulation across epochs",
            3,
            {"loader": {"batch_size": 4}, "plugin": {"sync_with_dataloader": False}},
            24,
            26,
            [24, 18, 18, 18],  # the passes have 8, 8, 8, 2 | 8, 8, 8, 2 | 8, 8, 8, 2
        ),
        (
            "a stream with a length",
            1,
            {"loader": {"batch_size": 4}, "dataset": "sized stream"},
            8,
            26,
            [8, 8, 8, 2] * 2,
        ),
        (
            "a stream without",
            1,
            {"loader": {"batch_size": 4}, "dataset": "stream", "recipe": {"epoch_size": 26}},
            8,
            26,
            [8, 8, 8, 2] * 2,
        ),
        (
            "even by itself",
            1,
            {"loader": {"batch_size": 4}, "length": 30, "config": {"even_batches": False}},
            8,
            30,
            [8, 8, 8, 6],
        ),
    ],
)
def test_real_samples_are_counted(
    name: str, accumulation: int, options: dict[str, Any], batch: int, epoch: int, expected: list[int]
) -> None:
    for got, got_batch, got_epoch in run_ranks(2, counts, accumulation, 3, options):
        assert (got_batch, got_epoch) == (batch, epoch), name
        assert got[: len(expected)] == expected, name


def test_a_custom_batch_sampler_with_a_size_works() -> None:
    dataset = data(26)
    accelerator = Accelerator()
    model = model_of_two_layers()
    optimizer = DistAdamW(model.parameters(), lr=1e-2)
    scheduler = CyclicLRWithRestarts(optimizer, **RECIPE)
    loader = DataLoader(dataset, batch_sampler=BatchSampler(SequentialSampler(range(20)), 8, False))
    prepared = prepare(accelerator, model, optimizer, loader, scheduler)
    assert (scheduler.batch_size, scheduler.epoch_size) == (8, 20)
    assert [row[0] for row in epochs(accelerator, *prepared, count=2)] == [0, 8, 16, 20, 28, 36]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": Stream(26)}, r"no length.* Pass epoch_size=<samples per epoch>"),
        (
            {"recipe": {"batch_size": 5}},
            r"batch_size=5 .* 1 samples x 3 accumulation steps x 1 ranks = 3",
        ),
        ({"loader": {"batch_size": None}}, "no batch size"),
        ({"loader": {"drop_last": True}, "dataset": data(2)}, "2 samples.*global batch of 3"),
    ],
)
def test_what_cannot_be_derived_is_an_error_that_says_what_to_do(options: dict[str, Any], message: str) -> None:
    accelerator, objects = job(3, **options)
    with pytest.raises(ValueError, match=message):
        prepare(accelerator, *objects)


def test_an_engine_that_is_not_supported_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator, objects = job()
    # Megatron-LM is not installed, so Accelerate's word for the engine is replaced.
    monkeypatch.setattr(accelerator.state, "distributed_type", DistributedType.MEGATRON_LM)
    with pytest.raises(ValueError, match="MEGATRON_LM is not supported"):
        prepare(accelerator, *objects)


def cannot_split(options: dict[str, Any]) -> None:
    accelerator, objects = job(1, 27, **options)
    prepare(accelerator, *objects)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loader": {"batch_size": 7}, "config": {"split_batches": True}}, "nearest sizes that work: 6 and 9"),
        (
            {"loader": {"batch_size": 4}, "config": {"even_batches": False}},
            "even_batches=False gives 3 ranks different",
        ),
    ],
)
def test_batches_that_ranks_cannot_share_are_refused(options: dict[str, Any], message: str) -> None:
    for error in expect_error_on_all(3, cannot_split, options):
        assert message in error


def test_a_global_batch_may_be_given_if_it_is_right() -> None:
    accelerator, objects = job(3, recipe={"batch_size": GlobalBatch(1, 3, 1)})
    assert prepare(accelerator, *objects)[3].batch_size == 3


def test_accumulation_changed_in_mid_run_is_counted() -> None:
    accelerator, objects = job(1, 24)
    *_, scheduler = prepared = prepare(accelerator, *objects)
    accelerator.gradient_accumulation_steps = 4
    assert [row[0] for row in epochs(accelerator, *prepared, count=1)] == [0, 4, 8, 12, 16, 20]
    assert scheduler.samples == 24


def test_another_loader_is_counted_too() -> None:
    accelerator, objects = job(1, 22, loader={"batch_size": 4})
    model, optimizer, loader, scheduler = prepare(accelerator, *objects)
    other = accelerator.prepare(DataLoader(data(9), batch_size=3))
    assert [row[0] for row in epochs(accelerator, model, optimizer, other, scheduler, count=1)] == [0, 3, 6]
    list(epochs(accelerator, model, optimizer, loader, scheduler, count=1))
    assert scheduler.samples == 9 + 22


def test_a_short_accumulation_with_drop_last_is_counted_and_said() -> None:
    accelerator, objects = job(4, 22, loader={"batch_size": 2, "drop_last": True})
    with pytest.warns(UserWarning, match=r"11 micro-batches.* last 3 .* 6 samples"):
        prepared = prepare(accelerator, *objects)
    assert prepared[3].epoch_size == 16
    assert [row[0] for row in epochs(accelerator, *prepared, count=2)] == [0, 8, 16, 22, 30, 38]


def test_a_scheduler_of_another_optimizer_is_refused() -> None:
    accelerator, (model, _, loader, scheduler) = job()
    with pytest.raises(ValueError, match="drives another DistAdamW"):
        prepare(accelerator, model, DistAdamW(model.parameters()), loader, scheduler)


# ---------------------------------------------------------------- clipping


def clipped_by_accelerate(max_norm: float, forgotten: bool) -> None:
    accelerator, objects = job(2, 48, loader={"batch_size": 4}, optimizer={"eps": 0.1})
    model, optimizer, loader, _ = prepare(accelerator, *objects)
    if forgotten:  # somebody frees memory in mid-training, and has the objects himself
        accelerator.free_memory()
    twin = model_of_two_layers()
    reference = torch.optim.AdamW(twin.parameters(), lr=1e-2, eps=0.1, fused=True)
    for x, y in loader:
        with accelerator.accumulate(model):
            accelerator.backward(nn.functional.mse_loss(model(x), y))
            (nn.functional.mse_loss(twin(x), y) / 2).backward()
            if accelerator.sync_gradients:
                if dist.get_world_size() > 1:
                    average_gradients(twin)
                norm = accelerator.clip_grad_norm_(model.parameters(), max_norm)
                expected = torch.nn.utils.clip_grad_norm_(twin.parameters(), max_norm)
                torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0)
                assert expected > max_norm
                for ours, theirs in zip(optimizer.param_groups, reference.param_groups, strict=True):
                    theirs.update({k: ours[k] for k in ("lr", "weight_decay")})
                reference.step()
                reference.zero_grad()
            optimizer.step()
            optimizer.zero_grad()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)  # the norm is summed in another order


@pytest.mark.parametrize("forgotten", [False, True])
@pytest.mark.parametrize("world_size", [1, 3])
def test_accelerates_own_clipping_is_right(world_size: int, forgotten: bool) -> None:
    run_ranks(world_size, clipped_by_accelerate, 0.1, forgotten)


# ---------------------------------------------------------------- agreement


def disagree_at_prepare(what: str) -> None:
    odd = dist.get_rank() == 1
    cases: dict[str, dict[str, Any]] = {
        "lr": {"optimizer": {"lr": 2e-2 if odd else 1e-2}},
        "betas": {"optimizer": {"betas": (0.8 if odd else 0.9, 0.999)}},
        "period": {"recipe": {"restart_period": 3 if odd else 2}},
        "epoch": {"recipe": {"epoch_size": 90 if odd else 100}},
        "width": {"width": 20},
        "data": {"length": 99 if odd else 100, "recipe": {"epoch_size": 100}},
    }
    accelerator, objects = job(**cases[what])
    prepare(accelerator, *objects)


@pytest.mark.parametrize(
    ("what", "field"),
    [
        (
            "lr",
            "groups (lr, min_lr, weight_decay) is [[0.01, 1e-05, 0.05]] on rank 0 and [[0.02, 1e-05, 0.05]] on rank 1",
        ),
        ("betas", "'betas': [0.8, 0.999]"),
        ("period", "restart_period is 2 on rank 0 and 3 on rank 1"),
        ("epoch", "epoch_size is 100 on rank 0 and 90 on rank 1"),
        ("data", "data loader is 100 on rank 0 and 99 on rank 1"),
    ],
)
def test_ranks_that_differ_at_prepare_all_raise(what: str, field: str) -> None:
    for error in expect_error_on_all(3, disagree_at_prepare, what):
        assert error.startswith("AgreementError: rank 1 disagrees with rank 0: ")
        assert field in error


def wrong_on_one_rank() -> None:
    accelerator, objects = job(recipe={"batch_size": 5 if dist.get_rank() == 1 else 3})
    prepare(accelerator, *objects)


def test_what_is_wrong_on_one_rank_is_raised_on_all() -> None:
    for error in expect_error_on_all(3, wrong_on_one_rank):
        assert error.startswith("ValueError: batch_size=5 was given, but")
        assert error.endswith("(rank 1)")


def diverge(what: str) -> None:
    accelerator, objects = job(length=24)
    model, optimizer, loader, scheduler = prepare(accelerator, *objects)
    update = 0
    for _ in range(2):
        for x, y in loader:
            accelerator.backward(nn.functional.mse_loss(model(x), y))
            odd = dist.get_rank() == 2 and update == 3
            if odd and what == "lr":
                optimizer.param_groups[0]["lr"] *= 2
            if odd and what == "eps":
                optimizer.param_groups[0]["eps"] = 1e-6
            optimizer.step()
            scheduler.step(samples=2 if odd and what == "samples" else 3)
            optimizer.zero_grad()
            update += 1
            assert update <= 5, "nobody noticed for two updates"


@pytest.mark.parametrize(
    ("what", "field"),
    [
        ("lr", "lr of group 0 is 0.003 on rank 0 and 0.006 on"),
        ("eps", "eps of group 0 is 1e-08 on"),
        ("samples", "lr of group 0 is 0.004 on"),  # which follows from the samples
    ],
)
def test_ranks_that_diverge_later_all_raise(what: str, field: str) -> None:
    for error in expect_error_on_all(3, diverge, what):
        assert error.startswith("AgreementError: rank 2 disagrees with rank 0: ")
        assert field in error
