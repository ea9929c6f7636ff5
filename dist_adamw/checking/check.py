"""``check``: what would go wrong with a recipe, an Accelerate config and a DeepSpeed JSON together."""

from __future__ import annotations

from typing import Any

from dist_adamw.checking.batches import check_batches
from dist_adamw.checking.deepspeed_json import check_deepspeed
from dist_adamw.checking.deepspeed_keys import check_deepspeed_keys
from dist_adamw.checking.end_of_training import check_end, end_of_training
from dist_adamw.checking.inputs import Finding, Inputs, PathLike, read_inputs
from dist_adamw.checking.launching import check_launch
from dist_adamw.recipes.recipe import RecipeLike, TrainingRecipe
from dist_adamw.recipes.source import FileError

FINE, FOUND, UNREADABLE = 0, 1, 2


def check(
    recipe: RecipeLike | TrainingRecipe | None = None,
    accelerate_config: PathLike | None = None,
    deepspeed: PathLike | None = None,
    ranks: int | None = None,
) -> list[Finding]:
    """Return everything that would go wrong with these files together, errors first. Local; nothing is started.

    Args:
        recipe: A recipe file, its content as a mapping, or a loaded recipe.
        accelerate_config: The file for ``accelerate launch --config_file``. Its DeepSpeed file is read too.
        deepspeed: The DeepSpeed JSON, if the Accelerate config does not name it.
        ranks: The number of ranks; default: ``num_processes`` of the Accelerate config.

    Raises:
        ValueError: a file cannot be read, or there is none.
    """
    return _check(*_read(recipe, accelerate_config, deepspeed, ranks))


def check_files(
    recipe: RecipeLike | None = None,
    accelerate_config: PathLike | None = None,
    deepspeed: PathLike | None = None,
    ranks: int | None = None,
) -> tuple[str, int, dict[str, Any]]:
    """Return the findings of `check` as text, an exit status, and the same as plain data. Local.

    Returns:
        The text, one line for each finding; 0 if there are none, 1 if there are, 2 if a file cannot be read; and a
        dict with "status", "findings" and "summary".
    """
    try:
        inputs, found = _read(recipe, accelerate_config, deepspeed, ranks)
        findings = _check(inputs, found)
    except ValueError as error:
        problems = error.problems if isinstance(error, FileError) else [error]
        text = "\n".join(str(problem) for problem in problems)
        return text, UNREADABLE, {"status": UNREADABLE, "findings": [], "summary": text}
    status = FOUND if findings else FINE
    summary = _summary(inputs, findings)
    text = "\n".join([*map(str, findings), summary])
    return text, status, {"status": status, "findings": [one.as_dict() for one in findings], "summary": summary}


def _read(
    recipe: RecipeLike | TrainingRecipe | None,
    accelerate_config: PathLike | None,
    deepspeed: PathLike | None,
    ranks: int | None,
) -> tuple[Inputs, list[Finding]]:
    if recipe is None and accelerate_config is None and deepspeed is None:
        raise ValueError("there is nothing to check. Pass a recipe, an Accelerate config or a DeepSpeed JSON.")
    return read_inputs(recipe, accelerate_config, deepspeed, ranks)


def _check(inputs: Inputs, found: list[Finding]) -> list[Finding]:
    checks = (check_launch, check_deepspeed_keys, check_batches, check_deepspeed, check_end)
    findings = [*found, *(finding for one in checks for finding in one(inputs))]
    return sorted(findings, key=lambda one: (one.severity, one.file, one.line or 0))


def _summary(inputs: Inputs, findings: list[Finding]) -> str:
    if findings:
        errors = sum(one.severity == "error" for one in findings)
        counts = {"error": errors, "warning": len(findings) - errors}
        return ", ".join(f"{n} {name}{'s' if n > 1 else ''}" for name, n in counts.items() if n)
    sources = [None if inputs.recipe is None else inputs.recipe.source, inputs.accelerate, inputs.deepspeed]
    lines = [f"no problems in {', '.join(dict.fromkeys(one.name for one in sources if one is not None))}"]
    recipe, ranks = inputs.recipe, inputs.data_parallel_size
    if recipe is not None and ranks is not None and {"size", "micro_batch_size"} <= recipe.batch.keys():
        lines.append(str(recipe.global_batch(ranks)))
    if recipe is not None and (end := end_of_training(recipe)) is not None:
        lines.append(f"training ends at epoch {end.epochs:.6g}, at the end of cycle {end.cycle}")
    return "\n".join(lines)
