"""DeepSpeed's ZeRO with DistAdamW, from what deepspeed/runtime/zero of DeepSpeed 0.19.8 allocates.

stage_1_and_2.py: the parameters are one flat tensor, padded to a multiple of 2 W elements. Each rank has an fp32 copy
of its partition, also if parameters are fp32 (``single_partition_of_fp32_groups``). A backward pass allocates
``reduce_bucket_size`` elements (``setup_buckets``). Averages of the parameters that lie in the partition, wholly or in
part, stay in memory (``copy_grads_in_partition``); ``step`` copies those of the partition to a flat tensor, and then to
fp32.

stage3.py: each parameter is divided by itself and padded. Averages have memory that stays
(``grad_partitions_flat_buffer``), and so has the bucket (``__ipg_bucket_flat_buffer``).
"""

from __future__ import annotations

from dataclasses import replace

import torch

from dist_adamw.planning.memory import Cost, Memory, Setup
from dist_adamw.planning.model import ModelShapes, Parameter

ZERO = {1: "ZeRO-1", 2: "ZeRO-2", 3: "ZeRO-3"}
_STEP = 4  # bytes of the step count of a partition
_MASTER = 4  # bytes of an fp32 weight


def zero_1(model: ModelShapes, ranks: int, setup: Setup) -> Cost:
    """Return what ZeRO-1 needs."""
    return _stage_1_or_2(model, ranks, setup, stage=1)


def zero_2(model: ModelShapes, ranks: int, setup: Setup) -> Cost:
    """Return what ZeRO-2 needs."""
    return _stage_1_or_2(model, ranks, setup, stage=2)


def _width(param: Parameter, setup: Setup) -> int:
    return 2 if setup.bf16 and param.dtype.is_floating_point else param.dtype.itemsize


def _state_bytes(setup: Setup) -> int:
    """Return the bytes of state of an element, of which DeepSpeed keeps the weight itself."""
    own = replace(setup, master_dtype=None, state_dtype=None)
    return _MASTER + own.state_bytes(torch.float32)


def _stage_1_or_2(model: ModelShapes, ranks: int, setup: Setup, *, stage: int) -> Cost:
    numel = sum(param.numel for param in model.trained)
    width = max((_width(param, setup) for param in model.trained), default=0)
    padded = -(-numel // (2 * ranks)) * 2 * ranks
    partition = padded // ranks
    frozen = sum(param.numel * _width(param, setup) for param in model.parameters if not param.trained)
    averages = _numel_touching_a_partition(model, partition) * width
    bucket = setup.reduce_bucket_size * width
    if stage == 1:
        gradients = numel * width
        backward = gradients + bucket + averages
    else:
        gradients = averages
        backward = averages + bucket + max((param.numel for param in model.trained), default=0) * width
    to_fp32 = 0 if width == _MASTER else partition * _MASTER
    step = averages + partition * width + to_fp32
    memory = Memory(
        padded * width + frozen + model.buffer_bytes,
        gradients,
        partition * _state_bytes(setup) + _STEP,
        max(backward, step) - gradients,
        setup.activations,
    )
    rounds = setup.accumulation if stage == 2 else 1
    sent = (ranks - 1) * (2 * rounds * numel * width + padded * width) // ranks
    return Cost(ZERO[stage], ranks, memory, sent)


def _numel_touching_a_partition(model: ModelShapes, partition: int) -> int:
    """Return the elements of the parameters that lie, wholly or in part, in the partition with most of them."""
    found: dict[int, int] = {}
    start = 0
    for param in model.trained:
        stop = start + param.numel
        first, last = start // partition, -(-stop // partition) - 1
        # Other parameters reach at most into the first and the last partition that this one touches.
        for rank in {first, min(first + 1, last), last} if param.numel else ():
            found[rank] = found.get(rank, 0) + param.numel
        start = stop
    return max(found.values(), default=0)


def zero_3(model: ModelShapes, ranks: int, setup: Setup) -> Cost:
    """Return what ZeRO-3 needs."""
    parts = whole = persistent = trained = frozen_whole = 0
    width = max((_width(param, setup) for param in model.parameters), default=0)
    for param in model.parameters:
        part = -(-param.numel // ranks)
        parts += part
        whole += part * ranks
        trained += part if param.trained else 0
        frozen_whole += 0 if param.trained else part * ranks
        if param.numel < setup.param_persistence_threshold:
            persistent += param.numel
    live = min(whole, setup.max_live_parameters + setup.prefetch_bucket_size)
    largest = max((param.numel for param in model.trained), default=0)
    bucket, averages = setup.reduce_bucket_size * width, trained * width
    backward = bucket + max(live - persistent, 0) * width + largest * width
    step = bucket + trained * width + (0 if width == _MASTER else trained * _MASTER)
    memory = Memory(
        (parts + persistent) * width + model.buffer_bytes,
        averages,
        trained * _state_bytes(setup) + _STEP,
        max(backward, step),
        setup.activations,
    )
    gathers = 2 * setup.accumulation * (whole - persistent) * width
    reduced = setup.accumulation * (whole - frozen_whole) * width
    return Cost(ZERO[3], ranks, memory, (ranks - 1) * (gathers + reduced) // ranks)
