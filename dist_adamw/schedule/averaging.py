"""Let averages of the weights that an optimizer keeps follow the schedule. Local."""

from __future__ import annotations

from typing import Any

from dist_adamw.schedule.recipe import Recipe


def tell_schedule(optimizer: Any, recipe: Recipe, samples: int) -> None:
    """Tell an optimizer that keeps averages which schedule it follows: see `DistAdamW.follow_schedule`."""
    if getattr(optimizer, "averages", None):
        optimizer.follow_schedule(recipe.schedule, recipe.batch_at(samples), largest=max(recipe.batches.sizes))


def tell_clock(optimizer: Any, recipe: Recipe, before: int, after: int) -> None:
    """Tell an optimizer that keeps averages that the clock has moved: see `DistAdamW.follow_clock`."""
    if getattr(optimizer, "averages", None):
        optimizer.follow_clock(recipe.schedule, before, after)
