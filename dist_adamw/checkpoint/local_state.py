"""Describe what this process holds of a training state, keyed by parameter name: the same keys on every engine.

Knows models, DistAdamW and other torch optimizers; nothing of files. What an engine keeps its own way is
given by that engine's integration (`checkpoint.engine_adapters`).

    model.<name>         a parameter, or a buffer that the model's state dict has
    master.<name>        its fp32 weights, where the parameter is less exact
    exp_avg.<name> ...   its state, by the optimizer's own names
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
from dist_adamw.optimizer.sharding.shard import MOMENTS
from dist_adamw.plain_data import plain
from dist_adamw.ranks import collectives
from dist_adamw.wrappers import bare, names_without_wrappers

MODEL, MASTER = "model", "master"
SCALARS = (int, float, bool, type(None))  # what the state of a parameter may have beside tensors
# These differ between engines and schedules, or say how to compute and not what.
_NOT_COMPARED = {
    *("params", "param_names", "lr", "weight_decay", "initial_lr", "initial_weight_decay", "min_lr", "lr_scale"),
    *("foreach", "fused", "capturable", "differentiable", "decoupled_weight_decay"),
}
ADAM_FAMILY = {"DistAdamW", "AdamW", "Adam", "FusedAdam", "DeepSpeedCPUAdam"}


@dataclass
class LocalState:
    """The part of a training state in this process, to be saved or to be filled by a load.

    Attributes:
        tensors: By key: `PartialTensor`, DTensor, or whole. Of whole ones that several ranks have, one rank's is saved.
        scalars: By parameter name, the numbers in its state, such as ``step``; or None, which some have for "not yet".
        sources: For a load, where a key has another name in the checkpoint.
        later: For a load, what is read after that, one after the other, and what to do then with each.
        finish: After a load: let what follows from tensors and scalars follow.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    scalars: dict[str, dict[str, Any]] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    later: Callable[[], Iterable[tuple[LocalState, Callable[[], None]]]] = tuple
    finish: Callable[[], None] = lambda: None

    def read(self, kind: str, name: str, target: Tensor, found: CheckpointContents) -> None:
        """Have ``target`` filled with what a checkpoint has under this kind and name, or knows more exactly.

        Raises:
            CheckpointError: it has nothing of the kind.
        """
        key = source = f"{kind}.{name}"
        kinds = found.kinds.get(name, set())
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
    """The contents of a checkpoint, as far as a process must know them to make room.

    Attributes:
        kinds: By parameter name, the keys' first parts: "model", "exp_avg".
        dtypes: By key.
        shapes: By key.
        scalars: As in `LocalState`.
    """

    kinds: Mapping[str, set[str]]
    dtypes: Mapping[str, torch.dtype]
    shapes: Mapping[str, tuple[int, ...]]
    scalars: Mapping[str, Mapping[str, float]]

    def need(self, kind: str, name: str) -> None:
        """Raise where the checkpoint has no such tensor. Local."""
        kinds = self.kinds.get(name, set())
        if kind not in kinds:
            raise CheckpointError(
                f"the checkpoint has no {kind} of {name}, only {', '.join(sorted(kinds)) or 'nothing'}. "
                "Pass an optimizer with the options that it was saved with."
            )

    def need_shape(self, key: str, shape: Sequence[int]) -> None:
        """Raise where the checkpoint's tensor has another one. Local."""
        if self.shapes[key] != tuple(shape):
            raise CheckpointError(
                f"the checkpoint's {key} has shape {self.shapes[key]}, and {tuple(shape)} is needed here: it is of "
                "another model."
            )

    def need_adam(self, name: str, shape: Sequence[int], amsgrad: bool) -> None:
        """Raise where the checkpoint has not all of the state of a parameter that has some. Local."""
        for kind in MOMENTS if amsgrad else MOMENTS[:2]:
            self.need(kind, name)
            self.need_shape(f"{kind}.{name}", shape)
        if MASTER in self.kinds[name]:
            self.need_shape(f"{MASTER}.{name}", shape)
        if "step" not in self.scalars.get(name, {}):
            raise CheckpointError(f"the checkpoint does not say how many updates {name} has had: it is damaged.")


class Access(Protocol):
    """How the state of one model and its optimizer is reached. Local."""

    engine: str
    model: nn.Module

    def to_save(self) -> LocalState:
        """Return what this process writes."""

    def to_load(self, found: CheckpointContents) -> Callable[[], LocalState]:
        """Check what a checkpoint has; return what lays the optimizer's state out again, and says where to read to.

        Nothing is changed, and no memory taken, until that is called: several models are checked first.
        """

    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Names and whole shapes of parameters and buffers."""

    def without_memory(self) -> list[str]:
        """Names of parameters and buffers on the meta device."""

    def groups(self) -> list[dict[str, Any]]:
        """Parameter groups as plain data, with "names" instead of "params"."""


def outside(number: int, group: int) -> str:
    """The name of a parameter that the optimizer has and the model does not, such as a loss's temperature. Local."""
    return f"parameter {number} of group {group}"


def is_outside(name: str) -> bool:
    """Return whether that is such a name. Local."""
    return re.fullmatch(r"parameter \d+ of group \d+", name) is not None


def parameter_names(model: nn.Module) -> dict[Tensor, str]:
    """Parameters and their names; tied ones have their first name. Local.

    Raises:
        CheckpointError: two have the same name without wrappers.
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
    """Name and tensor of the buffers that a state dict has. Local."""
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
        found.append({"names": names(g, group), **values})
    return found


def hyper_parameters(groups: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return by parameter name what two jobs must have alike to go on from one another. Local."""
    found = {}
    for group in groups:
        values = {key: value for key, value in group.items() if key not in _NOT_COMPARED and key != "names"}
        for name in group["names"]:
            found[name] = dict(values)
    return found


def family_of(optimizer: Optimizer) -> str:
    """The class by whose rules an optimizer keeps its state, as a checkpoint names it. Local.

    A class derived from a known one keeps the state of that one, under whatever name; unless it is an Adam whose state
    is another, by what is there.
    """
    own = type(optimizer).__name__
    for base in type(optimizer).__mro__:
        of_torch = base.__module__.startswith("torch.optim.") and base is not Optimizer
        if base.__name__ in ADAM_FAMILY or of_torch:
            is_adam = base.__name__ in ADAM_FAMILY and base.__name__ != own
            return own if is_adam and not _has_moments(optimizer) else base.__name__
    return own


def _has_moments(optimizer: Optimizer) -> bool:
    """Return whether all the state there is has Adam's moments. Local."""
    needed = {*MOMENTS[:2]}
    return isinstance(optimizer, DistAdamW) or all(needed <= state.keys() for state in optimizer.state.values())


def saved_family(about: Mapping[str, Any]) -> str | None:
    """The class by whose rules saved state is kept; None where there is none. Local."""
    saved: str | None = about["optimizer"]
    # Older releases wrote the name of a derived class; only DistAdamW and what derives from it has decay_by.
    return "DistAdamW" if saved is not None and about.get("decay_by") is not None else saved


def fits_family(about: Mapping[str, Any], optimizer: Optimizer) -> bool:
    """Return whether saved state means the same to an optimizer. Local."""
    saved = saved_family(about)
    known = {base.__name__ for base in type(optimizer).__mro__}
    return saved is not None and (saved in known or same_family(saved, family_of(optimizer)))


def same_family(one: str, other: str) -> bool:
    """Return whether the state of one class of optimizer means the same to the other."""
    return one == other or {one, other} <= ADAM_FAMILY


def only_mine(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what this rank writes. Whole tensors are written by the first rank, since ranks' may differ. Local.

    Batch norm's statistics do, and weights of ranks that are not kept alike: pieces of several would be no model.
    """
    is_first = collectives.rank() == 0
    return {
        k: t
        for k, t in tensors.items()
        if is_first or isinstance(t, DTensor) or (type(t) is PartialTensor and t.shared)
    }
