"""Take scaled gradients from torch's ``GradScaler``, and skip an update without asking the device whether to.

A ``GradScaler`` asks whether an optimizer can do so (``_step_supports_amp_scaling``). If not, it unscales the gradients
itself, waits for the device, and leaves ``step`` out if a gradient is inf or nan. If so, it sets two attributes of the
optimizer during ``step``: ``found_inf`` (0-d fp32; the number of devices with an inf or nan) and ``grad_scale`` (0-d
fp32; None if gradients have been unscaled).
"""

from __future__ import annotations

from collections import defaultdict
from types import CodeType

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from dist_adamw.optimizer.sharding.dtensors import local_of

_ACCELERATE = "accelerate.optimizer"


def is_scaler(caller: CodeType) -> bool:
    """Return whether ``caller`` is the code of ``GradScaler.step``. Local."""
    return caller is GradScaler.step.__code__


def must_leave_step_out(optimizer: Optimizer) -> bool:
    """Return whether an overflow has to be recognisable by ``step`` not having been called. Local."""
    # Accelerate replaces ``step`` while it calls the scaler, and takes an update for skipped if that was not called.
    return getattr(vars(optimizer).get("step"), "__module__", None) == _ACCELERATE


def found_inf_of(optimizer: Optimizer) -> Tensor | None:
    """Return 1 if a ``GradScaler`` has found inf or nan, else 0, 0-d fp32; None: no scaler calls this step. Local."""
    found_inf = getattr(optimizer, "found_inf", None)
    # torch's kernels skip if it is 1, not if it is 2.
    return found_inf.clamp(max=1.0) if isinstance(found_inf, Tensor) else None


@torch.no_grad()
def unscale_(optimizer: Optimizer) -> None:
    """Divide gradients by the scale that a ``GradScaler`` has left, if any. Local. The bits are its ``unscale_``'s."""
    scale = getattr(optimizer, "grad_scale", None)
    if not isinstance(scale, Tensor):
        return
    grads: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
    for group in optimizer.param_groups:
        for param in group["params"]:
            if param.grad is not None and not param.grad.is_sparse:  # the update itself refuses sparse gradients
                grad = local_of(param.grad)  # a DTensor's operation would be collective
                grads[grad.device, grad.dtype].append(grad)
    inverse = scale.double().reciprocal().float()
    for (device, _), of_device in grads.items():
        unused = torch.zeros((), device=device)  # the scaler itself has looked for inf and nan
        torch._amp_foreach_non_finite_check_and_unscale_(of_device, unused, inverse.to(device, non_blocking=True))
