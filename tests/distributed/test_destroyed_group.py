"""A process group destroyed during an asynchronous save: an error, and no checkpoint is lost."""

from __future__ import annotations

import multiprocessing
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from dist_adamw import CheckpointError
from dist_adamw.checkpoint.manifest import damage_of
from dist_adamw.ranks.run_on_all import Ranks

_context = multiprocessing.get_context("forkserver")


def rank_of(rank: int, root: str, keep: int, answers: Any) -> None:
    import torch
    import torch.distributed as dist

    from dist_adamw import AsyncSaver, CheckpointError, CheckpointFolder
    from dist_adamw.checkpoint.storage import files as storage
    from tests.distributed.test_folder import Job

    torch.set_num_threads(1)
    store = f"file://{root}.rendezvous"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    job, saver, folder = Job(), AsyncSaver(), CheckpointFolder(root, keep=keep)
    job.train()
    first = folder.async_save(saver, 10, *job.all)
    assert first is not None
    saver.wait()
    write = storage._write_file

    def slowly(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.5)
        return write(*args, **kwargs)

    storage._write_file = slowly
    job.train()
    second = folder.async_save(saver, 20, *job.all)
    assert second is not None
    if rank == 1:
        time.sleep(0.2)
    dist.destroy_process_group()
    said = []
    for end in (second.wait, folder.close, saver.close, lambda: folder.save(30, job.write)):
        try:
            end()
        except CheckpointError as error:
            said.append(str(error))
    answers.put((rank, said))
    if rank == 0:
        time.sleep(600)  # until it is killed; the other rank must not wait for its end


@pytest.mark.parametrize("keep", [1, 3])
def test_a_group_that_is_destroyed_in_a_save_costs_no_checkpoint(keep: int, tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    _context.set_forkserver_preload(["torch", "torch.distributed", "accelerate", "deepspeed", "dist_adamw"])
    answers = _context.Queue()
    processes = [_context.Process(target=rank_of, args=(rank, str(root), keep, answers)) for rank in range(2)]
    for process in processes:
        process.start()
    try:
        for _ in processes:
            _, said = answers.get(timeout=45)  # less than a rank would wait for the other one
            assert len(said) == 2, said  # of the save, and of the folder that is closed
            assert "was destroyed before" in said[0] or "could not write" in said[0]
    finally:
        for process in processes:
            process.kill()
            process.join()
    whole = [path.name for path in root.glob("sample-*") if path.suffix != ".partial"]
    assert whole == ["sample-000000010"]
    assert damage_of(root / "sample-000000010") is None
    assert (root / "latest").read_text() == "sample-000000010"


def test_a_rank_stays_what_it_was() -> None:
    """``torch.distributed`` calls every rank the main one once its group has been destroyed."""
    ranks = Ranks(rank=1, size=2, group=None)
    assert not ranks.is_main
    done: list[int] = []
    for ask in (ranks.check, lambda: ranks.gather(0), lambda: ranks.run(lambda: done.append(1))):
        with pytest.raises(CheckpointError, match="group of 2 ranks was destroyed"):
            ask()
    assert not done


def trained_twice(rank: int, root: str, is_same: bool, answers: Any) -> None:
    """Train, destroy the group, make another, and train again, with the first optimizer alive; then with that one."""
    import torch
    import torch.distributed as dist
    from torch import nn

    from dist_adamw import DistAdamW

    torch.set_num_threads(1)

    def begin(number: int) -> None:
        store = f"file://{root}.rendezvous{number}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(seconds=20))

    def update(model: nn.Module, optimizer: Any) -> None:
        model(torch.full((2, 8), 1.0 + rank)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    def trained(model: nn.Module) -> tuple[Any, float]:
        optimizer = DistAdamW(model.parameters(), lr=1e-2)
        optimizer.attach(model)
        update(model, optimizer)
        return optimizer, sum(float(param.detach().double().sum()) for param in model.parameters())

    torch.manual_seed(0)
    model = nn.Linear(8, 8)
    begin(0)
    first, before = trained(model)
    dist.destroy_process_group()
    begin(1)
    if is_same:
        with pytest.raises(RuntimeError, match="was destroyed"):
            update(model, first)
        first.zero_grad()
    else:
        torch.manual_seed(0)
        model = nn.Linear(8, 8)
    _, after = trained(model)
    said = ""
    try:
        update(model, first)
    except RuntimeError as error:
        said = str(error)
    answers.put((rank, before, after, said))


@pytest.mark.parametrize("is_same", [False, True])
def test_training_goes_on_with_another_group(is_same: bool, tmp_path: Path) -> None:
    _context.set_forkserver_preload(["torch", "torch.distributed", "accelerate", "deepspeed", "dist_adamw"])
    answers = _context.Queue()
    processes = [
        _context.Process(target=trained_twice, args=(rank, str(tmp_path / "store"), is_same, answers))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    try:
        found = sorted(answers.get(timeout=45) for _ in processes)
    finally:
        for process in processes:
            process.kill()
            process.join()
    (_, before, after, said), (_, *other) = found
    assert other == [before, after, said]
    assert (before == after) != is_same
    assert "process group" in said
    assert "was destroyed" in said
