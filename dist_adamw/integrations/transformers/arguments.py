"""Decide what creates a Trainer's optimizer and schedule: its arguments, an override, or the user."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sized
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import IterableDataset

from dist_adamw.integrations.accelerate.data import LoaderFacts
from dist_adamw.optimizer.adamw import DistAdamW
from dist_adamw.schedule.saved import OnDifference
from dist_adamw.schedule.scheduler import CyclicLRWithRestarts
from dist_adamw.wrappers import unwrap

# Arguments of DistAdamW that must be set in TrainingArguments, since Trainer, DeepSpeed's "auto" and loggers read them.
_IN_ARGUMENTS = {
    "lr": "learning_rate",
    "betas": "adam_beta1 and adam_beta2",
    "eps": "adam_epsilon",
    "weight_decay": "weight_decay",
    "max_grad_norm": "max_grad_norm",
}
_ADAMW = {"adamw_torch", "adamw_torch_fused"}
# Arguments of torch.optim.AdamW that choose an implementation; DistAdamW has no use for them.
_IMPLEMENTATION = ("foreach", "capturable", "differentiable")


@contextlib.contextmanager
def unchanged_if_refused(trainer: Any) -> Iterator[None]:
    """Put a Trainer, its arguments and its accelerator back as they were, if preparing them raises. Local."""
    holders = [trainer, trainer.args, trainer.accelerator]
    before = [dict(vars(one)) for one in holders]
    callbacks = [*trainer.callback_handler.callbacks]
    plugin = trainer.accelerator.state.deepspeed_plugin
    config = None if plugin is None else copy.deepcopy(plugin.deepspeed_config)
    try:
        yield
    except BaseException:
        for one, attributes in zip(holders, before, strict=True):
            vars(one).clear()
            vars(one).update(attributes)
        trainer.callback_handler.callbacks[:] = callbacks
        if config is not None:  # in place: transformers and the plugin hold the same dict
            plugin.deepspeed_config.clear()
            plugin.deepspeed_config.update(config)
        raise


def replace_method(trainer: Any, name: str, function: Callable[..., Any]) -> None:
    """Replace a method of this Trainer instance. Local."""
    assert callable(getattr(trainer, name))
    setattr(trainer, name, function)


def is_overridden(trainer: Any, name: str) -> bool:
    """Return whether a subclass of Trainer, or this instance, overrides a method. Local."""
    from transformers import Trainer

    return name in vars(trainer) or getattr(type(trainer), name) is not getattr(Trainer, name)


def check_arguments(trainer: Any, optimizer: Mapping[str, Any], on_difference: OnDifference | None) -> None:
    """Refuse arguments that belong in TrainingArguments, and TrainingArguments that would be ignored. Local.

    Raises:
        ValueError: names the argument, its value and what to do.
    """
    if on_difference not in (None, "strict", "checkpoint", "new"):
        raise ValueError(f"on_difference must be 'strict', 'checkpoint', 'new' or None, got {on_difference!r}.")
    for name in optimizer.keys() & _IN_ARGUMENTS.keys():
        raise ValueError(
            f"{name}={optimizer[name]!r} was given to prepare_trainer; Trainer takes it from TrainingArguments. Set "
            f"{_IN_ARGUMENTS[name]} there."
        )
    args = trainer.args
    if warmup := args.warmup_steps:
        raise ValueError(
            f"TrainingArguments(warmup_steps={warmup!r}) is for Trainer's own schedulers and would be ignored. "
            "Pass scheduler={'warmup_samples': ...} to prepare_trainer, in samples."
        )
    for name in ("lr_scheduler_type", "lr_scheduler_kwargs"):
        if _was_set(args, name):
            raise ValueError(
                f"TrainingArguments({name}={_text(getattr(args, name))}) is for Trainer's own schedulers and would be "
                "ignored. Leave it out, and pass the curve to prepare_trainer, such as scheduler={'policy': 'cosine', "
                "'restart_period': <epochs>}."
            )


def _was_set(args: Any, name: str) -> bool:
    """Return whether an argument is neither empty nor its class's default."""
    default = next(field.default for field in dataclasses.fields(args) if field.name == name)
    value = getattr(args, name)
    return bool(value) and value != default


def _text(value: Any) -> str:
    return repr(getattr(value, "value", value))


def put_optimizer(trainer: Any, options: Mapping[str, Any]) -> bool:
    """Make Trainer create a `DistAdamW` in place of torch's AdamW, and check the result. Local.

    The arguments are read when the optimizer is created: a hyper-parameter search changes them.

    Returns:
        Whether the optimizer will have the lr of ``TrainingArguments``: no override can change it.

    Raises:
        ValueError: ``optim`` or one of its arguments selects another optimizer, or ``options`` would be ignored.
    """
    if trainer.optimizer is not None or trainer.optimizer_cls_and_kwargs is not None:
        if options:
            raise ValueError(
                f"the Trainer was given an optimizer already, and optimizer={dict(options)} here. Choose one."
            )
        return False
    if is_overridden(trainer, "create_optimizer_and_scheduler"):
        warnings.warn(
            f"{type(trainer).__name__} overrides create_optimizer_and_scheduler, which Trainer does not call since "
            "transformers 5. Override create_optimizer, or create_scheduler, in its place.",
            stacklevel=3,
        )
    overridden = is_overridden(trainer, "get_optimizer_cls_and_kwargs")
    if not overridden:
        _check_optim(trainer.args)
        # So that bad arguments fail here and not after a job of many ranks has started.
        DistAdamW([nn.Parameter(torch.zeros(1))], **_of_arguments(trainer.args), **options)
    get_theirs = trainer.get_optimizer_cls_and_kwargs if overridden else None

    def get_optimizer_cls_and_kwargs(args: Any, model: nn.Module | None = None) -> tuple[Any, dict[str, Any]]:
        if get_theirs is None:
            return DistAdamW, {**_of_arguments(args), **options}
        made, kwargs = get_theirs(args, model)
        if made is not torch.optim.AdamW:
            return made, kwargs
        return DistAdamW, {**{k: v for k, v in kwargs.items() if k not in _IMPLEMENTATION}, **options}

    replace_method(trainer, "get_optimizer_cls_and_kwargs", get_optimizer_cls_and_kwargs)
    create = trainer.create_optimizer

    def create_optimizer(*args: Any, **kwargs: Any) -> Any:
        by_hand = trainer.optimizer is not None
        made = create(*args, **kwargs)
        _check_made(trainer, options, by_hand)
        return made

    only_ours = not overridden and not is_overridden(trainer, "create_optimizer")
    replace_method(trainer, "create_optimizer", create_optimizer)
    return only_ours


def _of_arguments(args: Any) -> dict[str, Any]:
    return {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}


def _check_optim(args: Any) -> None:
    if args.optim not in _ADAMW:
        raise ValueError(
            f"TrainingArguments(optim={_text(args.optim)}) names another optimizer than the DistAdamW that "
            "prepare_trainer makes. Leave it out, or have the schedule drive it: "
            "Trainer(optimizer_cls_and_kwargs=(<class>, {...}))."
        )
    for name in ("optim_args", "optim_target_modules"):
        if value := getattr(args, name, None):
            raise ValueError(
                f"TrainingArguments({name}={value!r}) would be ignored. Leave it out, and pass arguments of DistAdamW "
                "as prepare_trainer(optimizer={...})."
            )


def _check_made(trainer: Any, options: Mapping[str, Any], by_hand: bool) -> None:
    """Raise if ``options`` did not reach the optimizer; warn if it is not a `DistAdamW`. The same on every rank."""
    made = unwrap(trainer.optimizer)
    source = "trainer.optimizer was set, and it is" if by_hand else f"{type(trainer).__name__}'s override made"
    if options and not (isinstance(made, DistAdamW) and _has(made, options)):
        raise ValueError(
            f"{source} a {type(made).__name__} that does not have optimizer={dict(options)}, which was given to "
            "prepare_trainer. Pass these arguments where the optimizer is made, and leave them out of prepare_trainer."
        )
    if not (by_hand or isinstance(made, DistAdamW)):
        warnings.warn(
            f"{source} a {type(made).__name__}: the schedule drives it, and its state is not sharded. For DistAdamW, "
            "make the optimizer from what self.get_optimizer_cls_and_kwargs(self.args) returns.",
            stacklevel=3,
        )


def _has(optimizer: DistAdamW, options: Mapping[str, Any]) -> bool:
    """Return whether an optimizer has the options, as attributes or in its groups' defaults."""
    missing = object()
    return all(
        optimizer.defaults.get(name, getattr(optimizer, "_mesh" if name == "mesh" else name, missing)) == value
        for name, value in options.items()
    )


def check_override_of_scheduler(trainer: Any, options: Mapping[str, Any]) -> Callable[..., Any] | None:
    """Return the override of ``create_scheduler``, if there is one. Local.

    Raises:
        ValueError: it would ignore ``options``.
    """
    if not is_overridden(trainer, "create_scheduler"):
        return None
    if options:
        raise ValueError(
            f"{type(trainer).__name__} overrides create_scheduler, which would ignore scheduler={dict(options)}. "
            "Remove the override, or have it return a CyclicLRWithRestarts with these arguments."
        )
    theirs: Callable[..., Any] = trainer.create_scheduler
    return theirs


def check_made_scheduler(trainer: Any) -> CyclicLRWithRestarts:
    """Return Trainer's scheduler. The same on every rank.

    Raises:
        ValueError: it is not a `CyclicLRWithRestarts`, or drives another optimizer.
    """
    made = trainer.lr_scheduler
    if not isinstance(made, CyclicLRWithRestarts):
        raise ValueError(
            f"the Trainer has a {type(made).__name__} (from an override of create_scheduler, optimizers= or "
            "trainer.lr_scheduler), and prepare_trainer needs a CyclicLRWithRestarts. Make one there, or leave it out "
            "and let prepare_trainer make it."
        )
    optimizer: Optimizer | None = trainer.optimizer
    if optimizer is None or made.optimizer is not unwrap(optimizer):
        raise ValueError(
            "the Trainer's scheduler drives another optimizer than the Trainer's, whose lr would never change. "
            "Pass both: optimizers=(optimizer, scheduler)."
        )
    watch_batches(made)
    return made


def watch_batches(scheduler: CyclicLRWithRestarts) -> None:
    """Refuse a batch-size schedule, now and when a checkpoint is loaded. Local.

    Raises:
        ValueError: the scheduler has one.
    """
    scheduled = scheduler._scheduled
    refuse_batch_schedule(scheduled.recipe.batch_schedule)
    scheduled.check_batches = lambda recipe: refuse_batch_schedule(recipe.batch_schedule)


def refuse_batch_schedule(batch_size: object) -> None:
    """Raise ValueError if ``batch_size`` is a schedule: Trainer's accumulation is the same in all of training."""
    if isinstance(batch_size, Mapping | tuple):
        raise ValueError(
            f"batch_size is a schedule ({dict(batch_size)}), and Trainer has one accumulation for all of training "
            "(TrainingArguments). Leave batch_size out, or write the loop with Accelerate and dist_adamw.prepare."
        )


def inner_scheduler(trainer: Any) -> CyclicLRWithRestarts:
    """Return Trainer's scheduler, without the wrapper that Accelerate puts around DeepSpeed's. Local."""
    scheduler: CyclicLRWithRestarts = getattr(trainer.lr_scheduler, "scheduler", trainer.lr_scheduler)
    return scheduler


def given_by(scheduler: Any) -> dict[str, Any]:
    """Return the sizes that a scheduler was given. Local."""
    return {name: getattr(scheduler, name, None) for name in ("batch_size", "epoch_size")} if scheduler else {}


def watch_own_loader(trainer: Any) -> Callable[[], Any]:
    """Return a function that returns the training loader if a subclass makes it, else None. Local."""
    made: weakref.ref[Any] | None = None
    if not is_overridden(trainer, "get_train_dataloader"):
        return lambda: None
    theirs = trainer.get_train_dataloader

    def get_train_dataloader(*args: Any, **kwargs: Any) -> Any:
        nonlocal made
        loader = theirs(*args, **kwargs)
        made = weakref.ref(loader)
        return loader

    replace_method(trainer, "get_train_dataloader", get_train_dataloader)
    return lambda: None if made is None else made()


def check_own_loader(loader: Any, facts: LoaderFacts, given: Mapping[str, Any]) -> int | None:
    """Return the global batch of a subclass's loader; None if it is unknown. The same on every rank.

    Raises:
        ValueError: its batches or data differ from the arguments', and ``given`` does not resolve it.
    """
    dataset, micro_batch = getattr(loader, "dataset", None), getattr(loader, "total_batch_size", None)
    if micro_batch is None or isinstance(dataset, IterableDataset):
        return None
    size = int(micro_batch) * facts.batch.gradient_accumulation_steps
    samples = len(dataset) if isinstance(dataset, Sized) else None
    differs = size != facts.batch.size and given.get("batch_size") is None
    if differs or (samples not in (None, facts.samples) and given.get("epoch_size") is None):
        raise ValueError(
            f"get_train_dataloader is overridden and makes global batches of {size} from a data set of {samples}; "
            f"TrainingArguments and train_dataset say {facts.batch.size} and {facts.samples}. Pass prepare_trainer "
            f"scheduler={{'batch_size': {size}, 'epoch_size': {samples}}}, or make them agree."
        )
    return size
