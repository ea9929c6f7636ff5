"""Refuse strategies, callbacks and settings with which training under Lightning would silently go wrong."""

from __future__ import annotations

import inspect
from typing import Any

from dist_adamw.integrations.transformers.arguments import refuse_batch_schedule
from dist_adamw.optimizer.adamw import DistAdamW
from dist_adamw.schedule.scheduler import CyclicLRWithRestarts
from dist_adamw.wrappers import unwrap

WHOLE = {"SingleDeviceStrategy", "DDPStrategy"}  # every rank has whole parameters
_STRATEGIES = {*WHOLE, "ModelParallelStrategy"}
_INSTEAD = {
    "FSDPStrategy": "It keeps FSDP1's flat parameters. Use ModelParallelStrategy, with fully_shard in configure_model",
    "DeepSpeedStrategy": "Use strategy='ddp', or Accelerate's DeepSpeed with dist_adamw.prepare",
}
_CALLBACKS = {
    "StochasticWeightAveraging": (
        "replaces the scheduler by SWALR. Leave it out, and pass averages={'ends': Mean()} to DistAdamW: the mean of "
        "the weights at the cycles' ends"
    ),
    "LearningRateFinder": (
        "replaces the scheduler and the groups' base lr (Tuner.lr_find adds it). Leave it out, and find the range with "
        "dist_adamw.lr_range or dist-adamw lr-range"
    ),
    "BatchSizeFinder": (
        "changes the batch for which the schedule was made (Tuner.scale_batch_size adds it). Run it in another job, "
        "without prepare_lightning, and pass the batch size that it found"
    ),
    "GradientAccumulationScheduler": (
        "changes the global batch during training, and the schedule has one. Pass "
        "Trainer(accumulate_grad_batches=...), or write the loop with Accelerate and dist_adamw.prepare, where "
        "batch_size can be a schedule"
    ),
}


def kinds_of(value: Any) -> set[str]:
    """Return the names of an object's class and its bases. Local."""
    return {cls.__name__ for cls in type(value).__mro__}


def check_strategy(strategy: Any) -> None:
    """Raise ValueError if the strategy is not supported. Local."""
    kinds = kinds_of(strategy)
    if kinds & _STRATEGIES:
        return
    how = next((text for name, text in _INSTEAD.items() if name in kinds), "Use one device, 'ddp' or FSDP2")
    raise ValueError(f"prepare_lightning does not support strategy {type(strategy).__name__}. {how}.")


def check_trainer(trainer: Any, module: Any) -> None:
    """Raise ValueError if the job does not work with the schedule or its checkpoints. Local."""
    check_strategy(trainer.strategy)
    for callback in trainer.callbacks:
        for name in kinds_of(callback) & _CALLBACKS.keys():
            raise ValueError(f"the callback {name} {_CALLBACKS[name]}.")
    if "AsyncCheckpointIO" in kinds_of(trainer.strategy.checkpoint_io):
        raise ValueError(
            "AsyncCheckpointIO would write a checkpoint's file after its folder of optimizer state, and a kill between "
            "them would leave neither the old nor the new one. Leave the plugin out: all ranks write in parallel."
        )
    if "dataloader_iter" in inspect.signature(module.training_step).parameters:
        raise ValueError(
            "training_step(dataloader_iter) fetches batches itself, so their samples cannot be counted. Take "
            "training_step(batch, batch_idx)."
        )


def check_configured(trainer: Any, module: Any) -> list[CyclicLRWithRestarts]:
    """Return the schedules that ``configure_optimizers`` returned. Local.

    Raises:
        ValueError: an optimizer or a schedule would not be used as intended.
    """
    schedules = []
    for config in trainer.lr_scheduler_configs:
        if not isinstance(scheduler := config.scheduler, CyclicLRWithRestarts):
            continue
        if module.automatic_optimization and (config.interval != "step" or config.frequency != 1):
            raise ValueError(
                f"the lr_scheduler has interval={config.interval!r} and frequency={config.frequency!r}, and "
                "CyclicLRWithRestarts must step after every update (Lightning's default is once an epoch). Return "
                '{"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}} from '
                "configure_optimizers."
            )
        refuse_batch_schedule(scheduler._scheduled.recipe.batch_schedule)
        scheduler._scheduled.check_batches = lambda recipe: refuse_batch_schedule(recipe.batch_schedule)
        schedules.append(scheduler)
    for optimizer in map(unwrap, trainer.optimizers):
        if isinstance(optimizer, DistAdamW) and optimizer.reproducible:
            raise ValueError(
                "reproducible=True is not supported under Lightning, which divides losses by the accumulation. Leave "
                "it out, or write the loop with Accelerate and dist_adamw.prepare."
            )
    return schedules
