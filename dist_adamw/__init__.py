"""AdamW with warm restarts, scheduled by samples, on any engine and any number of ranks."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dist_adamw._version import __version__

if TYPE_CHECKING:
    from dist_adamw.checkpoint.async_saver import AsyncSaver
    from dist_adamw.checkpoint.folder import CheckpointFolder
    from dist_adamw.checkpoint.formats.exporting import export_checkpoint
    from dist_adamw.checkpoint.formats.importing import import_checkpoint
    from dist_adamw.checkpoint.save_load import Checkpoint, load, save
    from dist_adamw.errors import AgreementError, CheckpointError
    from dist_adamw.integrations.accelerate.position import position, rest_of_epoch
    from dist_adamw.integrations.accelerate.prepare import prepare
    from dist_adamw.integrations.deepspeed.configuration import register_deepspeed
    from dist_adamw.integrations.deepspeed.zero_state import prepare_deepspeed
    from dist_adamw.integrations.lightning.trainer import prepare_lightning
    from dist_adamw.integrations.transformers.trainer import prepare_trainer
    from dist_adamw.optimizer.adamw import DistAdamW
    from dist_adamw.optimizer.averages import EMA, Mean
    from dist_adamw.optimizer.replicas import check_replicas
    from dist_adamw.range_test.context import lr_range
    from dist_adamw.recipes.recipe import TrainingRecipe, from_recipe, load_recipe
    from dist_adamw.run_log.run_log import RunLog
    from dist_adamw.schedule.batch import GlobalBatch
    from dist_adamw.schedule.preview import Preview
    from dist_adamw.schedule.restarts import ExpReduceMaxLROnIteration, ReduceMaxLROnRestart, RestartSchedule
    from dist_adamw.schedule.scheduler import CyclicLRWithRestarts
    from dist_adamw.tracking.csv_file import csv_tracker
    from dist_adamw.tracking.tracking import Tracking

# Nothing is imported before it is used: torch.distributed.checkpoint alone takes most of a second.
_MODULE_OF = {
    "AgreementError": "errors",
    "AsyncSaver": "checkpoint.async_saver",
    "Checkpoint": "checkpoint.save_load",
    "CheckpointError": "errors",
    "CheckpointFolder": "checkpoint.folder",
    "CyclicLRWithRestarts": "schedule.scheduler",
    "DistAdamW": "optimizer.adamw",
    "EMA": "optimizer.averages",
    "ExpReduceMaxLROnIteration": "schedule.restarts",
    "GlobalBatch": "schedule.batch",
    "Mean": "optimizer.averages",
    "Preview": "schedule.preview",
    "ReduceMaxLROnRestart": "schedule.restarts",
    "RestartSchedule": "schedule.restarts",
    "RunLog": "run_log.run_log",
    "Tracking": "tracking.tracking",
    "TrainingRecipe": "recipes.recipe",
    "check_replicas": "optimizer.replicas",
    "csv_tracker": "tracking.csv_file",
    "export_checkpoint": "checkpoint.formats.exporting",
    "from_recipe": "recipes.recipe",
    "import_checkpoint": "checkpoint.formats.importing",
    "load": "checkpoint.save_load",
    "load_recipe": "recipes.recipe",
    "lr_range": "range_test.context",
    "position": "integrations.accelerate.position",
    "prepare": "integrations.accelerate.prepare",
    "prepare_deepspeed": "integrations.deepspeed.zero_state",
    "prepare_lightning": "integrations.lightning.trainer",
    "prepare_trainer": "integrations.transformers.trainer",
    "register_deepspeed": "integrations.deepspeed.configuration",
    "rest_of_epoch": "integrations.accelerate.position",
    "save": "checkpoint.save_load",
}
_PACKAGES = (
    "checking",
    "checkpoint",
    "integrations",
    "optimizer",
    "planning",
    "range_test",
    "ranks",
    "recipes",
    "run_log",
    "schedule",
    "tracking",
)
_MOVED = ("batch", "hooks", "policies", "scheduler", "storage")  # modules of 0.1.0, which forward

__all__ = [
    "EMA",
    "AgreementError",
    "AsyncSaver",
    "Checkpoint",
    "CheckpointError",
    "CheckpointFolder",
    "CyclicLRWithRestarts",
    "DistAdamW",
    "ExpReduceMaxLROnIteration",
    "GlobalBatch",
    "Mean",
    "Preview",
    "ReduceMaxLROnRestart",
    "RestartSchedule",
    "RunLog",
    "Tracking",
    "TrainingRecipe",
    "__version__",
    "check_replicas",
    "csv_tracker",
    "export_checkpoint",
    "from_recipe",
    "import_checkpoint",
    "load",
    "load_recipe",
    "lr_range",
    "position",
    "prepare",
    "prepare_deepspeed",
    "prepare_lightning",
    "prepare_trainer",
    "register_deepspeed",
    "rest_of_epoch",
    "save",
]


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    if name in _PACKAGES or name in _MOVED:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, *_PACKAGES]
