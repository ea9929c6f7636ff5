"""DistAdamW and CyclicLRWithRestarts with the arguments of the classes that they replace in tests of other projects."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.optim as torch_distributed_optim
from accelerate import Accelerator
from accelerate.data_loader import DataLoaderStateMixin
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

import dist_adamw
from dist_adamw import CyclicLRWithRestarts, DistAdamW
from dist_adamw.wrappers import unwrap

TORCH_ADAMW, TORCH_ADAM, TORCH_SGD = torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD
PREPARE = Accelerator.prepare


class UnsupportedError(Exception):
    """A test asks for an argument of the replaced class that ours does not have."""


class SwappedAdamW(DistAdamW):
    """DistAdamW with the arguments of torch's AdamW. ``foreach=True`` is ``fused=False``."""

    all_steps = 0  # of all instances: did a script use one?

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-3,
        betas: Any = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,  # DistAdamW can always be captured
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        if differentiable:
            raise UnsupportedError("differentiable=True")
        fused = False if foreach else fused
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, maximize=maximize, fused=fused)
        self.register_step_post_hook(_count_step)


def _count_step(*_: object) -> None:
    SwappedAdamW.all_steps += 1


@contextlib.contextmanager
def expect_updates() -> Iterator[None]:
    """Raise if no DistAdamW makes a step: a script would pass without one, too."""
    before = SwappedAdamW.all_steps
    yield
    if SwappedAdamW.all_steps == before:
        raise AssertionError("the script made no step of a DistAdamW")


def swapped_adam(params: Any, lr: Any = 1e-3, **options: Any) -> Optimizer:
    """Return a DistAdamW in place of torch's Adam, which it equals without weight decay."""
    if options.get("weight_decay"):
        return TORCH_ADAM(params, lr, **options)
    return SwappedAdamW(params, lr, **{**options, "weight_decay": 0.0})


def swapped_sgd(params: Any, lr: Any = 1e-3, **options: Any) -> Optimizer:
    """Return a DistAdamW in place of a plain SGD: for tests whose subject is not the arithmetic."""
    if any(options.values()):
        return TORCH_SGD(params, lr, **options)
    return SwappedAdamW(params, lr, weight_decay=0.0)


class SwappedZero(SwappedAdamW):
    """DistAdamW with the arguments of ZeroRedundancyOptimizer. What it shards is always AdamW."""

    def __init__(
        self,
        params: Any,
        optimizer_class: Any,
        process_group: Any = None,
        parameters_as_bucket_view: bool = False,
        overlap_with_ddp: bool = False,
        **options: Any,
    ) -> None:
        if process_group is not None and dist.get_world_size(process_group) < dist.get_world_size():
            raise UnsupportedError("process_group=")
        if overlap_with_ddp:
            raise UnsupportedError("overlap_with_ddp=True")
        if optimizer_class not in (reference_sgd, torch.optim.AdamW):
            raise UnsupportedError(f"optimizer_class={optimizer_class.__name__}")
        super().__init__(params, **{name: value for name, value in options.items() if name not in _OF_SGD})


_OF_SGD = ("momentum", "dampening", "nesterov")


class reference_sgd(torch.optim.AdamW):  # noqa: N801
    """torch's AdamW under the name of SGD: what the tests of ZeroRedundancyOptimizer compare the sharded one with."""

    def __init__(self, params: Any, lr: Any = 1e-3, **options: Any) -> None:
        super().__init__(params, lr, **{name: value for name, value in options.items() if name not in _OF_SGD})


class SwappedRestarts(CyclicLRWithRestarts):
    """CyclicLRWithRestarts with the arguments of CosineAnnealingWarmRestarts: an update is a sample, and an epoch.

    torch's follows the calls of its ``step``, and this one the optimizer's updates, so `step` makes an update that
    changes nothing. There is no ``step(epoch)``.
    """

    def __init__(self, optimizer: Optimizer, T_0: int, T_mult: int = 1, eta_min: float = 0.0, **others: Any) -> None:  # noqa: N803
        if others:
            raise UnsupportedError(f"{others}")
        super().__init__(optimizer, 1, 1, T_0, T_mult, min_lr=eta_min, on_difference="checkpoint")

    def step(self, epoch: Any = None) -> None:  # type: ignore[override]
        """Make an update, and write lr."""
        if epoch is not None:
            raise UnsupportedError("step(epoch)")
        for group in self.optimizer.param_groups:
            for param in group["params"]:
                param.grad = torch.zeros_like(param)
        self.optimizer.step()
        self.optimizer.zero_grad()
        super().step()


def in_torch_tests() -> None:
    """Replace torch's classes for the rest of this process, before a test file or torch's database imports them."""
    SwappedAdamW.__name__ = "AdamW"  # torch's tests have its name in theirs, and make exceptions by it
    torch.optim.AdamW = SwappedAdamW  # type: ignore[assignment,misc]
    torch.optim.Adam = swapped_adam  # type: ignore[assignment,misc]
    torch.optim.SGD = swapped_sgd  # type: ignore[assignment,misc]
    torch.optim.lr_scheduler.CosineAnnealingWarmRestarts = SwappedRestarts  # type: ignore[assignment,misc]
    _leave_out_differentiable()


def _leave_out_differentiable() -> None:
    """Drop ``differentiable=True`` from the inputs of torch's database: most of its tests end at the first error."""
    from torch.testing._internal.common_optimizers import optim_db

    (info,) = (one for one in optim_db if one.optim_cls is SwappedAdamW)  # type: ignore[comparison-overlap]
    inputs_of = info.optim_inputs_func
    info.optim_inputs_func = lambda device, **options: [
        one for one in inputs_of(device, **options) if not one.kwargs.get("differentiable")
    ]
    info.supported_impls = tuple(one for one in info.supported_impls if one != "differentiable")


def in_tests_of_zero() -> None:
    """Replace ZeroRedundancyOptimizer by DistAdamW, and the optimizers that it is compared with by torch's AdamW."""
    torch.optim.SGD = reference_sgd  # type: ignore[assignment,misc]
    torch_distributed_optim.ZeroRedundancyOptimizer = SwappedZero  # type: ignore[assignment,misc]


@contextlib.contextmanager
def loaders_in_accelerate() -> Iterator[None]:
    """Let ``Accelerator.prepare`` prepare a loader by `dist_adamw.prepare`, with a DistAdamW that is not used.

    Raises:
        AssertionError: no loader was prepared.
    """
    count = 0

    def prepare(accelerator: Accelerator, *objects: Any, **options: Any) -> Any:
        kinds = [_kind(one) for one in objects]
        if kinds.count("loader") != 1 or isinstance(objects[kinds.index("loader")], DataLoaderStateMixin):
            return PREPARE(accelerator, *objects, **options)
        nonlocal count
        count += 1
        model = objects[kinds.index("model")] if "model" in kinds else torch.nn.Linear(1, 1)
        optimizer = SwappedAdamW(model.parameters())
        scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
        with mock.patch.object(Accelerator, "prepare", PREPARE):  # which dist_adamw.prepare calls
            model, _, loader, _ = dist_adamw.prepare(
                accelerator, model, optimizer, objects[kinds.index("loader")], scheduler
            )
        prepared = tuple({"model": model, "loader": loader}[kind] for kind in kinds)
        return prepared if len(prepared) > 1 else prepared[0]

    with mock.patch.object(Accelerator, "prepare", prepare):
        yield
    if not count:
        raise AssertionError("the script prepared no loader")


@contextlib.contextmanager
def in_accelerate(*, prepare: bool, restarts: bool) -> Iterator[None]:
    """Replace AdamW and plain SGD; and if asked, ``Accelerator.prepare``, and transformers' linear schedule."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch("torch.optim.AdamW", SwappedAdamW))
        stack.enter_context(mock.patch("torch.optim.SGD", swapped_sgd))
        if prepare:
            stack.enter_context(mock.patch.object(Accelerator, "prepare", prepare_ours))
        if restarts:
            stack.enter_context(mock.patch("transformers.get_linear_schedule_with_warmup", restarts_for))
        yield


def restarts_for(optimizer: Optimizer, num_warmup_steps: int, num_training_steps: int) -> CyclicLRWithRestarts:
    """Return cycles whose restarts are within epochs; `dist_adamw.prepare` fills in batch and epoch."""
    return CyclicLRWithRestarts(optimizer, restart_period=0.7, t_mult=1)


def prepare_ours(accelerator: Accelerator, *objects: Any, **options: Any) -> Any:
    """Prepare a DistAdamW with its model, loader and schedule by `dist_adamw.prepare`; others as Accelerate does."""
    kinds = [_kind(one) for one in objects]
    mine = [i for i, kind in enumerate(kinds) if kind and kind not in kinds[:i]]  # the training loader is the first
    optimizer = next((one for one in objects if isinstance(one, Optimizer)), None)
    if not isinstance(optimizer, DistAdamW) or len(mine) < 3:
        return PREPARE(accelerator, *objects, **options)
    by_kind = {kinds[i]: objects[i] for i in mine}
    scheduler = by_kind.get("scheduler") or torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1.0)
    with mock.patch.object(Accelerator, "prepare", PREPARE):  # which dist_adamw.prepare calls
        prepared = dist_adamw.prepare(
            accelerator, by_kind["model"], optimizer, by_kind["loader"], scheduler, whole_gradients=True
        )
        done = dict(zip(("model", "optimizer", "loader", "scheduler"), prepared, strict=True))
        return tuple(
            done[kinds[i]] if i in mine else PREPARE(accelerator, one, **options) for i, one in enumerate(objects)
        )


def _kind(one: object) -> str:
    if isinstance(one, torch.nn.Module):
        return "model"
    if isinstance(one, torch.utils.data.DataLoader):
        return "loader"
    if isinstance(one, LRScheduler):
        return "scheduler"
    return "optimizer" if isinstance(unwrap(one), Optimizer) else ""  # type: ignore[arg-type]
