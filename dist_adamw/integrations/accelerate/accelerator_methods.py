"""Replace the accelerator's ``save_state``, ``load_state``, ``backward`` and gradient clipping, after ``prepare``.

Everything is referenced weakly: a model, optimizer or loader that ``accelerator.free_memory()`` released must go, and
so must an unreferenced accelerator. If the garbage collector ends a loader's workers later, that takes 5 s each.
"""

from __future__ import annotations

import contextlib
import secrets
import shutil
import sys
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from dist_adamw.checkpoint.storage.index import read_index
from dist_adamw.integrations.accelerate.accelerate_files import check_pickles, is_trusted, reading_safely
from dist_adamw.integrations.accelerate.accumulation import accumulate, follow
from dist_adamw.integrations.accelerate.counting import SampleCounter
from dist_adamw.integrations.accelerate.data import engine_of
from dist_adamw.integrations.accelerate.prepared_objects import Known, Prepared, samples_or_steps
from dist_adamw.integrations.accelerate.reproducible import undivided
from dist_adamw.integrations.accelerate.state_folder import (
    automatic_folder,
    check_all_there,
    check_custom_objects,
    check_is_of_save_state,
    check_one_save,
    files_of,
    find_models,
    newest_of,
    number_of,
    numbered_checkpoints,
    read_extra,
    remove_older_objects,
)
from dist_adamw.optimizer.adamw import DistAdamW
from dist_adamw.range_test.prepared import note_backward
from dist_adamw.ranks import collectives
from dist_adamw.ranks.run_on_all import run_on_all_ranks
from dist_adamw.wrappers import unwrap

if TYPE_CHECKING:
    from accelerate import Accelerator

    from dist_adamw.checkpoint.save_load import Checkpoint


@dataclass(eq=False, slots=True)
class _Owned:
    """An accelerator's prepared objects, attached optimizers and sample counters."""

    prepared: list[Prepared]
    attached: list[weakref.ref[DistAdamW]]
    counters: weakref.WeakSet[SampleCounter]


_OF: weakref.WeakKeyDictionary[Accelerator, _Owned] = weakref.WeakKeyDictionary()


def register(accelerator: Accelerator, prepared: Prepared) -> None:
    """Make ``accelerator.save_state`` and ``load_state`` handle these objects. Local."""
    patch_accelerator(accelerator)
    owned = _OF[accelerator]
    kept = [one for one in owned.prepared if not (one.is_of(None) or one.replaced_by(prepared))]
    owned.prepared = [*kept, prepared]


def patch_accelerator(
    accelerator: Accelerator, attached: DistAdamW | None = None, counter: SampleCounter | None = None
) -> None:
    """Replace an accelerator's methods by the functions below, which call the originals. Local.

    Args:
        accelerator: The accelerator; patched only once.
        attached: An optimizer whose gradients are now reduced to their owners.
        counter: A counter to notify of ``accelerator.backward``.
    """
    if accelerator not in _OF:
        _OF[accelerator] = _Owned([], [], weakref.WeakSet())
        for ours in (save_state, load_state, clip_grad_norm_, clip_grad_value_, backward, accumulate):
            setattr(accelerator, ours.__name__, _wrap_method(accelerator, ours))
    if counter is not None:
        _OF[accelerator].counters.add(counter)
    if attached is not None:
        _OF[accelerator].attached.append(weakref.ref(attached))


def _wrap_method(accelerator: Accelerator, ours: Callable[..., Any]) -> Callable[..., Any]:
    """Return a replacement method that holds its accelerator weakly: a bound method would be a reference cycle."""
    theirs, owner = getattr(accelerator, ours.__name__), weakref.ref(accelerator)
    is_bound = getattr(theirs, "__self__", None) is accelerator
    function = theirs.__func__ if is_bound else theirs

    @wraps(function)
    def method(*args: Any, **kwargs: Any) -> Any:
        if (known := owner()) is None:
            raise RuntimeError(f"the accelerator of this {ours.__name__} is gone. Keep it, not only its method.")
        return ours(known, partial(function, known) if is_bound else function, *args, **kwargs)

    return method


def save_state(
    accelerator: Accelerator, save_rest: Callable[..., Any], output_dir: str | None = None, *args: Any, **kwargs: Any
) -> Any:
    """Save as Accelerate does, but `prepare`'s objects for any engine and number of ranks. Collective."""
    if not (ours := _known(accelerator)):
        return save_rest(output_dir, *args, **kwargs)
    from dist_adamw.checkpoint.save_load import announce_save, save  # slow: most of a second

    # For all models, before anything is written: ranks that disagree must not replace a good checkpoint.
    for one in ours:
        announce_save(one.optimizer)
        if one.watch is not None:
            one.watch.before_save()
    group = ours[0].of.group
    positions = _positions(ours, group)
    output_dir = None if output_dir is None else str(Path(output_dir).expanduser())
    with _without_limit(accelerator) as limit, _hidden(accelerator, ours):
        where = run_on_all_ranks(lambda: Path(save_rest(output_dir, *args, **kwargs)), group)
    main = accelerator.is_main_process
    run_on_all_ranks(lambda: remove_older_objects(accelerator, where) if main else None, group)
    files = run_on_all_ranks(lambda: files_of(where) if main else {}, group)
    token = collectives.all_gather_objects(secrets.token_hex(8), group)[0]  # the same for all models of this save
    for one, position in zip(ours, positions, strict=True):
        extra = {"position": position, "files": files, "state": token}
        # Written last: a whole checkpoint of ours means that the rest of the folder is complete too.
        objects = (one.model, one.optimizer, one.scheduler)
        save(where / one.name, *objects, extra=extra, compare_ranks=False, group=group)
    if main and limit is not None:  # only now that the new one is whole
        _remove_oldest(accelerator, where, limit)
    return where


@contextlib.contextmanager
def _without_limit(accelerator: Accelerator) -> Iterator[int | None]:
    """Suspend Accelerate's limit on its checkpoints; give the limit.

    Accelerate deletes the oldest before it writes the new one, which may fail.
    """
    config = accelerator.project_configuration
    limit, config.total_limit = config.total_limit, None
    try:
        yield limit
    finally:
        config.total_limit = limit


def _remove_oldest(accelerator: Accelerator, where: Path, limit: int) -> None:
    """Remove Accelerate's oldest numbered checkpoints beyond ``limit``; never ``where``. Local."""
    if not accelerator.project_configuration.automatic_checkpoint_naming:
        return
    others = [path for path in numbered_checkpoints(where.parent) if path != where]
    beyond = len(others) + 1 - max(limit, 1)
    for old in others[: max(0, beyond)]:
        shutil.rmtree(old, ignore_errors=True)


def load_state(
    accelerator: Accelerator,
    load_rest: Callable[..., Any],
    input_dir: str | None = None,
    load_kwargs: dict[str, Any] | None = None,
    **kwargs: Any,
) -> None:
    """Load a state that was saved on any engine and number of ranks, without executing code in it. Collective.

    Everything is checked for all models, tensors included, before any model is changed.
    ``load_kwargs={"weights_only": False}`` declares the folder trusted: Accelerate then unpickles its own files as it
    would without `prepare`.

    Raises:
        CheckpointError: the folder is not whole, not of this job, or one of its files would execute code; on every
            rank, and nothing has been changed.
    """
    if load_kwargs is not None:
        kwargs["load_kwargs"] = load_kwargs
    ours = _known(accelerator)
    where = _folder_to_load(accelerator, input_dir, ours)
    group = ours[0].of.group if ours else collectives.host_group()

    def load_theirs(folder: str | None) -> None:
        with reading_safely("the checkpoint" if where is None else where, load_kwargs):
            load_rest(folder, **kwargs)

    if where is None:
        load_theirs(input_dir)
        return
    is_there = find_models(where, [one.name for one in ours], group)
    if not any(is_there):  # saved without `prepare`: the folder has only Accelerate's files
        run_on_all_ranks(partial(check_is_of_save_state, where), group)
        if not is_trusted(load_kwargs):
            run_on_all_ranks(partial(check_pickles, accelerator, where), group)
        load_theirs(input_dir)
        return
    from dist_adamw.checkpoint.random_state import restore_random_state  # slow: most of a second
    from dist_adamw.checkpoint.save_load import Part, load_together

    _check_before_load(accelerator, where, ours, is_there, is_trusted(load_kwargs), group)
    parts = [Part(where / one.name, one.model, one.optimizer, one.scheduler) for one in ours]
    loaded = load_together(parts, random_state=False, group=group)
    with _hidden(accelerator, ours):
        run_on_all_ranks(partial(load_theirs, str(where)), group)
    # After Accelerate, which restores a random state only for the ranks of the job that saved.
    run_on_all_ranks(lambda: restore_random_state(read_index(loaded[-1].path)), group)
    for one, found in zip(ours, loaded, strict=True):
        run_on_all_ranks(partial(one.of.position.load_state_dict, found.extra.get("position")), group)
        _go_on_from(accelerator, one, found)
    _continue_numbers(accelerator, where)


def _folder_to_load(accelerator: Accelerator, input_dir: str | None, ours: list[Known]) -> Path | None:
    """Return the folder that ``load_state`` reads; None if Accelerate is to choose it. Local."""
    if input_dir is not None:
        return Path(input_dir).expanduser()
    return newest_of(accelerator) if ours else None


def _check_before_load(
    accelerator: Accelerator,
    where: Path,
    ours: list[Known],
    is_there: list[bool],
    trusted: bool,
    group: dist.ProcessGroup | None,
) -> None:
    """Raise on every rank if the folder cannot be loaded; nothing has been changed then. Collective."""
    for one in ours:
        if one.watch is not None:
            one.watch.settle()  # read the last update's comparison of ranks before the state is replaced
    names = [one.name for one in ours]
    check_all_there(where, names, is_there, group)
    run_on_all_ranks(lambda: check_custom_objects(accelerator, where), group)
    for one in ours:
        run_on_all_ranks(partial(_check_extra, where, one), group)
    run_on_all_ranks(partial(check_one_save, where, names), group)
    if not trusted:
        with _hidden(accelerator, ours):
            run_on_all_ranks(partial(check_pickles, accelerator, where), group)


def _check_extra(where: Path, one: Known) -> None:
    """Raise if the position or the files that `save_state` recorded do not fit. Local."""
    one.of.position.check(read_extra(where / one.name))


def _go_on_from(accelerator: Accelerator, one: Known, found: Checkpoint) -> None:
    """Reset the counters and positions of the job to the loaded state. Local."""
    one.of.loaded_at = samples_or_steps(one.scheduler)
    if engine_of(accelerator) == "DEEPSPEED":
        from dist_adamw.integrations.deepspeed.zero_state import accept_counts

        accept_counts(one.model, found)
    one.of.position.counter.forget()
    follow(accelerator)
    accelerator.step = 0  # accumulated gradients are not saved: their batches come again


def _continue_numbers(accelerator: Accelerator, where: Path) -> None:
    """Advance Accelerate's number past all existing checkpoints, so that the next one is the newest. Local."""
    numbered = numbered_checkpoints(where.parent)
    if where in numbered and where.parent == automatic_folder(accelerator):
        accelerator.project_configuration.iteration = number_of(numbered[-1]) + 1


def clip_grad_norm_(accelerator: Accelerator, clip_norm: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Clip as Accelerate does, but by the global norm if each rank has only a part of it. Collective."""
    known = _known(accelerator)
    engines = [one.of.clipping for one in known if one.of.clipping is not None]

    if not (engines or _attached(accelerator)):
        return _clip_whole_gradients(known, clip_norm, *args, **kwargs)

    def clip(parameters: Tensor | Iterable[Tensor], max_norm: float, norm_type: float = 2) -> Any:
        for engine in engines:
            if max_norm != engine:
                warnings.warn(
                    f"accelerator.clip_grad_norm_(max_norm={max_norm}) does not clip under DeepSpeed, whose "
                    f"gradient_clipping is {engine} (0.0: none). Pass max_grad_norm={max_norm} to DistAdamW, or set "
                    "it in the DeepSpeed configuration.",
                    stacklevel=4,
                )
        params = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        if accelerator.sync_gradients and (attached := _attached(accelerator, params)):
            return attached[-1].clip_grad_norm_(max_norm, norm_type, params)
        return _clip_whole_gradients(known, clip_norm, params, max_norm, norm_type=norm_type)

    return clip(*args, **kwargs)


def _clip_whole_gradients(known: Sequence[Known], clip_norm: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Clip as Accelerate, or a subclass with arguments of any kind, does; let optimizers know the norm."""
    if args and isinstance(args[0], Iterator):
        args = (list(args[0]), *args[1:])
    elif isinstance(kwargs.get("parameters"), Iterator):
        kwargs["parameters"] = list(kwargs["parameters"])
    norm = clip_norm(*args, **kwargs)
    parameters = args[0] if args else kwargs.get("parameters")
    if isinstance(norm, Tensor) and isinstance(parameters, Tensor | Sequence):
        params = [parameters] if isinstance(parameters, Tensor) else parameters
        norm_type = args[2] if len(args) > 2 else kwargs.get("norm_type", 2)
        for one in known:
            if isinstance(optimizer := unwrap(one.optimizer), DistAdamW):
                optimizer._note_clipped(norm, norm_type, params)
    return norm


def clip_grad_value_(accelerator: Accelerator, clip_value: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Clip as Accelerate does. Local."""
    if any(optimizer.reproducible for optimizer in _attached(accelerator)):
        raise ValueError(
            "accelerator.clip_grad_value_ is not supported with reproducible=True: on several ranks param.grad is the "
            "rank's own gradient, which has been sent. Pass max_grad_norm to DistAdamW, or use "
            "accelerator.clip_grad_norm_."
        )
    result = clip_value(*args, **kwargs)
    for optimizer in _attached(accelerator):
        optimizer.accept_gradients()  # elementwise clipping is right for the averages that this rank owns
    return result


def backward(accelerator: Accelerator, run_backward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run backward as Accelerate does, and notify the sample counters. Local if Accelerate's is."""
    note_backward(accelerator, args, kwargs)
    counters = [*_OF[accelerator].counters]
    for counter in counters:
        if counter.follows_engine:  # under DeepSpeed the update happens inside backward, so count before it
            counter.poll()
            counter.backward_began()
    reproducible = [optimizer for optimizer in _attached(accelerator) if optimizer.reproducible]
    for optimizer in reproducible:
        optimizer._is_loss_whole = True
    with undivided(accelerator) if reproducible else contextlib.nullcontext():
        result = run_backward(*args, **kwargs)
    for counter in counters:
        if counter.follows_engine:
            inside = engine_of(accelerator) == "DEEPSPEED" and accelerator.sync_gradients
            counter.engine_backward_is_over(updates_inside=inside)
        else:
            counter.poll()
    return result


def _known(accelerator: Accelerator) -> list[Known]:
    """Return the prepared objects that Accelerate still has. Local."""
    found = []
    for number, optimizer in enumerate(accelerator._optimizers):
        for one in _OF[accelerator].prepared:
            known = one.known(number) if one.is_of(optimizer) else None
            if known is not None:
                found.append(known)
    return found


def _attached(accelerator: Accelerator, params: list[Tensor] | None = None) -> list[DistAdamW]:
    """Return attached optimizers, or those attached to some of ``params``. Local."""
    found = [optimizer for one in _OF[accelerator].attached if (optimizer := one()) is not None]
    if params is None:
        return found
    chosen = {id(param) for param in params}
    return [one for one in found if not chosen.isdisjoint(_param_ids(one))]


def _param_ids(optimizer: Optimizer) -> set[int]:
    return {id(param) for group in optimizer.param_groups for param in group["params"]}


@contextlib.contextmanager
def _hidden(accelerator: Accelerator, ours: list[Known]) -> Iterator[None]:
    """Hide our objects from Accelerate's save or load; the user's hooks still get every model."""
    lists = (accelerator._models, accelerator._optimizers, accelerator._schedulers)
    before = [list(known) for known in lists]
    hidden = {id(one) for known in ours for one in known.listed}
    with _hooks_with_models(accelerator, before[0]):
        for known in lists:
            known[:] = [one for one in known if id(one) not in hidden]
        try:
            yield
        finally:
            for known, all_of_them in zip(lists, before, strict=True):
                known[:] = all_of_them


@contextlib.contextmanager
def _hooks_with_models(accelerator: Accelerator, models: list[nn.Module]) -> Iterator[None]:
    """Call the hooks of ``save_state`` and ``load_state`` with ``models``."""
    hooks = (accelerator._save_model_state_pre_hook, accelerator._load_model_state_pre_hook)
    before = [dict(of) for of in hooks]
    for of in hooks:
        for key, hook in of.items():
            of[key] = partial(_with_all_models, hook, models)
    try:
        yield
    finally:
        for of, all_of_these in zip(hooks, before, strict=True):
            of.clear()
            of.update(all_of_these)


def _with_all_models(hook: Any, models: list[nn.Module], _: Any, *rest: Any) -> None:
    """Call a hook of ``save_state`` (models, weights, folder) or ``load_state`` (models, folder)."""
    # Hooks that save adapters pop one entry of weights per model.
    weights = [[None] * len(models)] if len(rest) == 2 else []
    hook(list(models), *weights, rest[-1])


def _ordered_position(one: Known) -> tuple[tuple[int, int], dict[str, Any] | None]:
    """Return a key that orders the ranks' positions in the data, and this rank's position. Local."""
    position = one.of.position
    # A job that trained on other loaders than the prepared one tracks its position itself.
    has_trained_elsewhere = position.idle and one.of.loaded_at not in (None, samples_or_steps(one.scheduler))
    if position.is_gone or has_trained_elsewhere:
        return (sys.maxsize, 0), None
    return position.ordered()


def _positions(ours: list[Known], group: dist.ProcessGroup | None) -> list[dict[str, Any] | None]:
    """Return the position in the data to save with each model. Collective.

    Raises:
        ValueError: one optimizer has accumulated a batch that another was updated with. On every rank.
    """
    return [_earliest(one, *run_on_all_ranks(partial(_ordered_position, one), group), group) for one in ours]


def _earliest(
    one: Known, order: tuple[int, int], position: dict[str, Any] | None, group: dist.ProcessGroup | None
) -> dict[str, Any] | None:
    """Return the earliest position of all ranks, so that no rank's pending samples are lost. Collective.

    Rank 0 writes it, with the order that it drew itself: where it draws for all (dispatch_batches), others have none.
    """
    orders = collectives.all_gather_objects(order, group)
    first = min(range(len(orders)), key=orders.__getitem__)
    if orders[first] == orders[0]:
        return position
    position = collectives.broadcast_object(position, first, group)
    return None if position is None else one.of.position.as_drawn_here(orders[first][0], position)
