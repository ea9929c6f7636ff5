"""Save everything that a range test changes, and restore it to the bit.

Weights, optimizer state, schedule, random state and position in the data go through a checkpoint in a temporary folder,
which works on every engine, also where a rank has a part of the state only and the layout changes in between. A
checkpoint has the main rank's buffers, and nothing of a data loader that no loop has used; both are kept in memory.
"""

from __future__ import annotations

import contextlib
import operator
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dist_adamw.optimizer.averages import AVERAGED
from dist_adamw.ranks import collectives
from dist_adamw.ranks.run_on_all import run_on_all_ranks
from dist_adamw.schedule.scheduler import CyclicLRWithRestarts
from dist_adamw.wrappers import unwrap

_COUNTERS = ("global_steps", "global_samples", "skipped_steps", "micro_steps")  # of a DeepSpeed engine
_OF_LOADERS = ("iteration", "epoch", "initial_seed", "_num_yielded")  # numbers in Accelerate's loaders and samplers
_PARTS_OF_LOADERS = ("base_dataloader", "batch_sampler", "sampler")


class Restorer:
    """A copy of a training state. Making it is collective, and so are `restore` and `discard`.

    Args:
        model: As it is trained.
        optimizer: Its optimizer.
        scheduler: Its scheduler, or None.
        loaders: Data loaders whose generators and counters to restore.
        accelerator: Accelerate's, which then saves and loads everything that it has prepared or was registered with it.
        folder: An existing folder that all ranks share, for the copy; None: the system's for temporary files.
        group: The ranks.

    Attributes:
        path: The checkpoint.
        how_to_load: The function that reads it.

    Raises:
        CheckpointError: the state could not be saved; on every rank, and nothing is left behind.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        scheduler: LRScheduler | None,
        loaders: list[Any],
        accelerator: Any,
        folder: str | Path | None,
        group: dist.ProcessGroup | None,
    ) -> None:
        self._model, self._optimizer, self._scheduler = model, optimizer, scheduler
        self._accelerator, self._group = accelerator, group
        self._buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers() if not buffer.is_meta]
        self._undo = [*_counters(model), *_flags(scheduler), *_group_options(unwrap(optimizer))]
        for loader in loaders:
            self._undo += _loader_state(loader, set())
        self._folder = _shared_folder(folder, group)
        self.path = self._folder / "state"
        self.how_to_load = "dist_adamw.load" if accelerator is None else "accelerator.load_state"
        try:
            self._save(self.path)
        except BaseException:
            self.discard()
            raise

    def restore(self) -> None:
        """Restore everything. Collective.

        Raises:
            CheckpointError: the copy was damaged meanwhile; on every rank.
        """
        if self._accelerator is not None:
            # Trusted: this job has just written it, into a folder that only this user can write to.
            self._accelerator.load_state(str(self.path), load_kwargs={"weights_only": False})
        else:
            from dist_adamw.checkpoint.save_load import load  # slow to import

            load(
                self.path,
                self._model,
                self._optimizer,
                self._scheduler,
                on_difference="strict",
                group=self._group,
            )
        with torch.no_grad():
            for buffer, value in self._buffers:
                buffer.copy_(value)
        for undo in self._undo:
            undo()

    def discard(self) -> None:
        """Delete the copy. Collective."""
        is_main = collectives.rank(self._group) == 0
        run_on_all_ranks(lambda: None, self._group)  # all have read it
        run_on_all_ranks(lambda: shutil.rmtree(self._folder, ignore_errors=True) if is_main else None, self._group)

    def _save(self, path: Path) -> None:
        if self._accelerator is not None:
            with _to_any_folder(self._accelerator):
                self._accelerator.save_state(str(path))
            return
        from dist_adamw.checkpoint.save_load import save

        save(path, self._model, self._optimizer, self._scheduler, group=self._group)


@contextlib.contextmanager
def _to_any_folder(accelerator: Any) -> Iterator[None]:
    """Have ``save_state`` write to the given folder, and neither count nor delete the numbered checkpoints."""
    config = accelerator.project_configuration
    before = config.automatic_checkpoint_naming, config.iteration
    config.automatic_checkpoint_naming = False
    try:
        yield
    finally:
        config.automatic_checkpoint_naming, config.iteration = before


def _shared_folder(parent: str | Path | None, group: dist.ProcessGroup | None) -> Path:
    """Create a folder that every rank sees; raise on every rank if one does not. Collective."""
    is_main = collectives.rank(group) == 0

    def make() -> str | None:
        if not is_main:
            return None
        return tempfile.mkdtemp(prefix="lr_range_", dir=None if parent is None else Path(parent).expanduser())

    made = run_on_all_ranks(make, group)
    folder = Path(collectives.all_gather_objects(made, group)[0])
    is_there = collectives.all_gather_objects(folder.is_dir(), group)
    if not all(is_there):
        if is_main:
            shutil.rmtree(folder, ignore_errors=True)
        raise ValueError(
            f"rank {is_there.index(False)} does not see {folder}, to which the state is to be saved: pass folder=<a "
            "folder that all machines share>."
        )
    return folder


def _counters(model: Any) -> Iterator[Callable[[], object]]:
    """Yield functions that restore a DeepSpeed engine's counters. Local."""
    if hasattr(model, "zero_optimization_stage"):
        for name in _COUNTERS:
            if hasattr(model, name):
                yield partial(setattr, model, name, getattr(model, name))


def _flags(scheduler: Any) -> Iterator[Callable[[], object]]:
    """Yield functions that restore what no checkpoint has of a schedule. Local."""
    if isinstance(scheduler, CyclicLRWithRestarts):
        yield partial(setattr, scheduler, "_step_count", scheduler._step_count)
        yield partial(setattr, scheduler._scheduled, "has_crossed", scheduler._scheduled.has_crossed)


def _group_options(optimizer: Optimizer) -> Iterator[Callable[[], object]]:
    """Yield functions that restore the groups' options, which a load converts to plain numbers. Local."""
    # lr and weight decay are the schedule's, which knows the very objects that it wrote.
    for group in optimizer.param_groups:
        for name, value in group.items():
            if name not in ("params", "lr", "weight_decay", AVERAGED):  # counts are written by the save, and loaded
                yield partial(operator.setitem, group, name, value)


def _loader_state(part: Any, seen: set[int]) -> Iterator[Callable[[], object]]:
    """Yield functions that restore generators and counters of a loader and of what is inside it. Local."""
    if part is None or id(part) in seen or isinstance(part, Tensor):
        return
    seen.add(id(part))
    for name in ("generator", "synchronized_generator"):
        generator = getattr(part, name, None)
        if isinstance(generator, torch.Generator) and id(generator) not in seen:
            seen.add(id(generator))
            yield partial(generator.set_state, generator.get_state())
    for name in _OF_LOADERS:
        if type(value := getattr(part, name, None)) is int:
            yield partial(setattr, part, name, value)
    for name in _PARTS_OF_LOADERS:
        yield from _loader_state(getattr(part, name, None), seen)
