"""`prepare` with torch's own schedulers: Accelerate's stepping, and everything else that prepare does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from accelerate.scheduler import AcceleratedScheduler
from accelerate.state import AcceleratorState
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from dist_adamw import DistAdamW, load, prepare, save
from tests.distributed.engines import ZERO, accelerator_on
from tests.distributed.jobs import data, model_of_two_layers
from tests.known import unwrap
from tests.ranks import expect_error_on_all, run_ranks

LENGTH, MICRO = 24, 4
Recipe = Callable[[Optimizer], LRScheduler]
SCHEDULERS: dict[str, Recipe] = {
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 12),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 1e-2, total_steps=12),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: max(0.1, 1 - step / 12)),
    "milestones": lambda o: lr_scheduler.MultiStepLR(o, [4, 8]),
    "in sequence": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, 1.0, 4), lr_scheduler.MultiStepLR(o, [2, 6])], [4]
    ),
}
OTHERS: dict[str, Recipe] = {
    "constant": lambda o: lr_scheduler.ConstantLR(o, 0.5, 3),
    "steps": lambda o: lr_scheduler.StepLR(o, 2),
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "polynomial": lambda o: lr_scheduler.PolynomialLR(o, 6),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2, 2),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 2, mode="exp_range", gamma=0.9),
    "chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(o, 0.1, 1.0, 4), lr_scheduler.ExponentialLR(o, 0.9)], o
    ),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
}


class Job:
    """The five objects; ``ours`` goes through `prepare`, the twin through Accelerate's own with torch's AdamW."""

    def __init__(self, recipe: Recipe, engine: str, *, ours: bool = True) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        config: dict[str, Any] = (
            {"gradient_clipping": 0.0} if engine in ZERO else {}
        )  # DeepSpeed alone would clip to 1.0
        with accelerator_on(engine, **config) as self.accelerator:
            model = model_of_two_layers()
            made = DistAdamW if ours else torch.optim.AdamW
            optimizer = made(model.parameters(), lr=1e-2, eps=0.1)
            objects = model, optimizer, DataLoader(data(LENGTH), batch_size=MICRO), recipe(optimizer)
            call: Any = prepare if ours else type(self.accelerator).prepare
            self.model, self.optimizer, self.loader, self.scheduler = call(self.accelerator, *objects)

    def train(self, epochs: int) -> list[tuple[float, float]]:
        """lr and loss of each update."""
        rows = []
        for _ in range(epochs):
            for x, y in self.loader:
                loss = nn.functional.mse_loss(self.model(x), y)
                self.accelerator.backward(loss)
                rows.append((self.optimizer.param_groups[0]["lr"], loss.item()))
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()
        return rows


def compared(engine: str, folder: str, resume: bool) -> dict[str, Any]:
    """Curves of 2 epochs, as Accelerate's own; or the state that was loaded, and the second epoch."""
    found = {}
    for name, recipe in SCHEDULERS.items():
        job = Job(recipe, engine)
        assert isinstance(job.scheduler, AcceleratedScheduler)
        assert (unwrap(job.optimizer)._path is not None) == isinstance(job.model, DistributedDataParallel)
        if not resume:
            rows = job.train(1)
            job.accelerator.save_state(f"{folder}/{name}")
            at_save = job.scheduler.scheduler.last_epoch, job.scheduler.get_last_lr()
            rows += job.train(1)
            twin = Job(recipe, engine, ours=False).train(2)
            assert [lr for lr, _ in rows] == [lr for lr, _ in twin]
            assert [loss for _, loss in rows] == pytest.approx([loss for _, loss in twin], rel=1e-5)
        else:
            job.accelerator.load_state(f"{folder}/{name}")
            at_save = job.scheduler.scheduler.last_epoch, job.scheduler.get_last_lr()
            assert [group["lr"] for group in job.optimizer.param_groups] == at_save[1]
            rows = job.train(1)
        found[name] = at_save, rows
    return found


@pytest.mark.parametrize(("engine", "ranks"), [("single", 1), ("DDP", 2), ("ZeRO-1", 2)])
def test_accelerates_stepping_and_our_checkpoints(engine: str, ranks: int, tmp_path: Path) -> None:
    begun = run_ranks(ranks, compared, engine, str(tmp_path), False)
    for first, second in zip(begun, run_ranks(ranks, compared, engine, str(tmp_path), True), strict=True):
        for name, (at_save, rows) in second.items():
            assert first[name] == (at_save, first[name][1][: -len(rows)] + rows), name
    other = 3 - ranks
    for loaded in run_ranks(other, compared, {1: "single", 2: "DDP"}[other], str(tmp_path), True):
        assert {name: at for name, (at, _) in loaded.items()} == {name: at for name, (at, _) in begun[0].items()}


def in_torch(recipe: Recipe, updates: range, folder: str | None) -> list[float]:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = DistAdamW(model.parameters(), lr=0.1)
    scheduler = recipe(optimizer)
    if updates.start:
        assert folder is not None
        load(folder, model, optimizer, scheduler)
    found = []
    for update in updates:
        model(torch.full((1, 3), float(update))).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
            scheduler.step(1.0)
        else:
            scheduler.step()
        found.append(optimizer.param_groups[0]["lr"])
    if folder is not None and not updates.start:
        save(folder, model, optimizer, scheduler)
    return found


@pytest.mark.parametrize("name", [*SCHEDULERS, *OTHERS])
def test_every_scheduler_of_torch_is_saved_and_loaded(name: str, tmp_path: Path) -> None:
    recipe = {**SCHEDULERS, **OTHERS}[name]
    begun = in_torch(recipe, range(3), str(tmp_path / "a"))
    assert begun + in_torch(recipe, range(3, 8), str(tmp_path / "a")) == in_torch(recipe, range(8), None)


def diverge() -> None:
    job = Job(SCHEDULERS["cosine"], "DDP")
    if dist.get_rank() == 1:
        job.scheduler.step()
    job.train(1)


def begin_apart() -> None:
    Job(lambda o: lr_scheduler.StepLR(o, 2 + dist.get_rank()), "DDP")


def test_ranks_that_differ_are_stopped() -> None:
    for error in expect_error_on_all(2, diverge):
        assert error.startswith("AgreementError: rank 1 disagrees with rank 0: lr of group 0 is 0.01 on rank 0 and ")
    for error in expect_error_on_all(2, begin_apart):
        assert "'step_size': 2" in error


def refused() -> None:
    other = torch.optim.SGD(model_of_two_layers().parameters(), lr=1.0)
    cases: list[tuple[Recipe, str]] = [
        (lambda _: lr_scheduler.StepLR(other, 2), "drives another SGD"),
        (lambda o: AcceleratedScheduler(lr_scheduler.StepLR(o, 2), o), "not prepared yet, got AcceleratedScheduler"),
        (cast(Recipe, lambda _: "cosine"), "not prepared yet, got str"),
    ]
    for recipe, message in cases:
        with pytest.raises(ValueError, match=message):
            Job(recipe, "single")


def test_what_is_no_scheduler_of_this_optimizer_is_refused() -> None:
    run_ranks(1, refused)
