"""Save every rank's share of the optimizer beside Lightning's checkpoint file, and resume on any number of ranks.

Next to ``last.ckpt``, which has a note in place of the optimizer's state, lies a folder that `dist_adamw.save` has
written: ``last.ckpt.dist_adamw/<step>-<token>/``. The file names the folder, is written after it, and older folders are
removed last: a kill at any instant leaves a file with its folder.
"""

from __future__ import annotations

import re
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from torch.optim import Optimizer

from dist_adamw.checkpoint.random_state import restore_random_state
from dist_adamw.checkpoint.save_load import load, save
from dist_adamw.checkpoint.storage.index import read_index
from dist_adamw.errors import CheckpointError
from dist_adamw.integrations.lightning.checks import WHOLE, kinds_of
from dist_adamw.optimizer.adamw import DistAdamW
from dist_adamw.optimizer.state_dict import ELSEWHERE
from dist_adamw.ranks import collectives
from dist_adamw.ranks.run_on_all import run_on_all_ranks
from dist_adamw.schedule.saved import OnDifference
from dist_adamw.schedule.scheduler import CyclicLRWithRestarts
from dist_adamw.wrappers import unwrap

KEY = "dist_adamw"  # in Lightning's file: the name of the folder
_SUFFIX = ".dist_adamw"
_NAME = re.compile(r"\d+-[0-9a-f]{8}")


class _Saved(NamedTuple):
    """What a folder holds: the only optimizer, and its schedule if that is ours."""

    optimizer: Optimizer
    scheduler: CyclicLRWithRestarts | None


def folders_of(file: Path) -> Path:
    """Return the folder with the folders that belong to a checkpoint file. Local."""
    return file.with_name(file.name + _SUFFIX)


class Checkpoints:
    """Replace the methods of a strategy that save and load. Local.

    Strategies that shard the weights keep their own checkpoints, which load on any number of ranks. They update once
    with lr 0 when they load, for which the schedule must know its sizes.

    Args:
        trainer: Lightning's Trainer.
        before_save: Compares ranks before anything is written. Collective.
        on_difference: See `dist_adamw.load`.
        after_load: Called after a state was loaded.
    """

    def __init__(
        self,
        trainer: Any,
        before_save: Callable[[], None],
        on_difference: OnDifference | None,
        after_load: Callable[[], None],
    ) -> None:
        self._trainer, self._before_save, self._on_difference = trainer, before_save, on_difference
        self._after_load = after_load
        self._found: Path | None = None  # the folder of the checkpoint that is being loaded
        self._saving_to: str | None = None  # the folder's name, while Lightning saves a checkpoint
        strategy = trainer.strategy
        if not kinds_of(strategy) & WHOLE:
            self._load = type(strategy).load_checkpoint.__get__(strategy)
            strategy.load_checkpoint = self.load_sharded
            return
        # Through the class: an earlier fit may have replaced the instance's methods.
        self._save, self._load, self._remove, self._state_of, self._load_states = (
            getattr(type(strategy), name).__get__(strategy)
            for name in (
                "save_checkpoint",
                "load_checkpoint",
                "remove_checkpoint",
                "optimizer_state",
                "load_optimizer_state_dict",
            )
        )
        trainer.save_checkpoint = self.save
        strategy.save_checkpoint, strategy.load_checkpoint = self.save_checkpoint, self.load_checkpoint
        strategy.remove_checkpoint = self.remove_checkpoint
        strategy.optimizer_state, strategy.load_optimizer_state_dict = self.optimizer_state, self.load_states

    def _only(self) -> _Saved | None:
        """Return the optimizer that a folder can hold; None if there are several. Local."""
        strategy = self._trainer.strategy
        if len(strategy.optimizers) != 1:
            return None
        schedulers = [config.scheduler for config in strategy.lr_scheduler_configs]
        ours = [scheduler for scheduler in schedulers if isinstance(scheduler, CyclicLRWithRestarts)]
        return _Saved(unwrap(strategy.optimizers[0]), ours[0] if len(ours) == 1 else None)

    def _to_save(self) -> _Saved | None:
        only = self._only()
        return only if only is not None and isinstance(only.optimizer, DistAdamW) else None

    def save(self, filepath: Any, *args: Any, **kwargs: Any) -> None:
        """Save as ``Trainer.save_checkpoint`` does, without gathering a state that goes to a folder. Collective."""
        self._saving_to = folders_of(Path(filepath)).name
        try:
            type(self._trainer).save_checkpoint(self._trainer, filepath, *args, **kwargs)
        finally:
            self._saving_to = None

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Return what Lightning gathers; while a checkpoint is saved, a note if the state goes to a folder.

        Hooks ``on_save_checkpoint`` see the note. Collective.
        """
        if self._saving_to is not None and self._to_save() is not None:
            return _note(self._saving_to)
        state: dict[str, Any] = self._state_of(optimizer)
        return state

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Save the folder, then Lightning's file. Collective.

        Raises:
            CheckpointError: one of them could not be written, or the path is not local; on every rank.
        """
        self._before_save()
        state = self._to_save()
        if state is None or "optimizer_states" not in checkpoint:  # the latter with save_weights_only
            self._save(checkpoint, filepath, storage_options=storage_options)
            return
        strategy = self._trainer.strategy
        # Ranks may have made other names, from metrics that are not reduced.
        path, token = strategy.broadcast((str(filepath), secrets.token_hex(4)))
        folders = folders_of(_local(path))
        name = f"{self._trainer.global_step}-{token}"
        save(folders / name, strategy.model, state.optimizer, state.scheduler, compare_ranks=False)
        whole = {**checkpoint, "optimizer_states": [_note(folders.name)], KEY: name}
        # Lightning writes on rank 0; if that fails, all ranks raise.
        run_on_all_ranks(lambda: self._save(whole, filepath, storage_options=storage_options), _group())
        if strategy.is_global_zero:
            for old in folders.iterdir():
                if old.name != name and _NAME.fullmatch(old.name):
                    shutil.rmtree(old, ignore_errors=True)

    def remove_checkpoint(self, filepath: Any) -> None:
        """Remove Lightning's file, then its folders. Local."""
        self._remove(filepath)
        if self._trainer.strategy.is_global_zero and "://" not in str(filepath):
            shutil.rmtree(folders_of(Path(filepath)), ignore_errors=True)

    def load_checkpoint(self, checkpoint_path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read Lightning's file, and find its folder. Collective when fitting.

        Raises:
            CheckpointError: the folder is not there, or this job has several optimizers; on every rank.
        """
        loaded: dict[str, Any] = self._load(checkpoint_path, *args, **kwargs)
        self._found = None
        if KEY in loaded and self._trainer.state.fn == "fit":
            self._found = run_on_all_ranks(lambda: self._find(checkpoint_path, loaded[KEY]), _group())
        return loaded

    def load_sharded(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Set the schedule's sizes, then load as the strategy does. Collective."""
        loop = self._trainer.fit_loop
        if self._trainer.state.fn == "fit":
            loop.setup_data()
            loop._combined_loader = None  # made again after the load, with a loader's own state
        loaded: dict[str, Any] = self._load(*args, **kwargs)
        return loaded

    def _find(self, checkpoint_path: Any, name: Any) -> Path:
        if not (isinstance(name, str) and _NAME.fullmatch(name)):
            raise CheckpointError(f"{checkpoint_path} is damaged: it names {name!r} as its folder of optimizer state.")
        folder = folders_of(_local(str(checkpoint_path)).resolve()) / name  # last.ckpt may be a link
        if not folder.is_dir():
            raise CheckpointError(
                f"{checkpoint_path} has its optimizer state in {folder}, which is not there. Copy the folder "
                f"{folder.parent.name} together with the file, or resume from another checkpoint."
            )
        return folder

    def load_states(self, checkpoint: Any) -> None:
        """Load weights, optimizer, schedule and random state from the folder. Collective.

        Lightning has restored its loops by now. The training data is set up first, since it defines the schedule's
        sizes, and before that the random state, from which a shuffling loader draws its seed.

        Raises:
            CheckpointError: see `dist_adamw.load`; or the job has several optimizers. On every rank.
        """
        folder, self._found = self._found, None
        if folder is None:
            self._load_states(checkpoint)
            return
        only = self._only()
        if only is None:
            raise CheckpointError(
                f"{folder.parent} holds the state of one optimizer, and configure_optimizers has returned "
                f"{len(self._trainer.optimizers)}. Return the optimizer that was saved."
            )
        run_on_all_ranks(lambda: restore_random_state(read_index(folder)), _group())
        self._trainer.fit_loop.setup_data()
        load(
            folder,
            self._trainer.strategy.model,
            only.optimizer,
            only.scheduler,
            on_difference=self._on_difference,
            random_state=False,
        )
        self._after_load()


def _note(folder: str) -> dict[str, Any]:
    """Return what stands in Lightning's file for the optimizer's state; loading it raises. Local."""
    told = (
        f"the optimizer's state is in the folder {folder} next to the checkpoint. Call "
        "dist_adamw.prepare_lightning(trainer) before trainer.fit(ckpt_path=...)."
    )
    return {ELSEWHERE: told}


def _group() -> Any:
    return collectives.host_group()


def _local(path: str) -> Path:
    if "://" in path:
        raise CheckpointError(
            f"{path} is not a path of a file system, to which every rank could write its share of the optimizer. "
            "Give ModelCheckpoint a dirpath on a shared file system, or pass DistAdamW(shard=False) without "
            "prepare_lightning."
        )
    return Path(path)
