"""Read weights from a safetensors file."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from torch import Tensor

from dist_adamw.checkpoint.formats.content import Content, lazy
from dist_adamw.checkpoint.local_state import MODEL
from dist_adamw.checkpoint.storage.index import CODES
from dist_adamw.errors import CheckpointError


def from_safetensors(source: Path) -> Content:
    """Read a file of weights. Local."""
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
        raise CheckpointError(f"{source} is not a whole safetensors file: {error}.") from error
    return found
