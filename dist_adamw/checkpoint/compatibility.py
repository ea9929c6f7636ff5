"""Check that a checkpoint fits the job that loads it, and choose the values that parameter groups take from it.

Reads no tensors and changes nothing.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dist_adamw.checkpoint.averages import check_averages
from dist_adamw.checkpoint.extra_state import check_extra_state
from dist_adamw.checkpoint.local_state import (
    MODEL,
    SCALARS,
    Access,
    buffers,
    fits_family,
    hyper_parameters,
    is_outside,
)
from dist_adamw.checkpoint.random_state import random_state_of
from dist_adamw.checkpoint.storage.index import Index, check_files, read_index
from dist_adamw.errors import CheckpointError
from dist_adamw.optimizer.averages import AVERAGED
from dist_adamw.optimizer.options import KEPT, check_hyper_parameters
from dist_adamw.plain_data import plain
from dist_adamw.schedule.saved import OnDifference
from dist_adamw.schedule.scheduler import CyclicLRWithRestarts
from dist_adamw.wrappers import unwrap


def checked(path: Path, part: int = 0, parts: int = 1, until: contextlib.ExitStack | None = None) -> Index:
    """Return a checkpoint's index, after checking the index and this rank's part of the files. Local.

    Args:
        path: Its folder.
        part: The number of this rank's part of the files.
        parts: The number of parts.
        until: Keeps the checked files open until it exits, so that the same files are read later.

    Raises:
        CheckpointError: names what is wrong.
    """
    index = read_index(path)
    if until is not None:
        until.enter_context(index.kept_open())
    check_files(index, part, parts)
    if wrong := wrong_in(index.about):
        raise CheckpointError(f"{path} is damaged: {wrong}.")
    return index


def wrong_in(about: Mapping[str, Any]) -> str | None:
    """Return what in a checkpoint's ``about`` no load would accept; None if all is right. Local."""
    about = {"modules": {}, **about}  # older releases and imports have no extra state of modules
    wrong = [name for name, is_right in _ABOUT.items() if not (name in about and is_right(about[name]))]
    return f"it does not say what it should of {', '.join(wrong)}" if wrong else None


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_mapping(value: Any) -> bool:
    return isinstance(value, dict)


def _are_groups(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(group, dict) and isinstance(group.get("names"), list) and all(map(_is_text, group["names"]))
        for group in value
    )


def _are_scalars(value: Any) -> bool:
    """Return whether these are numbers or None by parameter name, with plausible counts of updates."""
    return _is_mapping(value) and all(_is_mapping(numbers) and _are_numbers(numbers) for numbers in value.values())


def _are_numbers(numbers: Mapping[str, Any]) -> bool:
    if not all(type(value) in SCALARS for value in numbers.values()):
        return False
    step = numbers.get("step", 0)
    return type(step) in (int, float) and 0 <= step < 1 << 53  # the integers that a float holds exactly


_ABOUT: dict[str, Callable[[Any], bool]] = {
    "engine": _is_text,
    "world_size": lambda value: type(value) is int and 1 <= value < 1 << 24,
    "optimizer": lambda value: value is None or _is_text(value),
    "scheduler": lambda value: value is None or _is_text(value),
    "schedule": lambda value: value is None or _is_mapping(value),
    "groups": _are_groups,
    "scalars": _are_scalars,
    "extra": _is_mapping,
    "modules": _is_mapping,
}


def samples_of(index: Index) -> int | None:
    """Return the clock of the saved schedule. Local."""
    schedule = index.about.get("schedule")
    samples = schedule.get("samples") if isinstance(schedule, dict) else None
    return samples if type(samples) is int else None


def compare(
    index: Index, ours: Access, optimizer: Optimizer | None, scheduler: LRScheduler | None, choice: OnDifference
) -> tuple[list[dict[str, Any]], Callable[[], str]]:
    """Check a checkpoint against this job's model, optimizer and scheduler. Local.

    Returns:
        The values that the parameter groups take, and the function that restores the random state.
    """
    taken: list[dict[str, Any]] = []
    _check_same_model(index, ours.parameters(), with_optimizer=optimizer is not None)
    check_extra_state(index, ours.model)
    if meta := ours.without_memory():
        raise CheckpointError(f"{meta[0]} is on the meta device: there is nothing to load into. Use model.to_empty().")
    for name, buffer in buffers(ours.model):
        if _shares_memory(buffer):
            raise CheckpointError(
                f"elements of the buffer {name} share memory (expand), so it cannot be loaded. Make it contiguous()."
            )
    if optimizer is not None:
        _check_optimizer(index, ours, optimizer, scheduler, choice)
        taken = _to_take(index, ours.groups(), unwrap(optimizer), scheduler, choice)
    if scheduler is not None:
        _check_schedule(index, scheduler, choice)
    return taken, random_state_of(index)


def _shares_memory(tensor: Tensor) -> bool:
    """Return whether several elements of a tensor have the same address."""
    if tensor.layout != torch.strided:
        return False
    return any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _check_schedule(index: Index, scheduler: LRScheduler, choice: OnDifference) -> None:
    """Raise if the saved state of a scheduler cannot be loaded into this one."""
    about = index.about
    if about["scheduler"] != type(scheduler).__name__ or about["schedule"] is None:
        raise CheckpointError(
            f"{index.folder} has the state of {about['scheduler'] or 'no scheduler'}, and this job a "
            f"{type(scheduler).__name__}. Pass the same, or scheduler=None."
        )
    if isinstance(scheduler, CyclicLRWithRestarts):
        try:
            scheduler.check_loadable(about["schedule"], choice)
        except ValueError as error:
            raise CheckpointError(f"{index.folder}: {error}") from error
    elif not _is_like(about["schedule"], with_text_keys(scheduler.state_dict())):
        raise CheckpointError(f"{index.folder} is damaged: it has no state of a {type(scheduler).__name__}.")


def with_text_keys(state: Any) -> Any:
    """Return a scheduler's state with text keys, as JSON needs them: MultiStepLR's milestones are numbers.

    Raises:
        CheckpointError: two keys of a dict have the same text.
    """
    if isinstance(state, dict):
        texts = {str(key): with_text_keys(value) for key, value in state.items()}
        if len(texts) < len(state):
            raise CheckpointError(
                f"the scheduler's state has keys with the same text among {list(state)!r:.200}, and one of them would "
                "be lost. Use keys of one type."
            )
        return texts
    return [with_text_keys(value) for value in state] if isinstance(state, list | tuple) else state


def with_keys_of(here: Any, saved: Any) -> Any:
    """Undo `with_text_keys`: return saved state with the keys and types of dicts that a scheduler has here."""
    if isinstance(here, dict):
        restored = {key: with_keys_of(value, saved[str(key)]) for key, value in here.items()}
        return restored if type(here) is dict else type(here)(restored)
    if isinstance(here, list | tuple):
        return [with_keys_of(one, other) for one, other in zip(here, saved, strict=True)]
    return saved


def _is_like(saved: Any, here: Any) -> bool:
    """Return whether saved plain data has the structure and types of ``here``."""
    if isinstance(here, dict):
        if not isinstance(saved, dict) or saved.keys() != here.keys():
            return False
        return all(_is_like(saved[key], here[key]) for key in here)
    if isinstance(here, list | tuple):
        has_as_many = isinstance(saved, list) and len(saved) == len(here)
        return has_as_many and all(map(_is_like, saved, here))
    return _is_like_one(saved, here)


def _is_like_one(saved: Any, here: Any) -> bool:
    if here is None:  # "not set yet": the saved job may have set it
        return isinstance(saved, int | float | str | None)
    if isinstance(here, bool | str):
        return type(saved) is type(here)
    return isinstance(here, int | float | Tensor) and _is_number(saved)


def _is_number(value: Any) -> bool:
    """Return whether ``value`` is a number that fits a tensor; JSON has integers of any length."""
    if type(value) is float:
        return not math.isnan(value)
    return type(value) is int and abs(value) < 1 << 63


def _check_same_model(index: Index, ours: Mapping[str, tuple[int, ...]], *, with_optimizer: bool) -> None:
    saved = _weights_of(index)
    if not with_optimizer:  # parameters that only the optimizer has are no part of the model then
        saved = {name: shape for name, shape in saved.items() if name in ours or not is_outside(name)}
    if differences := _differences(saved, ours):
        raise CheckpointError(f"{index.folder} is a checkpoint of another model: {_first_three(differences)}.")


def _differences(saved: Mapping[str, tuple[int, ...]], ours: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Describe names and shapes that differ: missing ones first, then unknown ones, then shapes."""
    missing, reshaped = [], []
    for name, shape in ours.items():
        if name not in saved:
            missing.append(f"{name} is missing in the checkpoint")
        elif tuple(shape) != saved[name]:
            reshaped.append(f"{name} has shape {list(saved[name])} there and {list(shape)} here")
    unknown = [f"{name} is not in this model" for name in saved if name not in ours]
    return missing + unknown + reshaped


def _weights_of(index: Index) -> dict[str, tuple[int, ...]]:
    """Return the saved shapes of a model's weights and buffers, by name."""
    prefix = f"{MODEL}."
    return {key.removeprefix(prefix): saved.shape for key, saved in index.tensors.items() if key.startswith(prefix)}


def _first_three(differences: list[str]) -> str:
    more = f", and {len(differences) - 3} more" if len(differences) > 3 else ""
    return f"{'; '.join(differences[:3])}{more}"


def _check_optimizer(
    index: Index, ours: Access, optimizer: Optimizer, scheduler: LRScheduler | None, choice: OnDifference
) -> None:
    saved_class, our_class = index.about["optimizer"], type(unwrap(optimizer)).__name__
    if not fits_family(index.about, unwrap(optimizer)):
        raise CheckpointError(
            f"{index.folder} has the state of {saved_class or 'no optimizer'}, which a {our_class} cannot use. "
            "Pass the same optimizer, or None to load the weights alone."
        )
    saved, here = hyper_parameters(index.about["groups"]), hyper_parameters(ours.groups())
    lines: dict[str, None] = {}
    for name in here.keys() & saved.keys():
        for key in sorted((here[name].keys() & saved[name].keys()) - _cycled(scheduler)):
            if here[name][key] != saved[name][key]:
                lines[f"{key} of {name} was {saved[name][key]} and is {here[name][key]}"] = None
    if lines and choice == "strict":
        raise CheckpointError(
            f"{index.folder} was made with other hyper-parameters: {_first_three([*lines])}. Pass the same, "
            "or choose by on_difference='checkpoint' or 'new'."
        )
    check_averages(index, unwrap(optimizer), choice)


def _cycled(scheduler: LRScheduler | None) -> set[str]:
    """Return the values that torch's OneCycleLR and CyclicLR write into the groups besides lr."""
    return {"betas", "momentum"} if getattr(scheduler, "cycle_momentum", False) else set()


def _to_take(
    index: Index,
    ours: list[dict[str, Any]],
    optimizer: Optimizer,
    scheduler: LRScheduler | None,
    choice: OnDifference,
) -> list[dict[str, Any]]:
    """Return the saved values that each parameter group takes; our own schedule sets lr and weight decay itself."""
    group_of = {name: group for group in index.about["groups"] for name in group["names"]}
    taken = []
    for group, here in zip(optimizer.param_groups, ours, strict=True):
        keys = _keys_to_take(here, scheduler, choice)
        if getattr(optimizer, "reproducible", False):
            keys += KEPT
        if getattr(optimizer, "averages", {}):
            keys.append(AVERAGED)
        # Groups may be split differently now, so they are matched by the names of their parameters.
        found = [group_of[name] for name in here["names"] if name in group_of]
        saved_groups = [_in_convention_of(optimizer, one, index.about.get("decay_by")) for one in found]
        values = _values_of(saved_groups[0], keys, group) if saved_groups else {}
        _check_values(index, values, saved_groups, group)
        taken.append(values)
    return taken


def _keys_to_take(group: dict[str, Any], scheduler: LRScheduler | None, choice: OnDifference) -> list[str]:
    """Return the keys that a group takes from a checkpoint that has them."""
    keys: list[str] = []
    if not (isinstance(scheduler, CyclicLRWithRestarts) or choice == "new"):
        keys += ["lr", "weight_decay", "initial_lr", *_cycled(scheduler)]
    if choice == "checkpoint" and group["names"]:
        keys += hyper_parameters([group])[group["names"][0]]
    return keys


def _values_of(saved: dict[str, Any], keys: list[str], group: dict[str, Any]) -> dict[str, Any]:
    """Return the values of ``keys`` that both the saved group and this one have."""
    values = {}
    for key in keys:
        # A scheduler adds initial_lr, `attach` what reproducible=True keeps, and a save counts; perhaps only there.
        if key in saved and (key in group or key == "initial_lr" or key in (*KEPT, AVERAGED)):
            values[key] = saved[key]
    return values


def _check_values(
    index: Index, values: dict[str, Any], saved_groups: list[dict[str, Any]], group: dict[str, Any]
) -> None:
    """Raise if a parameter group cannot take the ``values`` saved for its parameters."""
    for key, value in values.items():
        for other in saved_groups:
            if other.get(key, value) != value:
                raise CheckpointError(
                    f"{index.folder} has parameters of one group here in several groups, with {key} {value!r} and "
                    f"{other[key]!r}. Make the same groups, or pass on_difference='new'."
                )
        kept = {**KEPT, AVERAGED: ""}  # checked by `check_averages`
        fits = _is_like(value, plain(kept.get(key, group.get(key, group["lr"]))))
        is_amount = key in ("lr", "weight_decay", "initial_lr")
        if not fits or (is_amount and not 0 <= value < math.inf):
            raise CheckpointError(
                f"{index.folder} is damaged: {key} of a parameter group is {value!r}, and {group.get(key)!r} here."
            )
    _check_layout(index, values, group)


def _check_layout(index: Index, values: dict[str, Any], group: dict[str, Any]) -> None:
    """Raise if ``values`` would change the layout of the state, or are invalid hyper-parameters."""
    if values.get("amsgrad", group.get("amsgrad")) != group.get("amsgrad"):
        raise CheckpointError(
            f"{index.folder} was made with amsgrad={values['amsgrad']}, which cannot be taken over: it changes the "
            "layout of the state. Pass the same."
        )
    if {"lr", "betas", "eps", "weight_decay"} <= group.keys():  # an Adam
        try:
            check_hyper_parameters({**group, **values})
        except ValueError as error:
            raise CheckpointError(f"{index.folder} is damaged: {error}.") from error


def _in_convention_of(optimizer: Optimizer, group: dict[str, Any], saved: Any) -> dict[str, Any]:
    """Return a saved group with its weight decay in this optimizer's convention: see docs/schedule.md."""
    ours = getattr(optimizer, "decay_by", "lr")
    if not group.get("lr") or "weight_decay" not in group or saved not in ("lr", "schedule") or saved == ours:
        return group
    # The decay of one update is lr * weight_decay by "lr", and weight_decay itself by "schedule".
    factor = group["lr"] if ours == "schedule" else 1 / group["lr"]
    return {**group, "weight_decay": group["weight_decay"] * factor}
