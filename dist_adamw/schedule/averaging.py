"""Let averages of the weights that an optimizer keeps follow the schedule. Local."""

from __future__ import annotations

from typing import Any

from dist_adamw.schedule.recipe import Recipe


def check_averages_of(optimizer: Any, recipe: Recipe) -> None:
    """Raise ValueError if an average that ``optimizer`` keeps cannot follow ``recipe``; nothing is changed."""
    if getattr(optimizer, "averages", None) and recipe.is_known:
        optimizer.decays_in(recipe.schedule, recipe.batch_at(0), largest=max(recipe.batches.sizes))


def pass_schedule(optimizer: Any, recipe: Recipe, samples: int) -> None:
    """Pass the schedule on to an optimizer that keeps averages: see `DistAdamW.follow_schedule`."""
    if not getattr(optimizer, "averages", None):
        return
    batch_size = recipe.batch_at(samples)
    if not optimizer.follows(recipe, batch_size):
        optimizer.follow_schedule(recipe, recipe.schedule, batch_size, largest=max(recipe.batches.sizes))


def pass_clock(optimizer: Any, recipe: Recipe, before: int, after: int) -> None:
    """Pass the clock on to an optimizer that keeps averages: see `DistAdamW.follow_clock`."""
    if getattr(optimizer, "averages", None):
        optimizer.follow_clock(recipe.schedule, before, after)
