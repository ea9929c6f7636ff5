"""Check a folder of ``save_state``: Accelerate's files, ours, and that one save wrote all of them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from dist_adamw.checkpoint.manifest import fingerprint
from dist_adamw.checkpoint.storage.index import INDEX, check_alike, read_index
from dist_adamw.errors import CheckpointError
from dist_adamw.ranks import collectives

if TYPE_CHECKING:
    from accelerate import Accelerator

FOLDER = "dist_adamw"
# Accelerate's files; others in the folder are the user's and may change after the save.
_THEIRS = (
    *("custom_checkpoint_*.pkl", "scaler.pt", "random_states_*.pkl", "sampler*.bin", "dl_state_dict*.bin"),
    *("model*.safetensors", "pytorch_model*.bin", "optimizer*.bin", "scheduler*.bin"),
)


def find_models(where: Path, names: Sequence[str], group: dist.ProcessGroup | None) -> list[bool]:
    """Return for each model whether some rank sees its folder. Collective."""
    is_there = []
    for name in names:
        reports = collectives.all_gather_objects(os.path.exists(where / name), group)
        is_there.append(any(reports))
    return is_there


def check_all_there(where: Path, names: Sequence[str], is_there: list[bool], group: dist.ProcessGroup | None) -> None:
    """Raise if a model's folder is missing, or some rank does not see it. Collective."""
    found = [name for name, there in zip(names, is_there, strict=True) if there]
    for name in names:
        if name not in found:
            raise CheckpointError(
                f"{where} has {', '.join(found)}, and no {name}: it is of a job with other models, or is incomplete. "
                "Nothing has been loaded; load another checkpoint, or prepare the models that were saved."
            )
        check_alike(where / name, group)


def check_is_of_save_state(where: Path) -> None:
    """Raise if the folder itself is a checkpoint of `dist_adamw.save`, without Accelerate's files. Local."""
    if (where / INDEX).exists():
        raise CheckpointError(
            f"{where} was written by dist_adamw.save, not by accelerator.save_state. Load it with "
            "dist_adamw.load(folder, model, optimizer, scheduler)."
        )


def check_one_save(where: Path, names: Sequence[str]) -> None:
    """Raise if the folders of several models are not from the same ``save_state``. Local."""
    tokens = [read_index(where / name).about["extra"].get("state") for name in names]
    for name, token in zip(names, tokens, strict=True):
        if token != tokens[0]:
            raise CheckpointError(
                f"{where} is not of one save: {name} was not written together with {names[0]}. Nothing has "
                "been loaded; load an older checkpoint."
            )


def check_custom_objects(accelerator: Accelerator, folder: Path) -> None:
    """Check the number of custom objects; Accelerate checks it only after loading everything else. Local."""
    found = len([*folder.glob("custom_checkpoint_*.pkl")])
    if found != len(accelerator._custom_objects):
        raise CheckpointError(
            f"{folder} has the state of {found} custom objects, and {len(accelerator._custom_objects)} are registered. "
            "Register the same ones (register_for_checkpointing)."
        )


def remove_older_objects(accelerator: Accelerator, where: Path) -> None:
    """Remove files of custom objects that an earlier save to this folder had and this one has not. Local."""
    custom = {f"custom_checkpoint_{i}.pkl" for i in range(len(accelerator._custom_objects))}
    for path in where.glob("custom_checkpoint_*.pkl"):
        if path.name not in custom:
            path.unlink()


def files_of(where: Path) -> dict[str, Any]:
    """Return size and checksum of Accelerate's files in the folder. Local."""
    paths = [path for pattern in _THEIRS for path in where.glob(pattern)]
    return {path.name: fingerprint(path) for path in paths if path.is_file()}


def read_extra(folder: Path) -> Any:
    """Return the position that `save_state` saved, after checking Accelerate's files against its record. Local.

    A kill between Accelerate's files and ours leaves a folder with files of two saves.

    Raises:
        CheckpointError: a file is missing or not the one that was saved.
    """
    where, extra = folder.parent, read_index(folder).about.get("extra", {})
    files = extra.get("files", {}) if isinstance(extra, dict) else None
    if not isinstance(files, dict):
        raise CheckpointError(f"{folder} is damaged: the record of save_state is {str(extra)[:200]}.")
    for name, facts in files.items():
        path = where / name
        is_inside = path.resolve().is_relative_to(where.resolve())
        if not is_inside or not path.is_file() or fingerprint(path) != facts:
            raise CheckpointError(
                f"{where} is not of one save: {name} is not what was saved with {folder.name}. Load an older "
                "checkpoint."
            )
    return extra.get("position")


def newest_of(accelerator: Accelerator) -> Path:
    """Return the newest complete checkpoint under automatic naming, the one that ``load_state()`` loads."""
    folder = automatic_folder(accelerator)
    numbered = numbered_checkpoints(folder)
    if not accelerator.project_configuration.automatic_checkpoint_naming or not numbered:
        raise ValueError(f"load_state() got no folder, and {folder} has no checkpoint. Pass load_state(<folder>).")
    whole = [path for path in numbered if any(path.glob(f"{FOLDER}*/{INDEX}"))] or numbered
    if whole[-1] != numbered[-1]:
        warnings.warn(f"{numbered[-1]} is incomplete: {whole[-1]} is loaded instead.", stacklevel=5)
    return whole[-1]


def automatic_folder(accelerator: Accelerator) -> Path:
    """Return the folder of the checkpoints that Accelerate names."""
    return Path(accelerator.project_dir or ".") / "checkpoints"


def number_of(path: Path) -> int:
    """Return the number in the name that Accelerate gave a checkpoint."""
    return int(path.name.removeprefix("checkpoint_"))


def numbered_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints that Accelerate has named, oldest first."""
    found = [path for path in folder.glob("checkpoint_*") if path.name.removeprefix("checkpoint_").isdecimal()]
    return sorted(found, key=number_of)
