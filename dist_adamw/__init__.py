"""AdamWR, written once in samples, on any engine and any number of ranks."""

from dist_adamw._version import __version__
from dist_adamw.checkpoint.async_saver import AsyncSaver
from dist_adamw.checkpoint.folder import CheckpointFolder
from dist_adamw.checkpoint.formats.exporting import export_checkpoint
from dist_adamw.checkpoint.formats.importing import import_checkpoint
from dist_adamw.checkpoint.save_load import Checkpoint, load, save
from dist_adamw.errors import AgreementError, CheckpointError
from dist_adamw.integrations.accelerate.position import position, rest_of_epoch
from dist_adamw.integrations.accelerate.prepare import prepare
from dist_adamw.integrations.deepspeed.register import register_deepspeed
from dist_adamw.integrations.deepspeed.zero import prepare_deepspeed
from dist_adamw.integrations.transformers.trainer import prepare_trainer
from dist_adamw.optimizer.adamw import DistAdamW
from dist_adamw.optimizer.replicas import check_replicas
from dist_adamw.schedule.batch import GlobalBatch
from dist_adamw.schedule.preview import Preview
from dist_adamw.schedule.restarts import ExpReduceMaxLROnIteration, ReduceMaxLROnRestart, RestartSchedule
from dist_adamw.schedule.scheduler import CyclicLRWithRestarts

__all__ = [
    "AgreementError",
    "AsyncSaver",
    "Checkpoint",
    "CheckpointError",
    "CheckpointFolder",
    "CyclicLRWithRestarts",
    "DistAdamW",
    "ExpReduceMaxLROnIteration",
    "GlobalBatch",
    "Preview",
    "ReduceMaxLROnRestart",
    "RestartSchedule",
    "__version__",
    "check_replicas",
    "export_checkpoint",
    "import_checkpoint",
    "load",
    "position",
    "prepare",
    "prepare_deepspeed",
    "prepare_trainer",
    "register_deepspeed",
    "rest_of_epoch",
    "save",
]
