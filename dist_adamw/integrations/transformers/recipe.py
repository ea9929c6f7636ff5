"""Give a Trainer what a recipe file says: its own arguments, and those of `DistAdamW` and `CyclicLRWithRestarts`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from torch import nn

from dist_adamw.integrations.accelerate.data import data_parallel_size, engine_of
from dist_adamw.integrations.deepspeed.configuration import CLIPPING
from dist_adamw.integrations.transformers.arguments import is_overridden, refuse_batch_schedule, replace_method
from dist_adamw.recipes.decay import names_without_decay
from dist_adamw.recipes.recipe import RecipeLike, TrainingRecipe, load_recipe
from dist_adamw.recipes.source import FileError
from dist_adamw.schedule.lengths import Sizes, in_samples

Options = dict[str, Any]
_DEFAULTS: Options = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2, "max_grad_norm": None}


def apply_recipe(trainer: Any, recipe: RecipeLike | TrainingRecipe) -> tuple[TrainingRecipe, Options, Options]:
    """Set ``TrainingArguments`` to the recipe's values, and return the recipe and the rest of its arguments. Local.

    Returns:
        The recipe; arguments of `DistAdamW` and of `CyclicLRWithRestarts` that ``TrainingArguments`` does not have.

    Raises:
        ValueError: the recipe has a mistake, or ``TrainingArguments`` has another value that is not its default.
    """
    loaded = load_recipe(recipe)
    if trainer.optimizer is not None or trainer.optimizer_cls_and_kwargs is not None:
        raise ValueError(
            f"the Trainer was given an optimizer already, and recipe={loaded.source.name!r} here. Choose one."
        )
    _refuse_engine_objects(trainer, loaded)
    optimizer = loaded.optimizer_arguments()
    values = {name: optimizer.pop(name, default) for name, default in _DEFAULTS.items()}
    for name, key, value in (
        ("learning_rate", "lr", values["lr"]),
        ("adam_beta1", "betas", values["betas"][0]),
        ("adam_beta2", "betas", values["betas"][1]),
        ("adam_epsilon", "eps", values["eps"]),
        ("weight_decay", "weight_decay", values["weight_decay"]),
        ("max_grad_norm", "max_grad_norm", values["max_grad_norm"] or 0.0),
    ):
        _agree(trainer, loaded, name, ("optimizer", key), value)
    _check_engine_clipping(trainer, loaded, values["max_grad_norm"] or 0.0)
    _choose_decay(trainer, loaded)
    _agree_on_batch(trainer, loaded)
    return loaded, optimizer, loaded.scheduler


def _agree(trainer: Any, recipe: TrainingRecipe, name: str, place: tuple[str, str], value: Any) -> None:
    """Set an argument that is at its default; raise if it has another value than the recipe."""
    given = getattr(trainer.args, name)
    if given == value:
        return
    default = next(field.default for field in dataclasses.fields(trainer.args) if field.name == name)
    if given != default:
        is_there = place[1] in getattr(recipe, place[0])
        whose = "is" if is_there else "is, by default,"
        raise _differs(
            recipe, place, f"{place[1]} {whose} {value!r}, and TrainingArguments has {name}={given!r}.", name
        )
    setattr(trainer.args, name, value)


def _differs(recipe: TrainingRecipe, place: tuple[str, str], sentence: str, name: str) -> FileError:
    return FileError([recipe.source.problem(place, f"{sentence} Leave {name} out, or make them agree.")])


def _refuse_engine_objects(trainer: Any, recipe: TrainingRecipe) -> None:
    if engine_of(trainer.accelerator) != "DEEPSPEED":
        return
    config = trainer.accelerator.state.deepspeed_plugin.deepspeed_config
    if written := [part for part in ("optimizer", "scheduler") if part in config]:
        raise ValueError(
            f"the DeepSpeed configuration has {' and '.join(written)}, and recipe={recipe.source.name!r} was given "
            "here. Choose one."
        )


def _check_engine_clipping(trainer: Any, recipe: TrainingRecipe, norm: float) -> None:
    if engine_of(trainer.accelerator) != "DEEPSPEED":
        return
    # "auto" was resolved when TrainingArguments was made.
    given = trainer.accelerator.state.deepspeed_plugin.deepspeed_config.get(CLIPPING, norm)
    if given != norm:
        sentence = (
            f"max_grad_norm is {norm!r}, and the DeepSpeed configuration has {CLIPPING}={given!r}. Pass "
            f'TrainingArguments(max_grad_norm={norm!r}), which resolves an "auto" there, or make them agree.'
        )
        raise FileError([recipe.source.problem(("optimizer", "max_grad_norm"), sentence)])


def _choose_decay(trainer: Any, recipe: TrainingRecipe) -> None:
    """Make Trainer decay the parameters that the recipe says."""
    rule = recipe.no_decay
    if is_overridden(trainer, "get_decay_parameter_names"):
        if "no_decay" in recipe.optimizer:
            sentence = f"no_decay is {rule!r}, and {type(trainer).__name__} overrides get_decay_parameter_names."
            raise _differs(recipe, ("optimizer", "no_decay"), sentence, "one of them")
        return

    def get_decay_parameter_names(model: nn.Module) -> list[str]:
        without = names_without_decay(model, rule)
        return [name for name, _ in model.named_parameters() if name not in without]

    replace_method(trainer, "get_decay_parameter_names", get_decay_parameter_names)


def _agree_on_batch(trainer: Any, recipe: TrainingRecipe) -> None:
    """Set micro-batch and accumulation where they are at their defaults; raise if they make another batch."""
    args, batch = trainer.args, recipe.batch
    refuse_batch_schedule(batch.get("size"))
    # DeepSpeed's configuration has had these numbers since TrainingArguments was made.
    may_change = engine_of(trainer.accelerator) != "DEEPSPEED" and args.n_gpu <= 1
    micro = batch.get("micro_batch_size")
    if micro is not None and micro != trainer._train_batch_size:
        name = "per_device_train_batch_size"
        if not may_change:
            sentence = f"micro_batch_size is {micro}, and TrainingArguments makes {trainer._train_batch_size}."
            raise _differs(recipe, ("batch", "micro_batch_size"), sentence, name)
        _agree(trainer, recipe, name, ("batch", "micro_batch_size"), micro)
        trainer._train_batch_size = micro
    if batch.get("size") is None:
        return
    ranks, micro = data_parallel_size(trainer.accelerator), trainer._train_batch_size
    steps = recipe.with_changes(batch={"micro_batch_size": micro}).global_batch(ranks).gradient_accumulation_steps
    given = args.gradient_accumulation_steps
    if given == steps:
        return
    if given != 1 or not may_change:
        sentence = (
            f"size is {batch['size']}, and TrainingArguments makes {micro} x {given} accumulation steps x {ranks} "
            f"ranks = {micro * given * ranks}. Pass gradient_accumulation_steps={steps}."
        )
        raise FileError([recipe.source.problem(("batch", "size"), sentence)])
    args.gradient_accumulation_steps = steps


def agree_on_length(
    trainer: Any, recipe: TrainingRecipe, batch_size: int, epoch_size: int | None, given: Callable[[], int | None]
) -> None:
    """Set ``num_train_epochs`` if it is at its default; raise if it makes another length than the recipe. Local.

    Args:
        trainer: The Trainer.
        recipe: The recipe, of which ``training.total_samples`` is used.
        batch_size: The global batch.
        epoch_size: Samples in an epoch; None: not known, and nothing is done.
        given: Returns the samples that the Trainer will train on.

    Raises:
        ValueError: the lengths differ by an update or more.
    """
    of_recipe = recipe.scheduler.get("epoch_size") or epoch_size
    if recipe.total_samples is None or of_recipe is None:
        return
    sizes = Sizes(of_recipe, batch_size, recipe.scheduler.get("tokens_per_sample"))
    total = math.ceil(in_samples("total_samples", recipe.total_samples, "samples", sizes))
    args = trainer.args
    if args.max_steps <= 0 and args.num_train_epochs == 3.0:  # the default
        args.num_train_epochs = total / (epoch_size or of_recipe)  # Trainer counts those of its data
        return
    samples = given()
    if samples is not None and abs(samples - total) >= batch_size:
        name = "max_steps" if args.max_steps > 0 else "num_train_epochs"
        place = ("training" if "total_samples" in recipe.training else "scheduler", "total_samples")
        theirs = f"TrainingArguments({name}={getattr(args, name)!r}) makes {samples:,}"
        raise _differs(recipe, place, f"total_samples is {total:,} samples, and {theirs}.", name)
