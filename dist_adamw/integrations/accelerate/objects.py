"""Find out which of the objects given to ``prepare`` belong together.

A model is trained if a scheduler drives an optimizer that has its parameters. The first data loader is the one to train
on. Everything else is only passed on to Accelerate: loaders for evaluation, frozen models, losses, None.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler, SubsetRandomSampler, WeightedRandomSampler

from dist_adamw.integrations.accelerate.data import sampler_of
from dist_adamw.optimizer.adamw import DistAdamW
from dist_adamw.schedule.scheduler import CyclicLRWithRestarts
from dist_adamw.wrappers import unwrap

_SHUFFLING = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


@dataclass(frozen=True, slots=True)
class Trained:
    """A model that is trained: the places of its objects among those that were given."""

    model: int
    optimizer: int
    scheduler: int


@dataclass(frozen=True, slots=True)
class Roles:
    """What the objects are for, by place.

    Attributes:
        trained: The models that are trained.
        loader: The loader to train on.
        further_loaders: All other loaders.
    """

    trained: tuple[Trained, ...]
    loader: int
    further_loaders: tuple[int, ...]


def find_roles(engine: str, objects: Sequence[Any]) -> Roles:
    """Return what the objects are for. Local.

    Args:
        engine: Accelerate's name of the engine.
        objects: Models, optimizers, loaders, schedulers and anything else, in any order.

    Raises:
        ValueError: a model, an optimizer, a loader or a scheduler is missing; or it is not clear what belongs together.
    """
    models = _places(objects, nn.Module)
    optimizers = [i for i, one in enumerate(objects) if isinstance(one, Optimizer) or is_dummy(one)]
    loaders = _places(objects, DataLoader)
    schedulers = [i for i, one in enumerate(objects) if isinstance(one, LRScheduler) or is_dummy(one, "DummyScheduler")]
    _check_complete(objects, models, optimizers, loaders, schedulers)
    _check_engine(engine, len(models))
    trained = []
    for scheduler in schedulers:
        optimizer = _optimizer_of(objects, scheduler, optimizers, is_only=len(schedulers) == 1)
        trained.append(Trained(_model_of(objects, optimizer, models), optimizer, scheduler))
    _check_drivers(objects, trained, optimizers)
    _check_batch_schedules(objects, trained)
    _check_first_loader(objects, loaders)
    return Roles(tuple(trained), loaders[0], tuple(loaders[1:]))


def is_dummy(one: Any, name: str = "DummyOptim") -> bool:
    """Return whether this is Accelerate's placeholder for an object of the DeepSpeed configuration. Local."""
    return type(one).__name__ == name


def _places(objects: Sequence[Any], kind: type) -> list[int]:
    return [i for i, one in enumerate(objects) if isinstance(one, kind)]


def _named(objects: Sequence[Any], place: int) -> str:
    """Return how to call an object in an error: by its place after the accelerator, from 1 on."""
    return f"{type(objects[place]).__name__} (object {place + 1})"


def _check_complete(
    objects: Sequence[Any], models: list[int], optimizers: list[int], loaders: list[int], schedulers: list[int]
) -> None:
    """Raise if a kind of object is missing. Local."""
    wanted = [
        ("model", "a torch module", models),
        ("optimizer", "a DistAdamW or another torch optimizer", optimizers),
        ("data loader", "a torch DataLoader", loaders),
        ("scheduler", "a CyclicLRWithRestarts or another torch scheduler, not prepared yet", schedulers),
    ]
    known = {*models, *optimizers, *loaders, *schedulers}
    unknown = [type(one).__name__ for i, one in enumerate(objects) if i not in known and one is not None]
    got = unknown or [type(one).__name__ for one in objects]
    for kind, what, places in wanted:
        if not places:
            raise ValueError(f"the {kind} is missing: pass prepare {what}, got {', '.join(got)}.")


def _check_engine(engine: str, models: int) -> None:
    """Raise if the engine takes only one model. Local."""
    if models > 1 and engine in ("FSDP", "DEEPSPEED"):
        cure = "Call prepare for each, with its optimizer, loader and scheduler"
        if engine == "DEEPSPEED":
            cure = "Use DDP, or one Accelerator for each"
        raise ValueError(
            f"Accelerate prepares one model at a time under {engine}, got {models}. {cure}; modules that are not "
            "trained need only .to(accelerator.device)."
        )


def _optimizer_of(objects: Sequence[Any], scheduler: int, optimizers: list[int], *, is_only: bool) -> int:
    """Return the optimizer that a scheduler drives. Local."""
    if is_only and len(optimizers) == 1:
        return optimizers[0]  # whether it drives this one is checked later, for every kind of scheduler
    driven = getattr(objects[scheduler], "optimizer", None)
    for place in optimizers:
        if driven is objects[place] or (driven is not None and unwrap(driven) is unwrap(objects[place])):
            return place
    raise ValueError(
        f"the scheduler {_named(objects, scheduler)} drives another {type(driven).__name__} than those given here, "
        "whose lr would never change. Pass prepare the optimizer that the scheduler was built with."
    )


def _model_of(objects: Sequence[Any], optimizer: int, models: list[int]) -> int:
    """Return the model that has the optimizer's parameters. Local."""
    if len(models) == 1:
        return models[0]
    params = {id(param) for group in objects[optimizer].param_groups for param in group["params"]}
    ids = {place: {id(param) for param in objects[place].parameters()} for place in models}
    some = [place for place in models if ids[place] & params]
    whole = [place for place in some if params <= ids[place]]
    chosen = whole or some
    if len(chosen) == 1:
        return chosen[0]
    name = _named(objects, optimizer)
    if not some:
        raise ValueError(
            f"the {name} has no parameter of any of the {len(models)} models. Build it from the parameters of the "
            "model that it trains, and pass that one."
        )
    between = " and ".join(_named(objects, place) for place in chosen)
    if whole:
        raise ValueError(f"the {name} has parameters that are in both {between}. Pass one of them.")
    raise ValueError(
        f"the {name} trains {between}, and a checkpoint has one model for each optimizer. Put them into one module "
        "(nn.ModuleDict) and pass that, or give each an optimizer and a scheduler."
    )


def _check_drivers(objects: Sequence[Any], trained: Sequence[Trained], optimizers: list[int]) -> None:
    """Raise if a `DistAdamW` has no scheduler, or an optimizer has two. Local."""
    for place in optimizers:
        schedulers = [one.scheduler for one in trained if one.optimizer == place]
        if len(schedulers) > 1:
            between = " and ".join(_named(objects, scheduler) for scheduler in schedulers)
            raise ValueError(
                f"the schedulers {between} drive the same {_named(objects, place)}, and the last one to step would "
                "decide. Pass one; torch's SequentialLR or ChainedScheduler joins several."
            )
        if not schedulers and (is_dummy(objects[place]) or isinstance(unwrap(objects[place]), DistAdamW)):
            raise ValueError(
                f"no scheduler drives the {_named(objects, place)}. Pass one for each optimizer; for a constant lr, "
                "torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)."
            )


def _check_batch_schedules(objects: Sequence[Any], trained: Sequence[Trained]) -> None:
    """Raise if a batch-size schedule would change the accumulation of other optimizers, too. Local."""
    for one in trained:
        scheduler = objects[one.scheduler]
        if (
            len(trained) > 1
            and isinstance(scheduler, CyclicLRWithRestarts)
            and scheduler._scheduled.recipe.batch_schedule
        ):
            raise ValueError(
                f"the batch-size schedule of {_named(objects, one.scheduler)} changes the accumulation of all "
                f"{len(trained)} optimizers that are prepared here. Give all schedulers one batch_size, or none."
            )


def _check_first_loader(objects: Sequence[Any], loaders: list[int]) -> None:
    """Raise if the first loader is probably not the one to train on. Local."""
    first = objects[loaders[0]]
    if type(sampler_of(first)) is not SequentialSampler:  # a sampler of the user's may well be for training
        return
    for place in loaders[1:]:
        if _shuffles(objects[place]):
            raise ValueError(
                f"the first data loader is the one to train on: {_named(objects, loaders[0])} does not shuffle, and "
                f"{_named(objects, place)} does. Pass the training loader first. If it is, prepare the other one with "
                "accelerator.prepare."
            )


def _shuffles(loader: Any) -> bool:
    return isinstance(sampler_of(loader), _SHUFFLING)
