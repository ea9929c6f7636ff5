"""Describe the part of a training state in this process, keyed by parameter name: the same keys on every engine.

An engine with its own layout has an adapter in its integration (`checkpoint.engine_adapters`).

    model.<name>         a parameter or a persistent buffer
    master.<name>        its fp32 weights, if the parameter has less precision
    exp_avg.<name> ...   its state, under the optimizer's own names
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from dist_adamw.checkpoint.storage.partial_tensor import PartialTensor
from dist_adamw.errors import CheckpointError
from dist_adamw.optimizer.adamw import DistAdamW
from dist_adamw.optimizer.averages import AVERAGED
from dist_adamw.optimizer.options import KEPT
from dist_adamw.optimizer.sharding.bucket_views import MOMENTS
from dist_adamw.plain_data import plain
from dist_adamw.ranks import collectives
from dist_adamw.wrappers import bare, names_without_wrappers

MODEL, MASTER = "model", "master"
SCALARS = (int, float, bool, type(None))  # the types that a parameter's state may hold next to tensors
# These may differ between engines and schedules, or select an implementation with the same result.
_NOT_COMPARED = {
    *("params", "param_names", "lr", "weight_decay", "initial_lr", "initial_weight_decay", "min_lr", "lr_scale"),
    *("foreach", "fused", "capturable", "differentiable", "decoupled_weight_decay"),
    *KEPT,
    AVERAGED,
}
ADAM_FAMILY = {"DistAdamW", "AdamW", "Adam", "FusedAdam", "DeepSpeedCPUAdam"}


@dataclass
class LocalState:
    """The part of a training state in this process, to save or to fill from a checkpoint.

    Attributes:
        tensors: By key: `PartialTensor`, DTensor, or whole. A whole tensor that several ranks hold is saved by one.
        scalars: By parameter name, the numbers in its state, such as ``step``; some optimizers have None for "not yet".
        sources: For a load: keys that have another name in the checkpoint, and that name.
        later: For a load: states to read afterwards, one at a time, each with a function to call once it is read.
        finish: For a load: called at the end to update what depends on the tensors and scalars.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    scalars: dict[str, dict[str, Any]] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    later: Callable[[], Iterable[tuple[LocalState, Callable[[], None]]]] = tuple
    finish: Callable[[], None] = lambda: None

    def read(self, kind: str, name: str, target: Tensor, found: CheckpointContents) -> None:
        """Register ``target`` to be filled with the checkpoint's tensor of this kind and name, or a more precise one.

        Raises:
            CheckpointError: the checkpoint has no such tensor.
        """
        key = source = f"{kind}.{name}"
        kinds = found.kinds.get(name, set())
        # A bf16 run may continue in fp32, and the other way round: weights and masters stand in for each other.
        if kind == MODEL and MASTER in kinds and target.dtype.itemsize > found.dtypes[key].itemsize:
            source = f"{MASTER}.{name}"
        elif kind == MASTER and MASTER not in kinds:
            source = f"{MODEL}.{name}"
        else:
            found.need(kind, name)
        found.need_shape(source, target.shape)
        self.tensors[key] = target
        if source != key:
            self.sources[key] = source


@dataclass
class CheckpointContents:
    """The contents of a checkpoint: what a process needs to know to allocate room for it.

    Attributes:
        kinds: By parameter name, the first parts of its keys: "model", "exp_avg".
        dtypes: By key.
        shapes: By key.
        scalars: As in `LocalState`.
    """

    kinds: Mapping[str, set[str]]
    dtypes: Mapping[str, torch.dtype]
    shapes: Mapping[str, tuple[int, ...]]
    scalars: Mapping[str, Mapping[str, float]]

    def need(self, kind: str, name: str) -> None:
        """Raise if the checkpoint has no such tensor. Local."""
        kinds = self.kinds.get(name, set())
        if kind not in kinds:
            raise CheckpointError(
                f"the checkpoint has no {kind} of {name}, only {', '.join(sorted(kinds)) or 'nothing'}. "
                "Pass an optimizer with the options that it was saved with."
            )

    def need_shape(self, key: str, shape: Sequence[int]) -> None:
        """Raise if the checkpoint's tensor has another shape. Local."""
        if self.shapes[key] != tuple(shape):
            raise CheckpointError(
                f"the checkpoint's {key} has shape {self.shapes[key]}, and {tuple(shape)} is needed here: it is of "
                "another model."
            )

    def need_adam(self, name: str, shape: Sequence[int], amsgrad: bool) -> None:
        """Raise if part of the Adam state of a parameter is missing. Local."""
        for kind in MOMENTS if amsgrad else MOMENTS[:2]:
            self.need(kind, name)
            self.need_shape(f"{kind}.{name}", shape)
        if MASTER in self.kinds[name]:
            self.need_shape(f"{MASTER}.{name}", shape)
        if "step" not in self.scalars.get(name, {}):
            raise CheckpointError(f"the checkpoint does not say how many updates {name} has had: it is damaged.")


class Access(Protocol):
    """Access to the state of one model and its optimizer. Local."""

    engine: str
    model: nn.Module

    def to_save(self) -> LocalState:
        """Return what this process writes."""

    def to_load(self, found: CheckpointContents) -> Callable[[], LocalState]:
        """Check that a checkpoint fits; return the function that allocates the state and returns where to read into.

        Nothing is changed or allocated until that function is called: several models are checked first.
        """

    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Return names and full shapes of parameters and buffers."""

    def without_memory(self) -> list[str]:
        """Return names of parameters and buffers on the meta device."""

    def groups(self) -> list[dict[str, Any]]:
        """Return parameter groups as plain data, with "names" instead of "params"."""


def outside(number: int, group: int) -> str:
    """Return the name of a parameter of the optimizer that is not in the model, such as a loss's temperature. Local."""
    return f"parameter {number} of group {group}"


def is_outside(name: str) -> bool:
    """Return whether `outside` made this name. Local."""
    return re.fullmatch(r"parameter \d+ of group \d+", name) is not None


def parameter_names(model: nn.Module) -> dict[Tensor, str]:
    """Return parameters and their names; a tied parameter has its first name. Local.

    Raises:
        CheckpointError: two parameters have the same name once wrappers are left out.
    """
    inside = bare(model)
    clean = names_without_wrappers(inside)
    names: dict[Tensor, str] = {}
    known: dict[str, str] = {}  # by name, the name with wrappers
    for name, param in inside.named_parameters():
        if (other := known.setdefault(clean(name), name)) != name:
            raise CheckpointError(
                f"the parameters {other!r} and {name!r} are both {clean(name)!r} without the wrappers around them, and "
                "one would be lost. Rename a module."
            )
        names[param] = clean(name)
    return names


def buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield names and tensors of the persistent buffers. Local."""
    inside = bare(model)
    clean = names_without_wrappers(inside)
    for prefix, module in inside.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield clean(f"{prefix}.{name}" if prefix else name), buffer


def plain_groups(
    optimizer: Optimizer | None, names: Callable[[int, dict[str, Any]], list[str]]
) -> list[dict[str, Any]]:
    """Return parameter groups as plain data. Local."""
    found: list[dict[str, Any]] = []
    for g, group in enumerate([] if optimizer is None else optimizer.param_groups):
        values = {key: plain(value) for key, value in group.items() if key not in ("params", "param_names")}
        if not getattr(optimizer, "averages", None):  # those that were loaded from another optimizer do not move
            values.pop(AVERAGED, None)
        found.append({"names": names(g, group), **values})
    return found


def hyper_parameters(groups: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return by parameter name the values that must match for one job to continue another. Local."""
    found = {}
    for group in groups:
        values = {key: value for key, value in group.items() if key not in _NOT_COMPARED and key != "names"}
        for name in group["names"]:
            found[name] = dict(values)
    return found


def family_of(optimizer: Optimizer) -> str:
    """Return the name of the class whose state layout an optimizer has, as a checkpoint records it. Local.

    A subclass has the layout of the known class that it derives from, unless it derives from an Adam and its present
    state lacks Adam's moments.
    """
    own = type(optimizer).__name__
    for base in type(optimizer).__mro__:
        of_torch = base.__module__.startswith("torch.optim.") and base is not Optimizer
        if base.__name__ in ADAM_FAMILY or of_torch:
            is_adam = base.__name__ in ADAM_FAMILY and base.__name__ != own
            return own if is_adam and not _has_moments(optimizer) else base.__name__
    return own


def _has_moments(optimizer: Optimizer) -> bool:
    """Return whether all present state has Adam's moments. Local."""
    needed = {*MOMENTS[:2]}
    return isinstance(optimizer, DistAdamW) or all(needed <= state.keys() for state in optimizer.state.values())


def saved_family(about: Mapping[str, Any]) -> str | None:
    """Return the name of the class whose layout saved state has; None without an optimizer. Local."""
    saved: str | None = about["optimizer"]
    # Older releases wrote the name of the subclass; only DistAdamW and its subclasses have decay_by.
    return "DistAdamW" if saved is not None and about.get("decay_by") is not None else saved


def fits_family(about: Mapping[str, Any], optimizer: Optimizer) -> bool:
    """Return whether saved state has an optimizer's layout. Local."""
    saved = saved_family(about)
    known = {base.__name__ for base in type(optimizer).__mro__}
    return saved is not None and (saved in known or same_family(saved, family_of(optimizer)))


def same_family(one: str, other: str) -> bool:
    """Return whether two optimizer classes have the same state layout."""
    return one == other or {one, other} <= ADAM_FAMILY


def only_mine(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what this rank writes: its shards, and on the first rank all whole tensors. Local.

    Whole tensors may differ between ranks (batch norm statistics, weights that nothing synchronizes), and a mix of
    several ranks' would not be a consistent model.
    """
    is_first = collectives.rank() == 0
    return {
        k: t
        for k, t in tensors.items()
        if is_first or isinstance(t, DTensor) or (type(t) is PartialTensor and t.shared)
    }
