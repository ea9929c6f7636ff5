"""Describe a schedule in text, for ``repr``."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from dist_adamw.plain_data import plain
from dist_adamw.schedule.recipe import Recipe
from dist_adamw.schedule.scheduled_optimizer import ScheduledOptimizer

_GROUPS_SHOWN = 4
_ALWAYS_SHOWN = ("restart_period", "t_mult", "policy")


def describe_scheduler(scheduler: object, scheduled: ScheduledOptimizer) -> str:
    """Return the ``repr`` of a scheduler with its recipe, clock and values."""
    parameters = inspect.signature(type(scheduler).__init__).parameters
    defaults = {name: parameter.default for name, parameter in parameters.items()}
    lines = [
        *describe_recipe(scheduled.recipe, scheduled.min_lr, defaults),
        describe_clock(scheduled.recipe, scheduled.clock.samples),
        describe_values("lr", scheduled.last_lr),
        describe_values("weight_decay", scheduled.weight_decay()),
    ]
    return "\n    ".join([f"{type(scheduler).__name__}(", *lines]) + "\n)"


def describe_recipe(recipe: Recipe, min_lr: float, defaults: Mapping[str, Any]) -> list[str]:
    """Return lines with the options that are not defaults, the epoch size and the batch size."""
    chosen = {
        **recipe.options,
        "min_lr": min_lr,
        "normalize_weight_decay": recipe.normalize,
        "lr_scaling": recipe.lr_scaling,
        "stream": recipe.stream,
        "weight_decay_norm": recipe.decay_norm,
    }
    options = [
        f"{name}={plain(value)!r}"
        for name, value in chosen.items()
        if name in _ALWAYS_SHOWN or (name in defaults and value != defaults[name])
    ]
    lines = [f"recipe: {', '.join(options)}"]
    for name, size in (("epoch_size", recipe.epoch_size), ("batch_size", recipe.batch_size)):
        lines.append(f"{name}: {'not known yet' if size is None else f'{size:,} samples'}")
    if recipe.batch_schedule is not None:
        given = ", ".join(f"{key!r}: {size:,}" for key, size in recipe.batch_schedule)
        lines[-1] = f"batch_size: {recipe.batches if recipe.is_known else f'{{{given}}}'}"
    return lines


def describe_clock(recipe: Recipe, samples: int) -> str:
    """Return a line with the clock and the position in the cycle."""
    if not recipe.is_known:
        return f"clock: {samples:,} samples"
    point = recipe.schedule.at(samples)
    where = f"{point.tau:.1%} into cycle {point.cycle.index}"
    if point.warmup is not None:
        where = f"{point.warmup:.1%} of the warm-up"
    if recipe.cooldown is not None:
        where = f"{where}; {recipe.cooldown}"
    return f"clock: {samples:,} samples (epoch {samples / recipe.schedule.epoch_size:.4g}), {where}"


def describe_restart(recipe: Recipe, samples: int, lr: float | Tensor, decay: float | None) -> str:
    """Return the line that ``verbose=True`` prints at a warm restart.

    Args:
        recipe: The recipe.
        samples: The clock.
        lr: Of the first group.
        decay: The part of its weights that an update takes away; None if decay enters the gradient.
    """
    cycle, epoch_size = recipe.schedule.at(samples).cycle, recipe.schedule.epoch_size
    text = (
        f"warm restart {cycle.index} at sample {samples:,} (epoch {samples / epoch_size:.2f}): "
        f"the next {float(cycle.length / epoch_size):g} epochs start from lr {lr:.3g}"
    )
    batch_size = recipe.batch_at(samples)
    if recipe.batch_schedule is not None:
        text = f"{text}, a global batch of {batch_size:,}"
    if not decay or not lr or batch_size is None:
        return text
    return (
        f"{text}, and decay {decay:.3g} of the weights an update (torch's weight_decay {decay / float(lr):.3g}, "
        f"time scale {batch_size / decay / epoch_size:.3g} epochs)"
    )


def describe_values(name: str, values: Sequence[float | Tensor]) -> str:
    """Return a line with the values of the first few groups."""
    groups = ", ".join(f"{float(value):.4g}" for value in values[:_GROUPS_SHOWN])
    more = f" and {len(values) - _GROUPS_SHOWN} more groups" if len(values) > _GROUPS_SHOWN else ""
    return f"{name}: {groups}{more}"
