"""What an accelerator does after ``prepare``: ``save_state``, ``load_state`` and clipping, for what was prepared.

Floor 4: knows Accelerate.

Nothing here keeps a model, an optimizer or a loader that ``accelerator.free_memory()`` has let go, or an accelerator
that nobody has any more: if the garbage collector has to end a loader's workers, it waits for 5 seconds for each.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from dist_adamw import collectives
from dist_adamw.checkpoint import check_alike, everywhere, load, save
from dist_adamw.folder import fingerprint
from dist_adamw.held import bare
from dist_adamw.index import INDEX, CheckpointError, read_index
from dist_adamw.integrations.data import Position, engine_of
from dist_adamw.integrations.zero import accept_counts
from dist_adamw.optimizer import DistAdamW
from dist_adamw.random_state import restore_random_state
from dist_adamw.replicas import ReplicaWatch
from dist_adamw.scheduler import CyclicLRWithRestarts

if TYPE_CHECKING:
    from accelerate import Accelerator

FOLDER = "dist_adamw"
_METHODS = ("save_state", "load_state", "clip_grad_norm_", "clip_grad_value_")  # of AfterPrepare
# What Accelerate writes; other files in a folder may change as they like.
_THEIRS = (
    *("custom_checkpoint_*.pkl", "scaler.pt", "random_states_*.pkl", "sampler*.bin", "dl_state_dict*.bin"),
    *("model*.safetensors", "pytorch_model*.bin", "optimizer*.bin", "scheduler*.bin"),
)


@dataclass(eq=False, slots=True)
class Prepared:
    """What goes with an optimizer that `prepare` returned, and is kept by it.

    Attributes:
        model: As prepared.
        stepped: What Accelerate has among its schedulers. It has the optimizer, hence weak.
        scheduler: Itself.
        place: In the data.
        watch: What compares ranks; None for one rank.
        group: For messages on the host.
        clipping: To which norm DeepSpeed clips; None where it does not run.
        loaded_at: The clock at the last load.
    """

    model: nn.Module
    stepped: weakref.ref[Any]
    scheduler: CyclicLRWithRestarts
    place: Position
    watch: ReplicaWatch | None
    group: dist.ProcessGroup | None
    clipping: float | None
    loaded_at: int | None = None


def keep(accelerator: Accelerator, optimizer: Optimizer, prepared: Prepared) -> None:
    """Have ``accelerator.save_state`` and the like know of an optimizer that it has prepared. Local."""
    optimizer.dist_adamw_prepared = prepared  # type: ignore[attr-defined]
    take_over(accelerator)


def take_over(accelerator: Accelerator, attached: DistAdamW | None = None) -> None:
    """Give an accelerator the methods of `AfterPrepare`. Local.

    By its class, as ``fully_shard`` does it: a function among its attributes that calls its own method would keep it.

    Args:
        accelerator: Any; what somebody has put in the place of one of its methods is done where Accelerate's would be.
        attached: An optimizer whose gradients are now reduced to their owners.
    """
    ours: Any = accelerator
    if not isinstance(accelerator, AfterPrepare):
        cls = type(accelerator)
        names = [name for name in _METHODS if name in vars(accelerator) or not hasattr(cls, name)]
        rest = {name: getattr(accelerator, name) for name in names}
        for name in names:
            vars(accelerator).pop(name, None)
        accelerator.__class__ = _with_ours_first(cls)  # type: ignore[arg-type]
        ours.dist_adamw_rest, ours.dist_adamw_attached = rest, []
    if attached is not None:
        ours.dist_adamw_attached.append(weakref.ref(attached))


@cache
def _with_ours_first(cls: type) -> type:
    return type(cls.__name__, (AfterPrepare, cls), {"__module__": cls.__module__})


class AfterPrepare:
    """Methods of an ``Accelerator`` after ``prepare``; a class of its own is in front of Accelerate's.

    ``save_state`` and ``load_state`` keep models, optimizers and schedules our way, and the rest Accelerate's, whose
    own files of those three are pickles of one engine and number of ranks. What it keeps beside them (custom objects, a
    scaler, random state for older readers) stays.

    Attributes:
        dist_adamw_rest: What is done instead of Accelerate's own, by name of the method.
        dist_adamw_attached: Optimizers that have gradients reduced to their owners.
    """

    dist_adamw_rest: dict[str, Callable[..., Any]]
    dist_adamw_attached: list[weakref.ref[DistAdamW]]

    def __init_subclass__(cls) -> None:
        """Nothing: what Accelerate's class asks of its subclasses is not meant for this one."""

    def _rest(self, name: str) -> Any:
        return self.dist_adamw_rest[name] if name in self.dist_adamw_rest else getattr(super(), name)

    def save_state(self: Any, output_dir: str | None = None, *args: Any, **kwargs: Any) -> Any:
        """As Accelerate's, of what `prepare` returned in any engine's and number of ranks' terms. Collective."""
        save_rest, ours = self._rest("save_state"), _known(self)
        if not ours:
            return save_rest(output_dir, *args, **kwargs)
        for one in ours.values():
            if one.watch is not None:
                one.watch.before_save()
        group = next(iter(ours.values())).group
        output_dir = None if output_dir is None else str(Path(output_dir).expanduser())
        config = self.project_configuration
        limit, config.total_limit = config.total_limit, None  # Accelerate would delete the oldest before it writes
        try:
            with _hidden(self, ours):
                where = everywhere(lambda: Path(save_rest(output_dir, *args, **kwargs)), group)
        finally:
            config.total_limit = limit
        main = self.is_main_process
        everywhere(lambda: _remove_older_objects(self, where) if main else None, group)
        files = everywhere(lambda: _files_of(where) if main else {}, group)
        for optimizer, one in ours.items():
            extra = everywhere(partial(_extra_of, self, one, files), group)
            # Last: when it is whole, all of it is there.
            folder = where / _folder_of(self, optimizer)
            save(folder, one.model, optimizer, one.scheduler, extra=extra, compare_ranks=False, group=group)
        if config.automatic_checkpoint_naming and limit is not None and main:
            others = [path for path in _numbered(where.parent) if path != where]
            for old in others[: max(0, len(others) + 1 - max(limit, 1))]:
                shutil.rmtree(old, ignore_errors=True)
        return where

    def load_state(self: Any, input_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        """As Accelerate's, of what was saved on any engine and number of ranks. Collective.

        What is of this is checked before anything is loaded, but for another model's: that, before it is.
        """
        load_rest, ours = self._rest("load_state"), _known(self)
        where = Path(input_dir).expanduser() if input_dir is not None else _newest_of(self) if ours else Path()
        ours = {
            optimizer: one
            for optimizer, one in ours.items()
            if any(collectives.all_gather_objects(os.path.exists(where / _folder_of(self, optimizer)), one.group))
        }
        if not ours:
            load_rest(input_dir, *args, **kwargs)
            return
        group = next(iter(ours.values())).group
        for one in ours.values():
            if one.watch is not None:
                one.watch.settle()
        folders = {optimizer: where / _folder_of(self, optimizer) for optimizer in ours}
        for folder in folders.values():
            check_alike(folder, group)
        everywhere(lambda: _check_custom_objects(self, where), group)
        for of, one in ours.items():
            everywhere(partial(_check_extra, folders[of], one.place), group)
        loaded = {
            of: load(folders[of], one.model, of, one.scheduler, random_state=False, group=group)
            for of, one in ours.items()
        }
        with _hidden(self, ours):
            everywhere(lambda: load_rest(str(where), *args, **kwargs), group)
        newest = [*folders.values()][-1]
        everywhere(lambda: restore_random_state(read_index(newest)), group)  # Accelerate's has that of some ranks
        for of, one in ours.items():
            extra, place = loaded[of].extra, one.place
            everywhere(partial(place.load_state_dict, extra.get("position")), group)
            one.loaded_at = one.scheduler.samples
            if engine_of(self) == "DEEPSPEED":
                accept_counts(one.model, loaded[of])
            self.step = extra.get("step", 0) // place.facts.pass_samples
        if where in (numbered := _numbered(where.parent)) and where.parent == _automatic(self):
            # The next is to be the newest, also for Accelerate.
            self.project_configuration.iteration = _number(numbered[-1]) + 1

    def clip_grad_norm_(
        self: Any, parameters: Tensor | Iterable[Tensor], max_norm: float, norm_type: float = 2
    ) -> Tensor | None:
        """As Accelerate's, by the norm of the whole model where each rank has a part of it. Collective."""
        params = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        for one in _known(self).values():
            if one.clipping not in (None, max_norm):
                warnings.warn(
                    f"accelerator.clip_grad_norm_(max_norm={max_norm}) does not clip under DeepSpeed, whose "
                    f"gradient_clipping is {one.clipping} (0.0: none). Pass max_grad_norm={max_norm} to DistAdamW, or "
                    "write it into the DeepSpeed configuration.",
                    stacklevel=2,
                )
        if self.sync_gradients and (attached := _attached(self, params)):
            return attached[-1].clip_grad_norm_(max_norm, norm_type, params)
        return self._rest("clip_grad_norm_")(params, max_norm, norm_type)  # type: ignore[no-any-return]

    def clip_grad_value_(self: Any, parameters: Tensor | Iterable[Tensor], clip_value: float) -> None:
        """As Accelerate's. Local."""
        params = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        self._rest("clip_grad_value_")(params, clip_value)
        for optimizer in _attached(self, params):
            optimizer.accept_gradients()


def _known(accelerator: Any) -> dict[Optimizer, Prepared]:
    """What `prepare` has put together, and Accelerate has not forgotten. Local."""
    optimizers = accelerator._optimizers
    return {one: one.dist_adamw_prepared for one in optimizers if hasattr(one, "dist_adamw_prepared")}


def _folder_of(accelerator: Accelerator, optimizer: Optimizer) -> str:
    number = next(i for i, known in enumerate(accelerator._optimizers) if known is optimizer)
    return FOLDER if number == 0 else f"{FOLDER}_{number}"


def _attached(accelerator: AfterPrepare, params: list[Tensor]) -> list[DistAdamW]:
    """Optimizers that have some of these parameters' gradients reduced to their owners. Local."""
    chosen = {id(param) for param in params}
    known = [optimizer for one in accelerator.dist_adamw_attached if (optimizer := one()) is not None]
    return [one for one in known if any(id(param) in chosen for group in one.param_groups for param in group["params"])]


@contextlib.contextmanager
def _hidden(accelerator: Accelerator, ours: dict[Optimizer, Prepared]) -> Iterator[None]:
    """Have Accelerate keep what is not ours. Its hooks see every model."""
    lists = (accelerator._models, accelerator._optimizers, accelerator._schedulers)
    before = [list(known) for known in lists]
    hooks = (accelerator._save_model_state_pre_hook, accelerator._load_model_state_pre_hook)
    kept = [dict(of) for of in hooks]
    for of in hooks:  # those that write adapters take one weight for each model
        for key, hook in of.items():
            of[key] = partial(_with_all_models, hook, before[0])
    hidden = {id(one) for of, p in ours.items() for one in (p.model, bare(p.model), of, p.stepped())}
    for known in lists:
        known[:] = [one for one in known if id(one) not in hidden]
    try:
        yield
    finally:
        for known, all_of_them in zip(lists, before, strict=True):
            known[:] = all_of_them
        for of, all_of_these in zip(hooks, kept, strict=True):
            of.clear()
            of.update(all_of_these)


def _with_all_models(hook: Any, models: list[nn.Module], _: Any, *rest: Any) -> None:
    """Call a hook of ``save_state`` (models, weights, folder) or ``load_state`` (models, folder)."""
    told = [[None] * len(models)] if len(rest) == 2 else []
    hook(list(models), *told, rest[-1])


def _check_custom_objects(accelerator: Accelerator, folder: Path) -> None:
    """What Accelerate would find out when all else has been loaded. Local."""
    found = len([*folder.glob("custom_checkpoint_*.pkl")])
    if found != len(accelerator._custom_objects):
        raise CheckpointError(
            f"{folder} has the state of {found} custom objects, and {len(accelerator._custom_objects)} are registered. "
            "Register the same ones (register_for_checkpointing)."
        )


def _remove_older_objects(accelerator: Accelerator, where: Path) -> None:
    """Remove what an earlier save to this folder wrote of more custom objects than there are. Local."""
    custom = {f"custom_checkpoint_{i}.pkl" for i in range(len(accelerator._custom_objects))}
    for path in where.glob("custom_checkpoint_*.pkl"):
        if path.name not in custom:
            path.unlink()


def _files_of(where: Path) -> dict[str, Any]:
    """Size and checksum of what Accelerate has written beside ours. Local."""
    return {path.name: fingerprint(path) for pattern in _THEIRS for path in where.glob(pattern) if path.is_file()}


def _extra_of(accelerator: Accelerator, one: Prepared, files: dict[str, Any]) -> dict[str, Any]:
    """What is saved beside the tensors: the place in the data, and what Accelerate's files are. Local."""
    pending = 0 if accelerator.sync_gradients else accelerator.step % accelerator.gradient_accumulation_steps
    # Accelerate's count of micro-batches is of use only where updates cross epoch ends.
    across = not accelerator.gradient_state.sync_with_dataloader
    count = (accelerator.step - pending) * one.place.facts.pass_samples if across else 0
    # A job that goes on without rest_of_epoch knows itself where it is.
    left = one.place.is_gone or (one.place.idle and one.loaded_at not in (None, one.scheduler.samples))
    return {"position": None if left else one.place.state_dict(pending), "step": count, "files": files}


def _check_extra(folder: Path, place: Position) -> None:
    """Raise where what `save_state` said beside the tensors cannot be gone on with. Local.

    Files of another save than ours are what a kill between the two leaves.
    """
    where, extra = folder.parent, read_index(folder).about.get("extra", {})
    files = extra.get("files", {}) if isinstance(extra, dict) else None
    if not isinstance(files, dict) or not isinstance(extra.get("step", 0), int):
        raise CheckpointError(f"{folder} is damaged: what save_state adds is {str(extra)[:200]}.")
    for name, facts in files.items():
        path = where / name
        if not path.resolve().is_relative_to(where.resolve()) or not path.is_file() or fingerprint(path) != facts:
            raise CheckpointError(
                f"{where} is not of one save: {name} is not what was saved with {folder.name}. Load an older "
                "checkpoint."
            )
    place.check(extra.get("position"))


def _newest_of(accelerator: Accelerator) -> Path:
    """What ``load_state()`` takes under automatic checkpoint naming: the newest that was written to the end."""
    numbered = _numbered(folder := _automatic(accelerator))
    if not accelerator.project_configuration.automatic_checkpoint_naming or not numbered:
        raise ValueError(f"no checkpoint was named, and {folder} has none. Pass load_state(<folder>).")
    whole = [path for path in numbered if any(path.glob(f"{FOLDER}*/{INDEX}"))] or numbered
    if whole[-1] != numbered[-1]:
        warnings.warn(f"{numbered[-1]} was not written to the end: {whole[-1]} is loaded.", stacklevel=3)
    return whole[-1]


def _automatic(accelerator: Accelerator) -> Path:
    """Where Accelerate keeps the checkpoints that it names."""
    return Path(accelerator.project_dir or ".") / "checkpoints"


def _number(path: Path) -> int:
    return int(path.name.removeprefix("checkpoint_"))


def _numbered(folder: Path) -> list[Path]:
    """Checkpoints that Accelerate has named, oldest first."""
    found = [path for path in folder.glob("checkpoint_*") if path.name.removeprefix("checkpoint_").isdecimal()]
    return sorted(found, key=_number)
