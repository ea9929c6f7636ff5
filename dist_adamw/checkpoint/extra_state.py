"""Save and load what modules return from ``get_extra_state``: plain data, or a tensor.

The main rank's is saved, as for everything that is not sharded.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from dist_adamw.checkpoint.storage.files import as_json, read_whole
from dist_adamw.checkpoint.storage.index import Index
from dist_adamw.errors import CheckpointError
from dist_adamw.wrappers import bare, names_without_wrappers

EXTRA = "extra_state"


def extra_state(model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return plain data by module name, and tensors by key. Local.

    Raises:
        CheckpointError: a module returns neither.
    """
    data: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for name, module in _modules(model):
        value = module.get_extra_state()
        if isinstance(value, Tensor):
            tensors[f"{EXTRA}.{name}"] = value.detach()
            continue
        try:
            data |= as_json({name: value})
        except CheckpointError as error:
            raise CheckpointError(f"get_extra_state of {name or type(module).__name__}: {error}") from error
    return data, tensors


def check_extra_state(index: Index, model: nn.Module) -> None:
    """Raise if a checkpoint has extra state of other modules than this model. Local."""
    saved, ours = _saved(index), {name for name, _ in _modules(model)}
    if "modules" not in index.about and ours:  # imported, or written by an older release
        warnings.warn(f"{index.folder} has no extra state (get_extra_state), which stays as it is.", stacklevel=2)
        return
    for name in sorted(saved ^ ours):
        where = "is not in the checkpoint" if name in ours else "is in the checkpoint, and not in this model"
        raise CheckpointError(
            f"{index.folder} is a checkpoint of another model: extra state of {name!r} (get_extra_state) {where}."
        )


def restore_extra_state(index: Index, model: nn.Module) -> None:
    """Pass each module its saved extra state. Local."""
    data, saved = index.about.get("modules", {}), _saved(index)
    for name, module in _modules(model):
        if name in saved:
            module.set_extra_state(data[name] if name in data else read_whole(index, f"{EXTRA}.{name}"))


def _saved(index: Index) -> set[str]:
    tensors = (key.removeprefix(f"{EXTRA}.") for key in index.tensors if key.startswith(f"{EXTRA}."))
    return {*tensors, *index.about.get("modules", {})}


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    inside = bare(model)
    clean = names_without_wrappers(inside)
    for name, module in inside.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            yield clean(name), module
