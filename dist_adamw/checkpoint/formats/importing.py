"""Import a training state from another library, in a single process."""

from __future__ import annotations

import time
import warnings
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.checkpoint.storage import StorageWriter

from dist_adamw._version import __version__
from dist_adamw.checkpoint.extra_state import EXTRA
from dist_adamw.checkpoint.formats.content import Content, Kind, kind_of, understood
from dist_adamw.checkpoint.formats.dcp import from_dcp
from dist_adamw.checkpoint.formats.safetensors import from_safetensors
from dist_adamw.checkpoint.formats.torch_file import from_torch
from dist_adamw.checkpoint.formats.universal import from_universal
from dist_adamw.checkpoint.local_state import MODEL
from dist_adamw.checkpoint.storage.files import Writer
from dist_adamw.checkpoint.storage.index import DTYPES, INDEX
from dist_adamw.checkpoint.storage.locks import Lock
from dist_adamw.errors import CheckpointError


def import_checkpoint(
    source: str | Path,
    path: str | Path,
    kind: Kind | Literal["auto"] = "auto",
    *,
    optimizer: str | Path | None = None,
    names: Sequence[str] | None = None,
    without: Sequence[str] = (),
) -> None:
    """Convert another library's file to a checkpoint that `dist_adamw.load` loads, with ``scheduler=None``. Local.

    It has no random state, so loading leaves that unchanged.

    Args:
        source: A file or folder of another library.
        path: The checkpoint's folder.
        kind: The kind of ``source``; "auto" detects it.
        optimizer: For torch: the file with the optimizer's state dict, if ``source`` has only the model's.
        names: For torch: the parameters' names in the optimizer's order, needed if its groups have no ``param_names``
            and the order differs from that of the weights.
        without: Names of weights to leave out, such as the second name of a tied one.

    Raises:
        CheckpointError: ``source`` is not of this kind, is damaged, or would execute code; or ``path`` already holds a
            checkpoint.
    """
    source, path = Path(source), Path(path)
    if (path / INDEX).exists():
        raise CheckpointError(f"{path} holds a checkpoint already. Choose another folder, or remove it first.")
    content = _read(source, kind, optimizer, names)
    for name in without:
        if content.tensors.pop(f"{MODEL}.{name}", None) is None:
            raise CheckpointError(f"without names {name!r}, but {source} has no such weights.")
    understood(source, partial(_check, source, content))
    _write(path, content)


def _read(source: Path, kind: str, optimizer: str | Path | None, names: Sequence[str] | None) -> Content:
    if kind == "auto":
        kind = kind_of(source)
    read = {
        "torch": lambda: from_torch(source, optimizer, names),
        "dcp": lambda: from_dcp(source),
        "universal": lambda: from_universal(source),
        "safetensors": lambda: from_safetensors(source),
    }
    if kind not in read:
        raise CheckpointError(f"kind must be one of {', '.join(read)} or auto, got {kind!r}.")
    if kind != "torch" and (optimizer is not None or names is not None):
        raise CheckpointError(f"optimizer and names are for files of torch, and {source} is of kind {kind!r}.")
    return understood(source, read[kind])


def _write(path: Path, content: Content) -> None:
    tensors = dict(content.tensors)
    about = _about(content)
    if content.modules is not None:
        about["modules"] = {}
        for name, value in content.modules.items():
            if isinstance(value, Tensor):
                tensors[f"{EXTRA}.{name}"] = value
            else:
                about["modules"][name] = value
    lock = Lock(path)
    try:
        if (path / INDEX).exists():  # again, under the lock
            raise CheckpointError(f"another job has saved a checkpoint to {path}. Choose another folder.")
        save_tensors(tensors, Writer(path, about), flatten=False)
    finally:
        lock.release()


def _about(content: Content) -> dict[str, Any]:
    """Return the index's ``about`` of an imported state, without its extra state."""
    optimizer = None
    if content.groups:
        # torch's Adam and AdamW have the same state; their groups differ in this flag.
        is_adam = content.groups[0].get("decoupled_weight_decay") is False
        optimizer = "Adam" if is_adam else "AdamW"
    return {
        "written by": f"dist_adamw {__version__}",
        "time": time.time(),
        "engine": content.engine,
        "world_size": 1,
        "optimizer": optimizer,
        "decay_by": None,
        "groups": content.groups,
        "scalars": content.scalars,
        "scheduler": None,
        "schedule": None,
        "extra": {},
    }


def _check(source: Path, content: Content) -> None:
    shapes = {key: tuple(tensor.shape) for key, tensor in content.tensors.items()}
    for key, tensor in content.tensors.items():
        if tensor.dtype not in DTYPES.values():
            raise CheckpointError(f"{source} has {key} in {tensor.dtype}, which checkpoints do not hold. Convert it.")
        kind, _, name = key.partition(".")
        weights = shapes.get(f"{MODEL}.{name}")
        if weights != shapes[key]:
            what = "none" if weights is None else f"of shape {list(weights)}"
            raise CheckpointError(
                f"{source} has {kind} of shape {list(shapes[key])} for {name}, and weights {what}. Pass the names of "
                "the parameters in the optimizer's order."
            )
    _check_groups(source, content, shapes.keys())


def _check_groups(source: Path, content: Content, keys: Collection[str]) -> None:
    trained = [name for group in content.groups for name in group["names"]]
    if missing := [name for name in trained if f"{MODEL}.{name}" not in keys]:
        raise CheckpointError(f"{source} has an optimizer of {missing[0]!r}, and no weights of that name.")
    if len(set(trained)) < len(trained):
        raise CheckpointError(f"{source} has the same parameter twice in its groups.")


def save_tensors(tensors: dict[str, Any], writer: StorageWriter, *, flatten: bool) -> None:
    """Write tensors with ``writer``, from this process alone. Local.

    Raises:
        CheckpointError: they could not be written.
    """
    planner = DefaultSavePlanner(flatten_state_dict=flatten, flatten_sharded_tensors=False)
    try:
        with warnings.catch_warnings():  # that one process writes everything is intended
            warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
            dcp_save(tensors, storage_writer=writer, planner=planner, no_dist=True)
    except CheckpointException as failed:
        if isinstance(writer, Writer):
            writer.discard()
        error = next(iter(failed.failures.values()))[0]
        if isinstance(error, CheckpointError):
            raise error from failed
        raise CheckpointError(f"could not write: {type(error).__name__}: {error}.") from error
