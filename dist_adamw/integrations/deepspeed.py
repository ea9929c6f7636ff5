"""DeepSpeed: what its configuration has to say, and what it must not.

Floor 4: knows DeepSpeed's configuration and registries; nothing below knows it. Imports it lazily.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

from torch.optim import Optimizer

from dist_adamw.optimizer import DistAdamW

Config = MutableMapping[str, Any]
_CLIPPING = "gradient_clipping"


def accumulation_of(config: Config, accumulation: int) -> int:
    """The micro-batches of an update: the configuration's, where it says. Local."""
    told = config.get("gradient_accumulation_steps", "auto")
    return accumulation if told == "auto" else int(told)


def configure(config: Config, optimizer: Optimizer) -> None:
    """Have the engine clip as ``optimizer`` was told to, and keep ``optimizer``. Local, before the engine is built.

    Args:
        config: DeepSpeed's; changed in place.
        optimizer: Its ``max_grad_norm`` is handed over.

    Raises:
        ValueError: both name a norm, and not the same.
    """
    told = config.get(_CLIPPING, "auto")
    norm = optimizer.max_grad_norm if isinstance(optimizer, DistAdamW) else None
    if norm is not None and told not in ("auto", norm):
        raise ValueError(
            f"max_grad_norm={norm} was given to DistAdamW and gradient_clipping={told} to DeepSpeed, which clips. "
            "Name one of them, or the same norm."
        )
    if told == "auto":
        # DeepSpeed 0.19 clips to 1.0 where nothing is said, and Accelerate fills "auto" with 1.0.
        config[_CLIPPING] = norm or 0.0
    if isinstance(optimizer, DistAdamW):
        optimizer.max_grad_norm = None
    offload = config.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none")
    if offload != "none":
        # Else Accelerate swaps a client optimizer for DeepSpeedCPUAdam, with L2 decay.
        config["zero_force_ds_cpu_optimizer"] = False
