"""AdamWR, written once in samples, on any engine and any number of ranks."""

from dist_adamw._version import __version__
from dist_adamw.batch import GlobalBatch
from dist_adamw.checkpoint import AsyncSaver, Checkpoint, load, save
from dist_adamw.collectives import AgreementError
from dist_adamw.convert import export_checkpoint, import_checkpoint
from dist_adamw.folder import CheckpointFolder
from dist_adamw.index import CheckpointError
from dist_adamw.integrations.accelerate import prepare
from dist_adamw.integrations.deepspeed import register_deepspeed
from dist_adamw.integrations.position import position, rest_of_epoch
from dist_adamw.integrations.transformers import prepare_trainer
from dist_adamw.integrations.zero import prepare_deepspeed
from dist_adamw.optimizer import DistAdamW
from dist_adamw.preview import Preview
from dist_adamw.replicas import check_replicas
from dist_adamw.schedule import ExpReduceMaxLROnIteration, ReduceMaxLROnRestart, RestartSchedule
from dist_adamw.scheduler import CyclicLRWithRestarts

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
