"""Tell recipes, DeepSpeed configurations and Accelerate configs apart by their keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

RECIPE, DEEPSPEED, ACCELERATE = "a recipe", "a DeepSpeed configuration", "an Accelerate config"
_OF_RECIPES = {"optimizer", "scheduler", "batch", "training"}
_OF_DEEPSPEED = {"zero_optimization", "train_micro_batch_size_per_gpu"}
_OF_ACCELERATE = {"compute_environment", "distributed_type", "num_processes"}
# How `dist-adamw check` takes each.
ARGUMENTS: Mapping[str, str] = {
    RECIPE: "its first argument",
    DEEPSPEED: "--deepspeed",
    ACCELERATE: "--accelerate_config",
}


def kind_of(data: Mapping[Any, Any]) -> str | None:
    """Return the kind of file that ``data`` is from, or None if its keys do not say."""
    if data.keys() & _OF_ACCELERATE:
        return ACCELERATE
    parts = [data[name] for name in ("optimizer", "scheduler") if isinstance(data.get(name), dict)]
    if data.keys() & _OF_DEEPSPEED or any("type" in part or isinstance(part.get("params"), dict) for part in parts):
        return DEEPSPEED
    return RECIPE if data and data.keys() <= _OF_RECIPES else None


def mistaken(data: Mapping[Any, Any], wanted: str) -> str | None:
    """Return a sentence if the file is clearly of another kind than ``wanted``."""
    kind = kind_of(data)
    if kind is None or kind == wanted:
        return None
    takes = f"dist-adamw check takes this file as {ARGUMENTS[kind]}"
    return f"this is {kind}, and not {wanted}. Pass {wanted}. ({takes}.)"
