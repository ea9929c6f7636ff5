"""What a DeepSpeed configuration has a second time, in conflict, or left open."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import nn

from dist_adamw.checking.inputs import Finding, Inputs, Severity
from dist_adamw.integrations.deepspeed.configuration import (
    CLIPPING,
    NOT_FOR_JSON,
    batch_sizes_of,
    configure,
    names_our_types,
    problem_of,
)
from dist_adamw.optimizer.adamw import DistAdamW
from dist_adamw.recipes.source import Place

# Keys whose "auto" Accelerate or transformers' Trainer fills in, besides those that `prepare` does.
_FILLED = {
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    CLIPPING,
    "fp16.enabled",
    "bf16.enabled",
    "optimizer.params.lr",
    "optimizer.params.betas",
    "optimizer.params.eps",
    "optimizer.params.weight_decay",
    "optimizer.params.shard",
    "scheduler.params.batch_size",
    "scheduler.params.epoch_size",
    "scheduler.params.normalize_weight_decay",
    "scheduler.params.warmup_min_lr",
    "scheduler.params.warmup_max_lr",
    "scheduler.params.warmup_num_steps",
    "scheduler.params.total_num_steps",
    "zero_optimization.stage",
    "zero_optimization.offload_optimizer.device",
    "zero_optimization.offload_optimizer.nvme_path",
    "zero_optimization.offload_param.device",
    "zero_optimization.offload_param.nvme_path",
    "zero_optimization.reduce_bucket_size",
    "zero_optimization.stage3_prefetch_bucket_size",
    "zero_optimization.stage3_param_persistence_threshold",
    "zero_optimization.stage3_gather_16bit_weights_on_model_save",
}
_UNUSED_WITH_A_FILE = {
    "gradient_accumulation_steps",
    "gradient_clipping",
    "zero_stage",
    "offload_optimizer_device",
    "offload_param_device",
    "offload_param_nvme_path",
    "offload_optimizer_nvme_path",
    "zero3_save_16bit_model",
}


def check_deepspeed(inputs: Inputs) -> Iterator[Finding]:
    """Yield what two places define, or none, in the DeepSpeed configuration. Local."""
    if inputs.deepspeed is None or not inputs.uses_deepspeed():
        return
    yield from _check_twice(inputs)
    yield from _check_clipping(inputs)
    yield from _check_optimizer_options(inputs)
    yield from _check_precision(inputs)
    yield from _check_auto(inputs, inputs.deepspeed_config(), ())
    if not inputs.deepspeed_place:
        yield from _check_ignored(inputs)


def _check_twice(inputs: Inputs) -> Iterator[Finding]:
    config = inputs.deepspeed_config()
    parts: tuple[Literal["optimizer", "scheduler"], ...] = ("optimizer", "scheduler")
    written = [part for part in parts if part in config]
    for part in written:
        if not isinstance(config[part], dict):
            sentence = f'{part} must be an object with "type" and "params", got {config[part]!r}.'
            yield inputs.in_deepspeed("error", part, (part,), sentence)
            return
        kind = inputs.of_deepspeed(part, "type")
        if kind is None:
            sentence = f'{part} has no "type", without which DeepSpeed ignores it. Add the type, or leave {part} out.'
            yield inputs.in_deepspeed("warning", part, (part,), sentence)
        elif inputs.recipe is not None:
            sentence = (
                f"there is {'an' if part == 'optimizer' else 'a'} {part} ({kind}) here, and the recipe has one too. "
                f'Leave "{part}" out, or do without the recipe.'
            )
            yield inputs.in_deepspeed("error", part, (part,), sentence)
    if inputs.recipe is not None or not names_our_types(config):
        return
    for part in written:
        if (problem := problem_of(config, part)) is not None:
            yield inputs.in_deepspeed("error", part, (part, "params"), problem)
    if isinstance(sizes := batch_sizes_of(dict(config)), dict) and inputs.accelerate is None:
        sentence = (
            f"batch_size is a schedule ({sizes}), and deepspeed.initialize alone has one accumulation for all of "
            "training. Use Accelerate's loop with dist_adamw.prepare, or a number."
        )
        yield inputs.in_deepspeed("warning", "batch", ("scheduler", "params", "batch_size"), sentence)


def _check_clipping(inputs: Inputs) -> Iterator[Finding]:
    """Yield if recipe and engine clip to different norms, or the engine would replace the optimizer."""
    norm = None if inputs.recipe is None else inputs.recipe.optimizer.get("max_grad_norm")
    config = copy.deepcopy(dict(inputs.deepspeed_config()))
    zero = config.get("zero_optimization")
    config["zero_optimization"] = zero if isinstance(zero, dict) else {}
    try:
        configure(config, DistAdamW([nn.Parameter(torch.zeros(1))], max_grad_norm=norm))
    except ValueError as error:
        is_clipping = CLIPPING in str(error)
        place = CLIPPING if is_clipping else "zero_force_ds_cpu_optimizer"
        yield inputs.in_deepspeed("error", "clipping" if is_clipping else "optimizer", (place,), str(error))


def _check_optimizer_options(inputs: Inputs) -> Iterator[Finding]:
    """Yield options of the recipe that DeepSpeed does itself."""
    given = {} if inputs.recipe is None else inputs.recipe.optimizer
    for name in ("master_dtype", "state_dtype", "reduce_dtype", "reproducible"):
        if given.get(name):
            severity: Severity = "error" if name == "reproducible" else "warning"
            sentence = f"{name}={given[name]!r} is not for DeepSpeed: {NOT_FOR_JSON[name]}."
            yield inputs.in_recipe(severity, "precision", ("optimizer", name), sentence)


def _check_precision(inputs: Inputs) -> Iterator[Finding]:
    enabled = {dtype: inputs.of_deepspeed(dtype, "enabled") for dtype in ("bf16", "fp16")}
    if all(value is True for value in enabled.values()):
        sentence = "bf16 and fp16 are both enabled. Disable one of them."
        yield inputs.in_deepspeed("error", "precision", ("fp16", "enabled"), sentence)
        return
    chosen = inputs.of_accelerate("mixed_precision")
    chosen = "no" if chosen in (None, False) else str(chosen)
    if inputs.of_accelerate("mixed_precision") is None:
        return
    wanted = {"bf16": "bf16", "fp8": "bf16", "fp16": "fp16"}.get(chosen)
    for dtype, value in enabled.items():
        if value in (True, False) and value != (dtype == wanted) and (value or dtype == wanted):
            sentence = (
                f"{dtype}.enabled is {str(value).lower()}, and mixed_precision is {chosen} in the Accelerate config. "
                "Leave mixed_precision out, and enable here what you want."
            )
            yield inputs.in_deepspeed("error", "precision", (dtype, "enabled"), sentence)


def _check_auto(inputs: Inputs, config: Mapping[str, Any], place: Place) -> Iterator[Finding]:
    for key, value in config.items():
        inner = (*place, key)
        if isinstance(value, dict):
            yield from _check_auto(inputs, value, inner)
        elif value == "auto" and ".".join(map(str, inner)) not in _FILLED:
            sentence = f'{key}="auto" is filled in neither by dist_adamw nor by Accelerate or Trainer. Write a value.'
            yield inputs.in_deepspeed("error", "auto", inner, sentence)


def _check_ignored(inputs: Inputs) -> Iterator[Finding]:
    """Yield keys of the Accelerate config that Accelerate refuses next to a DeepSpeed file."""
    section = inputs.of_accelerate("deepspeed_config")
    places: list[Place] = [("deepspeed_config", key) for key in section or {} if key in _UNUSED_WITH_A_FILE]
    if inputs.of_accelerate("mixed_precision") is not None:
        places.append(("mixed_precision",))
    for place in places:
        sentence = f"Accelerate refuses {place[-1]} next to deepspeed_config_file. Write it in the DeepSpeed file only."
        yield inputs.in_accelerate("error", "engine", place, sentence)
