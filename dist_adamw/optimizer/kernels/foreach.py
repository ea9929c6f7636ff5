"""AdamW arithmetic on lists of tensors. The caller chooses which run of each weight to pass."""

from __future__ import annotations

import math
import mmap
from typing import Literal, cast

import torch
from torch import Tensor
from torch.optim.adamw import adamw

DecayBy = Literal["lr", "schedule"]

_PAGE, _APART = 4096, 640  # bytes

# Devices for which torch has a fused kernel; others use foreach arithmetic.
_FUSED_DEVICES = frozenset({"cpu", "cuda", "mps", "xpu", "hpu", "mtia"})


def can_fuse(param: Tensor) -> bool:
    """Return whether torch's fused AdamW kernel can update ``param``."""
    return param.device.type in _FUSED_DEVICES and param.is_floating_point()


def adamw_update_(
    params: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    *,
    grads: list[Tensor],
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    decay_by: DecayBy,
    maximize: bool,
    fused: bool,
    found_inf: Tensor | None = None,
) -> None:
    """Apply one AdamW update in place.

    The update is elementwise, so updating a slice gives the same result as slicing the updated whole. Local.

    Args:
        params: Weights, of any shapes; the next lists match them tensor by tensor.
        max_exp_avg_sqs: Running maxima of ``exp_avg_sqs`` (amsgrad), or empty.
        steps: Updates so far, this one included, as 0-d fp32 tensors. Not changed.
        grads: Gradients averaged over the global batch. Not changed.
        lr: Step size after scheduling (the paper's eta_t * alpha).
        weight_decay: With ``decay_by="lr"`` it is multiplied by ``lr``, as in torch; with "schedule" it is the whole
            decay of this update, as in the paper. Either way an update with lr == 0 does not change the weights.
        fused: Use torch's fused kernel rather than its foreach arithmetic.
        found_inf: 0-d; if it is 1, the fused kernel changes nothing, without the host reading it. None with
            ``fused=False``.

    Source: Loshchilov & Hutter, arXiv:1711.05101, Algorithm 2.
    """
    if not params:
        return
    if decay_by == "schedule":
        weight_decay = _decay_beside_lr(params, lr, weight_decay, found_inf)
    amsgrad = bool(max_exp_avg_sqs)
    if fused:
        torch._fused_adamw_(
            params,
            grads,
            exp_avgs,
            exp_avg_sqs,
            max_exp_avg_sqs,
            steps,
            lr=cast(float, lr),  # torch's stub has an overload for either, none for both
            beta1=betas[0],
            beta2=betas[1],
            weight_decay=weight_decay,
            eps=eps,
            amsgrad=amsgrad,
            maximize=maximize,
            found_inf=found_inf,
        )
        return
    adamw(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        max_exp_avg_sqs,
        [step - 1 for step in steps],  # torch's function counts the update itself
        foreach=True,
        amsgrad=amsgrad,
        beta1=betas[0],
        beta2=betas[1],
        lr=lr,
        weight_decay=weight_decay,
        eps=eps,
        maximize=maximize,
    )


def _decay_beside_lr(params: list[Tensor], lr: float | Tensor, decay: float, found_inf: Tensor | None) -> float:
    """Return the weight decay to pass to a kernel that multiplies it by ``lr``.

    Dividing by a tensor ``lr`` would make the host wait for the device, so in that case ``params`` are decayed here.
    """
    if isinstance(lr, Tensor):
        factor = 1 - decay * (lr != 0) * (1 if found_inf is None else 1 - found_inf)
        torch._foreach_mul_(params, factor.to(params[0].device, params[0].dtype))
        return 0.0
    return decay_over_lr(lr, decay)


def decay_over_lr(lr: float, decay: float) -> float:
    """Return the weight decay that, multiplied by ``lr``, is ``decay``; 0 if ``lr`` is 0."""
    over = decay / lr if lr else 0.0
    return over if math.isfinite(over) else 0.0  # lr below 1e-308 counts as 0


def zeros_apart(numel: int, place: int, *, dtype: torch.dtype, device: torch.device, untouched: bool = False) -> Tensor:
    """Return ``numel`` zeros, 1-D, for state that one pass reads and writes together with other state.

    With ``untouched``, elements on a CPU take memory only once they are written.

    On a CPU, ``place`` (0 to 5) selects the offset within the memory page. Most large tensors start at the same offset
    (place 0, so state does not use it), and a pass over several of them then takes up to twice as long: the processor
    first compares only the low 12 bits of a load's address with earlier stores, and waits if they agree.
    """
    if device.type != "cpu":
        return torch.zeros(numel, dtype=dtype, device=device)
    spare = _PAGE // dtype.itemsize
    memory = (_untouched_zeros if untouched else torch.zeros)(numel + spare, dtype=dtype)
    wanted = 64 + _APART * place  # torch aligns to 64
    shift = (wanted - memory.data_ptr()) % _PAGE // dtype.itemsize
    return memory[shift : shift + numel]


def _untouched_zeros(numel: int, dtype: torch.dtype) -> Tensor:
    if not hasattr(mmap, "MAP_PRIVATE"):  # not on Windows
        return torch.zeros(numel, dtype=dtype)
    pages = mmap.mmap(-1, numel * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype)


def sum_of_squares(tensors: list[Tensor]) -> Tensor:
    """Return the sum of squares of all elements, as a 0-d fp64 tensor on the first tensor's device. Local."""
    device = tensors[0].device
    wide = torch.float64 if device.type != "mps" else torch.float32  # MPS has no fp64
    parts: list[Tensor] = []
    for doubles, dtype in ((True, torch.float64), (False, torch.float32)):
        alike = [t for t in tensors if (t.dtype == torch.float64) == doubles]
        if alike:
            norms = torch._foreach_norm(alike, 2, dtype=dtype)
            # Few operations: on a GPU each is a launch, of a kernel that takes longer to launch than to run.
            together = torch.stack([norm.to(device) for norm in norms])
            norm: Tensor = torch.linalg.vector_norm(together, dtype=wide)
            parts.append(norm.square())
    return parts[0] if len(parts) == 1 else parts[0] + parts[1]


def norm_parts(tensors: list[Tensor], norm_type: float) -> Tensor:
    """Return this rank's term of the norm of all elements: the sum of |x| ** p; for p = inf the largest |x|.

    A 0-d fp64 tensor on the first tensor's device. Local.
    """
    if norm_type == 2.0:
        return sum_of_squares(tensors)
    norms = torch.stack([norm.to(tensors[0].device) for norm in torch._foreach_norm(tensors, norm_type)])
    wide = norms.to(torch.float64 if norms.device.type != "mps" else torch.float32)
    return wide.max() if norm_type == math.inf else wide.pow(norm_type).sum()
