"""``plan`` and ``check``: what a job needs, and what would go wrong with its files; ``schema``, for editors."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

from dist_adamw.cli.answer import CANNOT, DONE, NO, Answer, fields_of
from dist_adamw.cli.recipe_files import name_options, recipe_with


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanOptions:
    """The options of a plan. The optimizer's are those of the recipe, if there is one.

    Args:
        ranks: Numbers of ranks, such as "1,2,8".
        memory: Of a device, such as 80GiB: prints the smallest number of ranks that fits, for each engine.
        activations: Memory of a rank's activations, such as 4GiB; they cannot be computed from a model's shapes.
        dtype: Of the parameters: fp32, bf16 or fp16. Default: the model's.
        layers: Class of the modules that FSDP2 shards one by one. Default: found in the model.
        batch_size: Global batch, in samples, if the recipe has none.
        micro_batch_size: Samples of one rank in one forward pass, in place of the recipe's.
        total_samples: Samples of the whole training, in place of the recipe's.
        accumulation: Micro-batches of an update, if the batches are not given.
        mixed_precision: Accelerate's: no or bf16.
        master_dtype: DistAdamW's: fp32, or int16 for remainders.
        state_dtype: DistAdamW's: fp32 or bf16.
        reduce_dtype: DistAdamW's: fp32 or bf16.
        reproducible: DistAdamW's.
        device: cuda, or cpu for ranks of one host over gloo.
    """

    ranks: str = "1,2,4,8"
    memory: str | None = None
    activations: str | None = None
    dtype: str | None = None
    layers: str | None = None
    batch_size: int | None = None
    micro_batch_size: int | None = None
    total_samples: int | str | None = None
    accumulation: int = 1
    mixed_precision: Literal["no", "bf16"] = "no"
    master_dtype: str | None = None
    state_dtype: str | None = None
    reduce_dtype: str | None = None
    reproducible: bool = False
    device: Literal["cuda", "cpu"] = "cuda"


def plan(model: str, recipe: str | None = None, *, options: PlanOptions, epoch_size: int | None = None) -> Answer:
    """Compute a job's memory and traffic on each engine, its updates and its restarts. Nothing is allocated.

    Args:
        model: module:factory, file.py:factory, a Hugging Face folder or config.json, or parameters ("1.3B", "7e9").
        recipe: A recipe file.
        options: Of the plan.
        epoch_size: Samples in an epoch, if the recipe does not say.
    """
    from dist_adamw.planning.command import plan_command

    if model.endswith((".yaml", ".yml")):
        raise ValueError(
            f"{model} looks like a recipe, and the model comes first: dist-adamw plan 1.3B {model}, or a factory or "
            "configuration in place of 1.3B."
        )
    given = _recipe(recipe, epoch_size, has_batch=options.batch_size is not None)
    with name_options():
        text, data = plan_command(model, given, **fields_of(options))
    return Answer(text, data, DONE if data["feasible"] else NO)


def _recipe(path: str | None, epoch_size: int | None, *, has_batch: bool) -> Any:
    from dist_adamw.recipes.recipe import load_recipe

    if path is None:
        if epoch_size is not None:
            raise ValueError(f"--epoch_size {epoch_size} needs a recipe file, whose restarts it counts. Leave it out.")
        return None
    changes = {} if epoch_size is None else {"scheduler": {"epoch_size": epoch_size}}
    return recipe_with(load_recipe(path), changes, has_batch=has_batch)


def check(
    recipe: str | None = None,
    *,
    accelerate_config: str | None = None,
    deepspeed: str | None = None,
    ranks: int | None = None,
) -> Answer:
    """Find what would go wrong with a recipe, an Accelerate config and a DeepSpeed JSON together. Nothing is started.

    Args:
        recipe: A recipe file.
        accelerate_config: The file for accelerate launch --config_file; a DeepSpeed file that it names is read too.
        deepspeed: The DeepSpeed JSON, if the Accelerate config does not name it.
        ranks: Number of ranks. Default: num_processes of the Accelerate config.
    """
    from dist_adamw.checking.check import check_files

    text, status, data = check_files(recipe, accelerate_config, deepspeed, ranks)
    if status == CANNOT:
        raise ValueError(text)
    return Answer(text, data, status)


def schema() -> Answer:
    """Print the JSON Schema of recipe files, for editors.

    Save it next to a recipe, whose first line is then: # yaml-language-server: $schema=./recipe.schema.json
    """
    from dist_adamw.recipes.schema import schema_text

    text = schema_text()
    return Answer(text.removesuffix("\n"), json.loads(text))
