"""Export a checkpoint to another library's format, in a single process.

Only a few tensors are in memory at a time, except for ``torch.save``, which needs all of them.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import shutil
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from dist_adamw.checkpoint.averages import slots_of
from dist_adamw.checkpoint.compatibility import checked, samples_of
from dist_adamw.checkpoint.formats.content import FP32, Kind, lazy
from dist_adamw.checkpoint.formats.importing import save_tensors
from dist_adamw.checkpoint.local_state import MASTER, MODEL, same_family, saved_family
from dist_adamw.checkpoint.storage.files import inside, read_whole
from dist_adamw.checkpoint.storage.index import CODES, Index, sync_folder, write_text
from dist_adamw.errors import CheckpointError
from dist_adamw.optimizer.averages import AVERAGED
from dist_adamw.optimizer.kernels.averaging import mean_of
from dist_adamw.optimizer.sharding.bucket_views import MOMENTS


def export_checkpoint(
    path: str | Path, target: str | Path, kind: Kind, *, master: bool = False, average: str | None = None
) -> None:
    """Write a checkpoint in another library's format. Local.

    Args:
        path: The checkpoint's folder.
        target: The file (torch, safetensors) or folder (the others) to write. A file ``latest_universal`` next to
            DeepSpeed's folder names it.
        kind: The kind of ``target``. From its universal format, DeepSpeed loads neither buffers nor frozen parameters,
            and under ZeRO-3 it gives every group the hyper-parameters of the first.
        master: Whether to write the fp32 weights if the model's have less precision; always True for DeepSpeed.
        average: The name of an average of the weights to write in their place: see `DistAdamW`. safetensors only, since
            the optimizer's state belongs to the weights.

    Raises:
        CheckpointError: the checkpoint is damaged, ``target`` already exists, or the kind cannot hold it.
    """
    target, ours = Path(target), _Ours(checked(Path(path)), master or kind == "universal", average)
    write = {"torch": _to_torch, "dcp": _to_dcp, "universal": _to_universal, "safetensors": _to_safetensors}
    if kind not in write:
        raise CheckpointError(f"kind must be one of {', '.join(write)}, got {kind!r}.")
    optimizer = saved_family(ours.about)
    if average is not None and kind != "safetensors":
        raise CheckpointError(f"an average of the weights is exported as safetensors, without optimizer; got {kind!r}.")
    if kind != "safetensors" and optimizer is not None and not same_family(optimizer, "AdamW"):
        raise CheckpointError(f"{path} has the state of {optimizer}, and only AdamW's is exported. Use safetensors.")
    if kind == "universal" and optimizer is None:
        raise CheckpointError(f"{path} has weights alone, which DeepSpeed does not load. Use safetensors.")
    with _taking_its_place(target) as unfinished:
        write[kind](ours, unfinished)
    if kind == "universal":
        write_text(target.parent / "latest_universal", target.name)


class _Ours:
    """A checkpoint of ours to export."""

    def __init__(self, index: Index, master: bool, average: str | None) -> None:
        self.index, self.about, self.master = index, index.about, master
        self._slots = [] if average is None else slots_of(index, average)
        kinds: dict[str, list[str]] = {}
        for key in index.tensors:
            kind, _, name = key.partition(".")
            kinds.setdefault(name, []).append(kind)
        self.names = [name for name, found in kinds.items() if MODEL in found]
        self.kinds = {name: [kind for kind in kinds[name] if kind not in (MODEL, MASTER)] for name in self.names}
        self.trained = [name for group in self.about["groups"] for name in group["names"]]

    def weights_key(self, name: str) -> str:
        exact = f"{MASTER}.{name}"
        return exact if self.master and exact in self.index.tensors else f"{MODEL}.{name}"

    def read(self, key: str) -> Tensor:
        return read_whole(self.index, key)

    def weights(self, name: str) -> Tensor:
        slots = [key for slot in self._slots if (key := f"{slot}.{name}") in self.index.tensors]
        if not slots:  # frozen or never updated, so equal to its average
            return self.read(self.weights_key(name))
        return mean_of(list(map(self.read, slots))).to(self.weights_dtype(name))

    def weights_dtype(self, name: str) -> torch.dtype:
        exact = f"{self._slots[0]}.{name}" if self._slots and self.master else ""
        return self.index.tensors[exact if exact in self.index.tensors else self.weights_key(name)].dtype

    def groups(self) -> list[dict[str, Any]]:
        """Return groups with "names", and with values in torch's types and conventions."""
        found = []
        for group in self.about["groups"]:
            values = {k: tuple(v) if isinstance(v, list) and k != "names" else v for k, v in group.items()}
            found.append({**values, "weight_decay": self._decay(group)})
        return found

    def _decay(self, group: dict[str, Any]) -> float:
        """Return the weight decay in torch's convention, where the update multiplies it by lr."""
        decay: float = group["weight_decay"]
        return decay / group["lr"] if self.about.get("decay_by") == "schedule" and group["lr"] else decay

    def groups_of_adamw(self) -> list[dict[str, Any]]:
        """Return groups with all of ``torch.optim.AdamW``'s keys, and names as "params"."""
        defaults = torch.optim.AdamW([torch.zeros(1)]).param_groups[0]
        found = []
        for group in self.groups():
            names = group.pop("names")
            # A torch scheduler that resumes (last_epoch >= 0) requires "initial_lr".
            found.append({**defaults, "initial_lr": group["lr"], **group, "params": names, "param_names": names})
        return found

    def step(self, name: str) -> Tensor:
        return torch.tensor(float(self.about["scalars"].get(name, {}).get("step", 0.0)))

    def states(self, read: Callable[[str], Tensor]) -> dict[str, dict[str, Tensor]]:
        states: dict[str, dict[str, Tensor]] = {}
        for name in self.trained:
            if self.kinds[name]:
                states[name] = {"step": self.step(name)}
                for kind in self.kinds[name]:
                    states[name][kind] = read(f"{kind}.{name}")
        return states


@contextlib.contextmanager
def _taking_its_place(target: Path) -> Iterator[Path]:
    """Give a temporary path to write to, and rename it to ``target`` at the end."""
    if target.exists():
        raise CheckpointError(f"{target} exists already. Choose another name, or remove it first.")
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f"{target.name}.{secrets.token_hex(4)}.partial")  # unique to this process
    try:
        yield unfinished
        unfinished.replace(target)
        sync_folder(target.parent)
    finally:
        _remove(unfinished)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _to_torch(ours: _Ours, target: Path) -> None:
    state: dict[str, Any] = {"model": OrderedDict((name, ours.weights(name)) for name in ours.names)}
    if ours.about["optimizer"] is not None:
        number = {name: i for i, name in enumerate(ours.trained)}  # torch's optimizers number parameters
        groups = ours.groups_of_adamw()
        for group in groups:
            group["params"] = [number[name] for name in group["params"]]
        states = ours.states(ours.read)
        state["optimizer"] = {
            "state": {number[name]: values for name, values in states.items()},
            "param_groups": groups,
        }
    torch.save(state, target)


def _to_dcp(ours: _Ours, target: Path) -> None:
    def later(key: str) -> Tensor:
        saved = ours.index.tensors[key]
        return lazy(saved.shape, saved.dtype, partial(ours.read, key))

    state: dict[str, Any] = {"model": {name: later(ours.weights_key(name)) for name in ours.names}}
    if ours.about["optimizer"] is not None:
        state["optim"] = {"state": ours.states(later), "param_groups": ours.groups_of_adamw()}
    # With one file per rank, the writer would hold all tensors in memory until the file is written.
    save_tensors(state, FileSystemWriter(target, single_file_per_rank=False), flatten=True)


def _to_universal(ours: _Ours, target: Path) -> None:
    groups: list[dict[str, Any]] = []
    for group in ours.groups():
        names = group.pop("names")
        steps = {float(ours.step(name)) for name in names}
        if len(steps) > 1:
            warnings.warn(
                f"parameters of one group have had {sorted(steps)} updates, and DeepSpeed keeps one count for all of "
                f"them: they continue with {max(steps):g}.",
                stacklevel=4,
            )
        step = torch.tensor(max(steps, default=0.0))
        for name in names:
            _to_universal_folder(ours, name, step, target / "zero" / inside(target, name))
        # FusedAdam reads its step from the group; nothing reads "params".
        group.pop(AVERAGED, None)  # DeepSpeed reads moments alone
        groups.append({**group, "step": int(step), "params": [len(groups)]})
    torch.save(_universal_optimizer(groups), target / "zero" / "optimizer_state.pt")
    model = _universal_model(ours, updates=max((group["step"] for group in groups), default=0))
    # Stages 1 and 2 look for the first name, stage 3 for the second.
    for prefix in ("", "zero_pp_rank_0_"):
        torch.save(model, target / f"{prefix}mp_rank_00_model_states.pt")


def _universal_optimizer(groups: list[dict[str, Any]]) -> dict[str, Any]:
    steps = {i: {"step": torch.tensor(float(group["step"]))} for i, group in enumerate(groups)}
    return {
        # Stages 1 and 2 read these two;
        "param_groups": groups,
        "ds_version": "0.19",
        # stage 3 reads this.
        "optimizer_state_dict": {"state": steps, "param_groups": groups},
    }


def _universal_model(ours: _Ours, updates: int) -> dict[str, Any]:
    shapes = []
    for group in ours.about["groups"]:
        tensors = [(name, ours.index.tensors[f"{MODEL}.{name}"]) for name in group["names"]]
        shapes.append(OrderedDict((name, torch.Size(saved.shape)) for name, saved in tensors))
    counts = ours.about["extra"].get("engine", {})
    return {
        "module": OrderedDict((name, ours.weights(name)) for name in ours.names if name not in ours.trained),
        "param_shapes": shapes,
        "lr_scheduler": ours.about["schedule"] or {},
        "skipped_steps": counts.get("skipped_steps", 0),
        "global_steps": counts.get("global_steps", updates),
        "global_samples": counts.get("global_samples", samples_of(ours.index) or 0),
        # Whole parameters, as if one rank had saved them.
        "dp_world_size": 1,
        "mp_world_size": 1,
        "ds_version": "0.19",
        "universal_checkpoint_info": {"universal_checkpoint_version": 0.4},
    }


def _to_universal_folder(ours: _Ours, name: str, step: Tensor, folder: Path) -> None:
    folder.mkdir(parents=True)
    weights = ours.weights(name).float()
    torch.save({"param": weights}, folder / f"{FP32}.pt")
    # DeepSpeed needs moments even if there were no updates.
    kinds = [kind for kind in ours.kinds[name] if kind in MOMENTS] or MOMENTS[:2]
    for kind in kinds:
        found = ours.read(f"{kind}.{name}").float() if ours.kinds[name] else torch.zeros_like(weights)
        torch.save({"param": found}, folder / f"{kind}.pt")
    torch.save(step, folder / "step.pt")


def _to_safetensors(ours: _Ours, target: Path) -> None:
    # The widest dtypes first, so that every tensor is aligned to its element size.
    saved = {name: ours.index.tensors[ours.weights_key(name)] for name in ours.names}
    if "__metadata__" in saved:
        raise CheckpointError(f"{ours.index.folder} has weights named '__metadata__', which safetensors cannot hold.")
    dtypes = {name: ours.weights_dtype(name) for name in saved}
    names = sorted(saved, key=lambda name: -dtypes[name].itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        begin, end = end, end + math.prod(saved[name].shape) * dtypes[name].itemsize
        facts = {"dtype": CODES[dtypes[name]], "shape": list(saved[name].shape)}
        header[name] = {**facts, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with target.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            file.write(ours.weights(name).view(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
