"""Training states in the files of other libraries, read without executing anything in them.

Knows those files, and imports no library of theirs but torch. Local.

A pickle says which classes it is made of. Here it gets records in their place, or is refused: see `_load` for what
``torch.save`` wrote, and `_Unpickler` for the index of ``torch.distributed.checkpoint``.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import pickletools
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from dist_adamw.checkpoint.formats.unpickling import load_safely
from dist_adamw.checkpoint.state import MODEL
from dist_adamw.checkpoint.storage.files import read_exactly
from dist_adamw.checkpoint.storage.index import CODES, DTYPES, INDEX, open_plainly
from dist_adamw.checkpoint.storage.partial_tensor import PartialTensor, Values
from dist_adamw.checkpoint.storage.regions import Box, overlap_anywhere
from dist_adamw.errors import CheckpointError
from dist_adamw.optimizer.sharding.shard import MOMENTS
from dist_adamw.plain_data import plain
from dist_adamw.schedule.third_party import without_wrappers

Kind = Literal["torch", "dcp", "universal", "safetensors"]
T = TypeVar("T")
_MODEL_KEYS = ("model", "model_state_dict", "state_dict", "module")
_OPTIMIZER_KEYS = ("optimizer", "optimizer_state_dict", "optim", "optim_state_dict")
_OF_STATE = ("step", *MOMENTS)
FP32 = "fp32"


@dataclass
class Content:
    """What there is to be imported, under our keys; see `checkpoint.state`."""

    engine: str
    tensors: dict[str, Tensor] = field(default_factory=dict)
    scalars: dict[str, dict[str, float]] = field(default_factory=dict)
    groups: list[dict[str, Any]] = field(default_factory=list)
    modules: dict[str, Any] | None = None  # extra state by name; None: not known

    def add_state(self, name: str, kind: str, value: Any) -> None:
        """Take one thing of the state that AdamW has of a parameter."""
        if kind not in _OF_STATE:
            raise CheckpointError(
                f"the optimizer's state has {kind!r} of {name}, which AdamW does not have, only "
                f"{', '.join(_OF_STATE)}. Import the weights alone."
            )
        if kind == "step":
            self.scalars[name] = {"step": float(value)}
        else:
            self.tensors[f"{kind}.{name}"] = value


def kind_of(source: Path) -> Kind:
    """What a file or folder is, by its name and what is there. Local."""
    if source.is_file():
        return "safetensors" if source.suffix == ".safetensors" else "torch"
    if not source.is_dir():
        raise CheckpointError(f"there is no {source}: no such file or folder.")
    if (source / ".metadata").exists():
        return "dcp"
    if (source / "zero").is_dir() or (source / "latest_universal").exists():
        return "universal"
    if any(file for pattern in ("", "*/") for file in source.glob(f"{pattern}*_optim_states.pt")):
        raise CheckpointError(
            f"{source} is a checkpoint of DeepSpeed that only as many ranks could load. Convert it with `python -m "
            "deepspeed.checkpoint.ds_to_universal --inject_missing_state --input_folder ... --output_folder ...`, "
            "which executes what the files say, and import what that writes."
        )
    if (source / INDEX).exists():
        raise CheckpointError(f"{source} is a checkpoint of dist_adamw already. Pass it to dist_adamw.load.")
    raise CheckpointError(
        f"{source} is a folder of no known kind: it has no .metadata of torch.distributed.checkpoint and no zero/ of "
        "DeepSpeed's universal format."
    )


def understood(source: Path, read: Callable[[], T]) -> T:
    """What ``read`` returns. Local.

    Raises:
        CheckpointError: whatever ``read`` raised, in a sentence.
    """
    try:
        return read()
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{source} cannot be read: {error}.") from error
    except Exception as error:  # what damaged files make of the libraries that read them has no end
        first = (str(error).splitlines() or [""])[0]
        raise CheckpointError(f"{source} is damaged or of another kind: {type(error).__name__}: {first}.") from error


# ---------------------------------------------------------------------------------------------- files of torch.save


# By this some versions of Python (3.11.2) pickle a member of an enum, from its class and name.
_MEMBERS = ("getattr", "builtins.getattr", "__builtin__.getattr")


class _Record:
    """What a pickle says of an object. Its class is known by name only: nothing of it is called."""

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)
        else:
            self.state = state


def _load(file: Path) -> Any:
    """What ``torch.save`` wrote; big tensors stay in the file until they are needed."""
    if not file.is_file():
        raise CheckpointError(f"there is no file {file}.")
    # DeepSpeed puts objects of its own (loss scalers, enums) beside what we need.
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
    content = _load(source)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{source} holds a {type(content).__name__}. Save {{'model': ..., 'optimizer': ...}}.")
    weights = _part(content, _MODEL_KEYS)
    if weights is None and "param_groups" in content:
        raise CheckpointError(f"{source} is an optimizer's. Pass the model's file, and this one as optimizer.")
    state: Any = None
    if optimizer is not None:
        state = _load(Path(optimizer))
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
    found.groups = [_group(group, [of[number] for number in group["params"]]) for group in groups]
    for number, values in state["state"].items():
        for kind, value in values.items():
            found.add_state(of[number], kind, value)


def _group(group: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
    for key, value in group.items():
        if isinstance(value, Tensor) and value.numel() > 1:
            raise CheckpointError(
                f"{key} of a parameter group is a tensor of shape {list(value.shape)}, and no number."
            )
    # "step" is what DeepSpeed's FusedAdam counts there; ours are by parameter.
    return {"names": names, **{k: plain(v) for k, v in group.items() if k not in ("params", "param_names", "step")}}


# ---------------------------------------------------------------------------------------------- folders of DCP


_DCP = "torch.distributed.checkpoint"
_NEEDED = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("pathlib._local", "PosixPath"),
    ("pathlib._local", "WindowsPath"),
    ("collections", "OrderedDict"),
    (f"{_DCP}.filesystem", "_StorageInfo"),
    *((f"{_DCP}.metadata", name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties")),
    *((f"{_DCP}.metadata", f"{name}StorageMetadata") for name in ("Tensor", "Bytes", "Chunk")),
    (f"{_DCP}.metadata", "_MEM_FORMAT_ENCODING"),
}


class _Unpickler(pickle.Unpickler):
    """Reads a ``.metadata`` into records; what it does not need, it refuses."""

    def find_class(self, module: str, name: str) -> Any:
        """Something inert in the place of a class or function."""
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        if f"{module}.{name}" in _MEMBERS:
            return type(name, (_Record,), {})
        if (module, name) not in _NEEDED:
            raise CheckpointError(
                f"its .metadata asks for {module}.{name}, which describes no tensors, and nothing is executed. Do not "
                "load this folder with anything else, unless you know why it does."
            )
        if name == "OrderedDict":
            return OrderedDict
        return tuple if name == "Size" else type(name, (_Record,), {})


def _check_memo(data: bytes) -> None:
    """Raise where a pickle would number more objects than it can have: Python makes room for the largest number."""
    for opcode, number, _ in pickletools.genops(data):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and (number or 0) > len(data):
            raise CheckpointError(f"its .metadata is damaged: it numbers {number:,} objects in {len(data):,} bytes.")


class _Dcp:
    """A folder of torch.distributed.checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with open_plainly(folder / ".metadata") as file:
            try:
                data = file.read()
                _check_memo(data)
                found = _Unpickler(io.BytesIO(data)).load()
            except CheckpointError as error:
                raise CheckpointError(f"{folder}: {error}") from error
            except (pickle.UnpicklingError, EOFError, ValueError) as error:
                raise CheckpointError(f"{folder}/.metadata is damaged: {error}.") from error
        self.items: Mapping[str, Any] = found.state_dict_metadata
        self.paths: Mapping[str, tuple[Any, ...]] = getattr(found, "planner_data", None) or {}
        self._places = {
            (where.fqn, tuple(getattr(where, "offset", None) or ())): place
            for where, place in found.storage_data.items()
        }

    def is_tensor(self, key: str) -> bool:
        return type(self.items[key]).__name__ == "TensorStorageMetadata"

    def tensor(self, key: str) -> Tensor:
        """One that is read when it is needed, chunk by chunk."""
        item = self.items[key]
        dtype, shape = item.properties.state[0], tuple(item.size)
        boxes = [Box(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in item.chunks]
        fits = all(
            len(box.offsets) == len(box.sizes) == len(shape)
            and all(a >= 0 and n >= 0 and a + n <= m for a, n, m in zip(*box, shape, strict=True))
            for box in boxes
        )
        boxes = [box for box in boxes if box.numel]
        if not fits or math.prod(shape) != sum(b.numel for b in boxes) or overlap_anywhere(boxes, len(shape)):
            raise CheckpointError(f"{self.folder} is damaged: {key} has gaps or overlaps.")
        if not boxes:
            return torch.empty(shape, dtype=dtype)
        return PartialTensor(shape, dtype, {box: partial(self._chunk, key, box, dtype) for box in boxes})

    def _chunk(self, key: str, box: Box, dtype: torch.dtype) -> Tensor:
        found = self._read(key, box.offsets)
        if not isinstance(found, Tensor) or tuple(found.shape) != box.sizes or found.dtype != dtype:
            raise CheckpointError(f"{self.folder} is damaged: {key} is not what its .metadata says.")
        return found

    def value(self, key: str) -> Any:
        """A number, or other plain data."""
        if self.is_tensor(key):
            item = self.items[key]
            return self._read(key, (0,) * len(item.size))
        return self._read(key, ())

    def _read(self, key: str, offsets: tuple[int, ...]) -> Any:
        place = self._places[key, offsets]
        if getattr(place, "transform_descriptors", None):
            raise CheckpointError(f"{self.folder} has {key} compressed. Save it without extensions.")
        with open_plainly(self.folder / inside(self.folder, place.relative_path)) as file:
            if not 0 <= place.offset <= place.offset + place.length <= os.fstat(file.fileno()).st_size:
                raise CheckpointError(f"{self.folder} is damaged: {key} reaches beyond {place.relative_path}.")
            data = io.BytesIO(read_exactly(file, place.offset, place.length).numpy().data)
        return _tensors_and_plain_data(data, f"{key} in {self.folder}")


def from_dcp(source: Path) -> Content:
    """A folder of ``torch.distributed.checkpoint``, with ``get_state_dict``'s two somewhere in it. Local."""
    folder = _Dcp(source)
    weights: dict[tuple[Any, ...], dict[str, str]] = {}
    states: dict[tuple[Any, ...], list[tuple[str, str, str]]] = {}
    of_groups: dict[Any, dict[str, Any]] = {}
    for key in folder.items:
        path = tuple(folder.paths.get(key, (key,)))
        if (of_state := _place(path, "state")) is not None:
            states.setdefault(of_state[0], []).append((*of_state[1:], key))
        elif (of_group := _place(path, "param_groups")) is not None:
            of_groups.setdefault(of_group[1], {})[of_group[2]] = folder.value(key)
        elif folder.is_tensor(key):
            weights.setdefault(path[:-1], {})[str(path[-1])] = key
    if len(states) > 1:
        raise CheckpointError(f"{source} has {len(states)} optimizers, {sorted(states)}. Save one.")
    found = Content("torch.distributed.checkpoint")
    for name, kind, key in next(iter(states.values()), []):
        found.add_state(name, kind, folder.value(key) if kind == "step" else folder.tensor(key))
    found.groups = _dcp_groups(of_groups)
    trained = {name for group in found.groups for name in group["names"]}
    for name, key in _model_of(source, weights, trained).items():
        found.tensors[f"{MODEL}.{name}"] = folder.tensor(key)
    return found


def _place(path: tuple[Any, ...], part: str) -> tuple[tuple[Any, ...], Any, str] | None:
    """Of ``(..., part, name, what)``, or ``(..., "part.name.what")`` as flattened optimizer states have it."""
    if len(path) > 2 and path[-3] == part and str(path[-1]).isidentifier():
        return path[:-3], path[-2], path[-1]
    flat = re.fullmatch(rf"{part}\.(.+)\.(\w+)", str(path[-1]))
    if flat and (part == "param_groups" or flat[2] in _OF_STATE):
        return path[:-1], flat[1], flat[2]
    return None


def _dcp_groups(of_groups: Mapping[Any, dict[str, Any]]) -> list[dict[str, Any]]:
    if all(isinstance(number, int) for number in of_groups):
        return [_group(of_groups[number], of_groups[number]["params"]) for number in sorted(of_groups)]
    groups: list[dict[str, Any]] = []  # flattened ones are by parameter
    for name, values in of_groups.items():
        group = _group(values, [name])
        alike = next((other for other in groups if {**other, "names": 0} == {**group, "names": 0}), None)
        if alike is None:
            groups.append(group)
        else:
            alike["names"].append(name)
    return groups


def _model_of(source: Path, weights: Mapping[tuple[Any, ...], dict[str, str]], trained: set[str]) -> dict[str, str]:
    chosen = [where for where, names in weights.items() if trained <= names.keys()]
    if len(chosen) > 1:
        chosen = [where for where in chosen if where and where[-1] in _MODEL_KEYS]
    if len(chosen) != 1:
        places = ", ".join(".".join(map(str, where)) or "the top" for where in weights)
        raise CheckpointError(f"{source} has tensors at {places}: which are the model's? Save it as 'model'.")
    return weights[chosen[0]]


# ---------------------------------------------------------------------------------------------- DeepSpeed's universal


def from_universal(source: Path) -> Content:
    """A folder of DeepSpeed's universal format, or the one with ``latest_universal``. Local."""
    if not (source / "zero").is_dir() and (latest := source / "latest_universal").is_file():
        source = source / inside(source, latest.read_text().strip())
    if any(source.glob("*mp_rank_01_model_states.pt")):
        raise CheckpointError(f"{source} is of a model in parallel parts, which have other names on every rank.")
    model = _load(_model_file(source))
    optim = _load(source / "zero" / "optimizer_state.pt")
    trained: list[dict[str, Any]] = model["param_shapes"]
    groups = optim["param_groups"]
    if len(groups) == 1:
        trained = [{name: shape for part in trained for name, shape in part.items()}]
    if len(trained) != len(groups):
        raise CheckpointError(f"{source} has {len(groups)} groups in {len(trained)} parts: which is whose is not said.")
    found = Content("DeepSpeed")
    order = {name: i for i, name in enumerate(model["module"])}  # ZeRO-1 and 2 shuffle parameters
    for shapes, group in zip(trained, groups, strict=True):
        found.groups.append(_group(group, sorted(shapes, key=lambda name: order.get(name, len(order)))))
        for name in found.groups[-1]["names"]:
            _add_universal(source, name, tuple(shapes[name]), optim, found)
    for name, tensor in _rest_of_universal(source, model):
        found.tensors.setdefault(f"{MODEL}.{name}", tensor)
    return found


def inside(folder: Path, name: str) -> str:
    """``name``, which a checkpoint gives to something in ``folder``. Local.

    Raises:
        CheckpointError: it leads out of there.
    """
    if Path(name).name != name or name in ("", ".."):
        raise CheckpointError(f"{folder} names {name!r}, which lies outside of it.")
    return name


def _model_file(source: Path) -> Path:
    whole = source / "mp_rank_00_model_states.pt"
    return whole if whole.exists() else source / "zero_pp_rank_0_mp_rank_00_model_states.pt"


def _add_universal(source: Path, name: str, shape: tuple[int, ...], optim: Any, found: Content) -> None:
    folder = source / "zero" / inside(source, name)

    def read(kind: str) -> Tensor:
        content = _load(folder / f"{kind}.pt")
        whole: Tensor = content["param"] if isinstance(content, dict) else content
        return whole.view(shape).float()

    for kind in (FP32, *MOMENTS):
        if kind == FP32 or (folder / f"{kind}.pt").exists():
            key = f"{MODEL if kind == FP32 else kind}.{name}"
            found.tensors[key] = lazy(shape, torch.float32, partial(understood, folder, partial(read, kind)))
    if (folder / "step.pt").exists():
        step = _load(folder / "step.pt")
    else:  # of stage 3
        step = next(iter(optim["optimizer_state_dict"]["state"].values()))["step"]
    found.add_state(name, "step", step)


def _rest_of_universal(source: Path, model: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Buffers and frozen parameters; of the latter, stage 3 leaves every rank's part in a file of its own."""
    frozen = model.get("frozen_param_shapes") or {}
    trained = {name for shapes in model["param_shapes"] for name in shapes}
    ranks = sorted(source.glob("zero_pp_rank_*_mp_rank_00_model_states.pt"), key=lambda f: int(f.name.split("_")[3]))
    parts = [_load(file)["frozen_param_fragments"] for file in ranks] if frozen and len(ranks) > 1 else []
    for name, tensor in model["module"].items():
        if name in trained or name in (model.get("shared_params") or {}):
            continue
        if name in frozen and tuple(tensor.shape) != tuple(frozen[name]):
            shape = frozen[name]
            fragments = [part[name].flatten() for part in parts] or [model["frozen_param_fragments"][name].flatten()]
            tensor = torch.cat(fragments)[: math.prod(shape)].view(tuple(shape))
        yield name, tensor


def lazy(shape: Sequence[int], dtype: torch.dtype, make: Values) -> PartialTensor:
    """A tensor that is read when it is saved, so that one is in memory at a time. Local."""
    return PartialTensor(shape, dtype, {Box((0,) * len(shape), tuple(shape)): make})


# ---------------------------------------------------------------------------------------------- safetensors


def from_safetensors(source: Path) -> Content:
    """A file of weights. Local."""
    from safetensors import SafetensorError, safe_open

    dtypes = {code: dtype for dtype, code in CODES.items()}

    def read(name: str) -> Tensor:
        with safe_open(source, framework="pt") as file:
            found: Tensor = file.get_tensor(name)
            return found

    found = Content("safetensors")
    try:
        with safe_open(source, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  it is no dict
                of = file.get_slice(name)
                if (code := of.get_dtype()) not in dtypes:
                    raise CheckpointError(f"{source} has {name} in {code}, which checkpoints do not hold. Convert it.")
                found.tensors[f"{MODEL}.{name}"] = lazy(of.get_shape(), dtypes[code], partial(read, name))
    except SafetensorError as error:
        raise CheckpointError(f"{source} is no whole safetensors file: {error}.") from error
    return found
