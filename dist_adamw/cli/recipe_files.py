"""Make the preview of a recipe file, with some of its values replaced, or of options alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dist_adamw.recipes.recipe import TrainingRecipe
    from dist_adamw.schedule.preview import Preview

_OF_OPTIMIZER = ("lr", "weight_decay")


def recipe_with(
    recipe: TrainingRecipe, sections: Mapping[str, Mapping[str, Any]], *, has_batch: bool = False
) -> TrainingRecipe:
    """Return a recipe in which the values of options replace those of the file. Local.

    Args:
        recipe: Of a file.
        sections: From options, by section and key.
        has_batch: Whether the caller knows the global batch, if the recipe does not.

    Raises:
        ValueError: a mistake in an option; or a size is missing that restarts depend on.
    """
    with name_options():
        recipe = recipe.with_changes(**sections)
    for name, place, is_there in (
        ("epoch_size", "scheduler.epoch_size", recipe.scheduler.get("epoch_size") is not None),
        ("batch_size", "batch.size", has_batch or recipe.batch.get("size") is not None),
    ):
        if not is_there:
            raise ValueError(
                f"{recipe.source.name} has no {place}, which its restarts depend on. Pass --{name}, in samples, or "
                "write it there."
            )
    return recipe


@contextlib.contextmanager
def name_options() -> Iterator[None]:
    """Give an error in a value of an option its name, and not that of a file which does not have the value."""
    from dist_adamw.recipes.source import FileError

    try:
        yield
    except FileError as error:
        first = error.problems[0]
        if first.line is not None:
            raise
        option = "batch_size" if first.key == "batch.size" else first.key.rpartition(".")[2]
        raise ValueError(f"--{option}: {first.sentence}") from error


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
    from dist_adamw.recipes.recipe import load_recipe

    recipe, sections = load_recipe(path), _sections(given)
    total = given.get("total_samples", recipe.total_samples)
    if "fit" in given and total is None:
        raise ValueError(f"--fit {given['fit']} needs --total_samples, since {path} has no training.total_samples.")
    # Without `fit` it is only looked up, and no cycle ends there.
    if "fit" in given or ("total_samples" in given and "total_samples" in recipe.scheduler):
        sections.setdefault("scheduler", {})["total_samples"] = total
    with name_options():
        return recipe_with(recipe, sections).preview(cycles=cycles)


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
    if "fit" in given:  # without it, the total is only looked up, and no cycle ends there
        sections["scheduler"]["total_samples"] = given["total_samples"]
    optimizer = DistAdamW([torch.zeros(1)], **sections.get("optimizer", {}))
    scheduler = CyclicLRWithRestarts(optimizer, given["batch_size"], **sections["scheduler"])
    return scheduler.preview(cycles=cycles, total_samples=given.get("total_samples"))
