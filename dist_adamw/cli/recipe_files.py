"""Make the preview of a recipe file, with some of its values replaced, or of options alone."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dist_adamw.schedule.preview import Preview

_OF_OPTIMIZER = ("lr", "weight_decay")


def read_recipe(path: str) -> Any:
    """Return the `TrainingRecipe` of a file. Local.

    Raises:
        ValueError: file, line and key of a mistake.
    """
    return importlib.import_module("dist_adamw.recipes.recipe").load_recipe(path)


def preview_of(path: str | None, given: dict[str, Any], cycles: int | None) -> Preview:
    """Return the preview of a recipe. Local.

    Args:
        path: A recipe file; None: ``given`` alone.
        given: Options by name, which replace those of the file.
        cycles: See `CyclicLRWithRestarts.preview`.

    Raises:
        ValueError: an option is out of its range, or batch_size or epoch_size is missing.
    """
    if path is None:
        return _preview_of_options(given, cycles)
    recipe, sections = read_recipe(path), _sections(given)
    if "total_samples" in given and "total_samples" in recipe.scheduler:  # there a cycle ends with it
        sections.setdefault("scheduler", {})["total_samples"] = given["total_samples"]
    preview: Preview = recipe.with_changes(**sections).preview(cycles=cycles)
    return preview


def _sections(given: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return options as the sections of a recipe file."""
    sections: dict[str, dict[str, Any]] = {}
    for name, value in given.items():
        section, key = "scheduler", name
        if name in _OF_OPTIMIZER:
            section = "optimizer"
        elif name == "batch_size":
            section, key = "batch", "size"
        elif name == "total_samples":
            section = "training"
        sections.setdefault(section, {})[key] = value
    if "fit" in given and "total_samples" in given:  # otherwise it is only looked up, and no cycle ends there
        sections["scheduler"]["total_samples"] = given["total_samples"]
    return sections


def _preview_of_options(given: dict[str, Any], cycles: int | None) -> Preview:
    if missing := [f"--{name}" for name in ("batch_size", "epoch_size") if name not in given]:
        raise ValueError(f"{' and '.join(missing)} must be given, or a recipe file that has it.")
    if "fit" in given and "total_samples" not in given:
        raise ValueError(f"--fit {given['fit']} needs --total_samples, where the last cycle is to end.")
    import torch

    from dist_adamw.optimizer.adamw import DistAdamW
    from dist_adamw.schedule.scheduler import CyclicLRWithRestarts

    sections = _sections(given)
    optimizer = DistAdamW([torch.zeros(1)], **sections.get("optimizer", {}))
    scheduler = CyclicLRWithRestarts(optimizer, given["batch_size"], **sections["scheduler"])
    return scheduler.preview(cycles=cycles, total_samples=given.get("total_samples"))
