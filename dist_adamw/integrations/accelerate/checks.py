"""Refuse engines, launchers and schedulers with which training would silently go wrong."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from dist_adamw.integrations.accelerate.data import engine_of
from dist_adamw.schedule.scheduler import CyclicLRWithRestarts

if TYPE_CHECKING:
    from accelerate import Accelerator

DATA_PARALLEL = {"NO", "MULTI_CPU", "MULTI_GPU", "MULTI_NPU", "MULTI_MLU", "MULTI_XPU", "MULTI_HPU"}
ENGINES = {*DATA_PARALLEL, "FSDP", "DEEPSPEED"}
FSDP1 = (
    "FSDP1 keeps flat parameters without names, got fsdp_version: {}. Set fsdp_version: 2 in the Accelerate "
    "configuration (FSDP_VERSION=2)."
)


def check_scheduler(scheduler: Any) -> CyclicLRWithRestarts:
    """Return ``scheduler`` if it is an unwrapped `CyclicLRWithRestarts`; else raise ValueError. Local."""
    if not isinstance(scheduler, CyclicLRWithRestarts):
        raise ValueError(
            f"scheduler must be a CyclicLRWithRestarts that is not prepared yet, got {type(scheduler).__name__}."
        )
    return scheduler


def check_engine(accelerator: Accelerator, optimizer: Optimizer) -> None:
    """Raise ValueError if the engine is not supported, or is not the one that was requested. Local."""
    engine = engine_of(accelerator)
    if engine not in ENGINES:
        raise ValueError(
            f"the engine {engine} is not supported. Use one process, DDP, FSDP2 or DeepSpeed, or drive "
            f"{type(optimizer).__name__} with accelerator.prepare alone, after passing batch_size (global) and "
            "epoch_size to the scheduler."
        )
    if engine == "FSDP" and getattr(accelerator.state.fsdp_plugin, "fsdp_version", 1) != 2:
        raise ValueError(FSDP1.format(1))
    for name, wanted in (("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DEEPSPEED")):
        if os.environ.get(name, "false").lower() == "true" and engine != wanted:
            raise ValueError(
                f"{wanted} was asked for ({name}=true), but Accelerate would silently train with the engine {engine}: "
                "it uses FSDP on accelerators only, and needs a launcher that starts ranks. On CPU choose DDP "
                f"or DeepSpeed, or unset {name}."
            )
    _check_launch(accelerator)
    if callable(hook := getattr(accelerator.ddp_handler, "comm_hook", None)):
        raise ValueError(
            f"Accelerate silently ignores comm_hook={hook!r}. Give DistributedDataParallelKwargs a member of "
            "DDPCommunicationHookType, or call accelerator.prepare and register_comm_hook yourself."
        )


def has_communication_hook(accelerator: Accelerator) -> bool:
    """Return whether Accelerate registers a communication hook on DDP modules. Local."""
    chosen = getattr(accelerator.ddp_handler, "comm_hook", None)
    return chosen is not None and chosen.value != "no"


def _check_launch(accelerator: Accelerator) -> None:
    """Raise ValueError if there are fewer ranks than were requested. Local."""
    here, asked = accelerator.num_processes, int(os.environ.get("WORLD_SIZE", "1"))
    # accelerate launch has set these, but RANK, which only the ranks that it starts have, is missing.
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ and "RANK" not in os.environ
    if asked > here:
        raise ValueError(
            f"{asked} ranks run (WORLD_SIZE), but Accelerate counts {here}: every rank would see all the data. "
            "Without a GPU set ACCELERATE_USE_CPU=true, or pass Accelerator(cpu=True). With DeepSpeed on CPU pass "
            'kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")] to Accelerator; with Trainer make '
            'PartialState(backend="gloo") and pass accelerator_config={"use_configured_state": True}. '
            "Otherwise do not create an Accelerator before the process group."
        )
    if here == 1 and launched:
        raise ValueError(
            "accelerate launch was asked for several processes and started one (on CPU it does not start ranks with "
            "--cpu or MULTI_CPU). Use ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N, or "
            "ACCELERATE_USE_CPU=true torchrun --nproc_per_node N. If one was asked for, unset MASTER_ADDR."
        )
