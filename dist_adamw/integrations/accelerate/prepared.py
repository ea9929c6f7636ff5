"""Replace the accelerator's ``save_state``, ``load_state`` and gradient clipping, after ``prepare``.

Knows Accelerate.

Nothing here keeps a model, an optimizer or a loader alive that ``accelerator.free_memory()`` has let go, nor an
accelerator that is not referenced any more: where the garbage collector ends a loader's workers, that takes 5 s each.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import sys
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dist_adamw.checkpoint.manifest import fingerprint
from dist_adamw.checkpoint.storage.index import INDEX, check_alike, read_index
from dist_adamw.errors import CheckpointError
from dist_adamw.integrations.accelerate.counting import SampleCounter
from dist_adamw.integrations.accelerate.data import engine_of
from dist_adamw.integrations.accelerate.position import Position
from dist_adamw.integrations.accelerate.state import check_pickles, is_trusted, reading_safely
from dist_adamw.optimizer.adamw import DistAdamW
from dist_adamw.optimizer.replicas import ReplicaWatch
from dist_adamw.ranks import collectives
from dist_adamw.ranks.together import everywhere
from dist_adamw.wrappers import bare

if TYPE_CHECKING:
    from accelerate import Accelerator

FOLDER = "dist_adamw"
# What Accelerate writes; other files in a folder may change as they like.
_THEIRS = (
    *("custom_checkpoint_*.pkl", "scaler.pt", "random_states_*.pkl", "sampler*.bin", "dl_state_dict*.bin"),
    *("model*.safetensors", "pytorch_model*.bin", "optimizer*.bin", "scheduler*.bin"),
)


class Prepared:
    """The objects of one `prepare`. It holds them weakly: Accelerate keeps them, for as long as it knows them.

    Args:
        model: As prepared; Accelerate has it, or what is in it.
        optimizer: As prepared.
        stepped: What Accelerate has among its schedulers.
        scheduler: Itself.
        place: In the data.
        watch: What compares ranks; None for one rank.
        group: For messages on the host.
        clipping: To which norm DeepSpeed clips; None where it does not run.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        stepped: Any,
        scheduler: LRScheduler,
        place: Position,
        watch: ReplicaWatch | None,
        group: dist.ProcessGroup | None,
        clipping: float | None,
    ) -> None:
        self._model, self._bare = weakref.ref(model), weakref.ref(bare(model))
        self._optimizer, self._stepped, self._scheduler = map(weakref.ref, (optimizer, stepped, scheduler))
        self._watch = None if watch is None else weakref.ref(watch)
        self.place, self.group, self.clipping = place, group, clipping
        self.loaded_at: int | None = None  # the schedule's clock at the last load

    def is_of(self, optimizer: Optimizer | None) -> bool:
        """Return whether this goes with ``optimizer``; with None: with one that is gone. Local."""
        return self._optimizer() is optimizer

    def known(self, number: int) -> Known | None:
        """Return the objects of the ``number``-th optimizer; None where one of them is gone. Local."""
        model, optimizer, scheduler = self._model(), self._optimizer(), self._scheduler()
        model = self._bare() if model is None else model  # of a wrapper that is gone
        if model is None or optimizer is None or scheduler is None:
            return None
        name = FOLDER if number == 0 else f"{FOLDER}_{number}"
        watch = None if self._watch is None else self._watch()
        return Known(self, name, model, optimizer, scheduler, watch, (model, self._bare(), optimizer, self._stepped()))


@dataclass(frozen=True, slots=True)
class Known:
    """The prepared objects that Accelerate still knows.

    Attributes:
        of: The record.
        name: Of its folder in a checkpoint.
        model: As prepared.
        optimizer: As prepared.
        scheduler: Itself.
        watch: What compares ranks.
        listed: What Accelerate has in its lists.
    """

    of: Prepared
    name: str
    model: nn.Module
    optimizer: Optimizer
    scheduler: LRScheduler
    watch: ReplicaWatch | None
    listed: tuple[Any, ...]


@dataclass(eq=False, slots=True)
class _Owned:
    """Of an accelerator: records, optimizers that have gradients reduced to their owners, what counts samples."""

    prepared: list[Prepared]
    attached: list[weakref.ref[DistAdamW]]
    counters: weakref.WeakSet[SampleCounter]


_OF: weakref.WeakKeyDictionary[Accelerator, _Owned] = weakref.WeakKeyDictionary()


def keep(accelerator: Accelerator, prepared: Prepared) -> None:
    """Have ``accelerator.save_state`` and the like know of what it has prepared. Local."""
    take_over(accelerator)
    owned = _OF[accelerator]
    same = prepared._optimizer()
    owned.prepared = [*(one for one in owned.prepared if not (one.is_of(None) or one.is_of(same))), prepared]


def take_over(
    accelerator: Accelerator, attached: DistAdamW | None = None, counter: SampleCounter | None = None
) -> None:
    """Have an accelerator's methods be the functions below, which go on to its own. Local.

    Args:
        accelerator: Any.
        attached: An optimizer whose gradients are now reduced to their owners.
        counter: What hears of ``accelerator.backward``.
    """
    if accelerator not in _OF:
        _OF[accelerator] = _Owned([], [], weakref.WeakSet())
        for ours in (save_state, load_state, clip_grad_norm_, clip_grad_value_, backward):
            setattr(accelerator, ours.__name__, _instead(accelerator, ours))
    if counter is not None:
        _OF[accelerator].counters.add(counter)
    if attached is not None:
        _OF[accelerator].attached.append(weakref.ref(attached))


def _instead(accelerator: Accelerator, ours: Callable[..., Any]) -> Callable[..., Any]:
    """A method, of an object that it does not keep; a bound one among its attributes would."""
    theirs, owner = getattr(accelerator, ours.__name__), weakref.ref(accelerator)
    own = getattr(theirs, "__self__", None) is accelerator
    function = theirs.__func__ if own else theirs

    @wraps(function)
    def method(*args: Any, **kwargs: Any) -> Any:
        if (known := owner()) is None:
            raise RuntimeError(f"the accelerator of this {ours.__name__} is gone. Keep it, and not its method alone.")
        return ours(known, partial(function, known) if own else function, *args, **kwargs)

    return method


def save_state(
    accelerator: Accelerator, save_rest: Callable[..., Any], output_dir: str | None = None, *args: Any, **kwargs: Any
) -> Any:
    """As Accelerate's; what `prepare` returned is saved for any engine and number of ranks to load. Collective."""
    if not (ours := _known(accelerator)):
        return save_rest(output_dir, *args, **kwargs)
    from dist_adamw.checkpoint.save_load import announce_save, save  # takes most of a second

    for one in ours:
        announce_save(one.optimizer)
        if one.watch is not None:
            one.watch.before_save()
    group = ours[0].of.group
    output_dir = None if output_dir is None else str(Path(output_dir).expanduser())
    config = accelerator.project_configuration
    limit, config.total_limit = config.total_limit, None  # Accelerate would delete the oldest before it writes
    try:
        with _hidden(accelerator, ours):
            where = everywhere(lambda: Path(save_rest(output_dir, *args, **kwargs)), group)
    finally:
        config.total_limit = limit
    main = accelerator.is_main_process
    everywhere(lambda: _remove_older_objects(accelerator, where) if main else None, group)
    files = everywhere(lambda: _files_of(where) if main else {}, group)
    token = collectives.all_gather_objects(secrets.token_hex(8), group)[0]  # the same for all models of this save
    for one in ours:
        place = _earliest(*everywhere(partial(_place_of, one), group), group)
        extra = {"position": place, "files": files, "state": token}
        # Last: when it is whole, all of it is there.
        objects = (one.model, one.optimizer, one.scheduler)
        save(where / one.name, *objects, extra=extra, compare_ranks=False, group=group)
    if config.automatic_checkpoint_naming and limit is not None and main:
        others = [path for path in _numbered(where.parent) if path != where]
        for old in others[: max(0, len(others) + 1 - max(limit, 1))]:
            shutil.rmtree(old, ignore_errors=True)
    return where


def load_state(
    accelerator: Accelerator,
    load_rest: Callable[..., Any],
    input_dir: str | None = None,
    load_kwargs: dict[str, Any] | None = None,
    **kwargs: Any,
) -> None:
    """As Accelerate's, of what was saved on any engine and number of ranks; nothing in a file is executed. Collective.

    What stands beside the tensors is checked for all models before any is loaded, and so are the tensors of all.
    ``load_kwargs={"weights_only": False}`` says that the folder is trusted: Accelerate then unpickles what is in its
    own files, as it would without `prepare`.

    Raises:
        CheckpointError: the folder is not whole, not of this job, or a file of it asks for code to be run; on every
            rank, and nothing has been changed.
    """
    if load_kwargs is not None:
        kwargs["load_kwargs"] = load_kwargs
    ours = _known(accelerator)
    where = Path(input_dir).expanduser() if input_dir is not None else _newest_of(accelerator) if ours else None
    group = ours[0].of.group if ours else collectives.host_group()
    is_there = [where is not None and any(_gather_exists(where / one.name, group)) for one in ours]
    if not any(is_there):
        if where is not None and not is_trusted(load_kwargs):
            everywhere(partial(check_pickles, accelerator, where), group)
        with reading_safely("the checkpoint" if where is None else where, load_kwargs):
            load_rest(input_dir, **kwargs)
        return
    assert where is not None
    from dist_adamw.checkpoint.random_state import restore_random_state  # these take most of a second
    from dist_adamw.checkpoint.save_load import Part, load_together

    for one in ours:
        if one.watch is not None:
            one.watch.settle()
    _check_all_there(where, ours, is_there, group)
    everywhere(lambda: _check_custom_objects(accelerator, where), group)
    for one in ours:
        everywhere(partial(_check_extra, where / one.name, one.of.place), group)
    everywhere(partial(_check_one_save, where, ours), group)
    if not is_trusted(load_kwargs):
        with _hidden(accelerator, ours):
            everywhere(partial(check_pickles, accelerator, where), group)
    parts = [Part(where / one.name, one.model, one.optimizer, one.scheduler) for one in ours]
    loaded = load_together(parts, random_state=False, group=group)

    def load_theirs() -> None:
        with reading_safely(where, load_kwargs):
            load_rest(str(where), **kwargs)

    with _hidden(accelerator, ours):
        everywhere(load_theirs, group)
    # Accelerate's has the random state of some ranks.
    everywhere(lambda: restore_random_state(read_index(loaded[-1].path)), group)
    for one, found in zip(ours, loaded, strict=True):
        everywhere(partial(one.of.place.load_state_dict, found.extra.get("position")), group)
        one.of.loaded_at = _clock_of(one.scheduler)
        if engine_of(accelerator) == "DEEPSPEED":
            from dist_adamw.integrations.deepspeed.zero import accept_counts

            accept_counts(one.model, found)
        one.of.place.counter.forget()
        accelerator.step = 0  # what was accumulated is not saved, and comes again
    if where in (numbered := _numbered(where.parent)) and where.parent == _automatic(accelerator):
        # The next is to be the newest, also for Accelerate.
        accelerator.project_configuration.iteration = _number(numbered[-1]) + 1


def clip_grad_norm_(accelerator: Accelerator, clip_norm: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """As Accelerate's, by the norm of the whole model where each rank has a part of it. Collective."""
    engines = [one.of.clipping for one in _known(accelerator) if one.of.clipping is not None]
    if not (engines or _attached(accelerator)):
        return clip_norm(*args, **kwargs)

    def clip(parameters: Tensor | Iterable[Tensor], max_norm: float, norm_type: float = 2) -> Any:
        for engine in engines:
            if max_norm != engine:
                warnings.warn(
                    f"accelerator.clip_grad_norm_(max_norm={max_norm}) does not clip under DeepSpeed, whose "
                    f"gradient_clipping is {engine} (0.0: none). Pass max_grad_norm={max_norm} to DistAdamW, or write "
                    "it into the DeepSpeed configuration.",
                    stacklevel=4,
                )
        params = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        if accelerator.sync_gradients and (attached := _attached(accelerator, params)):
            return attached[-1].clip_grad_norm_(max_norm, norm_type, params)
        return clip_norm(params, max_norm, norm_type)

    return clip(*args, **kwargs)


def clip_grad_value_(accelerator: Accelerator, clip_value: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """As Accelerate's. Local."""
    result = clip_value(*args, **kwargs)
    for optimizer in _attached(accelerator):
        optimizer.accept_gradients()
    return result


def backward(accelerator: Accelerator, run_backward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """As Accelerate's; what counts samples hears of each pass. Local, as far as Accelerate's is."""
    counters = [*_OF[accelerator].counters]
    for counter in counters:
        if counter.follows_engine:  # DeepSpeed updates inside
            counter.poll()
            counter.backward_began()
    result = run_backward(*args, **kwargs)
    for counter in counters:
        if counter.follows_engine:
            inside = engine_of(accelerator) == "DEEPSPEED" and accelerator.sync_gradients
            counter.engine_backward_is_over(updates_inside=inside)
        else:
            counter.poll()
    return result


def _gather_exists(path: Path, group: dist.ProcessGroup | None) -> list[bool]:
    return collectives.all_gather_objects(os.path.exists(path), group)


def _check_all_there(where: Path, ours: list[Known], is_there: list[bool], group: dist.ProcessGroup | None) -> None:
    """Raise where some of the models' folders are missing, or some rank does not see one. Collective."""
    found = [one.name for one, there in zip(ours, is_there, strict=True) if there]
    for one in ours:
        if one.name not in found:
            raise CheckpointError(
                f"{where} has {', '.join(found)}, and no {one.name}: it is of a job with other models, or was not "
                "written to the end. Nothing has been loaded; load another checkpoint, or prepare the models that were "
                "saved."
            )
        check_alike(where / one.name, group)


def _check_one_save(where: Path, ours: list[Known]) -> None:
    """Raise where the folders of several models were not written by one ``save_state``. Local."""
    tokens = [read_index(where / one.name).about["extra"].get("state") for one in ours]
    for one, token in zip(ours, tokens, strict=True):
        if token != tokens[0]:
            raise CheckpointError(
                f"{where} is not of one save: {one.name} was not written together with {ours[0].name}. Nothing has "
                "been loaded; load an older checkpoint."
            )


def _known(accelerator: Accelerator) -> list[Known]:
    """Return the prepared objects that Accelerate has not forgotten. Local."""
    return [
        known
        for number, optimizer in enumerate(accelerator._optimizers)
        for one in _OF[accelerator].prepared
        if one.is_of(optimizer) and (known := one.known(number)) is not None
    ]


def _attached(accelerator: Accelerator, params: list[Tensor] | None = None) -> list[DistAdamW]:
    """Optimizers that have gradients (of some of these parameters) reduced to their owners. Local."""
    found = [optimizer for one in _OF[accelerator].attached if (optimizer := one()) is not None]
    if params is None:
        return found
    chosen = {id(param) for param in params}
    return [one for one in found if any(id(param) in chosen for group in one.param_groups for param in group["params"])]


@contextlib.contextmanager
def _hidden(accelerator: Accelerator, ours: list[Known]) -> Iterator[None]:
    """Have Accelerate keep what is not ours. Its hooks see every model."""
    lists = (accelerator._models, accelerator._optimizers, accelerator._schedulers)
    before = [list(known) for known in lists]
    hooks = (accelerator._save_model_state_pre_hook, accelerator._load_model_state_pre_hook)
    kept = [dict(of) for of in hooks]
    for of in hooks:  # those that write adapters take one weight for each model
        for key, hook in of.items():
            of[key] = partial(_with_all_models, hook, before[0])
    hidden = {id(one) for known in ours for one in known.listed}
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
    """Check custom objects, as Accelerate would after all else has been loaded. Local."""
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


def _place_of(one: Known) -> tuple[tuple[int, int], dict[str, Any] | None]:
    """Where this rank stands in the data, after what orders the ranks' places. Local."""
    place = one.of.place
    # A job that has trained on another loader knows itself where it is.
    left = place.is_gone or (place.idle and one.of.loaded_at not in (None, _clock_of(one.scheduler)))
    return ((sys.maxsize, 0), None) if left else place.ordered()


def _earliest(
    order: tuple[int, int], place: dict[str, Any] | None, group: dist.ProcessGroup | None
) -> dict[str, Any] | None:
    """The first one of the ranks' places: what any rank has not been through an update with comes again. Collective."""
    orders = collectives.all_gather_objects(order, group)
    first = min(range(len(orders)), key=orders.__getitem__)
    return place if orders[first] == orders[0] else collectives.broadcast_object(place, first, group)


def _clock_of(scheduler: LRScheduler) -> int:
    """How far a schedule has come: samples of ours, steps of others. Local."""
    return int(getattr(scheduler, "samples", scheduler.last_epoch))


def _check_extra(folder: Path, place: Position) -> None:
    """Raise where what `save_state` said beside the tensors cannot be gone on with. Local.

    Files of another save than ours are what a kill between the two leaves.
    """
    where, extra = folder.parent, read_index(folder).about.get("extra", {})
    files = extra.get("files", {}) if isinstance(extra, dict) else None
    if not isinstance(files, dict):
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
    """Return the newest complete checkpoint under automatic naming, which ``load_state()`` takes."""
    numbered = _numbered(folder := _automatic(accelerator))
    if not accelerator.project_configuration.automatic_checkpoint_naming or not numbered:
        raise ValueError(f"no checkpoint was named, and {folder} has none. Pass load_state(<folder>).")
    whole = [path for path in numbered if any(path.glob(f"{FOLDER}*/{INDEX}"))] or numbered
    if whole[-1] != numbered[-1]:
        warnings.warn(f"{numbered[-1]} was not written to the end: {whole[-1]} is loaded.", stacklevel=4)
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
