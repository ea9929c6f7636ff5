"""Read folders of DeepSpeed's universal format (``ds_to_universal``), of any ZeRO stage."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_adamw.checkpoint.formats.content import FP32, Content, lazy, plain_group, understood
from dist_adamw.checkpoint.formats.torch_file import load_pickle
from dist_adamw.checkpoint.local_state import MODEL
from dist_adamw.checkpoint.storage.files import inside
from dist_adamw.errors import CheckpointError
from dist_adamw.optimizer.sharding.bucket_views import MOMENTS


def from_universal(source: Path) -> Content:
    """Read a folder of DeepSpeed's universal format, or its parent with ``latest_universal``. Local."""
    latest = source / "latest_universal"
    if not (source / "zero").is_dir() and latest.is_file():
        source = source / inside(source, latest.read_text().strip())
    if any(source.glob("*mp_rank_01_model_states.pt")):
        raise CheckpointError(f"{source} is of a model-parallel job, whose parameter names differ by rank.")
    model = load_pickle(_model_file(source))
    optim = load_pickle(source / "zero" / "optimizer_state.pt")
    trained: list[dict[str, Any]] = model["param_shapes"]
    groups = optim["param_groups"]
    if len(groups) == 1:
        trained = [_merged(trained)]
    if len(trained) != len(groups):
        raise CheckpointError(f"{source} has {len(groups)} groups in {len(trained)} parts: which is which is unknown.")
    found = Content("DeepSpeed")
    order = {name: i for i, name in enumerate(model["module"])}  # ZeRO-1 and 2 shuffle parameters
    for shapes, group in zip(trained, groups, strict=True):
        names = sorted(shapes, key=lambda name: order.get(name, len(order)))
        found.groups.append(plain_group(group, names))
        for name in names:
            _add_universal(source, name, tuple(shapes[name]), optim, found)
    for name, tensor in _rest_of_universal(source, model):
        found.tensors.setdefault(f"{MODEL}.{name}", tensor)
    return found


def _merged(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the union of dicts."""
    merged: dict[str, Any] = {}
    for part in parts:
        merged.update(part)
    return merged


def _model_file(source: Path) -> Path:
    whole = source / "mp_rank_00_model_states.pt"
    return whole if whole.exists() else source / "zero_pp_rank_0_mp_rank_00_model_states.pt"


def _add_universal(source: Path, name: str, shape: tuple[int, ...], optim: Any, found: Content) -> None:
    folder = source / "zero" / inside(source, name)

    def read(kind: str) -> Tensor:
        content = load_pickle(folder / f"{kind}.pt")
        whole: Tensor = content["param"] if isinstance(content, dict) else content
        return whole.view(shape).float()

    for kind in (FP32, *MOMENTS):
        if kind == FP32 or (folder / f"{kind}.pt").exists():
            key = f"{MODEL if kind == FP32 else kind}.{name}"
            found.tensors[key] = lazy(shape, torch.float32, partial(understood, folder, partial(read, kind)))
    if (folder / "step.pt").exists():
        step = load_pickle(folder / "step.pt")
    else:  # stage 3 keeps one step for the whole optimizer
        step = next(iter(optim["optimizer_state_dict"]["state"].values()))["step"]
    found.add_state(name, "step", step)


def _rest_of_universal(source: Path, model: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Yield buffers and frozen parameters."""
    frozen = model.get("frozen_param_shapes") or {}
    tied = model.get("shared_params") or {}
    trained = _merged(model["param_shapes"])
    parts = _frozen_parts(source, model) if frozen else []
    for name, tensor in model["module"].items():
        if name in trained or name in tied:
            continue
        if name in frozen and tuple(tensor.shape) != tuple(frozen[name]):
            shape = tuple(frozen[name])
            whole = torch.cat([part[name].flatten() for part in parts])
            tensor = whole[: math.prod(shape)].view(shape)  # padding comes last
        yield name, tensor


def _frozen_parts(source: Path, model: Mapping[str, Any]) -> list[Mapping[str, Tensor]]:
    """Return the parts of frozen parameters in rank order: in stage 3 each is in its rank's file."""
    files = sorted(source.glob("zero_pp_rank_*_mp_rank_00_model_states.pt"), key=lambda f: int(f.name.split("_")[3]))
    if len(files) > 1:
        return [load_pickle(file)["frozen_param_fragments"] for file in files]
    return [model.get("frozen_param_fragments") or {}]
