"""Engines and launches that silently do something else than the Accelerate config says."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator

from dist_adamw.checking.inputs import Finding, Inputs, is_true
from dist_adamw.integrations.accelerate.checks import ENGINES, FSDP1


def check_launch(inputs: Inputs) -> Iterator[Finding]:
    """Yield what `dist_adamw.prepare` would refuse because of the launch. Local."""
    if inputs.accelerate is None:
        return
    yield from _check_keys(inputs)
    engine = inputs.of_accelerate("distributed_type")
    engine = "NO" if engine in (None, False) else str(engine)
    if engine not in ENGINES:
        sentence = f"the engine {engine} is not supported. Use one process (NO), MULTI_GPU (DDP), FSDP or DEEPSPEED."
        yield inputs.in_accelerate("error", "engine", ("distributed_type",), sentence)
        return
    yield from _check_started_ranks(inputs, engine)
    yield from _check_reproducible(inputs, engine)
    version = inputs.of_accelerate("fsdp_config", "fsdp_version")
    if engine == "FSDP" and version != 2:
        place = ("fsdp_config", "fsdp_version")
        yield inputs.in_accelerate("error", "engine", place, FSDP1.format(1 if version is None else version))
    if inputs.deepspeed is not None and engine != "DEEPSPEED" and not inputs.deepspeed_place:
        sentence = (
            f"with distributed_type: {engine} Accelerate does not use {inputs.deepspeed.name}. Write DEEPSPEED, or "
            "check without that file."
        )
        yield inputs.in_accelerate("error", "engine", ("distributed_type",), sentence)


def _check_keys(inputs: Inputs) -> Iterator[Finding]:
    """Yield the keys with which accelerate launch would not start. Local."""
    from accelerate.commands.config.config_args import ClusterConfig

    assert inputs.accelerate is not None
    known = [field.name for field in dataclasses.fields(ClusterConfig)]
    for key in inputs.accelerate.data:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"Did you mean {near[0]}?" if near else "Pass the file for accelerate launch --config_file."
            yield inputs.in_accelerate("error", "key", (key,), f"there is no {key!r} in an Accelerate config. {hint}")


def _check_reproducible(inputs: Inputs, engine: str) -> Iterator[Finding]:
    recipe, precision = inputs.recipe, inputs.of_accelerate("mixed_precision")
    if engine != "DEEPSPEED" and recipe is not None and recipe.optimizer.get("reproducible") and precision == "fp16":
        sentence = "reproducible=True is not supported with mixed_precision: fp16. Use bf16, or leave it out."
        yield inputs.in_recipe("error", "precision", ("optimizer", "reproducible"), sentence)


def _check_started_ranks(inputs: Inputs, engine: str) -> Iterator[Finding]:
    ranks, on_cpu = inputs.ranks, is_true(inputs.of_accelerate("use_cpu"))
    if engine in ("FSDP", "DEEPSPEED") and on_cpu:
        sentence = f"with use_cpu: true accelerate launch does not use {engine}. Write use_cpu: false."
        yield inputs.in_accelerate("error", "launch", ("use_cpu",), sentence)
        return
    if ranks in (None, 1):
        return
    if inputs.of_accelerate("mpirun_config"):
        return  # mpirun starts the ranks
    if engine == "MULTI_CPU" or on_cpu:
        place = "use_cpu" if on_cpu and engine != "MULTI_CPU" else "distributed_type"
        sentence = (
            f"accelerate launch starts one process for {place}: {'true' if place == 'use_cpu' else engine}, and not "
            f"{ranks}. Write distributed_type: MULTI_GPU and use_cpu: false, and set ACCELERATE_USE_CPU=true."
        )
        yield inputs.in_accelerate("error", "launch", (place,), sentence)
    elif engine == "NO":
        sentence = f"accelerate launch starts one process for distributed_type: NO, and not {ranks}. Write MULTI_GPU."
        yield inputs.in_accelerate("error", "launch", ("distributed_type",), sentence)
