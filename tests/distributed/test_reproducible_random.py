"""Random numbers with ``reproducible=True``: the same on any number of ranks, whatever is called, and resumed."""

from __future__ import annotations

import copy
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import dist_adamw
from dist_adamw import CyclicLRWithRestarts, DistAdamW, prepare, rest_of_epoch
from tests.distributed.engines import accelerator_on
from tests.distributed.test_reproducible import digest
from tests.ranks import expect_error_on_all, run_ranks

MICRO_BATCHES = 6  # of an update


class Dropped(nn.Module):
    """Dropout between two layers; ``loss`` is a method next to forward."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(8, 40), nn.Dropout(0.5), nn.Linear(40, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.loss(x)

    def loss(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.layers(x)).square().mean()


def rows(update: int, number: int) -> Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(100 * update + number))


def optimizer_of(model: nn.Module) -> DistAdamW:
    return DistAdamW(model.parameters(), 1e-2, eps=0.1, reproducible=True)


# ---------------------------------------------------------------- what a loop calls


def calling(way: str) -> list[str]:
    """Train for two updates, with the forward pass called in some way; return a digest after each."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model = Dropped()
    call: Any = model
    optimizer = optimizer_of(model)
    if way == "compiled, then attached":
        call = torch.compile(model, backend="eager")
    optimizer.attach(call)
    if way == "compiled after":
        call = torch.compile(model, backend="eager")
    elif way == "compiled in place":
        model.compile(backend="eager")
    torch.manual_seed(rank)  # what the loop draws must not matter
    digests = []
    for update in range(2):
        for number in range(rank, MICRO_BATCHES, ranks):
            x = rows(update, number)
            if way == "method" or (way == "method on rank 1" and (rank, number) == (1, 1)):
                loss = model.loss(x)
            elif way == "context":
                with optimizer.forward_pass():
                    loss = model.loss(x)
            elif way.startswith("checkpoint"):
                loss = torch.as_tensor(checkpoint(model, x.requires_grad_(), use_reentrant="reentrant" in way))
            elif way == "weighted":  # by what the module draws without gradients
                with torch.no_grad():
                    weight = model(x) + 10 * model(x)
                loss = call(x) * weight
            elif way == "evaluated in training":
                with torch.no_grad():
                    for _ in range(3 // ranks):
                        model(x)
                loss = call(x)
            elif way == "eval, with a part in training":
                model.eval()
                model.layers[1].train()
                loss = call(x)
            else:
                loss = call(x)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        digests.append(digest(model))
    return digests


@pytest.mark.parametrize(
    "way",
    [
        "context",
        "checkpoint, reentrant",
        "checkpoint",
        "evaluated in training",
        "eval, with a part in training",
        "compiled, then attached",
        "compiled after",
        "compiled in place",
    ],
)
def test_one_digest_for_every_way_to_call(way: str) -> None:
    (expected,) = run_ranks(1, calling, "plain")
    if way == "checkpoint, reentrant":  # its first forward pass is without gradients, and draws other numbers
        (expected,) = run_ranks(1, calling, way)
    for ranks in (1, 3) if "compiled" in way else (1, 2, 3):
        assert run_ranks(ranks, calling, way) == [expected] * ranks


def test_random_numbers_without_gradients_belong_to_the_micro_batch() -> None:
    assert len({str(found) for ranks in (1, 2, 3) for found in run_ranks(ranks, calling, "weighted")}) == 1


def under_fsdp(way: str) -> str:
    """Train for two updates; return a digest."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model: Any = Dropped()
    fully_shard(model, mesh=init_device_mesh("cpu", (ranks,)))
    register_fsdp_forward_method(model, "loss")
    optimizer = optimizer_of(model)
    optimizer.attach(model)
    for update in range(2):
        for number in range(rank, MICRO_BATCHES, ranks):
            with optimizer.forward_pass() if way == "context" else nullcontext():
                loss = (model if way == "module" else model.loss)(rows(update, number))
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return digest(model)


@pytest.mark.parametrize("ranks", [1, 2])
def test_another_method_under_fsdp2(ranks: int) -> None:
    (expected,) = run_ranks(1, under_fsdp, "module")
    assert run_ranks(ranks, under_fsdp, "context") == [expected] * ranks
    for error in expect_error_on_all(ranks, under_fsdp, "method"):
        assert "put the calls into `with optimizer.forward_pass():`" in error, error


@pytest.mark.parametrize(("way", "ranks"), [("method", 1), ("method", 2), ("method on rank 1", 3)])
def test_a_backward_pass_without_a_forward_pass_is_refused(way: str, ranks: int) -> None:
    for error in expect_error_on_all(ranks, calling, way):
        assert "a backward pass went through no forward pass of an attached module" in error


def test_a_refused_update_can_be_repeated() -> None:
    model = Dropped()
    optimizer = optimizer_of(model)
    optimizer.attach(model)
    model(rows(0, 0)).backward()
    optimizer.step()
    optimizer.zero_grad()
    before = digest(model)
    model.loss(rows(0, 1)).backward()
    with pytest.raises(RuntimeError, match="a backward pass went through no forward pass"):
        optimizer.step()
    assert digest(model) == before
    optimizer.zero_grad()
    model(rows(0, 1)).backward()
    optimizer.step()
    assert digest(model) != before


def checkpointing_one_of_two() -> None:
    model = Dropped()
    optimizer = optimizer_of(model)
    optimizer.attach(model)
    x = rows(0, 0).requires_grad_()
    (model(x) + torch.as_tensor(checkpoint(model, x, use_reentrant=False))).backward()


def test_checkpointing_of_one_of_several_forward_passes_is_refused() -> None:
    (error,) = expect_error_on_all(1, checkpointing_one_of_two)
    assert error.startswith("RuntimeError: activation checkpointing repeats one of 2 forward passes"), error


def changing_in_a_block(model: nn.Module) -> None:
    optimizer = optimizer_of(model)
    optimizer.attach(model)
    with optimizer.forward_pass():
        model.get_buffer("count").add_(1)


def test_a_block_that_changes_a_buffer_is_refused() -> None:
    model = Dropped()
    model.register_buffer("count", torch.zeros(()))
    with pytest.raises(RuntimeError, match="forward has changed the buffer 'count'"):
        changing_in_a_block(model)
    with pytest.raises(RuntimeError, match="no module is attached"), optimizer_of(Dropped()).forward_pass():
        pass
    with DistAdamW(Dropped().parameters()).forward_pass():
        pass


# ---------------------------------------------------------------- Accelerate's loop


def training(
    engine: str,
    last: int,
    *,
    seed: int = 5,
    extra: str = "",
    load: str | None = None,
    save: str | None = None,
    threads: int = 1,
) -> tuple[list[str], list[str]]:
    """Train through `prepare` to update ``last``; return a digest after each, and warnings of other bits."""
    ranks = dist.get_world_size()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with (
            accelerator_on(engine, MICRO_BATCHES // ranks) as accelerator,
            warnings.catch_warnings(record=True) as told,
        ):
            warnings.simplefilter("always")
            model: Any = Dropped()
            optimizer: Any = optimizer_of(model)
            scheduler: Any = CyclicLRWithRestarts(optimizer, restart_period=1)
            data = TensorDataset(torch.randn(48, 8, generator=torch.Generator().manual_seed(1)))
            torch.manual_seed(seed)
            model, optimizer, loader, scheduler = prepare(accelerator, model, optimizer, DataLoader(data, 2), scheduler)
            if load is not None:
                accelerator.load_state(load)
            digests: list[str] = []
            while len(digests) < last:
                for number, (batch,) in enumerate(rest_of_epoch(loader)):
                    with accelerator.accumulate(model):
                        if extra == "skipped batches" and number in (ranks, ranks + 1) and ranks <= 2:
                            model(batch)
                        loss = model(batch)
                        accelerator.backward(loss)
                        if extra == "logged" and number % 2 == 0:
                            model(batch)
                        optimizer.step()
                        scheduler.step()
                        optimizer.zero_grad()
                    if accelerator.sync_gradients:
                        digests.append(digest(accelerator.unwrap_model(model)))
                        if len(digests) == last:
                            break
            if save is not None:
                accelerator.save_state(save)
            return digests, [text for one in told if "other bits" in (text := str(one.message))]
    finally:
        torch.set_num_threads(before)


def test_a_forward_pass_that_is_only_logged_does_not_shift_the_next() -> None:
    (expected,) = run_ranks(1, training, "single", 3)
    for engine, ranks in (("single", 1), ("DDP", 2), ("FSDP2", 3)):
        assert run_ranks(ranks, training, engine, 3, extra="logged") == [expected] * ranks


@pytest.mark.parametrize("engine", ["DDP", "FSDP2"])
def test_a_resume_with_another_seed_goes_on_with_the_saved_one(tmp_path: Path, engine: str) -> None:
    ((expected, _),) = run_ranks(1, training, "single", 4)
    ((other, _),) = run_ranks(1, training, "single", 4, seed=6)
    assert other[0] != expected[0]
    run_ranks(3, training, "DDP", 2, save=str(tmp_path / "a"))
    assert run_ranks(2, training, engine, 2, seed=6, load=str(tmp_path / "a")) == [(expected[2:], [])] * 2


def test_a_resume_on_another_machine_is_told_once(tmp_path: Path) -> None:
    path = str(tmp_path / "a")
    run_ranks(2, training, "DDP", 1, save=path)
    (_, told), (_, untold) = run_ranks(2, training, "DDP", 3, load=path, threads=2)
    assert (len(told), untold) == (1, [])
    assert told[0].endswith("differ in threads (OMP_NUM_THREADS, torch.set_num_threads): 2 and 1."), told


def resumed_by_hand(way: str, path: Path) -> tuple[str, str]:
    """Save after an update and resume with another seed; return the digest after two, and that without a stop."""

    def update(model: nn.Module, optimizer: DistAdamW, number: int) -> None:
        model(rows(0, number)).backward()
        optimizer.step()
        optimizer.zero_grad()

    torch.manual_seed(7)
    model = Dropped()
    torch.manual_seed(7)
    optimizer = optimizer_of(model)
    optimizer.attach(model)
    update(model, optimizer, 0)
    weights, saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    dist_adamw.save(path / "ours", model, optimizer)
    update(model, optimizer, 1)

    again = Dropped()
    torch.manual_seed(8)
    other = optimizer_of(again)
    if way == "state dict after attach":
        other.attach(again)
    if way == "converted":
        dist_adamw.export_checkpoint(path / "ours", path / "torch.pt", "torch")
        dist_adamw.import_checkpoint(path / "torch.pt", path / "back")
    if way.startswith("state dict"):
        again.load_state_dict(weights)
        other.load_state_dict(saved)
    else:
        dist_adamw.load(path / ("back" if way == "converted" else "ours"), again, other, random_state=False)
    if way != "state dict after attach":
        other.attach(again)
    update(again, other, 1)
    return digest(again), digest(model)


@pytest.mark.parametrize("way", ["state dict", "state dict after attach", "load", "converted"])
def test_every_kind_of_checkpoint_has_the_seed(tmp_path: Path, way: str) -> None:
    found, expected = resumed_by_hand(way, tmp_path)
    assert found == expected
