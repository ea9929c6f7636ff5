"""`plan` with texts and numbers for arguments, as a command line has them."""

from __future__ import annotations

from typing import Any, Literal

from dist_adamw.planning.memory import Setup
from dist_adamw.planning.model import read_dtype
from dist_adamw.planning.plan import plan
from dist_adamw.planning.text import read_bytes
from dist_adamw.schedule.batch import shown


def plan_command(
    model: str,
    recipe: Any = None,
    ranks: str = "1,2,4,8",
    memory: str | None = None,
    activations: str | None = None,
    dtype: str | None = None,
    layers: str | None = None,
    batch_size: int | None = None,
    micro_batch_size: int | None = None,
    total_samples: int | str | None = None,
    accumulation: int = 1,
    mixed_precision: Literal["no", "bf16"] = "no",
    master_dtype: str | None = None,
    state_dtype: str | None = None,
    reduce_dtype: str | None = None,
    reproducible: bool = False,
    device: Literal["cuda", "cpu"] = "cuda",
) -> tuple[str, dict[str, Any]]:
    """Return a plan as text and as plain data. Local.

    Args:
        model: module:factory, file.py:factory, a Hugging Face folder or config.json, or parameters ("1.3B", "7e9").
        recipe: From ``dist_adamw.load_recipe``; its optimizer's options replace those below.
        ranks: Numbers of ranks, such as "1,2,8".
        memory: Of a device, such as "80GiB": the smallest number of ranks that fits is printed for each engine.
        activations: Memory of a rank's activations, such as 4GiB; they cannot be computed from a model's shapes.
        dtype: Of the parameters: fp32, bf16 or fp16; default: the model's.
        layers: Class of the modules that FSDP2 shards one by one; default: found in the model.
        batch_size: Global batch, in samples, if the recipe has none.
        micro_batch_size: Samples of one rank in one forward pass; with the global batch it gives the accumulation.
        total_samples: Samples of the whole training.
        accumulation: Micro-batches of an update, if the batches are not given.
        mixed_precision: Accelerate's; bf16 lets FSDP2 gather bf16, and DeepSpeed keep bf16 parameters.
        master_dtype: DistAdamW's: fp32, or int16 for remainders.
        state_dtype: DistAdamW's: fp32 or bf16.
        reduce_dtype: DistAdamW's: fp32 or bf16.
        reproducible: DistAdamW's.
        device: cuda, or cpu for ranks of one host over gloo.

    Raises:
        ValueError: says which argument is wrong, and what to pass.
    """
    if mixed_precision not in ("no", "bf16"):
        raise ValueError(f"mixed_precision must be no or bf16, got {shown(mixed_precision)}.")
    setup = Setup(
        accumulation=accumulation,
        device=device,
        bf16=mixed_precision == "bf16",
        master_dtype=_dtype("master_dtype", master_dtype),
        state_dtype=_dtype("state_dtype", state_dtype),
        reduce_dtype=_dtype("reduce_dtype", reduce_dtype),
        reproducible=reproducible,
        activations=0 if activations is None else read_bytes("activations", activations),
    )
    found = plan(
        model,
        ranks=_ranks(ranks),
        memory=None if memory is None else read_bytes("memory", memory),
        setup=setup,
        dtype=dtype,
        layers=layers,
        recipe=recipe,
        batch_size=batch_size,
        micro_batch_size=micro_batch_size,
        total_samples=total_samples,
    )
    return str(found), found.as_dict()


def _dtype(name: str, text: str | None) -> Any:
    import torch

    if text is None:
        return None
    return torch.int16 if name == "master_dtype" and text == "int16" else read_dtype(name, text)


def _ranks(text: str) -> list[int]:
    try:
        found = [int(part) for part in str(text).strip("[]").split(",")]
    except ValueError as error:
        raise ValueError(f"ranks must be whole numbers with commas, such as 1,2,8, got {shown(text)}.") from error
    return found
