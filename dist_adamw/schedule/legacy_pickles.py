"""Read schedulers that version 0.1.0 pickled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dist_adamw.schedule.clock import SampleClock
from dist_adamw.schedule.recipe import Recipe
from dist_adamw.schedule.scheduled_optimizer import ScheduledOptimizer

_OF_THE_CLOCK = {"samples", "sample_source", "_applied", "_stepped", "_under_way", "_unconfirmed", "_counted_last"}
_OF_THE_RECIPE = {
    "_options",
    "_epoch_size",
    "_batch_size",
    "_reference_batch_size",
    "_normalize",
    "_lr_scaling",
    "_stream",
}
_OF_THE_GROUPS = {"_optimizer", "_min_lr", "_has_crossed"}
_COMPUTED = {"_schedule", "_known", "_has_warned", "_began_without_state"}
_NOT_KEPT = _OF_THE_CLOCK | _OF_THE_RECIPE | _OF_THE_GROUPS | _COMPUTED


def attributes_from_first_version(state: Mapping[str, Any]) -> dict[str, Any]:
    """Convert the state that 0.1.0 pickled to the attributes of a scheduler."""
    scheduled = ScheduledOptimizer(state["_optimizer"], _recipe(state), state["_min_lr"], _clock(state))
    scheduled.last_lr = state["_last_lr"]
    scheduled.has_crossed = state["_has_crossed"]
    kept = {name: value for name, value in state.items() if name not in _NOT_KEPT}
    return {"_scheduled": scheduled, **kept}


def _clock(state: Mapping[str, Any]) -> SampleClock:
    clock = SampleClock()
    clock.samples, clock._applied, clock._stepped = state["samples"], state["_applied"], state["_stepped"]
    clock._is_unconfirmed, clock._counted_last = state["_unconfirmed"], state["_counted_last"]
    return clock


def _recipe(state: Mapping[str, Any]) -> Recipe:
    return Recipe(
        options=state["_options"],
        epoch_size=state["_epoch_size"],
        batch_size=state["_batch_size"],
        reference_batch_size=state["_reference_batch_size"],
        normalize=state["_normalize"],
        lr_scaling=state["_lr_scaling"],
        stream=state["_stream"],
    )
