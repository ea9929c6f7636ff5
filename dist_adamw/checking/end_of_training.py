"""Training that ends inside a cycle, where lr may be high."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dist_adamw.checking.inputs import Finding, Inputs
from dist_adamw.recipes.recipe import TrainingRecipe
from dist_adamw.schedule.batch_schedule import read_batch
from dist_adamw.schedule.lengths import parse
from dist_adamw.schedule.preview import TrainingEnd

_IN_SAMPLES = ("warmup_samples", "rewarmup", "decay_length", "total_samples")
_EPOCH = 1_000_000  # updates in an epoch of unknown size


def end_of_training(recipe: TrainingRecipe) -> TrainingEnd | None:
    """Return where training ends; None if the recipe does not determine that. Local.

    If all lengths are in epochs or shares of a cycle, the epoch size need not be known.
    """
    if recipe.total_samples is None:
        return None
    sizes: dict[str, Any] = {}
    batch = recipe.batch.get("size")
    if batch is None or recipe.scheduler.get("epoch_size") is None:
        if not _is_in_epochs(recipe):
            return None
        first = 1 if batch is None else read_batch(batch)[0]
        sizes = {"epoch_size": _EPOCH * first, "batch_size": first if batch is None else batch}
    try:
        return recipe.preview(cycles=1, points=1, **sizes).end
    except (ValueError, ArithmeticError):  # with real sizes, the constructors name it
        return None


def _is_in_epochs(recipe: TrainingRecipe) -> bool:
    """Return whether every length has the same place in training for any epoch size."""
    options = recipe.scheduler
    lengths = [(options[name], "samples") for name in _IN_SAMPLES if options.get(name)]
    lengths += [(one, "samples") for one in options.get("cycle_ends") or []]
    lengths += [(options[name], "epochs") for name in ("restart_period", "min_restart_period") if options.get(name)]
    lengths.append((recipe.total_samples, "samples"))
    return all(parse("a length", length, unit)[1] in ("epochs", "cycles", "%") for length, unit in lengths)


def check_end(inputs: Inputs) -> Iterator[Finding]:
    """Yield if training ends in mid-cycle. Local."""
    if inputs.recipe is None:
        return
    end = end_of_training(inputs.recipe)
    if end is not None and not end.is_at_cycle_end:
        knows_epoch = inputs.recipe.scheduler.get("epoch_size") is not None
        sentence = f"{end}" if knows_epoch else _without_samples(end)
        yield inputs.in_recipe("warning", "mid-cycle", ("training", "total_samples"), sentence)


def _without_samples(end: TrainingEnd) -> str:
    """Return the sentence about an end in epochs of unknown size."""
    before, after = (one * end.epochs / end.total_samples for one in end.cycle_ends)
    nearest = (
        f"Cycles end at epochs {before:.6g} and {after:.6g}" if before else f"The first cycle ends at epoch {after:.6g}"
    )
    fitting = " or ".join(f"restart_period: {period}" for period in end.restart_periods)
    return (
        f"training ends at epoch {end.epochs:.6g}, {end.done:.1%} into cycle {end.cycle}, with lr at "
        f"{end.lr_fraction:.1%} of its base value. {nearest}"
        + (f"; with {fitting} a cycle ends where training does." if fitting else ".")
    )
