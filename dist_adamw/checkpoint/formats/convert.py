"""Training states of other libraries, to our checkpoints and from them, in which nothing is executed.

Knows the files of others, and imports no library of theirs but torch. Local, in one process.

    kind         what it is
    torch        ``torch.save({"model": ..., "optimizer": ...})``, with the state dict of ``torch.optim.AdamW`` or the
                 consolidated one of ``ZeroRedundancyOptimizer``; the two also in files of their own
    dcp          a folder of ``torch.distributed.checkpoint``, of FSDP2 and ``get_state_dict``
    universal    a folder of DeepSpeed's ``ds_to_universal``, of any ZeRO stage
    safetensors  weights alone, in one file

A few tensors are in memory at a time. Only an export to torch has all of them there at once, since ``torch.save``
takes them so; its files are mapped when they are read.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import shutil
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.checkpoint.storage import StorageWriter

from dist_adamw._version import __version__
from dist_adamw.checkpoint.compatibility import checked, samples_of
from dist_adamw.checkpoint.extra_state import EXTRA
from dist_adamw.checkpoint.formats.foreign import (
    FP32,
    Content,
    Kind,
    from_dcp,
    from_safetensors,
    from_torch,
    from_universal,
    inside,
    kind_of,
    lazy,
    understood,
)
from dist_adamw.checkpoint.state import MASTER, MODEL, same_family, saved_family
from dist_adamw.checkpoint.storage.files import Writer, read_whole
from dist_adamw.checkpoint.storage.index import CODES, DTYPES, INDEX, Index, damage, read_index, sync_folder, write_text
from dist_adamw.checkpoint.storage.locks import Lock
from dist_adamw.errors import CheckpointError, printable
from dist_adamw.optimizer.sharding.shard import MOMENTS


def import_checkpoint(
    source: str | Path,
    path: str | Path,
    kind: Kind | Literal["auto"] = "auto",
    *,
    optimizer: str | Path | None = None,
    names: Sequence[str] | None = None,
    without: Sequence[str] = (),
) -> None:
    """Make a checkpoint that `dist_adamw.load` loads on any engine, with ``scheduler=None``. Local.

    There is no random state in it, so loading leaves that alone.

    Args:
        source: A file or folder of another library.
        path: The checkpoint's folder.
        kind: Of ``source``; "auto" looks.
        optimizer: Of torch: the file with the optimizer's state dict, where ``source`` has only the model's.
        names: Of torch: the parameters' names in the optimizer's order, where its groups have no ``param_names``
            and the order is not that of all the weights.
        without: Names of weights that are not taken, such as the second name of a tied one.

    Raises:
        CheckpointError: ``source`` is not of this kind, is damaged, or asks for anything to be executed; or ``path``
            holds a checkpoint.
    """
    source, path = Path(source), Path(path)
    if (path / INDEX).exists():
        raise CheckpointError(f"{path} holds a checkpoint already. Choose another folder, or remove it first.")
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
    content = understood(source, read[kind])
    for name in without:
        if content.tensors.pop(f"{MODEL}.{name}", None) is None:
            raise CheckpointError(f"without names {name!r}, and {source} has no such weights.")
    understood(source, partial(_check, source, content))
    of_adam = content.groups and content.groups[0].get("decoupled_weight_decay") is False
    about = {
        "written by": f"dist_adamw {__version__}",
        "time": time.time(),
        "engine": content.engine,
        "world_size": 1,
        "optimizer": ("Adam" if of_adam else "AdamW") if content.groups else None,
        "decay_by": None,
        "groups": content.groups,
        "scalars": content.scalars,
        "scheduler": None,
        "schedule": None,
        "extra": {},
    }
    tensors = dict(content.tensors)
    if content.modules is not None:
        about["modules"] = {name: value for name, value in content.modules.items() if not isinstance(value, Tensor)}
        tensors |= {f"{EXTRA}.{n}": value for n, value in content.modules.items() if isinstance(value, Tensor)}
    lock = Lock(path)
    try:
        if (path / INDEX).exists():
            raise CheckpointError(f"{path} holds a checkpoint by now. Choose another folder.")
        _save(tensors, Writer(path, about), flatten=False)
    finally:
        lock.release()


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
    trained = [name for group in content.groups for name in group["names"]]
    if missing := [name for name in trained if f"{MODEL}.{name}" not in shapes]:
        raise CheckpointError(f"{source} has an optimizer of {missing[0]!r}, and no weights of that name.")
    if len(set(trained)) < len(trained):
        raise CheckpointError(f"{source} has the same parameter twice in its groups.")


def _save(tensors: dict[str, Any], writer: StorageWriter, *, flatten: bool) -> None:
    planner = DefaultSavePlanner(flatten_state_dict=flatten, flatten_sharded_tensors=False)
    try:
        with warnings.catch_warnings():  # one process writes all of it, also where there are several: so it is meant
            warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
            dcp_save(tensors, storage_writer=writer, planner=planner, no_dist=True)
    except CheckpointException as failed:
        if isinstance(writer, Writer):
            writer.discard()
        error = next(iter(failed.failures.values()))[0]
        if isinstance(error, CheckpointError):
            raise error from failed
        raise CheckpointError(f"could not write: {type(error).__name__}: {error}.") from error


# ---------------------------------------------------------------------------------------------- export


def export_checkpoint(path: str | Path, target: str | Path, kind: Kind, *, master: bool = False) -> None:
    """Write a checkpoint as another library reads it. Local.

    Args:
        path: The checkpoint's folder.
        target: What is to be written: a file of torch or safetensors, a folder of the others. Beside DeepSpeed's
            folder a file ``latest_universal`` names it.
        kind: Of ``target``. From its universal format, DeepSpeed loads neither buffers nor frozen parameters; and for
            ZeRO-3, it gives every group the hyper-parameters of the first.
        master: Whether weights are to be the fp32 ones, where the model's are less exact. DeepSpeed's always are.

    Raises:
        CheckpointError: the checkpoint is damaged, ``target`` is there already, or the kind cannot hold it.
    """
    target, ours = Path(target), _Ours(checked(Path(path)), master or kind == "universal")
    write = {"torch": _to_torch, "dcp": _to_dcp, "universal": _to_universal, "safetensors": _to_safetensors}
    if kind not in write:
        raise CheckpointError(f"kind must be one of {', '.join(write)}, got {kind!r}.")
    optimizer = saved_family(ours.about)
    if kind != "safetensors" and optimizer is not None and not same_family(optimizer, "AdamW"):
        raise CheckpointError(f"{path} has the state of {optimizer}, and only AdamW's is exported. Use safetensors.")
    if kind == "universal" and optimizer is None:
        raise CheckpointError(f"{path} has weights alone, of which DeepSpeed loads none. Use safetensors.")
    with _taking_its_place(target) as unfinished:
        write[kind](ours, unfinished)
    if kind == "universal":
        write_text(target.parent / "latest_universal", target.name)


class _Ours:
    """A checkpoint of ours, to be exported."""

    def __init__(self, index: Index, master: bool) -> None:
        self.index, self.about, self.master = index, index.about, master
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
        return self.read(self.weights_key(name))

    def groups(self) -> list[dict[str, Any]]:
        """Groups with "names", and values as a torch optimizer has them."""
        found = []
        for group in self.about["groups"]:
            values = {k: tuple(v) if isinstance(v, list) and k != "names" else v for k, v in group.items()}
            found.append({**values, "weight_decay": self._decay(group)})
        return found

    def _decay(self, group: dict[str, Any]) -> float:
        """What torch multiplies by lr, and DistAdamW may not."""
        decay: float = group["weight_decay"]
        return decay / group["lr"] if self.about.get("decay_by") == "schedule" and group["lr"] else decay

    def groups_of_adamw(self) -> list[dict[str, Any]]:
        """Everything that ``torch.optim.AdamW`` has in a group, with names as "params"."""
        defaults = torch.optim.AdamW([torch.zeros(1)]).param_groups[0]
        found = []
        for group in self.groups():
            names = group.pop("names")
            # Where there is a scheduler, "initial_lr" is asked for.
            found.append({**defaults, "initial_lr": group["lr"], **group, "params": names, "param_names": names})
        return found

    def step(self, name: str) -> Tensor:
        return torch.tensor(float(self.about["scalars"].get(name, {}).get("step", 0.0)))

    def states(self, read: Callable[[str], Tensor]) -> dict[str, dict[str, Tensor]]:
        return {
            name: {"step": self.step(name), **{kind: read(f"{kind}.{name}") for kind in self.kinds[name]}}
            for name in self.trained
            if self.kinds[name]
        }


@contextlib.contextmanager
def _taking_its_place(target: Path) -> Iterator[Path]:
    """Where to write: it has its name when all of it is there."""
    if target.exists():
        raise CheckpointError(f"{target} is there already. Choose another name, or remove it first.")
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f"{target.name}.{secrets.token_hex(4)}.partial")  # nobody else's
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
        number = {name: i for i, name in enumerate(ours.trained)}
        states = ours.states(ours.read)
        state["optimizer"] = {
            "state": {number[name]: values for name, values in states.items()},
            "param_groups": [{**g, "params": [number[name] for name in g["params"]]} for g in ours.groups_of_adamw()],
        }
    torch.save(state, target)


def _to_dcp(ours: _Ours, target: Path) -> None:
    def later(key: str) -> Tensor:
        saved = ours.index.tensors[key]
        return lazy(saved.shape, saved.dtype, partial(ours.read, key))

    state: dict[str, Any] = {"model": {name: later(ours.weights_key(name)) for name in ours.names}}
    if ours.about["optimizer"] is not None:
        state["optim"] = {"state": ours.states(later), "param_groups": ours.groups_of_adamw()}
    # It would keep all tensors of one file in memory until that is written.
    _save(state, FileSystemWriter(target, single_file_per_rank=False), flatten=True)


def _to_universal(ours: _Ours, target: Path) -> None:
    groups: list[dict[str, Any]] = []
    for group in ours.groups():
        names = group.pop("names")
        steps = {float(ours.step(name)) for name in names}
        if len(steps) > 1:
            warnings.warn(
                f"parameters of one group have had {sorted(steps)} updates, and DeepSpeed counts one number for all of "
                f"them: they go on with {max(steps):g}.",
                stacklevel=4,
            )
        step = torch.tensor(max(steps, default=0.0))
        for name in names:
            _to_universal_folder(ours, name, step, target / "zero" / inside(target, name))
        # The step is FusedAdam's own count; "params" is not read.
        groups.append({**group, "step": int(step), "params": [len(groups)]})
    counts = ours.about["extra"].get("engine", {})
    # Stages 1 and 2 read the first two, stage 3 the third.
    whole = {"param_groups": groups, "ds_version": "0.19"}
    steps_of = {i: {"step": torch.tensor(float(group["step"]))} for i, group in enumerate(groups)}
    stage_3 = {"optimizer_state_dict": {"state": steps_of, "param_groups": groups}}
    torch.save({**whole, **stage_3}, target / "zero" / "optimizer_state.pt")
    shapes = [
        OrderedDict((n, torch.Size(ours.index.tensors[f"{MODEL}.{n}"].shape)) for n in g["names"])
        for g in ours.about["groups"]
    ]
    module = OrderedDict((name, ours.weights(name)) for name in ours.names if name not in ours.trained)
    model = {
        "module": module,
        "param_shapes": shapes,
        "lr_scheduler": ours.about["schedule"] or {},
        "skipped_steps": counts.get("skipped_steps", 0),
        "global_steps": counts.get("global_steps", max((g["step"] for g in groups), default=0)),
        "global_samples": counts.get("global_samples", samples_of(ours.index) or 0),
        "dp_world_size": 1,
        "mp_world_size": 1,
        "ds_version": "0.19",
        "universal_checkpoint_info": {"universal_checkpoint_version": 0.4},
    }
    # What stages 1 and 2 look for, and what stage 3 does.
    for prefix in ("", "zero_pp_rank_0_"):
        torch.save(model, target / f"{prefix}mp_rank_00_model_states.pt")


def _to_universal_folder(ours: _Ours, name: str, step: Tensor, folder: Path) -> None:
    folder.mkdir(parents=True)
    weights = ours.weights(name).float()
    torch.save({"param": weights}, folder / f"{FP32}.pt")
    for kind in ours.kinds[name] or MOMENTS[:2]:  # without updates it has none, and DeepSpeed reads them
        found = ours.read(f"{kind}.{name}").float() if ours.kinds[name] else torch.zeros_like(weights)
        torch.save({"param": found}, folder / f"{kind}.pt")
    torch.save(step, folder / "step.pt")


def _to_safetensors(ours: _Ours, target: Path) -> None:
    # Wide elements first, so that all of them are aligned.
    saved = {name: ours.index.tensors[ours.weights_key(name)] for name in ours.names}
    if "__metadata__" in saved:
        raise CheckpointError(f"{ours.index.folder} has weights named '__metadata__', which safetensors cannot hold.")
    names = sorted(saved, key=lambda name: -saved[name].dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        begin, end = end, end + math.prod(saved[name].shape) * saved[name].dtype.itemsize
        facts = {"dtype": CODES[saved[name].dtype], "shape": list(saved[name].shape)}
        header[name] = {**facts, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with target.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            file.write(ours.weights(name).view(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


# ---------------------------------------------------------------------------------------------- a look


def describe(path: str | Path) -> tuple[str, bool]:
    """What a checkpoint holds, as a short table; and whether it is whole, for which all of it is read. Local.

    Raises:
        CheckpointError: there is no index that says.
    """
    return understood(Path(path), partial(_table, read_index(path)))


def _table(index: Index) -> tuple[str, bool]:
    about, samples = index.about, samples_of(index)
    weights = [saved for key, saved in index.tensors.items() if key.startswith(f"{MODEL}.")]
    kinds = sorted({key.partition(".")[0] for key in index.tensors} - {MODEL})
    steps = {values["step"] for values in about.get("scalars", {}).values() if "step" in values}
    rows = {
        "written by": f"{about.get('written by')}, {time.ctime(about.get('time'))}",
        "engine": f"{about.get('engine')}, {about.get('world_size')} rank(s)",
        "optimizer": f"{about.get('optimizer') or 'none'}, {max(steps, default=0):,.0f} update(s)",
        "schedule": "none" if samples is None else f"{about.get('scheduler')} at {samples:,} samples",
        "weights": f"{sum(math.prod(saved.shape) for saved in weights):,} in {len(weights)} tensors",
        "beside them": ", ".join(kinds) or "nothing",
        "files": f"{sum(size for size, _ in index.files.values()):,} bytes in {len(index.files)}",
        "whole": "yes, to the last bit" if (wrong := damage(index.folder)) is None else f"NO: {wrong}",
    }
    width = max(map(len, rows))
    return "\n".join(f"{name:{width}}  {printable(value)}" for name, value in rows.items()), wrong is None
