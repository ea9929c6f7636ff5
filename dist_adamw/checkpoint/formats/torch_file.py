"""Read files of ``torch.save``.

A pickle names the classes of its objects. Known harmless ones become inert records; any other class is refused.
"""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_adamw.checkpoint.formats.content import MODEL_KEYS, Content, average_kinds, plain_group
from dist_adamw.checkpoint.local_state import MODEL
from dist_adamw.checkpoint.unpickling import load_safely
from dist_adamw.errors import CheckpointError
from dist_adamw.wrappers import without_wrappers

_OPTIMIZER_KEYS = ("optimizer", "optimizer_state_dict", "optim", "optim_state_dict")
# Some versions of Python (3.11.2) pickle an enum member as a getattr call on its class.
MEMBERS = ("getattr", "builtins.getattr", "__builtin__.getattr")


class Record:
    """An object of a pickle, as data. Only the name of its class is known, and none of its code runs."""

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)
        else:
            self.state = state


def load_pickle(file: Path) -> Any:
    """Read a file of ``torch.save``; tensors stay in the memory-mapped file until they are needed."""
    if not file.is_file():
        raise CheckpointError(f"there is no file {file}.")
    # DeepSpeed's files also hold its own objects (loss scalers, enums), which become records.
    is_zip = zipfile.is_zipfile(file)
    unknown = torch.serialization.get_unsafe_globals_in_checkpoint(file) if is_zip else []
    inert = (name for name in unknown if name.startswith("deepspeed.") or name in MEMBERS)
    records = [(type("_Record", (Record,), {}), name) for name in inert]
    with torch.serialization.safe_globals(records):  # type: ignore[arg-type]
        return tensors_and_plain_data(file, str(file), mmap=is_zip)


def tensors_and_plain_data(file: Path | io.BytesIO, what: str, **options: Any) -> Any:
    """Read a file of ``torch.save`` that holds only tensors and plain data. Local."""
    return load_safely(file, what, "If you trust it, load it with torch, and save it again without that.", **options)


def _part(content: Any, keys: Sequence[str]) -> Any:
    for key in keys:
        if isinstance(content.get(key), Mapping):
            return content[key]
    return None


def from_torch(source: Path, optimizer: str | Path | None, names: Sequence[str] | None) -> Content:
    """Read a file of ``torch.save``; see `dist_adamw.convert.import_checkpoint`. Local."""
    content = load_pickle(source)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{source} holds a {type(content).__name__}. Save {{'model': ..., 'optimizer': ...}}.")
    weights = _part(content, MODEL_KEYS)
    if weights is None and "param_groups" in content:
        raise CheckpointError(f"{source} is an optimizer's. Pass the model's file, and this one as optimizer.")
    # Without a key for the weights, the dict is itself a model's state dict: do not look for an optimizer in it.
    state = _optimizer_state({} if weights is None else content, optimizer)
    found = Content("torch")
    if state is not None and "param_groups" not in state:
        raise CheckpointError(f"{optimizer or source} has no state dict of one optimizer.")
    _add_weights(source, content if weights is None else weights, found)
    if state is not None:
        _number(source, state, names, found)
    _check_room(source, optimizer, found)
    return found


def _check_room(source: Path, optimizer: str | Path | None, found: Content) -> None:
    """Raise if a tensor has more bytes than the files: its elements share memory."""
    room = os.path.getsize(source)
    if optimizer is not None:
        room += os.path.getsize(optimizer)
    for key, tensor in found.tensors.items():
        if tensor.nbytes > room:
            raise CheckpointError(
                f"{source} has {key} of shape {list(tensor.shape)}, whose elements share memory (expand): it would "
                f"take {tensor.nbytes:,} bytes. Save it contiguous()."
            )


def _optimizer_state(content: Mapping[str, Any], optimizer: str | Path | None) -> Any:
    """Return the optimizer's state dict, from its own file or the model's; None if there is none."""
    if optimizer is not None:
        state = load_pickle(Path(optimizer))
        return state if "param_groups" in state else _part(state, _OPTIMIZER_KEYS) or {}
    present = [key for key in _OPTIMIZER_KEYS if key in content]
    if not present:
        return None
    return _part(content, present) or {}


def _add_weights(source: Path, weights: Mapping[str, Any], found: Content) -> None:
    """Add weights, buffers and extra state; tied weights under their first name."""
    found.modules = {}
    seen = set()
    for name, tensor in _bare(weights).items():
        module, _, last = name.rpartition(".")
        if last == "_extra_state":
            found.modules[module] = tensor
            continue
        if not isinstance(tensor, Tensor):
            raise CheckpointError(f"{source} has {name!r} among the weights, which is not a tensor. Save it elsewhere.")
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and place in seen:
            continue
        seen.add(place)
        found.tensors[f"{MODEL}.{name}"] = tensor


def _bare(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Return a model's state dict under the names of the unwrapped model."""
    names = {name: without_wrappers(name) for name in weights}
    if all(name.startswith("module.") for name in names.values()):  # DistributedDataParallel's
        names = {name: bare.removeprefix("module.") for name, bare in names.items()}
    return {names[name]: value for name, value in weights.items()}


def _number(source: Path, state: Mapping[str, Any], names: Sequence[str] | None, found: Content) -> None:
    """Translate the numbers of parameters in a torch optimizer's state dict to names."""
    groups = state["param_groups"]
    numbers = [number for group in groups for number in group["params"]]
    if names is None:
        names = _names_in_order(source, groups, len(numbers), found)
    if len(names) != len(numbers):
        raise CheckpointError(f"{source} has an optimizer of {len(numbers)} parameters, and {len(names)} names.")
    of = dict(zip(numbers, names, strict=True))
    found.groups = [plain_group(group, [of[number] for number in group["params"]]) for group in groups]
    found.averages = average_kinds(groups)
    for number, values in state["state"].items():
        for kind, value in values.items():
            found.add_state(of[number], kind, value)


def _names_in_order(source: Path, groups: Sequence[Mapping[str, Any]], count: int, found: Content) -> list[str]:
    """Return the names of an optimizer's ``count`` parameters, in its own order."""
    if all("param_names" in group for group in groups):
        return [without_wrappers(name) for group in groups for name in group["param_names"]]
    weights = [key.removeprefix(f"{MODEL}.") for key in found.tensors]
    # A single group with every weight is model.parameters(), which has the order of the state dict.
    if len(groups) == 1 and count == len(weights):
        return weights
    raise CheckpointError(
        f"{source} numbers {count} parameters in {len(groups)} group(s), and has {len(weights)} weights "
        "and buffers, so which is which is unknown. Pass names, a list in the optimizer's order, or build the "
        "optimizer from model.named_parameters()."
    )
