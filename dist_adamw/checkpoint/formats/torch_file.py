"""Read files of ``torch.save``.

A pickle says which classes it is made of. Here it gets records in their place, or is refused: see `load_pickle`.
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

from dist_adamw.checkpoint.formats.content import MODEL_KEYS, Content, plain_group
from dist_adamw.checkpoint.formats.unpickling import load_safely
from dist_adamw.checkpoint.state import MODEL
from dist_adamw.errors import CheckpointError
from dist_adamw.wrappers import without_wrappers

_OPTIMIZER_KEYS = ("optimizer", "optimizer_state_dict", "optim", "optim_state_dict")
# By this some versions of Python (3.11.2) pickle a member of an enum, from its class and name.
_MEMBERS = ("getattr", "builtins.getattr", "__builtin__.getattr")


class _Record:
    """An object in a pickle, as data. Its class is known by name only, and nothing of it is called."""

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)
        else:
            self.state = state


def load_pickle(file: Path) -> Any:
    """Read a file of ``torch.save``; big tensors stay in the file until they are needed."""
    if not file.is_file():
        raise CheckpointError(f"there is no file {file}.")
    # DeepSpeed adds its objects (loss scalers, enums) to what we need.
    is_zip = zipfile.is_zipfile(file)
    unknown = torch.serialization.get_unsafe_globals_in_checkpoint(file) if is_zip else []
    inert = (name for name in unknown if name.startswith("deepspeed.") or name in _MEMBERS)
    records = [(type("_Record", (_Record,), {}), name) for name in inert]
    with torch.serialization.safe_globals(records):  # type: ignore[arg-type]
        return _tensors_and_plain_data(file, str(file), mmap=is_zip)


def _tensors_and_plain_data(file: Path | io.BytesIO, what: str, **options: Any) -> Any:
    return load_safely(file, what, "Where you trust it, load it with torch, and save it again without that.", **options)


def _part(content: Any, keys: Sequence[str]) -> Any:
    return next((content[key] for key in keys if isinstance(content.get(key), Mapping)), None)


def from_torch(source: Path, optimizer: str | Path | None, names: Sequence[str] | None) -> Content:
    """A file of ``torch.save``; see `dist_adamw.convert.import_checkpoint`. Local."""
    content = load_pickle(source)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{source} holds a {type(content).__name__}. Save {{'model': ..., 'optimizer': ...}}.")
    weights = _part(content, MODEL_KEYS)
    if weights is None and "param_groups" in content:
        raise CheckpointError(f"{source} is an optimizer's. Pass the model's file, and this one as optimizer.")
    state: Any = None
    if optimizer is not None:
        state = load_pickle(Path(optimizer))
        state = state if "param_groups" in state else _part(state, _OPTIMIZER_KEYS) or {}
    elif weights is not None and (there := [key for key in _OPTIMIZER_KEYS if key in content]):
        state = _part(content, there) or {}
    if state is not None and "param_groups" not in state:
        raise CheckpointError(f"{optimizer or source} has no state dict of one optimizer.")
    weights = content if weights is None else weights
    found = Content("torch")
    found.modules = {}
    seen = set()
    for name, tensor in _bare(weights).items():
        module, _, last = name.rpartition(".")
        if last == "_extra_state":
            found.modules[module] = tensor
            continue
        if not isinstance(tensor, Tensor):
            raise CheckpointError(f"{source} has {name!r} among the weights, which is no tensor. Save it elsewhere.")
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and place in seen:
            continue  # tied: it goes by its first name
        seen.add(place)
        found.tensors[f"{MODEL}.{name}"] = tensor
    if state is not None:
        _number(source, state, names, found)
    room = os.path.getsize(source) + (os.path.getsize(optimizer) if optimizer is not None else 0)
    for key, tensor in found.tensors.items():
        if tensor.nbytes > room:
            raise CheckpointError(
                f"{source} has {key} of shape {list(tensor.shape)}, whose elements share memory (expand): it would "
                f"take {tensor.nbytes:,} bytes. Save it contiguous()."
            )
    return found


def _bare(weights: Mapping[str, Any]) -> dict[str, Any]:
    """A model's state dict by the names that the bare model has."""
    names = {name: without_wrappers(name) for name in weights}
    if all(name.startswith("module.") for name in names.values()):  # DistributedDataParallel's
        names = {name: bare.removeprefix("module.") for name, bare in names.items()}
    return {names[name]: value for name, value in weights.items()}


def _number(source: Path, state: Mapping[str, Any], names: Sequence[str] | None, found: Content) -> None:
    """Give parameters their names in a state dict of torch, which numbers them."""
    groups = state["param_groups"]
    numbers = [number for group in groups for number in group["params"]]
    weights = [key.removeprefix(f"{MODEL}.") for key in found.tensors]
    if names is None:
        if all("param_names" in group for group in groups):
            names = [without_wrappers(name) for group in groups for name in group["param_names"]]
        elif len(groups) == 1 and len(numbers) == len(weights):
            names = weights
        else:
            raise CheckpointError(
                f"{source} numbers {len(numbers)} parameters in {len(groups)} group(s), and has {len(weights)} weights "
                "and buffers: which is which is not said. Pass names, a list in the optimizer's order, or build the "
                "optimizer from model.named_parameters()."
            )
    if len(names) != len(numbers):
        raise CheckpointError(f"{source} has an optimizer of {len(numbers)} parameters, and {len(names)} names.")
    of = dict(zip(numbers, names, strict=True))
    found.groups = [plain_group(group, [of[number] for number in group["params"]]) for group in groups]
    for number, values in state["state"].items():
        for kind, value in values.items():
            found.add_state(of[number], kind, value)
