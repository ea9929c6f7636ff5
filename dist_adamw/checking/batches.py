"""Global batches that micro-batch, accumulation and ranks do not make."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dist_adamw.checking.inputs import Finding, Inputs
from dist_adamw.schedule.batch import GlobalBatch
from dist_adamw.schedule.batch_schedule import GivenBatches, read_batch, solve_each

_SIZE, _MICRO, _STEPS = "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"


def check_batches(inputs: Inputs) -> Iterator[Finding]:
    """Yield global batches that do not multiply, in one file or between two. Local."""
    wrong_kind = [*_check_numbers(inputs)]
    yield from wrong_kind
    if wrong_kind:
        return
    yield from _check_json(inputs)
    if inputs.recipe is not None:
        yield from _check_recipe(inputs, inputs.recipe.batch)


def _number(inputs: Inputs, key: str) -> int | None:
    value = inputs.of_deepspeed(key)
    return value if type(value) is int else None


def _check_numbers(inputs: Inputs) -> Iterator[Finding]:
    for key in (_SIZE, _MICRO, _STEPS):
        value = inputs.of_deepspeed(key)
        if value not in (None, "auto") and not (type(value) is int and value > 0):
            sentence = f'{key} must be a whole number above 0 or "auto", got {value!r}.'
            yield inputs.in_deepspeed("error", "batch", (key,), sentence)


def _check_json(inputs: Inputs) -> Iterator[Finding]:
    """Yield if the numbers of the DeepSpeed configuration alone do not multiply."""
    size, micro, steps = (_number(inputs, key) for key in (_SIZE, _MICRO, _STEPS))
    ranks = inputs.data_parallel_size
    if size is None or ranks is None:
        return
    if micro is None or steps is None:
        one_pass = (micro or 1) * (steps or 1) * ranks
        if size % one_pass:
            factors = " x ".join(str(one) for one in (micro, steps) if one is not None)
            sentence = (
                f"{_SIZE}={size} is not a multiple of {f'{factors} x ' if factors else ''}{ranks} ranks = {one_pass}. "
                'Write "auto".'
            )
            yield inputs.in_deepspeed("error", "batch", (_SIZE,), sentence)
    elif size != micro * steps * ranks:
        sentence = (
            f"{_SIZE}={size}, and {_MICRO} x {_STEPS} x ranks = {micro} x {steps} x {ranks} = {micro * steps * ranks}. "
            'Correct one of them, or write "auto".'
        )
        yield inputs.in_deepspeed("error", "batch", (_SIZE,), sentence)


def _check_recipe(inputs: Inputs, batch: dict[str, Any]) -> Iterator[Finding]:
    micro, of_json = batch.get("micro_batch_size"), _number(inputs, _MICRO)
    if None not in (micro, of_json) and micro != of_json:
        sentence = f"{_MICRO}={of_json}, and micro_batch_size is {micro} in the recipe. Write " + '"auto".'
        yield inputs.in_deepspeed("error", "batch", (_MICRO,), sentence)
        return
    if batch.get("size") is None:
        return
    first, given = read_batch(batch["size"])
    size = _number(inputs, _SIZE)
    if size not in (None, first):
        sentence = f"{_SIZE}={size}, and the recipe's global batch is {first}. Write " + '"auto".'
        yield inputs.in_deepspeed("error", "batch", (_SIZE,), sentence)
        return
    micro, ranks = micro or of_json, inputs.data_parallel_size
    if micro is None or ranks is None:
        return
    try:
        solve_each(given or ((0, first),), micro_batch_size=micro, data_parallel_size=ranks)
    except ValueError as error:
        sentence = str(error).removeprefix("batch_size[0]: ") if given is None else str(error)
        yield inputs.in_recipe("error", "batch", ("batch", "size"), sentence)
        return
    yield from _check_accumulation(inputs, GlobalBatch(micro, 1, ranks), first, given)


def _check_accumulation(
    inputs: Inputs, one_pass: GlobalBatch, first: int, given: GivenBatches | None
) -> Iterator[Finding]:
    """Yield if the accumulation of the DeepSpeed configuration makes another batch than the recipe."""
    if not inputs.uses_deepspeed() or inputs.deepspeed is None:
        return
    steps = inputs.of_deepspeed(_STEPS)
    if steps == "auto" or (steps is None and inputs.deepspeed_place):
        return
    made = (1 if steps is None else steps) * one_pass.size
    sizes = [size for _, size in given] if given is not None else [first]
    # With a schedule, `prepare` replaces the default of 1.
    if made in sizes or (given is not None and steps in (None, 1)):
        return
    sentence = f"{_STEPS}={steps}"
    if steps is None:
        sentence = f"{_STEPS} is not there, and Accelerate then takes 1"
    makes = f"{one_pass.micro_batch_size} x {steps or 1} x {one_pass.data_parallel_size} ranks = {made}"
    whose = "none of the recipe's schedule" if given is not None else f"not the recipe's {first}"
    sentence += f", which makes a global batch of {makes}: {whose}. Write " + f'"{_STEPS}": "auto".'
    yield inputs.in_deepspeed("error", "batch", (_STEPS,), sentence)
