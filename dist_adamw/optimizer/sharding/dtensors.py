"""Find the local part of a DTensor, and the ranks that hold the rest.

Importing DTensor takes most of a second, so this module imports it only once there is one.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, TypeGuard

from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_dtensor(value: Any) -> TypeGuard[DTensor]:
    """Return whether ``value`` is a DTensor. Local."""
    # The module may be only partly imported at this moment, and have no attribute of that name yet.
    kind = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    return kind is not None and isinstance(value, kind)


def local_of(tensor: Tensor) -> Tensor:
    """Return the part of ``tensor`` in this process: a DTensor's local tensor, else the tensor itself. Local."""
    return tensor._local_tensor if is_dtensor(tensor) else tensor


def local_gradient(grad: Tensor, param: Tensor) -> Tensor:
    """Return the elements of ``grad`` that match `local_of` of ``param``. Collective if their placements differ."""
    if not is_dtensor(param):
        return grad
    if not is_dtensor(grad):
        raise RuntimeError(
            f"a gradient of shape {tuple(grad.shape)} is a plain tensor, but its parameter is a DTensor placed "
            f"{param.placements}. Do not replace gradients that backward has computed."
        )
    from torch.distributed._functional_collectives import AsyncCollectiveTensor

    if grad.placements != param.placements:
        grad = grad.redistribute(placements=param.placements)
    local = grad._local_tensor
    return local.wait() if isinstance(local, AsyncCollectiveTensor) else local


def placed_like(tensor: Tensor, param: Tensor) -> Tensor:
    """Return the elements of whole state, or of a DTensor with any placement, that match `local_of` of ``param``.

    Collective if a DTensor's placements differ from the parameter's.
    """
    if not is_dtensor(param):
        return tensor.full_tensor() if is_dtensor(tensor) else tensor
    if not is_dtensor(tensor):
        from torch.distributed.tensor import distribute_tensor

        # Without a source rank nothing is sent, since every rank has the whole tensor.
        placed = distribute_tensor(tensor, param.device_mesh, param.placements, src_data_rank=None)
        return placed._local_tensor
    if tensor.placements != param.placements:
        return tensor.redistribute(param.device_mesh, param.placements)._local_tensor
    return tensor._local_tensor


def as_dtensor(local: Tensor, param: DTensor) -> Tensor:
    """Return the DTensor placed as ``param`` whose local tensor is ``local``. Local."""
    from torch.distributed.tensor import DTensor

    made: Tensor = DTensor.from_local(
        local, param.device_mesh, param.placements, run_check=False, shape=param.shape, stride=param.stride()
    )
    return made


def shard_axes(param: Tensor) -> tuple[Any, ...] | None:
    """Return the mesh of a DTensor and the axes along which it is sharded; None for other tensors. Local."""
    if not is_dtensor(param):
        return None
    axes = tuple(axis for axis, placement in enumerate(param.placements) if not placement.is_replicate())
    return (param.device_mesh, axes)
