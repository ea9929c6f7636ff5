"""One AdamW pass over what this rank owns of a bucket, by the kernel that suits it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dist_adamw.optimizer.kernels import triton as adamw_triton
from dist_adamw.optimizer.kernels.foreach import DecayBy, adamw_update_, can_fuse
from dist_adamw.optimizer.kernels.mixed import mixed_adamw_update_
from dist_adamw.optimizer.sharding.shard import Shard


def is_fused(shard: Shard, fused: bool | None) -> bool:
    """Return whether ``shard`` takes a kernel that can skip an update by itself. Local; ``fused`` as in `DistAdamW`."""
    return can_fuse(shard.params[0]) if fused is None else fused


def update_bucket(
    shard: Shard,
    k: int,
    bucket: list[Tensor | None],
    *,
    clip: Tensor | None,
    found_inf: Tensor | None,
    fused: bool,
    decay_by: DecayBy,
) -> None:
    """Update what this rank owns of bucket ``k`` in place. Local.

    Args:
        bucket: The gradients of `Shard.owned_pieces`; None leaves a piece as it is.
        clip: Factor for gradients, 0-d fp32; None: 1.
        found_inf: Not 0 leaves everything as it is, 0-d fp32.
        fused: See `is_fused`.
    """
    live = [i for i, grad in enumerate(bucket) if grad is not None]
    grads = [grad for grad in bucket if grad is not None]
    if not grads:
        return
    hyper: dict[str, Any] = {name: shard.group[name] for name in ("lr", "betas", "eps", "weight_decay", "maximize")}
    hyper["decay_by"] = decay_by
    params, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, masters = shard.operands(k, live)
    state = (exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps)
    one_pass = fused and clip is not None and params[0].dtype != torch.float64
    if not (shard.is_mixed or one_pass):
        if clip is not None:
            grads = [grad * clip.to(grad.dtype) for grad in grads]
        adamw_update_(params, *state, grads=grads, fused=fused, found_inf=found_inf if fused else None, **hyper)
    elif params[0].is_cuda and adamw_triton.available(params[0].device):
        flat = shard.moments
        adamw_triton.flat_adamw_update_(
            shard.table(k, live, grads),
            flat.get("master", flat.get("remainder")),
            flat["exp_avg"],
            flat["exp_avg_sq"],
            flat.get("max_exp_avg_sq"),
            shard.steps,
            scale=clip,
            found_inf=found_inf,
            **hyper,
        )
    else:
        mixed_adamw_update_(params, grads, masters, *state, scale=clip, found_inf=found_inf, **hyper)
