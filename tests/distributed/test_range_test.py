"""The range test on every engine: afterwards training continues as if there had been none."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import random
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import dist_adamw
from dist_adamw import CyclicLRWithRestarts, DistAdamW, load, lr_range, prepare, rest_of_epoch
from dist_adamw.checkpoint.engine_adapters import access
from dist_adamw.checkpoint.storage.partial_tensor import PartialTensor, evaluated
from dist_adamw.optimizer.sharding.dtensors import local_of
from dist_adamw.range_test.curve import lr_of
from tests.distributed.engines import accelerator_on
from tests.distributed.jobs import job
from tests.known import unwrap
from tests.ranks import expect_error_on_all, run_ranks

BATCH, EPOCH = 12, 60
RECIPE: dict[str, Any] = {"restart_period": 1.5, "t_mult": 1.5, "min_lr": 1e-5}
RANGE: dict[str, Any] = {"lowest": 1e-4, "highest": 1e4, "updates": 24}


class Network(nn.Module):
    """With dropout, statistics of each rank's own samples, and a buffer that no checkpoint has."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.net = nn.Sequential(nn.Linear(8, 33), nn.Tanh(), nn.Dropout(0.2), nn.Linear(33, 33), nn.Linear(33, 2))
        self.seen: Tensor
        self.kept: Tensor
        self.register_buffer("seen", torch.zeros(1), persistent=False)
        self.register_buffer("kept", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen += x.sum()
            self.kept[0] += x.abs().sum()
        return self.net(x)


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(EPOCH, 8, generator=generator)
    return TensorDataset(x, 5 * torch.sin(x[:, :2] * 3), torch.arange(EPOCH))


def digest(values: Iterator[Any]) -> str:
    found = hashlib.sha256()
    for value in values:
        if isinstance(value, Tensor):
            value = local_of(value).detach().contiguous().clone().view(torch.uint8).numpy().tobytes()
        found.update(value if isinstance(value, bytes) else repr(value).encode())
    return found.hexdigest()


def state_of(model: Any, optimizer: Any, scheduler: Any) -> dict[str, str]:
    """A digest of each part of this rank's state."""
    local = access(model, optimizer).to_save()
    parts: list[Any] = []
    for key, tensor in sorted(local.tensors.items()):
        parts.append(key)
        if type(tensor) is PartialTensor:
            for region, values in sorted(tensor.parts.items(), key=lambda item: repr(item[0])):
                parts += [region, evaluated(values)]
        else:
            parts.append(tensor)
    inner = unwrap(optimizer) if isinstance(dist_adamw.wrappers.unwrap(optimizer), DistAdamW) else optimizer
    groups = [{k: v for k, v in group.items() if k != "params"} for group in inner.param_groups]
    return {
        "tensors": digest(iter(parts)),
        "numbers": digest(iter([sorted(local.scalars.items())])),
        "buffers": digest(iter(model.buffers())),
        "groups": digest(iter([groups])),
        "schedule": digest(iter([scheduler and scheduler.state_dict(), scheduler and scheduler._step_count])),
        "random": digest(iter([torch.get_rng_state(), random.getstate(), str(np.random.get_state())])),
        "updates": str(getattr(inner, "updates", None)),
    }


def updates(accelerator: Any, model: Any, wrapped: Any, loader: Any, scheduler: Any, test: Any = None) -> Iterator[Any]:
    """The loop of the README; yields loss and rows of each micro-batch."""
    while True:
        for x, y, rows in rest_of_epoch(loader):
            with accelerator.accumulate(model):
                loss = nn.functional.mse_loss(model(x), y)
                accelerator.backward(loss)
                wrapped.step()
                scheduler.step()
                wrapped.zero_grad()
            yield loss, rows.tolist(), random.random(), float(np.random.rand())


def lrs_shown(optimizer: Any) -> list[float]:
    """The lr of the groups that this call of ``step`` updates."""
    return [group["lr"] for group in optimizer.param_groups if group["params"]]


def train(engine: str, before: int, after: int, has_test: bool, folder: str) -> tuple[list[Any], Any, dict[str, str]]:
    """Micro-batches ``before`` a range test, or none, and ``after``; what they saw, the result, and the end."""
    accumulation = 2
    random.seed(3)
    np.random.seed(3)
    with accelerator_on(engine, accumulation) as accelerator:
        model: Any = Network()
        parts = [{"params": model.net[0].parameters(), "lr": 3e-3}, {"params": model.net[3:].parameters()}]
        optimizer = DistAdamW(parts, lr=1e-2, weight_decay=0.1, eps=0.1)
        scheduler = CyclicLRWithRestarts(optimizer, **RECIPE)
        order = torch.Generator().manual_seed(11)
        micro_batch = BATCH // (accelerator.num_processes * accumulation)
        loader: Any = DataLoader(data(), micro_batch, shuffle=True, generator=order)
        prepared: Any = prepare(accelerator, model, optimizer, loader, scheduler)
        model, wrapped, loader, scheduler = prepared
        seen = list(itertools.islice(updates(accelerator, *prepared), before))
        result: Any = None
        used: list[float] = []
        if has_test:
            state = state_of(model, wrapped, scheduler)
            with lr_range(model, wrapped, **RANGE, folder=folder) as test:
                hook = unwrap(wrapped).register_step_pre_hook(lambda one, *_: used.extend(lrs_shown(one)))
                for loss, *_ in updates(accelerator, *prepared):
                    if test.record(loss):
                        break
            result = test.result
            hook.remove()
            lrs = [lr_of(i, **RANGE) for i in range(len(result.losses))]
            assert result.lrs == tuple(lrs)
            # Of each group once in every update, also where the engine steps one group after the other.
            assert used[: 2 * len(lrs)] == pytest.approx([ratio * lr for lr in lrs for ratio in (0.3, 1.0)])
            assert state_of(model, wrapped, scheduler) == state
            assert not any(Path(folder).iterdir())
        seen += itertools.islice(updates(accelerator, *prepared), after)
        end = state_of(model, wrapped, scheduler)
    return [(float(loss.detach()), *rest) for loss, *rest in seen], result, end


CELLS = [
    ("single", 1, 6),
    ("single", 1, 0),
    ("DDP", 2, 6),
    ("DDP", 3, 0),
    ("FSDP2", 1, 0),
    ("FSDP2", 3, 6),
    ("ZeRO-2", 3, 6),
    ("ZeRO-3", 2, 0),
]


@pytest.mark.parametrize(("engine", "world_size", "before"), CELLS)
def test_nothing_is_left_of_it(engine: str, world_size: int, before: int, tmp_path: Path) -> None:
    tested = run_ranks(world_size, train, engine, before, 10, True, str(tmp_path))
    plain = run_ranks(world_size, train, engine, before, 10, False, "")
    for (seen, result, end), (expected, _, expected_end) in zip(tested, plain, strict=True):
        assert seen == expected
        assert end == expected_end
        assert result == tested[0][1]
        assert "diverged" in result.ended_by
        assert 8 <= len(result.losses) < RANGE["updates"]


# ---------------------------------------------------------------- exceptions and bad input on several ranks


def plain_job() -> tuple[Any, Any]:
    model = nn.Linear(4, 2)
    optimizer = DistAdamW(model.parameters(), lr=1e-2)
    optimizer.attach(model)
    return model, optimizer


def leave(kinds: list[type[Exception]], folder: str) -> tuple[bool, int]:
    """Each rank leaves with its exception; whether everything is restored, and the number of warnings."""
    model, optimizer = plain_job()
    before = model.weight.detach().clone()
    with warnings.catch_warnings(record=True) as caught, contextlib.suppress(KeyError, OSError):
        warnings.simplefilter("always")
        with lr_range(model, optimizer, folder=folder) as test:
            for _ in range(4):
                loss = model(torch.ones(3, 4)).square().mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                test.record(loss)
            raise kinds[dist.get_rank()]
    said = [str(one.message) for one in caught if "has ended the range test on this rank" in str(one.message)]
    is_restored = torch.equal(model.weight, before)
    for text in said:  # the copy is left, and named
        found = re.search(r"before it is in (\S+), for dist_adamw.load", text)
        assert found is not None
        load(found[1], model, optimizer)
        assert torch.equal(model.weight, before)
    return is_restored, len(said)


def test_an_exception_on_all_ranks_restores_everything(tmp_path: Path) -> None:
    assert run_ranks(2, leave, [KeyError, KeyError], str(tmp_path)) == [(True, 0)] * 2
    assert not any(tmp_path.iterdir())


def test_different_exceptions_restore_nothing_and_say_so(tmp_path: Path) -> None:
    assert run_ranks(2, leave, [KeyError, OSError], str(tmp_path)) == [(False, 1)] * 2


def mistake(kind: str) -> None:
    model, optimizer = plain_job()
    options: dict[str, Any] = {"updates": 30}
    rank = dist.get_rank()
    if kind == "argument":
        options["updates"] += rank
    if kind == "range" and rank == 1:
        options["lowest"] = 2.0
    if kind == "lr" and rank == 1:
        optimizer.param_groups[0]["lr"] = 0.0
    with lr_range(model, optimizer, **options) as test:
        loss = model(torch.ones(3, 4)).square().mean()
        loss.backward()
        optimizer.step()
        test.record(torch.ones(2) if kind == "loss" and rank == 1 else loss)


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("argument", r"AgreementError: .*lr_range\(updates\)"),
        ("range", r"ValueError: lr_range: lowest must be smaller than highest, got 2.0 and 1.0. \(rank 1\)"),
        ("lr", r"ValueError: .*largest lr of a parameter group is 0.* \(rank 1\)"),
        ("loss", r"ValueError: the loss must be one number, got a tensor of shape \(2,\).* \(rank 1\)"),
    ],
)
def test_a_mistake_of_one_rank_is_raised_on_all(kind: str, sentence: str) -> None:
    for error in expect_error_on_all(2, mistake, kind):
        assert re.match(sentence, error), error


def inside_accumulation() -> None:
    accelerator, parts = job(accumulation=2)
    model, wrapped, loader, _ = prepare(accelerator, *parts)
    x, y = next(iter(loader))
    with accelerator.accumulate(model):
        accelerator.backward(nn.functional.mse_loss(model(x), y))
    with lr_range(model, wrapped):
        pass


def test_inside_an_accumulation_it_is_refused() -> None:
    for error in expect_error_on_all(2, inside_accumulation):
        assert "gradients were accumulated without an update" in error
