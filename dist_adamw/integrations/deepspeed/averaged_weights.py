"""Averages of the weights in DeepSpeed's ZeRO engines: show one in the model, and read the saved ones."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dist_adamw.checkpoint.local_state import MASTER, MODEL, CheckpointContents
from dist_adamw.optimizer.adamw import DistAdamW
from dist_adamw.optimizer.averages import dtypes_of
from dist_adamw.optimizer.sharding.bucket_views import MOMENTS
from dist_adamw.optimizer.sharding.shard import Shard
from dist_adamw.optimizer.shown_weights import WeightsOf
from dist_adamw.wrappers import unwrap


def begin_averages(optimizer: Optimizer, partition: Tensor, elements: Callable[[Tensor], Tensor]) -> None:
    """Set averages to the weights, in the ``elements`` of a flat partition whose weights were never updated. Local."""
    if isinstance(optimizer, DistAdamW):
        for name in dtypes_of(optimizer.averages).keys() & optimizer.state.get(partition, {}).keys():
            elements(optimizer.state[partition][name]).copy_(elements(partition))


def to_read(found: CheckpointContents, optimizer: Optimizer) -> list[str]:
    """Return the kinds of saved state that an optimizer reads: all but averages that it does not keep. Local."""
    kinds = {kind for name in found.scalars for kind in found.kinds.get(name, ())} - {MODEL, MASTER}
    if not isinstance(optimizer, DistAdamW):
        return sorted(kinds)
    return sorted(kinds & {*MOMENTS, *dtypes_of(optimizer.averages)})


def show_averages(engine: Any) -> None:
    """Make ``averaged()`` of an engine's `DistAdamW` write to the engine's weights. Local."""
    optimizer = unwrap(engine.optimizer)
    if isinstance(optimizer, DistAdamW):
        optimizer.use_model(engine.module)
        engine.optimizer.averaged = optimizer.averaged
        if _is_stage_3(engine.optimizer) or hasattr(engine.optimizer, "bit16_groups_flat"):
            optimizer._engine_weights = functools.partial(_weights_of, weakref.ref(engine))


def _is_stage_3(zero: Any) -> bool:
    return hasattr(zero, "fp16_partitioned_groups_flat")


@contextlib.contextmanager
def _weights_of(engine: weakref.ref[Any]) -> Iterator[WeightsOf]:
    """Give a function that writes this rank's partitions and gathers the model's weights; undo it at the end.

    Collective, for stage 3 at the end too.
    """
    alive = engine()
    assert alive is not None
    zero, optimizer = alive.optimizer, unwrap(alive.optimizer)
    assert isinstance(optimizer, DistAdamW)
    flats = zero.fp16_partitioned_groups_flat if _is_stage_3(zero) else zero.bit16_groups_flat
    before = [flat.detach().clone() for flat in flats]

    def write(values: Callable[[Shard, int], Tensor]) -> None:
        shards = {id(shard.params[0]): shard for shard in optimizer.shards}
        for partition, weights in zip(*_partitions(zero), strict=True):
            weights.copy_(values(shards[id(partition)], 0))
        _gather(zero)

    try:
        yield write
    finally:
        with torch.no_grad():
            for flat, kept in zip(flats, before, strict=True):
                flat.copy_(kept)
            if _is_stage_3(zero):
                _gather(zero)


def _partitions(zero: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Return this rank's fp32 partitions, and the same elements in the model's dtype."""
    if _is_stage_3(zero):
        return zero.fp32_partitioned_groups_flat, zero.fp16_partitioned_groups_flat
    ranks = [torch.distributed.get_rank(group) for group in zero.real_dp_process_group]
    of_ranks = zip(zero.parallel_partitioned_bit16_groups, ranks, strict=True)
    return zero.single_partition_of_fp32_groups, [parts[rank].data for parts, rank in of_ranks]


def _gather(zero: Any) -> None:
    """Bring the partitions to where the model reads its weights. Collective."""
    if _is_stage_3(zero):  # partition what was gathered, and gather persistent parameters again
        zero.checkpoint_event_prologue()
        zero.checkpoint_event_epilogue()
        return
    from deepspeed.runtime.utils import all_gather_dp_groups

    all_gather_dp_groups(
        groups_flat=zero.bit16_groups_flat,
        partitioned_param_groups=zero.parallel_partitioned_bit16_groups,
        dp_process_group=zero.real_dp_process_group,
        start_alignment_factor=zero.nccl_start_alignment_factor,
        allgather_bucket_size=zero.allgather_bucket_size,
    )
