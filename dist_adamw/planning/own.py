"""Engines that leave parameters whole: one process, DDP with sharded state, and torch's DDP with its AdamW.

Numbers of elements come from the layout that the optimizer itself uses. DDP runs with ``gradient_as_bucket_view=True``,
as `prepare` sets it, so gradients lie in its buckets.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from dist_adamw.optimizer.sharding.gradient_memory import OWN_BLOCK_BYTES
from dist_adamw.optimizer.transport.base import MAX_IN_FLIGHT
from dist_adamw.optimizer.transport.layout import FlatLayout
from dist_adamw.optimizer.transport.slots import SLOTS
from dist_adamw.planning.memory import Cost, Memory, Setup, sum_bytes
from dist_adamw.planning.model import ModelShapes, Parameter

ONE, DDP, TORCH_DDP = "one process", "DDP, sharded state", "DDP + torch's AdamW"
WHOLE = "micro-batches before the last are added up in gradients apart from DDP's buckets"
_STEP = 4  # bytes of a parameter's step count
_PACKED = MAX_IN_FLIGHT + 1  # a bucket is packed before the oldest of those in flight is waited for


def weight_bytes(model: ModelShapes) -> int:
    """Return the bytes of whole parameters and buffers."""
    return sum(param.nbytes for param in model.parameters) + model.buffer_bytes


def _gradient_bytes(model: ModelShapes) -> int:
    return sum(param.nbytes for param in model.trained)


def one_process(model: ModelShapes, ranks: int, setup: Setup) -> Cost:
    """Return what one process needs."""
    state = staging = 0
    for dtype, params in model.by_dtype().items():
        layout = FlatLayout(tuple(param.numel for param in params))
        state += layout.shard_numel * setup.state_bytes(dtype) + _STEP * len(params)
        if setup.reproducible:
            staging += sum_bytes(setup, 1, layout.numel, len(params), dtype=dtype, home=False)
            if setup.accumulation > 1:  # the average so far, and the gradient of the pass
                staging += layout.numel * dtype.itemsize
    if setup.reproducible:
        staging += _while_adding(model)
    else:
        # A gradient stays where backward allocated it, unless there is one to add it to.
        staging += _arriving(model) if setup.accumulation > 1 else 2 * _largest(model.tied)
    memory = Memory(weight_bytes(model), _gradient_bytes(model), state, staging, setup.activations)
    return Cost(ONE, 1, memory, 0)


def torch_ddp(model: ModelShapes, ranks: int, setup: Setup) -> Cost:
    """Return what torch's DDP and ``AdamW(fused=True)`` need, for comparison; state has the parameters' dtype."""
    gradients, count = _gradient_bytes(model), len(model.trained)
    moments = 3 if setup.amsgrad else 2
    memory = Memory(
        weight_bytes(model),
        gradients,
        moments * gradients + _STEP * count,
        _own_gradients(model, setup),
        setup.activations,
    )
    note = WHOLE if setup.accumulation > 1 else ""
    return Cost(TORCH_DDP, ranks, memory, 2 * gradients * (ranks - 1) // ranks, note)


def _own_gradients(model: ModelShapes, setup: Setup) -> int:
    """Return the bytes of gradients apart from DDP's buckets.

    A gradient is copied to its bucket when it has arrived. ``zero_grad`` sets ``grad`` to None, and DDP makes it a view
    of a bucket only in the pass that it synchronises, so earlier micro-batches are added up in other memory.
    """
    return _arriving(model) + (_gradient_bytes(model) if setup.accumulation > 1 else 0)


def _arriving(model: ModelShapes) -> int:
    """Return the bytes of what backward allocates for one gradient: a tied weight's has two terms and their sum."""
    return max(_largest(model.trained), 3 * _largest(model.tied))


def _while_adding(model: ModelShapes) -> int:
    """Return the bytes beyond all gradients of a pass: one that arrives, or the two terms of a tied weight's."""
    return max(_largest(model.trained), 2 * _largest(model.tied))


def _largest(params: Iterable[Parameter]) -> int:
    return max((param.nbytes for param in params), default=0)


def sharded_ddp(model: ModelShapes, ranks: int, setup: Setup) -> Cost:
    """Return what DistAdamW needs, attached to DDP."""
    gradients = state = staging = sent = 0
    for dtype, params in model.by_dtype().items():
        layout = FlatLayout(
            tuple(param.numel for param in params),
            ranks,
            by_collectives=setup.device == "cuda",
        )
        state += layout.shard_numel * setup.state_bytes(dtype) + _STEP * len(params)
        gradients += layout.shard_numel * dtype.itemsize if setup.reproducible else layout.numel * dtype.itemsize
        if setup.device == "cuda":
            staging += _staged_by_collectives(layout, dtype, setup)
        else:
            staging += _staged_on_host(layout, params, dtype, setup)
        rounds = setup.accumulation if setup.reproducible else 1
        reduced = dtype if setup.reduce_dtype is None else setup.reduce_dtype
        others = (ranks - 1) * layout.shard_numel
        sent += others * (rounds * reduced.itemsize + dtype.itemsize)
    on_device = setup.device == "cuda"
    if on_device:
        staging += _while_adding(model) if setup.reproducible else _own_gradients(model, setup)
    memory = Memory(weight_bytes(model), gradients, state, staging, setup.activations)
    return Cost(DDP, ranks, memory, sent, _note(setup) if on_device else "")


def _note(setup: Setup) -> str:
    if setup.reproducible:
        return "the plain module, attached: with reproducible=True DDP works on CPUs only"
    return WHOLE if setup.accumulation > 1 else ""


def _staged_by_collectives(layout: FlatLayout, dtype: torch.dtype, setup: Setup) -> int:
    """Return the bytes of buckets: packed gradients, and parameters that are gathered."""
    bucket = layout.bucket_numel
    packed, gathered = min(layout.num_buckets, _PACKED), min(layout.num_buckets, MAX_IN_FLIGHT)
    total = (packed + gathered) * bucket * dtype.itemsize
    reduced = dtype if setup.reduce_dtype is None else setup.reduce_dtype
    if reduced != dtype:
        total += gathered * bucket * reduced.itemsize
    if setup.reproducible:
        total += gathered * bucket * reduced.itemsize + _kept_for_sums(layout, dtype, setup)
    return total


def _kept_for_sums(layout: FlatLayout, dtype: torch.dtype, setup: Setup) -> int:
    """Return the bytes of the rank's own gradients, and of partial sums beyond the averages."""
    home = dtype == torch.promote_types(dtype, torch.float32)
    sums = sum_bytes(setup, layout.world_size, layout.shard_numel, layout.num_buckets, dtype=dtype, home=home)
    return layout.numel * dtype.itemsize + sums


def _staged_on_host(layout: FlatLayout, params: list[Parameter], dtype: torch.dtype, setup: Setup) -> int:
    """Return the bytes of the slots that ranks share, and of gradients that backward has allocated and not yet freed.

    Slots of the other ranks are counted as far as this rank reads them. Gradients that `GradientMemory` leaves where
    they are do not exist twice.
    """
    slice_numel = layout.bucket_numel // layout.world_size
    slots = 2 * SLOTS * (layout.world_size - 1) * slice_numel
    moved = [param.numel for param in params if param.nbytes < OWN_BLOCK_BYTES]
    arriving = min(sum(moved), MAX_IN_FLIGHT * layout.bucket_numel + max(moved, default=0))
    total = (slots + arriving) * dtype.itemsize
    if setup.reproducible:
        total += _kept_for_sums(layout, dtype, setup)
    return total
