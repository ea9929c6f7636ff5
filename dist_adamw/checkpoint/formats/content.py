"""The common structure that every format's reader returns. Local."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from dist_adamw.checkpoint.storage.index import INDEX
from dist_adamw.checkpoint.storage.partial_tensor import PartialTensor, Values
from dist_adamw.checkpoint.storage.regions import Region
from dist_adamw.errors import CheckpointError
from dist_adamw.optimizer.averages import from_groups
from dist_adamw.optimizer.sharding.bucket_views import MOMENTS
from dist_adamw.plain_data import plain

Kind = Literal["torch", "dcp", "universal", "safetensors"]
T = TypeVar("T")
MODEL_KEYS = ("model", "model_state_dict", "state_dict", "module")
STATE_NAMES = ("step", *MOMENTS)
FP32 = "fp32"


@dataclass
class Content:
    """A training state to import, under our keys; see `checkpoint.local_state`."""

    engine: str
    tensors: dict[str, Tensor] = field(default_factory=dict)
    scalars: dict[str, dict[str, float]] = field(default_factory=dict)
    groups: list[dict[str, Any]] = field(default_factory=list)
    modules: dict[str, Any] | None = None  # extra state by name; None: not known
    averages: frozenset[str] = frozenset()  # the kinds of state that are averages of weights

    def add_state(self, name: str, kind: str, value: Any) -> None:
        """Add one entry of a parameter's AdamW state."""
        if kind not in (*STATE_NAMES, *self.averages):
            raise CheckpointError(
                f"the optimizer's state has {kind!r} of {name}, which AdamW does not have, only "
                f"{', '.join(STATE_NAMES)}. Import the weights alone."
            )
        if kind == "step":
            self.scalars[name] = {"step": float(value)}
        else:
            self.tensors[f"{kind}.{name}"] = value


def kind_of(source: Path) -> Kind:
    """Return the kind of a file or folder, by its name and contents. Local."""
    if source.is_file():
        return "safetensors" if source.suffix == ".safetensors" else "torch"
    if not source.is_dir():
        raise CheckpointError(f"there is no {source}: no such file or folder.")
    if (source / ".metadata").exists():
        return "dcp"
    if (source / "zero").is_dir() or (source / "latest_universal").exists():
        return "universal"
    if [*source.glob("*_optim_states.pt"), *source.glob("*/*_optim_states.pt")]:
        raise CheckpointError(
            f"{source} is a DeepSpeed checkpoint that only the same number of ranks can load. Convert it with "
            "`python -m deepspeed.checkpoint.ds_to_universal --inject_missing_state --input_folder ... --output_folder "
            "...`, which executes code in the files, and import its output."
        )
    if (source / INDEX).exists():
        raise CheckpointError(f"{source} is a checkpoint of dist_adamw already. Pass it to dist_adamw.load.")
    raise CheckpointError(
        f"{source} is a folder of unknown kind: it has no .metadata of torch.distributed.checkpoint and no zero/ of "
        "DeepSpeed's universal format."
    )


def understood(source: Path, read: Callable[[], T]) -> T:
    """Return what ``read`` returns; turn any error into a `CheckpointError`. Local.

    Raises:
        CheckpointError: ``read`` raised an error.
    """
    try:
        return read()
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{source} cannot be read: {error}.") from error
    except Exception as error:  # on damaged files the reading libraries raise errors of any type
        first = (str(error).splitlines() or [""])[0]
        raise CheckpointError(f"{source} is damaged or of another kind: {type(error).__name__}: {first}.") from error


def average_kinds(groups: Iterable[Mapping[str, Any]]) -> frozenset[str]:
    """Return the kinds of state that are averages of weights, by what parameter groups say of them. Local."""
    return frozenset(kind for average in from_groups(groups).values() for kind in average.tensors)


def plain_group(group: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
    """Return a parameter group as plain data, with ``names`` in place of parameters. Local.

    Raises:
        CheckpointError: a hyper-parameter is a tensor of several elements.
    """
    for key, value in group.items():
        if isinstance(value, Tensor) and value.numel() > 1:
            raise CheckpointError(f"{key} of a parameter group is a tensor of shape {list(value.shape)}, not a number.")
    # DeepSpeed's FusedAdam keeps "step" in the group; ours is per parameter.
    return {"names": names, **{k: plain(v) for k, v in group.items() if k not in ("params", "param_names", "step")}}


def lazy(shape: Sequence[int], dtype: torch.dtype, make: Values) -> PartialTensor:
    """Return a tensor that is read only when it is saved, so that one is in memory at a time. Local."""
    return PartialTensor(shape, dtype, {Region((0,) * len(shape), tuple(shape)): make})
