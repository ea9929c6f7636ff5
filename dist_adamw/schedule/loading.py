"""Prepare to load a saved schedule: compute and check the result before anything is changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dist_adamw.schedule.averaging import check_averages_of
from dist_adamw.schedule.base_values import BaseValues, ScheduledGroups
from dist_adamw.schedule.cooldown import Cooldown
from dist_adamw.schedule.recipe import Recipe
from dist_adamw.schedule.saved import (
    GROUPS,
    OnDifference,
    check_on_difference,
    check_state,
    check_takeable,
    compare_configurations,
)
from dist_adamw.schedule.scheduled_optimizer import ScheduledOptimizer


def prepare_load(
    state_dict: Mapping[str, Any], scheduled: ScheduledOptimizer, choice: OnDifference
) -> tuple[Recipe, ScheduledGroups]:
    """Return the recipe and the groups to load from ``state_dict``; ``scheduled`` is not changed.

    Raises:
        ValueError: not a saved schedule, or one that does not fit ``scheduled`` under ``choice``.
    """
    check_state(state_dict)
    check_on_difference(choice)
    saved, differing = compare_configurations(state_dict["configuration"], scheduled.configuration(), choice)
    takes_saved = choice == "checkpoint" and bool(differing)
    try:
        recipe = _with_sizes(scheduled.recipe, state_dict, saved["epoch_size"])
        recipe = replace(recipe, cooldown=_cooldown(state_dict, recipe.cooldown, scheduled.clock.samples))
        groups = scheduled.groups
        if takes_saved:
            check_takeable(saved, differing, len(groups))
            recipe = recipe.with_configuration(saved, differing, state_dict["batch_size"])
            groups = groups.with_bases([BaseValues(*values) for values in saved[GROUPS]], recipe.group_check)
        scheduled.check_batches(recipe)
        check_averages_of(scheduled.optimizer, recipe)
        if recipe.is_known:
            # Evaluated only for its errors: a saved recipe may fail at this sample.
            recipe.group_values(recipe.schedule.at(state_dict["samples"]), groups, scheduled.optimizer)
    except (TypeError, KeyError, ArithmeticError) as error:
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"the schedule of the checkpoint cannot be computed: {what}.") from error
    return recipe, groups


def _with_sizes(recipe: Recipe, state_dict: Mapping[str, Any], saved_epoch_size: int | None) -> Recipe:
    """Return the recipe with sizes that this job does not know yet, and the run's reference batch."""
    return replace(
        recipe,
        epoch_size=recipe.epoch_size or saved_epoch_size,
        batch_size=recipe.batch_size or state_dict["batch_size"],
        reference_batch_size=state_dict["reference_batch_size"] or recipe.reference_batch_size,
    )


def _cooldown(state_dict: Mapping[str, Any], ours: Cooldown | None, our_samples: int) -> Cooldown | None:
    """Return the cool-down after loading.

    A state of the trunk returns a job in its branch to the trunk, but keeps a branch that is still to begin.
    """
    saved = state_dict.get("cooldown")
    theirs = None if saved is None else Cooldown.from_plain(saved)
    if ours is None or (theirs is None and our_samples > ours.at):
        return theirs
    if theirs is not None and theirs != ours:
        raise ValueError(
            f"the checkpoint is in the {theirs}, and this job asks for the {ours}. Load a checkpoint of the trunk, or "
            "leave out scheduler.cooldown(...)."
        )
    if theirs is None and state_dict["samples"] > ours.at:
        raise ValueError(
            f"the checkpoint is at sample {state_dict['samples']:,}, after the beginning of the {ours}. Load an "
            "earlier checkpoint, or begin the cool-down later."
        )
    return ours
