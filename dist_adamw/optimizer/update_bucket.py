"""Choose the AdamW kernel for a bucket's device and dtypes, and run it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from dist_adamw.optimizer.kernels import triton as adamw_triton
from dist_adamw.optimizer.kernels.foreach import DecayBy, adamw_update_, can_fuse
from dist_adamw.optimizer.kernels.mixed import mixed_adamw_update_
from dist_adamw.optimizer.kernels.ragged import RaggedRuns, Run
from dist_adamw.optimizer.sharding.bucket_views import Operands
from dist_adamw.optimizer.sharding.shard import Shard


def is_fused(shard: Shard, fused: bool | None) -> bool:
    """Return whether ``shard`` uses a kernel that skips overflows on the device. Local; ``fused`` as in `DistAdamW`."""
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
    """Update this rank's slice of bucket ``k`` in place. Local.

    Args:
        bucket: The gradients of the slice's pieces; None leaves a piece unchanged.
        clip: Factor for gradients, 0-d fp32; None is 1.
        found_inf: 0-d fp32; if it is not 0, the update changes nothing.
        fused: See `is_fused`.
    """
    for run in shard.buckets[k].runs:
        live = [i for i in run.indices if bucket[i] is not None]
        if not live:
            continue
        grads = cast(list[Tensor], [bucket[i] for i in live])
        hyper = _hyper_parameters(run.group, decay_by)
        operands, ragged = run.operands(live), _ragged_runs(shard, k, live)
        if ragged is not None:
            operands, grads = _divide(operands, ragged), ragged.divide(grads)
        params, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, masters = operands
        state = (exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps)
        # torch's own kernels are preferred, but need equal dtypes and cannot clip.
        if not (shard.is_mixed or _clips_in_pass(clip, fused, params[0].dtype)):
            clipped = _clipped(grads, clip)
            adamw_update_(params, *state, grads=clipped, fused=fused, found_inf=found_inf if fused else None, **hyper)
        elif _can_run_triton(params[0]):
            flat = shard.moments
            adamw_triton.flat_adamw_update_(
                run.table(live, grads),
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
        if ragged is not None:
            ragged.write_back()


def _ragged_runs(shard: Shard, k: int, live: list[int]) -> RaggedRuns | None:
    """Return the pieces ``live`` of bucket ``k`` as runs of whole parameters, if it matters where they are cut."""
    cuts = shard.cuts
    if cuts is None or shard.steps.device.type != "cpu":  # on other devices all elements are computed alike
        return None
    pieces = [shard.owned.pieces[k][i] for i in live]
    runs = [Run(cuts[p.param].start + p.start, cuts[p.param].start + p.stop, cuts[p.param].numel) for p in pieces]
    return RaggedRuns(runs)


def _divide(operands: Operands, ragged: RaggedRuns) -> Operands:
    changed = operands._replace(steps=[])
    return Operands(*map(ragged.divide_to_change, changed))._replace(steps=ragged.repeat(operands.steps))


def _hyper_parameters(group: Mapping[str, Any], decay_by: DecayBy) -> dict[str, Any]:
    """Return the keyword arguments that all kernels share."""
    return {
        "lr": group["lr"],
        "betas": group["betas"],
        "eps": group["eps"],
        "weight_decay": group["weight_decay"],
        "maximize": group["maximize"],
        "decay_by": decay_by,
    }


def _clips_in_pass(clip: Tensor | None, fused: bool, dtype: torch.dtype) -> bool:
    """Return whether to clip within the update's pass over memory, which `mixed` and `triton` do, but not for fp64."""
    return fused and clip is not None and dtype != torch.float64


def _clipped(grads: list[Tensor], clip: Tensor | None) -> list[Tensor]:
    return grads if clip is None else [grad * clip.to(grad.dtype) for grad in grads]


def _can_run_triton(param: Tensor) -> bool:
    return param.is_cuda and adamw_triton.available(param.device)
