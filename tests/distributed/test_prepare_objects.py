"""`prepare` with more than four objects, on ranks: loaders for evaluation on every engine, a GAN, ranks that differ."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, DataLoaderConfiguration
from torch import Tensor, nn
from torch.nn.functional import softplus
from torch.utils.data import DataLoader, TensorDataset

from dist_adamw import CyclicLRWithRestarts, DistAdamW, position, prepare, rest_of_epoch
from tests.distributed.engines import accelerator_on
from tests.distributed.jobs import data, job, model_of_two_layers
from tests.ranks import expect_error_on_all, run_ranks

# ---------------------------------------------------------------- loaders for evaluation


def with_evaluation(engine: str) -> None:
    with accelerator_on(engine) as accelerator:
        model = model_of_two_layers()
        optimizer = DistAdamW(model.parameters(), lr=1e-2)
        scheduler = CyclicLRWithRestarts(optimizer, restart_period=1)
        loaders = [DataLoader(data(24), 4), DataLoader(data(6), 1)]  # DeepSpeed would take the smaller batch
        train, model, evaluation, wrapped, scheduler = prepare(
            accelerator, loaders[0], model, loaders[1], optimizer, scheduler
        )
        ranks = accelerator.num_processes
        assert (scheduler.batch_size, scheduler.epoch_size) == (4 * ranks, 24)
        assert (train.total_batch_size, evaluation.total_batch_size) == (4 * ranks, ranks)
        if engine.startswith("ZeRO"):
            assert model.train_micro_batch_size_per_gpu() == 4
        for x, y in train:
            accelerator.backward(nn.functional.mse_loss(model(x), y))
            wrapped.step()
            scheduler.step()
            wrapped.zero_grad()
            model.eval()
            with torch.no_grad():
                rows = sum(len(accelerator.gather_for_metrics(model(x))) for x, _ in evaluation)
            model.train()
            assert rows == 6
        assert scheduler.samples == 24
        assert position(train).epoch == 1


@pytest.mark.parametrize("engine", ["DDP", "FSDP2", "ZeRO-2"])
def test_a_loader_for_evaluation(engine: str) -> None:
    run_ranks(2, with_evaluation, engine)


# ---------------------------------------------------------------- a GAN

EPOCH, BATCH = 24, 6
Row = tuple[int, float, float, list[float]]


def gan() -> list[nn.Module]:
    torch.manual_seed(4)
    return [nn.Sequential(nn.Linear(n, 9), nn.Tanh(), nn.Linear(9, m)) for n, m in ((3, 2), (2, 1))]


def gan_data() -> TensorDataset:
    generator = torch.Generator().manual_seed(5)
    return TensorDataset(torch.randn(EPOCH, 2, generator=generator), torch.randn(EPOCH, 3, generator=generator))


def loss_of(models: Sequence[nn.Module], real: Tensor, noise: Tensor, *, generators_turn: bool) -> Tensor:
    generator, critic = models
    fake = generator(noise)
    if generators_turn:
        return softplus(-critic(fake)).mean()
    scores = critic(torch.cat([real, fake.detach()]))
    return softplus(-scores[: len(real)]).mean() + softplus(scores[len(real) :]).mean()


class Gan:
    """A GAN as its users write it: the critic's gradients of the generator's turn are dropped.

    Args:
        calls: Of ``prepare``: one for both models, or one for each, which share the loader.
    """

    def __init__(self, calls: int = 1) -> None:
        self.accelerator = Accelerator(dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True))
        models = gan()
        # A large eps shows a wrong scale of the gradient.
        optimizers = [DistAdamW(m.parameters(), lr=lr, eps=0.1) for m, lr in zip(models, (1e-2, 3e-2), strict=True)]
        schedulers = [
            CyclicLRWithRestarts(o, restart_period=p, t_mult=1) for o, p in zip(optimizers, (0.5, 0.75), strict=True)
        ]
        loader: Any = DataLoader(gan_data(), BATCH // dist.get_world_size(), shuffle=False)
        if calls == 1:
            prepared = prepare(self.accelerator, *models, *optimizers, loader, *schedulers)
            self.models, self.optimizers, self.schedulers = prepared[:2], prepared[2:4], prepared[5:]
            self.loader = prepared[4]
            return
        self.loader, each = loader, []
        for one in zip(models, optimizers, schedulers, strict=True):
            *prepared_one, self.loader = prepare(self.accelerator, *one, self.loader)
            each.append(prepared_one)
        self.models, self.optimizers, self.schedulers = map(tuple, zip(*each, strict=True))

    def update(self, real: Tensor, noise: Tensor) -> Row:
        clock = self.schedulers[0].samples
        lrs = [optimizer.param_groups[0]["lr"] for optimizer in self.optimizers]
        for turn in (1, 0):
            self.optimizers[turn].zero_grad()
            self.accelerator.backward(loss_of(self.models, real, noise, generators_turn=turn == 0))
            self.optimizers[turn].step()
            self.schedulers[turn].step()
        weights = [float(p.detach().double().sum()) for model in self.models for p in model.parameters()]
        return clock, lrs[0], lrs[1], weights

    def train(self, updates: int) -> list[Row]:
        rows: list[Row] = []
        for _ in range(position(self.loader).epoch, 3):
            for batch in rest_of_epoch(self.loader):
                rows.append(self.update(*batch))
                if len(rows) == updates:
                    return rows
        return rows


def gan_whole(calls: int = 1) -> list[Row]:
    return Gan(calls).train(12)


def gan_saved(folder: str, updates: int, calls: int) -> None:
    one = Gan(calls)
    one.train(updates)
    one.accelerator.save_state(folder)


def gan_resumed(folder: str, calls: int) -> list[Row]:
    one = Gan(calls)
    one.accelerator.load_state(folder)
    return one.train(12)


@functools.cache
def gan_in_plain_torch() -> list[list[float]]:
    """The sums of the weights after each update, with torch's AdamW at the schedules' values, on whole batches."""
    models = gan()
    optimizers = [torch.optim.AdamW(m.parameters(), lr=lr, eps=0.1) for m, lr in zip(models, (1e-2, 3e-2), strict=True)]
    schedulers = [
        CyclicLRWithRestarts(o, BATCH, EPOCH, restart_period=p, t_mult=1)
        for o, p in zip(optimizers, (0.5, 0.75), strict=True)
    ]
    rows = []
    for _ in range(3):
        for real, noise in DataLoader(gan_data(), BATCH):
            for turn in (1, 0):
                optimizers[turn].zero_grad()
                loss_of(models, real, noise, generators_turn=turn == 0).backward()
                optimizers[turn].step()
                schedulers[turn].step()
            rows.append([float(p.detach().double().sum()) for model in models for p in model.parameters()])
    return rows


def assert_like_torch(rows: list[Row], begin: int = 0) -> None:
    assert [row[0] for row in rows] == [BATCH * i for i in range(begin, 12)]
    for row, expected in zip(rows, gan_in_plain_torch()[begin:], strict=True):
        assert row[3] == pytest.approx(expected, rel=1e-5, abs=1e-5)  # gradients are averaged in another order


@pytest.mark.parametrize(("world_size", "calls"), [(2, 1), (3, 2)])
def test_a_gan_is_torchs_and_resumes_on_other_ranks(world_size: int, calls: int, tmp_path: Path) -> None:
    whole = run_ranks(1, gan_whole)[0]
    assert_like_torch(whole)
    for rows in run_ranks(world_size, gan_whole, calls):
        assert_like_torch(rows)
        assert [row[:3] for row in rows] == [row[:3] for row in whole]
    run_ranks(world_size, gan_saved, str(tmp_path), 6, calls)  # in the middle of the second epoch
    (resumed,) = run_ranks(1, gan_resumed, str(tmp_path), calls)
    assert_like_torch(resumed, begin=6)
    assert [row[:3] for row in resumed] == [row[:3] for row in whole[6:]]


# ---------------------------------------------------------------- ranks that differ


def different(what: str) -> None:
    accelerator, (model, optimizer, loader, scheduler) = job(1, 24)
    odd = dist.get_rank() == 1
    objects: list[Any] = [model, optimizer, loader, scheduler]
    if what == "a second optimizer":
        other = model_of_two_layers()
        second = DistAdamW(other.parameters())
        objects += [other, second, CyclicLRWithRestarts(second, restart_period=1)] if odd else [None, None, None]
    elif what == "two schedulers":
        objects += [CyclicLRWithRestarts(optimizer, restart_period=1) if odd else None]
    elif what == "an evaluation loader":  # rank 0 alone may evaluate
        objects += [None if odd else DataLoader(data(4))]
    prepared = prepare(accelerator, *objects)
    assert len(prepared) == len(objects)


def test_another_number_of_trained_models_is_named_on_every_rank() -> None:
    for error in expect_error_on_all(2, different, "a second optimizer"):
        assert error.startswith("AgreementError: rank 1 disagrees with rank 0: ")
        assert "prepare(places of model, optimizer, scheduler) is [[0, 1, 3]] on rank 0 and [[" in error


def test_what_is_not_clear_on_one_rank_is_raised_on_all() -> None:
    for error in expect_error_on_all(2, different, "two schedulers"):
        assert error.startswith("ValueError: the schedulers CyclicLRWithRestarts (object 4) and")
        assert error.endswith("(rank 1)")


def test_a_loader_that_only_rank_0_has() -> None:
    run_ranks(2, different, "an evaluation loader")
